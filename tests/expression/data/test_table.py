"""Tables of cells, their labels, and their splits."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.support.cells.data import FACS, GENES, by_scanpy, needs_real_data, said
from utils.expression.data.genes import choose_genes, find_genes
from utils.expression.data.source import open_cells
from utils.expression.data.table import CellTable, apportioned, check_labels, read_table, stratified_split

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("library", ["chosen", "all"])
def test_a_table_is_the_counts_of_its_cells(cells, library, in_folder, caplog):
    rows = np.flatnonzero(np.arange(200) % 4 != 3)
    folder = cells.folder if in_folder else None
    table = read_table(cells.source, rows, GENES, library, folder)
    kept = np.setdiff1d(rows, [5, 77, 130])
    chosen = cells.values[:, [3, 1, 2]]
    assert len(table) == len(kept) == table.counts.shape[0]
    assert table.counts.dtype == np.float32
    assert np.array_equal(table.counts.toarray(), chosen[kept])
    assert list(table.cell_ids) == [f"cell-{i}" for i in kept]
    assert table.obs["cell_type"].tolist() == [["B", "T"][i % 2] for i in kept]
    assert table.obs["score"] == pytest.approx(kept / 199)
    assert table.library_sizes.dtype == np.float64
    assert np.array_equal(table.library_sizes, (chosen if library == "chosen" else cells.values)[kept].sum(axis=1))
    assert table.skipped == [{"cell": f"cell-{i}", "reason": "no counts in the 3 chosen genes"} for i in (5, 77, 130)]
    assert "3 of 150 cells are skipped" in caplog.text


def test_counts_of_some_cells_are_dense(cells):
    table = read_table(cells.source, cells.rows, GENES)
    expected = cells.values[np.setdiff1d(cells.rows, [5, 77, 130])][:, [3, 1, 2]]
    mask = np.arange(len(table)) % 3 == 0
    for rows in ([4, 4, 0], np.array([9, 2]), mask, slice(0, 5)):
        batch = table.dense(rows)
        assert batch.dtype == np.float32
        assert batch.flags["C_CONTIGUOUS"]
        assert np.array_equal(batch, expected[rows])


@pytest.mark.parametrize("in_folder", [False, True])
def test_some_cells_of_a_table(cells, in_folder):
    table = read_table(cells.source, cells.rows, GENES, folder=cells.folder if in_folder else None)
    for rows in (np.array([7, 3, 100]), np.arange(len(table)) < 50):
        some = table.take(rows)
        assert np.array_equal(some.counts.toarray(), table.counts.toarray()[rows])
        assert np.array_equal(some.library_sizes, table.library_sizes[rows])
        assert list(some.cell_ids) == list(table.cell_ids[rows])
        assert some.obs["score"].tolist() == table.obs["score"][rows].tolist()
        assert some.genes == GENES
    assert table.take(np.arange(len(table))).identity() == table.identity()


def test_too_many_cells_without_counts_are_an_error(cells):
    message = said(read_table, cells.source, cells.rows, GENES, max_skipped_fraction=0.01)
    assert message.startswith("--dataset_name: 3 of 200 cells")
    assert "(cell-5, cell-77, cell-130), and at most 1% may be left out" in message
    assert len(read_table(cells.source, cells.rows, GENES, max_skipped_fraction=0.015)) == 197
    assert "1 of 1 cells" in said(read_table, cells.source, np.array([77]), GENES, max_skipped_fraction=1.0)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_split_without_cells_is_an_empty_table(cells, in_folder):
    table = read_table(cells.source, np.array([], dtype=int), GENES, folder=cells.folder if in_folder else None)
    assert len(table) == 0
    assert table.counts.shape == (0, 3)
    assert table.skipped == []
    assert len(read_table(cells.source, [], GENES)) == 0


def test_the_identity_is_of_all_that_is_in_a_table(cells):
    table = read_table(cells.source, cells.rows, GENES)
    others = [
        read_table(cells.source, cells.rows[:-1], GENES),
        read_table(cells.source, cells.rows, GENES, "all"),
        read_table(cells.source, cells.rows, sorted(GENES)),
        table.take(np.arange(len(table))[::-1]),
    ]
    for name, value in (
        ("genes", ["G3", "G1", "G4"]),
        ("cell_ids", np.array([*table.cell_ids[:-1], "other"], dtype=object)),
        ("obs", table.obs | {"score": table.obs["score"] + 1}),
        ("obs", {"cell_type": table.obs["cell_type"]}),
        ("counts", table.counts * 2),
        ("counts", csr_matrix((table.counts.data, table.counts.indices[::-1], table.counts.indptr), table.counts.shape)),
    ):  # fmt: skip
        others.append(CellTable(**(vars(table) | {name: value})))
    identities = {each.identity() for each in [table, *others]}
    assert len(identities) == 1 + len(others)
    assert read_table(cells.source, cells.rows, GENES).identity() == table.identity()
    assert read_table(cells.source, cells.rows, GENES, folder=cells.folder).identity() == table.identity()


# ---- labels ---------------------------------------------------------------------------------------------------------


def labelled(values) -> SimpleNamespace:
    return SimpleNamespace(
        obs={"cell_type": np.array(values, dtype=object), "batch": np.array(["a"] * 20, dtype=object)}
    )


def test_labels_are_those_of_the_column(blood):
    source = open_cells(str(blood.path))
    assert list(check_labels(source, "cell_type", "--cell_type_column")) == list(blood.adata.obs["cell_type"])
    table = read_table(source, np.arange(700), source.genes)
    assert list(check_labels(table, "cell_type", "--cell_type_column")) == list(blood.adata.obs["cell_type"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["B"] * 10 + ["T"] * 5 + [None] * 3, "3 of 18 cells have no cell_type"),
        (["B"] * 10 + ["T"] * 5 + ["", " "], "2 of 17 cells have no cell_type"),
        (["B"] * 10, "all cells have one cell_type (B)"),
        (["B"] * 10 + ["T"] * 4 + ["NK"] * 2, "2 of 3 types in cell_type have fewer than 5 cells (NK: 2, T: 4)"),
    ],
)
def test_labels_that_cannot_be_used(values, expected):
    message = said(check_labels, labelled(values), "cell_type", "--cell_type_column")
    assert message.startswith(f"--cell_type_column: {expected}")


def test_a_column_that_is_missing_lists_those_there_are():
    message = said(check_labels, labelled(["B"] * 20), "type", "--cell_type_column")
    assert message == "--cell_type_column: there is no column type in adata.obs; there are cell_type, batch"
    assert "there are none" in said(check_labels, SimpleNamespace(obs={}), "type", "--label_column")


def test_numbers_as_labels():
    obs = {"cluster": np.array([0.0, 1, 2] * 5), "score": np.linspace(0, 1, 15), "some": np.array([np.nan, 1, 2] * 5)}
    cells = SimpleNamespace(obs=obs)
    assert check_labels(cells, "cluster", "--label_column").tolist() == ["0", "1", "2"] * 5
    assert "score holds numbers from 0 to 1, no types" in said(check_labels, cells, "score", "--label_column")
    assert "5 of 15 cells have no some" in said(check_labels, cells, "some", "--label_column")


# ---- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.05, 0.5, 0.45), (0.9, 0, 0.1), (0.71, 0.29, 0), (1, 0, 0)])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 10, 29, 100])
def test_types_are_divided_as_nearly_as_whole_cells_allow(shares, number):
    """No other division with a training cell is nearer to the proportions: all of them are tried."""
    quotas = number * np.array(shares)
    divisions = [(a, b, number - a - b) for a in range(1, number + 1) for b in range(number - a + 1)]
    nearest = min(((np.array(each) - quotas) ** 2).sum() for each in divisions)
    for seed in range(3):
        parts = apportioned(number, np.array(shares), np.random.default_rng(seed))
        assert parts.sum() == number
        assert parts[0] >= 1
        assert ((parts - quotas) ** 2).sum() == pytest.approx(nearest)
        assert (parts[np.array(shares) == 0] == 0).all()


@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.25, 0), (0, 0.3), (0, 0), (0.5, 0.45)])
def test_a_split_keeps_the_proportions_of_every_type(blood, fractions):
    labels = blood.adata.obs["cell_type"].astype(str).to_numpy(dtype=object)
    split = stratified_split(labels, 700, *fractions, seed=3)
    assert split.shape == (700,)
    assert set(split) == {"train"} | {n for n, fraction in zip(("val", "test"), fractions, strict=True) if fraction}
    for label in set(labels):
        of_type = split[labels == label]
        assert (of_type == "train").any()
        for name, fraction in zip(("val", "test"), fractions, strict=True):
            assert abs((of_type == name).sum() - fraction * len(of_type)) < 1
    assert np.array_equal(split, stratified_split(labels, 700, *fractions, seed=3))
    if any(fractions):
        assert not np.array_equal(split, stratified_split(labels, 700, *fractions, seed=4))


def test_ties_do_not_all_fall_to_one_split():
    """5 cells of each of 200 types in 8 : 1 : 1: half a cell each for validation and test."""
    split = stratified_split(np.repeat(np.arange(200).astype(str), 5), 1000, 0.1, 0.1, seed=0)
    assert (split == "train").sum() == 800
    assert abs((split == "val").sum() - 100) < 40


def test_a_split_without_labels_is_random():
    split = stratified_split(None, 1000, 0.1, 0.2, seed=0)
    assert [(split == name).sum() for name in ("train", "val", "test")] == [700, 100, 200]
    middles = [np.flatnonzero(split == name).mean() for name in ("train", "val", "test")]
    assert middles == pytest.approx([500] * 3, abs=90)


@pytest.mark.parametrize(
    ("validation", "test", "expected"),
    [
        (-0.1, 0.1, "--validation_fraction: -0.1 is no fraction"),
        (0.1, 1.0, "--test_fraction: 1.0 is no fraction"),
        (float("nan"), 0.1, "--validation_fraction: nan is no fraction"),
        (0.5, 0.5, "--validation_fraction, --test_fraction: 0.5 and 0.5 leave no cells to train on"),
        (0.01, 0.2, "--validation_fraction: 0.01 of 20 cells in 2 types is not one cell of any"),
        (0.2, 0.01, "--test_fraction: 0.01 of 20 cells in 2 types is not one cell of any"),
    ],
)
def test_fractions_that_make_no_split(validation, test, expected):
    assert expected in said(stratified_split, np.array(["B", "T"] * 10, dtype=object), 20, validation, test, 0)


def test_labels_of_other_cells_are_a_mistake():
    with pytest.raises(ValueError, match="3 labels for 4 cells"):
        stratified_split(np.array(["a"] * 3), 4, 0.1, 0.1, 0)


# ---- real data ------------------------------------------------------------------------------------------------------


@needs_real_data
def test_sorted_blood_cells_from_file_to_table():
    """3,874 cells of ten sorted types: genes as scanpy chooses them, and library sizes as the file has them."""
    source = open_cells(str(FACS))
    adata = anndata.read_h5ad(FACS)
    assert len(source) == adata.n_obs == 3874
    labels = check_labels(source, "cell_type", "--cell_type_column")
    split = stratified_split(labels, len(source), 0.1, 0.1, seed=0)
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    genes = choose_genes(source, train, 2000)
    assert genes == by_scanpy(adata, train, 2000, "pearson_residuals")
    table = read_table(source, test, genes, library="all")
    kept = [name in set(table.cell_ids) for name in adata.obs_names[test]]
    assert np.array_equal(table.library_sizes, adata.obs["n_counts"].to_numpy()[test][kept])
    assert np.array_equal(table.counts.toarray(), adata[test, genes].X.toarray()[kept])
    assert len(table) + len(table.skipped) == len(test)
    assert "column ensembl of adata.var has 2 of them" in said(find_genes, source, list(adata.var["ensembl"][:2]))
