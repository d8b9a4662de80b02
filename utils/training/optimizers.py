"""Optimizers and the learning rate, which is a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from utils.errors import UserError

# Share of the peak learning rate after the warm-up, by the share of the steps that are done.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    # Constant, then a linear cooldown over the last fifth (arXiv 2405.18392, section 3).
    "constant_with_decay": lambda done: min(1.0, (1.0 - done) / 0.2),
}


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a pure function of the step: no state is kept, so there is none to resume, and it cannot
    step once for each process or micro-step."""

    peak: float
    schedule: str  # one of LR_SCHEDULES
    warmup_steps: int  # of linear warm-up
    max_train_steps: int | None  # None: the hours alone lead

    def at(self, global_step: int, time_share: float = 0.0) -> float:
        """The learning rate of optimizer step `global_step`, counted from 0, when `time_share` in [0, 1] of the hours
        is spent. The warm-up counts steps; after it steps or hours lead, whichever is nearer to its end.
        """
        if global_step < self.warmup_steps:
            return self.peak * (global_step + 1) / self.warmup_steps
        steps_share = 0.0
        if self.max_train_steps is not None:
            steps_share = (global_step - self.warmup_steps) / max(1, self.max_train_steps - self.warmup_steps)
        return self.peak * LR_SCHEDULES[self.schedule](max(steps_share, time_share))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every parameter group; one with `lr_scale` gets so many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer moves."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


Groups = dict[str, dict[str, Any]]  # settings of parameters of their own, by the beginning of their names


def parameter_groups(model: nn.Module, own: Groups | None = None) -> list[dict[str, Any]]:
    """The parameters that an optimizer moves, those with settings of their own in groups of their own."""
    rest: list[nn.Parameter] = []
    groups: Groups = {prefix: {"params": []} | settings for prefix, settings in (own or {}).items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = next((each for each in groups if name.startswith(each)), None)
            (rest if prefix is None else groups[prefix]["params"]).append(parameter)
    return [{"params": rest}, *groups.values()]


def adamw(model: nn.Module, own: Groups | None = None, **settings: Any) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused into one kernel."""
    return torch.optim.AdamW(parameter_groups(model, own), fused=True, **settings)


def adamw_8bit(model: nn.Module, own: Groups | None = None, **settings: Any) -> torch.optim.Optimizer:
    """AdamW with 8-bit states (arXiv 2110.02861). Raises UserError without bitsandbytes."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "--optimizer adamw_8bit (--use_8bit_adam) needs the package bitsandbytes: pip install bitsandbytes"
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameter_groups(model, own), **settings)


# Layers whose input is one vector a sample (timestep and pooled condition) and no tokens: a batch's gradient has the
# rank of its few conditions, and Muon would raise the noise in all other directions to the size of the signal.
MODULATIONS = ("adaln", "time_emb_proj")


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: weights of the linear layers in repeated blocks. Layers outside those map to and from latents,
    timesteps and conditions; convolutions have four axes, and torch's Muon takes two.
    """
    found = {
        id(layer.weight)
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList)
        for name, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in MODULATIONS
    }
    return [parameter for parameter in trainable(model) if id(parameter) in found]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the hidden matrices of a model and AdamW for everything else, as one optimizer.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate and one
    weight decay serve both. Each part has one parameter group here; groups and state are handed to the parts at each
    step, so they may be replaced, as loading a state does.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], adamw_settings: dict[str, Any]):
        shared = {name: adamw_settings[name] for name in ("lr", "weight_decay")}
        self.parts = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(others, fused=True, **adamw_settings),
        ]
        super().__init__([part.param_groups[0] for part in self.parts], defaults={})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def muon(model: nn.Module, own: Groups | None = None, **settings: Any) -> torch.optim.Optimizer:
    """Muon and AdamW. Raises UserError where torch has no Muon, the model no matrix for it, or parts of it settings of
    their own.
    """
    if own:
        raise UserError(f"--optimizer muon: {', '.join(own)} has a learning rate of its own; use adamw")
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon needs torch 2.9 or newer, and this is {torch.__version__}; use adamw")
    matrices = hidden_matrices(model)
    if not matrices:
        raise UserError("--optimizer muon: this model has no linear layers in repeated blocks; use adamw")
    is_matrix = {id(weight) for weight in matrices}
    return MuonAdamW(matrices, [each for each in trainable(model) if id(each) not in is_matrix], settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "muon": muon,
}


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    own: Groups | None = None,
) -> torch.optim.Optimizer:
    """One of `OPTIMIZERS` over all trainable parameters; `betas` and `epsilon` are AdamW's. `own` are settings of some
    parameters, by the beginning of their names: `lr_scale`, their learning rate in units of the others', or
    `weight_decay`.
    """
    return OPTIMIZERS[name](model, own, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon)


# Their gradients lie in pieces, or with an engine; Accelerate knows how to clip those.
DIVIDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.XLA)


def clip_grad_norm_(accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
    """The norm of all gradients together, which are scaled down to `max_norm` where it is larger; None where an engine
    keeps it to itself. To the bit what `accelerator.clip_grad_norm_` does, which however multiplies gradients that are
    small enough by 1, and that takes 1 % of a step of a small model.
    """
    if accelerator.distributed_type in DIVIDED:
        return accelerator.clip_grad_norm_(parameters, max_norm)
    accelerator.unscale_gradients()  # of fp16
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    if norm + 1e-6 > max_norm:  # torch scales by max_norm / (norm + 1e-6)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


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
