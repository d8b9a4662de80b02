"""The help of the scripts of crystals, and their recipes."""

import importlib
import sys

import pytest
import yaml

from tests.support.crystals.runs import BASE, CACHE, LDM, VAE
from tests.support.processes import ROOT, run
from utils.models.dit import DiT

HELP = {
    (VAE,): ["--dataset_name", "--max_atoms", "--latent_channels", "--kl_weight", "--random_translation", "--use_ema"],
    (CACHE, "--modality", "crystal"): ["--num_translations", "--max_atoms", "--encode_batch_size", "--latents_dir"],
    (LDM,): ["--condition", "--cond_drop_prob", "--early_stopping_patience", "--lora_rank", "--prediction_type",
             "--validation_guidance_scale", "--model_size", BASE],
}  # fmt: skip


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_lists_the_flags(command):
    text = run(*command, "--help").stdout
    assert all(flag in text for flag in (*HELP[command], "--config", "--seed")), text


RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("crystal/*.yaml"))}


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_model")])
def test_recipes_are_accepted(monkeypatch, name):
    """By the script that their name says; a model's own file by the model."""
    script = importlib.import_module("train_crystal_vae" if name.endswith("_vae") else "train_crystal_ldm")
    flags = ["--config", str(RECIPES[name]), "--output_dir", "o"]
    flags += (
        ["--dataset_name", "d"] if name.endswith("_vae") else ["--latents_dir", "l", "--validation_latents_dir", "v"]
    )
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    args = script.parse_args()
    if not name.endswith("_vae"):
        config = yaml.safe_load((ROOT / args.model_config).read_text())
        assert DiT(latent_kind="set", patch_size=1, **config).config.hidden_size == config["hidden_size"]
