"""sample.py on runs of cells: labels, batches, conditions, guides."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from tests.support.cells.runs import GENES, LDM, NUM_TRAIN, SAMPLE, TRAIN_LDM, split_of
from tests.support.processes import refused, run
from utils.expression.data.source import open_cells
from utils.expression.pipeline import load_columns, load_run

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")


def test_as_a_user_samples(conditional, data, tmp_path):
    """In a process of its own: whole counts of the right genes, labels as asked, how it was made; scanpy opens it."""
    folder, _ = conditional
    words = ["--model", folder, "--class_label", "CD34+", "Dendritic", "--property", "age=33.5", "--num_samples", 6]
    words += ["--num_inference_steps", 4, "--seed", 7, "--output_dir", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmp-1-cells.h5ad").write_bytes(b"half of")  # of a killed process
    assert "12 cells of 40 genes in" in run(SAMPLE, *words).stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cells.h5ad"]
    cells = sc.read_h5ad(tmp_path / "out" / "cells.h5ad")
    assert cells.shape == (12, GENES)
    assert list(cells.var_names) == list(data.adata.var_names)
    counts = cells.X.toarray()
    assert (counts == np.rint(counts)).all()
    assert counts.min() == 0
    assert cells.obs["cell_type"].tolist() == ["CD34+"] * 6 + ["Dendritic"] * 6
    assert cells.obs["age"].tolist() == [33.5] * 12
    assert cells.obs["seed"].tolist() == list(range(7, 19))
    np.testing.assert_array_equal(cells.obs["n_counts"], counts.sum(axis=1))
    assert (np.abs(np.log(cells.obs["n_counts"] / cells.obs["library_size"])) < 1).all()
    made = cells.uns["latent_diffusion"]
    assert made["model"] == str(folder)
    assert (made["guidance_scale"], made["num_inference_steps"], made["seed"]) == (1.0, 4, 7)
    assert made["scheduler"] == "DDIMScheduler"
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=3)
    open_cells(str(tmp_path / "out" / "cells.h5ad"))  # as data it is sound too
    assert "is not empty" in refused(run(SAMPLE, *words, check=False))


def test_labels_that_are_not_asked_come_as_in_training(sample, conditional, data):
    cells = sample(conditional[0], "--num_samples", 900, steps=1)
    expected = Counter(data.types[split_of(data) == "train"])
    found = Counter(cells.obs["cell_type"])
    common = [name for name, times in expected.items() if times > 10]
    rest = [sum(times for name, times in counts.items() if name not in common) for counts in (found, expected)]
    seen = [*(found[name] for name in common), rest[0]]
    wanted = 900 / NUM_TRAIN * np.array([*(expected[name] for name in common), rest[1]])
    assert chisquare(seen, wanted).pvalue > 1e-3
    assert 0.05 < cells.obs["age"].isna().mean() < 0.15  # as it is missing in training


def test_a_sample_is_the_same_in_any_batch(sample, conditional):
    """Libraries to rounding, and counts but for a draw that this tips."""
    flags = ("--num_samples", 20, "--guidance_scale", 2)
    whole = sample(conditional[0], *flags)
    for size in (1, 7):
        part = sample(conditional[0], *flags, "--batch_size", size)
        np.testing.assert_allclose(part.obs["library_size"], whole.obs["library_size"], rtol=1e-4)
        assert (part.X != whole.X).sum() <= 2
        assert part.obs["cell_type"].tolist() == whole.obs["cell_type"].tolist()
    later = sample(conditional[0], "--num_samples", 5, "--guidance_scale", 2, "--seed", 15)
    assert (later.X != whole[15:].X).sum() <= 1


def test_each_condition_reaches_the_model(sample, conditional):
    """Alone and together, guided or not; a value is told as it is."""
    folder, asked = conditional[0], ["--class_label", "CD34+"]
    found = [
        sample(folder, "--num_samples", 3, *flags).obs["library_size"].to_numpy()
        for flags in (asked, ["--property", "age=20"], [*asked, "--property", "age=20"], ["--property", "age=79"],
                      [*asked, "--guidance_scale", 3])
    ]  # fmt: skip
    for i, one in enumerate(found):
        assert all((one != other).all() for other in found[:i])
    same = sample(folder, "--num_samples", 3, "--property", "cell_type=CD34+").obs["library_size"]
    np.testing.assert_array_equal(same, found[0])


def test_a_checkpoint_is_sampled(sample, conditional):
    """With the averaged weights of its step; the last is the finished run."""
    folder = conditional[0]
    early, last, whole = (
        sample(each, "--num_samples", 4) for each in (folder / "checkpoint-4", folder / "checkpoint-8", folder)
    )
    assert (last.X != whole.X).nnz == 0
    assert (early.obs["library_size"] != whole.obs["library_size"]).all()


def test_a_weaker_model_guides(sample, conditional):
    """At scale 2, if nothing else is said."""
    folder = conditional[0]
    plain = sample(folder, "--num_samples", 4)
    guided = sample(folder, "--num_samples", 4, "--guide_model", folder / "checkpoint-4")
    assert guided.uns["latent_diffusion"]["guidance_scale"] == 2
    assert guided.uns["latent_diffusion"]["guide_model"] == str(folder / "checkpoint-4")
    assert (guided.obs["library_size"] != plain.obs["library_size"]).all()


def test_columns_that_have_names_of_ours(sample, ldm_flags, tmp_path):
    """Of a condition the obs of samples hold what was asked; what was drawn stands beside it."""
    flags = [*ldm_flags, "--condition", "property:n_counts", "property:library_size", "--max_train_steps", 1]
    run(LDM, *flags, "--output_dir", tmp_path / "run")
    cells = sample(tmp_path / "run", "--num_samples", 3, "--property", "n_counts=77")
    assert cells.obs["n_counts"].tolist() == [77.0] * 3
    np.testing.assert_array_equal(cells.obs["generated_n_counts"], np.asarray(cells.X.sum(axis=1)).ravel())
    assert (cells.obs["library_size"] > 0).all()
    assert sorted(sample(tmp_path / "run", "--num_samples", 3).obs) == [
        *("generated_library_size", "generated_n_counts", "library_size", "n_counts", "seed")
    ]


def test_cells_of_a_batch(sample, joint_batched, batched, data):
    """The decoder is told the batch that is asked for; without, those of the training cells."""
    pipeline = load_run(joint_batched / "one")
    assert pipeline.vae.config.batch_names == ["D1", "D2", "D3"]
    found = sample(joint_batched / "one", "--class_label", "D1", "D3", "--num_samples", 4)
    assert found.obs["donor"].tolist() == ["D1"] * 4 + ["D3"] * 4
    cells = sample(joint_batched / "one", "--num_samples", 300, steps=1)
    expected = Counter(data.adata.obs["donor"][split_of(data) == "train"])
    seen = Counter(cells.obs["donor"])
    wanted = [300 / NUM_TRAIN * times for times in expected.values()]
    assert chisquare([seen[name] for name in expected], wanted).pvalue > 1e-3


def test_batches_are_drawn_where_they_are_no_condition(sample, batched, models, data, tmp_path):
    """For the decoder, from the training cells of the same type."""
    flags = [*models["mlp"], "--latents_dir", batched.caches["train"], *TRAIN_LDM, "--max_train_steps", 1]
    run(LDM, *flags, "--condition", "class:cell_type", "--output_dir", tmp_path / "run")
    columns = load_columns(tmp_path / "run" / "training_columns.parquet")
    assert sorted(columns) == ["cell_type", "donor"]
    train = split_of(data) == "train"
    assert columns["donor"].tolist() == data.adata.obs["donor"][train].tolist()
    assert sample(tmp_path / "run", "--class_label", data.types[0], "--num_samples", 5).shape == (5, GENES)
    assert "donor" not in sample(tmp_path / "run", "--num_samples", 5).obs
