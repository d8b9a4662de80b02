"""A tiny autoencoder of crystals, and runs with random weights."""

from pathlib import Path

import pytest
import torch

from tests.support.crystals.models import TINY_VAE
from tests.support.crystals.random_runs import COLUMNS, GAP, SYSTEM, export_run, make_denoiser, make_pipeline, make_run
from tests.support.processes import with_random_weights
from utils.crystal.vae.network import CrystalVAE
from utils.diffusion.sampling import SAMPLERS


@pytest.fixture(scope="session")
def vae() -> CrystalVAE:
    torch.manual_seed(0)
    return with_random_weights(CrystalVAE(**TINY_VAE))


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: `plain` (unconditional), `asked` (three conditions), `system` (the fourth), both of flow; `v`
    (v-prediction), `variance` (learned, epsilon); and `images`, which only looks like one."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "plain", {})
    make_run(folder / "asked", COLUMNS)
    make_run(folder / "system", SYSTEM)
    make_run(folder / "v", GAP, "v_prediction")
    denoiser = make_denoiser(GAP, learned_variance=True)
    pipeline = make_pipeline(denoiser, "epsilon")
    pipeline.scheduler = SAMPLERS["ddpm"].from_config(pipeline.scheduler.config, variance_type="learned_range")
    export_run(folder / "variance", denoiser, pipeline)
    for name in ("unet", "vae", "scheduler"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "config.json").write_text("{}")
    (folder / "images" / "model_index.json").write_text("{}")
    return folder
