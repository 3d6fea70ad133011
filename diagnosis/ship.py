"""Make a checkpoint ready to be given away: half precision, without decoders and attribute head.

    python -m diagnosis.ship --data_path ./data/ --load_path runs/ad.pt --save_path ckpt/diagnosis.pt

Thresholds and calibration are measured again on fold 9, with the weights that are written.
"""
import argparse

from diagnosis.arrays import load_statements
from diagnosis.calibration import calibrate
from diagnosis.features import logits_of
from diagnosis.model import load_diagnoser
from diagnosis.test import require_same_statements
from ecg.arrays import VALIDATION_FOLD
from model import save_checkpoint
from utils import require_writable, run

LEFT_OUT = ("mcf.global_decoder", "mcf.local_decoder", "mcf.trend_decoder", "attribute_head")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="./data/", help="folder of the arrays (default %(default)s)")
    parser.add_argument("--load_path", required=True, help="checkpoint of diagnosis.train")
    parser.add_argument("--save_path", default="./ckpt/diagnosis.pt", help="what is written (default %(default)s)")
    return parser.parse_args()


def main():
    flags = parse_arguments()
    require_writable(flags.save_path, is_folder=False)
    statements, (network, facts) = load_statements(flags.data_path), load_diagnoser(flags.load_path)
    require_same_statements(flags.load_path, facts, statements)
    weights = {name: value.half() if value.is_floating_point() else value
               for name, value in network.state_dict().items() if not name.startswith(LEFT_OUT)}
    network.load_state_dict(weights, strict=False)              # measure what is written
    rows = statements.rows_of(VALIDATION_FOLD)
    facts["calibration"] = calibrate(statements.labels[rows], logits_of(network, statements, rows, flags.data_path),
                                     facts["calibration"]["prevalence"])
    save_checkpoint(flags.save_path, network, **facts, model_state_dict=weights)
    print(f"written to {flags.save_path}")


if __name__ == "__main__":
    run(main)
