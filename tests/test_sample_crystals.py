"""sample.py on tiny crystal runs: what is asked for is what comes out, the same whatever stands beside it; everything that
is wrong is refused in one line."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.stats import chisquare
from torch import nn

import sample as script
from tests.support.processes import refused, run
from utils.args.columns import parse_conditions
from utils.args.sampling import SCHEDULERS
from utils.crystal.cache import CONDITION_KINDS, OF_ATOMS
from utils.crystal.data.table import load_crystals
from utils.crystal.files import read_samples
from utils.crystal.pipeline import CrystalPipeline, export_run, load_crystal_run
from utils.crystal.sampler import clamped_counts, condition_values, numbers_of_atoms
from utils.crystal.structure import Crystal, parse_formula
from utils.crystal.vae.network import CrystalVAE
from utils.diffusion.conditions import ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.sampling import FLOW_SAMPLERS, SAMPLERS
from utils.errors import UserError
from utils.latents.spec import Normalisation
from utils.models.dit import DiT
from utils.training import lora
from utils.training.checkpoints import Checkpoints
from utils.training.ema import EMA

for package in ("pymatgen", "spglib"):
    pytest.importorskip(package)

MAX_ATOMS, CHANNELS, WIDTH = 8, 4, 16
NUM_ITEMS = {2: 10, 4: 25, 5: 40, 8: 25}  # crystals of so many atoms
STEPS = 4
GAP = {"band_gap": {"kind": "property", "mean": 2.0, "std": 1.0}}
COLUMNS = GAP | {
    "composition": {"kind": "composition", "num_elements": 118},
    "spacegroup": {"kind": "class", "names": ["221", "225", "P 1"]},
}
SYSTEM = {"chemical_system": {"kind": "chemical_system", "num_elements": 118}}


# ---- runs with random weights


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


def make_run(folder: Path, columns: dict[str, dict], prediction_type: str = "flow", seed: int = 1) -> Path:
    denoiser = make_denoiser(columns, seed)
    export_run(folder, denoiser, make_pipeline(denoiser, prediction_type), "a run with random weights")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: `plain` (unconditional), `asked` (three conditions), `system` (the fourth), both of flow; `v`
    (v-prediction), `variance` (learned, epsilon); and `images`, which only looks like one."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "plain", {})
    make_run(folder / "asked", COLUMNS)
    make_run(folder / "system", SYSTEM)
    make_run(folder / "v", GAP, "v_prediction")
    denoiser = make_denoiser(GAP, learned_variance=True)
    pipeline = make_pipeline(denoiser, "epsilon")
    pipeline.scheduler = SAMPLERS["ddpm"].from_config(pipeline.scheduler.config, variance_type="learned_range")
    export_run(folder / "variance", denoiser, pipeline, "")
    for name in ("unet", "vae", "scheduler"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "config.json").write_text("{}")
    (folder / "images" / "model_index.json").write_text("{}")
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


@pytest.fixture
def sample(runs, tmp_path, monkeypatch):
    """A function that runs sample.py in this process and returns the crystals it left behind."""
    numbers = iter(range(1000))

    def call(model: str, **flags) -> list[Crystal]:
        out = tmp_path / f"out{next(numbers)}"
        monkeypatch.setattr(sys, "argv", ["sample.py", *words(runs / model, output_dir=out, **flags)])
        script.main(script.parse_args())
        call.folder = out
        return read_samples(out)[0]

    return call


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


def test_what_the_model_is_told(runs):
    """Shares of the elements, ones for those that are there, the number as it is, the place of the class."""
    pipeline = load_crystal_run(runs / "asked")
    requests = [
        {"composition": text, "band_gap": 1.5, "spacegroup": "P 1"} for text in ("SrTiO3", "Sr2Ti2O6", "O3TiSr")
    ]
    values = condition_values(pipeline, requests)
    assert values["band_gap"].tolist() == [1.5] * 3
    assert values["spacegroup"].tolist() == [2] * 3
    expected = torch.zeros(118)
    expected[[38 - 1, 22 - 1, 8 - 1]] = torch.tensor([0.2, 0.2, 0.6])
    torch.testing.assert_close(values["composition"], expected.expand(3, -1))
    system = condition_values(load_crystal_run(runs / "system"), [{"chemical_system": "Sr-Ti-O"}])["chemical_system"]
    assert system.equal((expected > 0).float()[None])


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


# ---- numbers of atoms


def test_numbers_of_atoms_follow_the_training_set(runs):
    pipeline = load_crystal_run(runs / "asked")
    assert pipeline.num_items == NUM_ITEMS
    found = Counter(numbers_of_atoms(pipeline, [{}] * 3000, None, 0).tolist())
    assert set(found) == set(NUM_ITEMS)
    expected = [30 * times for times in NUM_ITEMS.values()]
    assert chisquare([found[number] for number in NUM_ITEMS], expected).pvalue > 1e-3
    found = Counter(numbers_of_atoms(pipeline, [{"composition": "NaCl"}] * 3000, None, 1).tolist())
    assert set(found) == {2, 4, 8}
    assert chisquare([found[number] for number in (2, 4, 8)], [500, 1250, 1250]).pvalue > 1e-3


def test_numbers_of_atoms_belong_to_the_seed(runs, sample):
    pipeline = load_crystal_run(runs / "plain")
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
    assert load_crystal_run(runs / "variance").learns_variance
    flags = {"scheduler": scheduler, "property": "band_gap=3", "num_samples": 2}
    denoiser = load_crystal_run(runs / "variance").denoiser
    plain = make_denoiser(GAP)
    fitting = plain.state_dict()
    for name, tensor in denoiser.state_dict().items():  # the prediction comes first in the last layer
        fitting[name] = tensor[: len(fitting[name])]
    plain.load_state_dict(fitting)
    if not (runs / "fixed").exists():
        export_run(runs / "fixed", plain, make_pipeline(plain, "epsilon"), "")
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
    Checkpoints(accelerator, runs / "asked", early, optimizer, None, {}, 1).save(3)
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
        ema.save_snapshots(accelerator, runs / "averaged", step + 1)
    found = sample("averaged", num_samples=2, ema_sigma_rel=0.1)
    make_run(runs / "expected", {})
    model.load_state_dict(model.state_dict() | ema.shadows[2])
    export_run(runs / "expected", model, make_pipeline(model), "")
    expected = sample("expected", num_samples=2)
    for one, other in zip(found, expected, strict=True):  # snapshots are float16
        np.testing.assert_allclose(one.lattice, other.lattice, atol=0.1)
    assert differ(found, sample("averaged", num_samples=2))
    with pytest.raises(UserError, match="--ema_sigma_rel"):
        sample("plain", ema_sigma_rel=0.1)


@pytest.fixture(scope="module")
def tuned(runs) -> Path:
    """`plain` with adapters and a condition."""
    base, denoiser = load_crystal_run(runs / "plain").denoiser, make_denoiser(GAP)
    new_modules = lora.start_from(denoiser, base, "--lora")
    lora.add_lora(denoiser, 2, new_modules=new_modules, base="plain")
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    export_run(runs / "tuned", denoiser, make_pipeline(denoiser), "")
    return runs / "tuned"


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
    export_run(runs / "damaged", denoiser, make_pipeline(denoiser), "")
    crystals = sample("damaged", num_samples=3)
    assert len(crystals) == 3
    assert not any(np.isfinite(each.lattice).any() for each in crystals)
    assert "3 crystals (0 of valid structure)" in capsys.readouterr().out
    clamped = sample("damaged", composition="SrTiO3", clamp_composition=True, num_samples=2)
    assert [elements(each) for each in clamped] == [{38: 1, 22: 1, 8: 3}] * 2


# ---- what is refused

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
        pipeline = load_crystal_run(runs / "variance")
        pipeline.denoiser = denoiser
        export_run(runs / "other", denoiser, pipeline, "")
    with pytest.raises(UserError, match=f"--guide_model: .*({expected})"):
        sample(model, guide_model=runs / guide)
    assert list(tmp_path.iterdir()) == []


def test_wrong_adapters(sample, runs, tuned):
    with pytest.raises(UserError, match=r"--lora: .*holds no adapter_model\.safetensors"):
        sample("plain", lora=runs / "plain")
    with pytest.raises(UserError, match="--lora: "):
        sample("system", lora=tuned / "lora", chemical_system="Na-Cl")


def test_columns_that_have_a_name_of_the_atoms():
    """--composition could not tell which of the two is meant."""
    with pytest.raises(UserError, match=r"--condition class:composition: .*rename the column"):
        parse_conditions(["class:composition"], CONDITION_KINDS, OF_ATOMS)


def test_counts_of_a_clamped_cell():
    found = clamped_counts([{"composition": "SrTiO3"}, {"composition": "OHH"}], np.array([10, 3]))
    assert found == [{38: 2, 22: 2, 8: 6}, {8: 1, 1: 2}]
    with pytest.raises(UserError, match="--clamp_composition without --composition"):
        clamped_counts([{}], np.array([3]))
