"""Crystals that are sampled on the way: a picture, and how many of them are valid."""

import logging

import numpy as np
from torch import Tensor

from utils.crystal.cache import SetCache
from utils.crystal.matching import is_structurally_valid
from utils.crystal.pictures import crystal_grid
from utils.crystal.pipeline import Exporter
from utils.crystal.structure import formula_of
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.sampling import fault_of_steps, image_generators, sampling_scheduler
from utils.errors import UserError
from utils.training.held_out import in_fixed_order
from utils.training.lora import merge_lora
from utils.training.run import Run
from utils.training.step_log import show_picture


class CrystalSamples:
    """Samples `num_crystals` for the conditions and numbers of atoms of as many rows of the cache, always the same
    ones from the same noise, so that pictures of a run compare. Raises UserError for a number of steps that the
    sampler cannot take.
    """

    def __init__(
        self,
        run: Run,
        exporter: Exporter,
        cache: SetCache,
        *,
        num_crystals: int,
        guidance_scale: float,
        num_inference_steps: int,
    ):
        fault = fault_of_steps(sampling_scheduler(exporter.scheduler), num_inference_steps)
        if fault:
            raise UserError(f"--validation_inference_steps {num_inference_steps}: {fault}; use 20, 25 or 50")
        self.accelerator, self.exporter, self.folder = run.accelerator, exporter, run.folder / "samples"
        self.guidance = Guidance(guidance_scale, num_inference_steps=num_inference_steps)
        rows = in_fixed_order(len(cache))[:num_crystals]
        batch = cache.gather(rows)
        self.num_atoms = batch["attention_mask"].sum(dim=1)  # (B,)
        self.values: dict[str, Tensor] = {name: batch[name] for name in cache.conditions}

    def save(self, model: ConditionalDenoiser, global_step: int) -> None:
        """Writes `step-N.png` and the share of valid structures, to the trackers too, from the weights that `model`
        has now; the main process does it.
        """
        if not self.accelerator.is_main_process:
            return
        pipeline = self.exporter.pipeline(merge_lora(model))
        home, device = pipeline.vae.device, self.accelerator.device
        pipeline.vae.to(device)
        with self.accelerator.autocast():
            generators = image_generators(0, 0, len(self.num_atoms))
            latents = pipeline.latents(self.num_atoms, self.values, self.guidance, generator=generators)
        crystals = pipeline.decode(latents, self.num_atoms)
        pipeline.vae.to(home)
        valid = float(np.mean([is_structurally_valid(crystal) for crystal in crystals]))
        logging.getLogger(__name__).info(
            "step %d: %.0f %% of %d samples are valid structures", global_step, 100 * valid, len(crystals)
        )
        self.accelerator.log({"validation/structurally_valid": valid}, step=global_step)
        picture = crystal_grid(crystals, [formula_of(crystal.atomic_numbers) for crystal in crystals])
        show_picture(self.accelerator, self.folder, picture, "validation", global_step)
