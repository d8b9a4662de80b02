"""A run of cells that samples: conditions -> latents -> counts drawn from the likelihood."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from utils.diffusion.column_sampling import sample_latents
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.expression.codec import draw_cells
from utils.expression.vae.network import ExpressionVAE
from utils.image.codec import Normalisation

COUNTS_STREAM = 2  # of a sample's seed: the noise of its latents is another


@dataclass
class ExpressionPipeline:
    """The parts of a run. `training_columns` are the conditions, and the batch, of each training cell (R,): names of
    categories (object, None = none) or numbers.
    """

    denoiser: ConditionalDenoiser
    scheduler: SchedulerMixin
    vae: ExpressionVAE
    normalisation: Normalisation
    training_columns: dict[str, np.ndarray]

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """The conditions of the run: name -> kind and settings. Empty for an unconditional one."""
        return self.denoiser.conditions.config.get("columns") or {}

    @property
    def genes(self) -> list[str]:
        """Of the counts, in their order."""
        return self.vae.config.genes

    def to(self, device: torch.device) -> "ExpressionPipeline":
        """Moves the models."""
        self.denoiser.to(device)
        self.vae.to(device)
        return self

    def latents(
        self,
        count: int,
        values: dict[str, Tensor],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guide_model: ConditionalDenoiser | None = None,
        generator: list[torch.Generator] | None = None,
        progress_bar: Callable[[Tensor], Iterable[Tensor]] = iter,
    ) -> Tensor:
        """Normalised latents (`count`, D + 1), as `sample_latents` makes them."""
        return sample_latents(
            self.denoiser,
            self.scheduler,
            (count, self.denoiser.model.config.sample_size),
            values,
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            guidance_rescale,
            guide_model,
            generator,
            progress_bar,
        )

    def decode(
        self, latents: Tensor, batch_index: Tensor | None, seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalised latents (B, D + 1) -> counts (B, G), drawn from the likelihood with a seed for each cell, and
        library sizes (B,).
        """
        generators = [np.random.default_rng([seed, COUNTS_STREAM]) for seed in seeds]
        raw_latents = self.normalisation.denormalise(latents)
        return draw_cells(self.vae, raw_latents, batch_index, generators)
