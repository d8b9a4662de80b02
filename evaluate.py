"""Measures images against real ones (FID, KID, CMMD, precision, recall, CLIP score, accuracy, copies), or crystals, or
cells.

    python evaluate.py --samples runs/mine/sampled/0000 --reference photos --features inception
    python evaluate.py --model runs/mine --reference uoft-cs/cifar10 --num_samples 10000 --classifier runs/classifier
    python evaluate.py --model runs/mine --reference photos --sweep guidance_scale 1 2 3 5 7.5

    python evaluate.py --modality crystal --model runs/crystals/ldm --reference mp.parquet --training_data mp.parquet
    python evaluate.py --modality expression --model runs/pbmc/ldm --reference pbmc.h5ad

--help shows the flags of images, --modality crystal --help those of crystals, --modality expression --help those of
cells. Writes metrics.json and report.html.
docs/evaluation.md says what each figure means and what it hides.
"""

import argparse
from pathlib import Path

from utils.args.parsing import parse_with_config, peek, run_script
from utils.modalities import MODALITIES, check_modality


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=list(MODALITIES), default="image", help="What is judged.")
    add_flags, check_flags = MODALITIES[peek(parser, "modality")].evaluation_flags
    add_flags(parser)
    args = parse_with_config(parser)
    check_flags(args)
    return args


def main(args: argparse.Namespace) -> None:
    from utils.runs.load import newest_run

    if args.samples is None:
        args.model = args.model or str(newest_run(Path("runs")))
        check_modality(Path(args.model), args.modality)
    MODALITIES[args.modality].load("evaluation.evaluate:evaluate")(args)


if __name__ == "__main__":
    run_script(main, parse_args)
