"""What a latent cache says of itself: its spec, how its latents are normalised, and its fingerprint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import read_json, sha256_json
from utils.tensor_ops import per_channel


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and std of raw latents: the denoiser sees (raw - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_vae(cls, config, channels: int) -> "Normalisation":
        """The VAE's own `scaling_factor` and `shift_factor`, or its per-channel `latents_mean` and `latents_std`."""
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = torch.tensor(config["latents_mean"]).flatten(), torch.tensor(config["latents_std"]).flatten()
            return cls(tuple(mean.tolist()), tuple(std.tolist()))
        shift, scaling = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        return cls((shift,) * channels, (1.0 / scaling,) * channels)

    def _broadcast(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor([v], device=like.device, dtype=torch.float32) for v in (self.mean, self.std))
        return per_channel(mean, like), per_channel(std, like)

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """Raw latents, grids (B, C, H, W) or (B, ..., C) -> what the denoiser sees."""
        mean, std = self._broadcast(raw_latents)
        return (raw_latents.float() - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._broadcast(latents)
        return latents.float() * std + mean

    def then(self, other: "Normalisation") -> "Normalisation":
        """This one, and the other after it, as one."""
        pairs = zip(self.mean, self.std, other.mean, strict=True)
        mean = tuple(own + std * further for own, std, further in pairs)
        return Normalisation(mean, tuple(own * further for own, further in zip(self.std, other.std, strict=True)))

    def is_close(self, other: "Normalisation") -> bool:
        """Whether both give the same latents, to rounding."""
        offset = np.abs(np.subtract(self.mean, other.mean)) / np.array(self.std)
        return bool((offset < 1e-4).all() and np.allclose(self.std, other.std, rtol=1e-4))

    def is_plain_scaling(self) -> bool:
        """Whether one factor and no shift say it all: what StableDiffusionPipeline can undo."""
        return not any(self.mean) and len(set(self.std)) == 1


SPEC_FILE = "latent_spec.json"
SPEC_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What a latent cache holds. `fingerprint` is all that decides its content; two caches with equal ones are
    equal. What has a default is of one modality alone; the order of the fields is that of the file.
    """

    kind: str  # "image", "set", "vector"
    shape: tuple[int, ...]  # of one latent, (C, H, W), or (N, D) of a set, padded
    dtype: str
    content: str  # "moments": mean and std of the posterior; "mean": one latent
    flips: bool = False  # of images: a second encode of the mirrored image is stored
    num_rows: int
    num_skipped: int
    normalisation: dict[str, dict[str, list[float]]]  # "vae" and "measured": mean and std per channel
    captions: dict[str, Any] | None = None  # of images: content ("hidden_states" or "input_ids"), shape, count
    labels: dict[str, Any] | None = None  # of images: num_classes, names
    vae: str
    text_encoder: dict[str, str | None] | None = None  # of images: name, library, tokenizer
    fingerprint: dict[str, Any]
    version: int = SPEC_VERSION
    num_translations: int = 1  # of sets: latents of each row, of the same thing in other places
    num_items: dict[str, int] | None = None  # of sets: how many have how many items
    columns: dict[str, Any] | None = None  # of sets and vectors: what is in the other columns of the source

    def variants(self) -> list[str]:
        """The columns of latents, of which one is drawn each time a row is seen."""
        if self.flips:
            return ["latents", "latents_flipped"]
        return ["latents", *(f"latents_{i}" for i in range(1, self.num_translations))]

    @classmethod
    def read(cls, cache_dir: str | Path, flag: str = "--latents_dir") -> "LatentSpec":
        """The spec of a finished cache. Raises UserError, which names the flag, where there is none."""
        path = Path(cache_dir) / SPEC_FILE
        if not path.is_file():
            state = (
                "is not finished (run precompute_latents.py again, it continues)"
                if Path(cache_dir).is_dir()
                else "does not exist"
            )
            raise UserError(f"{flag}: the latent cache {cache_dir} {state}: no {SPEC_FILE} in it")
        values = read_json(path)
        if values.get("version") != SPEC_VERSION:
            raise UserError(
                f"{path}: version {values.get('version')} of the format, expected {SPEC_VERSION}; precompute again"
            )
        values["shape"] = tuple(values["shape"])
        return cls(**values)

    def identity(self) -> str:
        """One hash of the fingerprint, for checkpoints to remember."""
        return sha256_json(self.fingerprint)


def check_fingerprint(found: dict[str, Any], asked: dict[str, Any], cache_dir: str | Path) -> None:
    """Raises UserError, with both sides, unless the cache was made with everything in `asked` (a part or all of
    it).
    """
    for key, wanted in asked.items():
        if comparable(found.get(key)) != comparable(wanted):
            raise UserError(
                f"--latents_dir: the latent cache {cache_dir} was made with {key} = {summary(found.get(key))}, and "
                f"this run asks for {key} = {summary(wanted)}; change the flag back or give another --latents_dir"
            )


def comparable(value: Any) -> Any:
    """A fingerprint's entry without the name of a model: the same weights under another path are the same model."""
    is_model = isinstance(value, dict) and value.keys() == {"name", "class", "sha256"}
    return (value["class"], value["sha256"]) if is_model else value


def summary(value: Any) -> str:
    """A fingerprint's entry in one short line."""
    if isinstance(value, dict):
        parts = (f"{k} {str(v)[:12] if 'sha' in k else v}" for k, v in value.items() if not isinstance(v, dict | list))
        return "(" + ", ".join(parts) + ")"
    return str(value)
