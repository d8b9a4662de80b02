"""Arguments of sampling, for `sample.py` and for whatever else samples a run. Imports no torch."""

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
        help="1 = off. Default: 7.5 for images, 2 for crystals and with --guide_model; off for cells, and where "
        "nothing is asked.",
    )
    group.add_argument(
        "--guidance_interval",
        nargs=2,
        metavar=("START", "END"),
        type=fraction,
        default=[0.0, 1.0],
        help="Shares of the timesteps, 0 = clean, 1 = noise, between which guidance is on. Default: always.",
    )
    group.add_argument(
        "--guidance_rescale",
        type=fraction,
        default=0.0,
        help="How far the guided prediction's std goes back to the unguided one's; 0 = off, 1 = all the way.",
    )
    group.add_argument(
        "--guide_model",
        default=None,
        help="A weaker run, or an earlier checkpoint, that guidance leads away from (autoguidance).",
    )
    group.add_argument("--num_inference_steps", type=positive_int, default=50, help="Steps of the sampler.")
    group.add_argument("--scheduler", choices=SCHEDULERS, default=None, help="Default: DDIM, or Euler for flow.")
    group.add_argument(
        "--ema_sigma_rel",
        type=positive_float,
        default=None,
        help="Sample EDM2's average of this relative width, made of the snapshots that --ema_sigma_rels kept.",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="Seed of the first sample.")
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        help=f"Samples made at once. Default: {batch_size or '16, of cells 1024'}.",
    )
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Autocast.")
    group.add_argument("--device", default=None, help="cuda, cpu, ... Default: cuda where there is one.")


def add_speed_args(parser: ArgumentParser) -> None:
    """What makes the model's calls faster; docs/performance.md says by how much, and what it does to images."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--torch_compile",
        action=BooleanOptionalAction,
        default=False,
        help="Compile the denoiser: the first batch takes a minute longer, the others less.",
    )


# What a sweep can go over: flags of sampling, and how their values are read.
SWEEPS = {
    "guidance_scale": non_negative_float,
    "num_inference_steps": positive_int,
    "ema_sigma_rel": positive_float,
}


def check_sweep(args: Namespace) -> None:
    """Refuses a sweep over nothing."""
    name, *values = args.sweep
    if name not in SWEEPS:
        raise UserError(f"--sweep {name}: expected one of {', '.join(SWEEPS)}")
    if len(values) < 2 or len(set(values)) < len(values):
        raise UserError(f"--sweep {name}: expected at least two values, each once, found {' '.join(values) or 'none'}")
    if name in args.given:
        raise UserError(f"--{name} with --sweep {name}: the sweep sets it; leave one out")
    sweep_points(args)  # words for numbers are said before anything is loaded


def sweep_points(args: Namespace) -> list[dict[str, Any]]:
    """The flags that each point sets; a single empty one without a sweep. Raises UserError for values of another
    type."""
    if not args.sweep:
        return [{}]
    name, *texts = args.sweep
    try:
        return [{name: SWEEPS[name](text)} for text in texts]
    except Exception as error:  # argparse's own error is no ValueError
        raise UserError(f"--sweep {name}: {error}") from error
