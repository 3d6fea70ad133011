"""Which columns of a file are the twelve leads, in mV: names as people write them, units, and derived leads.

A file may hold the leads in any order, with others between them. Where limb leads are absent, they follow from two of
I, II and III: III = II - I (Einthoven); aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2 (Goldberger).
"""
import re
import unicodedata
from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import block_diag

from ecg.signals import LARGEST_MILLIVOLTS, LEAD_NAMES, RecordError

# "Lead I", "ECG I", "lead_i", "MDC_ECG_LEAD_AVR"; C1 to C6 are V1 to V6 (IEC 60601)
LEAD = re.compile(r"(?:mdc[ _])?(?:(?:ecg|ekg|lead|ableitung)[ _.:-]*)*(iii|ii|i|avr|avl|avf|[vc][1-6])", re.IGNORECASE)
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "nv": 1e-6}   # not "v": wfdb reads a Greek micro sign as no letter, and µV as V
DERIVED = {"III": {"II": 1, "I": -1}, "II": {"I": 1, "III": 1}, "I": {"II": 1, "III": -1},
           "aVR": {"I": -0.5, "II": -0.5}, "aVL": {"I": 1, "II": -0.5}, "aVF": {"II": 1, "I": -0.5}}
INDEPENDENT = [0, 1, 6, 7, 8, 9, 10, 11]            # I, II, V1-V6 among the twelve: the others are sums of I and II
# (12, 8), from the independent leads to the twelve
TO_TWELVE = block_diag([[1, 0], [0, 1], [-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]], np.eye(6))


def lead_named(name: str) -> str | None:
    """The one of LEAD_NAMES that a name means, or None."""
    match = LEAD.fullmatch(str(name).strip())
    plain = match and match[1].upper().replace("C", "V")
    return next((lead for lead in LEAD_NAMES if lead.upper() == plain), None)


def millivolts_in(unit: str, lead: str) -> float:
    """What values of a lead in this unit are multiplied with to be in mV. Raises RecordError."""
    plain = unicodedata.normalize("NFKC", unit).strip().lower().replace("μ", "u")   # the letter, and the micro sign
    plain = {"millivolt": "mv", "millivolts": "mv", "microvolt": "uv", "microvolts": "uv"}.get(plain, plain)
    if plain not in MILLIVOLTS:
        raise RecordError(f"lead {lead} is in {unit!r}", "convert it to mV or uV")
    return MILLIVOLTS[plain]


@dataclass
class Leads:
    """How the columns of a file become twelve leads: values[:, columns] @ weights is (samples, 12) in mV."""
    columns: list
    weights: np.ndarray             # (columns, 12)
    notes: list = field(default_factory=list)

    def of(self, values: np.ndarray, first: int, rate: float) -> np.ndarray:
        """(samples, all columns) -> (samples, 12) mV. first: number of the first sample, at rate, Hz.

        Raises RecordError where a lead's sample is missing (NaN), or larger than any ECG.
        """
        signal = values[:, self.columns]
        missing, place = np.nonzero(~np.isfinite(signal).T)
        if len(missing):
            lead = LEAD_NAMES[np.flatnonzero(self.weights[missing[0]])[0]]
            raise RecordError(f"missing samples in lead {lead}, the first at {(first + place[0]) / rate:.6g} s",
                              "fill them in, or cut the recording there")
        signal = signal @ self.weights
        largest = np.abs(signal).max(axis=0)
        if largest.max() > LARGEST_MILLIVOLTS:
            raise RecordError(f"lead {LEAD_NAMES[largest.argmax()]} reaches {largest.max():.3g} mV", "correct its gain "
                              "or unit")
        return signal


def find_leads(names: list, factor_of, ignored=()) -> Leads:
    """Find the twelve leads among the names of columns.

    factor_of(column, lead): what its values are multiplied with to be in mV; ignored: names that need no word.
    Raises RecordError where a lead is there twice, or absent and does not follow from others.
    """
    columns_of = {lead: [column for column, name in enumerate(names) if lead_named(name) == lead]
                  for lead in LEAD_NAMES}
    doubled = [lead for lead, columns in columns_of.items() if len(columns) > 1]
    if doubled:
        raise RecordError(f"more than one lead {', '.join(doubled)}", "rename one of the two, or remove it")
    columns = [column for column_list in columns_of.values() for column in column_list]
    rows = {lead: np.eye(1, len(columns), columns.index(of[0]))[0] * factor_of(of[0], lead)
            for lead, of in columns_of.items() if of}
    derived = []
    for _ in range(2):                      # the augmented leads need I and II, of which one may itself be derived
        for lead, terms in DERIVED.items():
            if lead not in rows and terms.keys() <= rows.keys():
                rows[lead] = sum(weight * rows[other] for other, weight in terms.items())
                derived.append(lead)
    absent = [lead for lead in LEAD_NAMES if lead not in rows]
    if absent:
        raise RecordError(f"no lead {', '.join(absent)}", "all twelve are needed, by name; III, aVR, aVL and aVF "
                          "follow from I and II where they are absent")
    notes = [f"{', '.join(lead for lead in LEAD_NAMES if lead in derived)} derived from the other limb leads"] * bool(
        derived)
    others = [str(name) for column, name in enumerate(names) if column not in columns and name not in ignored]
    if others:
        notes.append(f"not one of the twelve leads, left out: {', '.join(others)[:200]}")
    return Leads(columns, np.stack([rows[lead] for lead in LEAD_NAMES], axis=1), notes)
