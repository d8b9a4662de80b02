"""Cells in files, and runs on them that many tests share."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import sample as sample_script
from tests.support.cells.pbmc import write_pbmc68k
from tests.support.cells.runs import (
    CELLS,
    CONDITIONS,
    GENES,
    LDM,
    MLP_CONFIG,
    TRAIN_LDM,
    TRAIN_VAE,
    VAE,
    make_caches,
)
from tests.support.models import DIT_CONFIG
from tests.support.processes import run
from utils.expression.data.h5ad import write_h5ad


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """700 blood cells: `whole` (765 genes) and `few` (the 40 with the most counts) as files, and `few` in memory."""
    folder = tmp_path_factory.mktemp("cells")
    whole = write_pbmc68k(folder / "whole.h5ad")
    totals = np.asarray(whole.X.sum(axis=0)).ravel()
    few = whole[:, np.sort(np.argsort(-totals)[:GENES])].copy()
    place = np.arange(CELLS)
    types = few.obs["cell_type"].astype(str).to_numpy()
    few.obs["donor"] = np.where(types == types[0], "D3", np.array(["D1", "D2", "D3"])[place % 3])
    few.obs["lane"] = place % 2 + 1
    few.obs["age"] = np.where(place % 10 == 4, np.nan, 20.0 + place % 60)
    few.obs["split"] = np.array(["train"] * 7 + ["val"] + ["test"] * 2)[place % 10]
    few.obs["no_val"] = np.where(place % 10 < 8, "train", "test")
    few.obs["fold"] = place % 3
    few.obs["flat"] = "the same"
    few.obs["partial"] = np.where(place == 5, None, types)
    few.obs["rare"] = np.where(place < 4, "rare", "common")
    few.obs["n_counts"] = np.asarray(few.X.sum(axis=1)).ravel()
    few.obs["library_size"] = place * 1.0
    write_h5ad(few, folder / "few.h5ad")
    return SimpleNamespace(folder=folder, whole=folder / "whole.h5ad", few=folder / "few.h5ad", adata=few, types=types)


@pytest.fixture(scope="session")
def vae_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "run"
    run(VAE, "--dataset_name", data.few, *TRAIN_VAE, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def caches(data, vae_run, tmp_path_factory):
    return make_caches(tmp_path_factory.mktemp("caches"), data.few, vae_run)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Flags of a tiny denoiser of each architecture."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("mlp", MLP_CONFIG), ("dit", DIT_CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return {name: ["--architecture", name, "--model_config", folder / f"{name}.json"] for name in ("mlp", "dit")}


@pytest.fixture(scope="session")
def ldm_flags(caches, models):
    """Without --output_dir."""
    return [*models["mlp"], "--latents_dir", caches["train"], *TRAIN_LDM]


@pytest.fixture(scope="session")
def evaluated(caches):
    return ["--eval_steps", 4, "--validation_latents_dir", caches["val"]]


@pytest.fixture(scope="session")
def conditional(ldm_flags, evaluated, tmp_path_factory):
    """A finished run of v-prediction with two conditions; and what it said."""
    folder = tmp_path_factory.mktemp("conditional") / "run"
    return folder, run(LDM, *ldm_flags, *CONDITIONS, *evaluated, "--output_dir", folder).stderr


@pytest.fixture(scope="session")
def unconditional(ldm_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "run"
    run(LDM, *ldm_flags, "--prediction_type", "flow", "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def joint_flags(data, ldm_flags, evaluated):
    """The autoencoder learns as fast as the denoiser, for it to be seen in a few steps."""
    flags = ["--joint_vae", "--dataset_name", data.few, "--vae_learning_rate", 1e-3]
    return [*ldm_flags, "--condition", "class:cell_type", *evaluated, *flags]


@pytest.fixture(scope="session")
def joint(joint_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / "run"
    return folder, run(LDM, *joint_flags, "--output_dir", folder).stderr


@pytest.fixture(scope="session")
def batched(data, tmp_path_factory):
    """An autoencoder that knows batches, loses counts, and has no dropout; and its caches."""
    folder = tmp_path_factory.mktemp("batched")
    flags = [*TRAIN_VAE, "--batch_column", "donor", "--likelihood", "zinb", "--dropout", 0]
    run(VAE, "--dataset_name", data.few, *flags, "--output_dir", folder / "vae")
    return SimpleNamespace(vae=folder / "vae", caches=make_caches(folder, data.few, folder / "vae"), flags=flags)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A function that runs sample.py in this process and returns what it left behind."""
    numbers = iter(range(1000))

    def call(model: Path, *flags, steps: int = 3):
        out = tmp_path / f"sampled{next(numbers)}"
        words = ["--model", model, "--num_inference_steps", steps, "--device", "cpu", "--output_dir", out, *flags]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        sample_script.main(sample_script.parse_args())
        return pytest.importorskip("anndata").read_h5ad(out / "cells.h5ad")

    return call


@pytest.fixture(scope="session")
def joint_batched(data, batched, models, tmp_path_factory):
    """Joint runs of an autoencoder with batches, which are a condition too: by one process and by two."""
    folder = tmp_path_factory.mktemp("joint_batched")
    flags = [*models["mlp"], "--latents_dir", batched.caches["train"], *TRAIN_LDM, "--adam_epsilon", 1e-4]
    flags += ["--joint_vae", "--dataset_name", data.few, "--vae_learning_rate", 1e-3, "--joint_latents", "live"]
    flags += ["--condition", "class:donor", "--eval_steps", 4, "--validation_latents_dir", batched.caches["val"]]
    for name, processes in (("one", 1), ("two", 2)):
        run(LDM, *flags, "--train_batch_size", 16 // processes, "--output_dir", folder / name, processes=processes)
    return folder
