"""What sampling crystals leaves behind: CIF files, a table with every digit, and a picture."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.crystal.structure import MAX_ATOMIC_NUMBER, Crystal, cell_parameters, counts_of, element_symbols
from utils.errors import UserError
from utils.files import replace_durably, temporary_path, write_text

TABLE_FILE, LINES_FILE = "samples.parquet", "samples.jsonl"
# fmt: off
SCHEMA: list[tuple[str, pa.DataType]] = [
    ("material_id", pa.string()), ("formula", pa.string()), ("num_atoms", pa.int64()),
    ("atomic_numbers", pa.list_(pa.int64())), ("frac_coords", pa.list_(pa.float64())),
    ("lattice", pa.list_(pa.float64())), ("seed", pa.int64()),
]
# fmt: on


def symbol_of(number: int) -> str:
    """An element's symbol; X for a number that is none's."""
    return element_symbols()[number if 1 <= number <= MAX_ATOMIC_NUMBER else 0]


def any_formula(atomic_numbers: np.ndarray) -> str:
    """`formula_of` what may be garbage: X for what is no element, and "no atoms"."""
    if not len(atomic_numbers):
        return "no atoms"
    known = np.where((atomic_numbers < 1) | (atomic_numbers > MAX_ATOMIC_NUMBER), 0, atomic_numbers)
    counts = {symbol_of(number): count for number, count in counts_of(known).items()}
    return "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in sorted(counts.items()))


def write_cif(crystal: Crystal, path: Path) -> None:
    """A CIF file with all sites and no symmetry (P 1). A number that is not finite is written as ?, CIF's unknown."""
    numbers = crystal.atomic_numbers
    lengths, angles = cell_parameters(np.asarray(crystal.lattice, dtype=np.float64))
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    counts = Counter(symbol_of(int(number)) for number in numbers)
    lines = [
        f"data_{any_formula(numbers).replace(' ', '_')}",
        "_symmetry_space_group_name_H-M  'P 1'",
        "_symmetry_Int_Tables_number  1",
        f"_chemical_formula_sum  '{' '.join(f'{symbol}{count}' for symbol, count in sorted(counts.items()))}'",
        *(f"_cell_{name}  {digits(value)}" for name, value in zip(names, [*lengths, *angles], strict=True)),
        *("loop_", "_symmetry_equiv_pos_as_xyz", "'x, y, z'"),
        *("loop_", "_atom_site_type_symbol", "_atom_site_label"),
        *(f"_atom_site_fract_{axis}" for axis in "xyz"),
        "_atom_site_occupancy",
    ]
    for i, (number, position) in enumerate(zip(numbers, crystal.frac_coords, strict=True)):
        symbol = symbol_of(int(number))
        lines.append(f"{symbol}  {symbol}{i}  {'  '.join(map(digits, position))}  1")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def digits(value: float) -> str:
    """A number of a CIF file."""
    return f"{value:.8f}" if np.isfinite(value) else "?"


def save_crystals(
    output_dir: Path, crystals: list[Crystal], requests: Sequence[dict[str, Any]], settings: dict[str, Any], seed: int
) -> None:
    """00000.cif, 00001.cif, ...; samples.parquet, which a dataset can be read from again, with what was asked of each
    crystal in columns; samples.jsonl, which says how each was made. Crystal i has seed `seed` + i.
    """
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for i, (crystal, request) in enumerate(zip(crystals, requests, strict=True)):
        write_cif(crystal, output_dir / f"{i:05d}.cif")
        rows.append(table_row(crystal, f"{i:05d}", seed + i))
        line = {"file_name": f"{i:05d}.cif", "request": request, "settings": settings, "seed": seed + i}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    columns = {name: pa.array([row[name] for row in rows], type=kind) for name, kind in SCHEMA}
    for name in dict.fromkeys(name for request in requests for name in request):
        values = request_column([request.get(name) for request in requests])
        columns[f"requested_{name}" if name in columns else name] = values
    temporary = temporary_path(output_dir / TABLE_FILE)
    pq.write_table(pa.table(columns), temporary)
    replace_durably(temporary, output_dir / TABLE_FILE)
    write_text(output_dir / LINES_FILE, "".join(lines))


def table_row(crystal: Crystal, name: str, seed: int) -> dict[str, Any]:
    """A row of samples.parquet."""
    return {
        "material_id": name,
        "formula": any_formula(crystal.atomic_numbers),
        "num_atoms": len(crystal.atomic_numbers),
        "atomic_numbers": np.asarray(crystal.atomic_numbers, dtype=np.int64).tolist(),
        "frac_coords": np.asarray(crystal.frac_coords, dtype=np.float64).reshape(-1).tolist(),
        "lattice": np.asarray(crystal.lattice, dtype=np.float64).reshape(-1).tolist(),
        "seed": seed,
    }


def request_column(values: list[Any]) -> pa.Array:
    """What was asked of each crystal: numbers if it is only that, anything else as text."""
    if all(value is None or isinstance(value, int | float) for value in values):
        return pa.array([None if value is None else float(value) for value in values], type=pa.float64())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, type=pa.string())


def read_samples(folder: Path, flag: str = "--samples") -> tuple[list[Crystal], list[dict[str, Any]]]:
    """The crystals that `save_crystals` wrote, every digit of them, sound or not, and what was asked of each. Raises
    UserError, which names the flag, for a folder that is not one of these.
    """
    try:
        rows = pq.read_table(folder / TABLE_FILE, columns=[name for name, _ in SCHEMA]).to_pylist()
        lines = [json.loads(line) for line in (folder / LINES_FILE).read_text(encoding="utf-8").splitlines()]
        requests = [line["request"] for line in lines]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} {folder}: no crystals of sample.py ({reason}); give a folder it wrote") from error
    if len(rows) != len(requests):
        raise UserError(
            f"{flag} {folder}: {TABLE_FILE} has {len(rows)} crystals and {LINES_FILE} {len(requests)}; sample again"
        )
    crystals = [
        Crystal(
            np.array(row["atomic_numbers"], dtype=np.int64),
            np.array(row["frac_coords"], dtype=np.float64).reshape(-1, 3),
            np.array(row["lattice"], dtype=np.float64).reshape(3, 3),
        )
        for row in rows
    ]
    return crystals, requests
