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

from utils.args.parsing import non_negative_int, parse_with_config, peek, positive_int, required, run_script
from utils.crystal import args as crystal_args
from utils.errors import UserError
from utils.expression import args as expression_args
from utils.image.args import data, text
from utils.image.args import data as input_args


def add_image_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default=None,
        help="Autocast precision of the VAE. Default: the setting of accelerate.",
    )
    input_args.add_dataset_args(parser)
    text.add_condition_args(parser)
    input_args.add_cache_args(parser)
    group = parser.add_argument_group("parts")
    group.add_argument(
        "--num_parts",
        type=positive_int,
        default=1,
        help="Number of parts of a cache that is too large for one disk; in training, each machine reads a part.",
    )
    group.add_argument("--part_index", type=non_negative_int, default=0, help="Index of the part to make, from 0 on.")


def check_image_args(args: argparse.Namespace) -> None:
    data.check_codec_args(args)
    if args.part_index >= args.num_parts:
        raise UserError(f"--part_index {args.part_index}: the parts are 0 to {args.num_parts - 1} (--num_parts)")
    if not args.dataset_name and not args.train_data_dir:
        raise UserError("give --dataset_name (hub name, folder or parquet file) or --train_data_dir (an image folder)")


def add_crystal_args(parser: argparse.ArgumentParser) -> None:
    crystal_args.add_crystal_data_args(parser)
    crystal_args.add_crystal_cache_args(parser)


def check_crystal_args(args: argparse.Namespace) -> None:
    required(args, "dataset_name", "pretrained_vae_model_name_or_path")
    args.mixed_precision = "no"  # half precision would move atoms


def add_expression_args(parser: argparse.ArgumentParser) -> None:
    expression_args.add_cell_data_args(parser)
    expression_args.add_expression_cache_args(parser)


def check_expression_args(args: argparse.Namespace) -> None:
    required(args, "dataset_name", "pretrained_vae_model_name_or_path")
    if "seed" in args.typed:
        raise UserError("--seed with --modality expression: nothing about encoding cells is random; leave it out")
    args.mixed_precision = "no"  # latents of cells are small, and encoding them takes no time


# Flags and their checks; further modalities are further rows, here and in `main`.
MODALITIES = {
    "image": (add_image_args, check_image_args),
    "crystal": (add_crystal_args, check_crystal_args),
    "expression": (add_expression_args, check_expression_args),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=list(MODALITIES), default="image", help="Kind of data in the dataset.")
    parser.add_argument(
        "--latents_dir", "--output_dir", default=None, help="Folder of the latent cache. An unfinished one is resumed."
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="Seed of random crops and translations.")
    add_args, check_args = MODALITIES[peek(parser, "modality")]
    add_args(parser)
    args = parse_with_config(parser)
    required(args, "latents_dir")
    check_args(args)
    return args


def main(args: argparse.Namespace) -> None:
    import logging

    from utils.image.precompute import build_latent_cache
    from utils.training.setup import make_accelerator

    accelerator = make_accelerator(args)
    if args.modality == "crystal":
        from utils.crystal.precompute import build_crystal_cache

        spec, what = build_crystal_cache(args, accelerator, Path(args.latents_dir)), "crystals"
    elif args.modality == "expression":
        from utils.expression.precompute import build_expression_cache

        spec, what = build_expression_cache(args, accelerator, Path(args.latents_dir)), "cells"
    else:
        part = (args.part_index, args.num_parts)
        spec, what = build_latent_cache(args, accelerator, Path(args.latents_dir), part), "images"
    captions = f", {spec.captions['count']} distinct captions ({spec.captions['content']})" if spec.captions else ""
    labels = f", {spec.labels['num_classes']} classes" if spec.labels else ""
    translations = f", {spec.num_translations} translations of each" if spec.num_translations > 1 else ""
    shape = " x ".join(map(str, spec.shape))
    logging.getLogger(__name__).info(
        "%s: %d latents of %s (%s%s)%s%s%s; %d %s skipped",
        args.latents_dir,
        spec.num_rows,
        shape,
        spec.content,
        ", and mirrored" if spec.flips else "",
        translations,
        captions,
        labels,
        spec.num_skipped,
        what,
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args)
