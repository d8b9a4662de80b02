"""Samples of crystals: each is its own, whatever stands beside it in the batch."""

import numpy as np
import pytest
import torch

from tests.support.crystals.models import SIZES
from tests.support.crystals.sets import CHANNELS, CLOSE, COLUMNS, MAX_ATOMS, VALUES, WIDTH, normals, set_dit
from tests.support.processes import with_random_weights
from utils.crystal.pipeline import CrystalPipeline
from utils.crystal.structure import Crystal
from utils.crystal.vae.network import CrystalVAE
from utils.diffusion import sampling
from utils.diffusion.conditions import ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.objectives import training_scheduler
from utils.diffusion.sampling import sampling_scheduler
from utils.latents.spec import Normalisation


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
        latents = pipeline.latents(
            num_atoms[list(rows)], values, Guidance(2.0, num_inference_steps=4), generator=generators
        )
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
