"""How near images are to others, pixel by pixel: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PSNR = 100.0  # of images that are equal: a mean over images stays finite
K1, K2 = 0.01, 0.03
WINDOW, SIGMA = 11, 1.5


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images (B, C, H, W) in [0, 255] -> (B,)."""
    mse = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return (10 * (255**2 / mse.clamp(min=1e-12)).log10()).clamp(max=MAX_PSNR)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair of images (B, C, H, W) in [0, 255] -> (B,), the mean over channels and over
    the places where an 11 x 11 Gaussian window lies inside the image (a smaller one in images below 11 pixels).

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section
    III-B and its constants; equal to skimage's with gaussian_weights and use_sample_covariance=False.
    """
    x, y = (each.double().flatten(0, 1)[:, None] for each in (images, others))  # (B * C, 1, H, W)
    side = min(WINDOW, (min(images.shape[-2:]) - 1) // 2 * 2 + 1)
    kernel = gaussian_kernel(side, x.device)

    def local_mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, kernel[None, None, None]), kernel[None, None, :, None])

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).view(len(images), -1).mean(dim=1)


def gaussian_kernel(side: int, device: torch.device) -> Tensor:
    """(side,) float64 weights of a Gaussian with sigma 1.5, of sum 1."""
    distance = torch.arange(side, dtype=torch.float64, device=device) - side // 2
    weights = (-0.5 * (distance / SIGMA).square()).exp()
    return weights / weights.sum()
