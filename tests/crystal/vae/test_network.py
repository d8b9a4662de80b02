"""Crystals as sets: what is padded, permuted or translated changes nothing, losses and decoding are what they should be
by hand, and each condition has its own null.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tests.support.processes import with_random_weights
from utils.crystal.codec import assigned, crystals_of
from utils.crystal.data.table import crystal_batch, make_table, translated
from utils.crystal.pipeline import CrystalPipeline
from utils.crystal.structure import MAX_ATOMIC_NUMBER, Crystal, cell_matrix, cell_parameters
from utils.crystal.vae.network import (
    CRYSTAL_VAE_SIZES,
    CrystalPrediction,
    CrystalVAE,
    frac_vectors,
    reconstruction_losses,
    scaled_lengths,
)
from utils.diffusion import sampling
from utils.diffusion.conditions import COLUMN_CONDITIONS, ColumnCondition, ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser, draw_drops
from utils.diffusion.objectives import OBJECTIVES, training_scheduler
from utils.diffusion.sampling import sampling_scheduler
from utils.draws import SampleDraws
from utils.latents.spec import Normalisation
from utils.models.dit import STYLES, DiT

MAX_ATOMS, CHANNELS, WIDTH = 20, 4, 32
SIZES = (5, 20, 1, 8)  # atoms of the crystals below
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TINY_VAE = {"hidden_size": WIDTH, "num_layers": 2, "num_attention_heads": 2, "latent_channels": CHANNELS}
TINY_DIT = {"num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "patch_size": 1, "in_channels": CHANNELS}


def crystals() -> list[Crystal]:
    """Of `SIZES` atoms in skew cells, anywhere in them."""
    generator = np.random.default_rng(0)
    return [
        Crystal(
            generator.integers(1, MAX_ATOMIC_NUMBER + 1, size),
            generator.random((size, 3)),
            cell_matrix(generator.uniform(3, 9, 3), generator.uniform(70, 110, 3)),
        )
        for size in SIZES
    ]


def batch_of(chosen: list[Crystal], size: int) -> dict[str, Tensor]:
    return crystal_batch(make_table(chosen, max_atoms=size), np.arange(len(chosen)))


@pytest.fixture(scope="module")
def vae() -> CrystalVAE:
    torch.manual_seed(0)
    return with_random_weights(CrystalVAE(**TINY_VAE))


def set_dit(style: str = "modern", **settings) -> DiT:
    torch.manual_seed(1)
    return with_random_weights(
        DiT(**TINY_DIT | {"latent_kind": "set", "sample_size": MAX_ATOMS} | settings, style=style)
    )


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def permuted(values: Tensor, order: Tensor) -> Tensor:
    """`values` (B, N, ...) with the items of each row in `order` (B, N)."""
    return torch.stack([row[places] for row, places in zip(values, order, strict=True)])


def shuffles(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])


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


COLUMNS = {
    "band_gap": {"kind": "property", "mean": 1.5, "std": 0.5},
    "composition": {"kind": "composition", "num_elements": 5},
    "spacegroup": {"kind": "class", "names": ["1", "225"]},
}
VALUES = {
    "band_gap": torch.tensor([1.0, 2.5, math.nan, 0.0]),
    "composition": torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.25, 0.75], [0.0] * 5]),
    "spacegroup": torch.tensor([0, 1, -1, 1]),
}


def pipeline_of(vae: CrystalVAE, kind: str, max_atoms: int, columns: dict) -> CrystalPipeline:
    dit = set_dit(sample_size=max_atoms, projection_class_embeddings_input_dim=WIDTH if columns else None)
    torch.manual_seed(2)
    conditions = with_random_weights(ConditionSum(WIDTH, columns)) if columns else NoCondition()
    normalisation = Normalisation((0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5))
    scheduler = sampling_scheduler(training_scheduler(kind))
    return CrystalPipeline(ConditionalDenoiser(dit, conditions).eval(), scheduler, vae, normalisation, {5: 2, 8: 1})


def same_crystals(found: list[Crystal], expected: list[Crystal]) -> None:
    for mine, its in zip(found, expected, strict=True):
        assert mine.atomic_numbers.tolist() == its.atomic_numbers.tolist()
        difference = mine.frac_coords - its.frac_coords
        assert np.abs(difference - np.round(difference)).max() < 1e-4
        np.testing.assert_allclose(mine.lattice, its.lattice, atol=1e-4)


@pytest.mark.parametrize("columns", [{}, COLUMNS], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("kind", ["flow", "v_prediction", "epsilon"])
def test_a_sample_is_its_own(vae, monkeypatch, kind, columns):
    """Alone or beside others, with other noise in the padding, and from a run with less room for padding."""
    pipeline = pipeline_of(vae, kind, MAX_ATOMS, columns)
    num_atoms = torch.tensor(SIZES)
    noise = {}

    def sample(rows, pipeline=pipeline):
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        values = {name: VALUES[name][list(rows)] for name in columns}
        latents = pipeline.latents(num_atoms[list(rows)], values, 4, 2.0, generator=generators)
        return latents, pipeline.decode(latents, num_atoms[list(rows)])

    together, expected = sample(range(len(SIZES)))
    for row, size in enumerate(SIZES):
        assert len(expected[row].atomic_numbers) == size
        latents, alone = sample([row])
        torch.testing.assert_close(latents[0], together[row], rtol=1e-4, atol=1e-4)
        same_crystals(alone, expected[row : row + 1])

    draw = sampling.randn_tensor
    noise[MAX_ATOMS] = draw(
        (1, MAX_ATOMS, CHANNELS), generator=[torch.Generator().manual_seed(100)], device=torch.device("cpu")
    )
    poisoned = noise[MAX_ATOMS].clone()
    poisoned[:, SIZES[0] :] = 1e3
    for its_noise in (poisoned, noise[MAX_ATOMS][:, : SIZES[0] + 2]):
        monkeypatch.setattr(sampling, "randn_tensor", lambda *_, noise=its_noise, **__: noise.clone())
        room = its_noise.shape[1]
        latents, found = sample([0], pipeline_of(vae, kind, room, columns))
        torch.testing.assert_close(latents[0, : SIZES[0]], together[0, : SIZES[0]], rtol=1e-4, atol=1e-4)
        same_crystals(found, expected[:1])


def test_the_denoiser_hands_the_mask_on(vae):
    """With conditions, and two drops of different shapes."""
    denoiser = pipeline_of(vae, "flow", MAX_ATOMS, COLUMNS).denoiser
    mask = torch.arange(MAX_ATOMS) < torch.tensor(SIZES)[:, None]
    latents, timesteps = normals(len(SIZES), MAX_ATOMS, CHANNELS), torch.tensor([3, 400, 700, 990])
    with torch.no_grad():
        for drop in (torch.tensor([True, False, False, True]), torch.rand(len(SIZES), len(COLUMNS)) < 0.5):
            found = denoiser(latents, timesteps, VALUES | {"attention_mask": mask}, drop)
            for row, size in enumerate(SIZES):
                part = slice(row, row + 1)
                values = {name: value[part] for name, value in VALUES.items()} | {"attention_mask": mask[part, :size]}
                alone = denoiser(latents[part, :size], timesteps[part], values, drop[part])
                torch.testing.assert_close(alone[0], found[row, :size], **CLOSE)


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


def nearest_images(crystal: Crystal) -> np.ndarray:
    """Distances (n, n) by brute force over 5 x 5 x 5 cells."""
    cells = np.array(list(itertools.product(range(-2, 3), repeat=3)))
    difference = crystal.frac_coords[:, None] - crystal.frac_coords[None]
    return np.linalg.norm((difference[:, :, None] + cells) @ crystal.lattice, axis=-1).min(axis=-1)


def test_a_translation_moves_no_atom_against_another():
    batch = batch_of(crystals(), MAX_ATOMS)
    draws = SampleDraws(0, torch.arange(len(SIZES)))
    moved = translated(batch["frac_coords"], draws)
    assert torch.equal(moved, translated(batch["frac_coords"], SampleDraws(0, torch.arange(len(SIZES)))))
    assert 0 <= moved.min() <= moved.max() < 1
    for row, crystal in enumerate(crystals()):
        coords = moved[row, : SIZES[row]].double().numpy()
        shift = (coords - crystal.frac_coords) % 1
        assert np.abs(np.exp(2j * np.pi * shift) - np.exp(2j * np.pi * shift[0])).max() < 1e-5  # one for all atoms
        np.testing.assert_allclose(
            nearest_images(crystal._replace(frac_coords=coords)), nearest_images(crystal), atol=1e-4
        )


def test_translations_are_uniform_and_of_the_position():
    """Means and variances of a uniform distribution, no correlation of axes, and no dependence on the batch."""
    zeros = torch.zeros(20_000, 1, 3)
    shifts = translated(zeros, SampleDraws(5, torch.arange(20_000)))[:, 0].double()
    assert (shifts.mean(dim=0) - 0.5).abs().max() < 0.01
    assert (shifts.var(dim=0) - 1 / 12).abs().max() < 0.003
    assert (torch.corrcoef(shifts.T) - torch.eye(3)).abs().max() < 0.03
    part = translated(zeros[:3], SampleDraws(5, torch.tensor([7, 19_999, 0])))[:, 0].double()
    assert torch.equal(part, shifts[[7, 19_999, 0]])


# ---- losses ----------------------------------------------------------------------------------------------------------


def perfect(batch: dict[str, Tensor], radius: float = 1.0) -> CrystalPrediction:
    """The prediction that says what a batch is, sure of its elements."""
    logits = torch.full((*batch["atomic_numbers"].shape, MAX_ATOMIC_NUMBER + 1), -100.0)
    logits.scatter_(2, batch["atomic_numbers"].long()[..., None], 100.0)
    lengths = scaled_lengths(batch["lengths"], batch["attention_mask"].sum(dim=1))
    return CrystalPrediction(logits, radius * frac_vectors(batch["frac_coords"]), lengths, batch["angles"].deg2rad())


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


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-3, 1.0, 50.0])
def test_crystals_come_back_from_their_prediction(radius):
    batch = batch_of(crystals(), MAX_ATOMS)
    found = crystals_of(perfect(batch, radius), batch["attention_mask"])
    for mine, its in zip(found, crystals(), strict=True):
        assert mine.atomic_numbers.tolist() == its.atomic_numbers.tolist()
        difference = mine.frac_coords - its.frac_coords
        assert np.abs(difference - np.round(difference)).max() < 1e-5
        assert 0 <= mine.frac_coords.min() <= mine.frac_coords.max() < 1
        for ours, theirs in zip(cell_parameters(mine.lattice), cell_parameters(its.lattice), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_all_around_the_circle():
    """Every quadrant, both sides of the edge, and what rounds to it."""
    coords = torch.tensor([0.0, 1e-9, 0.01, 0.25, 0.4999, 0.5, 0.5001, 0.75, 0.99, 1 - 1e-7])
    vectors = frac_vectors(coords.double()).float()
    extra = torch.tensor([[1.0, -1e-12], [1.0, -0.0], [1.0, 0.0]])  # a hair before the edge, and on it
    vectors = torch.cat([vectors, extra])[:, None].expand(-1, 3, -1)[None]
    prediction = CrystalPrediction(torch.zeros(1, 13, 119), vectors, torch.ones(1, 3), torch.ones(1, 3))
    decoded = prediction.frac_coords()
    assert 0 <= decoded.min() <= decoded.max() < 1
    difference = decoded[0, :, 0].double() - torch.cat([coords.double(), torch.zeros(3)])
    assert (difference - difference.round()).abs().max() < 1e-6
    (crystal,) = crystals_of(prediction, torch.ones(1, 13, dtype=torch.bool))
    assert 0 <= crystal.frac_coords.min() <= crystal.frac_coords.max() < 1


def best_by_brute_force(log_probs: np.ndarray, counts: dict[int, int]) -> float:
    wanted = [number for number, count in counts.items() for _ in range(count)]
    sites = np.arange(len(wanted))
    return max(log_probs[sites, np.array(order) - 1].sum() for order in set(itertools.permutations(wanted)))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_assignment(seed):
    """Of all ways to hand the elements out; the most probable element of each site alone gives other counts."""
    generator = np.random.default_rng(seed)
    counts = [{8: 3, 26: 1, 3: 2}, {1: 1, 118: 1}, {22: 5}, {5: 2, 7: 2, 9: 2}, {38: 1, 22: 1, 8: 3}, {2: 1}][seed]
    log_probs = generator.normal(0, 2, (sum(counts.values()), MAX_ATOMIC_NUMBER))
    found = assigned(log_probs, counts)
    assert Counter(found.tolist()) == counts
    total = log_probs[np.arange(len(found)), found - 1].sum()
    assert total == pytest.approx(best_by_brute_force(log_probs, counts))


def test_impossible_elements_are_handed_out_last():
    """-inf where another way is left, and where none is; NaN everywhere."""
    log_probs = np.log(np.full((3, MAX_ATOMIC_NUMBER), 0.1))
    log_probs[0, 8 - 1] = -np.inf
    assert assigned(log_probs, {8: 2, 3: 1}).tolist() == [3, 8, 8]
    log_probs[:, 8 - 1] = -np.inf
    assert Counter(assigned(log_probs, {8: 2, 3: 1}).tolist()) == {8: 2, 3: 1}
    assert Counter(assigned(np.full((3, MAX_ATOMIC_NUMBER), np.nan), {8: 2, 3: 1}).tolist()) == {8: 2, 3: 1}


def test_clamped_crystals_have_their_composition():
    batch = batch_of(crystals(), MAX_ATOMS)
    counts = [{8: 3, 26: 2}, {1: 20}, {92: 1}, {3: 4, 9: 4}]
    prediction = perfect(batch)._replace(element_logits=normals(4, MAX_ATOMS, MAX_ATOMIC_NUMBER + 1))
    prediction.element_logits[..., 0] = 1e3  # that of padding, which never counts
    found = crystals_of(prediction, batch["attention_mask"], counts)
    assert [Counter(crystal.atomic_numbers.tolist()) for crystal in found] == counts
    assert all(crystal.atomic_numbers.min() > 0 for crystal in crystals_of(prediction, batch["attention_mask"]))


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("counts", [None, [{8: 3, 26: 2}, {1: 20}, {92: 1}, {3: 4, 9: 4}]])
def test_broken_predictions_are_crystals_all_the_same(value, counts):
    """What a diverged model gives decodes to something; whether it is valid is for others to say."""
    batch = batch_of(crystals(), MAX_ATOMS)
    prediction = perfect(batch)
    for tensor in prediction:
        tensor[:2] = value
    with np.errstate(all="ignore"):
        found = crystals_of(prediction, batch["attention_mask"], counts)
    assert [len(crystal.atomic_numbers) for crystal in found] == list(SIZES)
    for crystal in found:
        assert 1 <= crystal.atomic_numbers.min() <= crystal.atomic_numbers.max() <= MAX_ATOMIC_NUMBER
    if counts:
        assert [Counter(crystal.atomic_numbers.tolist()) for crystal in found] == counts


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


# ---- the DiT's mode for sets -----------------------------------------------------------------------------------------


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


# ---- conditions ------------------------------------------------------------------------------------------------------

# kind -> settings, values of which the last two are missing, and two that differ
KINDS = {
    "property": ({"mean": 1.5, "std": 0.5}, torch.tensor([1.0, 2.0, math.nan, math.inf])),
    "composition": ({"num_elements": 4}, torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1], [0.0] * 4, [0.0] * 4])),
    "chemical_system": ({"num_elements": 4}, torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1], [0.0] * 4, [0.0] * 4])),
    "class": ({"names": ["a", "b", "c"]}, torch.tensor([0, 2, -1, -1])),
}


def test_every_kind_is_tested():
    assert KINDS.keys() == COLUMN_CONDITIONS.keys()


@pytest.fixture(params=KINDS)
def kind(request):
    torch.manual_seed(0)
    settings, values = KINDS[request.param]
    return COLUMN_CONDITIONS[request.param](8, **settings), values


@torch.no_grad()
def test_null_where_dropped_or_missing(kind):
    condition, values = kind
    kept = condition(values, torch.zeros(4, dtype=torch.bool))
    assert torch.isfinite(kept).all()
    assert torch.equal(kept[2:], condition.null_embedding.expand(2, -1))
    assert (kept[0] - kept[1]).abs().max() > 1e-4
    assert all((row - condition.null_embedding).abs().max() > 1e-4 for row in kept[:2])
    dropped = condition(values, torch.tensor([True, False, True, False]))
    assert torch.equal(dropped[0], condition.null_embedding)
    assert torch.equal(dropped[1:], kept[1:])


def test_gradients_reach_every_parameter_and_are_finite(kind):
    """With missing values in the batch, whose embeddings are not used."""
    condition, values = kind
    condition(values, torch.zeros(4, dtype=torch.bool)).square().sum().backward()
    for name, parameter in condition.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_conditions_save_and_load(kind, tmp_path):
    condition, values = kind
    condition.save_pretrained(tmp_path)
    loaded = type(condition).from_pretrained(tmp_path)
    drop = torch.tensor([True, False, False, False])
    with torch.no_grad():
        assert torch.equal(loaded(values, drop), condition(values, drop))


@torch.no_grad()
def test_properties_are_standardised():
    """The same standardised value has the same embedding, whatever mean and std."""
    torch.manual_seed(0)
    plain = COLUMN_CONDITIONS["property"](8)
    scaled = COLUMN_CONDITIONS["property"](8, mean=-300.0, std=50.0)
    scaled.load_state_dict(plain.state_dict())
    drop, values = torch.zeros(3, dtype=torch.bool), torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(scaled(-300 + 50 * values, drop), plain(values, drop))
    assert (plain(values, drop) - plain(-300 + 50 * values, drop)).abs().max() > 1e-3


def columns_sum() -> ConditionSum:
    torch.manual_seed(0)
    return ConditionSum(WIDTH, COLUMNS)


@torch.no_grad()
def test_a_sum_of_conditions():
    """What each gives by itself, with a drop of all and of each; a name that is not given is null."""
    condition = columns_sum()
    encoders = dict(zip(COLUMNS, condition.encoders, strict=True))
    nulls = [encoder.null_embedding for encoder in encoders.values()]
    assert len({tuple(null.tolist()) for null in nulls}) == len(COLUMNS)
    drops = torch.tensor([[True, False, True], [False, True, False], [False, False, False], [True, True, True]])
    expected = sum(encoder(VALUES[name], drops[:, i]) for i, (name, encoder) in enumerate(encoders.items()))
    found = condition(VALUES, drops).pooled_projections
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[3], sum(nulls))
    assert condition(VALUES, drops).encoder_hidden_states is None
    every = torch.tensor([True, False, True, False])
    torch.testing.assert_close(
        condition(VALUES, every).pooled_projections,
        condition(VALUES, every[:, None].expand(-1, 3)).pooled_projections,
    )
    torch.testing.assert_close(condition(VALUES, every).pooled_projections[0], sum(nulls))
    none = torch.zeros(4, dtype=torch.bool)
    for i, name in enumerate(COLUMNS):
        rest = {key: value for key, value in VALUES.items() if key != name}
        alone = torch.zeros(4, 3, dtype=torch.bool)
        alone[:, i] = True
        torch.testing.assert_close(
            condition(rest, none).pooled_projections, condition(VALUES, alone).pooled_projections
        )
    torch.testing.assert_close(condition({}, none).pooled_projections, sum(nulls).expand(4, -1))


def test_gradients_reach_every_condition_of_a_sum():
    condition = columns_sum()
    condition(VALUES, torch.tensor([False, False, False, True])).pooled_projections.square().sum().backward()
    assert [name for name, each in condition.named_parameters() if each.grad is None or not each.grad.any()] == []


@pytest.mark.parametrize("names", [tuple(COLUMNS), tuple(reversed(COLUMNS))])
def test_a_sum_saves_and_loads(names, tmp_path):
    """In whatever order its columns are named: a file has them in alphabetical order."""
    torch.manual_seed(0)
    condition = ConditionSum(WIDTH, {name: COLUMNS[name] for name in names})
    condition.save_pretrained(tmp_path)
    loaded = ConditionSum.from_pretrained(tmp_path)
    drops = torch.tensor([[True, False, True], [False, True, False], [False, False, False], [False, False, True]])
    with torch.no_grad():
        assert torch.equal(loaded(VALUES, drops).pooled_projections, condition(VALUES, drops).pooled_projections)
        for i, name in enumerate(sorted(names)):  # the order of drops
            alone = torch.zeros(4, 3, dtype=torch.bool)
            alone[:, i] = True
            rest = {key: value for key, value in VALUES.items() if key != name}
            without = loaded(rest, torch.zeros(4, dtype=torch.bool)).pooled_projections
            torch.testing.assert_close(loaded(VALUES, alone).pooled_projections, without)


class CellCondition(ColumnCondition):
    """As a user would write one: three lengths (B, 3), zero = missing."""

    @register_to_config
    def __init__(self, embedding_dim: int, scale: float = 1.0):
        super().__init__(embedding_dim)
        self.linear = nn.Linear(3, embedding_dim)

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(values / self.config.scale), ~values.any(dim=1)


def test_a_condition_of_ones_own(monkeypatch, tmp_path):
    """A subclass and a row in the table, and it trains, drops, saves and loads beside the others."""
    monkeypatch.setitem(COLUMN_CONDITIONS, "cell", CellCondition)
    condition = ConditionSum(8, {"band_gap": COLUMNS["band_gap"], "cell": {"kind": "cell", "scale": 5.0}})
    values = {"band_gap": VALUES["band_gap"], "cell": torch.tensor([[5.0, 5, 5], [4, 5, 6], [0, 0, 0], [3, 3, 3]])}
    drop = torch.tensor([False, False, False, True])
    found = condition(values, drop).pooled_projections
    found.square().sum().backward()
    assert condition.encoders[1].linear.weight.grad.any()
    first, second = condition.encoders
    torch.testing.assert_close(found[0], first(values["band_gap"], drop)[0] + second.linear(torch.ones(3)))
    torch.testing.assert_close(found[2], first.null_embedding + second.null_embedding)  # both are missing there
    torch.testing.assert_close(found[3], first.null_embedding + second.null_embedding)
    condition.save_pretrained(tmp_path)
    assert torch.equal(ConditionSum.from_pretrained(tmp_path)(values, drop).pooled_projections, found)


# ---- which conditions are hidden -------------------------------------------------------------------------------------

NUM_DRAWS = 40_000


@pytest.mark.parametrize("prob", [0.1, 0.3])
def test_conditions_are_hidden_together_and_alone(prob):
    """All of them with p + (1 - p) p^K, each with p + (1 - p) p, one alone with (1 - p) p (1 - p)^(K - 1)."""
    names = ["a", "b", "c"]
    drops = draw_drops(SampleDraws(0, torch.arange(NUM_DRAWS)), prob, names)
    assert drops.shape == (NUM_DRAWS, 3)
    assert drops.dtype == torch.bool
    tolerance = 4 * math.sqrt(0.25 / NUM_DRAWS)
    assert drops.all(dim=1).float().mean().item() == pytest.approx(prob + (1 - prob) * prob**3, abs=tolerance)
    for i in range(3):
        assert drops[:, i].float().mean().item() == pytest.approx(prob + (1 - prob) * prob, abs=tolerance)
        alone = drops[:, i] & (drops.sum(dim=1) == 1)
        assert alone.float().mean().item() == pytest.approx((1 - prob) * prob * (1 - prob) ** 2, abs=tolerance)


@pytest.mark.parametrize("names", [[], ["a"]])
def test_one_condition_is_hidden_as_everywhere(names):
    drops = draw_drops(SampleDraws(0, torch.arange(NUM_DRAWS)), 0.2, names)
    assert drops.shape == (NUM_DRAWS,)
    assert drops.float().mean().item() == pytest.approx(0.2, abs=0.01)
    several = draw_drops(SampleDraws(0, torch.arange(NUM_DRAWS)), 0.2, ["a", "b"])
    assert several[drops].all()  # the samples that are told nothing are the same


def test_what_is_hidden_depends_on_the_position_alone():
    whole = draw_drops(SampleDraws(3, torch.arange(100)), 0.5, ["a", "b"])
    places = torch.tensor([99, 4, 4, 50])
    assert torch.equal(draw_drops(SampleDraws(3, places), 0.5, ["a", "b"]), whole[places])
    assert not torch.equal(draw_drops(SampleDraws(4, torch.arange(100)), 0.5, ["a", "b"]), whole)
    swapped = draw_drops(SampleDraws(3, torch.arange(100)), 0.5, ["b", "a"])
    assert torch.equal(swapped.flip(1), whole)  # each by its name


@pytest.mark.parametrize(("prob", "expected"), [(0.0, False), (1.0, True)])
def test_never_and_always(prob, expected):
    drops = draw_drops(SampleDraws(0, torch.arange(1000)), prob, ["a", "b"])
    assert (drops == expected).all()
