"""Figures of crystals against cells whose distances, volumes and densities are in textbooks."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from tests.support.data import DATA
from tests.support.planted_matcher import hangs, planted
from tests.support.processes import ROOT
from utils.crystal import matching as metrics_structures
from utils.crystal import workers
from utils.crystal.data.table import load_crystals
from utils.crystal.evaluation import metrics as metrics_crystals
from utils.crystal.matching import is_match, is_structurally_valid, match_pairs, match_rmsd, novel, unique
from utils.crystal.structure import Crystal, parse_formula
from utils.errors import UserError

for package in ("pymatgen", "spglib", "smact", "ase"):
    pytest.importorskip(package)

FACE_CENTRES = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
NACL = Crystal(  # a = 5.64 Angstrom; nearest neighbours at a / 2; 2.16 g/cm^3
    np.array([11] * 4 + [17] * 4),
    np.concatenate([FACE_CENTRES, (FACE_CENTRES + np.array([0.5, 0, 0])) % 1]),
    5.64 * np.eye(3),
)
NACL_IN_CSCL = Crystal(np.array([11, 17]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), 3.5 * np.eye(3))
SRTIO3 = Crystal(
    np.array([38, 22, 8, 8, 8]),
    np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
    3.905 * np.eye(3),
)
NAN, ONE = np.nan, np.array([[0.0, 0, 0]])
GARBAGE = {
    "coordinate not a number": NACL._replace(frac_coords=NACL.frac_coords * NAN),
    "lattice not a number": NACL._replace(lattice=NACL.lattice * NAN),
    "infinite lattice": NACL._replace(lattice=np.full((3, 3), np.inf)),
    "lattice of 1e200": NACL._replace(lattice=1e200 * np.eye(3)),
    "no volume": NACL._replace(lattice=np.zeros((3, 3))),
    "flat": NACL._replace(lattice=np.diag([5.0, 5.0, 0.0])),
    "nearly flat": NACL._replace(lattice=np.diag([1e3, 1e3, 1e-9])),
    "all in one place": NACL._replace(frac_coords=NACL.frac_coords * 0),
    "tiny": NACL._replace(lattice=0.4 * np.eye(3)),
    "no atoms": Crystal(np.zeros(0, int), np.zeros((0, 3)), 4 * np.eye(3)),
    "element 0": Crystal(np.array([0]), ONE, 4 * np.eye(3)),
    "element 119": Crystal(np.array([119]), ONE, 4 * np.eye(3)),
    "too few positions": Crystal(np.array([11, 17]), ONE, 4 * np.eye(3)),
}
NEEDLE = Crystal(np.array([29]), ONE, np.diag([1e-5, 1e3, 1e3]))  # valid to the field, which asks for no own images


def rotated(crystal: Crystal) -> Crystal:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    return crystal._replace(lattice=crystal.lattice @ (rotation * np.sign(np.linalg.det(rotation))))


def supercell(crystal: Crystal) -> Crystal:
    numbers, frac_coords, lattice = crystal
    coords = np.concatenate([frac_coords, frac_coords + np.eye(3)[0]]) / [2, 1, 1]
    return Crystal(np.tile(numbers, 2), coords, np.diag([2, 1, 1]) @ lattice)


def other_cell(crystal: Crystal) -> Crystal:
    change = np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]])  # determinant one: the same lattice
    return crystal._replace(lattice=change @ crystal.lattice, frac_coords=crystal.frac_coords @ np.linalg.inv(change))


SAME = {
    "itself": lambda crystal: crystal,
    "translated": lambda crystal: crystal._replace(
        frac_coords=(crystal.frac_coords + np.array([0.13, 0.71, 0.4])) % 1
    ),
    "rotated": rotated,
    "permuted": lambda crystal: Crystal(crystal.atomic_numbers[::-1], crystal.frac_coords[::-1], crystal.lattice),
    "supercell": supercell,
    "another cell": other_cell,
}


def cubes(count: int) -> list[Crystal]:
    """SrTiO3 of growing cells, sites a little off their places."""
    generator = np.random.default_rng(0)
    shifts = generator.normal(0, 0.01, (count, 5, 3))
    return [
        SRTIO3._replace(frac_coords=(SRTIO3.frac_coords + shift) % 1, lattice=(3.8 + 0.3 * row / count) * np.eye(3))
        for row, shift in enumerate(shifts)
    ]


def real_crystals(name: str, count: int) -> list[Crystal]:
    path = DATA / "crystals" / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"no {path}")
    return load_crystals(str(path), "test", max_samples=count).crystals()


# ---- validity


def test_valid_structures_and_the_bounds() -> None:
    assert all(is_structurally_valid(each) for each in (NACL, NACL_IN_CSCL, SRTIO3, other_cell(SRTIO3), NEEDLE))
    pair = Crystal(np.array([1, 1]), np.array([[0, 0, 0], [0, 0, 0.5]]), np.diag([4.0, 4, 1.02]))
    assert is_structurally_valid(pair)  # 0.51 Angstrom
    assert not is_structurally_valid(pair._replace(lattice=np.diag([4.0, 4, 0.98])))
    near_across = pair._replace(frac_coords=np.array([[0, 0, 0.02], [0, 0, 0.98]]), lattice=np.diag([4.0, 4, 10]))
    assert not is_structurally_valid(near_across)  # 0.4 Angstrom through the face
    one = Crystal(np.array([1]), ONE, 0.1 ** (1 / 3) * np.eye(3))
    assert is_structurally_valid(one._replace(lattice=one.lattice * 1.01))
    assert not is_structurally_valid(one._replace(lattice=one.lattice * 0.99))


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_invalid_and_raises_nothing(what: str) -> None:
    crystal = GARBAGE[what]
    assert not is_structurally_valid(crystal)
    assert metrics_crystals.structure_fingerprint(crystal) is None
    assert match_rmsd(crystal, crystal) is None
    assert not is_match(crystal, NACL)
    metrics_crystals.is_compositionally_valid(crystal.atomic_numbers)
    metrics_crystals.is_cubic(crystal)
    assert metrics_crystals.energies([crystal], Constant()) == [None]
    assert metrics_crystals.formula_match([crystal], [{14: 1}]).value == 0
    assert unique([crystal, crystal]).tolist() == [True, True]
    assert novel([crystal], [crystal]).tolist() == [True]


@pytest.mark.parametrize(
    ("formula", "valid"),
    [
        *[("NaCl", True), ("NaCl2", False), ("Na2Cl", False), ("SrTiO3", True), ("Na4Cl4", True), ("LiFePO4", True)],
        *[("Fe", True), ("CuZn", True), ("C60", True)],  # one element; metals
        *[("Og", True), ("OgO2", False), ("HeO", False)],  # without data
        ("FeMnReOsRuNiCoCrVWO2", False),  # billions of oxidation states
    ],
)
def test_compositional_validity(formula: str, valid: bool) -> None:
    counts = parse_formula(formula)
    numbers = np.repeat(list(counts), list(counts.values()))
    started = time.process_time()
    assert metrics_crystals.is_compositionally_valid(numbers) is valid
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["perov_5", "mp_20_biternary"])
def test_real_crystals_are_valid_and_near_each_other(name: str) -> None:
    crystals = real_crystals(name, 50)
    assert np.mean([is_structurally_valid(each) for each in crystals]) >= 0.98
    assert np.mean([metrics_crystals.is_compositionally_valid(each.atomic_numbers) for each in crystals]) > 0.8
    figures = metrics_crystals.coverage_figures(crystals, crystals)
    assert figures["coverage_recall"].value == figures["coverage_precision"].value == 1
    assert figures["amsd_recall"].value == pytest.approx(0, abs=1e-6)
    held_out = metrics_crystals.coverage_figures(crystals[:25], crystals[25:], crystals[:25])
    assert held_out["coverage_precision"].value == pytest.approx(0.95, abs=0.04)  # 24 of 25: what 0.95 means


# ---- matching


@pytest.mark.parametrize("crystal", [NACL, SRTIO3], ids=["NaCl", "SrTiO3"])
@pytest.mark.parametrize("change", SAME)
def test_the_same_crystal_matches_and_has_the_same_fingerprints(crystal: Crystal, change: str) -> None:
    copy = SAME[change](crystal)
    assert match_rmsd(copy, crystal) == pytest.approx(0, abs=1e-5)
    assert is_match(crystal, copy)
    np.testing.assert_allclose(*metrics_crystals.fingerprints([copy, crystal]), atol=1e-8)


def test_different_crystals_do_not_match() -> None:
    assert match_rmsd(NACL, NACL_IN_CSCL) is None  # one composition, two structures
    assert not is_match(NACL, NACL_IN_CSCL)
    assert match_rmsd(NACL, NACL._replace(atomic_numbers=np.array([19] * 4 + [17] * 4))) is None
    exchanged = SRTIO3._replace(atomic_numbers=np.array([22, 38, 8, 8, 8]))
    fingerprints = metrics_crystals.fingerprints([SRTIO3, exchanged, NACL, NACL_IN_CSCL])
    for a, b in ((0, 1), (2, 3)):  # the first pair has the same sites
        assert np.abs(fingerprints[a] - fingerprints[b]).max() > 0.01


def test_rmsd_of_a_known_displacement() -> None:
    # One of five sites moves by d: without their common shift, the mean square is d^2 (1 / 5 - 1 / 25).
    moved = SRTIO3.frac_coords.copy()
    moved[1, 2] += 0.05
    distance = 0.05 * 3.905
    expected = distance * (1 / 5 - 1 / 25) ** 0.5 / (3.905**3 / 5) ** (1 / 3)
    assert match_rmsd(SRTIO3._replace(frac_coords=moved), SRTIO3) == pytest.approx(expected, rel=1e-3)


def test_reconstruction_counts_matches() -> None:
    figures = metrics_crystals.reconstruction_figures(
        [NACL, NACL_IN_CSCL, GARBAGE["flat"], SRTIO3], [rotated(NACL), NACL, NACL, SRTIO3]
    )
    assert figures["match_rate"].value == 0.5
    assert (figures["rmsd"].value, figures["rmsd"].num_samples) == (pytest.approx(0, abs=1e-5), 2)
    assert list(metrics_crystals.reconstruction_figures([NACL], [SRTIO3])) == ["match_rate"]


def test_unique_and_novel() -> None:
    broken = GARBAGE["all in one place"]
    crystals = [NACL, NACL_IN_CSCL, supercell(NACL), SRTIO3, broken, rotated(NACL_IN_CSCL), broken, other_cell(SRTIO3)]
    assert unique(crystals).tolist() == [True, True, False, True, True, False, True, False]
    training = [broken, rotated(NACL_IN_CSCL), *GARBAGE.values()]
    assert novel(crystals, training).tolist() == [True, False, True, True, True, False, True, True]
    assert novel(crystals, []).all()
    assert unique([]).shape == (0,)


# ---- processes


def atom(number: int) -> Crystal:
    return Crystal(np.array([number]), ONE, 4 * np.eye(3))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_hangs_fails_or_dies_costs_one_pair_and_no_other(num_processes) -> None:
    numbers = list(range(10, 70))
    numbers[7], numbers[20], numbers[30], numbers[40] = 1, 2, 3, 4
    started = time.monotonic()
    found = match_pairs([(atom(number), NACL) for number in numbers], num_processes, 1.0, planted)
    assert time.monotonic() - started < 55  # one that hangs takes 60
    assert found.rmsds == [None if number < 5 else number for number in numbers]
    assert (found.num_timed_out, found.num_failed) == (2, 2)


def test_from_a_thread_and_after_the_idle_processes_were_killed() -> None:
    """The same processes serve every call, and new ones where somebody killed them in between."""
    assert match_pairs([(NACL, NACL)]).rmsds == [pytest.approx(0, abs=1e-5)]
    [(_, idle)] = workers.outcomes(os.getpid, [()], 1, 30.0)
    pool = workers.lasting_pool(1)
    os.kill(idle, signal.SIGKILL)
    time.sleep(0.5)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(match_pairs([(NACL, NACL)])))
    thread.start()
    thread.join()
    assert elsewhere[0].rmsds == [pytest.approx(0, abs=1e-5)]
    assert workers.lasting_pool(1) is not pool


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


SCRIPT = """
import sys

import torch

from tests.support.planted_matcher import says_who
from utils.crystal.workers import outcomes

assert __name__ == "__main__"  # no process runs this again
print(outcomes(says_who, [(sys.argv[1], 0.0)] * 2, 2, 30.0), flush=True)
outcomes(says_who, [(sys.argv[1], 600.0)], 2, 900.0)
"""


def test_a_script_needs_no_guard_and_leaves_no_process_when_it_is_killed(tmp_path) -> None:
    """Neither those in the middle of a task nor those that wait for one."""
    script, folder = tmp_path / "script.py", tmp_path / "processes"
    script.write_text(SCRIPT)
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, script, folder], stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "[('done', None), ('done', None)]\n"
        time.sleep(1.0)
        running.kill()
    pids = [int(path.name) for path in folder.iterdir()]
    until = time.monotonic() + 20
    while any(runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.2)
    assert pids
    assert not any(runs(pid) for pid in pids)


def test_processes_find_what_this_process_finds() -> None:
    crystals = [*cubes(60), NACL, GARBAGE["flat"]]
    pairs = [(crystals[0], each) for each in crystals]
    here = [match_rmsd(*pair) for pair in pairs]
    assert match_pairs(pairs, 2) == (here, 0, 0)
    assert here.count(None) == 2
    assert unique(crystals, 2).sum() == 3
    assert novel(crystals, cubes(1), 2).sum() == 2


def test_pairs_that_had_no_time_are_different_and_warned_about(monkeypatch, caplog) -> None:
    monkeypatch.setattr(metrics_structures, "is_match", hangs)
    assert unique([NACL, NACL], timeout_s=0.1).all()
    assert "1 pairs of structures took over 0.1 s" in caplog.text


# ---- coverage and distributions


def test_structure_fingerprint_counts_neighbours() -> None:
    # Na has 6 Cl at a / 2 = 2.82, and nothing nearer or up to 3.99: the density over spheres integrates to 6.
    both = metrics_crystals.structure_fingerprint(NACL).reshape(2, -1)
    radii = metrics_crystals.RADII
    shell = (radii > 2) & (radii < 3.4)
    counts = (both * 4 * np.pi * radii**2)[:, shell].sum(axis=1) * 0.1
    assert counts == pytest.approx([6, 6 * (3.16 - 0.93)], rel=0.02)  # electronegativities of Cl and Na
    assert both[:, radii < 1.9].max() < 1e-3


def test_coverage_sees_modes_that_are_missing_and_samples_that_are_off() -> None:
    salts = [NACL._replace(lattice=(5.5 + 0.01 * row) * np.eye(3)) for row in range(30)]
    reference = [*cubes(30), *salts]
    half = metrics_crystals.coverage_figures(cubes(30), reference)
    assert half["coverage_recall"].value == pytest.approx(0.5)
    assert half["coverage_precision"].value == 1
    off = [each._replace(lattice=each.lattice * 2) for each in salts]
    broken = metrics_crystals.coverage_figures([*reference, *off, *GARBAGE.values(), NEEDLE], reference)
    assert broken["coverage_precision"].value == pytest.approx(60 / (60 + 30 + len(GARBAGE) + 1))
    assert broken["coverage_recall"].value == 1
    assert broken["amsd_precision"].value > half["amsd_precision"].value
    none = metrics_crystals.coverage_figures(list(GARBAGE.values()), reference)
    assert {name: figure.value for name, figure in none.items()} == {"coverage_recall": 0, "coverage_precision": 0}


def test_density_and_distances_of_distributions() -> None:
    assert metrics_crystals.density(NACL) == pytest.approx(2.16, abs=0.01)  # the mineral's
    assert metrics_crystals.density(SRTIO3) == pytest.approx(5.12, abs=0.01)
    figures = metrics_crystals.wasserstein_figures([NACL] * 4 + [GARBAGE["flat"]], [NACL, SRTIO3])
    assert figures["wasserstein_density"].value == pytest.approx((5.117 - 2.164) / 2, abs=0.01)
    assert figures["wasserstein_num_elements"].value == pytest.approx(0.5)
    assert figures["wasserstein_num_atoms"].value == pytest.approx(1.5)
    assert figures["wasserstein_num_atoms"].num_samples == 4
    assert metrics_crystals.wasserstein_figures([GARBAGE["flat"]], [NACL]) == {}


# ---- what was asked for


def test_asked_for_formulas_and_elements() -> None:
    crystals = [NACL, SRTIO3, NACL_IN_CSCL]
    asked = [{17: 2, 11: 2}, parse_formula("SrTiO2"), parse_formula("NaCl")]
    assert metrics_crystals.formula_match(crystals, asked).value == pytest.approx(2 / 3)
    assert metrics_crystals.chemical_system_match(crystals, [[11, 17], [8, 22], [11, 17, 8]]).value == pytest.approx(
        1 / 3
    )


def test_cubes() -> None:
    assert metrics_crystals.is_cubic(NACL)
    assert metrics_crystals.is_cubic(rotated(SRTIO3))
    assert metrics_crystals.is_cubic(NACL._replace(lattice=np.diag([5.0, 5.0, 5.1])))
    assert not metrics_crystals.is_cubic(NACL._replace(lattice=np.diag([5.0, 5.0, 5.2])))
    primitive = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 2.0  # three angles of 60 degrees
    assert not metrics_crystals.is_cubic(NACL._replace(lattice=primitive))


# ---- energies


class Constant:
    """Stands for a calculator that finds an energy for anything."""

    def get_potential_energy(self, *_, **__) -> float:
        return 1.0


def test_energies_by_ases_calculators() -> None:
    from ase.build import bulk
    from ase.calculators.emt import EMT

    copper = bulk("Cu", cubic=True)
    crystal = Crystal(copper.numbers, copper.get_scaled_positions(), np.asarray(copper.cell))
    copper.calc = EMT()
    found = metrics_crystals.energies([crystal, NACL, supercell(crystal), *GARBAGE.values()], EMT())
    expected = copper.get_potential_energy() / 4
    # EMT knows no Na, and says so with an exception.
    assert found == [pytest.approx(expected), None, pytest.approx(expected), *[None] * len(GARBAGE)]


def test_a_calculator_of_the_users(tmp_path, monkeypatch) -> None:
    assert type(metrics_crystals.load_calculator("ase.calculators.lj:LennardJones")).__name__ == "LennardJones"
    (tmp_path / "broken_calculator.py").write_text("def make():\n    raise OSError('no weights')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for text, message in {
        "ase.calculators.lj": "write package.module:factory",
        "no_such_module:make": "No module named 'no_such_module'",
        "ase.calculators.lj:nothing": "nothing",
        "broken_calculator:make": "OSError: no weights",
        "builtins:dict": "returns dict",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            metrics_crystals.load_calculator(text)
        assert str(error.value).startswith(f"--calculator {text}")


def test_energy_above_a_hull_drawn_by_hand() -> None:
    entries = [({11: 2}, -1.0), ({17: 1}, -2.0), ({11: 1, 17: 1}, -3.5), ({11: 1, 17: 3}, -2.0), ({8: 2}, -5.0)]
    above = metrics_crystals.energy_above_hull
    assert above({11: 1, 17: 1}, -3.4, entries) == pytest.approx(0.1)
    assert above({11: 4, 17: 4}, -3.7, entries) == pytest.approx(-0.2)  # below the hull
    # Half way from NaCl to Cl: a quarter of Na and three of Cl, on the line from -3.5 to -2.
    assert above({11: 1, 17: 3}, -2.0, entries) == pytest.approx(0.75)
    assert above({11: 1}, -0.5, entries) == pytest.approx(0.5)
    assert above({11: 1, 19: 1}, -3.0, entries) is None
    assert above({19: 1}, -3.0, []) is None
    assert not math.isnan(above({8: 1}, -5.0, entries))
