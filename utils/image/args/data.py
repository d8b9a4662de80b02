"""Flags of image data and of the latent cache. Imports no torch."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from utils.args.parsing import non_negative_int, positive_int
from utils.errors import UserError
from utils.image.args.text import add_condition_args


def add_dataset_args(parser: ArgumentParser) -> None:
    """Adds the flags of the data set, and of cropping and resizing."""
    group = parser.add_argument_group("dataset")
    group.add_argument(
        "--dataset_name",
        default=None,
        help="Dataset on the Hugging Face hub, local folder, or .parquet file or pattern.",
    )
    group.add_argument("--dataset_config_name", default=None, help="Configuration of a dataset that has several.")
    group.add_argument("--dataset_revision", default=None, help="Branch, tag or commit of a dataset on the hub.")
    group.add_argument("--dataset_split", default="train", help="Split to read.")
    group.add_argument(
        "--train_data_dir", default=None, help="Image folder with a metadata.jsonl, or with one subfolder per class."
    )
    group.add_argument("--image_column", default=None, help="Column with the images. Default: the only image column.")
    group.add_argument(
        "--resolution", type=positive_int, default=256, help="Height and width in pixels, after resizing and cropping."
    )
    group.add_argument(
        "--center_crop",
        action=BooleanOptionalAction,
        default=False,
        help="Crop at the centre instead of at a random place.",
    )
    group.add_argument(
        "--random_flip",
        action=BooleanOptionalAction,
        default=False,
        help="Also encode the mirrored images; training draws one of the two per epoch.",
    )
    group.add_argument(
        "--alpha_background",
        choices=["white", "grey", "black"],
        default="white",
        help="Background of transparent images.",
    )
    group.add_argument("--max_samples", type=positive_int, default=None, help="Use only the first N rows.")


def add_cache_args(parser: ArgumentParser) -> None:
    """Adds the flags of the frozen models and of what is cached of their output."""
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
        help="Any autoencoder of diffusers: hub name or folder.",
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
        help="Library that loads the text encoder.",
    )
    group.add_argument(
        "--tokenizer_name",
        default=None,
        help="Tokenizer: hub name or folder. Default: the one beside the text encoder.",
    )
    group.add_argument(
        "--latent_content",
        choices=["moments", "mean"],
        default=None,
        help="Cache the posterior's mean and std (moments; the default if the VAE has a posterior), or its mean only.",
    )
    group.add_argument("--encode_batch_size", type=positive_int, default=16, help="Batch size of the VAE's encoder.")
    group.add_argument(
        "--rows_per_shard",
        type=positive_int,
        default=512,
        help="Images per shard; a killed process loses one shard at most.",
    )
    group.add_argument(
        "--max_cached_captions",
        type=non_negative_int,
        default=200_000,
        help="With more distinct captions than this, only token ids are cached, and the text encoder runs in "
        "training.",
    )
    group.add_argument(
        "--decode_workers",
        type=positive_int,
        default=min(8, os.cpu_count() or 1),
        help="Number of threads that decode images.",
    )


def check_condition_column(args: Namespace, name: str) -> None:
    """Refuses a data set without the column that the model is conditioned on, before it is encoded."""
    if (args.dataset_name or args.train_data_dir) and getattr(args, name) is None:
        raise UserError(f"--{name} is required with a dataset: name the column that holds the {name.split('_')[0]}s")


def check_codec_args(args: Namespace) -> None:
    """With --codec pixels, sets the flag of the VAE to pixels too. Refuses another VAE beside it."""
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
