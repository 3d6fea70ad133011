"""How rare what a record shows at a place is among normals, and the beat that the network expects there: for figures.

Rarity is -log10 of the share of training normals that are as unusual at the same place of the beat in the same lead:
0.3 is the usual, 1 is one normal in ten, and 3, the most that is told, one in 1,000.
"""
import numpy as np

from dataloader import crop_global
from ecg.arrays import Records
from scoring.beat_frame import PLACE, lay_back, typical_beats
from scoring.beat_restorer import BeatRestorer
from scoring.maps import network_unusualness

LEVELS = np.array([0.5, 0.9, 0.97, 0.99, 0.997, 0.999])
RARITIES = -np.log10(1 - LEVELS)            # 0.3 ... 3
NEIGHBOURS = 2                              # places before and after whose normals count too: 1 in 1,000 needs many


def fit_rarity(fitted: dict) -> np.ndarray:
    """The LEVELS' quantiles of normals' unusualness by place and lead, (6, 103, 12). fitted: of fit_maps()."""
    unusual = fitted["network"]["normals"]
    places = np.arange(unusual.shape[1])
    around = [unusual[:, np.clip(places + shift, 0, len(places) - 1)] for shift in range(-NEIGHBOURS, NEIGHBOURS + 1)]
    return np.quantile(np.concatenate(around), LEVELS, axis=0)


def rarity(quantiles: np.ndarray, unusual: np.ndarray) -> np.ndarray:
    """Unusualness (103, 12) -> rarity 0 ... 3, in straight lines between the LEVELS."""
    levels = np.concatenate([[0], RARITIES])
    # rarity 0 is as far below the median as 1 is above it
    bounds = np.concatenate([2 * quantiles[:1] - quantiles[1:2], quantiles])
    steps = np.clip((unusual - bounds[:-1]) / np.maximum(np.diff(bounds, axis=0), 1e-6), 0, 1)
    return np.tensordot(np.diff(levels), steps, axes=1)


def show_record(fitted: dict, quantiles: np.ndarray, records: Records, r_peaks: list, row: int,
                restorer: BeatRestorer) -> tuple:
    """One record for a figure: as it is, as the network expects it (both mV), and rarity; (4800, 12) float32 each.

    Expected is the restored median beat, laid on every beat. r_peaks: of every record.
    """
    beats, rr = typical_beats(records, r_peaks, [row])
    expected, odds = restorer.restore(beats, rr)
    unusual = network_unusualness(fitted["network"], beats - expected, odds)[0]
    at_beats = [np.repeat(lay_back(values, r_peaks[row]), PLACE, axis=0).astype(np.float32)
                for values in (expected[0], rarity(quantiles, unusual))]
    return crop_global(records.millivolts([row]))[0], *at_beats
