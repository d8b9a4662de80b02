"""From cells to latents and back."""

import numpy as np
import torch

from tests.support.cells.models import CELLS, CHANNELS, make_vae, small_table
from utils.expression.codec import draw_cells, encode_cells
from utils.expression.data.stream import cell_batch


def test_cells_to_latents_and_back():
    """The library size is the last number, and has no posterior; each cell is drawn by its own generator."""
    vae, table = make_vae(), small_table()
    batch = cell_batch(table, np.arange(CELLS))
    mean, std = encode_cells(vae, batch)
    assert mean.shape == std.shape == (CELLS, CHANNELS + 1)
    torch.testing.assert_close(mean[:, -1].exp(), batch["library_size"], rtol=1e-5, atol=0)
    assert not std[:, -1].any()
    assert torch.equal(mean[:, :-1], vae.encode(**batch).mean)
    generators = [np.random.default_rng(i) for i in range(CELLS)]
    counts, libraries = draw_cells(vae, mean, None, generators)
    np.testing.assert_allclose(libraries, table.library_sizes, rtol=1e-5)
    assert (counts == np.rint(counts)).all()
    alone, _ = draw_cells(vae, mean[7:8], None, [np.random.default_rng(7)])
    np.testing.assert_array_equal(alone[0], counts[7])
