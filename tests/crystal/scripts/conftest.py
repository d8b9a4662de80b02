"""Crystals in a file, and runs on them that many tests share."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import sample as script
from tests.support.crystals.random_runs import GAP, export_run, make_denoiser, make_pipeline, words
from tests.support.crystals.runs import CACHE, CONDITIONS, LDM, MAX_ATOMS, TRAIN_LDM, TRAIN_VAE, VAE, rows_of_crystals
from tests.support.models import DIT_CONFIG
from tests.support.processes import run
from utils.crystal.files import read_samples
from utils.crystal.pipeline import load_run
from utils.crystal.structure import Crystal
from utils.training import lora


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("crystals") / "crystals.parquet"
    rows = rows_of_crystals()
    types = {"nothing": pa.float64()}
    pq.write_table(pa.table({name: pa.array(values, type=types.get(name)) for name, values in rows.items()}), path)
    return path


@pytest.fixture(scope="session")
def vae_run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "run"
    run(VAE, "--dataset_name", dataset, *TRAIN_VAE, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def cache_flags(dataset, vae_run):
    return [
        *("--modality", "crystal", "--dataset_name", dataset, "--pretrained_vae_model_name_or_path", vae_run),
        *("--max_atoms", MAX_ATOMS, "--num_translations", 3, "--rows_per_shard", 16, "--encode_batch_size", 8),
    ]


@pytest.fixture(scope="session")
def caches(cache_flags, tmp_path_factory):
    """Of the splits train and val."""
    folder = tmp_path_factory.mktemp("caches")
    for split in ("train", "val"):
        run(CACHE, *cache_flags, "--dataset_split", split, "--latents_dir", folder / split)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def ldm_flags(caches, tmp_path_factory):
    """Of a tiny denoiser, without --output_dir."""
    config = tmp_path_factory.mktemp("model") / "dit.json"
    config.write_text(json.dumps(DIT_CONFIG))
    return ["--latents_dir", caches["train"], *TRAIN_LDM, "--model_config", config]


@pytest.fixture(scope="session")
def evaluated(caches):
    return ["--eval_steps", 4, "--validation_latents_dir", caches["val"]]


@pytest.fixture(scope="session")
def conditional(ldm_flags, evaluated, tmp_path_factory):
    """A finished run of v-prediction with three conditions; and what it said."""
    folder = tmp_path_factory.mktemp("conditional") / "run"
    return folder, run(LDM, *ldm_flags, *CONDITIONS, *evaluated, "--output_dir", folder).stderr


@pytest.fixture(scope="session")
def unconditional(ldm_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "run"
    run(LDM, *ldm_flags, "--prediction_type", "flow", "--max_train_steps", 30, "--output_dir", folder)
    return folder


@pytest.fixture
def sample(runs, tmp_path, monkeypatch):
    """A function that runs sample.py in this process and returns the crystals it left behind."""
    numbers = iter(range(1000))

    def call(model: str, **flags) -> list[Crystal]:
        out = tmp_path / f"out{next(numbers)}"
        monkeypatch.setattr(sys, "argv", ["sample.py", *words(runs / model, output_dir=out, **flags)])
        script.main(script.parse_args())
        call.folder = out
        return read_samples(out)[0]

    return call


@pytest.fixture(scope="session")
def tuned(runs) -> Path:
    """`plain` with adapters and a condition."""
    base, denoiser = load_run(runs / "plain").denoiser, make_denoiser(GAP)
    new_modules = lora.start_from(denoiser, base, "--lora")
    lora.add_lora(denoiser, 2, new_modules=new_modules, base="plain")
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    export_run(runs / "tuned", denoiser, make_pipeline(denoiser))
    return runs / "tuned"
