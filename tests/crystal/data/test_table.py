"""Tables of crystals as users have them: every source gives the same, and every bad one is a real file built here."""

import itertools
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.crystals.data import (
    CRYSTALS,
    STRUCTURES,
    brute_distances,
    cif,
    cif_csv,
    cif_folder,
    cif_parquet,
    crystal_of,
    needs_real_data,
    same,
    tensor_parquet,
    tensor_row,
    write_csv,
    write_parquet,
)
from tests.support.crystals.models import SIZES, batch_of, crystals
from tests.support.crystals.sets import MAX_ATOMS
from utils.crystal.data.table import column_array, load_crystals, make_table, translated
from utils.crystal.structure import Crystal, formula_of, pair_distances, volume
from utils.draws import SampleDraws
from utils.errors import UserError


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


def test_a_table_keeps_coordinates_in_the_cell():
    """1 - 1e-9 is below one, and one in float32."""
    table = make_table([Crystal(np.array([3]), np.array([[1 - 1e-9, 0.5, 0]]), 4 * np.eye(3))])
    assert table.frac_coords.max() < 1


SOURCES = {
    "tensor parquet": tensor_parquet,
    "cif parquet": cif_parquet,
    "cif csv": cif_csv,
    "folder": cif_folder,
    "folder, symmetrised": lambda folder: cif_folder(folder, True),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_crystals(source, tmp_path):
    table = load_crystals(SOURCES[source](tmp_path))
    found = dict(zip(table.columns["material_id"], table.crystals(), strict=True))
    assert set(found) == set(STRUCTURES)
    assert table.skipped == []
    for name, structure in STRUCTURES.items():
        assert same(found[name], crystal_of(structure)), name
        assert volume(found[name].lattice) == pytest.approx(structure.volume, rel=1e-5)
        assert formula_of(
            found[name].atomic_numbers
        ) == structure.composition.reduced_composition.alphabetical_formula.replace(" ", "").replace("1", "")
    if "folder" not in source:
        assert table.columns["gap"].dtype == np.float64
        assert np.array_equal(table.columns["gap"], [1.5, np.nan, 0, np.nan, -2.25, 3], equal_nan=True)


def test_padding_and_parts_of_a_table(tmp_path):
    table = load_crystals(tensor_parquet(tmp_path), max_atoms=12)
    assert table.atomic_numbers.shape == (len(STRUCTURES), 12)
    assert ((table.atomic_numbers > 0).sum(axis=1) == table.num_atoms).all()
    assert table.frac_coords[table.atomic_numbers == 0].max() == 0
    mask = table.num_atoms > 4
    part = table.take(mask)
    assert len(part) == mask.sum()
    assert list(part.columns["material_id"]) == list(table.columns["material_id"][mask])
    assert same(part.crystal(1), table.crystal(int(np.flatnonzero(mask)[1])))
    assert table.identity() == table.take(np.arange(len(table))).identity() != part.identity()


def test_split_is_a_column(tmp_path):
    rows = [
        tensor_row(each) | {"material_id": name, "split": "train" if i % 3 else "val"}
        for i, (name, each) in enumerate(STRUCTURES.items())
    ]
    path = write_parquet(tmp_path / "s.parquet", rows)
    assert list(load_crystals(path, "val").columns["material_id"]) == ["NaCl", "quartz"]
    assert len(load_crystals(path, "train")) == 4
    assert len(load_crystals(path)) == 6
    with pytest.raises(UserError, match=r"--data: .*no rows of split test; its column split says train, val"):
        load_crystals(path, "test", flag="--data")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_split_can_be_a_number(tmp_path, kind):
    rows = [{"cif": cif(STRUCTURES["CsCl"]), "split": i % 2} for i in range(4)]
    path = (write_csv if kind == "csv" else write_parquet)(tmp_path / f"s.{kind}", rows)
    assert len(load_crystals(path, "1")) == 2


def test_large_crystals_are_left_out_and_counted(tmp_path, caplog):
    table = load_crystals(tensor_parquet(tmp_path), max_atoms=6, max_skipped_fraction=0.0)
    assert len(table) == 4
    assert {each["id"] for each in table.skipped} == {"NaCl", "quartz"}
    assert all("more than --max_atoms 6" in each["reason"] for each in table.skipped)
    assert "2 of 6 crystals are skipped" in caplog.text
    with pytest.raises(UserError, match=r"6 of 6 crystals .* cannot be used .*--max_atoms 1"):
        load_crystals(str(tmp_path / "t.parquet"), max_atoms=1)


def test_first_rows_only(tmp_path):
    assert list(load_crystals(tensor_parquet(tmp_path), max_samples=2).columns["material_id"]) == ["NaCl", "CsCl"]


def test_ids_and_formulas_of_a_csv_stay_text(tmp_path):
    """InF is indium fluoride and no infinity, 0042 an id."""
    rows = [
        {
            "material_id": f"004{i}",
            "cif": cif(STRUCTURES["CsCl"]),
            "pretty": ["InF", "NaN", "1e5"][i],
            "label": ["CsCl", "3", ""][i],
        }
        for i in range(3)
    ]
    table = load_crystals(write_csv(tmp_path / "ids.csv", rows))
    assert list(table.columns["material_id"]) == ["0040", "0041", "0042"]
    assert list(table.columns["label"]) == ["CsCl", "3", None]
    rows[2]["pretty"] = "LiF"
    table = load_crystals(write_csv(tmp_path / "ids.csv", rows))
    assert list(table.columns["pretty"]) == ["InF", "NaN", "LiF"]


def test_a_csv_as_excel_saves_it(tmp_path):
    path = Path(write_csv(tmp_path / "bom.csv", [{"cif": cif(STRUCTURES["CsCl"]), "gap": 1}]))
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_crystals(str(path)).columns["gap"].tolist() == [1.0]


def test_a_csv_with_a_very_long_cif(tmp_path):
    text = cif(STRUCTURES["CsCl"]) + "\n" + "# a comment\n" * 12000
    assert len(text) > 131072
    assert len(load_crystals(write_csv(tmp_path / "long.csv", [{"cif": text}]))) == 1


def test_columns_with_gaps():
    assert np.array_equal(column_array([1, None, 2.5, float("nan")]), [1, np.nan, 2.5, np.nan], equal_nan=True)
    assert np.isnan(column_array([None, None])).all()
    assert column_array(["a", None]).tolist() == ["a", None]


def test_a_crystal_may_have_a_cif_or_arrays(tmp_path):
    """Rows of one file, with and without processes, for these are handed less than the row."""
    rows = [
        {"cif": None} | tensor_row(STRUCTURES["NaCl"]),
        {"cif": cif(STRUCTURES["CsCl"])} | dict.fromkeys(tensor_row(STRUCTURES["NaCl"])),
    ]
    assert load_crystals(write_parquet(tmp_path / "both.parquet", rows)).num_atoms.tolist() == [8, 2]


def make_nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_text(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BAD_SOURCES = {
    "no such file": (lambda folder: folder / "nothing.parquet", "does not exist; give a folder of CIF"),
    "empty folder": (lambda folder: make_nothing(folder / "nothing"), "holds no crystals; give a folder of CIF"),
    "another kind of file": (lambda folder: make_text(folder / "a.txt", "x"), "holds no crystals"),
    "other columns": (lambda folder: write_parquet(folder / "a.parquet", [{"text": "x", "lattice": [1.0]}]), "has the columns lattice, text; crystals need a column cif, or atomic_numbers, frac_coords, lattice"),
    "other columns, csv": (lambda folder: write_csv(folder / "a.csv", [{"text": "x", "y": 1}]), "has the columns text, y; crystals need"),
    "no rows": (lambda folder: pq.write_table(pa.table({"cif": pa.array([], pa.string())}), folder / "a.parquet") or folder / "a.parquet", "no rows"),
    "no columns": (lambda folder: pq.write_table(pa.table({}), folder / "a.parquet") or folder / "a.parquet", "no rows"),
    "csv of no rows": (lambda folder: make_text(folder / "a.csv", "material_id,cif\n"), "no rows"),
    "empty csv": (lambda folder: make_text(folder / "a.csv", ""), "no rows"),
    "no parquet": (lambda folder: make_text(folder / "a.parquet", "PAR1 or not"), "cannot be read"),
    "empty parquet": (lambda folder: make_text(folder / "a.parquet", ""), "cannot be read"),
    "csv in another encoding": (lambda folder: make_text(folder / "a.csv", "cif,name\nx,Gr\xfcn\n".encode("latin-1")), "cannot be read"),
    "binary csv": (lambda folder: make_text(folder / "a.csv", b"\x80\0\1\2"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_sources_without_crystals_are_refused(name, tmp_path):
    make, said = BAD_SOURCES[name]
    path = str(make(tmp_path))
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        load_crystals(path, flag="--data")
    assert str(refused.value).startswith(f"--data: {path}")


@needs_real_data
@pytest.mark.parametrize("name", ["perov_5", "mp_20_biternary"])
def test_real_crystals_stay_what_they_are(name):
    path = CRYSTALS / f"{name}.parquet"
    table = load_crystals(str(path), "val", max_samples=60)
    assert len(table) == 60
    rows = {row["material_id"]: row for row in pq.read_table(path, filters=[("split", "=", "val")]).to_pylist()}
    for i in range(0, 60, 6):
        row = rows[table.columns["material_id"][i]]
        crystal = Crystal(
            np.array(row["atomic_numbers"]),
            np.array(row["frac_coords"]).reshape(-1, 3),
            np.array(row["lattice"]).reshape(3, 3),
        )
        assert same(table.crystal(i), crystal)
        assert pair_distances(table.crystal(i)) == pytest.approx(brute_distances(table.crystal(i)), abs=1e-9)
