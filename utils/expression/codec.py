"""The codec of cells: a frozen ExpressionVAE between counts and latent vectors, of which the last number is the
logarithm of the library size.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from utils.errors import UserError
from utils.expression.data.source import CellSource
from utils.expression.data.table import CellTable
from utils.expression.vae.likelihoods import LIKELIHOODS
from utils.expression.vae.network import ExpressionVAE
from utils.files import read_json
from utils.frozen import component_path, load_component
from utils.latents.columns import category_numbers

VAE_FLAG = "--pretrained_vae_model_name_or_path"
SPLIT_FILE = "cells.parquet"  # which cells were trained on, and which were kept out


def load_expression_vae(name_or_path: str, flag: str = VAE_FLAG) -> ExpressionVAE:
    """An ExpressionVAE from its folder, or from a run's with a `vae/` in it, in evaluation mode. Raises UserError for
    anything else.
    """
    config = Path(component_path(name_or_path, "vae")) / "config.json"
    if config.is_file() and read_json(config).get("_class_name") != ExpressionVAE.__name__:
        raise UserError(f"{flag}: {name_or_path} holds no ExpressionVAE; give a run of train_expression_vae.py")
    vae = load_component(ExpressionVAE.from_pretrained, name_or_path, "vae", flag)
    return vae.float().eval().requires_grad_(False)


# ---- which cells are which


def write_split(folder: Path, source: CellSource, split: np.ndarray) -> None:
    """Writes which cell is of which split (R,)."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"cell_id": source.cell_ids.astype(str), "split": split.astype(str)}), folder / SPLIT_FILE)


def rows_of_split(source: CellSource, vae_folder: str, split: str, flag: str) -> np.ndarray:
    """The rows of a source that belong to a split of the cells that an autoencoder was trained with, or with "all"
    every row. Raises UserError where none does.
    """
    if split == "all":
        return np.arange(len(source))
    path = Path(component_path(vae_folder, "vae")) / SPLIT_FILE
    if not path.is_file():
        raise UserError(f"{flag} {split}: {path} is not there, which says which cells those are; give all")
    stored = pq.read_table(path)
    wanted = set(stored.column("cell_id").filter(pa.compute.equal(stored.column("split"), split)).to_pylist())
    rows = np.flatnonzero([cell in wanted for cell in source.cell_ids.tolist()])
    if not len(rows):
        known = sorted(set(stored.column("split").to_pylist()))
        raise UserError(
            f"{flag} {split}: no cell of {source.name} is in that split of {path} (which has {', '.join(known)}); "
            "give the file that the autoencoder was trained on, or all"
        )
    return rows


# ---- batches


def batch_numbers(vae: ExpressionVAE, table: CellTable, flag: str = "--dataset_name") -> np.ndarray | None:
    """(R,) the batch of each cell by its place in the model's names; None for a model that knows no batches. Raises
    UserError for batches that it never saw.
    """
    column, names = vae.config.batch_column, vae.config.batch_names
    if not names:
        return None
    if column not in table.obs:
        raise UserError(f"{flag}: the autoencoder knows batches by obs[{column!r}], which these cells have not")
    numbers = category_numbers(table.obs[column], names)
    if (numbers < 0).any():
        strange = sorted({str(value) for value in table.obs[column][numbers < 0]})
        raise UserError(
            f"{flag}: the autoencoder never saw {', '.join(strange[:5])} in obs[{column!r}]; it knows "
            f"{', '.join(names[:10])}"
        )
    return numbers


# ---- cells <-> latents


@torch.no_grad()
def encode_cells(vae: ExpressionVAE, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std (B, D + 1) of the latents of cells; the library size is what it is."""
    posterior, log_library = vae.encode(**batch), batch["library_size"].float().log()[:, None]
    return torch.cat([posterior.mean, log_library], dim=1), torch.cat(
        [posterior.std, torch.zeros_like(log_library)], dim=1
    )


@torch.no_grad()
def draw_cells(
    vae: ExpressionVAE, latents: Tensor, batch_index: Tensor | None, generators: list[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray]:
    """Raw latents (B, D + 1) -> counts (B, G) fp32, drawn from the likelihood with a generator for each cell, and the
    library sizes (B,) they were drawn with.
    """
    library_size = latents[:, -1].float().exp()
    parameters = vae.decode(latents[:, :-1], library_size, batch_index).cpu()
    likelihood = LIKELIHOODS[vae.config.likelihood]
    counts = [likelihood.draw(parameters, row, generator) for row, generator in enumerate(generators)]
    return np.stack(counts), library_size.double().cpu().numpy()
