"""Crystals of CIF text and of arrays: what is wrong is skipped with its reason, in any number of processes."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.crystals.data import STRUCTURES, cif, crystal_of, same, tensor_row, write_parquet
from tests.support.processes import ROOT
from utils.crystal.data import cif as crystal_cif
from utils.crystal.data.cif import crystal_of_cif, parse_row, parse_rows
from utils.crystal.data.table import load_crystals
from utils.crystal.structure import Crystal
from utils.errors import UserError

# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD, SYMMETRISED = cif(STRUCTURES["CsCl"]), cif(STRUCTURES["CsCl"], symmetrised=True)
NO_LOOP = re.sub(r"loop_\n _symmetry_equiv.*?(?=loop_)", "", SYMMETRISED, flags=re.DOTALL)
NO_SYMMETRY = re.sub(r"_symmetry_.*\n", "", NO_LOOP)
ROCK_SALT = re.sub(r"loop_\n _symmetry_equiv.*?(?=loop_)", "", cif(STRUCTURES["NaCl"], True), flags=re.DOTALL)
UNREADABLE = ROCK_SALT.replace("Fm-3m", "'Q q q'").replace("_symmetry_Int_Tables_number   225\n", "")
LAST_SITE = GOOD.strip().splitlines()[-1]
BAD_CIFS = {
    "partial occupancy": (re.sub(r"  1$", "  0.5", GOOD, flags=re.MULTILINE), "occupied in part"),
    "two elements on a site": (GOOD.replace(LAST_SITE, re.sub("1$", "0.5", LAST_SITE) + "\n" + re.sub("1$", "0.5", LAST_SITE).replace("Cl", "Br")), "occupied in part"),
    "no symmetry": (NO_SYMMETRY, "says nothing of symmetry"),
    "symmetry in a comment": ("# _symmetry_ is not said, nor _space_group\n" + NO_SYMMETRY, "says nothing of symmetry"),
    "unreadable space group": (UNREADABLE, "says nothing of symmetry"),
    "unknown space group": (UNREADABLE.replace("'Q q q'", "?"), "says nothing of symmetry"),
    "no lengths": (re.sub(r"_cell_length_.*\n", "", GOOD), "no _cell_length_a"),
    "no angle": (re.sub(r"_cell_angle_beta.*\n", "", GOOD), "no _cell_angle_beta"),
    "negative length": (re.sub(r"(_cell_length_a +)", r"\1-", GOOD), "_cell_length_a is -4.12"),
    "zero length": (re.sub(r"_cell_length_a.*", "_cell_length_a 0", GOOD), ""),
    "angles of no cell": (re.sub(r"(_cell_angle_\w+).*", r"\1 130", GOOD), ""),
    "NaN coordinate": (GOOD.replace("0.50000000", "nan"), ""),
    "unknown coordinate": (GOOD.replace("0.50000000", "?"), ""),
    "unknown element": (GOOD.replace("Cs", "Xx"), "no element Xx"),
    "no element, the first letter of which is one": (GOOD.replace("Cs", "Cz"), "no element Cz"),
    "vacancy": (GOOD.replace("Cs", "Vac"), "no element Vac"),
    "duplicated site": (GOOD.strip() + "\n" + LAST_SITE + "\n", "ccupancy"),
    "sites too near": (GOOD.replace("0.50000000", "0.01000000"), "one site twice"),
    "site missing": (GOOD.replace(LAST_SITE, ""), "its sites are Cs, and its _chemical_formula_sum is CsCl"),
    "two crystals": (GOOD + "\n" + GOOD.replace("data_CsCl", "data_again"), "2 blocks"),
    "empty": ("", "the CIF is empty"),
    "white": (" \n", "the CIF is empty"),
    "no CIF": ("hello", "0 blocks"),
    "binary": ("\0\1\2\x7fELF", "0 blocks"),
    "header only": (GOOD[: GOOD.index("loop_")], "0 blocks"),
    "cut within a row": (GOOD.rstrip()[:-20], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CIFS)
def test_bad_cifs_are_skipped_with_their_reason(name, tmp_path, caplog):
    text, reason = BAD_CIFS[name]
    path = write_parquet(
        tmp_path / "bad.parquet", [{"material_id": "good", "cif": GOOD}, {"material_id": "bad", "cif": text}]
    )
    table = load_crystals(path)
    assert len(table) == 1
    assert [(each["row"], each["id"]) for each in table.skipped] == [(1, "bad")]
    assert reason in table.skipped[0]["reason"]
    assert len(table.skipped[0]["reason"]) > 8
    assert table.skipped[0]["reason"] in caplog.text
    with pytest.raises(UserError, match=r"--data: 1 of 2 crystals .*bad.parquet cannot be used \(bad: "):
        load_crystals(path, max_skipped_fraction=0.4, flag="--data")
    path = write_parquet(tmp_path / "all_bad.parquet", [{"material_id": f"bad{i}", "cif": text} for i in range(4)])
    with pytest.raises(UserError, match=r"--data: 4 of 4 crystals .* \(bad0: .*; bad1: .*; bad2: "):
        load_crystals(path, flag="--data")


@pytest.mark.parametrize("cut", range(20, len(SYMMETRISED) - 12, 97))
def test_a_cif_that_ends_early_is_never_another_crystal(cut):
    """Up to the last row, wherever it is cut: at the end of a line too."""
    assert isinstance(parse_row({"cif": SYMMETRISED[:cut]}, 20), str)


@pytest.mark.parametrize("text", [NO_LOOP, NO_LOOP.replace("Pm-3m", "?"), NO_LOOP.replace("Pm-3m", "'P m -3 m'")])
def test_a_space_group_without_operations_is_enough(text):
    assert same(crystal_of_cif(text), crystal_of(STRUCTURES["CsCl"]))


def test_charges_and_isotopes_are_elements():
    charged = GOOD.replace("  Cs  Cs0", "  Cs1+  Cs0").replace("  Cl  Cl1", "  Cl-  Cl1")
    assert crystal_of_cif(charged).atomic_numbers.tolist() == [55, 17]
    assert crystal_of_cif(GOOD.replace("Cs", "D")).atomic_numbers.tolist() == [1, 17]
    assert crystal_of_cif(GOOD.replace("'Cs1 Cl1'", "?")).atomic_numbers.tolist() == [55, 17]


def changed(**values) -> dict:
    return tensor_row(STRUCTURES["CsCl"]) | values


BAD_ARRAYS = {
    "fewer positions": (changed(frac_coords=[0.0, 0, 0]), "2 atoms with 3 coordinates"),
    "broken positions": (changed(frac_coords=[0.0] * 7), "2 atoms with 7 coordinates"),
    "fewer atoms": (changed(atomic_numbers=[55]), "1 atoms with 6 coordinates"),
    "small lattice": (changed(lattice=[4.0] * 6), "6 numbers, which should be nine"),
    "number 0": (changed(atomic_numbers=[55, 0]), "between 1 and 118"),
    "number 200": (changed(atomic_numbers=[200, 17]), "between 1 and 118"),
    "negative number": (changed(atomic_numbers=[-3, 17]), "between 1 and 118"),
    "part of an atom": (changed(atomic_numbers=[55.5, 17.0]), "not a whole number"),
    "NaN number": (changed(atomic_numbers=[55, float("nan")]), "not a whole number"),
    "NaN position": (changed(frac_coords=[0.0, 0, 0, 0.5, 0.5, float("nan")]), "not finite"),
    "infinite position": (changed(frac_coords=[0.0, 0, 0, 0.5, 0.5, float("inf")]), "not finite"),
    "NaN lattice": (changed(lattice=[float("nan")] * 9), "not finite"),
    "flat cell": (changed(lattice=[4.0, 0, 0, 0, 4, 0, 4, 4, 0]), "flat"),
    "endless cell": (changed(lattice=[1e200, 0, 0, 0, 1e200, 0, 0, 0, 1e200]), "larger than numbers are"),
    "no atoms": (changed(atomic_numbers=[], frac_coords=[]), "no atoms"),
    "no lattice": (changed(lattice=None), "no lattice"),
    "no numbers": (changed(atomic_numbers=None), "no atomic_numbers"),
    "duplicated site": (changed(frac_coords=[0.3, 0, 0] * 2), "0.00 Angstrom apart: one site twice?"),
    "duplicated across a face": (changed(frac_coords=[0.0, 0, 0, 0.999, 0, 0]), "0.00 Angstrom apart"),
    "duplicated with a shift": (changed(frac_coords=[0.25, 0, 0, -1.75, 0, 0]), "0.00 Angstrom apart"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_skipped_with_their_reason(name, tmp_path):
    row, reason = BAD_ARRAYS[name]
    table = load_crystals(write_parquet(tmp_path / "bad.parquet", [row, tensor_row(STRUCTURES["CsCl"])]))
    assert len(table) == 1
    assert [(each["row"], each["id"]) for each in table.skipped] == [(0, "0")]
    assert reason in table.skipped[0]["reason"]


# ---- processes ------------------------------------------------------------------------------------------------------


def test_processes_read_the_same_and_know_nothing_of_torch(tmp_path):
    """In a program of its own that has torch and no guard: neither a fork of it nor the program again."""
    (tmp_path / "cifs.json").write_text(json.dumps([GOOD, SYMMETRISED, "", UNREADABLE] * 30))
    (tmp_path / "program.py").write_text("""
import json, sys
from pathlib import Path

import torch

from utils.crystal.data import cif
from utils.crystal.workers import process_pool

cif.MIN_CIFS_FOR_PROCESSES = 100
rows = [{"cif": text} for text in json.loads(Path(sys.argv[1]).read_text())]
found = cif.parse_rows(rows, 20)
with process_pool(1, "pymatgen.io.cif") as pool:
    pool.schedule(cif.parse_row, (rows[0], 20)).result()
    modules = "[name for name in ('torch', 'datasets', 'spglib') if name in __import__('sys').modules]"
    loaded = pool.schedule(eval, (modules,)).result()
print(json.dumps([loaded, [each if isinstance(each, str) else each.frac_coords.tolist() for each in found]]))
""")
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "cifs.json")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stderr
    loaded, found = json.loads(result.stdout)
    assert loaded == ["spglib"]
    one_by_one = parse_rows([{"cif": text} for text in (GOOD, SYMMETRISED, "", UNREADABLE)], 20)
    assert found == [each if isinstance(each, str) else each.frac_coords.tolist() for each in one_by_one] * 30


def test_reading_goes_on_where_no_process_can_be_started(monkeypatch, caplog):
    def broken(*_args):
        raise crystal_cif.BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(crystal_cif, "process_pool", broken)
    monkeypatch.setattr(crystal_cif, "MIN_CIFS_FOR_PROCESSES", 2)
    monkeypatch.setattr(crystal_cif.os, "cpu_count", lambda: 2)
    assert all(isinstance(each, Crystal) for each in parse_rows([{"cif": GOOD}] * 3, 20))
    assert "one at a time" in caplog.text
