"""Runs of crystals with random weights, and what tests look at in their samples."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.crystal.pipeline import CrystalPipeline, Exporter
from utils.crystal.structure import Crystal
from utils.crystal.vae.network import CrystalVAE
from utils.diffusion.conditions import ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.sampling import SAMPLERS
from utils.latents.spec import Normalisation
from utils.models.dit import DiT
from utils.runs.save import ModelCard

MAX_ATOMS, CHANNELS, WIDTH = 8, 4, 16
NUM_ITEMS = {2: 10, 4: 25, 5: 40, 8: 25}  # crystals of so many atoms
STEPS = 4
GAP = {"band_gap": {"kind": "property", "mean": 2.0, "std": 1.0}}
COLUMNS = GAP | {
    "composition": {"kind": "composition", "num_elements": 118},
    "spacegroup": {"kind": "class", "names": ["221", "225", "P 1"]},
}
SYSTEM = {"chemical_system": {"kind": "chemical_system", "num_elements": 118}}


def randomise(module: nn.Module, seed: int) -> None:
    """New weights for all of a module: a new DiT predicts zero, whatever it is told."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1] if parameter.ndim > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def make_vae() -> CrystalVAE:
    """Of wide cells, with atoms all over them: few sites fall together."""
    torch.manual_seed(0)
    vae = CrystalVAE(
        hidden_size=16, num_layers=1, num_attention_heads=2, latent_channels=CHANNELS, max_atoms=MAX_ATOMS
    )
    with torch.no_grad():
        vae.to_elements.weight.normal_()
        vae.to_sites.weight.normal_()
        vae.to_sites.bias.zero_()
        vae.from_latents.weight.normal_()
        vae.to_cell[2].bias[:3] = 40.0
    return vae.eval().requires_grad_(False)


def make_denoiser(columns: dict[str, dict], seed: int = 1, learned_variance: bool = False) -> ConditionalDenoiser:
    model = DiT(
        sample_size=MAX_ATOMS,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS if learned_variance else None,
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        latent_kind="set",
        projection_class_embeddings_input_dim=WIDTH if columns else None,
    )
    denoiser = ConditionalDenoiser(model, ConditionSum(WIDTH, columns) if columns else NoCondition())
    randomise(denoiser, seed)
    return denoiser.eval()


def make_pipeline(denoiser: ConditionalDenoiser, prediction_type: str = "flow", **scheduler) -> CrystalPipeline:
    name = "flow_euler" if prediction_type == "flow" else "ddim"
    if prediction_type != "flow":
        scheduler |= {"prediction_type": prediction_type, "clip_sample": False, "timestep_spacing": "trailing"}
    normalisation = Normalisation((0.1,) * CHANNELS, (0.9,) * CHANNELS)
    return CrystalPipeline(denoiser, SAMPLERS[name](**scheduler), make_vae(), normalisation, dict(NUM_ITEMS))


def export_run(folder: Path, denoiser: ConditionalDenoiser, pipeline: CrystalPipeline) -> None:
    """A run that is finished, of a denoiser and all else of a pipeline."""
    card = ModelCard("Random weights", data="nothing", settings="", base=None, use_ema=False, example="none")
    parts = (pipeline.vae, pipeline.normalisation, pipeline.scheduler)
    Exporter(*parts, card, pipeline.num_items).write(folder, denoiser, 0)


def make_run(folder: Path, columns: dict[str, dict], prediction_type: str = "flow", seed: int = 1) -> Path:
    denoiser = make_denoiser(columns, seed)
    export_run(folder, denoiser, make_pipeline(denoiser, prediction_type))
    return folder


def words(model: Path, **flags) -> list[str]:
    """A command line: a list gives several values, True none, None leaves a flag out."""
    found = ["--model", str(model)]
    for name, value in ({"num_inference_steps": STEPS, "device": "cpu"} | flags).items():
        if value is True:
            found.append(f"--{name}")
        elif value is not None:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def assert_same(found: list[Crystal], expected: list[Crystal]) -> None:
    """The same crystals, to rounding."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.atomic_numbers, other.atomic_numbers)
        turns = one.frac_coords - other.frac_coords
        np.testing.assert_allclose(turns - np.round(turns), 0, atol=1e-4)
        np.testing.assert_allclose(one.lattice, other.lattice, atol=1e-3)


def differ(found: list[Crystal], other: list[Crystal]) -> bool:
    assert len(found) == len(other)
    return all(not np.allclose(a.lattice, b.lattice, atol=1e-5) for a, b in zip(found, other, strict=True))


def sizes(crystals: list[Crystal]) -> list[int]:
    return [len(crystal.atomic_numbers) for crystal in crystals]


def elements(crystal: Crystal) -> dict[int, int]:
    return dict(Counter(crystal.atomic_numbers.tolist()))
