"""Flags of sampling, for `sample.py` and for whatever else samples a run. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from typing import Any

from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_float, positive_int
from utils.errors import UserError

SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "unipc", "flow_euler", "flow_heun")


def add_sampler_args(parser: ArgumentParser, batch_size: int | None = 16) -> None:
    """How a run is sampled. `batch_size` is the default; None where it depends on what the run makes."""
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--guidance_scale",
        type=non_negative_float,
        default=None,
        help="Scale of classifier-free guidance; 1 is off. Default: 7.5 for images, 2 for crystals and with "
        "--guide_model; off for cells, and without a condition.",
    )
    group.add_argument(
        "--guidance_interval",
        nargs=2,
        metavar=("START", "END"),
        type=fraction,
        default=[0.0, 1.0],
        help="Interval of the timesteps with guidance, as fractions: 0 is clean, 1 is noise. Default: all timesteps.",
    )
    group.add_argument(
        "--guidance_rescale",
        type=fraction,
        default=0.0,
        help="How far to rescale the std of the guided prediction to that of the conditional one; 0 is off, 1 is all "
        "the way.",
    )
    group.add_argument(
        "--guide_model",
        default=None,
        help="Weaker run, or earlier checkpoint, to guide away from (autoguidance).",
    )
    group.add_argument("--num_inference_steps", type=positive_int, default=50, help="Number of denoising steps.")
    group.add_argument(
        "--scheduler", choices=SCHEDULERS, default=None, help="Sampler. Default: ddim, or flow_euler for flow."
    )
    group.add_argument(
        "--ema_sigma_rel",
        type=positive_float,
        default=None,
        help="Sample with EDM2's EMA of this relative width, reconstructed from the snapshots of --ema_sigma_rels.",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="Seed of the first sample.")
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        help=f"Number of samples in a batch. Default: {batch_size or '16, for cells 1024'}.",
    )
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Autocast precision.")
    group.add_argument("--device", default=None, help="Device such as cuda or cpu. Default: cuda if available.")


def add_speed_args(parser: ArgumentParser) -> None:
    """Adds the flags that make sampling faster; docs/performance.md has their effect on speed and images."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--torch_compile",
        action=BooleanOptionalAction,
        default=False,
        help="Compile the denoiser with torch.compile: the first batch takes a minute longer, later ones are faster.",
    )


# Flags that --sweep can vary, and the types of their values.
SWEEPS = {
    "guidance_scale": non_negative_float,
    "num_inference_steps": positive_int,
    "ema_sigma_rel": positive_float,
}


def check_sweep(args: Namespace) -> None:
    """Refuses a --sweep over an unknown flag, over fewer than two values, or over a flag that is set itself."""
    name, *values = args.sweep
    if name not in SWEEPS:
        raise UserError(f"--sweep {name}: expected one of {', '.join(SWEEPS)}")
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(f"--sweep {name}: expected at least two values, each once, found {' '.join(values) or 'none'}")
    if name in args.given:
        raise UserError(f"--{name} with --sweep {name}: the sweep sets it; leave one out")
    sweep_points(args)  # raises for values that are no numbers, before anything is loaded


def sweep_points(args: Namespace) -> list[dict[str, Any]]:
    """The flags that each point of --sweep sets; one empty point without a sweep. Raises UserError for values of the
    wrong type."""
    if not args.sweep:
        return [{}]
    name, *texts = args.sweep
    try:
        return [{name: SWEEPS[name](text)} for text in texts]
    except Exception as error:  # argparse's own error is no ValueError
        raise UserError(f"--sweep {name}: {error}") from error
