"""Losses of image autoencoders: how far a reconstruction is, how far the posterior, and what a discriminator says.

Images are (B, 3, H, W) in [-1, 1]; every loss is a mean over the batch, so that micro-batches add up to a batch.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss}
MAX_SCALES = 4


def multi_scale_gradient_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical derivatives of two images, at full size and at up to
    three halvings. It sees edges, which L1 and MSE alone let blur, and needs no weights.

    Source: Li and Snavely 2018, MegaDepth, arXiv 1804.00607, equation 4.
    """
    difference = reconstruction - images  # derivatives are linear: those of the difference are the differences
    total, scales = difference.new_zeros(()), 0
    while scales < MAX_SCALES and min(difference.shape[-2:]) >= 2:
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        difference = F.avg_pool2d(difference, 2)
        scales += 1
    return total / max(scales, 1)


class FitLoss:
    """What pulls a reconstruction to its image: the error per pixel, and perceptual terms where they have a weight.

    `lpips` maps two batches of images to (B,) distances; it may be None where its weight is 0.
    """

    def __init__(
        self,
        reconstruction_loss: str,
        gradient_weight: float,
        lpips_weight: float,
        lpips: Callable[[Tensor, Tensor], Tensor] | None,
    ):
        self.pixel_loss = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.gradient_weight, self.lpips_weight, self.lpips = gradient_weight, lpips_weight, lpips

    def __call__(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and its terms without their weights."""
        terms = {"reconstruction_loss": self.pixel_loss(reconstruction, images)}
        loss = terms["reconstruction_loss"]
        if self.gradient_weight:
            terms["gradient_loss"] = multi_scale_gradient_loss(reconstruction, images)
            loss = loss + self.gradient_weight * terms["gradient_loss"]
        if self.lpips_weight and self.lpips is not None:
            terms["lpips"] = self.lpips(reconstruction, images).mean()
            loss = loss + self.lpips_weight * terms["lpips"]
        return loss, terms


# The hinge loss (Lim & Ye 2017, arXiv 1705.02894), as VQGAN and LDM use it.


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Falls as the discriminator takes reconstructions for images."""
    return -fake_logits.mean()


def discriminator_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(loss on images, loss on reconstructions); the discriminator's is the mean of the two."""
    return F.relu(1 - real_logits).mean(), F.relu(1 + fake_logits).mean()


# name -> (torchvision's weights, pattern of its file)
NETWORKS = {
    "vgg": ("VGG16_Weights", "vgg16-*.pth"),
    "alex": ("AlexNet_Weights", "alexnet-*.pth"),
}
INSTEAD = "or leave --lpips_weight out and use --gradient_weight 1, which needs no weights"


def load_lpips(network: str, weights: str | None, device: torch.device) -> nn.Module:
    """LPIPS on `network` ("vgg" as in LDM, or "alex"): two batches of images (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).

    `weights` is torchvision's file, or a folder that holds it; None downloads it once, as torchvision does. Raises
    UserError, which says what is missing and how to get it.
    """
    try:
        import lpips
    except ImportError as error:
        raise UserError(f"--lpips_weight needs the package lpips: pip install lpips; {INSTEAD}") from error
    state = read_weights(network, weights) if weights else download_weights(network)
    with warnings.catch_warnings():  # the package calls torchvision as one did before its version 0.13
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    copy_trunk(model.net, state, f"--lpips_weights {weights}" if weights else "--lpips_weight")
    return model.to(device).eval().requires_grad_(False)


def read_weights(network: str, weights: str) -> dict[str, Tensor]:
    """torchvision's weights from a file, or from the folder it lies in. Raises UserError."""
    path, pattern = Path(weights), NETWORKS[network][1]
    if path.is_dir():
        found = sorted(path.glob(pattern))
        if len(found) != 1:
            raise UserError(
                f"--lpips_weights: the folder {path} holds {len(found)} files {pattern}, expected one; name the file"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"--lpips_weights: {path} does not exist; expected torchvision's {pattern}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"--lpips_weights: {path} cannot be read: {reason}; expected torchvision's {pattern}"
        ) from error


def download_weights(network: str) -> dict[str, Tensor]:
    """torchvision's weights, from its cache or the network. Raises UserError where neither has them."""
    import torchvision

    url = getattr(torchvision.models, NETWORKS[network][0]).IMAGENET1K_V1.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True)
    except Exception as error:  # urllib's, or that of a hash that does not fit
        raise UserError(
            f"--lpips_weight: the weights of {network} cannot be downloaded ({error}); put {url} on this machine and "
            f"name it with --lpips_weights FILE, {INSTEAD}"
        ) from error


def copy_trunk(trunk: nn.Module, state: dict[str, Any], flag: str) -> None:
    """Copies torchvision's `features.N.*` into LPIPS's slices, whose layers kept their numbers N. Raises UserError."""
    wanted = {name: f"features.{name.partition('.')[2]}" for name in trunk.state_dict()}
    for name, source in wanted.items():
        shape = tuple(trunk.state_dict()[name].shape)
        found = state.get(source) if isinstance(state, dict) else None
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            what = "nothing" if not isinstance(found, Tensor) else f"shape {tuple(found.shape)}"
            raise UserError(
                f"{flag}: expected {source} of shape {shape}, found {what}; give the weights of --lpips_net"
            )
    trunk.load_state_dict({name: state[source] for name, source in wanted.items()})
