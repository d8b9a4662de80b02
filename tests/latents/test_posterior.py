"""Statistics of a posterior that is known."""

import math

import pytest
import torch

from utils.image.vae import training as vae_training
from utils.latents import posterior as latents_posterior


def posterior(count=4000, scale=(1.0, 2.0), noise=(0.1, 0.2), seed=0):
    """Means (N, 2, 2, 2) drawn with a std for each channel, about an offset for each position, and log-variances."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mean = offset + torch.tensor(scale).view(2, 1, 1) * torch.randn(count, 2, 2, 2, generator=generator)
    return mean, (2 * torch.tensor(noise).log()).view(2, 1, 1).expand(count, 2, 2, 2)


def statistics_of(mean, logvar, parts=3):
    sums = vae_training.PosteriorSums()
    for part in zip(mean.chunk(parts), logvar.chunk(parts), strict=True):
        sums.add(*part)
    return sums.statistics()


def test_statistics_of_a_known_posterior():
    mean, logvar = posterior()
    found = statistics_of(mean, logvar)
    assert found.num_samples == 4000
    assert found.mean == pytest.approx([2.5, 0.0], abs=0.05)
    assert found.std_of_mean == pytest.approx([1.0, 2.0], rel=0.03)  # the offsets of positions are not in it
    assert found.posterior_std == pytest.approx([0.1, 0.2])
    samples = mean.double() + (0.5 * logvar).exp() * torch.randn(mean.shape)
    assert found.std == pytest.approx(samples.std((0, 2, 3)).tolist(), rel=0.01)
    shift, scaling = found.shift_and_scaling
    normalised = (samples - shift) * scaling
    assert normalised.mean().item() == pytest.approx(0, abs=0.01)
    assert normalised.std().item() == pytest.approx(1, abs=0.01)
    assert found.kl == pytest.approx(latents_posterior.kl_to_standard_normal(mean, logvar).mean().item(), rel=1e-5)
    assert found.active_channels == 2
    assert found.faults() == []
    assert statistics_of(mean, logvar, parts=1).std == pytest.approx(found.std)


@pytest.mark.parametrize(
    ("scale", "noise", "active", "faults"),
    [
        ((1e-3, 1e-3), (1.0, 1.0), 0, ["posterior collapse"]),
        ((1e-3, 1.0), (1.0, 0.1), 1, ["only 1 of 2"]),
        ((0.05, 0.05), (1e-3, 1e-3), 2, []),  # small, but all signal
        ((100.0, 1.0), (0.1, 0.1), 2, ["variance blow-up: latents have a std of"]),
        ((1.0, 1.0), (500.0, 0.1), 1, ["only 1 of 2", "variance blow-up"]),
        ((math.nan, 1.0), (0.1, 0.1), 1, ["latents are not finite"]),
    ],
)
def test_faults_of_the_posterior_are_named(scale, noise, active, faults):
    found = statistics_of(*posterior(scale=scale, noise=noise))
    if not math.isnan(scale[0]):
        assert found.active_channels == active
    said = found.faults()
    assert len(said) == len(faults)
    assert all(expected in fault for expected, fault in zip(faults, said, strict=True))
