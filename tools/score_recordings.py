"""Score recordings of one's own by a trained checkpoint; test.py --record does the same.

    python -m tools.score_recordings one.hea two.csv --load_path ./ckpt/mymodel.pt --output_dir results/own

ecg/recording_files.py says which files are read, evaluation/recordings.py what is written. Not for clinical use.
"""
import argparse

from evaluation.recordings import add_flags, score_recordings, settings_of
from scoring.protocols import PROTOCOLS
from utils import UserError, run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="+", metavar="FILE", help="WFDB record or .csv file")
    parser.add_argument("--load_path", default="./ckpt/mymodel.pt", help="checkpoint (default %(default)s)")
    parser.add_argument("--output_dir", default="results/", help="folder for the scores (default %(default)s)")
    parser.add_argument("--protocol", choices=("all", *PROTOCOLS), default="all")
    parser.add_argument("--mask_ratio", type=int, default=30, help="percent masked (default %(default)s)")
    parser.add_argument("--figures", type=int, metavar="N", help="windows to draw of each recording, the most "
                        "anomalous ones (default 10)")
    add_flags(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    arguments = parser.parse_args()
    if not 0 <= arguments.mask_ratio <= 100:
        raise UserError(f"--mask_ratio {arguments.mask_ratio} is out of range; choose 0 to 100")
    names = tuple(PROTOCOLS) if arguments.protocol == "all" else (arguments.protocol,)
    score_recordings(arguments.record, arguments.load_path, arguments.output_dir, settings_of(arguments, names))


if __name__ == "__main__":
    run(main)
