"""evaluate.py --modality crystal: crystals whose figures are known beforehand, a tiny run, and everything that is wrong."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import evaluate as script
from tests.support.crystals.random_runs import export_run
from tests.support.data import DATA
from tests.support.processes import refused, run
from utils.crystal.data.table import load_crystals
from utils.crystal.files import save_crystals
from utils.crystal.pipeline import CrystalPipeline
from utils.crystal.structure import Crystal, formula_of, volume
from utils.errors import UserError

for package in ("pymatgen", "spglib", "smact", "ase"):
    pytest.importorskip(package)
PEROV = DATA / "crystals" / "perov_5.parquet"
pytestmark = pytest.mark.skipif(not PEROV.is_file(), reason="needs crystals/perov_5.parquet")

BROKEN = Crystal(np.array([38, 22]), np.full((2, 3), np.nan), 4 * np.eye(3))
ON_TOP = Crystal(np.array([38, 22]), np.zeros((2, 3)), 4 * np.eye(3))


def write_table(path: Path, crystals: list[Crystal], **columns: list) -> Path:
    arrays = {
        "material_id": [f"{path.stem}{i}" for i in range(len(crystals))],
        "atomic_numbers": [each.atomic_numbers.tolist() for each in crystals],
        "frac_coords": [each.frac_coords.reshape(-1).tolist() for each in crystals],
        "lattice": [each.lattice.reshape(-1).tolist() for each in crystals],
    }
    pq.write_table(pa.table(arrays | columns), path)
    return path


def planted(crystals: list[Crystal]) -> list[float]:
    """A property that a regressor can learn from the composition: the mean atomic number."""
    return [float(each.atomic_numbers.mean()) for each in crystals]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """160 real crystals to train on and 40 others, with a planted property, in a parquet file each."""
    folder = tmp_path_factory.mktemp("crystals")
    train, test = (
        load_crystals(str(PEROV), "train", max_samples=160),
        load_crystals(str(PEROV), "test", max_samples=40),
    )
    for name, table in (("train", train), ("test", test)):
        crystals = table.crystals()
        write_table(folder / f"{name}.parquet", crystals, planted=planted(crystals), name=[name] * len(crystals))
    return folder


@pytest.fixture(scope="module")
def crystals(world) -> dict[str, list[Crystal]]:
    return {name: load_crystals(str(world / f"{name}.parquet")).crystals() for name in ("train", "test")}


def make_run(folder: Path, columns: dict[str, dict], max_atoms: int = 5) -> Path:
    """A crystal run with random weights."""
    from utils.crystal.vae.network import CrystalVAE
    from utils.diffusion.conditions import ConditionSum, NoCondition
    from utils.diffusion.denoiser import ConditionalDenoiser
    from utils.diffusion.sampling import SAMPLERS
    from utils.latents.spec import Normalisation
    from utils.models.dit import DiT

    torch.manual_seed(0)
    vae = CrystalVAE(hidden_size=16, num_layers=1, num_attention_heads=2, latent_channels=4, max_atoms=max_atoms)
    model = DiT(
        sample_size=max_atoms,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        latent_kind="set",
        projection_class_embeddings_input_dim=16 if columns else None,
    )
    denoiser = ConditionalDenoiser(model, ConditionSum(16, columns) if columns else NoCondition())
    scheduler = SAMPLERS["flow_euler"]()
    normalisation = Normalisation((0.0,) * 4, (1.0,) * 4)
    pipeline = CrystalPipeline(denoiser, scheduler, vae.eval(), normalisation, {max_atoms: 1})
    export_run(folder, denoiser, pipeline)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    columns = {
        "composition": {"kind": "composition", "num_elements": 118},
        "planted": {"kind": "property", "mean": 30.0, "std": 10.0},
    }
    return make_run(tmp_path_factory.mktemp("model") / "run", columns)


@pytest.fixture
def evaluate(world, monkeypatch, capsys):
    """A function that evaluates against the 40 crystals, in this process, and returns what was printed; None leaves a
    flag out, a list gives several values."""

    def call(out: Path, **changes) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words(world, out, **changes)])
        script.main(script.parse_args())
        return capsys.readouterr().out

    return call


def words(world: Path, out: Path, **changes) -> list[str]:
    chosen = {
        "reference": world / "test.parquet",
        "training_data": world / "train.parquet",
        "output_dir": out,
        "num_match_processes": 1,
        "device": "cpu",
    } | changes
    flags = ["--modality", "crystal"]
    for name, value in chosen.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def columns_of(out: Path) -> dict[str, dict[str, dict]]:
    """column -> figure -> value, low, high, num_samples, ..."""
    points = json.loads((out / "metrics.json").read_text())["points"]
    return {
        point["point"]: {k: v for group in point["groups"] for k, v in group["figures"].items()} for point in points
    }


def reasons_of(out: Path) -> dict[str, str]:
    points = json.loads((out / "metrics.json").read_text())["points"]
    return {name: why for point in points for group in point["groups"] for name, why in group["not_measured"].items()}


# ---- known answers


def test_real_crystals_are_as_good_as_real(evaluate, crystals, tmp_path):
    """Samples that are the held-out crystals have their figures, are all unique and all match."""
    requests = [{"composition": formula_of(each.atomic_numbers)} for each in crystals["test"]]
    (tmp_path / "samples").mkdir()
    save_crystals(tmp_path / "samples", crystals["test"], requests, {}, 0)
    printed = evaluate(tmp_path / "out", samples=tmp_path / "samples")
    found = columns_of(tmp_path / "out")
    ours, real, null = found["samples"], found["held-out real"], found["null: shuffled conditions"]
    for name in real:
        assert ours[name]["value"] == pytest.approx(real[name]["value"], abs=1e-6), name
        assert ours[name]["num_samples"] == real[name]["num_samples"]
    assert ours["unique"]["value"] == ours["formula_match"]["value"] == ours["match_rate"]["value"] == 1
    assert ours["rmsd"]["value"] == pytest.approx(0, abs=1e-5)
    assert ours["novel"]["value"] > 0.9  # other crystals than those of training
    assert null["formula_match"]["value"] < 0.2
    assert null["match_rate"]["value"] < 0.2
    assert set(null) <= {"formula_match", "match_rate", "rmsd"}
    assert "energy_above_hull" in reasons_of(tmp_path / "out")
    assert "--calculator" in printed
    assert "held-out real" in printed
    html = (tmp_path / "out" / "report.html").read_text()
    assert "In the features of" not in html
    assert "<h2>Validity</h2>" in html
    assert html.count("data:image/png") == 2


def test_copies_of_one_training_crystal(evaluate, crystals, tmp_path):
    """One of n is unique, and none novel."""
    samples = write_table(tmp_path / "copies.parquet", [crystals["train"][3]] * 20)
    evaluate(tmp_path / "out", samples=samples)
    ours = columns_of(tmp_path / "out")["samples"]
    assert ours["structurally_valid"]["value"] == 1
    assert ours["unique"]["value"] == 1 / 20
    assert ours["novel"]["value"] == ours["vun"]["value"] == 0
    assert ours["coverage_precision"]["value"] == 1


def test_garbage_is_counted_and_never_left_out(evaluate, crystals, tmp_path):
    samples = write_table(tmp_path / "mixed.parquet", [*crystals["test"][:10], *[BROKEN] * 5, *[ON_TOP] * 5])
    evaluate(tmp_path / "out", samples=samples)
    ours = columns_of(tmp_path / "out")["samples"]
    assert ours["structurally_valid"]["value"] == 0.5
    assert ours["structurally_valid"]["num_samples"] == 20
    assert ours["coverage_precision"]["value"] <= 0.5


def test_cif_files_that_cannot_be_read_are_not_valid(evaluate, crystals, tmp_path):
    from utils.crystal.files import write_cif

    folder = tmp_path / "cifs"
    folder.mkdir()
    for i, crystal in enumerate(crystals["test"][:6]):
        write_cif(crystal, folder / f"{i}.cif")
    for i in range(6, 8):
        (folder / f"{i}.cif").write_text("this is no CIF\n")
    printed = evaluate(tmp_path / "out", samples=folder, training_data=None)
    ours = columns_of(tmp_path / "out")["samples"]
    assert ours["structurally_valid"]["value"] == 0.75
    assert "2 of 8 samples cannot be read" in printed
    reasons = reasons_of(tmp_path / "out")
    assert reasons["novel"] == reasons["vun"] == "needs --training_data"
    assert "wasserstein_density" not in columns_of(tmp_path / "out")["held-out real"]


def test_a_property_that_follows_the_request(evaluate, crystals, tmp_path):
    """Samples that have what was asked: the regressor says so; with the requests shuffled it says nothing."""
    requests = [{"planted": value} for value in planted(crystals["test"])]
    (tmp_path / "samples").mkdir()
    save_crystals(tmp_path / "samples", crystals["test"], requests, {}, 0)
    evaluate(tmp_path / "out", samples=tmp_path / "samples")
    found = columns_of(tmp_path / "out")
    ours, null = found["samples"]["planted_spearman"], found["null: shuffled conditions"]["planted_spearman"]
    assert ours["value"] > 0.9
    assert ours == found["held-out real"]["planted_spearman"]
    assert null["low"] < 0 < null["high"] or abs(null["value"]) < 0.35
    assert found["samples"]["planted_error"]["value"] < found["null: shuffled conditions"]["planted_error"]["value"]


def test_formulas_that_the_reference_does_not_have(evaluate, crystals, tmp_path):
    """Formulas are compared, structures are not, and a property whose error is not known is not predicted."""
    requests = [{"composition": text, "gap": 1.0} for text in ("Na2O", "MgO", "CaO", "LiF")]
    (tmp_path / "samples").mkdir()
    save_crystals(tmp_path / "samples", crystals["test"][:4], requests, {}, 0)
    printed = evaluate(tmp_path / "out", samples=tmp_path / "samples")
    found = columns_of(tmp_path / "out")
    assert found["samples"]["formula_match"]["value"] == 0
    assert not any("match_rate" in column for column in found.values())
    assert "no crystal of the formulas" in printed
    assert "gap" in reasons_of(tmp_path / "out")["gap_spearman"]


def test_a_property_that_ignores_the_request(evaluate, crystals, tmp_path):
    requests = [{"planted": float(20 + 20 * (i % 2))} for i in range(40)]
    (tmp_path / "samples").mkdir()
    save_crystals(tmp_path / "samples", crystals["test"], requests, {}, 0)
    evaluate(tmp_path / "out", samples=tmp_path / "samples")
    found = columns_of(tmp_path / "out")
    assert abs(found["samples"]["planted_spearman"]["value"]) < 0.4
    assert found["held-out real"]["planted_spearman"]["value"] > 0.9
    assert {"planted_at_20", "planted_at_40"} <= set(found["samples"])
    assert found["samples"]["planted_at_20"]["num_samples"] == 20


# ---- runs


def test_a_run_asked_for_compositions_of_the_reference(evaluate, model, tmp_path):
    """With the composition clamped the formulas are those asked for, of noise too; both are judged against the real
    ones, and --samples of what was left behind gives the same figures."""
    flags = {"model": model, "compositions_from_reference": True, "clamp_composition": True, "num_inference_steps": 2}
    evaluate(tmp_path / "out", num_samples=12, **flags)
    found = columns_of(tmp_path / "out")
    assert list(found) == ["samples", "held-out real", "null: random latents", "null: shuffled conditions"]
    assert found["samples"]["formula_match"]["value"] == found["null: random latents"]["formula_match"]["value"] == 1
    assert found["held-out real"]["match_rate"]["value"] == 1
    assert found["null: shuffled conditions"]["formula_match"]["value"] < 0.5
    assert {column["unique"]["num_samples"] for column in found.values() if "unique" in column} == {12}
    assert len(list((tmp_path / "out" / "samples" / "all").glob("*.cif"))) == 12
    evaluate(tmp_path / "again", samples=tmp_path / "out" / "samples" / "all")
    assert columns_of(tmp_path / "again")["samples"] == found["samples"]


def test_a_sweep_over_property_targets(evaluate, model, tmp_path):
    flags = {"model": model, "property_targets": ["planted", 20, 40.5], "num_inference_steps": 2}
    printed = evaluate(tmp_path / "out", num_samples=9, sweep=["guidance_scale", 1, 3], **flags)
    found = columns_of(tmp_path / "out")
    assert list(found) == [
        "guidance_scale 1",
        "guidance_scale 3",
        "held-out real",
        "null: random latents",
        "guidance_scale 1, null: shuffled conditions",
        "guidance_scale 3, null: shuffled conditions",
    ]
    folder = tmp_path / "out" / "samples" / "guidance_scale_3"
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["request"]["planted"] for line in lines] == [20, 40.5] * 4  # of 9 as many as divide evenly
    assert found["held-out real"]["planted_spearman"]["value"] > 0.7
    assert "planted: Spearman of asked and predicted" in printed


# ---- energies

CALCULATOR = """
from ase.calculators.calculator import Calculator, all_changes

class OfVolume(Calculator):
    implemented_properties = ["energy"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        is_compound = len(set(self.atoms.get_atomic_numbers())) > 1
        self.results["energy"] = 0.1 * self.atoms.get_volume() - 10 * len(self.atoms) if is_compound else 0.0
"""


def test_energies_above_a_hull_of_the_same_calculator(evaluate, crystals, tmp_path, monkeypatch):
    """Elements have no energy, compounds -10 eV an atom and 0.1 for each cubic Angstrom: those of the training set are
    on the hull, the same swollen by a tenth are not. What is not valid has no energy and is not stable."""
    (tmp_path / "planted_energies.py").write_text(CALCULATOR)
    monkeypatch.syspath_prepend(tmp_path)
    compounds = crystals["test"][:6]
    swollen = [each._replace(lattice=1.1 * each.lattice) for each in compounds[:4]]
    elements = sorted({int(number) for each in compounds for number in each.atomic_numbers})
    pure = [Crystal(np.array([number]), np.zeros((1, 3)), 3 * np.eye(3)) for number in elements]
    training = write_table(tmp_path / "training.parquet", [*pure, *compounds])
    samples = write_table(tmp_path / "samples.parquet", [*swollen, *compounds[4:], BROKEN, ON_TOP])
    evaluate(tmp_path / "out", samples=samples, training_data=training, calculator="planted_energies:OfVolume")
    ours = columns_of(tmp_path / "out")["samples"]
    above = [0.1 * (1.1**3 - 1) * volume(each.lattice) / 5 for each in compounds[:4]] + [0, 0]
    assert ours["energy_above_hull"]["value"] == pytest.approx(np.median(above), abs=1e-3)
    assert ours["energy_above_hull"]["num_samples"] == 6
    assert ours["metastable"]["value"] == 2 / 8
    assert ours["sun"]["value"] == 0  # none is novel


def test_as_a_user_runs_it(world, tmp_path):
    """In a process of its own: the crystals of another split, and what cannot be said of them."""
    result = run("evaluate.py", *words(world, tmp_path / "out", samples=world / "test.parquet"))
    assert "structurally valid (higher is better)" in result.stdout
    assert "energy above the hull, eV/atom, median: not measured, needs --calculator" in result.stdout
    printed = result.stdout.splitlines()
    assert "Validity" in printed
    assert "Energies" not in printed  # there are none
    again = run("evaluate.py", *words(world, tmp_path / "out", samples=world / "test.parquet"), check=False)
    assert "--output_dir" in refused(again)


# ---- what is refused


def test_bad_input(evaluate, world, model, crystals, tmp_path):
    image_run = tmp_path / "images"
    (image_run / "vae").mkdir(parents=True)
    for folder in ("unet", "vae", "scheduler"):
        (image_run / folder).mkdir(exist_ok=True)
        (image_run / folder / "config.json").write_text("{}")
    (image_run / "model_index.json").write_text("{}")
    plain = make_run(tmp_path / "plain", {}, max_atoms=3)
    empty = tmp_path / "empty"
    empty.mkdir()
    without = write_table(tmp_path / "without.parquet", crystals["test"])
    samples = world / "test.parquet"
    wrong = [
        ({}, "--model"),
        ({"reference": None, "samples": samples}, "--reference is required"),
        ({"model": tmp_path / "nowhere"}, "--model: .*does not exist"),
        ({"model": image_run}, "--model: .*is a run of images"),
        ({"samples": empty}, "--samples: .*holds no crystals"),
        ({"samples": tmp_path / "nowhere" / "at" / "all"}, "--samples: .*does not exist"),
        ({"samples": samples, "composition": "SrTiO3"}, "--composition with --samples"),
        ({"samples": samples, "guidance_scale": 2}, "--guidance_scale with --samples"),
        ({"samples": samples, "training_data": samples}, "--reference: .*is --training_data"),
        ({"samples": samples, "calculator": "nothing"}, "--calculator nothing"),
        ({"model": plain, "compositions_from_reference": True}, "--compositions_from_reference: .*composition"),
        (
            {"model": plain, "compositions_from_reference": True, "clamp_composition": True},
            "--compositions_from_reference: .*--max_atoms 3",
        ),
        ({"model": model, "property_targets": ["planted", 1]}, "--property_targets planted: .*two numbers"),
        ({"model": model, "property_targets": ["planted", 1, "x"]}, "--property_targets planted"),
        ({"model": model, "property_targets": ["gap", 1, 2]}, "--property_targets gap: .*was not trained"),
        (
            {"model": model, "property_targets": ["planted", 1, 2], "training_data": None},
            "--property_targets without --training_data",
        ),
        (
            {"model": model, "property_targets": ["planted", 1, 2], "reference": without},
            "--reference: there is no column of numbers planted",
        ),
        ({"model": model, "num_samples": 1, "property_targets": ["planted", 1, 2]}, "--num_samples 1"),
        ({"model": model, "sweep": ["seed", 1, 2]}, "--sweep seed"),
        ({"model": model, "prompt": "a cat"}, "unrecognized arguments: --prompt"),
    ]
    for changes, expected in wrong:
        with pytest.raises(UserError) as raised:
            evaluate(tmp_path / "out", **changes)
        assert re.search(expected, str(raised.value)), changes
        assert not (tmp_path / "out").exists(), changes
