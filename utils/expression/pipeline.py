"""A run of cells that samples: conditions -> latents -> counts drawn from the likelihood."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.sampling import sample_latents, sampling_scheduler
from utils.errors import UserError
from utils.expression.cache import VectorCache
from utils.expression.codec import SPLIT_FILE, draw_cells, load_expression_vae
from utils.expression.modality import EXPRESSION
from utils.expression.vae.network import ExpressionVAE
from utils.frozen import component_path
from utils.latents.spec import LatentSpec, Normalisation
from utils.runs.load import OF_VAE, check_guide, checkpoint_weights, load_parts
from utils.runs.save import model_card as card_of
from utils.runs.save import save_parts, save_weights
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


COLUMNS_FILE = "training_columns.parquet"


def make_pipeline(denoiser: ConditionalDenoiser, cache: VectorCache, scheduler: Any) -> ExpressionPipeline:
    """A pipeline around the live denoiser. Raises UserError if the VAE is no longer the one that made the cache."""
    vae = cache.autoencoder()
    kinds = {name: settings["kind"] for name, settings in cache.conditions.items()}
    if vae.config.batch_column:
        kinds.setdefault(vae.config.batch_column, "class")
    columns = {name: cache.column(name, kind) for name, kind in kinds.items()}
    return ExpressionPipeline(denoiser, sampling_scheduler(scheduler), vae, cache.normalisation, columns)


def save_frozen_parts(output_dir: Path, pipeline: ExpressionPipeline, spec: LatentSpec) -> None:
    """Writes all that a checkpoint needs beside it to be sampled and judged."""
    save_parts(output_dir, pipeline)
    save_columns(pipeline.training_columns, output_dir / COLUMNS_FILE)
    split = Path(component_path(spec.vae, "vae")) / SPLIT_FILE
    if split.is_file():
        shutil.copy(split, output_dir / "vae" / SPLIT_FILE)


def save_columns(columns: dict[str, np.ndarray], path: Path) -> None:
    """Writes what was known of the training cells, (R,) each."""
    arrays = {name: pa.array(values.tolist()) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)


def load_columns(path: Path) -> dict[str, np.ndarray]:
    """What `save_columns` wrote."""
    table = pq.read_table(path)
    found = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    return {name: v if v.dtype == object else v.astype(np.float64) for name, v in found.items()}


def export_run(
    output_dir: Path, denoiser: ConditionalDenoiser, pipeline: ExpressionPipeline, spec: LatentSpec, card: str
) -> None:
    """Writes a run that is finished."""
    save_frozen_parts(output_dir, pipeline, spec)
    save_weights(output_dir, denoiser, pipeline, card)
    if (output_dir / lora.FOLDER).is_dir():  # adapters may be asked for what their base knows nothing of
        save_columns(pipeline.training_columns, output_dir / lora.FOLDER / COLUMNS_FILE)


def load_expression_run(
    path: str | Path, ema_sigma_rel: float | None = None, flag: str = "--model", lora_dir: str | None = None
) -> ExpressionPipeline:
    """The pipeline of a run of cells or one of its checkpoints."""
    loaded = load_parts(path, ema_sigma_rel, flag, lora_dir)
    files = [Path(folder) / COLUMNS_FILE for folder in (lora_dir, loaded.run_dir) if folder is not None]
    return ExpressionPipeline(
        loaded.denoiser,
        loaded.scheduler,
        load_run_vae(loaded.run_dir, loaded.checkpoint, flag),
        loaded.normalisation,
        load_columns(next(file for file in files if file.is_file())),
    )


def load_run_vae(run_dir: Path, checkpoint: Path | None, flag: str) -> ExpressionVAE:
    """The autoencoder of a run, or that of a checkpoint, where it was trained on with its denoiser."""
    vae = load_expression_vae(str(run_dir / "vae"), flag)
    weights = checkpoint_weights(checkpoint) if checkpoint else {}
    joint = {name.removeprefix(OF_VAE): tensor for name, tensor in weights.items() if name.startswith(OF_VAE)}
    if joint:  # what stands in the folder is what training began with
        vae.load_state_dict(joint)
    return vae


def load_expression_guide(path: str, pipeline: ExpressionPipeline) -> ConditionalDenoiser:
    """The weaker run or checkpoint that guides `pipeline` (autoguidance), on the CPU, where `pipeline` still must be.
    Raises UserError for one that was trained on something else, and for the run itself.
    """
    if Path(path).is_dir() and not EXPRESSION.is_run(Path(path)):
        raise UserError(f"--guide_model: {path} is no run of cells; give a weaker run on the same latents")
    return check_guide(path, pipeline, load_expression_run(path, flag="--guide_model"), {})


def model_card(
    spec: LatentSpec, num_rows: int, conditions: list[str], num_steps: int, use_ema: bool, base: str | None
) -> str:
    """The README.md of a run."""
    what = f"{num_rows} cells of {spec.fingerprint['dataset']['name']} for\n{num_steps} steps"
    example = "python sample.py --model THIS_FOLDER --num_samples 500"
    title = "A latent diffusion model of gene expression"
    return card_of(title, "single-cell", what, conditions, base, spec.vae, use_ema, example)
