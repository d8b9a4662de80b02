"""The folder of a run of cells: what is written when training starts and ends, and how it is loaded again."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.sampling import sampling_scheduler
from utils.errors import UserError
from utils.expression.cache import VectorCache
from utils.expression.codec import SPLIT_FILE, load_expression_vae
from utils.expression.pipeline import ExpressionPipeline
from utils.expression.vae.network import ExpressionVAE
from utils.image.codec import component_path
from utils.image.pipeline import OF_VAE, check_weights, checkpoint_weights
from utils.latents.cache import LatentSpec
from utils.runs.run_folder import check_guide, is_run_of, load_parts, save_parts, save_weights
from utils.runs.run_folder import model_card as card_of
from utils.training import lora

COLUMNS_FILE = "training_columns.parquet"


def is_expression_run(path: Path) -> bool:
    """Whether a run's folder, or one of its checkpoints, is that of a run of cells."""
    return is_run_of(ExpressionVAE, path)


def make_pipeline(denoiser: ConditionalDenoiser, cache: VectorCache, scheduler: Any) -> ExpressionPipeline:
    """A pipeline around the live denoiser. Raises UserError if the VAE is no longer the one that made the cache."""
    spec = cache.spec
    vae = load_expression_vae(spec.vae, "--latents_dir")
    check_weights(vae, spec.vae, spec.fingerprint["vae"]["sha256"])
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
    if Path(path).is_dir() and not is_expression_run(Path(path)):
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
