"""Diagnosis without a network, which every network has to beat: a logistic regression for each statement.

    "age, sex, heart rate"   the attributes and their squares; an unknown one is 0, and marked
    "measurements"           what scoring/without_network.py takes off a record's median beat and rhythm: shape by
                             principal components, waves lead by lead, RR intervals; neither age nor sex

Both are fitted to the records of folds 1-8 that the network's head learns from. Penalty and squares were chosen on fold
9, where the penalty hardly matters from 0.003 to 0.03.
"""
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from diagnosis.arrays import SPLIT, Statements
from ecg.arrays import load_r_peaks
from evaluation.rival import DETECTOR, describe
from scoring import without_network

PEOPLE, MEASUREMENTS = "age, sex, heart rate", "measurements"
PENALTY = 0.01              # scikit-learn's C: less is more of it
FARTHEST = 10               # standard deviations, beyond which a number counts no more


def diagnose_without_network(statements: Statements, data_path, rows: np.ndarray) -> dict:
    """{rival: logits (rows, classes)}. Raises UserError."""
    training = statements.training_rows()
    r_peaks = load_r_peaks(data_path, SPLIT, statements.records, DETECTOR)
    features = describe(statements.records, r_peaks)                                                # (N, 849)
    return {PEOPLE: fit_and_score(people_numbers(statements.attributes), statements.labels, training, rows),
            MEASUREMENTS: fit_and_score(beat_numbers(features, training), statements.labels, training, rows)}


def people_numbers(attributes: np.ndarray) -> np.ndarray:
    """Attributes (N, A), standardised, NaN where unknown -> (N, 3 A), without NaN."""
    known = np.nan_to_num(attributes)
    return np.concatenate([known, known ** 2, np.isnan(attributes)], axis=1)


def beat_numbers(features: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Features (N, 849) -> (N, components and measurements). training: the rows that the components come from."""
    _, components = without_network.project(without_network.fit_shape(features[training]), features)
    return np.concatenate([components, *without_network.scaled(features).values()], axis=1)


def fit_and_score(numbers: np.ndarray, labels: np.ndarray, training: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Fit every statement to the training rows; logits of rows, (rows, classes), 0 where training has one class alone.

    numbers: (N, n); labels: (N, classes).
    """
    scaler = StandardScaler().fit(numbers[training])
    inputs, tested = (np.clip(scaler.transform(numbers[some]), -FARTHEST, FARTHEST) for some in (training, rows))
    logits = np.zeros((len(rows), labels.shape[1]), np.float32)
    for column, present in enumerate(tqdm(labels[training].T, desc="fit the rival", leave=False)):
        if 0 < present.sum() < len(present):
            regression = LogisticRegression(C=PENALTY, max_iter=1000).fit(inputs, present)
            logits[:, column] = regression.decision_function(tested)
    return logits
