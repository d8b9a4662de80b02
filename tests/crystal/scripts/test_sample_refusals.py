"""sample.py on crystal runs: everything that is wrong is refused in one line."""

import re

import pytest

from tests.support.crystals.random_runs import COLUMNS, GAP, SYSTEM, export_run, make_denoiser, make_run, sizes
from utils.crystal.pipeline import load_run
from utils.errors import UserError

for package in ("pymatgen", "spglib"):
    pytest.importorskip(package)

# fmt: off
WRONG = [
    ("asked", {"composition": "Xx2"}, "--composition Xx2: there is no element Xx"),
    ("asked", {"composition": "Fe3+"}, "--composition Fe3\\+: cannot read '\\+'.*charges"),
    ("asked", {"composition": "Ca(OH"}, "--composition Ca\\(OH: it is no formula"),
    ("asked", {"composition": "D2O"}, "--composition D2O: there is no element D"),
    ("asked", {"composition": "Na0Cl"}, "--composition Na0Cl: Na0 asks for no atoms"),
    ("asked", {"composition": ["NaCl", " "]}, "--composition: the formula is empty"),
    ("asked", {"composition": "Na9"}, "--composition Na9: 9 atoms, and .* up to 8"),
    ("plain", {"composition": "Na9", "clamp_composition": True}, "--composition Na9: 9 atoms, and .* up to 8"),
    ("asked", {"composition": "SrTiO3", "num_atoms": 8}, "--num_atoms 8: not a multiple of the atoms in SrTiO3"),
    ("asked", {"composition": ["NaCl", "Fe2O"], "num_atoms": 8}, "--num_atoms 8: not a multiple of the atoms in Fe2O"),
    ("asked", {"composition": "SrTiO3", "num_atoms": 10}, "--num_atoms 10: .* up to 8"),
    ("plain", {"num_atoms": 9}, "--num_atoms 9: .* up to 8"),
    ("plain", {"num_atoms": 0}, "--num_atoms: 0 is not a whole number of at least 1"),
    ("plain", {"num_samples": 0}, "--num_samples: 0 is not a whole number of at least 1"),
    ("asked", {"property": "band_gap"}, "--property band_gap: write NAME=VALUE"),
    ("asked", {"property": "band_gap="}, "--property band_gap=: write NAME=VALUE"),
    ("asked", {"property": "colour=1"}, "--property colour=1: .* the condition colour; it has band_gap \\(property\\), "),
    ("asked", {"property": "band_gap=wide"}, "--property band_gap=wide: wide is not a number"),
    ("asked", {"property": "band_gap=nan"}, "--property band_gap=nan: nan is not a number"),
    ("asked", {"property": "band_gap=1e39"}, "--property band_gap=1e39: .*single precision"),
    ("asked", {"property": ["band_gap=1", "band_gap=2"]}, "--property band_gap=2: band_gap is asked for twice"),
    ("asked", {"property": "spacegroup=3"}, "--property spacegroup=3: the run knows these: 221, 225, P 1"),
    ("asked", {"property": "composition=NaCl"}, "--property composition=NaCl: use --composition"),
    ("system", {"property": "chemical_system=Na-Cl"}, "--property chemical_system=Na-Cl: use --chemical_system"),
    ("asked", {"clamp_composition": True}, "--clamp_composition without --composition"),
    ("plain", {"clamp_composition": True}, "--clamp_composition without --composition"),
    ("system", {"clamp_composition": True, "chemical_system": "Na-Cl"}, "--clamp_composition without --composition"),
    ("asked", {"composition": "NaCl", "chemical_system": "Na-Cl"}, "--chemical_system.*|--composition with --chem.*"),
    ("plain", {"composition": "NaCl"}, "--composition: .*not trained .*it has none; add --clamp_composition"),
    ("plain", {"property": "band_gap=1"}, "--property band_gap=1: .*not trained .*it has none"),
    ("asked", {"chemical_system": "Na-Cl"}, "--chemical_system: .*not trained with the condition chemical_system; it"),
    ("system", {"chemical_system": "Na-Xx"}, "--chemical_system Na-Xx: there is no element 'Xx'"),
    ("system", {"chemical_system": "Na-Na"}, "--chemical_system Na-Na: .*twice"),
    ("system", {"chemical_system": ""}, "--chemical_system : there is no element ''"),
    ("system", {"chemical_system": "H-Li-Na-K", "num_atoms": 3}, "--num_atoms 3: .*H-Li-Na-K.* 4 elements"),
    ("system", {"chemical_system": "H-Li-Na-K-Rb-Cs-F-Cl-Br"}, "--chemical_system H.*Br: 9 elements, and .*up to 8"),
    ("asked", {"guidance_scale": 2}, "--guidance_scale 2: no condition is asked for"),
    ("plain", {"guidance_scale": 2, "composition": "NaCl", "clamp_composition": True}, "--guidance_scale 2: no cond"),
    ("asked", {"guidance_interval": [0, 0.5]}, "--guidance_interval: guidance is off"),
    ("asked", {"guidance_rescale": 0.5}, "--guidance_rescale: guidance is off"),
    ("variance", {"guidance_rescale": 0.5, "property": "band_gap=1"}, "--guidance_rescale: .*learned variance"),
    ("v", {"num_inference_steps": 2000}, "--num_inference_steps 2000"),
    ("plain", {"device": "tpu9"}, "--device tpu9"),
    ("plain", {"prompt": "a cat"}, "--prompt: .*plain makes crystals; leave it out"),
    ("plain", {"class_labels": [1, 2]}, "--class_labels: .*makes crystals"),
    ("plain", {"negative_prompt": "dogs"}, "--negative_prompt: .*makes crystals"),
    ("plain", {"num_images_per_prompt": 4}, "--num_images_per_prompt: .*makes crystals"),
    ("images", {"composition": "NaCl"}, "--composition: .*images makes images; leave it out"),
    ("images", {"num_samples": 16}, "--num_samples: .*makes images"),
    ("images", {"num_atoms": 16}, "--num_atoms: .*makes images"),
    ("images", {"property": "band_gap=1"}, "--property: .*makes images"),
    ("images", {"chemical_system": "Na-Cl"}, "--chemical_system: .*makes images"),
    ("images", {"clamp_composition": True}, "--clamp_composition: .*makes images"),
    ("nowhere", {}, "--model: .*does not exist"),
    ("plain/vae", {}, "--model: .*is no run"),
]


# fmt: on


@pytest.mark.parametrize(("model", "flags", "expected"), WRONG, ids=lambda value: str(value)[:40])
def test_bad_input(sample, tmp_path, model, flags, expected):
    with pytest.raises(UserError) as raised:
        sample(model, **flags)
    assert re.match(expected, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_composition_and_system_of_a_run_that_knows_both(sample, runs):
    make_run(runs / "both", COLUMNS | SYSTEM)
    with pytest.raises(UserError, match="--composition with --chemical_system: the elements follow"):
        sample("both", composition="NaCl", chemical_system="Na-Cl")


def test_a_system_has_room_for_its_elements(sample, runs):
    """No number of atoms is drawn in which there is no place for them."""
    crystals = sample("system", chemical_system=["H-Li-Na-K-Rb", "H-Li-Na-K-Rb-Cs"], num_samples=12)
    assert set(sizes(crystals[:12])) == {5, 8}
    assert set(sizes(crystals[12:])) == {8}
    make_run(runs / "pairs", SYSTEM)
    # The histogram is that of the base; adapters may have been trained on smaller cells.
    (runs / "pairs" / "num_items.json").write_text('{"2": 7, "12": 90}')
    assert sizes(sample("pairs", chemical_system="H-Li-Na", num_samples=2)) == [3, 3]
    assert sizes(sample("pairs", num_samples=8)) == [2] * 8


@pytest.mark.parametrize(
    ("model", "guide", "expected"),
    [
        ("asked", "asked", "has the weights of --model"),
        ("asked", "plain", "has other conditions"),
        ("v", "variance", "has another schedule"),
        ("asked", "images", "makes images|is a run of images|is no run of crystals"),
        ("asked", "nowhere", "does not exist"),
        ("variance", "other", "learned variance"),
    ],
)
def test_wrong_guides(sample, runs, tmp_path, model, guide, expected):
    if guide == "other":
        denoiser = make_denoiser(GAP, seed=5, learned_variance=True)
        pipeline = load_run(runs / "variance")
        pipeline.denoiser = denoiser
        export_run(runs / "other", denoiser, pipeline)
    with pytest.raises(UserError, match=f"--guide_model: .*({expected})"):
        sample(model, guide_model=runs / guide)
    assert list(tmp_path.iterdir()) == []


def test_wrong_adapters(sample, runs, tuned):
    with pytest.raises(UserError, match=r"--lora: .*holds no adapter_model\.safetensors"):
        sample("plain", lora=runs / "plain")
    with pytest.raises(UserError, match="--lora: "):
        sample("system", lora=tuned / "lora", chemical_system="Na-Cl")
