"""Flags of evaluate.py on cells, samples to be evaluated, and what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from utils.expression.data.h5ad import write_h5ad
from utils.expression.evaluation.samples import BINOMIALS as BINOMIAL
from utils.expression.evaluation.samples import CEILING, CONTROL, GAUSSIAN, PRIOR

anndata = pytest.importorskip("anndata")

NUM_GENES, CHANNELS, NUM_TEST = 120, 4, 140
NULLS = [GAUSSIAN, BINOMIAL, PRIOR]
BESIDE = [CONTROL, CEILING, *NULLS]
# fmt: off
TRAIN_VAE = [
    "--label_column", "cell_type", "--latent_channels", CHANNELS, "--hidden_size", 24, "--max_train_steps", 80,
    "--train_batch_size", 64, "--lr_warmup_steps", 0, "--learning_rate", 1e-2, "--kl_warmup_steps", 20, "--dropout", 0,
    "--checkpointing_steps", 80, "--validation_steps", 80, "--ema_decay", 0.9,
]
TRAIN_LDM = [
    "--max_train_steps", 60, "--train_batch_size", 64, "--lr_warmup_steps", 0, "--learning_rate", 3e-3, "--ema_decay", 0.9,
    "--checkpointing_steps", 60, "--validation_steps", 60, "--num_validation_cells", 20, "--validation_inference_steps", 2,
]
# fmt: on


def rows_of(world, split: str) -> np.ndarray:
    return np.flatnonzero(world.splits == split)


def make_run(world, folder: Path, columns: dict[str, dict]) -> Path:
    """A run on the world's autoencoder with a denoiser that was never trained: it gives standard normal latents."""
    from utils.diffusion.conditions import ConditionSum, NoCondition
    from utils.diffusion.denoiser import ConditionalDenoiser
    from utils.diffusion.sampling import SAMPLERS
    from utils.expression.codec import SPLIT_FILE, load_expression_vae
    from utils.expression.pipeline import Exporter
    from utils.frozen import component_path
    from utils.latents.spec import Normalisation
    from utils.models.vector_mlp import VectorMLP
    from utils.runs.save import ModelCard

    torch.manual_seed(0)
    vae = load_expression_vae(str(world.vae))
    width = 16 if columns else None
    model = VectorMLP(CHANNELS + 1, num_layers=1, hidden_size=16, projection_class_embeddings_input_dim=width)
    denoiser = ConditionalDenoiser(model, ConditionSum(16, columns) if columns else NoCondition())
    obs = world.adata.obs.iloc[rows_of(world, "train")]
    known = {name: obs[name].to_numpy(dtype=object if "names" in columns[name] else np.float64) for name in columns}
    normalisation = Normalisation.of_vae(vae.config, CHANNELS + 1)
    card = ModelCard("Random weights", data="nothing", settings="", base=None, use_ema=False, example="none")
    split_file = Path(component_path(str(world.vae), "vae")) / SPLIT_FILE
    exporter = Exporter(vae, normalisation, SAMPLERS["flow_euler"](), card, known, split_file=split_file)
    exporter.write(folder, denoiser, 0)
    return folder


def class_of(world, name: str) -> dict:
    return {"kind": "class", "names": sorted(world.adata.obs[name].astype(str).unique())}


def words(world, out: Path, **changes) -> list[str]:
    chosen = {"reference": world.file, "output_dir": out, "device": "cpu", "umap": False} | changes
    if chosen.get("model"):
        chosen = {"num_inference_steps": 4} | chosen
    flags = ["--modality", "expression"]
    for name, value in chosen.items():
        if value is False:
            flags.append(f"--no-{name}")
        elif value is True:
            flags.append(f"--{name}")
        elif value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def points_of(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["points"]


def columns_of(out: Path) -> dict[str, dict[str, dict]]:
    """column -> figure -> value, low, high, num_samples, ..."""
    return {
        point["point"]: {k: v for group in point["groups"] for k, v in group["figures"].items()}
        for point in points_of(out)
    }


def value(out: Path, column: str, name: str) -> float:
    return columns_of(out)[column][name]["value"]


def reasons_of(out: Path) -> dict[str, str]:
    return {
        name: why
        for point in points_of(out)
        for group in point["groups"]
        for name, why in group["not_measured"].items()
    }


def write_samples(world, path: Path, rows: np.ndarray, labels: np.ndarray | None = None, counts=None) -> Path:
    """Real cells as if they had been sampled: of `rows`, with other labels or counts where they are given."""
    obs = {} if labels is None else {"cell_type": np.array(labels, dtype=str)}
    X = world.adata.X[rows] if counts is None else csr_matrix(counts.astype(np.float32))
    made = anndata.AnnData(X, var=world.adata.var[[]])
    made.obs_names = [f"cell-{i}" for i in range(len(rows))]
    for name, values in obs.items():
        made.obs[name] = values
    write_h5ad(made, path)
    return path


def types_of(world, rows: np.ndarray) -> np.ndarray:
    return world.adata.obs["cell_type"].astype(str).to_numpy()[rows]
