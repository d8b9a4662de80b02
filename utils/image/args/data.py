"""Arguments that scripts share, about data: which images, what is cached of them. Imports no torch."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args.parsing import non_negative_int, positive_int
from utils.errors import UserError
from utils.image.args.text import add_condition_args


def add_dataset_args(parser: ArgumentParser) -> None:
    """Which images, and how they are cut."""
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset_name", default=None, help="Hub name, local folder, or .parquet file or pattern.")
    group.add_argument("--dataset_config_name", default=None, help="Configuration of a dataset that has several.")
    group.add_argument("--dataset_revision", default=None, help="Branch, tag or commit of a hub dataset.")
    group.add_argument("--dataset_split", default="train", help="Split to read.")
    group.add_argument(
        "--train_data_dir", default=None, help="Image folder with metadata.jsonl, or with one folder a class."
    )
    group.add_argument("--image_column", default=None, help="Default: the only image column.")
    group.add_argument(
        "--resolution", type=positive_int, default=256, help="Pixels of a side after resizing and cropping."
    )
    group.add_argument(
        "--center_crop", action=BooleanOptionalAction, default=False, help="Crop the centre instead of a random place."
    )
    group.add_argument(
        "--random_flip",
        action=BooleanOptionalAction,
        default=False,
        help="Also encode the mirrored image; one is drawn per epoch.",
    )
    group.add_argument(
        "--alpha_background",
        choices=["white", "grey", "black"],
        default="white",
        help="What transparent images are laid on.",
    )
    group.add_argument("--max_samples", type=positive_int, default=None, help="Use the first N rows only.")


def add_cache_args(parser: ArgumentParser) -> None:
    """The frozen models and what is stored of what they give."""
    group = parser.add_argument_group("latent cache")
    group.add_argument(
        "--codec",
        choices=["vae", "pixels"],
        default="vae",
        help="pixels: train on the images themselves, without a VAE, to see what the latent space costs and gives.",
    )
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        default="stabilityai/sd-vae-ft-mse",
        help="Any diffusers autoencoder: hub name or folder.",
    )
    group.add_argument(
        "--pretrained_text_encoder_name_or_path",
        default="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        help="CLIP text encoder: hub name or folder; with open_clip also ARCHITECTURE:CHECKPOINT_FILE.",
    )
    group.add_argument(
        "--text_encoder_library",
        choices=["transformers", "open_clip"],
        default="transformers",
        help="What loads the text encoder.",
    )
    group.add_argument("--tokenizer_name", default=None, help="Default: the tokenizer beside the text encoder.")
    group.add_argument(
        "--latent_content",
        choices=["moments", "mean"],
        default=None,
        help="Store the posterior's mean and std (default, where the VAE has one) or its mean.",
    )
    group.add_argument("--encode_batch_size", type=positive_int, default=16, help="Images per VAE call.")
    group.add_argument(
        "--rows_per_shard", type=positive_int, default=512, help="Images per shard: what a kill can cost."
    )
    group.add_argument(
        "--max_cached_captions",
        type=non_negative_int,
        default=200_000,
        help="Above so many distinct captions token ids are cached and the text encoder runs in the training loop.",
    )
    group.add_argument(
        "--decode_workers", type=positive_int, default=min(8, os.cpu_count() or 1), help="Threads that decode images."
    )


def check_condition_column(args: Namespace, name: str) -> None:
    """Refuses a dataset without the column that the model is conditioned on, before it is encoded."""
    if (args.dataset_name or args.train_data_dir) and getattr(args, name) is None:
        raise UserError(f"--{name} is required with a dataset: name the column that holds the {name.split('_')[0]}s")


def check_codec_args(args: Namespace) -> None:
    """Settles what makes the latents: with --codec pixels nothing does."""
    if args.codec == "vae":
        return
    vae = "pretrained_vae_model_name_or_path"
    if vae in args.given and getattr(args, vae) != args.codec:  # args.yaml of a run names both
        raise UserError(f"--codec {args.codec} with --{vae}: images without a VAE need none; leave one out")
    setattr(args, vae, args.codec)
    args.given.add(vae)


def add_precompute_args(parser: ArgumentParser) -> None:
    """All flags of a latent cache of images."""
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default=None,
        help="Autocast of the VAE. Default: what accelerate's config says.",
    )
    add_dataset_args(parser)
    add_condition_args(parser)
    add_cache_args(parser)
    group = parser.add_argument_group("parts")
    group.add_argument(
        "--num_parts",
        type=positive_int,
        default=1,
        help="Make one part of a cache that is too large for one disk; training reads a part on each machine.",
    )
    group.add_argument("--part_index", type=non_negative_int, default=0, help="Which part, from 0 on.")


def check_precompute_args(args: Namespace) -> None:
    """Settles what makes the latents; refuses a part that is none, and a cache of nothing."""
    check_codec_args(args)
    if args.part_index >= args.num_parts:
        raise UserError(f"--part_index {args.part_index}: the parts are 0 to {args.num_parts - 1} (--num_parts)")
    if not args.dataset_name and not args.train_data_dir:
        raise UserError("give --dataset_name (hub name, folder or parquet file) or --train_data_dir (an image folder)")
