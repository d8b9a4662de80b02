"""A run of cells that samples: conditions -> latents -> counts drawn from the likelihood."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.sampling import sample_latents, sampling_scheduler
from utils.errors import UserError
from utils.expression.cache import JointCache, VectorCache
from utils.expression.codec import SPLIT_FILE, draw_cells, load_expression_vae
from utils.expression.modality import EXPRESSION
from utils.expression.vae.network import ExpressionVAE
from utils.expression.vae.training import measure_latents
from utils.frozen import component_path
from utils.latents.spec import Normalisation
from utils.runs import save
from utils.runs.load import OF_VAE, RunFolder, check_guide, differences_of_parts
from utils.runs.save import ModelCard
from utils.training import lora

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
        guidance: Guidance,
        *,
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
            guidance,
            guide_model=guide_model,
            generator=generator,
            progress_bar=progress_bar,
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


COLUMNS_FILE = "training_columns.parquet"


@dataclass
class Exporter(save.Exporter):
    """What a run of cells uses and does not train, and how its folder is written. `training_columns` are those of
    `ExpressionPipeline`.
    """

    training_columns: dict[str, np.ndarray]
    split_file: Path  # which cells the autoencoder was trained on; it may be missing
    trains_vae_on: JointCache | None = None  # with --joint_vae: the cells that the autoencoder is trained on
    pipeline_name: ClassVar[str] = "ExpressionPipeline"

    @classmethod
    def of_cache(cls, cache: VectorCache, scheduler: SchedulerMixin, card: ModelCard) -> "Exporter":
        """With the autoencoder that made a cache. Raises UserError unless its weights still are those."""
        vae = cache.autoencoder()
        kinds = {name: settings["kind"] for name, settings in cache.conditions.items()}
        if vae.config.batch_column:
            kinds.setdefault(vae.config.batch_column, "class")
        columns = {name: cache.column(name, kind) for name, kind in kinds.items()}
        split_file = Path(component_path(cache.spec.vae, "vae")) / SPLIT_FILE
        joint = cache if isinstance(cache, JointCache) else None
        return cls(vae, cache.normalisation, scheduler, card, columns, split_file=split_file, trains_vae_on=joint)

    def pipeline(self, denoiser: ConditionalDenoiser) -> ExpressionPipeline:
        """A pipeline around the live denoiser, for validation."""
        scheduler = sampling_scheduler(self.scheduler)
        return ExpressionPipeline(denoiser, scheduler, self.vae, self.normalisation, self.training_columns)

    def save_frozen(self, folder: Path, model: ConditionalDenoiser) -> None:
        """Writes all that a checkpoint needs beside it to be sampled and judged."""
        super().save_frozen(folder, model)
        save_columns(self.training_columns, folder / COLUMNS_FILE)
        if self.split_file.is_file():
            shutil.copy(self.split_file, folder / "vae" / SPLIT_FILE)

    def write(self, folder: Path, model: ConditionalDenoiser, num_steps: int) -> None:
        """As any run is written; an autoencoder that was trained too says of its latents what they are now."""
        if self.trains_vae_on is not None:
            measure_latents(self.vae, self.trains_vae_on.cells, self.trains_vae_on.batch_index)
        super().write(folder, model, num_steps)
        if (folder / lora.FOLDER).is_dir():  # adapters may be asked for what their base knows nothing of
            save_columns(self.training_columns, folder / lora.FOLDER / COLUMNS_FILE)


def save_columns(columns: dict[str, np.ndarray], path: Path) -> None:
    """Writes what was known of the training cells, (R,) each."""
    arrays = {name: pa.array(values.tolist()) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)


def load_columns(path: Path) -> dict[str, np.ndarray]:
    """What `save_columns` wrote."""
    table = pq.read_table(path)
    found = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    return {name: v if v.dtype == object else v.astype(np.float64) for name, v in found.items()}


def load_run(
    path: str | Path, ema_sigma_rel: float | None = None, flag: str = "--model", lora_dir: str | None = None
) -> ExpressionPipeline:
    """The pipeline of a finished run, of a run that is not finished (its newest checkpoint), or of a checkpoint. The
    rest is as `RunFolder.denoiser` has it. Raises UserError, which names the flag, for a folder that is no run.
    """
    run = RunFolder.find(path, flag)
    denoiser = run.denoiser(ema_sigma_rel, lora_dir)
    files = [Path(folder) / COLUMNS_FILE for folder in (lora_dir, run.path) if folder is not None]
    columns = load_columns(next(file for file in files if file.is_file()))
    return ExpressionPipeline(denoiser, run.scheduler(), load_run_vae(run), run.normalisation(), columns)


def load_run_vae(run: RunFolder) -> ExpressionVAE:
    """The autoencoder of a run, or that of a checkpoint, where it was trained on with its denoiser."""
    vae = load_expression_vae(str(run.path / "vae"), run.flag)
    joint = {name.removeprefix(OF_VAE): each for name, each in run.weights().items() if name.startswith(OF_VAE)}
    if joint:  # what stands in the folder is what training began with
        vae.load_state_dict(joint)
    return vae


def load_guide(path: str, pipeline: ExpressionPipeline) -> ConditionalDenoiser:
    """The weaker run or checkpoint that guides `pipeline` (autoguidance), on the CPU, where `pipeline` still must be.
    Raises UserError for one that was trained on something else, and for the run itself.
    """
    if Path(path).is_dir() and not EXPRESSION.is_run(Path(path)):
        raise UserError(f"--guide_model: {path} is no run of cells; give a weaker run on the same latents")
    guide = load_run(path, flag="--guide_model")
    return check_guide(path, differences_of_parts(pipeline, guide), pipeline.denoiser, guide.denoiser)
