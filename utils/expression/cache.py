"""The latent cache of cells: vectors (D,), of which the last number is the logarithm of the library size, with the
columns of obs that can become conditions.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.draws import SampleDraws
from utils.errors import UserError
from utils.expression.codec import batch_numbers
from utils.expression.data.source import CellSource, open_cells
from utils.expression.data.stream import cell_batch
from utils.expression.data.table import CellTable, read_table
from utils.expression.vae.network import ExpressionVAE
from utils.expression.vae.training import Elbo
from utils.latents.columns import ColumnCache

CONDITION_KINDS = ("class", "property")


class VectorCache(ColumnCache):
    """An open cache of vectors."""

    kind, title = "vector", "cells"

    @property
    def cell_ids(self) -> np.ndarray:
        """(R,) which cell each row is."""
        return self.table.data.column("cell_id").to_numpy()


OF_CELLS = ("counts", "library_size", "batch_index")  # what the autoencoder takes of a batch


class JointCache(VectorCache):
    """A cache of which each row has the counts of its cell too, so that latents can be those of an autoencoder that
    moves. `attach` says which; until then it is a `VectorCache`.
    """

    source: CellSource | None = None

    def attach(self, dataset_name: str, counts_layer: str | None, vae: ExpressionVAE) -> None:
        """Reads the cells of this cache. Raises UserError where the file is not the one that it was made of, and for
        conditions that have a name of theirs.
        """
        taken = [name for name in OF_CELLS if name in self.conditions]
        if taken:
            raise UserError(
                f"--condition {taken[0]} with --joint_vae: batches have something else of that name; rename the column"
            )
        self.source = open_cells(dataset_name, counts_layer)
        self.vae = vae
        self.read_cells()

    def read_cells(self) -> None:
        """The counts of each row."""
        assert self.source is not None
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
        self.cells: CellTable = table.take(np.argsort(order))  # in the order of the cache
        differ = np.flatnonzero(self.cells.library_sizes != self.table.data.column("library_size").to_numpy())
        if len(differ):
            raise UserError(
                f"--dataset_name: {len(differ)} cells of {self.source.name} have other counts than in the latent "
                f"cache, {wanted[differ[0]]} for one; give the file, and --counts_layer, that it was made of"
            )
        self.batch_index = batch_numbers(self.vae, self.cells)

    def like(self, cache_dir: str | Path) -> "JointCache":
        """The cache of another split of the same file."""
        other = super().like(cache_dir)
        assert isinstance(other, JointCache)
        if self.source is not None:
            other.source, other.vae = self.source, self.vae
            other.read_cells()
        return other

    def gather(
        self, rows: np.ndarray, variant_draw: np.ndarray | None = None, caption_draw: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """A batch of rows (B,), with what the autoencoder takes."""
        batch = super().gather(rows, variant_draw, caption_draw)
        return batch if self.source is None else batch | cell_batch(self.cells, rows, self.batch_index)

    @torch.no_grad()
    def normalise(self, batch: dict[str, Tensor], draws: SampleDraws) -> Tensor:
        """Latents (B, D + 1) of the autoencoder as it is now, for evaluations."""
        if self.source is None:
            return super().normalise(batch, draws)
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
