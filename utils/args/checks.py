"""Checks that refuse combinations of arguments that make no sense, with the reason. Imports no torch."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.args.parsing import refuse_together
from utils.errors import UserError
from utils.files import names_in, read_json


def check_new_folder(output_dir: str | None) -> None:
    """Raises UserError if --output_dir is a file or not empty."""
    if output_dir and Path(output_dir).is_file():
        raise UserError(f"--output_dir: {output_dir} is a file; give a new folder")
    if output_dir and names_in(Path(output_dir)):
        raise UserError(f"--output_dir: {output_dir} is not empty; give a new folder")


def check_trainer_args(args: Namespace) -> None:
    """The checks that all trainers share."""
    check_run_args(args)
    check_optimizer_args(args)
    check_ema_args(args)


def check_denoiser_args(args: Namespace) -> None:
    """All checks that the trainers of denoisers share. Their order matters: some set what later ones read."""
    check_run_args(args)
    check_lora_args(args)
    check_objective_args(args)
    check_optimizer_args(args)
    check_ema_args(args)
    check_power_ema_args(args)
    check_evaluation_args(args)


DEFAULT_TRAIN_STEPS = 100_000
MAX_SIGMA_REL = 12**-0.5  # the plain mean of all weights


def check_run_args(args: Namespace) -> None:
    """Sets the default of --max_train_steps where neither steps nor hours are given."""
    if args.max_train_steps is None and args.max_train_hours is None:
        args.max_train_steps = DEFAULT_TRAIN_STEPS


def check_objective_args(args: Namespace) -> None:
    """Refuses combinations of objective flags that make no sense."""
    ddpm_only = ("snr_gamma", "noise_offset", "input_perturbation", "rescale_betas_zero_snr")
    for name in ddpm_only:
        if args.prediction_type == "flow" and getattr(args, name):
            raise UserError(f"--{name} with --prediction_type flow: it belongs to the DDPM objectives; leave it out")
    for name in ("timestep_density", "flow_shift", "beta_schedule"):
        is_flow_flag = name != "beta_schedule"
        # args.yaml of a finished run has every flag, so only a value other than the default counts as given.
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


def check_optimizer_args(args: Namespace) -> None:
    """Translates the older flag --use_8bit_adam to --optimizer adamw_8bit."""
    if not args.use_8bit_adam:
        return
    if "optimizer" in args.given and args.optimizer != "adamw_8bit":
        raise UserError(
            f"--use_8bit_adam with --optimizer {args.optimizer}: it stands for --optimizer adamw_8bit; leave one out, "
            "or add --no-use_8bit_adam if a file sets it"
        )
    args.optimizer = "adamw_8bit"
    args.given.add("optimizer")


def is_launched_under_fsdp() -> bool:
    """Whether accelerate's configuration divides the weights among processes, told before torch is imported."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def check_lora_args(args: Namespace) -> None:
    """Refuses flags of adapters without adapters, and what cannot be combined with adapters. Sets the flags that the
    base run decides, so call it before the checks of model and objective."""
    for name in ("lora_alpha", "lora_target_modules"):
        if name in args.given and args.lora_rank is None:
            raise UserError(f"--{name} without --lora_rank: there are no adapters; give their rank, 16 say")
    if args.lora_rank and not args.pretrained_model_name_or_path:
        raise UserError(
            "--lora_rank without --pretrained_model_name_or_path: adapters need trained weights; name a run"
        )
    if args.lora_rank and args.optimizer == "muon":
        raise UserError(
            "--optimizer muon with --lora_rank: Muon evens out the directions of a matrix's step, and an adapter "
            "is two thin factors, of which one starts at zero; use adamw"
        )
    if args.lora_rank and args.ema_sigma_rels:
        raise UserError(
            "--ema_sigma_rels with --lora_rank: sample.py reconstructs such averages from whole models; leave it out"
        )
    if args.lora_rank and is_launched_under_fsdp():
        raise UserError(
            "--lora_rank under FSDP: the exported copies of the whole model contain no adapters; use "
            "configs/accelerate/multi_gpu.yaml"
        )
    if args.pretrained_model_name_or_path:
        for name, value in settings_of_run(Path(args.pretrained_model_name_or_path)).items():
            settle(args, name, value)


def settings_of_run(path: Path) -> dict[str, Any]:
    """The flags that a trained run decides for runs that start from it: the kind of model, and the objective. Raises
    UserError if `path` is no run."""
    flag = "--pretrained_model_name_or_path"
    run_dir = path if (path / "scheduler").is_dir() else path.parent  # `path` is a checkpoint
    kinds = {"transformer": "dit", "unet": "unet"}
    model = next((kind for folder, kind in kinds.items() if (run_dir / folder / "config.json").is_file()), None)
    if not path.is_dir() or model is None or not (run_dir / "scheduler" / "scheduler_config.json").is_file():
        raise UserError(f"{flag}: {path} is no run of these scripts; give a run's folder or one of its checkpoints")
    scheduler = read_json(run_dir / "scheduler" / "scheduler_config.json")
    if scheduler["_class_name"].startswith("FlowMatch"):
        return {"model": model, "prediction_type": "flow", "flow_shift": scheduler["shift"]}
    names = ("prediction_type", "beta_schedule", "rescale_betas_zero_snr")
    return {"model": model} | {name: scheduler[name] for name in names}


def settle(args: Namespace, name: str, value: Any) -> None:
    """Gives a flag the value that the run has from which this one starts; raises UserError where another is asked.
    A script of one kind of model has no flag for it, and nothing to settle."""
    if name not in args:
        return
    if name in args.given and getattr(args, name) != value:
        raise UserError(
            f"--{name} {getattr(args, name)}: {args.pretrained_model_name_or_path} was trained with {value}; leave it "
            "out"
        )
    setattr(args, name, value)


def check_ema_args(args: Namespace) -> None:
    """Refuses --ema_decay if no average is kept."""
    if not args.use_ema and "ema_decay" in args.typed:
        raise UserError("--ema_decay with --no-use_ema: no average is kept; leave one out")


def check_power_ema_args(args: Namespace) -> None:
    """Refuses widths that no power function has, and flags of snapshots if none are kept."""
    if args.ema_sigma_rels and not args.use_ema:
        raise UserError("--ema_sigma_rels with --no-use_ema: no average is kept; leave one out")
    if "ema_snapshot_steps" in args.typed and not args.ema_sigma_rels:
        raise UserError("--ema_snapshot_steps without --ema_sigma_rels: there is nothing to keep; give 0.05 0.1, say")
    for sigma_rel in args.ema_sigma_rels or []:
        if not 0 < sigma_rel < MAX_SIGMA_REL:
            raise UserError(f"--ema_sigma_rels: {sigma_rel} is not below {MAX_SIGMA_REL:.4f}; 0.05 0.1 is usual")


# Flags that have no effect without --eval_steps.
NEEDS_EVAL_STEPS = (
    *("num_validation_samples", "validation_latents_dir", "eval_batch_size", "eval_features", "best_metric"),
    "early_stopping_patience",
)


def check_evaluation_args(args: Namespace) -> None:
    """Refuses flags of evaluations without --eval_steps, and --eval_steps without latents to evaluate on."""
    for name in NEEDS_EVAL_STEPS:
        if name in args.given and args.eval_steps is None:
            raise UserError(f"--{name} without --eval_steps: nothing is evaluated; give the steps between evaluations")
    if "early_stopping_min_delta" in args.given and args.early_stopping_patience is None:
        raise UserError("--early_stopping_min_delta without --early_stopping_patience: nothing is stopped early")
    if args.eval_steps and not (args.num_validation_samples or args.validation_latents_dir):
        raise UserError(
            "--eval_steps without latents to evaluate on: keep some out of training with --num_validation_samples, or "
            "give a cache of another split as --validation_latents_dir"
        )
    refuse_together(
        args, "num_validation_samples", "validation_latents_dir", "both select the held-out latents; use one"
    )
