"""The latent cache of cells: vectors (D,), of which the last number is the logarithm of the library size, with the
columns of obs that can become conditions.
"""

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from utils.draws import SampleDraws
from utils.errors import UserError
from utils.expression.codec import batch_numbers, load_expression_vae
from utils.expression.data.source import CellSource
from utils.expression.data.stream import cell_batch
from utils.expression.data.table import CellTable, read_table
from utils.expression.vae.network import ExpressionVAE
from utils.expression.vae.training import Elbo
from utils.latents.cache import Draw
from utils.latents.columns import ColumnCache
from utils.runs.load import check_weights

CONDITION_KINDS = ("class", "property")


class VectorCache(ColumnCache):
    """An open cache of vectors."""

    kind, title = "vector", "cells"

    @property
    def cell_ids(self) -> np.ndarray:
        """(R,) which cell each row is."""
        return self.table.data.column("cell_id").to_numpy()

    def autoencoder(self) -> ExpressionVAE:
        """The one whose latents these are. Raises UserError if it is no longer the one that made the cache."""
        vae = load_expression_vae(self.spec.vae, "--latents_dir")
        check_weights(vae, self.spec.vae, self.spec.fingerprint["vae"]["sha256"])
        return vae


OF_CELLS = ("counts", "library_size", "batch_index")  # what the autoencoder takes of a batch


class JointCache(VectorCache):
    """A cache of which each row has the counts of its cell too, so that latents can be those of an autoencoder that
    moves.
    """

    def __init__(
        self,
        cache_dir: str | Path,
        normalisation: str = "vae",
        *,
        source: CellSource,
        vae: ExpressionVAE | None = None,
    ):
        """Reads the cells from `source`; `vae` is by default the one that made the cache. Raises UserError where the
        source is not what the cache was made of.
        """
        super().__init__(cache_dir, normalisation)
        self.source = source
        self.vae = super().autoencoder() if vae is None else vae
        self.cells = self.read_cells()  # in the order of the rows
        self.batch_index = batch_numbers(self.vae, self.cells)

    def autoencoder(self) -> ExpressionVAE:
        """The one that moves."""
        return self.vae

    def use_conditions(self, conditions: dict[str, dict[str, Any]]) -> None:
        """As `ColumnCache`. Raises UserError too for a name that something else in a batch has."""
        taken = [name for name in OF_CELLS if name in conditions]
        if taken:
            raise UserError(
                f"--condition {taken[0]} with --joint_vae: batches have something else of that name; rename the column"
            )
        super().use_conditions(conditions)

    def read_cells(self) -> CellTable:
        """The cells of the rows, in their order."""
        places = {cell: row for row, cell in enumerate(self.source.cell_ids.tolist())}
        wanted = self.cell_ids.tolist()
        missing = [cell for cell in wanted if cell not in places]
        if missing:
            raise UserError(
                f"--dataset_name: {len(missing)} of {len(wanted)} cells of the latent cache are not in "
                f"{self.source.name}, {missing[0]} for one; give the file that it was made of"
            )
        rows = np.array([places[cell] for cell in wanted])
        order = np.argsort(rows)
        config = self.vae.config
        table = read_table(self.source, rows[order], config.genes, config.library, max_skipped_fraction=0.0)
        cells = table.take(np.argsort(order))
        differ = np.flatnonzero(cells.library_sizes != self.table.data.column("library_size").to_numpy())
        if len(differ):
            raise UserError(
                f"--dataset_name: {len(differ)} cells of {self.source.name} have other counts than in the latent "
                f"cache, {wanted[differ[0]]} for one; give the file, and --counts_layer, that it was made of"
            )
        return cells

    def like(self, cache_dir: str | Path, **more: Any) -> Self:
        """The cache of another split of the same file, whose latents are of the same autoencoder."""
        return super().like(cache_dir, source=self.source, vae=self.vae, **more)

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, Tensor]:
        """A batch of rows (B,), with what the autoencoder takes."""
        return super().gather(rows, draw) | cell_batch(self.cells, rows, self.batch_index)

    @torch.no_grad()
    def normalise(self, batch: dict[str, Tensor], draws: SampleDraws) -> Tensor:
        """Latents (B, D + 1) of the autoencoder as it is now, for evaluations."""
        cells = {name: batch[name].to(self.vae.device) for name in OF_CELLS if name in batch}
        posterior = self.vae.encode(**cells)
        noise = draws.normal("posterior", posterior.mean.shape).to(self.vae.device)
        return self.joined(posterior.mean + posterior.std * noise, cells).to(batch["latents"].device)

    def joined(self, latents: Tensor, cells: dict[str, Tensor]) -> Tensor:
        """Raw latents (B, D) and the library size, as the denoiser sees them: (B, D + 1)."""
        log_library = cells["library_size"].float().log()[:, None]
        return self.normalisation.normalise(torch.cat([latents, log_library], dim=1))


class JointLatents(NamedTuple):
    """Latents of a batch, and what the autoencoder says of its cells."""

    latents: Tensor  # (B, D + 1), normalised
    nll: Tensor  # (B,) nats
    kl: Tensor  # (B,) nats


def encode_jointly(
    denoiser: nn.Module, cache: JointCache, batch: dict[str, Tensor], draws: SampleDraws, live: bool
) -> JointLatents:
    """A sample of the posterior of each cell, which the ELBO and the denoiser share. `denoiser` is the prepared
    `JointDenoiser`; with `live` the loss of the denoiser moves the encoder too.
    """
    cells = {name: batch[name] for name in OF_CELLS if name in batch}
    config = cache.vae.config
    noise = draws.normal("posterior", (len(cells["counts"]), config.latent_channels))  # (B, D)
    parameters, posterior = denoiser(cells, noise, reconstruct=True)
    nll, kl = Elbo(config.likelihood)(parameters, posterior, cells["counts"])
    latents = posterior.mean + posterior.std * noise
    return JointLatents(cache.joined(latents if live else latents.detach(), cells), nll, kl)
