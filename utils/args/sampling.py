"""Arguments of sampling, for `sample.py` and for whatever else samples a run. Imports no torch."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from utils.args.checks import check_new_folder
from utils.args.parsing import fraction, non_negative_float, non_negative_int, positive_float, positive_int
from utils.errors import UserError

SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "unipc", "flow_euler", "flow_heun")


def add_request_args(parser: ArgumentParser) -> None:
    """Which run, and what it is asked for."""
    group = parser.add_argument_group("request")
    group.add_argument(
        "--model", default=None, help="A run's folder or a checkpoint. Default: the newest run below runs/."
    )
    group.add_argument("--prompt", action="append", default=None, help="What to draw; may be repeated.")
    group.add_argument("--prompts_file", default=None, help="Text file with one prompt a line.")
    group.add_argument(
        "--negative_prompt", default=None, help="What guidance leads away from, instead of from nothing."
    )
    group.add_argument("--class_labels", nargs="+", type=non_negative_int, default=None, help="Default: every class.")


def add_sampler_args(parser: ArgumentParser) -> None:
    """How a run is sampled."""
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
        "--batch_size", type=positive_int, default=16, help="Samples made at once. Default of cells: 1024."
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
    group.add_argument(
        "--fuse_qkv_projections",
        action=BooleanOptionalAction,
        default=False,
        help="Of a U-Net: queries, keys and values by one product of matrices. Changes rounding only.",
    )


def check_request_args(args: Namespace) -> None:
    """Refuses a file of prompts that is not there, and a folder that is taken."""
    if args.prompts_file and not Path(args.prompts_file).is_file():
        raise UserError(f"--prompts_file: the file {args.prompts_file} does not exist")
    check_new_folder(args.output_dir)
