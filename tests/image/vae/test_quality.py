"""PSNR and SSIM against closed forms and scikit-image."""

import math

import numpy as np
import pytest
import torch

from tests.support.vaes import images
from utils.image.vae import training as vae_training
from utils.image.vae.quality import psnr, ssim


def bytes_of(batch):
    return vae_training.to_uint8(batch)


def test_psnr_in_closed_form():
    black = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    others = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (255, 10, 0)])
    expected = [0.0, 20 * math.log10(25.5), 100.0]
    assert psnr(black, others).tolist() == pytest.approx(expected)


def test_ssim_in_closed_form():
    """Of flat images only the luminance counts; a window fits into a small image too."""
    flat = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, flat + 50).item() == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    noisy = bytes_of(images(2, 8))
    assert ssim(noisy, noisy).tolist() == pytest.approx([1, 1])
    assert ssim(noisy, 255 - noisy).max() < 0.5


@pytest.mark.parametrize("side", [16, 33])
def test_ssim_and_psnr_are_those_of_skimage(side):
    from skimage import metrics

    first, second = bytes_of(images(3, 64)[..., :side, :side]), bytes_of(images(3, 64, seed=1)[..., :side, :side])
    second[2] = (first[2].int() + torch.randint(-9, 9, first[2].shape)).clamp(0, 255).byte()
    for ours_p, ours_s, a, b in zip(
        psnr(first, second), ssim(first, second), first.numpy(), second.numpy(), strict=True
    ):
        assert ours_p.item() == pytest.approx(metrics.peak_signal_noise_ratio(a, b))
        expected = metrics.structural_similarity(
            a, b, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ours_s.item() == pytest.approx(expected, abs=1e-6)


def test_pictures_hold_what_they_show():
    first, second = bytes_of(images(3)), bytes_of(images(3, seed=1))
    picture = vae_training.side_by_side(first, second)
    assert picture.shape == (32, 48, 3)
    assert np.array_equal(picture[16:, 32:], second[2].permute(1, 2, 0).numpy())
    assert bytes_of(torch.tensor([[[[math.nan, -1.0, 0.0, 1.0, 9.0]]]])).flatten().tolist() == [0, 0, 128, 255, 255]
