"""Fit the score without a network to the normals of folds 1-8, for recordings of one's own.

    python -m tools.fit_no_network --data_path ./data/ --save_path ckpt/no_network.npz

The file holds plain arrays: the fit, the usual range of each measurement, and the scores of fold 9's normals.
"""
import argparse

import numpy as np

from ecg.arrays import load_r_peaks, open_labels, open_records
from ecg.signals import LEAD_NAMES
from evaluation import rival
from scoring import without_network
from utils import UserError, require_writable, run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="./data/", help="folder of the arrays (default %(default)s)")
    parser.add_argument("--save_path", default=str(rival.FITTED_FILE), help="where the fit is written")
    flags = parser.parse_args()
    require_writable(flags.save_path, is_folder=False)
    fitted, _ = rival.fit_rival(flags.data_path, len(LEAD_NAMES))
    if fitted is None:
        raise UserError(f"nothing was fitted; make the arrays of PTB-XL in {flags.data_path} with preprocess.py")
    records = open_records(flags.data_path, "val", len(LEAD_NAMES))
    r_peaks = load_r_peaks(flags.data_path, "val", records, rival.DETECTOR)
    normal = np.flatnonzero(open_labels(flags.data_path, "val", (len(records),)) == 0)
    features = rival.describe(records, r_peaks, normal)
    rival.save_rival(flags.save_path, fitted, without_network.score(fitted, features))
    print(f"written to {flags.save_path}, with the scores of {len(features)} normals of fold 9")


if __name__ == "__main__":
    run(main)
