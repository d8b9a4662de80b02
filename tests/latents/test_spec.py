"""Normalisation of latents."""

import numpy as np
import pytest
import torch

from tests.support.vaes import PER_CHANNEL
from utils.latents.spec import Normalisation

# Normalisation


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 7, 4), (5, 4)])
def test_normalisation_round_trip(shape):
    """(raw - mean) / std by channel, in float64, and back, for grids (B, C, H, W), sets (B, N, C) and vectors (B, C),
    and for half-precision caches."""
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    normalised = PER_CHANNEL.normalise(raw)
    axes = (1, -1, 1, 1) if len(shape) == 4 else (-1,)
    mean, std = np.reshape(PER_CHANNEL.mean, axes), np.reshape(PER_CHANNEL.std, axes)
    np.testing.assert_allclose(normalised.numpy(), (raw.double().numpy() - mean) / std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(PER_CHANNEL.denormalise(normalised), raw, rtol=1e-5, atol=1e-5)
    half = PER_CHANNEL.normalise(raw.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, PER_CHANNEL.normalise(raw.half().float()))


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"scaling_factor": 0.18215}, 0.0, 1 / 0.18215),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 1 / 0.3611),
        ({"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}, 0, 1 / 0.18215),
        ({}, 0.0, 1.0),
    ],
)
def test_normalisation_of_a_vae(config, mean, std):
    """The config's factors mean what StableDiffusion's pipelines do: (raw - shift_factor) * scaling_factor."""
    normalisation = Normalisation.of_vae(config, 2)
    raw = torch.randn(3, 2, 4, 4)
    truth = (raw - (config.get("shift_factor") or 0)) * config.get("scaling_factor", 1)
    torch.testing.assert_close(normalisation.normalise(raw), truth)
    assert normalisation.mean == pytest.approx((mean, mean))
    assert normalisation.std == pytest.approx((std, std))


def test_normalisation_of_a_vae_with_statistics():
    """`latents_mean` and `latents_std`, flat or as (1, C, 1, 1), are taken per channel."""
    for wrap in (list, lambda values: [[[[v]] for v in values]]):
        config = {"scaling_factor": 0.5, "latents_mean": wrap([1.0, -2.0]), "latents_std": wrap([3.0, 4.0])}
        normalisation = Normalisation.of_vae(config, 2)
        assert normalisation == Normalisation((1.0, -2.0), (3.0, 4.0))


def test_plain_scaling():
    """One factor without a shift is plain, anything else is not."""
    assert Normalisation((0.0, 0.0), (5.5, 5.5)).is_plain_scaling()
    assert not Normalisation((0.0, 0.1), (5.5, 5.5)).is_plain_scaling()
    assert not Normalisation((0.0, 0.0), (5.5, 5.6)).is_plain_scaling()
