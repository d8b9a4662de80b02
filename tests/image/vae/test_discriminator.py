"""The discriminator, against the one of pix2pix."""

import itertools

import pytest
import torch
from torch import nn

from tests.support.vaes import images
from utils.errors import UserError
from utils.image.vae import losses as vae_losses
from utils.image.vae.discriminator import PatchDiscriminator, build_discriminator


def test_discriminator_is_that_of_pix2pix():
    """C64-C128-C256-C512 of 4 x 4 convolutions and one more, and 70 x 70 pixels seen by each logit."""
    model = PatchDiscriminator()
    widths = [3, 64, 128, 256, 512, 1]
    convolutions = 16 * sum(a * b for a, b in itertools.pairwise(widths))
    biases, norms = 64 + 1, 2 * (128 + 256 + 512)
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + biases + norms == 2_765_633
    for layer in model.layers:
        if isinstance(layer, nn.GroupNorm):  # it sees the whole image, through two numbers a group
            layer.forward = lambda hidden_states: hidden_states
    pixels = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = model(pixels)
    assert logits.shape == (1, 1, 18, 18)
    logits[0, 0, 9, 9].backward()
    rows = pixels.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


def gradients_in_parts(model, parts):
    """The mean gradient of the discriminator's loss over micro-batches."""
    model.zero_grad()
    for real, fake in parts:
        logits = model(torch.cat([real, fake]))
        (sum(vae_losses.discriminator_losses(*logits.chunk(2))) / len(parts)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("norm", ["as it is", "batch norm"])
def test_micro_batches_are_one_batch(norm):
    """What the choice of the normalisation is for: batch norm fails it."""
    torch.manual_seed(0)
    model = build_discriminator(2, 8, 16)
    if norm == "batch norm":
        for index, layer in enumerate(model.layers):
            if isinstance(layer, nn.GroupNorm):
                model.layers[index] = nn.BatchNorm2d(layer.num_channels)
    real, fake = images(8), images(8, seed=1)
    whole = gradients_in_parts(model, [(real, fake)])
    split = gradients_in_parts(model, [(real[:4], fake[:4]), (real[4:], fake[4:])])
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5) == (norm == "as it is")


def test_discriminators_that_cannot_be_built():
    assert build_discriminator(3, 64, 24)(torch.zeros(1, 3, 24, 24)).numel() == 1
    with pytest.raises(UserError, match=r"--disc_num_layers 3: .* at least 24 pixels.*23"):
        build_discriminator(3, 64, 23)
    with pytest.raises(UserError, match="--disc_channels 12: expected a multiple of 8"):
        build_discriminator(2, 12, 64)


def test_discriminator_saves_and_loads(tmp_path):
    model = build_discriminator(2, 8, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(PatchDiscriminator.from_pretrained(tmp_path)(images()), model(images()))
