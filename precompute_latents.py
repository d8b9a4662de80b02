"""Encodes a dataset into a latent cache that the trainers read: images with captions or labels, crystals, or cells.

    python precompute_latents.py --train_data_dir photos --caption_column text --resolution 256 --latents_dir cache
    accelerate launch --multi_gpu precompute_latents.py --dataset_name uoft-cs/cifar10 --label_column label ...
    python precompute_latents.py --modality crystal --dataset_name mp_20.parquet --latents_dir cache \\
        --pretrained_vae_model_name_or_path runs/crystals/vae
    python precompute_latents.py --modality expression --dataset_name pbmc.h5ad --latents_dir cache \\
        --pretrained_vae_model_name_or_path runs/pbmc/vae

--help shows the flags of images, --modality crystal --help and --modality expression --help those of the others.
Killed at any moment and started again it continues. Several processes each encode their own shards.
"""

import argparse
from pathlib import Path

from utils.args.parsing import non_negative_int, parse_with_config, peek, required, run_script
from utils.modalities import MODALITIES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=list(MODALITIES), default="image", help="What the dataset holds.")
    parser.add_argument(
        "--latents_dir", "--output_dir", default=None, help="Folder of the latent cache: new, unfinished or finished."
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="Seed of random crops and translations.")
    add_flags, check_flags = MODALITIES[peek(parser, "modality")].precompute_flags
    add_flags(parser)
    args = parse_with_config(parser)
    required(args, "latents_dir")
    check_flags(args)
    return args


def main(args: argparse.Namespace) -> None:
    import logging

    from utils.training.setup import make_accelerator

    # Load
    modality = MODALITIES[args.modality]
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, seed=args.seed)

    # Encode
    spec = modality.load("precompute:build_cache")(args, accelerator, Path(args.latents_dir))

    # Report
    facts = "".join(f", {fact}" for fact in modality.load("precompute:facts_of")(spec))
    logging.getLogger(__name__).info(
        "%s: %d latents of %s (%s%s)%s; %d %s skipped",
        args.latents_dir,
        spec.num_rows,
        " x ".join(map(str, spec.shape)),
        spec.content,
        ", and mirrored" if spec.flips else "",
        facts,
        spec.num_skipped,
        modality.samples,
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
