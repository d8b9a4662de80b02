"""Exponential moving averages of the weights, in fp32."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import remove_unfinished, replace_durably, temporary_path
from utils.training.run import Run
from utils.training.sharding import copy_full_, full, whole_copy

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

    def save_snapshots(self, run: Run, global_step: int) -> None:
        """Keeps the power-function averages as they are after `global_step` optimizer steps, in float16, as EDM2
        does: a later average is a sum of many of them. Every process calls this; the main one writes."""
        folder = run.folder / SNAPSHOTS
        if run.is_main:
            remove_unfinished(folder)
            for step, _, path in stored_snapshots(run.folder):
                if step > global_step:
                    path.unlink()  # of a past that was given up
        for sigma_rel, shadow in zip(self.sigma_rels, self.shadows[1:], strict=True):
            whole = {name: full(tensor).half().contiguous().cpu() for name, tensor in shadow.items()}
            if run.is_main:
                folder.mkdir(exist_ok=True)
                final = folder / f"step-{global_step:07d}-sigma_rel-{sigma_rel:g}.safetensors"
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


# ---- power-function averages: Karras et al. 2023, arXiv 2312.02696 (EDM2)

# gamma > -1/2 is needed for a profile of finite energy; gamma = 0 is the plain mean of all weights.
MAX_SIGMA_REL = 12**-0.5


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile with relative width `sigma_rel`, in (0, 12^-0.5) (appendix C, algorithm 2).

    Raises ValueError for a width that no exponent >= 0 has.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel {sigma_rel} is not between 0 and {MAX_SIGMA_REL:.4f}")
    inverse = sigma_rel**-2
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), multiplied out.
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_decay(gamma: float, step: int) -> float:
    """How much of the average optimizer step `step`, counted from 1, keeps (section 3.1): nothing of the first."""
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def inner_products(steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray) -> np.ndarray:
    """Inner products (A, B) of the profiles (A,) with the profiles (B,), each given by the step it was stored at and
    its exponent (appendix C, algorithm 3): the integral of the product of two (gamma + 1) / t (s / t)^gamma over s, up
    to the earlier t.
    """
    t_a, g_a = steps_a[:, None].astype(np.float64), gammas_a[:, None].astype(np.float64)
    t_b, g_b = steps_b[None].astype(np.float64), gammas_b[None].astype(np.float64)
    earlier = np.minimum(t_a, t_b)
    return (
        (g_a + 1)
        * (g_b + 1)
        / (g_a + g_b + 1)
        * earlier
        / (t_a * t_b)
        * (earlier / t_a) ** g_a
        * (earlier / t_b) ** g_b
    )


def reconstruction_weights(
    steps: Sequence[int], sigma_rels: Sequence[float], target_step: int, target_sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Weights (S,) of stored averages whose sum comes nearest, in least squares, to the average `target_sigma_rel` at
    `target_step` (section 3.2), and the part of that profile's norm which they miss, in [0, 1].
    """
    stored = (np.array(steps), np.array([gamma_of(each) for each in sigma_rels]))
    target = (np.array([target_step]), np.array([gamma_of(target_sigma_rel)]))
    gram = inner_products(*stored, *stored)  # (S, S)
    onto_target = inner_products(*stored, *target)[:, 0]  # (S,)
    weights = np.linalg.lstsq(gram, onto_target, rcond=1e-12)[0]
    norm = inner_products(*target, *target)[0, 0]
    missed = norm - 2 * weights @ onto_target + weights @ gram @ weights
    return weights, float(np.sqrt(max(0.0, missed) / norm))


@contextmanager
def averaged_weights(run: Run, model: Any, ema: EMA | None) -> Iterator[Any]:
    """Gives the model with its EMA weights and in evaluation mode; afterwards the model that trains is exactly as
    before. Of a model that is divided among processes the main one gets a whole copy, the others None.
    """
    if run.accelerator.is_fsdp2:
        copy = whole_copy(run.accelerator, model, {} if ema is None else ema.shadow)
        yield None if copy is None else copy.eval()
        return
    if ema is not None:
        ema.swap(model)
    model.eval()
    try:
        yield model
    finally:
        model.train()
        if ema is not None:
            ema.swap(model)
