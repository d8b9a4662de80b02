"""Setting a training run up and keeping its books: accelerator, folder, optimizer, learning rate, logged values."""

import logging
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
import transformers
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from utils.draws import PositionBatches, identity
from utils.ema import EMA
from utils.errors import UserError
from utils.files import write_text

logger = logging.getLogger(__name__)


def make_accelerator(args: Namespace, output_dir: Path | None = None) -> Accelerator:
    """The Accelerator of a script, with accumulation that depends on nothing but the count of micro-steps."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if output_dir is None or args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir or "."), logging_dir=str(output_dir and output_dir / "logs")
        ),
        # Accelerate would otherwise also sync at the end of an epoch: a short last window counts as a whole step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=getattr(args, "gradient_accumulation_steps", 1), sync_with_dataloader=False
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
    )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if getattr(args, "allow_tf32", False):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    set_seed(args.seed)  # for new weights: the same on every process; all else is drawn by position in the stream
    return accelerator


def claim_output_dir(args: Namespace, output_dir: Path, accelerator: Accelerator) -> None:
    """Writes `args.yaml` into the run's folder. Raises UserError if the folder holds something that would be mixed up with it."""
    contents = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir: {output_dir} is a file; give a folder")
    if contents - {"latents"} and not args.resume_from_checkpoint:
        what = "another run" if "args.yaml" in contents else "other files"
        raise UserError(
            f"--output_dir: {output_dir} is not empty (it holds {what}); add --resume_from_checkpoint latest to go on with that run, or "
            "give another folder"
        )
    if contents - {"latents"} and "args.yaml" not in contents:
        raise UserError(
            f"--output_dir: {output_dir} is not empty and holds no run (no args.yaml); give another folder"
        )
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        saved = {name: value for name, value in sorted(vars(args).items()) if name not in ("config", "given")}
        write_text(output_dir / "args.yaml", yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))


def samples_per_step(args: Namespace, accelerator: Accelerator) -> int:
    """Samples that one optimizer step sees, over all processes and micro-steps."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def identity_of(args: Namespace, data_identity: str, accelerator: Accelerator) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it; everything else may."""
    names = (
        "model",
        "model_size",
        "prediction_type",
        "beta_schedule",
        "rescale_betas_zero_snr",
        "flow_shift",
        "use_ema",
        "seed",
    )
    names += ("latent_normalisation", "use_8bit_adam")
    same = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return same | {"data": data_identity, "samples per step": samples_per_step(args, accelerator)}


def announce(args: Namespace, accelerator: Accelerator, model: nn.Module, num_rows: int, first_step: int) -> None:
    """Starts the trackers and says, once, what is about to be trained."""
    if accelerator.log_with:
        accelerator.init_trackers("logs")
    millions = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    epochs = args.max_train_steps * samples_per_step(args, accelerator) / num_rows
    logger.info(
        "training %.1fM parameters on %d samples: steps %d to %d, %d samples a step (%d process%s x %d x %d accumulated), %.1f epochs, precision %s",
        millions,
        num_rows,
        first_step,
        args.max_train_steps,
        samples_per_step(args, accelerator),
        accelerator.num_processes,
        "" if accelerator.num_processes == 1 else "es",
        args.train_batch_size,
        args.gradient_accumulation_steps,
        epochs,
        accelerator.mixed_precision,
    )


# Shares of the peak learning rate after the warm-up, by the share of the training that is done.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + float(torch.cos(torch.tensor(done * torch.pi, dtype=torch.float64)))),
    "constant_with_decay": lambda done: min(
        1.0, (1.0 - done) / 0.2
    ),  # arXiv 2405.18392: constant, then a linear cooldown
}


def learning_rate_at(global_step: int, peak: float, schedule: str, warmup_steps: int, max_train_steps: int) -> float:
    """The learning rate of optimizer step `global_step`, counted from 0: a pure function, so resuming needs no state and the
    number of processes does not matter."""
    if global_step < warmup_steps:
        return peak * (global_step + 1) / warmup_steps
    done = (global_step - warmup_steps) / max(1, max_train_steps - warmup_steps)
    return peak * LR_SCHEDULES[schedule](done)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters: torch's fused one, or the 8-bit one of bitsandbytes."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if not args.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def enable_xformers(model: nn.Module, device: torch.device) -> None:
    """Turns xformers' attention on. Raises UserError where it cannot run."""
    try:
        import xformers.ops

        if device.type != "cuda":
            raise UserError(
                f"--enable_xformers_memory_efficient_attention: xformers' kernels need a CUDA device, this run is on {device.type}; leave it out"
            )
        probe = torch.zeros(1, 8, 1, 32, device=device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(
            f"--enable_xformers_memory_efficient_attention: xformers cannot run here ({str(error).splitlines()[0]}); install the xformers "
            f"built for torch {torch.__version__}, or leave the flag out: PyTorch's own attention is as fast on recent GPUs"
        ) from error
    model.enable_xformers_memory_efficient_attention()


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves a batch to the device; positions stay on the CPU, where random draws are keyed from them."""
    return {k: v if k == "positions" else v.to(device, non_blocking=True) for k, v in batch.items()}


def make_loader(stream: Dataset, args: Namespace, accelerator: Accelerator, first_step: int) -> DataLoader:
    """Batches of an endless stream, for ever, from optimizer step `first_step` on. Not for `accelerator.prepare`: each process
    already gets its own positions."""
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
        pin_memory=accelerator.device.type == "cuda",
    )


@contextmanager
def averaged_weights(model: nn.Module, ema: EMA | None) -> Iterator[None]:
    """Inside, the model has its EMA weights and is in evaluation mode; afterwards it is exactly as before."""
    if ema is not None:
        ema.swap(model)
    model.eval()
    try:
        yield
    finally:
        model.train()
        if ema is not None:
            ema.swap(model)


class StepLog:
    """Losses accumulate on the device and are read only when logged, so that no step waits for the GPU."""

    def __init__(self, accelerator: Accelerator, samples_per_step: int):
        self.accelerator = accelerator
        self.samples_per_step = samples_per_step
        self.total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        self.micro_steps = 0
        self.steps = 0
        self.started = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Counts the loss of a micro-step."""
        self.total += loss.detach()
        self.micro_steps += 1

    def step_done(self) -> None:
        """Counts an optimizer step."""
        self.steps += 1

    def flush(self, learning_rate: float, global_step: int) -> dict[str, float]:
        """Means since the last call over all processes, written to the trackers. Every process calls this."""
        mean = self.accelerator.reduce(self.total / self.micro_steps, reduction="mean").item()
        seconds = time.perf_counter() - self.started
        values = {
            "train/loss": mean,
            "train/learning_rate": learning_rate,
            "train/samples_per_second": self.steps * self.samples_per_step / seconds,
        }
        self.accelerator.log(values, step=global_step)
        self.total.zero_()
        self.micro_steps = self.steps = 0
        self.started = time.perf_counter()
        return values
