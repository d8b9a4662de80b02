"""Shares and dispersions of genes, and a stream of cells that is a function of the position."""

import numpy as np
import pytest
import torch

from tests.support.cells.models import CELLS, small_table, table_of
from utils.expression.data import stream as expression_stream
from utils.expression.data.stream import CellStream, gene_shares, theta_of_moments
from utils.expression.vae.likelihoods import LIKELIHOODS, MAX_THETA


@pytest.fixture(scope="module")
def planted():
    """Counts of 12,000 cells with shares, libraries and dispersions that are known."""
    generator = np.random.default_rng(0)
    shares, theta = np.array([0.3, 0.1, 0.05, 0.02, 0.03]), np.array([0.3, 1.0, 3.0, 10.0, np.inf])
    libraries = generator.lognormal(5, 0.4, 12_000)
    mu = libraries[:, None] * shares
    finite = np.minimum(theta, 1e9)
    rates = np.where(np.isinf(theta), 1.0, generator.gamma(finite, 1 / finite, mu.shape))
    return table_of(generator.poisson(mu * rates), libraries), theta, shares


@pytest.mark.parametrize("rows_at_once", [4096, 700])
def test_a_planted_dispersion_is_found(planted, monkeypatch, rows_at_once):
    monkeypatch.setattr(expression_stream, "MOMENT_ROWS", rows_at_once)
    table, theta, shares = planted
    np.testing.assert_allclose(gene_shares(table), shares, rtol=0.03)
    for kind in ("nb", "zinb"):
        found = theta_of_moments(table, LIKELIHOODS[kind])
        np.testing.assert_allclose(found[:4], theta[:4], rtol=0.1)
        assert 80 < found[4] <= MAX_THETA  # a Poisson distribution has no finite one
    mu = table.library_sizes[:, None] * gene_shares(table)
    residual = np.sqrt(np.square(table.counts.toarray() - mu).mean(axis=0))
    np.testing.assert_allclose(theta_of_moments(table, LIKELIHOODS["gaussian"]), residual, rtol=1e-6)


def test_counts_of_many_cells_add_up():
    """Beyond the whole numbers that single precision holds."""
    counts = np.ones((9, 2))
    counts[0] = 2**24
    np.testing.assert_array_equal(gene_shares(table_of(counts)), [0.5, 0.5])
    assert gene_shares(table_of(counts, np.full(9, 1.0)))[0] == (2**24 + 8) / 9


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_moments_of_odd_genes(kind):
    """Without counts, and with the same count everywhere: a dispersion that can be computed with."""
    counts = np.zeros((20, 3))
    counts[:, 1], counts[:, 2] = 4, np.arange(20)
    theta = theta_of_moments(table_of(counts), LIKELIHOODS[kind])
    low, high = LIKELIHOODS[kind].limits
    assert ((low <= theta) & (theta <= high) & np.isfinite(theta)).all()


def test_a_stream_of_cells_is_a_function_of_the_position():
    table, numbers = small_table(), np.arange(CELLS) % 3
    stream = CellStream(table, 5, numbers)
    epoch = stream.__getitems__(list(range(CELLS)))
    np.testing.assert_array_equal(np.sort(epoch["counts"].numpy(), axis=0), np.sort(table.counts.toarray(), axis=0))
    later = stream.__getitems__([CELLS + 3, 7])
    assert torch.equal(later["counts"][1], epoch["counts"][7])
    assert torch.equal(later["library_size"][1], epoch["library_size"][7])
    row = table.dense(slice(None)).tolist().index(epoch["counts"][7].tolist())
    assert later["batch_index"][1] == numbers[row]
    assert later["positions"].tolist() == [CELLS + 3, 7]
    assert torch.equal(stream[7]["counts"], epoch["counts"][7])
    other = CellStream(table, 6).__getitems__(list(range(CELLS)))
    assert "batch_index" not in other
    assert not torch.equal(other["counts"], epoch["counts"])
