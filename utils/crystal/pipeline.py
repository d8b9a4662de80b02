"""A crystal run that samples: number of atoms and conditions -> latents -> crystals."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from utils.crystal.codec import crystals_of, load_crystal_vae
from utils.crystal.modality import CRYSTAL
from utils.crystal.structure import Crystal
from utils.crystal.vae.network import CrystalVAE
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.sampling import sample_latents, sampling_scheduler
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.latents.spec import LatentSpec, Normalisation
from utils.runs import save
from utils.runs.load import RunFolder, check_guide, check_weights, differences_of_parts
from utils.runs.save import ModelCard


@dataclass
class CrystalPipeline:
    """The parts of a run. `num_items` is how many of its training crystals have how many atoms."""

    denoiser: ConditionalDenoiser
    scheduler: SchedulerMixin
    vae: CrystalVAE
    normalisation: Normalisation
    num_items: dict[int, int]

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """The conditions of the run: name -> kind and settings. Empty for an unconditional one."""
        return self.denoiser.conditions.config.get("columns") or {}

    @property
    def max_atoms(self) -> int:
        """Atoms that a sample can have."""
        return self.denoiser.model.config.sample_size

    @property
    def learns_variance(self) -> bool:
        """Whether the denoiser gives a variance too."""
        config = self.denoiser.model.config
        return config.out_channels == 2 * config.in_channels

    def with_variance(self, model_pred: Tensor, count: int) -> Tensor:
        """A prediction (B, N, D), which of a learned variance comes as (B, N, 2 D); as (B, 2 N, D) for the scheduler
        that uses it. The unconditional branch, behind the first `count`, gets the variance of the conditional one:
        guidance then leaves it as it is.
        """
        if not self.learns_variance:
            return model_pred
        prediction, share = model_pred.chunk(2, dim=-1)
        if not isinstance(self.scheduler, DDPMScheduler):
            return prediction
        return torch.cat([prediction, share[:count].repeat(len(share) // count, 1, 1)], dim=1)

    def to(self, device: torch.device) -> "CrystalPipeline":
        """Moves the models."""
        self.denoiser.to(device)
        self.vae.to(device)
        return self

    def draw_num_atoms(
        self, count: int, seed: int, multiple_of: Sequence[int] | None = None, at_least: Sequence[int] | None = None
    ) -> np.ndarray:
        """Numbers of atoms (count,) from the histogram of the training set; sample i depends on `seed` + i alone.
        `multiple_of`, `at_least`: sample i has a multiple of its i-th entry, and no fewer; the fewest such, where the
        histogram has none.
        """
        drawn = []
        for i in range(count):
            unit = 1 if multiple_of is None else multiple_of[i]
            fewest = unit if at_least is None else at_least[i]
            fitting = {
                number: times
                for number, times in self.num_items.items()
                if number % unit == 0 and fewest <= number <= self.max_atoms
            }
            numbers = np.array(list(fitting) or [-(-fewest // unit) * unit])
            weights = np.array(list(fitting.values()) or [1], dtype=np.float64)
            drawn.append(np.random.default_rng([seed + i, 1]).choice(numbers, p=weights / weights.sum()))
        return np.array(drawn)

    @torch.no_grad()
    def latents(
        self,
        num_atoms: Tensor,
        values: dict[str, Tensor],
        guidance: Guidance,
        *,
        guide_model: ConditionalDenoiser | None = None,
        generator: list[torch.Generator] | None = None,
        progress_bar: Callable[[Tensor], Iterable[Tensor]] = iter,
    ) -> Tensor:
        """Normalised latents (B, N, D) of crystals with `num_atoms` (B,). `values` are those of some of the run's
        conditions, (B, ...) by name; conditions that are not in it stay open. The rest is as `sample_latents` has it.
        Raises ValueError for guidance that would do nothing.
        """
        device, count = self.vae.device, len(num_atoms)
        if self.learns_variance and (guidance.rescale or guide_model is not None):
            what = "guide_model" if guidance.rescale == 0 else "guidance_rescale"
            raise ValueError(f"{what}: not for a run with a learned variance; leave it out")
        mask = torch.arange(self.max_atoms, device=device) < num_atoms.to(device)[:, None]  # (B, N)
        return sample_latents(
            self.denoiser,
            self.scheduler,
            (count, self.max_atoms, self.vae.config.latent_channels),
            values,
            guidance,
            guide_model=guide_model,
            generator=generator,
            progress_bar=progress_bar,
            always={"attention_mask": mask},
            adapt=partial(self.with_variance, count=count),
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, num_atoms: Tensor, counts: list[dict[int, int]] | None = None) -> list[Crystal]:
        """Normalised latents (B, N, D) -> crystals; `counts` as in `crystals_of`."""
        mask = torch.arange(latents.shape[1], device=latents.device) < num_atoms.to(latents.device)[:, None]
        return crystals_of(self.vae.decode(self.normalisation.denormalise(latents), mask), mask, counts)


NUM_ITEMS_FILE = "num_items.json"


@dataclass
class Exporter(save.Exporter):
    """What a run of crystals uses and does not train, and how its folder is written. `num_items` is how many of its
    training crystals have how many atoms.
    """

    num_items: dict[int, int]
    pipeline_name: ClassVar[str] = "CrystalPipeline"

    @classmethod
    def of_cache(
        cls, spec: LatentSpec, normalisation: Normalisation, scheduler: SchedulerMixin, card: ModelCard
    ) -> "Exporter":
        """With the autoencoder that made a cache. Raises UserError unless its weights still are those."""
        vae = load_crystal_vae(spec.vae, "--latents_dir")
        check_weights(vae, spec.vae, spec.fingerprint["vae"]["sha256"])
        num_items = {int(count): times for count, times in (spec.num_items or {}).items()}
        return cls(vae, normalisation, scheduler, card, num_items)

    def pipeline(self, denoiser: ConditionalDenoiser) -> CrystalPipeline:
        """A pipeline around the live denoiser, for validation."""
        scheduler = sampling_scheduler(self.scheduler)
        return CrystalPipeline(denoiser, scheduler, self.vae, self.normalisation, self.num_items)

    def save_frozen(self, folder: Path, model: ConditionalDenoiser) -> None:
        """Writes all that a checkpoint needs beside it to be sampled, the numbers of atoms too."""
        super().save_frozen(folder, model)
        write_json(folder / NUM_ITEMS_FILE, {str(count): times for count, times in self.num_items.items()})


def load_run(
    path: str | Path, ema_sigma_rel: float | None = None, flag: str = "--model", lora_dir: str | None = None
) -> CrystalPipeline:
    """The pipeline of a finished run, of a run that is not finished (its newest checkpoint), or of a checkpoint. The
    rest is as `RunFolder.denoiser` has it. Raises UserError, which names the flag, for a folder that is no run.
    """
    run = RunFolder.find(path, flag)
    return CrystalPipeline(
        run.denoiser(ema_sigma_rel, lora_dir),
        run.scheduler(),
        load_crystal_vae(str(run.path / "vae")),
        run.normalisation(),
        {int(count): times for count, times in read_json(run.path / NUM_ITEMS_FILE).items()},
    )


def load_guide(path: str, pipeline: CrystalPipeline) -> ConditionalDenoiser:
    """The weaker run or checkpoint that guides `pipeline` (autoguidance), on the CPU, where `pipeline` still must be.
    Raises UserError for one that was trained on something else, and for the run itself.
    """
    if Path(path).is_dir() and not CRYSTAL.is_run(Path(path)):
        raise UserError(f"--guide_model: {path} is no run of crystals; give a weaker run on the same latents")
    guide = load_run(path, flag="--guide_model")
    others = [] if pipeline.max_atoms == guide.max_atoms else ["another number of atoms"]
    return check_guide(path, differences_of_parts(pipeline, guide, *others), pipeline.denoiser, guide.denoiser)
