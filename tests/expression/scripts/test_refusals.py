"""Everything that the scripts of cells refuse: flags, cells, denoisers, requests."""

import importlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.support.cells.runs import (
    BASE,
    CACHE,
    CELLS,
    CONDITIONS,
    LATEST,
    LDM,
    SAMPLE,
    TRAIN_VAE,
    VAE,
    cache_flags,
    without,
)
from tests.support.models import DIT_CONFIG
from tests.support.processes import refused, run, snapshot
from utils.errors import UserError
from utils.models.dit import DiT

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")

# fmt: off
REFUSED_VAE = [
    ([], "--dataset_name is required"),
    (["--dataset_name", "x", "--num_genes", 1], "--num_genes 1: a cell of one gene"),
    *(
        (["--dataset_name", "x", "--split_column", "split", flag, value], f"{flag} with --split_column: the column says")
        for flag, value in (("--validation_fraction", 0.1), ("--test_fraction", 0.1), ("--split_seed", 1), ("--label_column", "a"))
    ),
    (["--dataset_name", "x", "--likelihood", "poisson"], "--likelihood: invalid choice"),
    (["--dataset_name", "x", "--library", "some"], "--library: invalid choice"),
    (["--dataset_name", "x", "--latent_channels", 0], "--latent_channels: 0 is not a whole number of at least 1"),
    (["--dataset_name", "x", "--no-use_ema", "--ema_decay", 0.9], "--ema_decay with --no-use_ema"),
    (["--dataset_name", "x", "--dropout", 2], "--dropout"),
]
JOINT = ["--joint_vae", "--dataset_name", "x"]
REFUSED_LDM = [
    (["--dataset_name", "x"], "--dataset_name without --joint_vae: the autoencoder stays as it is"),
    (["--counts_layer", "x"], "--counts_layer without --joint_vae"),
    (["--vae_learning_rate", 1e-5], "--vae_learning_rate without --joint_vae"),
    (["--joint_latents", "live"], "--joint_latents without --joint_vae"),
    (["--kl_weight", 1], "--kl_weight without --joint_vae"),
    (["--joint_vae"], "--joint_vae needs --dataset_name"),
    ([*JOINT, BASE, "base", "--lora_rank", 4], "--lora_rank with --joint_vae"),
    ([*JOINT, "--ema_sigma_rels", 0.1], "--ema_sigma_rels with --joint_vae"),
    ([*JOINT, "--optimizer", "muon"], "--optimizer muon with --joint_vae"),
    (["--cond_drop_prob", 0.2], "--cond_drop_prob without --condition"),
    (["--validation_guidance_scale", 2], "--validation_guidance_scale without --condition"),
    (["--architecture", "unet"], "--architecture: invalid choice"),
    (["--model_size", "huge"], "--model_size: invalid choice"),
    (["--lora_rank", 4], f"--lora_rank without {BASE}"),
    (["--eval_steps", 2], "--eval_steps without latents to evaluate on"),
    (["--early_stopping_patience", 2], "--early_stopping_patience without --eval_steps"),
    (["--tread_ratio", 0.5], "unrecognized arguments: --tread_ratio"),
]


# fmt: on


def names_of_flags(value) -> str:
    return " ".join(map(str, value))[:50] if isinstance(value, list) else ""


@pytest.mark.parametrize(("flags", "expected"), REFUSED_VAE, ids=names_of_flags)
def test_flags_of_an_autoencoder(monkeypatch, flags, expected):
    check_parsing(monkeypatch, VAE, [*flags, "--output_dir", "o"], expected)


@pytest.mark.parametrize(("flags", "expected"), REFUSED_LDM, ids=names_of_flags)
def test_flags_of_a_denoiser(monkeypatch, unconditional, flags, expected):
    flags = [unconditional if each == "base" else each for each in flags]
    check_parsing(monkeypatch, LDM, [*flags, "--latents_dir", "l", "--output_dir", "o"], expected)


def check_parsing(monkeypatch, name, flags, expected):
    """Said before anything is loaded, in one line."""
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    with pytest.raises(UserError, match=re.escape(expected)) as raised:
        script.parse_args()
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="session")
def bad_cells(data):
    """Files that are no counts, or not those of the autoencoder."""

    def write(name, change):
        adata = data.adata.copy()
        adata = change(adata) or adata
        adata.write_h5ad(data.folder / f"{name}.h5ad")  # ours would refuse to

    def log_normalised(adata):
        adata.layers["counts"] = adata.X.copy()
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)

    def with_value(value):
        def change(adata):
            dense = adata.X.toarray()
            dense[3, 2] = value
            adata.X = dense

        return change

    def others(adata):
        adata.obs_names = [f"other-{i}" for i in range(CELLS)]

    def renamed(adata):
        adata.var_names = ["MALAT1", "MALAT1", *adata.var_names[2:]]

    write("log", log_normalised)
    write("negative", with_value(-1))
    write("nan", with_value(np.nan))
    write("twice", renamed)
    write("other genes", lambda adata: adata[:, 5:].copy())
    write("other cells", others)
    return data.folder


# fmt: off
BAD_CELLS = {
    "logarithms": (["--dataset_name", "log.h5ad"], ["--dataset_name", "does not hold counts", "--counts_layer counts does"]),
    "a negative count": (["--dataset_name", "negative.h5ad"], ["--dataset_name", "does not hold counts", "negative"]),
    "NaN": (["--dataset_name", "nan.h5ad"], ["--dataset_name", "does not hold counts"]),
    "genes of one name": (["--dataset_name", "twice.h5ad"], ["--dataset_name", "MALAT1", "more than once"]),
    "no such file": (["--dataset_name", "nowhere.h5ad"], ["--dataset_name", "nowhere.h5ad does not exist"]),
    "no such layer": (["--counts_layer", "counts"], ["--counts_layer", "no layer counts"]),
    "no such label": (["--label_column", "type"], ["--label_column", "no column type", "cell_type"]),
    "a cell without a label": (["--label_column", "partial"], ["--label_column", "1 of 700 cells have no partial"]),
    "one label": (["--label_column", "flat"], ["--label_column", "all cells have one flat"]),
    "a type of four cells": (["--label_column", "rare"], ["--label_column", "fewer than 5 cells", "rare: 4"]),
    "no such split": (["--split_column", "where"], ["--split_column", "no column where"]),
    "another column as split": (["--split_column", "cell_type"], ["--split_column cell_type", "expected train, val, test"]),
    "a split without val": (["--split_column", "no_val"], ["--split_column no_val", "no cell is of val"]),
    "nothing to watch": (["--validation_fraction", 0], ["--validation_fraction 0", "give some"]),
    "nothing to train on": (["--test_fraction", 0.95], ["--validation_fraction, --test_fraction", "leave no cells"]),
    "no such batch": (["--batch_column", "lanes"], ["--batch_column", "no column lanes"]),
    "one batch": (["--batch_column", "flat"], ["--batch_column flat", "one batch"]),
    "a cell without a batch": (["--batch_column", "partial"], ["--batch_column partial", "1 cells have none"]),
    "an unseen batch": (["--batch_column", "split", "--split_column", "split"], ["--batch_column split", "one batch (train)"]),
    "muon": (["--optimizer", "muon"], ["--optimizer muon", "log_theta has a learning rate of its own"]),
}


# fmt: on


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells(data, bad_cells, tmp_path, name):
    flags, words = BAD_CELLS[name]
    flags = [bad_cells / each if str(each).endswith(".h5ad") else each for each in flags]
    common = without(TRAIN_VAE, "--label_column") if "--split_column" in flags else TRAIN_VAE
    result = run(VAE, "--dataset_name", data.few, *common, *flags, "--output_dir", tmp_path / "run", check=False)
    message = refused(result)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_cells_that_are_not_those_of_the_autoencoder(bad_cells, vae_run, batched, tiny_vae, data, tmp_path):
    cases = [
        ([*cache_flags(bad_cells / "other genes.h5ad", vae_run)], ["--dataset_name: 5 of 40 genes are not in"]),
        ([*cache_flags(bad_cells / "other cells.h5ad", vae_run)], ["--split train: no cell of", "or all"]),
        ([*cache_flags(bad_cells / "log.h5ad", vae_run)], ["--dataset_name", "does not hold counts"]),
        ([*cache_flags(data.few, tiny_vae)], ["--pretrained_vae_model_name_or_path", "no ExpressionVAE"]),
        ([*cache_flags(data.whole, batched.vae), "--split", "all"], ["--dataset_name", "batches by obs['donor']"]),
        ([*cache_flags(data.few, vae_run), "--split", "some"], ["--split: invalid choice"]),
        ([*cache_flags(data.few, vae_run), "--seed", 1], ["--seed with --modality expression"]),
        (["--modality", "expression", "--pretrained_vae_model_name_or_path", vae_run], ["--dataset_name is required"]),
    ]
    for flags, words in cases:
        message = refused(run(CACHE, *flags, "--latents_dir", tmp_path / "cache", check=False))
        assert all(word in message for word in words), message


# fmt: off
BAD_DENOISERS = {
    "no such column": (["--condition", "class:type"], ["--condition", "no column type", "cell_type"]),
    "no such kind": (["--condition", "composition"], ["--condition composition", "class, property"]),
    "no column": (["--condition", "class"], ["--condition class", "name the column, as in class:cell_type"]),
    "text as a number": (["--condition", "property:cell_type"], ["--condition property:cell_type", "use class:cell_type"]),
    "one value": (["--condition", "class:flat"], ["--condition class:flat", "1 different values"]),
    "named twice": (["--condition", "class:age", "property:age"], ["age is named twice"]),
    "steps": (["--validation_inference_steps", 2000], ["--validation_inference_steps 2000"]),
    "no cache": (["--latents_dir", "nowhere"], ["--latents_dir", "does not exist"]),
    "the training cache to evaluate": (["--eval_steps", 2, "--validation_latents_dir", "train"], ["--validation_latents_dir: this is the cache"]),
    "batches of that name": (["--condition", "property:library_size", "--joint_vae", "--dataset_name", "few"], ["--condition library_size with --joint_vae", "rename"]),
    "no file": (["--joint_vae", "--dataset_name", "nowhere.h5ad"], ["--dataset_name", "nowhere.h5ad does not exist"]),
    "other genes": (["--joint_vae", "--dataset_name", "other genes"], ["--dataset_name", "5 of 40 genes are not in"]),
    "other cells": (["--joint_vae", "--dataset_name", "other cells"], ["--dataset_name", "490 of 490 cells of the latent cache"]),
    "no run to start from": ([BASE, "nowhere"], [BASE, "is no run"]),
    "a run of images": ([BASE, "images"], [BASE, "images is no run of cells"]),
}


# fmt: on


@pytest.mark.parametrize("name", BAD_DENOISERS)
def test_bad_denoisers(ldm_flags, caches, bad_cells, unconditional, tiny_vae, data, tmp_path, name):
    flags, words = BAD_DENOISERS[name]
    values = {"train": caches["train"], "few": data.few}
    values |= {each: bad_cells / f"{each}.h5ad" for each in ("other genes", "other cells")}
    if "images" in flags:
        values["images"] = images = tmp_path / "images"
        for part in ("conditions", "scheduler"):
            shutil.copytree(unconditional / part, images / part)
        shutil.copytree(tiny_vae, images / "vae")
        DiT(**DIT_CONFIG, sample_size=4).save_pretrained(images / "transformer")
        (images / "model_index.json").write_text("{}")
    flags = [values.get(each, each) for each in flags]
    common = without(ldm_flags, "--architecture", "--model_config") if BASE in flags else ldm_flags
    message = refused(run(LDM, *common, *flags, "--output_dir", tmp_path / "run", check=False))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("mlp", {"patch_size": 2}, ["--model_config", "VectorMLP has no argument patch_size"]),
        ("dit", {"latent_kind": "grid"}, ["--model_config", "latent_kind"]),
        ("dit", {"in_channels": 7}, ["--model_config", "in_channels is 7"]),
        ("dit", {"hidden_size": 30}, ["--model_config", "hidden_size 30"]),
    ],
)
def test_an_impossible_model_is_refused(ldm_flags, tmp_path, architecture, config, words):
    (tmp_path / "model.json").write_text(json.dumps(config))
    flags = [*ldm_flags, "--architecture", architecture, "--model_config", tmp_path / "model.json"]
    message = refused(run(LDM, *flags, "--output_dir", tmp_path / "run", check=False))
    assert all(word in message for word in words), message


def test_a_run_to_start_from_says_what_its_model_is(ldm_flags, unconditional, tmp_path):
    flags = [*without(ldm_flags, "--architecture", "--model_config"), BASE, unconditional]
    flags += ["--output_dir", tmp_path / "run"]
    for name, value in (("model_size", "S"), ("model_config", "x.json"), ("architecture", "mlp")):
        message = refused(run(LDM, *flags, f"--{name}", value, check=False))
        assert f"--{name} with {BASE}: the run says what its model is" in message
    message = refused(run(LDM, *flags, "--prediction_type", "epsilon", check=False))
    assert "was trained with flow; leave it out" in message


@pytest.mark.parametrize("script", ["train_crystal_ldm.py", "train_class_cond_ldm.py"])
def test_a_cache_of_cells_is_no_other(script, caches, model_flags, tmp_path):
    flags = ["--latents_dir", caches["train"], "--output_dir", tmp_path / "run", "--max_train_steps", 1]
    flags += [*model_flags["dit"], "--unconditional"] if script.startswith("train_class") else []
    message = refused(run(script, *flags, check=False))
    assert "--latents_dir" in message
    assert "holds vector latents" in message or "cells are for train_expression_ldm.py" in message


def test_an_autoencoder_that_changed_is_noticed(data, vae_run, ldm_flags, tmp_path):
    """Training says so before it writes anything."""
    shutil.copytree(vae_run / "vae", tmp_path / "own" / "vae")
    run(CACHE, *cache_flags(data.few, tmp_path / "own"), "--latents_dir", tmp_path / "cache")
    file = tmp_path / "own" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["to_moments.bias"][0] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    flags = [*ldm_flags, "--latents_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    assert "has other weights than when the latents were computed" in refused(run(LDM, *flags, check=False))
    assert not (tmp_path / "run").exists()


def test_going_on_as_another_run_is_refused(data, vae_run, ldm_flags, evaluated, conditional, joint_flags):
    before = snapshot(conditional[0], vae_run)
    flags = [*ldm_flags, *evaluated, "--output_dir", conditional[0], *LATEST]
    message = refused(run(LDM, *flags, "--condition", "class:cell_type", check=False))
    assert "was trained with" in message
    message = refused(run(LDM, *joint_flags, *CONDITIONS, "--output_dir", conditional[0], *LATEST, check=False))
    assert "was trained with" in message
    flags = ["--dataset_name", data.few, *TRAIN_VAE, "--output_dir", vae_run, *LATEST]
    for extra, key in ((["--likelihood", "gaussian"], "likelihood = nb"), (["--split_seed", 1], "data = ")):
        assert f"was trained with {key}" in refused(run(VAE, *flags, *extra, check=False))
    assert snapshot(conditional[0], vae_run) == before


# fmt: off
BAD_SAMPLES = [
    ("asked", ["--class_label", "Martian"], "--class_label Martian: the run knows these: CD14+ Monocyte, "),
    ("asked", ["--class_label", "CD34+", "CD34+"], "--class_label CD34+: named twice; --num_samples says how many"),
    ("asked", ["--class_label", "CD34+", "--property", "cell_type=CD34+"], "--class_label with --property cell_type=CD34+"),
    ("asked", ["--property", "height=3"], "--property height=3: "),
    ("asked", ["--property", "age"], "--property age: write NAME=VALUE"),
    ("asked", ["--property", "age=old"], "--property age=old: old is not a number"),
    ("asked", ["--property", "age=1e39"], "--property age=1e39: too large for single precision"),
    ("asked", ["--property", "age=1", "age=2"], "--property age=2: age is asked for twice"),
    ("asked", ["--property", "cell_type=Martian"], "--property cell_type=Martian: the run knows these"),
    ("asked", ["--num_samples", 0], "--num_samples: 0 is not a whole number of at least 1"),
    ("plain", ["--class_label", "CD34+"], "--class_label: "),
    ("plain", ["--property", "age=1"], "--property age=1: "),
    ("plain", ["--guidance_scale", 2], "--guidance_scale 2: no condition is asked for"),
    ("asked", ["--guidance_interval", 0, 0.5], "--guidance_interval: guidance is off"),
    ("asked", ["--scheduler", "flow_euler"], "--scheduler flow_euler: this run was trained for ddpm"),
    ("plain", ["--scheduler", "ddim"], "--scheduler ddim: this run was trained for flow_euler"),
    ("asked", ["--num_inference_steps", 2000], "--num_inference_steps 2000"),
    ("asked", ["--prompt", "a cell"], "--prompt: {run} makes cells; leave it out"),
    ("asked", ["--class_labels", 1], "--class_labels: {run} makes cells; leave it out"),
    ("asked", ["--num_images_per_prompt", 2], "--num_images_per_prompt: {run} makes cells; leave it out"),
    ("asked", ["--composition", "NaCl"], "--composition: {run} makes cells; leave it out"),
    ("asked", ["--num_atoms", 3], "--num_atoms: {run} makes cells; leave it out"),
    ("asked", ["--clamp_composition"], "--clamp_composition: {run} makes cells; leave it out"),
    ("images", ["--class_label", "CD34+"], "--class_label: {run} makes images; leave it out"),
    ("vae", [], "--model: {run} is no run"),
    ("asked", ["--guide_model", "asked"], "--guide_model: {run} has the weights of --model"),
    ("asked", ["--guide_model", "plain"], "--guide_model: {plain} has other conditions"),
    ("asked", ["--guide_model", "images"], "--guide_model: {images} is no run of cells"),
    ("asked", ["--lora", "plain"], "--lora: {plain} holds no adapter_model.safetensors"),
    ("asked", ["--ema_sigma_rel", 0.1], "--ema_sigma_rel: {run} has no snapshots"),
]


# fmt: on


@pytest.mark.parametrize(("model", "flags", "expected"), BAD_SAMPLES, ids=names_of_flags)
def test_bad_requests(sample, conditional, unconditional, vae_run, tmp_path, model, flags, expected):
    images = tmp_path / "images"
    for name in ("unet", "vae", "scheduler"):
        (images / name).mkdir(parents=True)
        (images / name / "config.json").write_text("{}")
    runs = {"asked": conditional[0], "plain": unconditional, "vae": vae_run, "images": images}
    with pytest.raises(UserError) as raised:
        sample(runs[model], *(runs.get(each, each) for each in flags))
    message = str(raised.value)
    assert message.startswith(expected.format(run=runs[model], **runs)), message
    assert "\n" not in message
    assert not list(tmp_path.glob("sampled*"))


def test_bad_requests_in_one_line(conditional, tmp_path):
    flags = ["--model", conditional[0], "--output_dir", tmp_path / "out", "--num_samples", 2]
    assert "--class_label Martian" in refused(run(SAMPLE, *flags, "--class_label", "Martian", check=False))
