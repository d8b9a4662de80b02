"""Combinations of arguments that make no sense, each refused with the reason. Imports no torch."""

from argparse import Namespace

from utils.errors import UserError
from utils.parsing import refuse_together


def check_condition_column(args: Namespace, name: str) -> None:
    """Refuses a dataset without the column that the model is conditioned on, before it is encoded."""
    if (args.dataset_name or args.train_data_dir) and getattr(args, name) is None:
        raise UserError(f"--{name} is required with a dataset: name the column that holds the {name.split('_')[0]}s")


def check_objective_args(args: Namespace) -> None:
    """Refuses combinations that make no sense, with the reason."""
    ddpm_only = ("snr_gamma", "noise_offset", "input_perturbation", "rescale_betas_zero_snr")
    for name in ddpm_only:
        if args.prediction_type == "flow" and getattr(args, name):
            raise UserError(f"--{name} with --prediction_type flow: it belongs to the DDPM objectives; leave it out")
    for name in ("timestep_density", "flow_shift", "beta_schedule"):
        is_flow_flag = name != "beta_schedule"
        # args.yaml of a finished run names every flag: only a value other than the default is a wish.
        if is_flow_flag != (args.prediction_type == "flow") and getattr(args, name) not in (
            "logit_normal",
            1.0,
            "scaled_linear",
        ):
            raise UserError(
                f"--{name} with --prediction_type {args.prediction_type}: it has no meaning there; leave it out"
            )
    if args.rescale_betas_zero_snr and args.prediction_type == "epsilon":
        raise UserError(
            "--rescale_betas_zero_snr with --prediction_type epsilon: at zero SNR the input is all noise and nothing "
            "is learnt; use v_prediction"
        )
    refuse_together(args, "rescale_betas_zero_snr", "noise_offset", "both correct the mean of images; use one")
    refuse_together(args, "rescale_betas_zero_snr", "input_perturbation", "the last timestep has no signal to perturb")


def check_ema_args(args: Namespace) -> None:
    """Refuses a decay of an average that is not kept."""
    if not args.use_ema and "ema_decay" in args.typed:
        raise UserError("--ema_decay with --no-use_ema: no average is kept; leave one out")


def check_validation_args(args: Namespace) -> None:
    """Refuses settings of grids that are not made."""
    names = ("validation_steps", "validation_guidance_scale", "num_validation_images", "validation_inference_steps")
    for name in names:
        if name in args.typed and not args.validation_prompts:
            raise UserError(f"--{name} without --validation_prompts: there is nothing to sample; give some prompts")
