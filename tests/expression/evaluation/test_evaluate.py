"""evaluate.py --modality expression: faults planted in samples of real cells, tiny runs of all kinds of conditions, and
everything that is wrong."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

import evaluate as script
from tests.support.cells.evaluation import (
    BESIDE,
    NUM_GENES,
    NUM_TEST,
    TRAIN_LDM,
    TRAIN_VAE,
    class_of,
    columns_of,
    make_run,
    reasons_of,
    rows_of,
    types_of,
    words,
    write_samples,
)
from tests.support.cells.pbmc import pbmc68k
from tests.support.processes import refused, run
from utils.errors import UserError
from utils.expression.data.h5ad import write_h5ad
from utils.expression.evaluation import metrics as metrics_expression
from utils.expression.evaluation import real as real_cells
from utils.expression.evaluation.samples import BINOMIALS as BINOMIAL
from utils.expression.evaluation.samples import CEILING, CONTROL, GAUSSIAN, PRIOR, SAMPLES

anndata = pytest.importorskip("anndata")
pytest.importorskip("scanpy")


# ---- a world of 700 cells


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """700 blood cells with 120 genes, a coarse type and a planted number that their genes tell; an autoencoder of them,
    and a run conditioned on cell_type."""
    folder = tmp_path_factory.mktemp("world")
    adata = pbmc68k()
    totals = np.asarray(adata.X.sum(axis=0)).ravel()
    adata = adata[:, np.sort(np.argsort(-totals)[:NUM_GENES])].copy()
    types = adata.obs["cell_type"].astype(str).to_numpy()
    adata.obs["coarse"] = [kind[:3] if kind[:3] in ("CD4", "CD8") else "other" for kind in types]
    dense = adata.X.toarray()
    values = np.log1p(1e4 * dense / dense.sum(axis=1, keepdims=True))
    adata.obs["planted"] = values[:, np.argsort(-values.var(axis=0))[:8]].mean(axis=1)
    write_h5ad(adata, folder / "cells.h5ad")
    vae, ldm = folder / "vae", folder / "ldm"
    run("train_expression_vae.py", "--dataset_name", folder / "cells.h5ad", *TRAIN_VAE, "--output_dir", vae)
    run("precompute_latents.py", "--modality", "expression", "--dataset_name", folder / "cells.h5ad",
        "--pretrained_vae_model_name_or_path", vae, "--latents_dir", folder / "cache")  # fmt: skip
    (folder / "mlp.json").write_text(json.dumps({"num_layers": 2, "hidden_size": 64}))
    run("train_expression_ldm.py", "--latents_dir", folder / "cache", "--condition", "class:cell_type",
        "--model_config", folder / "mlp.json", *TRAIN_LDM, "--output_dir", ldm)  # fmt: skip
    stored = pq.read_table(vae / "vae" / "cells.parquet").to_pydict()
    split_of = dict(zip(stored["cell_id"], stored["split"], strict=True))
    splits = np.array([split_of[name] for name in adata.obs_names])
    return SimpleNamespace(folder=folder, adata=adata, file=folder / "cells.h5ad", vae=vae, ldm=ldm, splits=splits)


@pytest.fixture
def evaluate(world, monkeypatch, capsys):
    """A function that evaluates against the test cells, in this process, with smaller forests and spaces, and returns what was
    printed; None leaves a flag out, a list gives several values, True and False are with --no- in front or without."""
    monkeypatch.setattr(metrics_expression, "NUM_TREES", 20)
    monkeypatch.setattr(metrics_expression, "NUM_FOLDS", 3)
    monkeypatch.setattr(real_cells, "NUM_COMPONENTS", 10)

    def call(out: Path, **changes) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words(world, out, **changes)])
        script.main(script.parse_args())
        return capsys.readouterr().out

    return call


# ---- planted faults


def test_cells_that_were_kept_out_are_as_good_as_real(evaluate, world, tmp_path):
    rows = rows_of(world, "val")
    samples = write_samples(world, tmp_path / "kept.h5ad", rows, types_of(world, rows))
    printed = evaluate(tmp_path / "out", samples=samples, split_of=world.vae)
    found = columns_of(tmp_path / "out")
    assert list(found) == [SAMPLES, CONTROL, BINOMIAL]
    ours, control = found[SAMPLES], found[CONTROL]
    assert ours["rf_auc"]["low"] < 0.6
    assert ours["copies"]["value"] < 0.1
    assert ours["nearest_ratio"]["value"] == pytest.approx(1, abs=0.1)
    assert ours["lisi"]["value"] == pytest.approx(control["lisi"]["value"], abs=0.1)
    assert ours["accuracy"]["value"] == pytest.approx(control["accuracy"]["value"], abs=0.12)
    assert ours["type_distribution"]["value"] < 0.2
    assert abs(ours["zero_fraction_error"]["value"]) < 0.02
    assert "copies" not in control
    assert control["accuracy"]["num_samples"] == NUM_TEST  # of the test cells, and not of what it was trained on
    assert control["rf_auc"]["num_samples"] == 70
    assert "AUC of a random forest on genes" in printed
    assert "By type" not in printed
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("data:image/png") == 1  # markers, and no UMAP
    assert "<h2>By type: mixing" in html


def test_swapped_labels(evaluate, world, tmp_path):
    """The cells are real and cannot be told apart; the labels are of other cells."""
    rows = rows_of(world, "val")
    swapped = np.random.default_rng(0).permutation(types_of(world, rows))
    samples = write_samples(world, tmp_path / "swapped.h5ad", rows, swapped)
    evaluate(tmp_path / "out", samples=samples, split_of=world.vae)
    ours, control = columns_of(tmp_path / "out")[SAMPLES], columns_of(tmp_path / "out")[CONTROL]
    assert ours["rf_auc"]["low"] < 0.6
    assert ours["accuracy"]["value"] < control["accuracy"]["value"] - 0.3
    assert ours["train_on_samples"]["value"] < control["train_on_samples"]["value"] - 0.2
    assert ours["lfc_slope"]["value"] < 0.5 < control["lfc_slope"]["value"]
    assert ours["marker_overlap"]["value"] < control["marker_overlap"]["value"]
    assert ours["type_distribution"]["value"] < 0.2  # which labels play no part in


def test_mode_collapse(evaluate, world, tmp_path):
    """Cells of three types are missing, and those of one come again and again in their place."""
    rows = rows_of(world, "val")
    labels = types_of(world, rows)
    collapsed = rows.copy()
    dendritic = np.flatnonzero(labels == "Dendritic")
    collapsed[labels != "Dendritic"] = rows[dendritic[:5]][np.arange((labels != "Dendritic").sum()) % 5]
    samples = write_samples(world, tmp_path / "collapsed.h5ad", collapsed, labels)
    evaluate(tmp_path / "out", samples=samples, split_of=world.vae)
    ours, control = columns_of(tmp_path / "out")[SAMPLES], columns_of(tmp_path / "out")[CONTROL]
    assert ours["rf_auc"]["value"] > 0.85
    assert ours["lisi"]["value"] < control["lisi"]["value"] - 0.3
    assert ours["type_distribution"]["value"] > 0.4
    assert ours["accuracy"]["value"] < control["accuracy"]["value"] - 0.3
    assert ours["w2"]["value"] > control["w2"]["value"] + 0.1


def test_copies_of_training_cells(evaluate, world, tmp_path):
    """Everything looks perfect but for the copies."""
    rows = rows_of(world, "train")[:150]
    samples = write_samples(world, tmp_path / "copies.h5ad", rows, types_of(world, rows))
    evaluate(tmp_path / "out", samples=samples, split_of=world.vae)
    ours = columns_of(tmp_path / "out")[SAMPLES]
    assert ours["rf_auc"]["low"] < 0.6
    assert ours["copies"]["value"] == 1
    assert ours["nearest_ratio"]["value"] < 0.01


def test_means_in_place_of_draws(evaluate, world, tmp_path):
    """Rounded means of the types have no noise: told apart at once, too little variance, zeros that are too many or
    too few."""
    rows = rows_of(world, "val")
    labels, dense = types_of(world, rows), world.adata.X.toarray()
    train = rows_of(world, "train")
    means = np.stack([dense[train[types_of(world, train) == kind]].mean(axis=0) for kind in labels])
    samples = write_samples(world, tmp_path / "means.h5ad", rows, labels, np.round(means))
    evaluate(tmp_path / "out", samples=samples, split_of=world.vae)
    ours, control = columns_of(tmp_path / "out")[SAMPLES], columns_of(tmp_path / "out")[CONTROL]
    assert ours["rf_auc"]["value"] > 0.98
    assert ours["gene_variance_slope"]["value"] < 0.6
    assert ours["zero_fraction_per_gene_error"]["value"] > 3 * control["zero_fraction_per_gene_error"]["value"]
    assert abs(ours["zero_fraction_error"]["value"]) > 0.05
    assert ours["gene_mean_correlation"]["value"] > 0.9  # which is why it is no evidence


def test_samples_without_labels_and_without_training_data(evaluate, world, tmp_path):
    """What can be said of them is said, and the rest with its reason."""
    rows = rows_of(world, "val")
    samples = write_samples(world, tmp_path / "plain.h5ad", rows)
    test = write_samples(
        world, tmp_path / "test.h5ad", rows_of(world, "test"), types_of(world, rows_of(world, "test"))
    )
    printed = evaluate(tmp_path / "a", samples=samples, reference=test)
    assert list(columns_of(tmp_path / "a")) == [SAMPLES]
    assert reasons_of(tmp_path / "a")["accuracy"] == "needs --label_column"
    assert "without --training_data there is no control" in printed
    evaluate(tmp_path / "b", samples=samples, reference=test, label_column="cell_type")
    reasons = reasons_of(tmp_path / "b")
    assert "--samples has no column cell_type" in reasons["accuracy"]
    assert "--training_data" in reasons["type_distribution"]
    assert reasons["copies"] == "needs --training_data"
    evaluate(tmp_path / "c", samples=samples, split_of=world.vae, label_column="cell_type")
    found = columns_of(tmp_path / "c")
    assert "type_distribution" in found[SAMPLES]
    assert not any(name.startswith("accuracy") for name in found[SAMPLES])
    assert found[CONTROL]["accuracy"]["value"] > 0.5
    assert "accuracy" not in found[BINOMIAL]  # of all cells together, as the samples are


# ---- runs


def test_a_run_of_types(evaluate, world, tmp_path):
    """Every column is there; samples were asked for what the test cells are; --samples of what was left behind gives
    the same figures."""
    evaluate(tmp_path / "out", model=world.ldm)
    found = columns_of(tmp_path / "out")
    assert list(found) == [SAMPLES, *BESIDE]
    assert {column["w2"]["num_samples"] for column in found.values()} == {NUM_TEST}
    made = anndata.read_h5ad(tmp_path / "out" / "samples" / "all" / "cells.h5ad")
    wanted = types_of(world, rows_of(world, "test"))
    assert list(made.obs["cell_type"].astype(str)) == list(wanted)
    assert made.uns["latent_diffusion"]["num_inference_steps"] == 4
    assert found[BINOMIAL]["accuracy"]["value"] > 0.6 > 0.4 > found[PRIOR]["accuracy"]["value"]
    assert found[GAUSSIAN]["w2"]["value"] < found[PRIOR]["w2"]["value"]
    assert all("type_distribution" in column for column in found.values())
    by_type = {name for name in found[SAMPLES] if name.startswith("rf_auc of ")}
    counts = dict(zip(*np.unique(wanted, return_counts=True), strict=True))
    assert by_type == {f"rf_auc of {kind}" for kind, count in counts.items() if count >= 20}
    assert by_type <= set(found[CONTROL]) & set(found[CEILING])
    assert not by_type & set(found[GAUSSIAN])
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())["compared"]
    assert "of each cell_type by itself" in facts[GAUSSIAN]
    assert facts["types"] == f"cell_type ({len(counts)})"

    evaluate(tmp_path / "again", samples=tmp_path / "out" / "samples" / "all", split_of=world.ldm)
    again = columns_of(tmp_path / "again")
    assert list(again) == [SAMPLES, CONTROL, BINOMIAL]
    assert again == {name: found[name] for name in again}


def test_seeds_and_a_sweep(evaluate, world, tmp_path):
    printed = evaluate(tmp_path / "out", model=world.ldm, seeds=2, sweep=["guidance_scale", 1, 2], num_samples=60)
    found = columns_of(tmp_path / "out")
    assert list(found) == ["guidance_scale 1", "guidance_scale 2", *BESIDE]
    for column in found.values():
        figure = column["rf_auc"]
        assert figure["interval"] == "lowest and highest of 2 seeds"
        assert figure["value"] == pytest.approx((figure["low"] + figure["high"]) / 2)
        assert figure["num_samples"] == 60
    assert found["guidance_scale 1"]["w2"]["low"] < found["guidance_scale 1"]["w2"]["high"]
    folder = tmp_path / "out" / "samples" / "guidance_scale_2"
    first, second = (anndata.read_h5ad(folder / f"seed_{i}" / "cells.h5ad") for i in range(2))
    assert list(first.obs["cell_type"]) == list(second.obs["cell_type"])
    assert not set(first.obs["seed"]) & set(second.obs["seed"])
    assert "means over 2 seeds" in printed
    assert "means over 2 seeds" in (tmp_path / "out" / "report.html").read_text()


def test_coarse_types_judged_by_fine_ones(evaluate, world, tmp_path):
    """The samples have no fine type: the mixture is judged, and the types that a classifier tells."""
    model = make_run(world, tmp_path / "run", {"coarse": class_of(world, "coarse")})
    printed = evaluate(tmp_path / "out", model=model, label_column="cell_type")
    found = columns_of(tmp_path / "out")
    assert all("type_distribution" in column for column in found.values())
    assert {name for name in found if "accuracy" in found[name]} == {CONTROL, CEILING}
    assert min(found, key=lambda name: found[name]["type_distribution"]["value"]) == CONTROL
    assert "not conditioned on it" in reasons_of(tmp_path / "out")["marker_overlap"]
    assert "not conditioned on it" in printed
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())["compared"]
    assert "of each coarse by itself" in facts[GAUSSIAN]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "by the types that the classifier takes them for" in html


def test_an_unconditional_run(evaluate, world, tmp_path):
    """One Gaussian for all cells; without --label_column nothing is said of types."""
    model = make_run(world, tmp_path / "run", {})
    evaluate(tmp_path / "out", model=model, num_samples=50)
    found = columns_of(tmp_path / "out")
    assert list(found) == [SAMPLES, *BESIDE]
    assert reasons_of(tmp_path / "out")["type_distribution"] == "needs --label_column"
    assert not any("accuracy" in column for column in found.values())
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())["compared"]
    assert "of all training cells together" in facts[GAUSSIAN]
    assert facts["types"] == "none"


def test_a_number(evaluate, world, tmp_path):
    """The regressor tells it of real cells, of reconstructions and of Gaussians that follow it; a denoiser that was
    never trained does not follow, the prior and independent genes know nothing of it."""
    planted = world.adata.obs["planted"].to_numpy(dtype=np.float64)
    model = make_run(
        world,
        tmp_path / "run",
        {"planted": {"kind": "property", "mean": float(planted.mean()), "std": float(planted.std())}},
    )
    printed = evaluate(tmp_path / "out", model=model, label_column="cell_type")
    spearman = {name: column["planted_spearman"]["value"] for name, column in columns_of(tmp_path / "out").items()}
    assert spearman[CONTROL] > 0.8
    assert spearman[CEILING] > 0.5
    assert spearman[GAUSSIAN] > 0.5
    for name in (SAMPLES, BINOMIAL, PRIOR):
        assert abs(spearman[name]) < 0.3, name
    assert "planted: Spearman of asked and predicted" in printed
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())["compared"]
    assert "the mean linear in planted" in facts[GAUSSIAN]
    made = anndata.read_h5ad(tmp_path / "out" / "samples" / "all" / "cells.h5ad")
    np.testing.assert_allclose(made.obs["planted"], planted[rows_of(world, "test")], rtol=1e-6)
    evaluate(
        tmp_path / "again", samples=tmp_path / "out" / "samples" / "all", split_of=world.vae, label_column="cell_type"
    )
    again = {name: column["planted_spearman"]["value"] for name, column in columns_of(tmp_path / "again").items()}
    assert again == {name: spearman[name] for name in (SAMPLES, CONTROL, BINOMIAL)}


def test_as_a_user_runs_it(world, tmp_path):
    """In a process of its own, by a checkpoint."""
    flags = words(world, tmp_path / "out", model=world.ldm / "checkpoint-60", num_samples=40)
    result = run("evaluate.py", *flags)
    assert "control: real cells" in result.stdout
    assert "n = 40" in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    again = run("evaluate.py", *flags, check=False)
    assert "--output_dir" in refused(again)


@pytest.mark.slow
def test_umap(evaluate, world, tmp_path):
    """Real cells, samples and Gaussians in one plane; the compiler of umap-learn takes most of the time."""
    evaluate(tmp_path / "out", model=world.ldm, num_samples=40, umap=True)
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 2


# ---- what is refused


def test_bad_input(evaluate, world, tmp_path):
    val, test = rows_of(world, "val"), rows_of(world, "test")
    samples = write_samples(world, tmp_path / "samples.h5ad", val, types_of(world, val))
    logged = write_samples(world, tmp_path / "logged.h5ad", val, None, np.log1p(world.adata.X[val].toarray()))
    tiny = write_samples(world, tmp_path / "tiny.h5ad", val[:5], types_of(world, val[:5]))
    other = write_samples(world, tmp_path / "other.h5ad", val, np.full(len(val), "neuron"))
    missing = types_of(world, val).astype(object)
    missing[3:9] = ""
    unlabelled = write_samples(world, tmp_path / "unlabelled.h5ad", val, missing)
    renamed = world.adata.copy()
    renamed.var_names = [f"ENSG{i:011d}" for i in range(NUM_GENES)]
    write_h5ad(renamed, tmp_path / "renamed.h5ad")
    strange = world.adata.copy()
    strange.obs["cell_type"] = np.where(
        strange.obs["cell_type"] == "Dendritic", "astrocyte", strange.obs["cell_type"].astype(str)
    )
    write_h5ad(strange, tmp_path / "strange.h5ad")
    bare = world.adata[test].copy()
    bare.obs = bare.obs[[]]
    bare.obs_names = [f"new-{i}" for i in range(len(test))]
    write_h5ad(bare, tmp_path / "bare.h5ad")
    layered = anndata.read_h5ad(samples)
    layered.layers["counts"] = layered.X.copy()
    layered.X = layered.X * 0.5
    write_h5ad(layered, tmp_path / "layered.h5ad")
    two = make_run(
        world, tmp_path / "two", {"coarse": class_of(world, "coarse"), "cell_type": class_of(world, "cell_type")}
    )
    plain = make_run(world, tmp_path / "plain", {})
    (tmp_path / "empty").mkdir()
    image_run = tmp_path / "images"
    for folder in ("unet", "vae", "scheduler"):
        (image_run / folder).mkdir(parents=True)
        (image_run / folder / "config.json").write_text("{}")
    (image_run / "model_index.json").write_text("{}")
    model = world.ldm
    wrong = [
        ({}, "give --model"),
        ({"model": model, "reference": None}, "--reference is required"),
        ({"model": tmp_path / "nowhere"}, "--model: .*does not exist"),
        ({"model": image_run}, "--model: .*is a run of images; leave out --modality expression"),
        ({"model": world.vae}, "--model: .*is no run"),
        ({"model": model, "samples": samples}, "--model with --samples"),
        ({"samples": samples, "guidance_scale": 2}, "--guidance_scale with --samples"),
        ({"samples": samples, "seeds": 3}, "--seeds with --samples"),
        ({"samples": samples, "reference_split": "val"}, "--reference_split with --samples: .*--split_of"),
        ({"model": model, "split_of": world.vae}, "--split_of without --samples"),
        ({"model": model, "samples_layer": "counts"}, "--samples_layer without --samples"),
        ({"samples": tmp_path / "empty"}, "--samples: .*has no cells.h5ad"),
        ({"samples": tmp_path / "nowhere.h5ad"}, "--samples: .*does not exist"),
        ({"samples": logged}, "--samples: X of .*does not hold counts"),
        (
            {"samples": tmp_path / "layered.h5ad"},
            "--samples: X of .*does not hold counts.*--samples_layer counts does",
        ),
        ({"samples": samples, "samples_layer": "raw"}, "--samples_layer: .*has no layer raw"),
        ({"samples": tiny}, "--samples: 5 cells; figures need at least 10"),
        (
            {"samples": other, "split_of": world.vae},
            "--samples: no cell_type of theirs .neuron. is one of the test cells",
        ),
        ({"samples": unlabelled, "split_of": world.vae}, "--samples: 6 of 70 cells have no cell_type"),
        ({"samples": samples, "reference": tmp_path / "renamed.h5ad"}, "--reference: 120 of 120 genes are not in"),
        ({"samples": samples, "training_data": world.file}, "--reference: 700 of 700 cells of .* are training cells"),
        ({"model": model, "reference": tmp_path / "renamed.h5ad"}, "--reference: 120 of 120 genes are not in"),
        ({"model": model, "reference": logged}, "--reference: X of .*does not hold counts"),
        ({"model": model, "reference": tmp_path / "bare.h5ad"}, "--reference_split test: no cell of .*bare"),
        (
            {"model": model, "reference": tmp_path / "strange.h5ad"},
            "--reference: the run never saw the cell_type astrocyte",
        ),
        (
            {
                "model": model,
                "reference": tmp_path / "bare.h5ad",
                "reference_split": "all",
                "training_data": world.file,
            },
            "--reference: there is no column cell_type in adata.obs",
        ),
        (
            {"model": plain, "reference": tiny, "reference_split": "all", "training_data": world.file},
            "--reference: .*tiny.h5ad, split all, has 5 cells",
        ),
        ({"model": model, "reference_split": "all"}, "--reference: 490 of 700 cells of .* are training cells"),
        ({"model": model, "label_column": "nothing"}, "--reference: there is no column nothing .*--label_column"),
        ({"model": model, "label_column": "planted"}, "--reference: planted holds numbers"),
        ({"model": two}, "--label_column: the run has the classes"),
        ({"model": model, "num_samples": 4}, "--num_samples 4: figures need at least 10"),
        ({"model": plain, "guidance_scale": 3}, "--guidance_scale 3: no condition is asked for"),
        ({"model": model, "sweep": ["seed", 1, 2]}, "--sweep seed"),
        ({"model": model, "prompt": "a cat"}, "unrecognized arguments: --prompt"),
    ]
    for changes, expected in wrong:
        with pytest.raises(UserError) as raised:
            evaluate(tmp_path / "out", **changes)
        assert re.search(expected, str(raised.value)), (changes, str(raised.value))
        assert not (tmp_path / "out").exists(), changes


def test_runs_of_other_modalities_say_so(world, monkeypatch):
    """Images and crystals judge no cells, and say by which flag cells are judged."""
    crystals = ["--modality", "crystal", "--training_data", "x.parquet"]
    for flags in (["--features", "classifier:none"], crystals):
        monkeypatch.setattr(
            sys, "argv", ["evaluate.py", *flags, "--model", str(world.ldm), "--reference", "nowhere.parquet"]
        )
        monkeypatch.setattr("utils.image.evaluation.features.load_features", lambda spec, device: None)
        with pytest.raises(UserError, match="is a run of cells; add --modality expression"):
            script.main(script.parse_args())
