"""The help of the scripts of cells."""

import pytest

from tests.support.cells.runs import BASE, CACHE, LDM, VAE
from tests.support.processes import run

anndata = pytest.importorskip("anndata")
sc = pytest.importorskip("scanpy")

HELP = {
    (VAE,): ["--dataset_name", "--library", "--likelihood", "--batch_column", "--kl_weight", "--low_memory"],
    (CACHE, "--modality", "expression"): ["--split", "--counts_layer", "--encode_batch_size", "--latents_dir"],
    (LDM,): ["--condition", "--joint_vae", "--joint_latents", "--architecture", "--prediction_type", BASE],
}


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_lists_the_flags(command):
    text = run(*command, "--help").stdout
    assert all(flag in text for flag in (*HELP[command], "--config", "--seed")), text
