"""Flags of `plan_budget.py`, its own and the trainers', and the config file that it writes. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

import yaml

from utils.args.parsing import fraction, non_negative_int, positive_float, positive_int
from utils.errors import UserError
from utils.image.args.validation import DEFAULT_EVAL_IMAGES
from utils.plan import arithmetic

SCRIPTS = {"text": "train_text_to_image_ldm.py", "class": "train_class_cond_ldm.py"}
# Flags that only one of the two trainers has, and flags from which the trainer can be inferred.
ONLY = {"text": ("validation_prompts",), "class": ("unconditional", "validation_labels")}
SIGNS = {"text": ("validation_prompts", "caption_column"), "class": (*ONLY["class"], "label_column")}
PLANNED = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "max_train_hours")
CACHE_SHAPE_FLAGS = ("latent_channels", "vae_factor", "sequence_length", "text_width", "num_classes")


def add_plan_args(parser: ArgumentParser) -> set[str]:
    """Adds the flags of the plan. Returns their names, which no trainer has."""
    group = parser.add_argument_group("plan")
    group.add_argument("--hours", type=positive_float, default=None, help="Wall-clock hours for training.")
    group.add_argument(
        "--trainer", choices=[*ONLY], default=None, help="Trainer to plan for. Default: inferred from the other flags."
    )
    group.add_argument(
        "--dataset_size", type=positive_int, default=None, help="Number of images. Default: those of the cache."
    )
    group.add_argument(
        "--effective_batch_size",
        type=positive_int,
        default=None,
        help="Samples per optimizer step. Default: --train_batch_size times --gradient_accumulation_steps.",
    )
    group.add_argument(
        "--max_micro_batch_size",
        type=positive_int,
        default=None,
        help="Largest micro-batch to try. Default: no limit.",
    )
    group.add_argument("--memory_margin", type=fraction, default=0.1, help="Fraction of the memory to leave free.")
    group.add_argument(
        "--memory_gb",
        type=positive_float,
        default=None,
        help="Plan for this much memory in GB, instead of what the machine has.",
    )
    group.add_argument("--measure_seconds", type=positive_float, default=20.0, help="Seconds of training to measure.")
    group.add_argument(
        "--measure_precompute",
        action=BooleanOptionalAction,
        default=False,
        help="Also load the VAE, and the text encoder for captions, and time them.",
    )
    group.add_argument(
        "--output_config", default="plan.yaml", metavar="FILE.yaml", help="File to write the config to."
    )
    group.add_argument("--latent_channels", type=positive_int, default=4, help="Channels of the VAE's latents.")
    group.add_argument("--vae_factor", type=positive_int, default=8, help="Downsampling factor of the VAE.")
    group.add_argument("--sequence_length", type=positive_int, default=77, help="Number of tokens per caption.")
    group.add_argument(
        "--text_width", type=positive_int, default=768, help="Width of the text encoder's hidden states."
    )
    group.add_argument(
        "--num_classes", type=positive_int, default=1000, help="Number of classes of a class-conditional model."
    )
    return {action.dest for action in group._group_actions}


def add_trainer_args(parser: ArgumentParser) -> None:
    """Adds the flags that the trainers declare in their own files."""
    group = parser.add_argument_group("trainer")
    group.add_argument("--latents_dir", default=None, help="Latent cache from which the plan takes shapes and size.")
    group.add_argument(
        "--cond_drop_prob",
        type=fraction,
        default=0.1,
        help="Probability of dropping the condition, for classifier-free guidance.",
    )
    group.add_argument("--validation_prompts", nargs="+", default=None, help="Prompts to sample during training.")
    group.add_argument(
        "--validation_labels",
        nargs="+",
        type=non_negative_int,
        default=None,
        help="Class labels to sample during training.",
    )
    group.add_argument("--unconditional", action=BooleanOptionalAction, default=False, help="Train without labels.")


def check_plan_args(args: Namespace) -> None:
    """Sets the trainer and the batch size. Refuses flags that the plan decides, and contradictions."""
    told = [trainer for trainer, names in SIGNS.items() if any(getattr(args, name) for name in names)]
    if args.trainer is None and len(told) != 1:
        raise UserError("--trainer: the other flags do not tell which one is meant; give text or class")
    args.trainer = args.trainer or told[0]
    for name in ONLY["class" if args.trainer == "text" else "text"]:
        if getattr(args, name):
            raise UserError(f"--{name} with --trainer {args.trainer}: that trainer has no such flag; leave it out")
    for name in PLANNED:
        if name in args.typed and name.startswith("max_"):
            raise UserError(f"--{name}: the plan sets it, from --hours; leave it out")
        if name in args.typed and args.effective_batch_size:
            raise UserError(f"--{name} with --effective_batch_size: the plan divides the latter; leave one out")
    for name in CACHE_SHAPE_FLAGS:
        if args.latents_dir and name in args.typed:
            raise UserError(f"--{name} with --latents_dir: the cache has its own; leave one out")
    if args.codec == "pixels":
        args.latent_channels, args.vae_factor = 3, 1
    if args.memory_margin == 1:
        raise UserError("--memory_margin 1: that leaves no memory for training; 0.1 is usual")
    if not args.latents_dir and args.resolution % args.vae_factor:
        raise UserError(f"--resolution: {args.resolution} is not divisible by --vae_factor {args.vae_factor}")
    if Path(args.output_config).exists():
        raise UserError(f"--output_config: {args.output_config} exists; give another file, or delete it")
    if args.effective_batch_size is None:
        args.effective_batch_size = args.train_batch_size * args.gradient_accumulation_steps
    if args.measure_precompute and not (args.dataset_size or args.max_samples):
        raise UserError("--measure_precompute without --dataset_size: how many images are to be encoded?")


def validation_rows(args: Namespace, num_classes: int) -> int:
    """Number of rows of a validation grid, as the trainers choose it."""
    if args.trainer == "text":
        return len(args.validation_prompts or [])
    return 1 if args.unconditional else len(args.validation_labels or range(min(10, num_classes)))


def evaluated(args: Namespace) -> tuple[int, int]:
    """Numbers of held-out latents and of samples in an evaluation, as the trainers choose them."""
    from utils.latents.spec import LatentSpec

    num_rows = args.num_validation_samples or 0
    if args.validation_latents_dir:
        num_rows = LatentSpec.read(args.validation_latents_dir, "--validation_latents_dir").num_rows
    return num_rows, (args.num_eval_images or min(DEFAULT_EVAL_IMAGES, num_rows)) if args.eval_features else 0


def write_config(args: Namespace, report: list[str]) -> None:
    """Writes the config for a trainer's --config: the flags that were given, overridden by those of the plan. The
    `report` stands above them as comments."""
    flags = {name: getattr(args, name) for name in (*sorted(args.given), *PLANNED)}
    text = "".join(f"# {line}\n" for line in report) + yaml.safe_dump(flags, sort_keys=False, allow_unicode=True)
    path = Path(args.output_config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def dataset_lines(args: Namespace, spec, samples: int) -> list[str]:
    """What is known where the number of images is: epochs, and the size of the cache."""
    num_images = args.dataset_size or args.max_samples or spec.num_rows
    if not num_images:
        return ["data: --dataset_size would tell epochs and the cache's size"]
    is_text = args.trainer == "text"
    cached = arithmetic.cache_bytes(
        num_images,
        spec.shape,
        spec.content == "moments",
        spec.flips or args.random_flip,
        labels=not is_text,
        num_captions=num_images if is_text else 0,
        states_shape=spec.captions["shape"] if is_text and spec.captions["content"] == "hidden_states" else None,
        sequence_length=spec.captions["shape"][0] if is_text else 0,
    )
    what = ", with a caption of its own for each" if is_text else ""
    return [
        f"data: {samples / num_images:.2f} epochs of {num_images} images; cache {arithmetic.readable(cached)}{what}"
    ]
