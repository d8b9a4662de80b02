"""Genes: those that scanpy chooses of the training cells, and those found by name."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.support.cells.data import all_rows, by_scanpy, counts, make, opened, said
from utils.expression.data.genes import FLAVORS, choose_genes, find_genes
from utils.expression.data.source import open_cells
from utils.expression.data.table import read_table, stratified_split

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


@pytest.mark.parametrize("flavor", FLAVORS)
def test_genes_are_those_that_scanpy_chooses_of_the_training_cells(blood, flavor):
    source = open_cells(str(blood.path))
    split = stratified_split(source.obs["cell_type"], 700, 0.1, 0.1, seed=0)
    rows = np.flatnonzero(split == "train")
    found = choose_genes(source, rows, 200, flavor)
    assert found == by_scanpy(blood.adata, rows, 200, flavor)
    assert len(found) == 200
    assert found != by_scanpy(blood.adata, np.arange(700), 200, flavor)  # so the rows do matter
    assert found == [gene for gene in source.genes if gene in set(found)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """300 cells; in the last 100 alone, the gene "planted" varies more than any other."""
    generator = np.random.default_rng(0)
    values = generator.poisson(generator.gamma(2, 1, 60), (300, 60)).astype(np.float32)
    values[:200, 17] = generator.poisson(2, 200)
    values[200:, 17] = 20 * (generator.random(100) < 0.1)
    values[:, 30] = 0
    values[[3, 90, 250, 251, 252], 30] = 1
    names = [f"G{i}" for i in range(60)]
    names[17], names[30] = "planted", "rare"
    return opened(make(csr_matrix(values), names=names), tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_what_varies_in_other_rows_only_is_not_chosen(planted, flavor):
    assert "planted" in choose_genes(planted, np.arange(300), 3, flavor)
    assert "planted" not in choose_genes(planted, np.arange(200), 3, flavor)


def test_genes_of_too_few_of_the_rows_are_left_out(planted, caplog):
    train = choose_genes(planted, np.arange(200), 1000)
    assert train == [gene for gene in planted.genes if gene != "rare"]  # in two of these rows, and in five of all
    assert "all 59 genes with counts in at least 3 cells are taken" in caplog.text
    assert choose_genes(planted, np.arange(300), 60) == planted.genes
    assert choose_genes(planted, np.arange(200), 60, min_cells=2) == planted.genes


def test_no_genes_at_all_is_an_error(planted):
    message = said(choose_genes, planted, np.arange(2), 10)
    assert "no gene of" in message
    assert "at least 3 of 2 cells" in message
    assert "--num_genes: 0 is too few" in said(choose_genes, planted, np.arange(200), 0)


def test_of_many_cells_a_random_subset_is_used(blood, caplog):
    source = open_cells(str(blood.path))
    rows = np.arange(0, 700, 2)
    seen = []

    class Spy:
        genes, name = source.genes, source.name

        def chunks(self, some):
            seen.append(some)
            return source.chunks(some)

    found = [choose_genes(Spy(), rows, 100, max_cells=200, seed=seed) for seed in (0, 0, 1)]
    assert "genes are chosen by a random 200 of 350 cells" in caplog.text
    assert [len(set(each)) for each in seen] == [200, 200, 200]
    assert set(seen[0]) < set(rows)
    assert found[0] == found[1] == by_scanpy(blood.adata, seen[0], 100, "pearson_residuals")
    assert found[0] != found[2]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_cells_without_counts_change_no_genes(tmp_path, blood, flavor):
    values = blood.adata.X.toarray()
    empty = anndata.AnnData(csr_matrix(np.concatenate([values, np.zeros((5, 765), dtype=np.float32)])))
    empty.var_names = list(blood.adata.var_names)
    source = opened(empty, tmp_path)
    assert choose_genes(source, np.arange(705), 100, flavor) == by_scanpy(blood.adata, np.arange(700), 100, flavor)


def test_a_fit_that_fails_says_what_to_do(tmp_path):
    values = np.ones((30, 12), dtype=np.float32)
    values[0] = 2
    message = said(choose_genes, opened(make(csr_matrix(values)), tmp_path), np.arange(30), 4, "seurat_v3")
    assert message.startswith("--dataset_name: seurat_v3 cannot choose among 12 genes of 30 cells")
    assert "pearson_residuals" in message


def test_genes_are_found_by_name_in_any_order(tmp_path):
    source = opened(make(), tmp_path)
    genes = ["G7", "G0", "G11"]
    table = read_table(source, all_rows(source), genes)
    assert table.genes == genes
    assert np.array_equal(table.dense(all_rows(source)), counts()[:, [7, 0, 11]])
    assert table.library_sizes.tolist() == counts()[:, [7, 0, 11]].sum(axis=1).tolist()


ENSEMBL = [f"ENSG{i:011}" for i in range(12)]


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        (None, ["G0", "A", "B", "C", "D", "E", "F"], "6 of 7 genes are not in "),
        (None, ["G0", "A", "B", "C", "D", "E", "F"], "(A, B, C, D, E, ...), which has 12 (G0, G1, "),
        (None, ["G0", "A"], "give a file with all genes that the model was trained on"),
        ([f"Cd{i}e" for i in range(12)], ["CD3E", "CD4E", "X"], "2 of them are there in another case (Cd3e for CD3E)"),
        ([f"CD{i}" for i in range(12)], ENSEMBL[:3], "wanted are Ensembl identifiers, and the file has gene symbols"),
        (ENSEMBL, ["CD3", "CD4"], "wanted are gene symbols, and the file has Ensembl identifiers"),
        ([f"{name}.4" for name in ENSEMBL], ENSEMBL[:3], "3 of them differ in the version after the dot only"),
    ],
)
def test_genes_that_are_missing_are_counted_and_the_reason_guessed(tmp_path, there, wanted, expected):
    source = opened(make(names=there), tmp_path)
    message = said(read_table, source, all_rows(source), wanted)
    assert message.startswith("--dataset_name: ")
    assert expected in message


def test_a_column_that_has_the_missing_names_is_named(tmp_path):
    adata = make(names=[f"CD{i}" for i in range(12)])
    adata.var["gene_ids"] = ENSEMBL
    adata.var["length"] = 1.0
    source = opened(adata, tmp_path)
    assert "column gene_ids of adata.var has 4 of them: adata.var_names = adata.var['gene_ids']" in said(
        find_genes, source, ENSEMBL[:4]
    )


@pytest.mark.parametrize("genes", [["G0", "G0"], []])
def test_genes_must_be_named_once(tmp_path, genes):
    source = opened(make(), tmp_path)
    with pytest.raises(ValueError, match="once each"):
        read_table(source, all_rows(source), genes)
    with pytest.raises(ValueError, match="chosen, all"):
        read_table(source, all_rows(source), ["G0"], library="some")
