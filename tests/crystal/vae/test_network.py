"""The autoencoder of crystals, against what it must not see (padding, the order of atoms), and its losses."""

import math

import numpy as np
import pytest
import torch

from tests.support.crystals.models import SIZES, TINY_VAE, batch_of, crystals, perfect
from tests.support.crystals.sets import CHANNELS, CLOSE, MAX_ATOMS, normals, permuted, shuffles
from utils.crystal.vae.network import CRYSTAL_VAE_SIZES, CrystalVAE, reconstruction_losses, scaled_lengths

# ---- padding ---------------------------------------------------------------------------------------------------------
# What is promised: padding that is finite, whatever it holds, is not read. NaN there is not promised to be harmless, for
# attention gives it the weight zero, and zero times NaN is NaN; the data and the samplers put no NaN there.


@pytest.mark.parametrize("row", range(len(SIZES)))
def test_the_autoencoder_does_not_see_padding(vae, row):
    """A crystal alone, beside others, and with garbage in the padding: the same posterior, prediction and losses."""
    size, chosen = SIZES[row], crystals()
    alone, beside = batch_of([chosen[row]], size), batch_of(chosen, MAX_ATOMS)
    noise = normals(len(SIZES), MAX_ATOMS, CHANNELS)
    poisoned, poisoned_noise = {name: values.clone() for name, values in beside.items()}, noise.clone()
    padding = ~beside["attention_mask"]
    poisoned["atomic_numbers"][padding] = 77
    poisoned["frac_coords"][padding] = 1e6
    poisoned_noise[padding] = 1e6
    with torch.no_grad():
        expected, posterior = vae(alone, noise[row : row + 1, :size])
        losses = reconstruction_losses(expected, **alone)
        for batch, its_noise in ((beside, noise), (poisoned, poisoned_noise)):
            found, its_posterior = vae(batch, its_noise)
            for mine, its in zip((*expected[:2], *posterior), (*found[:2], *its_posterior), strict=True):
                torch.testing.assert_close(its[row, :size], mine[0], **CLOSE)
            for mine, its in zip(expected[2:], found[2:], strict=True):
                torch.testing.assert_close(its[row], mine[0], **CLOSE)
            for name, loss in reconstruction_losses(found, **batch).items():
                torch.testing.assert_close(loss[row : row + 1], losses[name], **CLOSE)


def test_losses_do_not_see_predictions_at_padding():
    batch = batch_of(crystals(), MAX_ATOMS)
    prediction = perfect(batch)
    expected = reconstruction_losses(prediction, **batch)
    padding = ~batch["attention_mask"]
    prediction.element_logits[padding] = 1e6
    prediction.frac_vectors[padding] = 1e6
    for name, loss in reconstruction_losses(prediction, **batch).items():
        assert torch.equal(loss, expected[name])


# ---- order and origin ------------------------------------------------------------------------------------------------


def test_atoms_have_no_order_for_the_autoencoder(vae):
    batch, noise = batch_of(crystals(), MAX_ATOMS), normals(len(SIZES), MAX_ATOMS, CHANNELS)
    order = shuffles(len(SIZES), MAX_ATOMS)  # which moves atoms among padding too
    moved = {
        name: permuted(values, order) if values.shape[1] == MAX_ATOMS else values for name, values in batch.items()
    }
    with torch.no_grad():
        prediction, posterior = vae(batch, noise)
        found, its_posterior = vae(moved, permuted(noise, order))
    mask = moved["attention_mask"]
    for mine, its in zip((*prediction[:2], *posterior), (*found[:2], *its_posterior), strict=True):
        torch.testing.assert_close(its[mask], permuted(mine, order)[mask], **CLOSE)
    for mine, its in zip(prediction[2:], found[2:], strict=True):
        torch.testing.assert_close(its, mine, **CLOSE)
    losses, its_losses = reconstruction_losses(prediction, **batch), reconstruction_losses(found, **moved)
    for name, loss in losses.items():
        torch.testing.assert_close(its_losses[name], loss, **CLOSE)


def test_the_truth_costs_nothing():
    batch = batch_of(crystals(), MAX_ATOMS)
    for loss in reconstruction_losses(perfect(batch), **batch).values():
        torch.testing.assert_close(loss, torch.zeros(len(SIZES)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("error", [0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_coordinates_cost_by_their_distance_on_the_circle(error):
    """2 - 2 cos(2 pi e) for an error of e in each coordinate, wherever the atom is: 0.01 and 0.99 are as far."""
    batch = batch_of(crystals(), MAX_ATOMS)
    wrong = batch | {"frac_coords": (batch["frac_coords"] + error) % 1.0}
    loss = reconstruction_losses(perfect(wrong), **batch)["coordinate"]
    expected = 2 - 2 * math.cos(2 * math.pi * error)
    torch.testing.assert_close(loss, torch.full((len(SIZES),), expected), rtol=1e-3, atol=1e-7)
    if error < 0.02:
        assert loss[0].item() == pytest.approx((2 * math.pi * error) ** 2, rel=0.01)
    mirrored = reconstruction_losses(perfect(batch | {"frac_coords": (batch["frac_coords"] - error) % 1.0}), **batch)[
        "coordinate"
    ]
    torch.testing.assert_close(mirrored, loss, rtol=1e-3, atol=1e-7)


def test_an_edge_is_no_edge():
    """0.995 for 0.005 costs what 0.505 costs for 0.515: one hundredth."""
    at_edge, inside = (batch_of([crystals()[2]._replace(frac_coords=np.full((1, 3), x))], 1) for x in (0.005, 0.515))
    costs = [
        reconstruction_losses(perfect(batch | {"frac_coords": torch.full((1, 1, 3), x)}), **batch)["coordinate"].item()
        for batch, x in ((at_edge, 0.995), (inside, 0.505))
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)
    assert costs[0] == pytest.approx((2 * math.pi * 0.01) ** 2, rel=0.01)


def test_one_wrong_atom_is_one_of_n():
    batch = batch_of(crystals(), MAX_ATOMS)
    coords, numbers = batch["frac_coords"].clone(), batch["atomic_numbers"].clone()
    coords[:, 0, 1] = (coords[:, 0, 1] + 0.5) % 1.0
    numbers[:, 0] = 119 - numbers[:, 0]
    losses = reconstruction_losses(perfect(batch | {"frac_coords": coords, "atomic_numbers": numbers}), **batch)
    torch.testing.assert_close(losses["coordinate"], 4 / (3 * torch.tensor(SIZES).float()), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["element"], 200 / torch.tensor(SIZES).float(), rtol=1e-4, atol=1e-6)


def test_elements_lengths_and_angles():
    """Nothing known of the elements: log 119 nats. d Angstrom too long: (d / n^(1/3))^2. Degrees become radians."""
    batch = batch_of(crystals(), MAX_ATOMS)
    prediction = perfect(batch)
    prediction.element_logits.zero_()
    prediction = prediction._replace(
        lengths=perfect(batch | {"lengths": batch["lengths"] + 0.7}).lengths,
        angles=perfect(batch | {"angles": batch["angles"] - torch.tensor([3.0, 0, 0])}).angles,
    )
    losses = reconstruction_losses(prediction, **batch)
    torch.testing.assert_close(losses["element"], torch.full((4,), math.log(119)))
    expected = torch.tensor([(0.7 / size ** (1 / 3)) ** 2 for size in SIZES])
    torch.testing.assert_close(losses["length"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["angle"], torch.full((4,), math.radians(3) ** 2 / 3), rtol=1e-3, atol=1e-7)


def test_the_same_density_has_the_same_scaled_lengths():
    """A cell of 2 x 2 x 2 smaller ones."""
    small, large = scaled_lengths(torch.tensor([[3.0, 4, 5], [6, 8, 10]]), torch.tensor([2, 16]))
    torch.testing.assert_close(small, large)


# ---- the autoencoder itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("small", 1.3), ("base", 6.7), ("large", 51)])
def test_autoencoders_are_as_large_as_their_flag_says(size, millions):
    with torch.device("meta"):
        model = CrystalVAE(**CRYSTAL_VAE_SIZES[size]._asdict())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


def test_autoencoders_save_and_load(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    batch = batch_of(crystals(), MAX_ATOMS)
    with torch.no_grad():
        assert torch.equal(CrystalVAE.from_pretrained(tmp_path).eval().encode(**batch).mean, vae.encode(**batch).mean)


def test_every_parameter_of_the_autoencoder_learns(vae):
    batch = batch_of(crystals(), MAX_ATOMS)
    model = CrystalVAE(**TINY_VAE)
    prediction, posterior = model(batch, normals(len(SIZES), MAX_ATOMS, CHANNELS))
    loss = sum(loss.sum() for loss in reconstruction_losses(prediction, **batch).values()) + posterior.mean.sum()
    loss.backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []
