"""sample.py on tiny crystal runs: what is asked for is what comes out, the same whatever stands beside it."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import sample as script
from tests.support.crystals.random_runs import (
    COLUMNS,
    GAP,
    MAX_ATOMS,
    assert_same,
    differ,
    elements,
    export_run,
    make_denoiser,
    make_pipeline,
    make_run,
    randomise,
    sizes,
    words,
)
from tests.support.processes import refused, run
from utils.args.sampling import SCHEDULERS
from utils.crystal.data.table import load_crystals
from utils.crystal.files import read_samples
from utils.crystal.pipeline import load_run
from utils.crystal.sampler import numbers_of_atoms
from utils.crystal.structure import Crystal, parse_formula
from utils.diffusion.sampling import FLOW_SAMPLERS, SAMPLERS
from utils.errors import UserError
from utils.training.checkpoints import Checkpoints
from utils.training.ema import EMA
from utils.training.run import Run

for package in ("pymatgen", "spglib"):
    pytest.importorskip(package)


# ---- as a user runs it


def test_as_a_user_runs_it(runs, tmp_path):
    """In a process of its own: the files that are left behind, and a folder that is taken."""
    flags = {
        "num_samples": 5,
        "batch_size": 2,
        "seed": 7,
        "composition": ["SrTiO3", "NaCl"],
        "property": "band_gap=1.5",
    }
    command = words(runs / "asked", output_dir=tmp_path / "out", **flags)
    assert "10 crystals" in run("sample.py", *command).stdout
    crystals, requests = read_samples(tmp_path / "out")
    assert requests == [{"composition": each, "band_gap": 1.5} for each in ("SrTiO3", "NaCl") for _ in range(5)]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(7, 17))
    assert lines[0]["settings"]["guidance_scale"] == 2
    assert lines[0]["settings"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert lines[0]["settings"]["clamp_composition"] is False
    assert "output_dir" in refused(run("sample.py", *command, check=False))
    check_files(tmp_path / "out", crystals)


def check_files(folder: Path, crystals: list[Crystal]) -> None:
    from pymatgen.core import Structure

    for i, crystal in enumerate(crystals):
        structure = Structure.from_file(folder / f"{i:05d}.cif")
        order = np.argsort(crystal.atomic_numbers, kind="stable")  # pymatgen keeps that of each element's sites only
        read = np.argsort(structure.atomic_numbers, kind="stable")
        assert [structure.atomic_numbers[place] for place in read] == crystal.atomic_numbers[order].tolist()
        np.testing.assert_allclose(structure.lattice.abc, np.linalg.norm(crystal.lattice, axis=1), atol=1e-6)
        distance = structure.frac_coords[read] - crystal.frac_coords[order]
        np.testing.assert_allclose(distance - np.round(distance), 0, atol=1e-6)
    table = load_crystals(str(folder / "samples.parquet"), None, MAX_ATOMS, max_skipped_fraction=0)
    assert table.num_atoms.tolist() == sizes(crystals)
    assert table.columns["band_gap"].tolist() == [1.5] * len(crystals)
    counts = [elements(crystal) for crystal in table.crystals()]
    assert counts == [elements(crystal) for crystal in crystals]
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [row["composition"] for row in rows] == ["SrTiO3"] * 5 + ["NaCl"] * 5
    picture = np.asarray(Image.open(folder / "crystals.png"))
    assert (picture != 255).any(axis=2).mean() > 0.02
    assert len(list(folder.iterdir())) == len(crystals) + 3


def test_an_unconditional_run(sample, runs, monkeypatch):
    """Into the run's own folder, a new one each time."""
    for number in range(2):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words(runs / "plain", num_samples=2)])
        script.main(script.parse_args())
        crystals, requests = read_samples(runs / "plain" / "sampled" / f"{number:04d}")
        assert requests == [{}, {}]
    assert_same(sample("plain", num_samples=2), crystals)
    assert differ(crystals, sample("plain", num_samples=2, seed=50, num_atoms=5))


# ---- what is asked for


@pytest.mark.parametrize(
    "flags",
    [
        {"property": ["band_gap=4.5"]},
        {"property": ["spacegroup=225"]},
        {"property": ["spacegroup=P 1", "band_gap=-1e-1"]},
        {"composition": ["SrTiO3"]},
        {"composition": ["SrTiO3"], "property": ["band_gap=0", "spacegroup=221"]},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_each_condition_reaches_the_model(sample, flags):
    free = sample("asked", num_samples=2, num_atoms=5)
    assert differ(sample("asked", num_samples=2, num_atoms=5, **flags), free)
    unguided = sample("asked", num_samples=2, num_atoms=5, guidance_scale=0, **flags)
    assert_same(unguided, free)  # at scale 0 the branch that is told nothing is all there is


def test_a_chemical_system(sample):
    """The order of its elements means nothing."""
    free = sample("system", num_samples=2, num_atoms=4)
    asked = sample("system", num_samples=2, num_atoms=4, chemical_system=["Li-Fe-O", "O-Li-Fe", "Na-Cl"])
    _, requests = read_samples(sample.folder)
    assert [request["chemical_system"] for request in requests] == ["Li-Fe-O"] * 2 + ["O-Li-Fe"] * 2 + ["Na-Cl"] * 2
    assert differ(asked[:2], free)
    again = sample("system", num_samples=2, num_atoms=4, chemical_system="Li-Fe-O", seed=2)
    assert_same(asked[2:4], again)


@pytest.mark.parametrize("model", ["asked", "plain"])
def test_a_clamped_composition(sample, model):
    """Exactly the formula, in whole units, of every sample; of a run that was told nothing of compositions too."""
    formulas = ["SrTiO3", "NaCl", "Fe2O", "Si"]
    crystals = sample(model, composition=formulas, clamp_composition=True, num_samples=6)
    for i, crystal in enumerate(crystals):
        unit = parse_formula(formulas[i // 6])
        times, rest = divmod(len(crystal.atomic_numbers), sum(unit.values()))
        assert rest == 0
        assert elements(crystal) == {number: count * times for number, count in unit.items()}
    assert set(sizes(crystals[:6])) == {5}
    assert set(sizes(crystals[6:12])) <= {2, 4, 8}
    assert set(sizes(crystals[12:18])) == {3}  # no crystal of three or six atoms was seen: one unit
    free = sample(model, num_samples=6)
    assert sizes(crystals[18:]) != sizes(free)  # which have other seeds
    several = sample(model, composition="NaCl", clamp_composition=True, num_samples=3, num_atoms=6)
    assert [elements(crystal) for crystal in several] == [{11: 3, 17: 3}] * 3


def test_clamping_hands_out_the_atoms_and_moves_none(sample):
    """The sites and the cell are those that the condition alone gives."""
    flags = {"composition": "SrTiO3", "num_samples": 3}
    told, clamped = sample("asked", **flags), sample("asked", **flags, clamp_composition=True)
    assert any(elements(crystal) != {38: 1, 22: 1, 8: 3} for crystal in told)
    assert_same([one._replace(atomic_numbers=other.atomic_numbers) for one, other in zip(told, clamped)], clamped)


def test_numbers_of_atoms_belong_to_the_seed(runs, sample):
    pipeline = load_run(runs / "plain")
    drawn = numbers_of_atoms(pipeline, [{}] * 20, None, 5)
    assert drawn[8:].tolist() == numbers_of_atoms(pipeline, [{}] * 12, None, 13).tolist()
    assert len(set(drawn.tolist())) > 1
    assert sizes(sample("plain", num_samples=20, seed=5)) == drawn.tolist()
    for number in (1, 3, MAX_ATOMS):
        assert sizes(sample("plain", num_samples=2, num_atoms=number)) == [number] * 2


# ---- seeds and batches


@pytest.mark.parametrize(("model", "scheduler"), [("asked", "flow_euler"), ("v", "ddpm"), ("variance", "ddpm")])
def test_a_sample_is_its_own(sample, model, scheduler):
    """Whatever the batch, whatever stands beside it, and whatever comes before."""
    flags = {"scheduler": scheduler, "property": "band_gap=3"}
    expected = sample(model, num_samples=6, batch_size=6, **flags)
    for batch_size in (1, 4):
        assert_same(sample(model, num_samples=6, batch_size=batch_size, **flags), expected)
    assert_same(sample(model, num_samples=2, seed=4, **flags), expected[4:])
    assert differ(expected[:3], expected[3:])


def test_a_sample_does_not_know_the_other_requests(sample):
    both = sample("asked", composition=["SrTiO3", "NaCl"], num_samples=3, batch_size=4)
    assert_same(sample("asked", composition="NaCl", num_samples=3, seed=3), both[3:])


# ---- samplers and guidance


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samplers_of_the_right_family(sample, scheduler):
    is_flow = scheduler in FLOW_SAMPLERS
    for model in ("v", "plain"):
        if is_flow == (model == "plain"):
            crystals = sample(model, scheduler=scheduler, num_samples=2)
            assert all(np.isfinite(each.lattice).all() for each in crystals)
            settings = json.loads((sample.folder / "samples.jsonl").read_text().splitlines()[0])["settings"]
            assert settings["scheduler"] == SAMPLERS[scheduler].__name__
        else:
            with pytest.raises(UserError, match=re.escape(f"--scheduler {scheduler}: this run was trained for ")):
                sample(model, scheduler=scheduler)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name not in FLOW_SAMPLERS])
def test_a_learned_variance(sample, runs, scheduler):
    """Only DDPM uses it: of any other sampler the samples are those of a model without. Without guidance and with it."""
    assert load_run(runs / "variance").learns_variance
    flags = {"scheduler": scheduler, "property": "band_gap=3", "num_samples": 2}
    denoiser = load_run(runs / "variance").denoiser
    plain = make_denoiser(GAP)
    fitting = plain.state_dict()
    for name, tensor in denoiser.state_dict().items():  # the prediction comes first in the last layer
        fitting[name] = tensor[: len(fitting[name])]
    plain.load_state_dict(fitting)
    if not (runs / "fixed").exists():
        export_run(runs / "fixed", plain, make_pipeline(plain, "epsilon"))
    for guidance_scale in (1, 2):
        learned = sample("variance", guidance_scale=guidance_scale, **flags)
        fixed = sample("fixed", guidance_scale=guidance_scale, **flags)
        if scheduler == "ddpm":
            assert differ(learned, fixed)
        else:
            assert_same(learned, fixed)


def test_guidance(sample):
    flags = {"property": "band_gap=4", "num_samples": 2}
    off, on = (sample("asked", guidance_scale=scale, **flags) for scale in (1, 2))
    assert differ(off, on)
    assert_same(sample("asked", **flags), on)  # the default
    for extra in ({"guidance_interval": [0, 0.5]}, {"guidance_rescale": 0.7}):
        found = sample("asked", guidance_scale=2, **flags, **extra)
        assert differ(found, on)
        assert differ(found, off)


def test_half_precision(sample):
    """On the CPU: the same crystals, roughly."""
    flags = {"property": "band_gap=1", "num_samples": 3}
    for model in ("asked", "variance"):
        whole, half = sample(model, **flags), sample(model, mixed_precision="bf16", **flags)
        assert sizes(whole) == sizes(half)
        for one, other in zip(whole, half, strict=True):
            np.testing.assert_allclose(one.lattice, other.lattice, atol=0.5)


def test_a_weaker_model_guides(sample, runs):
    """A run, or a checkpoint: at scale 1 it has no part, and at 2 it does, with a condition and without."""
    make_run(runs / "weak", COLUMNS, seed=2)
    plain = sample("asked", num_samples=2)
    guided = sample("asked", num_samples=2, guide_model=runs / "weak")
    settings = json.loads((sample.folder / "samples.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["guide_model"] == str(runs / "weak")
    assert settings["guidance_scale"] == 2
    assert differ(guided, plain)
    told = {"property": "band_gap=3", "num_samples": 2}
    assert differ(sample("asked", **told), sample("asked", **told, guide_model=runs / "weak"))
    early = make_denoiser(COLUMNS, seed=2)
    accelerator = Accelerator(cpu=True)
    early, optimizer = accelerator.prepare(early, torch.optim.SGD(early.parameters(), 0.1))
    Checkpoints(Run(accelerator, runs / "asked"), early, optimizer, None, identity={}, keep=1).save(3)
    checkpoint = runs / "asked" / "checkpoint-3"
    assert_same(sample("asked", num_samples=2, guide_model=checkpoint), guided)
    assert_same(sample("asked/checkpoint-3", num_samples=2), sample("weak", num_samples=2))


def test_an_average_made_of_snapshots(sample, runs):
    make_run(runs / "averaged", {})
    model = make_denoiser({})
    ema, accelerator = EMA(model, 0.9, (0.05, 0.1)), Accelerator(cpu=True)
    for step in range(8):
        randomise(model, step)
        ema.step(step)
        ema.save_snapshots(Run(accelerator, runs / "averaged"), step + 1)
    found = sample("averaged", num_samples=2, ema_sigma_rel=0.1)
    make_run(runs / "expected", {})
    model.load_state_dict(model.state_dict() | ema.shadows[2])
    export_run(runs / "expected", model, make_pipeline(model))
    expected = sample("expected", num_samples=2)
    for one, other in zip(found, expected, strict=True):  # snapshots are float16
        np.testing.assert_allclose(one.lattice, other.lattice, atol=0.1)
    assert differ(found, sample("averaged", num_samples=2))
    with pytest.raises(UserError, match="--ema_sigma_rel"):
        sample("plain", ema_sigma_rel=0.1)


def test_adapters_on_their_base(sample, tuned):
    """The base with them is the fine-tuned run, which knows the new condition."""
    for flags in ({}, {"property": "band_gap=3"}):
        expected = sample("tuned", num_samples=2, **flags)
        assert_same(sample("plain", num_samples=2, lora=tuned / "lora", **flags), expected)
    assert differ(expected, sample("plain", num_samples=2))


# ---- what the run gives is given


def test_a_damaged_run_is_sampled(sample, runs, capsys):
    """What is not finite counts as a sample, and as none of valid structure."""
    denoiser = make_denoiser({})
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.fill_(float("nan"))
    export_run(runs / "damaged", denoiser, make_pipeline(denoiser))
    crystals = sample("damaged", num_samples=3)
    assert len(crystals) == 3
    assert not any(np.isfinite(each.lattice).any() for each in crystals)
    assert "3 crystals (0 of valid structure)" in capsys.readouterr().out
    clamped = sample("damaged", composition="SrTiO3", clamp_composition=True, num_samples=2)
    assert [elements(each) for each in clamped] == [{38: 1, 22: 1, 8: 3}] * 2
