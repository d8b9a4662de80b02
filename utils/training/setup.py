"""Setting a training run up and keeping its books: accelerator, folder, batches, logged values."""

import logging
import os
import signal
from argparse import Namespace
from collections.abc import Iterator, Sequence
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
from diffusers import SchedulerMixin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from utils.diffusion.objectives import OBJECTIVES, Objective, training_scheduler
from utils.draws import PositionBatches, SampleDraws, identity
from utils.errors import UserError
from utils.files import make_folder, names_in, write_text
from utils.latents.cache import LatentCache
from utils.training import optimizers
from utils.training.control import SIGNALS, RunControl
from utils.training.ema import EMA
from utils.training.evaluator import EvaluationSettings, Evaluator, SampleMetric, WriteModel
from utils.training.held_out import HeldOut, hold_out, open_split
from utils.training.optimizers import Groups, LearningRate
from utils.training.run import Run
from utils.training.sharding import join_fsdp

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]


def start(args: Namespace, is_denoiser: bool = True) -> Run:
    """The run of a trainer: its Accelerator, and its folder, which nothing is written to yet. Raises UserError for a
    folder that is taken, a tracker that is not installed, and weights that cannot be divided among processes.
    """
    folder = Path(args.output_dir)
    if args.report_to not in ("none", "all"):
        installed = [str(tracker) for tracker in get_available_trackers()]
        if args.report_to not in installed:  # Accelerate would leave a tracker without its package out, silently
            raise UserError(f"--report_to {args.report_to}: the trackers installed here are {', '.join(installed)}")
    run = Run(
        make_accelerator(
            mixed_precision=args.mixed_precision,
            seed=args.seed,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            allow_tf32=args.allow_tf32,
            folder=folder,
            report_to=args.report_to,
        ),
        folder,
    )
    if run.accelerator.is_fsdp2:
        check_sharded(args.optimizer, is_denoiser)
    check_output_dir(run, args.resume_from_checkpoint)
    return run


def make_accelerator(
    *,
    mixed_precision: str | None,
    seed: int,
    gradient_accumulation_steps: int = 1,
    allow_tf32: bool = False,
    folder: Path | None = None,
    report_to: str = "none",
) -> Accelerator:
    """An Accelerator, with accumulation that depends on nothing but the count of micro-steps. Raises UserError where
    fewer processes joined than were launched.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        # Without a GPU, Accelerate would train as many models as there are processes, each alone.
        cpu=True if world_size > 1 and not torch.accelerator.is_available() else None,
        mixed_precision=mixed_precision,
        log_with=None if folder is None or report_to == "none" else report_to,
        project_config=ProjectConfiguration(project_dir=str(folder or "."), logging_dir=str(folder or ".")),
        # Accelerate would otherwise also sync at the end of an epoch: a short last window would count as a whole step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
    )
    join_fsdp(accelerator)
    if accelerator.num_processes != world_size:
        raise UserError(f"{world_size} processes were launched, but Accelerate joined {accelerator.num_processes}")
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    set_seed(seed)  # new weights are the same on every process; all else is drawn by position in the stream
    return accelerator


def check_sharded(optimizer: str, is_denoiser: bool) -> None:
    """Raises UserError for what cannot be trained with its weights divided among processes (FSDP)."""
    if optimizer != "adamw":
        raise UserError(f"--optimizer {optimizer} under FSDP: it needs whole weights; use adamw, or DDP")
    if not is_denoiser:
        raise UserError("accelerate's configuration: only denoisers can be divided (FSDP); use MULTI_GPU here")


def check_output_dir(run: Run, resume_from_checkpoint: str | None) -> None:
    """Raises UserError for a folder that is taken: by another run, unless this one resumes, or by anything else."""
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"--output_dir: {run.folder} is a file; give a folder")
    contents = names_in(run.folder)
    contents -= {"latents", "counts"}  # what a run makes for itself, perhaps before it was killed
    if contents and "args.yaml" not in contents:
        raise UserError(f"--output_dir: {run.folder} is not empty and holds no run; give another folder")
    if contents and not resume_from_checkpoint:
        raise UserError(
            f"--output_dir: {run.folder} holds a run already; add --resume_from_checkpoint latest to go on with it, "
            "or give another folder"
        )
    run.accelerator.wait_for_everyone()  # all have looked before one writes


def save_args(args: Namespace, run: Run) -> None:
    """Writes `args.yaml`, which as --config repeats the run; from then on the folder is this run's."""
    if run.is_main:
        make_folder(run.folder)
        saved = {name: value for name, value in sorted(vars(args).items()) if name not in ("config", "given", "typed")}
        write_text(run.folder / "args.yaml", yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))


def samples_per_step(args: Namespace, run: Run) -> int:
    """Samples that one optimizer step sees, over all processes and micro-steps."""
    return args.train_batch_size * args.gradient_accumulation_steps * run.accelerator.num_processes


def millions_of_parameters(model: nn.Module) -> float:
    """Trainable parameters of a model, in millions."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6


# Of these flags a script has those that its kind of model takes.
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


def identity_of(args: Namespace, run: Run, model: nn.Module, data_identity: str, **more: Any) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes from it; everything else may. `more` is what
    one kind of model has beside the common flags."""
    same: dict[str, Any] = {name: vars(args)[name] for name in IDENTITY_FLAGS if name in args}
    same["parameters"] = f"{millions_of_parameters(model):.6f}M"
    return same | {"data": data_identity, "samples per step": samples_per_step(args, run)} | more


def announce(args: Namespace, run: Run, model: nn.Module, num_rows: int, first_step: int) -> None:
    """Starts the trackers and says, once, what is about to be trained."""
    accelerator = run.accelerator
    if accelerator.log_with:
        accelerator.init_trackers("logs")
    per_step = samples_per_step(args, run)
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


def make_batches(args: Namespace, run: Run, stream: Dataset, first_step: int) -> Iterator[tuple[Batch, SampleDraws]]:
    """Batches of an endless stream, for ever, from optimizer step `first_step` on: on the device, each with the random
    draws that belong to its samples. Dropout is seeded by them, too.
    """
    for batch in make_loader(args, run, stream, first_step):
        positions = batch.pop("positions")  # on the CPU, where draws are keyed from them
        draws = SampleDraws(args.seed, positions, run.device)
        draws.seed_dropout()
        yield {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}, draws


def make_loader(args: Namespace, run: Run, stream: Dataset, first_step: int) -> DataLoader:
    """The batches of this process, on the CPU, with the `positions` of their samples.

    Not for `accelerator.prepare`: each process is given its own positions of the stream already.
    """
    sampler = PositionBatches(
        args.train_batch_size,
        args.gradient_accumulation_steps,
        first_step,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    return DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=identity,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=run.device.type == "cuda",
        generator=torch.Generator(),  # else it draws from torch's own
    )


def make_control(args: Namespace, run: Run, first_step: int, evaluator: Evaluator | None = None) -> RunControl:
    """What ends a run and what keeps its weights finite; takes SIGTERM and SIGINT from here on."""
    control = RunControl(
        run,
        max_train_steps=args.max_train_steps,
        max_train_hours=args.max_train_hours,
        max_nonfinite_steps=args.max_nonfinite_steps,
        first_step=first_step,
        is_resumed=bool(args.resume_from_checkpoint),
    )
    if evaluator is not None:
        control.end_early(evaluator.reason_to_end)  # a resumed run may have stopped early before
    return control


def ignore_signals(worker: int) -> None:
    """In a loader's worker: Ctrl-C and Slurm signal all processes, and the step to finish may need more batches."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def make_schedule(args: Namespace) -> LearningRate:
    """The learning rate of the optimizer flags, for every step."""
    return LearningRate(args.learning_rate, args.lr_scheduler, args.lr_warmup_steps, args.max_train_steps)


def make_optimizer(
    args: Namespace,
    model: nn.Module,
    own: Groups | None = None,
    name: str | None = None,
    betas: tuple[float, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the optimizer flags over all trainable parameters; `own` are settings of some of them, by the
    beginning of their names, `name` and `betas` what takes the place of the flags."""
    return optimizers.make_optimizer(
        model,
        name=name or args.optimizer,
        learning_rate=args.learning_rate,
        betas=betas or (args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        own=own,
    )


def make_ema(args: Namespace, model: nn.Module, sigma_rels: Sequence[float] | None = None) -> EMA | None:
    """The moving averages of a model's weights; None without --use_ema. `sigma_rels` are those of power functions."""
    return EMA(model, args.ema_decay, sigma_rels or ()) if args.use_ema else None


def make_evaluator(
    args: Namespace,
    run: Run,
    *,
    held_out: HeldOut | None,
    objective: Objective,
    write_model: WriteModel,
    first_step: int,
    best_metric: str = "loss",
    sample_metric: SampleMetric | None = None,
    text_encoder: Any = None,
) -> Evaluator | None:
    """What evaluates on held-out latents while a model trains; None without --eval_steps."""
    if held_out is None:
        return None
    settings = EvaluationSettings(
        batch_size=args.eval_batch_size,
        best_metric=best_metric,
        patience=args.early_stopping_patience,
        min_delta=args.early_stopping_min_delta,
    )
    return Evaluator(
        run,
        held_out=held_out,
        objective=objective,
        write_model=write_model,
        first_step=first_step,
        settings=settings,
        sample_metric=sample_metric,
        text_encoder=text_encoder,
    )


def validation_sampling(args: Namespace) -> dict[str, Any]:
    """How samples are drawn during training, whatever they are samples of."""
    return {
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_inference_steps,
    }


def make_objective(
    args: Namespace, device: torch.device, learned_variance: bool = False
) -> tuple[Objective, SchedulerMixin]:
    """The objective, its tables on `device`, and the scheduler that is saved with the model."""
    scheduler = training_scheduler(
        args.prediction_type,
        args.beta_schedule,
        args.rescale_betas_zero_snr,
        args.flow_shift,
        learned_variance,
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
