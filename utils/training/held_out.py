"""Latents that training never sees, and the validation loss on them.

All that is random in that loss is fixed: which rows are held out, their noise, their timesteps. It depends on neither
--seed, batch size, number of processes nor step, so that two of its values differ by the weights alone, and runs with
the same objective compare.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from utils.diffusion.objectives import Objective
from utils.draws import SampleDraws, keys, uniform_draws
from utils.errors import UserError
from utils.files import sha256_json
from utils.latents.cache import LatentCache
from utils.latents.spec import LatentSpec, comparable, summary

HELD_OUT_SEED = 4_242_424_242  # no --seed that anybody would give: training draws other noise
NUM_QUARTERS = 4
# Entries of a fingerprint in which two splits of one data set differ.
OF_A_SPLIT = ("dataset", "columns", "random_flip", "max_samples", "part", "num_translations")

Cache = TypeVar("Cache", bound=LatentCache)


@dataclass(frozen=True)
class HeldOut(Generic[Cache]):
    """Rows of a cache for validation, in a random order that is always the same."""

    cache: Cache
    rows: np.ndarray  # (N,) of that cache
    training_rows: np.ndarray | None  # the rows of the training cache that are left; None = all of them
    identity: str  # which latents these are

    def __len__(self) -> int:
        return len(self.rows)


def in_fixed_order(num_rows: int) -> np.ndarray:
    """The rows 0 to `num_rows` - 1 in the order of a hash of the row, whatever the seed of the run."""
    return np.argsort(keys(HELD_OUT_SEED, "held_out", np.arange(num_rows)), kind="stable")


def hold_out(cache: Cache, num_rows: int) -> HeldOut[Cache]:
    """Keeps `num_rows` rows of a training cache for validation: the same for every seed, and those of a smaller number
    among those of a larger one. Raises UserError where none would be left to train on, and for a part of a cache.
    """
    if cache.reader is not None:
        raise UserError(
            "--num_validation_samples with a cache in parts: the processes read different rows; make a cache of "
            "another split and give it as --validation_latents_dir"
        )
    if num_rows >= len(cache):
        raise UserError(
            f"--num_validation_samples {num_rows}: the cache has {len(cache)} rows; leave some to train on"
        )
    order = in_fixed_order(len(cache))
    identity = f"{num_rows} rows of {cache.spec.identity()}"
    return HeldOut(cache, order[:num_rows], np.sort(order[num_rows:]), identity)


def open_split(cache: Cache, cache_dir: str | Path) -> HeldOut[Cache]:
    """All rows of the cache of another split, normalised as the training cache is. Raises UserError unless it was made
    in the same way, of other data.
    """
    check_split(cache.spec, LatentSpec.read(cache_dir, flag="--validation_latents_dir"))
    other = cache.like(cache_dir)
    return HeldOut(other, in_fixed_order(len(other)), None, f"all rows of {other.spec.identity()}")


def check_split(training: LatentSpec, other: LatentSpec) -> None:
    """Raises UserError, with both sides, unless two caches are two splits made alike."""
    if other.identity() == training.identity():
        raise UserError(
            "--validation_latents_dir: this is the cache that is trained on; give one of another split, or "
            "--num_validation_samples"
        )
    if training.labels and other.labels and other.labels["num_classes"] > training.labels["num_classes"]:
        raise UserError(
            f"--validation_latents_dir: has labels up to {other.labels['num_classes'] - 1}, and the cache that is "
            f"trained on up to {training.labels['num_classes'] - 1}; give a split of the same data set"
        )
    ours, theirs = (comparable_parts(spec) for spec in (training, other))
    for key, value in ours.items():
        if comparable(value) != comparable(theirs.get(key)):
            raise UserError(
                f"--validation_latents_dir: made with {key} = {summary(theirs.get(key))}, and the cache that is "
                f"trained on with {key} = {summary(value)}; precompute the other split with the same flags"
            )


def comparable_parts(spec: LatentSpec) -> dict[str, Any]:
    """What two splits must share: all that decides a latent, and what stands beside it."""
    parts = {key: value for key, value in spec.fingerprint.items() if key not in OF_A_SPLIT}
    captions = spec.captions and (spec.captions["content"], tuple(spec.captions["shape"]))
    labels = spec.labels and {"sha256 of names": sha256_json(spec.labels["names"])}
    return parts | {"kind": spec.kind, "shape": spec.shape, "captions": captions, "labels": labels}


def share_of(accelerator: Accelerator, count: int) -> range:
    """Which of `count` samples this process evaluates: the main one all of a model that is divided among processes
    (FSDP), for it alone has a whole copy.
    """
    if accelerator.is_fsdp2:
        return range(count if accelerator.is_main_process else 0)
    rank, total = accelerator.process_index, accelerator.num_processes
    return range(rank * count // total, (rank + 1) * count // total)


def stratified(rows: np.ndarray, places: np.ndarray, total: int, quarter: int) -> Tensor:
    """Uniform numbers (B,) for the timesteps of `rows` (B,), which stand at `places` (B,) of `total`: one in each of
    `total` equal strata of a quarter of [0, 1).
    """
    jitter = uniform_draws(HELD_OUT_SEED + quarter, "timestep", rows)
    uniform = (quarter + (places + jitter) / total) / NUM_QUARTERS
    return torch.from_numpy(uniform).float().clamp(max=1 - 2**-24)


@torch.no_grad()
def validation_losses(
    accelerator: Accelerator,
    model: nn.Module | None,
    held_out: HeldOut,
    objective: Objective,
    *,
    batch_size: int,
    text_encoder: Any = None,
) -> list[float]:
    """Mean loss, weighted as in training, of the held-out latents in each quarter of the timesteps that training
    draws, the cleanest first: every row is noised once in each. Conditions are never dropped.

    `model` is a denoiser in evaluation mode, None on a process without one. Every process calls this and learns the
    same. `text_encoder` encodes captions of which the cache holds token ids.
    """
    device, share = accelerator.device, share_of(accelerator, len(held_out))
    sums = [0.0] * NUM_QUARTERS
    for first in range(share.start, share.stop, batch_size):
        assert model is not None
        places = np.arange(first, min(first + batch_size, share.stop))
        rows = held_out.rows[places]
        stored = held_out.cache.gather(rows)
        batch = {name: value.to(device) for name, value in stored.items()}
        drop = torch.zeros(len(rows), dtype=torch.bool, device=device)
        if text_encoder is not None and "input_ids" in batch:
            with accelerator.autocast():
                batch["encoder_hidden_states"] = text_encoder(batch["input_ids"])[0]  # (B, S, D)
        for quarter in range(NUM_QUARTERS):
            draws = SampleDraws(HELD_OUT_SEED + quarter, torch.from_numpy(rows))  # on the CPU: alike on every machine
            latents = held_out.cache.normalise(stored, draws)  # (B, ...)
            noise = objective.sample_noise(latents, draws)  # (B, ...)
            latents, noise = latents.to(device), noise.to(device)
            timesteps = objective.sample_timesteps(stratified(rows, places, len(held_out), quarter).to(device))  # (B,)
            noisy_latents = objective.add_noise(latents, noise, timesteps)
            with accelerator.autocast():
                model_pred = model(noisy_latents, timesteps, batch, drop)
            target = objective.target(latents, noise, timesteps)
            losses = objective.sample_losses(model_pred, target, timesteps, batch.get("attention_mask"))  # (B,)
            sums[quarter] += losses.cpu().double().sum().item()
    everyones = gather_object([sums])
    return [sum(each) / len(held_out) for each in zip(*everyones, strict=True)]
