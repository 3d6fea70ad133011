"""Make a checkpoint ready to be given away: weights in half precision, with the scores of fold 9's normals.

    python -m tools.ship_weights --data_path ./data/ --load_path run/model.pt --save_path ckpt/mymodel.pt --half 1

The scores are those of the weights that are written, under each protocol, for the percentiles of recordings of one's
own. The optimizer of a last.pt is left out, and with --reference 0 the scores too. All else in the file stays.
"""
import argparse
from pathlib import Path

from model import load_checkpoint, read_checkpoint, save_checkpoint
from scoring.percentiles import KEY, RATIO_KEY, score_normals
from utils import UserError, add_published_flags, check_published_flags, choose_device, require_writable, run

OPTIMIZER = "optimizer_state_dict"      # in a last.pt of train.py


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_published_flags(parser, "data_path", "mask_ratio")
    parser.add_argument("--load_path", default="./ckpt/mymodel.pt", help="checkpoint (default %(default)s)")
    parser.add_argument("--save_path", help="where the checkpoint is written (default: --load_path)")
    parser.add_argument("--half", type=int, choices=(0, 1), default=0, help="1: write the weights in half precision")
    parser.add_argument("--reference", type=int, choices=(0, 1), default=1,
                        help="0: leave the scores of fold 9's normals out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flags = parser.parse_args()
    check_published_flags(flags)
    return flags


def main():
    flags = parse_arguments()
    path = Path(flags.save_path or flags.load_path)
    require_writable(path, is_folder=False)
    device = choose_device(flags.device)
    model, facts = load_checkpoint(flags.load_path)
    if path.exists() and OPTIMIZER in read_checkpoint(path):
        raise UserError(f"{path} would lose its optimizer, which --resume needs; name another file with --save_path")
    config = facts.get("config")
    if flags.reference and not (isinstance(config, dict) and config.get("protocol") == "clean"):
        print("the weights do not say that fold 9 was held back: percentiles among its normals are optimistic")
    weights = model.state_dict()
    if flags.half:
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        model.load_state_dict(weights)                  # score what is written
    facts = {name: value for name, value in facts.items() if name not in (OPTIMIZER, KEY, RATIO_KEY)}
    if flags.reference:
        facts |= score_normals(model.to(device), flags.data_path, flags.mask_ratio)
    save_checkpoint(path, model, **facts, model_state_dict=weights)
    print(f"written to {path}")


if __name__ == "__main__":
    run(main)
