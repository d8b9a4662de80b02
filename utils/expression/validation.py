"""Cells that are sampled on the way: where their latents lie beside those of the training cells, and how far."""

import logging

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.sampling import fault_of_steps, image_generators, sampling_scheduler
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.expression.cache import VectorCache
from utils.expression.pictures import principal_plane, scatter_grid
from utils.expression.pipeline import Exporter
from utils.training.held_out import in_fixed_order
from utils.training.lora import merge_lora
from utils.training.run import Run
from utils.training.step_log import show_picture

logger = logging.getLogger(__name__)


def latent_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Wasserstein-2 distance of two sets of as many vectors (n, D): the root of the mean squared distance, under the
    assignment in which it is smallest.
    """
    costs = cdist(first, second, "sqeuclidean")
    return float(np.sqrt(costs[linear_sum_assignment(costs)].mean()))


class CellSamples:
    """Samples the latents of `num_cells` cells with the conditions of as many rows of the cache, always the same ones
    from the same noise, so that pictures of a run compare. Raises UserError for a number of steps that the sampler
    cannot take.
    """

    def __init__(
        self,
        run: Run,
        exporter: Exporter,
        cache: VectorCache,
        *,
        num_cells: int,
        guidance_scale: float,
        num_inference_steps: int,
    ):
        fault = fault_of_steps(sampling_scheduler(exporter.scheduler), num_inference_steps)
        if fault:
            raise UserError(f"--validation_inference_steps {num_inference_steps}: {fault}; use 20, 25 or 50")
        self.accelerator, self.exporter, self.cache = run.accelerator, exporter, cache
        self.folder = run.folder / "samples"
        self.guidance = Guidance(guidance_scale, num_inference_steps=num_inference_steps)
        order = in_fixed_order(len(cache))
        self.rows, others = order[:num_cells], order[num_cells : 2 * num_cells]
        self.labels = None
        for name, settings in cache.conditions.items():
            if settings["kind"] == "class":
                self.labels = np.array([*settings["names"], "none"])[cache.values[name][self.rows]]
        if len(others) == len(self.rows):
            between = latent_distance(self.real(self.rows), self.real(others))
            logger.info("two sets of %d real cells lie %.3f apart in normalised latents", num_cells, between)

    def real(self, rows: np.ndarray) -> np.ndarray:
        """Latents (n, D + 1) of training cells, a sample of the posterior of each."""
        batch = self.cache.gather(rows)
        return self.cache.normalise(batch, SampleDraws(0, torch.from_numpy(rows))).numpy()

    def save(self, model: ConditionalDenoiser, global_step: int) -> None:
        """Writes `step-N.png` and the distance, to the trackers too, from the weights that `model` has now; the main
        process does it.
        """
        if not self.accelerator.is_main_process:
            return
        pipeline = self.exporter.pipeline(merge_lora(model))
        batch, count = self.cache.gather(self.rows), len(self.rows)
        values = {name: batch[name] for name in self.cache.conditions}
        with self.accelerator.autocast():
            latents = pipeline.latents(count, values, self.guidance, generator=image_generators(0, 0, count))
        found, real = latents.float().cpu().numpy(), self.real(self.rows)
        if not np.isfinite(found).all():
            logger.warning("step %d: samples are not finite", global_step)
            return
        distance = latent_distance(found, real)
        logger.info(
            "step %d: %d samples lie %.3f from real cells, in normalised latents", global_step, count, distance
        )
        self.accelerator.log({"validation/latent_distance": distance}, step=global_step)
        mean, axes = principal_plane(real)
        panels = [(name, (each - mean) @ axes.T, self.labels) for name, each in (("real", real), ("samples", found))]
        show_picture(self.accelerator, self.folder, scatter_grid(panels), "validation", global_step)
