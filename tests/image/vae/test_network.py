"""The presets of the image autoencoder, their shapes, and diffusers' reading of them."""

import importlib
import json
import logging
import sys

import pytest
import torch
from diffusers import AutoencoderKL

from tests.support.processes import ROOT
from tests.support.vaes import autoencoder, images
from utils.image import codec as codecs
from utils.image.vae import training as vae_training
from utils.image.vae.network import VAE_PRESETS, TrainableVAE, build_vae
from utils.latents import spec


def test_sd_preset_is_sd_vae_ft_mse():
    """Its config.json on the hub, and its 83,653,863 parameters."""
    with torch.device("meta"):
        vae = build_vae("sd", 256)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    published = {
        "act_fn": "silu",
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    stock = dict(AutoencoderKL.from_config(published).config) | {"scaling_factor": 1.0}
    ours = dict(vae.config)
    for config in (stock, ours):
        config.pop("_use_default_values", None)
    assert ours == stock


@pytest.mark.parametrize(("preset", "shape"), [("fast", (4, 8, 8)), ("small", (4, 8, 8)), ("base", (4, 4, 4))])
def test_latent_shapes(preset, shape):
    model = TrainableVAE(build_vae(preset, 32))
    batch = images(1, 32)
    assert model.latent_shape(batch) == (1, *shape)
    with torch.no_grad():
        assert model.vae.encode(batch).latent_dist.mean.shape == (1, *shape)


def test_stock_diffusers_loads_the_measured_vae(tmp_path, caplog):
    """No warning; and what the trainers normalise, a StableDiffusionPipeline's decoder undoes: latents / scaling_factor
    on the folded VAE that an export holds, and latents / scaling_factor + shift_factor on this one."""
    from diffusers.utils import logging as diffusers_logging

    vae = autoencoder().vae.eval()
    sums = vae_training.PosteriorSums()
    with torch.no_grad():
        encoded = vae.encode(images(8)).latent_dist
    sums.add(encoded.mean, encoded.logvar)
    statistics = sums.statistics()
    shift, scaling = statistics.shift_and_scaling
    vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    vae_training.save_vae(vae, statistics, tmp_path)
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert caplog.records == []
    saved = json.loads((tmp_path / vae_training.STATISTICS_FILE).read_text())
    assert len(saved["mean"]) == len(saved["std"]) == 4

    normalisation = spec.Normalisation.of_vae(loaded.config, 4)
    with torch.no_grad():
        raw = loaded.encode(images(2)).latent_dist.mean
        expected = loaded.decode(raw).sample
        latents = normalisation.normalise(raw)
        undone = loaded.decode(latents / loaded.config.scaling_factor + loaded.config.shift_factor).sample
        folded = codecs.fold_normalisation(loaded, normalisation)
        torch.testing.assert_close(undone, expected, atol=1e-4, rtol=1e-4)
        again = folded.decode(latents / folded.config.scaling_factor).sample
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


RECIPES = [path for path in sorted(ROOT.glob("configs/*_vae.yaml")) if "resolution:" in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_accepted(monkeypatch, path):
    train_image_vae = importlib.import_module("train_image_vae")
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(path), "--output_dir", "o"])
    args = train_image_vae.parse_args()
    assert args.resolution % 2 ** (len(VAE_PRESETS[args.vae_size].block_out_channels) - 1) == 0
