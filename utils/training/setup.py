"""Setting a training run up and keeping its books: accelerator, folder, batches, logged values."""

import logging
import os
import signal
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
import transformers
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from utils.diffusion.objectives import OBJECTIVES, Objective, training_scheduler
from utils.draws import PositionBatches, identity
from utils.errors import UserError
from utils.files import make_folder, names_in, write_text
from utils.latents.cache import LatentCache
from utils.training.control import SIGNALS, RunControl
from utils.training.held_out import HeldOut, hold_out, open_split
from utils.training.sharding import join_fsdp

logger = logging.getLogger(__name__)


def make_accelerator(args: Namespace, output_dir: Path | None = None) -> Accelerator:
    """The Accelerator of a script, with accumulation that depends on nothing but the count of micro-steps."""
    if output_dir is not None and args.report_to not in ("none", "all"):
        installed = [str(tracker) for tracker in get_available_trackers()]
        if args.report_to not in installed:  # Accelerate would leave a tracker without its package out, silently
            raise UserError(f"--report_to {args.report_to}: the trackers installed here are {', '.join(installed)}")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        # Without a GPU, Accelerate would train as many models as there are processes, each alone.
        cpu=True if world_size > 1 and not torch.accelerator.is_available() else None,
        mixed_precision=args.mixed_precision,
        log_with=None if output_dir is None or args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir or "."), logging_dir=str(output_dir or ".")),
        # Accelerate would otherwise also sync at the end of an epoch: a short last window would count as a whole step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=getattr(args, "gradient_accumulation_steps", 1), sync_with_dataloader=False
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
    )
    join_fsdp(accelerator)
    if accelerator.is_fsdp2:
        check_sharded(args)
    if accelerator.num_processes != world_size:
        raise UserError(f"{world_size} processes were launched, but Accelerate joined {accelerator.num_processes}")
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if getattr(args, "allow_tf32", False):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    set_seed(args.seed)  # new weights are the same on every process; all else is drawn by position in the stream
    return accelerator


def check_sharded(args: Namespace) -> None:
    """Raises UserError for what cannot be trained with its weights divided among processes."""
    if getattr(args, "optimizer", "adamw") != "adamw":
        raise UserError(f"--optimizer {args.optimizer} under FSDP: it needs whole weights; use adamw, or DDP")
    if not hasattr(args, "model"):
        raise UserError("accelerate's configuration: only denoisers can be divided (FSDP); use MULTI_GPU here")


def check_output_dir(output_dir: Path, resume_from_checkpoint: str | None, accelerator: Accelerator) -> None:
    """Raises UserError for a folder that is taken: by another run, unless this one resumes, or by anything else."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir: {output_dir} is a file; give a folder")
    contents = names_in(output_dir)
    contents -= {"latents", "counts"}  # what a run makes for itself, perhaps before it was killed
    if contents and "args.yaml" not in contents:
        raise UserError(f"--output_dir: {output_dir} is not empty and holds no run; give another folder")
    if contents and not resume_from_checkpoint:
        raise UserError(
            f"--output_dir: {output_dir} holds a run already; add --resume_from_checkpoint latest to go on with it, "
            "or give another folder"
        )
    accelerator.wait_for_everyone()  # all have looked before one writes


def save_args(args: Namespace, output_dir: Path, accelerator: Accelerator) -> None:
    """Writes `args.yaml`, which as --config repeats the run; from then on the folder is this run's."""
    if accelerator.is_main_process:
        make_folder(output_dir)
        saved = {name: value for name, value in sorted(vars(args).items()) if name not in ("config", "given", "typed")}
        write_text(output_dir / "args.yaml", yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))


def samples_per_step(args: Namespace, accelerator: Accelerator) -> int:
    """Samples that one optimizer step sees, over all processes and micro-steps."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def millions_of_parameters(model: nn.Module) -> float:
    """Trainable parameters of a model, in millions."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6


IDENTITY_FLAGS = (
    "learned_variance",
    "model",
    "model_size",
    "vae_size",
    "prediction_type",
    "beta_schedule",
    "rescale_betas_zero_snr",
    "flow_shift",
    "latent_normalisation",
    "use_ema",
    "ema_sigma_rels",
    "optimizer",
    "seed",
    "num_validation_samples",  # which rows are trained on
)


def identity_of(args: Namespace, model: nn.Module, data_identity: str, accelerator: Accelerator) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it; everything else may."""
    same = {name: getattr(args, name) for name in IDENTITY_FLAGS if hasattr(args, name)}
    same["parameters"] = f"{millions_of_parameters(model):.6f}M"
    return same | {"data": data_identity, "samples per step": samples_per_step(args, accelerator)}


def announce(args: Namespace, accelerator: Accelerator, model: nn.Module, num_rows: int, first_step: int) -> None:
    """Starts the trackers and says, once, what is about to be trained."""
    if accelerator.log_with:
        accelerator.init_trackers("logs")
    per_step = samples_per_step(args, accelerator)
    logger.info("%.1fM parameters, %d samples in the data", millions_of_parameters(model), num_rows)
    hours = f", at most {args.max_train_hours:g} h" if args.max_train_hours else ""
    if args.max_train_steps is None:
        steps = f"from step {first_step}{hours}"
    else:
        epochs = args.max_train_steps * per_step / num_rows
        steps = f"steps {first_step} to {args.max_train_steps}{hours} ({epochs:.1f} epochs)"
    logger.info(
        "%s, of %d samples (%d process(es) x %d x %d accumulated), on %s, precision %s",
        steps,
        per_step,
        accelerator.num_processes,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.device,
        accelerator.mixed_precision,
    )


def make_loader(stream: Dataset, args: Namespace, accelerator: Accelerator, first_step: int) -> DataLoader:
    """Batches of an endless stream, for ever, from optimizer step `first_step` on.

    Not for `accelerator.prepare`: each process is given its own positions of the stream already.
    """
    sampler = PositionBatches(
        args.train_batch_size,
        args.gradient_accumulation_steps,
        first_step,
        accelerator.process_index,
        accelerator.num_processes,
    )
    return DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=identity,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # else it draws from torch's own
    )


def make_control(args: Namespace, accelerator: Accelerator, output_dir: Path, first_step: int) -> RunControl:
    """What ends a run and what keeps its weights finite; takes SIGTERM and SIGINT from here on."""
    return RunControl(
        accelerator,
        output_dir,
        args.max_train_steps,
        args.max_train_hours,
        args.max_nonfinite_steps,
        first_step,
        is_resumed=bool(args.resume_from_checkpoint),
    )


def ignore_signals(worker: int) -> None:
    """In a loader's worker: Ctrl-C and Slurm signal all processes, and the step to finish may need more batches."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves a batch to the device; positions stay on the CPU, where random draws are keyed from them."""
    return {k: v if k == "positions" else v.to(device, non_blocking=True) for k, v in batch.items()}


def build_objective(args: Namespace, device: torch.device) -> tuple[Objective, Any]:
    """The objective, its tables on `device`, and the scheduler that is saved with the model."""
    scheduler = training_scheduler(
        args.prediction_type,
        args.beta_schedule,
        args.rescale_betas_zero_snr,
        args.flow_shift,
        getattr(args, "learned_variance", False),
    )
    if (args.prediction_type, args.beta_schedule) == ("epsilon", "squaredcos_cap_v2"):
        logger.warning(
            "--beta_schedule squaredcos_cap_v2 with --prediction_type epsilon: the last timesteps are all noise, and "
            "a sampler multiplies the model's errors there by thousands; v_prediction has no such trouble"
        )
    if args.prediction_type == "flow":
        settings: dict[str, Any] = {"timestep_density": args.timestep_density}
    else:
        names = ("snr_gamma", "noise_offset", "input_perturbation")
        settings = {name: getattr(args, name) for name in names} | {"device": device}
    return OBJECTIVES[args.prediction_type](scheduler, **settings), scheduler


def open_held_out(args: Namespace, cache: LatentCache) -> HeldOut | None:
    """The latents that evaluations are made on; None without --eval_steps. Raises UserError for a cache that does not
    fit."""
    if args.eval_steps is None:
        return None
    if args.validation_latents_dir:
        return open_split(cache, args.validation_latents_dir)
    return hold_out(cache, args.num_validation_samples)
