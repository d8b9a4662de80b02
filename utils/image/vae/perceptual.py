"""LPIPS: a distance of images in the features of a network, near to what people see.

Source: Zhang et al. 2018, arXiv 1801.03924, by its authors' package `lpips`, which brings its own small weights; those
of the network below come from torchvision, as a local file or by its download.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

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
