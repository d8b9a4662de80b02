"""A small image classifier: what evaluation measures with where neither Inception nor CLIP can be had."""

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


def conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """3 x 3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class Residual(nn.Module):
    """x + conv(conv(x))."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(conv(channels, channels), conv(channels, channels))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.branch(hidden_states)


class ImageClassifier(ModelMixin, ConfigMixin):
    """A residual network in the shape of ResNet-9: a level for each of `block_out_channels`, each at half the
    resolution of the one before and with a residual block on every second. Saves and loads as a diffusers model.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        resolution: int = 32,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 256),
        label_names: list[str] | None = None,
        test_accuracy: float | None = None,
    ):
        super().__init__()
        levels: list[nn.Module] = [conv(3, block_out_channels[0])]
        for i in range(1, len(block_out_channels)):
            levels += [conv(*block_out_channels[i - 1 : i + 1]), nn.MaxPool2d(2)]
            levels += [Residual(block_out_channels[i])] if i % 2 else []
        self.levels = nn.Sequential(*levels)
        self.head = nn.Linear(block_out_channels[-1], num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, D), D = block_out_channels[-1]: means over positions."""
        return self.levels(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, num_classes)."""
        return self.head(self.features(images))

    def loss(self, images: Tensor, class_labels: Tensor) -> Tensor:
        """Cross-entropy with label smoothing of 0.1 (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""
        return F.cross_entropy(self(images).float(), class_labels, label_smoothing=0.1)
