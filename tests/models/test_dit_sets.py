"""The DiT's mode for sets: padding is not read, items have no order, and grids have the same parameters."""

import pytest
import torch

from tests.support.crystals.models import SIZES
from tests.support.crystals.sets import (
    CHANNELS,
    CLOSE,
    MAX_ATOMS,
    TINY_DIT,
    WIDTH,
    normals,
    permuted,
    set_dit,
    shuffles,
)
from utils.diffusion.objectives import OBJECTIVES, training_scheduler
from utils.models.dit import STYLES, DiT


@pytest.mark.parametrize("kind", ["flow", "v_prediction"])
@pytest.mark.parametrize("style", STYLES)
def test_the_dit_does_not_see_padding(style, kind):
    dit, objective = set_dit(style), OBJECTIVES[kind](training_scheduler(kind))
    mask = torch.arange(MAX_ATOMS) < torch.tensor(SIZES)[:, None]
    latents, noise = normals(len(SIZES), MAX_ATOMS, CHANNELS), normals(len(SIZES), MAX_ATOMS, CHANNELS, seed=1)
    timesteps = torch.tensor([3, 400, 700, 990])

    def loss_and_prediction(latents, noise, mask, timesteps):
        noisy = objective.add_noise(latents, noise, timesteps)
        prediction = dit(noisy, timesteps, attention_mask=mask).sample
        target = objective.target(latents, noise, timesteps)
        return objective.sample_losses(prediction, target, timesteps, mask), prediction

    with torch.no_grad():
        losses, found = loss_and_prediction(latents, noise, mask, timesteps)
        others = torch.where(mask[..., None], latents, 1e6)
        poisoned_losses, poisoned = loss_and_prediction(others, noise, mask, timesteps)
        torch.testing.assert_close(poisoned[mask], found[mask], **CLOSE)
        torch.testing.assert_close(poisoned_losses, losses, **CLOSE)
        for row, size in enumerate(SIZES):
            part = (slice(row, row + 1), slice(size))
            loss, alone = loss_and_prediction(latents[part], noise[part], mask[part], timesteps[row : row + 1])
            torch.testing.assert_close(alone[0], found[row, :size], **CLOSE)
            torch.testing.assert_close(loss[0], losses[row], **CLOSE)
        assert not torch.allclose(found[1], dit(latents, timesteps).sample[1], **CLOSE)  # the noise is seen
        unmasked = dit(objective.add_noise(latents, noise, timesteps), timesteps).sample
        assert (unmasked[0, :5] - found[0, :5]).abs().max() > 1e-3  # and so would padding be


@pytest.mark.parametrize("style", STYLES)
def test_items_have_no_order_for_the_dit(style):
    dit, order = set_dit(style), shuffles(len(SIZES), MAX_ATOMS)
    mask = torch.arange(MAX_ATOMS) < torch.tensor(SIZES)[:, None]
    latents, timesteps = normals(len(SIZES), MAX_ATOMS, CHANNELS), torch.tensor([3, 400, 700, 990])
    with torch.no_grad():
        expected = permuted(dit(latents, timesteps, attention_mask=mask).sample, order)
        found = dit(permuted(latents, order), timesteps, attention_mask=permuted(mask, order)).sample
    mask = permuted(mask, order)
    torch.testing.assert_close(found[mask], expected[mask], **CLOSE)


def test_impossible_sets_are_refused():
    with pytest.raises(ValueError, match="patch_size 2: a set has no patches"):
        DiT(**TINY_DIT | {"patch_size": 2}, latent_kind="set")
    with pytest.raises(ValueError, match="latent_kind list is none of grid, set"):
        DiT(**TINY_DIT, latent_kind="list")


@pytest.mark.parametrize("style", STYLES)
def test_gradient_checkpointing_of_sets_changes_nothing(style):
    dit = set_dit(style, projection_class_embeddings_input_dim=WIDTH).train()
    mask = torch.arange(MAX_ATOMS) < torch.tensor(SIZES)[:, None]
    latents, timesteps = normals(len(SIZES), MAX_ATOMS, CHANNELS), torch.tensor([3, 400, 700, 990])
    gradients = []
    for is_on in (False, True):
        dit.enable_gradient_checkpointing() if is_on else dit.disable_gradient_checkpointing()
        dit.zero_grad()
        pooled = normals(len(SIZES), WIDTH, seed=4)
        dit(latents, timesteps, class_labels=pooled, attention_mask=mask).sample[mask].square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in dit.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("style", STYLES)
def test_grids_and_sets_have_the_same_parameters(style):
    """By the names that runs before sets had: what was saved then still loads."""
    grid, of_set = (DiT(**TINY_DIT, sample_size=4, style=style, latent_kind=kind) for kind in ("grid", "set"))
    shapes = [{name: tuple(values.shape) for name, values in each.state_dict().items()} for each in (grid, of_set)]
    assert shapes[0] == shapes[1]
    outside = {name for name in shapes[0] if not name.startswith("blocks.")}
    layers = ("patch_embed", "time_embed.0", "time_embed.2", "adaln_out", "proj_out")
    assert outside == {f"{layer}.{end}" for layer in layers for end in ("weight", "bias")}
    assert DiT(**TINY_DIT, sample_size=4).config.latent_kind == "grid"


def test_sets_of_any_size_and_learned_variance():
    dit = set_dit(out_channels=2 * CHANNELS)
    assert dit(normals(2, 7, CHANNELS), torch.tensor([1, 2])).sample.shape == (2, 7, 2 * CHANNELS)
