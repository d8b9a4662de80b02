"""Exponential moving averages of the weights, in fp32."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import remove_unfinished, replace_durably, temporary_path
from utils.training.power_ema import gamma_of, power_decay, reconstruction_weights
from utils.training.sharding import copy_full_, full

logger = logging.getLogger(__name__)
EMA_FILE = "ema.safetensors"
SNAPSHOTS = "ema_snapshots"  # folder of a run
MAX_MISSED = 0.25  # of the norm of a profile: beyond that a reconstruction is another average than the one asked for


def warmed_up(decay: float) -> Callable[[int], float]:
    """A constant decay with a warm-up that forgets the random start, by optimizer step counted from 0."""
    return lambda global_step: min(decay, (1 + global_step) / (10 + global_step))


def power_function(sigma_rel: float) -> Callable[[int], float]:
    """The decay of EDM2's power-function average, by optimizer step counted from 0."""
    gamma = gamma_of(sigma_rel)
    return lambda global_step: power_decay(gamma, global_step + 1)


def moving(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and weights of what is trained: frozen weights are their own average."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


class EMA:
    """Shadow weights: shadow += (1 - decay) * (weights - shadow) after every optimizer step.

    The first average has `decay`, with a warm-up; it is what samples and the exported model come from. For each of
    `sigma_rels` a power-function average is kept beside it, for snapshots. Buffers are copied, not averaged. Shadows
    are fp32 whatever the model is: an average kept in bf16 would never move.
    """

    def __init__(self, model: nn.Module, decay: float, sigma_rels: Sequence[float] = ()):
        self.sigma_rels = tuple(sigma_rels)
        self.decays = [warmed_up(decay), *map(power_function, self.sigma_rels)]
        self.files = [EMA_FILE, *(f"ema_sigma_rel_{each:g}.safetensors" for each in self.sigma_rels)]
        self.weights = [parameter for _, parameter in moving(model)]  # once: it takes half as long as averaging
        self.shadows = [{name: tensor.detach().clone().float() for name, tensor in moving(model)} for _ in self.decays]
        self.shadow = self.shadows[0]

    @torch.no_grad()
    def step(self, global_step: int) -> None:
        """Moves the averages towards the weights that optimizer step `global_step` (counted from 0) left."""
        weights = [parameter.float() for parameter in self.weights]
        for shadow, decay in zip(self.shadows, self.decays, strict=True):
            torch._foreach_lerp_(list(shadow.values()), weights, 1 - decay(global_step))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into a model of the same shape."""
        for name, parameter in moving(model):
            parameter.copy_(self.shadow[name])

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges weights and average; a second call undoes the first, bit for bit where the weights are fp32, as
        those of a training are."""
        for name, parameter in moving(model):
            weights = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(weights)

    def save(self, folder: Path, is_main_process: bool = True) -> None:
        """Writes the averages into a checkpoint, as safetensors. Every process calls this; the main one writes."""
        for shadow, file in zip(self.shadows, self.files, strict=True):
            whole = {name: full(tensor).contiguous().cpu() for name, tensor in shadow.items()}
            if is_main_process:
                save_file(whole, folder / file)

    def load(self, folder: Path) -> None:
        """Reads averages that `save` wrote. Raises KeyError if a weight is missing."""
        for shadow, file in zip(self.shadows, self.files, strict=True):
            saved: dict[str, Tensor] = load_file(folder / file)
            for name, tensor in shadow.items():
                copy_full_(tensor, saved[name])

    def save_snapshots(self, accelerator: Accelerator, run_dir: Path, global_step: int) -> None:
        """Keeps the power-function averages as they are after `global_step` optimizer steps, in float16, as EDM2
        does: a later average is a sum of many of them. Every process calls this; the main one writes."""
        if accelerator.is_main_process:
            remove_unfinished(run_dir / SNAPSHOTS)
            for step, _, path in stored_snapshots(run_dir):
                if step > global_step:
                    path.unlink()  # of a past that was given up
        for sigma_rel, shadow in zip(self.sigma_rels, self.shadows[1:], strict=True):
            whole = {name: full(tensor).half().contiguous().cpu() for name, tensor in shadow.items()}
            if accelerator.is_main_process:
                (run_dir / SNAPSHOTS).mkdir(exist_ok=True)
                final = run_dir / SNAPSHOTS / f"step-{global_step:07d}-sigma_rel-{sigma_rel:g}.safetensors"
                temporary = temporary_path(final)
                save_file(whole, temporary)
                replace_durably(temporary, final)


def stored_snapshots(run_dir: Path) -> list[tuple[int, float, Path]]:
    """(step, sigma_rel, file) of a run's snapshots, in order."""
    found = (
        (re.fullmatch(r"step-(\d+)-sigma_rel-(.+)", path.stem), path) for path in run_dir.glob(f"{SNAPSHOTS}/step-*")
    )
    return sorted((int(match[1]), float(match[2]), path) for match, path in found if match)


def reconstruct(run_dir: Path, sigma_rel: float, last_step: int | None = None) -> dict[str, Tensor]:
    """The average `sigma_rel` at a run's last snapshot (not after `last_step`), as fp32 weights by parameter's name,
    from all the snapshots up to there.

    Raises UserError if the run kept none, or if they do not span the profile.
    """
    stored = [each for each in stored_snapshots(run_dir) if last_step is None or each[0] <= last_step]
    if not stored:
        raise UserError(
            f"--ema_sigma_rel: {run_dir} has no snapshots of averages; train with --ema_sigma_rels 0.05 0.1"
        )
    steps, sigma_rels, paths = zip(*stored, strict=True)
    try:
        weights, missed = reconstruction_weights(steps, sigma_rels, steps[-1], sigma_rel)
    except ValueError as error:
        raise UserError(f"--ema_sigma_rel: {error}") from error
    kept = ", ".join(f"{each:g}" for each in sorted(set(sigma_rels)))
    if missed > MAX_MISSED:
        raise UserError(
            f"--ema_sigma_rel {sigma_rel:g}: the {len(paths)} snapshots in {run_dir / SNAPSHOTS} miss {missed:.0%} of "
            f"that average; use one nearer to those that were kept ({kept})"
        )
    if missed > MAX_MISSED / 5:
        logger.warning("--ema_sigma_rel %g: the snapshots miss %.1f %% of that average", sigma_rel, 100 * missed)
    total: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, tensor in load_file(path).items():
            total[name] = total.get(name, 0.0) + float(weight) * tensor.float()
    return total
