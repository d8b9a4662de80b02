"""Optimizers and the learning rate, which is a pure function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.errors import UserError

# Share of the peak learning rate after the warm-up, by the share of the steps that are done.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    # Constant, then a linear cooldown over the last fifth (arXiv 2405.18392, section 3).
    "constant_with_decay": lambda done: min(1.0, (1.0 - done) / 0.2),
}


def learning_rate_at(global_step: int, peak: float, schedule: str, warmup_steps: int, max_train_steps: int) -> float:
    """The learning rate of optimizer step `global_step`, counted from 0.

    No state is kept, so there is none to resume, and it cannot step once for each process or micro-step.
    """
    if global_step < warmup_steps:
        return peak * (global_step + 1) / warmup_steps
    done = (global_step - warmup_steps) / max(1, max_train_steps - warmup_steps)
    return peak * LR_SCHEDULES[schedule](done)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    use_8bit_adam: bool,
) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters: torch's fused one, or the 8-bit one of bitsandbytes."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    if not use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def enable_xformers(model: nn.Module, device: torch.device) -> None:
    """Turns xformers' attention on. Raises UserError where it cannot run."""
    flag = "--enable_xformers_memory_efficient_attention"
    if device.type != "cuda":
        raise UserError(f"{flag}: xformers needs a CUDA device and this run is on {device.type}; leave the flag out")
    try:
        import xformers.ops

        probe = torch.zeros(1, 8, 1, 32, device=device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{flag}: xformers cannot run here ({reason}); install the build for torch {torch.__version__}, or leave "
            "the flag out: PyTorch's own attention takes its place"
        ) from error
    model.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
