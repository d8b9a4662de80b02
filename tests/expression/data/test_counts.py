"""Values that are counts, and values that are none."""

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix

from tests.support.cells.data import counts, make, opened, refused, whole, with_layers
from tests.support.cells.pbmc import DECIMALS, pbmc68k, recovered_counts
from utils.expression.data import counts as data_counts

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


# ---- the fixture ----------------------------------------------------------------------------------------------------


def test_the_counts_of_the_fixture_are_recovered(blood):
    """Logarithms of three decimals leave the counts unambiguous: all are within 0.1 % of a whole number, those up to
    19 within 0.01, and the logarithms of these are the stored ones, all 700 x 765 of them, to the last decimal."""
    original = sc.datasets.pbmc68k_reduced()
    recovered = recovered_counts(original)
    rounded = np.rint(recovered)
    deviation = np.abs(recovered - rounded)
    assert deviation[rounded < 20].max() < 1e-2
    assert (deviation / np.maximum(rounded, 1)).max() < 1e-3
    again = np.log1p(rounded / original.obs["n_counts"].to_numpy(dtype=np.float64)[:, None] * 1e4)
    assert np.abs(again - original.raw.X.toarray()).max() < 0.51 * 10**-DECIMALS
    assert np.array_equal(blood.adata.X.toarray(), rounded)
    assert (pbmc68k().obs["cell_type"].astype(str).to_numpy() == original.obs["bulk_labels"].astype(str)).all()


# ---- values that are no counts --------------------------------------------------------------------------------------


def test_normalised_values_are_named_and_so_are_the_layers_with_counts(tmp_path):
    adata = with_layers()
    message = refused(adata, tmp_path)
    values = adata.X.toarray()
    stored = values[values != 0]
    fractions = int((stored != np.rint(stored)).sum())
    assert f"to {values.max():g}, and {fractions:,} of {len(stored):,} ({fractions / len(stored):.1%})" in message
    assert "--counts_layer counts does" in message
    assert "--counts_layer raw does" in message
    assert "scaled does" not in message


def test_counts_that_are_in_x_are_named_for_a_layer_without(tmp_path):
    adata = make()
    adata.layers["log"] = np.log1p(adata.X.toarray())
    message = refused(adata, tmp_path, "log")
    assert "layers/log" in message
    assert "X does: leave --counts_layer out" in message


def test_normalised_values_without_counts_anywhere(tmp_path):
    adata = make(csr_matrix(np.log1p(counts())))
    adata.layers["scaled"] = adata.X.toarray() - 1
    assert "--counts_layer counts (nor do scaled)" in refused(adata, tmp_path)


@pytest.mark.parametrize("layout", [csr_matrix, csc_matrix, np.asarray])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "its values go from 0 to 5, and 1 of "),
        (-1, "its values go from -1 to 5, and 0 of "),
        (np.nan, "1 of "),
        (np.inf, "are NaN or infinite"),
        (-np.inf, "are NaN or infinite"),
        (2**24 + 2, "its maximum is 16,777,218, and fp32 holds whole numbers up to 16,777,216 only"),
    ],
)
def test_a_single_value_that_is_no_count_is_found(tmp_path, monkeypatch, layout, value, expected):
    """Whichever it is: all are looked at, in steps."""
    monkeypatch.setattr(data_counts, "MAX_VALUES", 50)
    values = np.minimum(counts(), 5)
    values[np.unravel_index(values.argmax(), values.shape)] = 5
    place = np.argwhere(values == 1)[-1]
    values[tuple(place)] = value
    message = refused(make(layout(values)), tmp_path)
    assert message.startswith("--dataset_name: X of ")
    assert expected in message
    assert "--counts_layer counts" in message


def test_integers_are_looked_at_too(tmp_path):
    values = counts().astype(np.int64)
    values[3, 3] = -2
    assert "from -2 to" in refused(make(csr_matrix(values)), tmp_path)
    values[3, 3] = 2**24
    assert np.array_equal(whole(opened(make(csr_matrix(values)), tmp_path)), values)
    values[3, 3] = 2**24 + 1
    assert "its maximum is 16,777,217" in refused(make(csr_matrix(values)), tmp_path)


def test_zeros_alone_are_no_counts(tmp_path):
    assert "every value is zero" in refused(make(np.zeros((30, 12), dtype=np.float32)), tmp_path)
    assert "every value is zero" in refused(make(csr_matrix((30, 12), dtype=np.float32)), tmp_path)


def test_values_that_are_no_numbers(tmp_path):
    assert "values of type complex64" in refused(make(counts().astype(np.complex64)), tmp_path)
