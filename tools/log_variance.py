"""Where the log-variances of a trained network lie: the published uncertainty ends at the end of its Tanh.

    python -m tools.log_variance --data_path ./data/ --load_path ./ckpt/mymodel.pt

Prints the share of log-variances below -0.99 and their quantiles, over the clean passes of the first records of fold
10. Where all are near -1, exp(-s) is the constant e, and the loss is a plain squared error (paper, eq. 3).
"""
import argparse

import torch

from ecg.arrays import load_r_peaks, open_records
from model import load_checkpoint
from scoring.passes import Scorer
from scoring.protocols import CLEAN
from utils import UserError, add_published_flags, check_published_flags, run

END = -0.99                             # of Tanh, whose range ends at -1
QUANTILES = (0.5, 0.99, 0.999, 0.9999)


@torch.inference_mode()
def log_variances(scorer: Scorer, records, r_peaks: list, rows) -> dict:
    """{"global": (passes * beats * 4800,), "local": (passes * beats * 480,)}: what the network says of rows."""
    parts = {"global": [], "local": []}
    for _, _, ((_, of_global), (_, of_local), _) in scorer.passes(scorer.prepare(records, r_peaks, rows)):
        parts["global"].append(of_global.flatten())
        parts["local"].append(of_local.flatten())
    return {branch: torch.cat(values) for branch, values in parts.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_published_flags(parser, "data_path", "mask_ratio")
    parser.add_argument("--load_path", default="./ckpt/mymodel.pt", help="checkpoint (default %(default)s)")
    parser.add_argument("--records", type=int, default=100, help="how many records of fold 10 (default %(default)s)")
    flags = parser.parse_args()
    check_published_flags(flags)
    model, _ = load_checkpoint(flags.load_path)
    if model.uncertainty != "log_variance":
        raise UserError(f"{flags.load_path} was trained with --uncertainty {model.uncertainty}; name another "
                        "checkpoint")
    if not {"global", "local"} <= set(model.parts):
        raise UserError(f"{flags.load_path} was trained with one of --branches alone; name another checkpoint")
    records = open_records(flags.data_path, "test", model.leads)
    r_peaks = load_r_peaks(flags.data_path, "test", records, CLEAN.detector)
    rows = list(range(min(flags.records, len(records))))
    for branch, values in log_variances(Scorer(model, CLEAN, flags.mask_ratio), records, r_peaks, rows).items():
        quantiles = (float(values.kthvalue(int(at * len(values)))[0]) for at in QUANTILES)
        told = ", ".join(f"{100 * at:g} % {value:.4f}" for at, value in zip(QUANTILES, quantiles))
        share = float((values < END).double().mean())
        print(f"{branch}: {share:.2%} of {len(values):,} log-variances are below {END}; quantiles: {told}")


if __name__ == "__main__":
    run(main)
