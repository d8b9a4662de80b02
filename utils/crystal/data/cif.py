"""The rows of a source -> crystals in reduced cells. CIF files are read in processes that import this module alone: no
torch, whose CUDA no process may inherit, and no datasets.
"""

import logging
import os
import re
import warnings
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any

import numpy as np

from utils.crystal.structure import (
    MAX_ATOMIC_NUMBER,
    Crystal,
    crystal_package,
    elements,
    min_distance,
    niggli_reduced,
    volume,
)
from utils.crystal.workers import process_pool
from utils.errors import UserError

logger = logging.getLogger(__name__)
MIN_SITE_DISTANCE = 0.5  # Angstrom; nearer ones are one site twice (H2 has 0.74)
TENSOR_COLUMNS = ("atomic_numbers", "frac_coords", "lattice")
CIF_COLUMN = "cif"
CELL_KEYS = tuple(
    f"_cell_{what}" for what in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
)
# One CIF takes 2 ms, or 20 with many symmetry operations; processes need 2 to 5 s to start.
MIN_CIFS_FOR_PROCESSES = 1000


def parse_rows(rows: list[dict[str, Any]], max_atoms: int) -> list[Crystal | str]:
    """`parse_row` of each; many CIF files in processes."""
    columns = (CIF_COLUMN, *TENSOR_COLUMNS)
    needed = [{name: row[name] for name in columns if row.get(name) is not None} for row in rows]
    workers = os.cpu_count() or 1
    if workers > 1 and sum(CIF_COLUMN in row for row in needed) >= MIN_CIFS_FOR_PROCESSES:
        try:
            with process_pool(workers, "pymatgen.io.cif") as pool:
                return list(pool.map(parse_row, needed, repeat(max_atoms), chunksize=50).result())
        except (OSError, BrokenProcessPool) as error:  # a process died, or none can be started
            logger.warning("CIF files are read one at a time: %s", error)
    return [parse_row(row, max_atoms) for row in needed]


def parse_row(row: dict[str, Any], max_atoms: int) -> Crystal | str:
    """The crystal of a row in its reduced cell, or why it cannot be used."""
    try:
        crystal = crystal_of_arrays(row) if has_arrays(row) else crystal_of_cif(str(row.get(CIF_COLUMN) or ""))
        check_sites(crystal, max_atoms)
        reduced = niggli_reduced(crystal)
    except UserError:
        raise
    except Exception as error:  # pymatgen raises many kinds for what it cannot read
        return " ".join(str(error).split())[:200] or type(error).__name__
    if (distance := min_distance(reduced)) < MIN_SITE_DISTANCE:
        return f"two sites are {distance:.2f} Angstrom apart: one site twice?"
    return reduced


def has_arrays(row: dict[str, Any]) -> bool:
    """Whether a row is to be read as arrays: it has some of them, and no CIF."""
    return not row.get(CIF_COLUMN) and any(row.get(name) is not None for name in TENSOR_COLUMNS)


def crystal_of_arrays(row: dict[str, Any]) -> Crystal:
    """From atomic_numbers (n,), frac_coords (3 n,) and lattice (9,), the rows of its vectors. Raises ValueError."""
    missing = [name for name in TENSOR_COLUMNS if row.get(name) is None]
    if missing:
        raise ValueError(f"no {missing[0]}")
    numbers, coords, lattice = (np.asarray(row[name], dtype=np.float64).reshape(-1) for name in TENSOR_COLUMNS)
    if len(coords) != 3 * len(numbers):
        raise ValueError(f"{len(numbers)} atoms with {len(coords)} coordinates, which should be three of each")
    if len(lattice) != 9:
        raise ValueError(f"a lattice of {len(lattice)} numbers, which should be nine")
    if not np.array_equal(numbers, np.round(numbers)):
        raise ValueError("an atomic number is not a whole number")
    return Crystal(numbers.astype(np.int64), coords.reshape(-1, 3), lattice.reshape(3, 3))


def crystal_of_cif(text: str) -> Crystal:
    """From the text of a CIF file with one crystal. Raises ValueError for whatever pymatgen would guess at: symmetry
    that is not said, symbols of no element, sites that are occupied in part or missing from the file.
    """
    if not text.strip():
        raise ValueError("the CIF is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parser = crystal_package("pymatgen.io.cif").CifParser.from_str(text)
        except (ValueError, KeyError, IndexError, AssertionError) as error:
            raise ValueError(f"it cannot be read as a CIF: {error}") from error
        blocks = [block for block in parser.as_dict().values() if "_atom_site_fract_x" in block]
        if len(blocks) != 1:
            raise ValueError(f"{len(blocks)} blocks with _atom_site_fract_x, where a crystal is one")
        check_block(blocks[0])
        try:
            (structure,) = parser.parse_structures(primitive=False)
        except ValueError as error:
            reason = [text for text in parser.warnings if "No structure parsed" in text] or [str(error)]
            raise ValueError(reason[-1].rpartition("in CIF.")[2]) from error
    if any("Defaulting to P1" in text for text in parser.warnings):
        raise ValueError("it says nothing of symmetry: no loop of operations, and no space group that is known")
    if not structure.is_ordered:
        raise ValueError("a site is occupied in part, or by more than one element")
    check_formula(blocks[0], structure)
    numbers = np.array([site.specie.Z for site in structure])
    return Crystal(numbers, np.asarray(structure.frac_coords), np.asarray(structure.lattice.matrix))


def check_block(block: dict[str, Any]) -> None:
    """Raises ValueError for a CIF's block without a cell, or with symbols of no element, of which pymatgen would take
    the first letters: the vacancy Vac is no vanadium.
    """
    missing = [key for key in CELL_KEYS if key not in block]
    if missing:
        raise ValueError(f"no {missing[0]}")
    negative = [key for key in CELL_KEYS if str(block[key]).startswith("-")]
    if negative:
        raise ValueError(f"{negative[0]} is {block[negative[0]]}")
    symbols = block.get("_atom_site_type_symbol", [])
    for symbol in [symbols] if isinstance(symbols, str) else symbols:
        letters = re.match("[A-Za-z]*", symbol)
        if letters is None or letters[0].title() not in {*elements(), "D", "T"}:
            raise ValueError(f"there is no element {symbol}")


def check_formula(block: dict[str, Any], structure: Any) -> None:
    """Raises ValueError where the sites are not those of the formula that a CIF's block gives: a file that ends early,
    or hydrogen that nobody saw.
    """
    composition = crystal_package("pymatgen.core").Composition
    try:
        said = composition(block.get("_chemical_formula_sum", "")).reduced_formula
    except (ValueError, TypeError):  # "?" is allowed
        return
    found = structure.composition.element_composition.reduced_formula
    if said and said != found:
        raise ValueError(f"its sites are {found}, and its _chemical_formula_sum is {said}")


def check_sites(crystal: Crystal, max_atoms: int) -> None:
    """Raises ValueError for what no reduction mends."""
    if not len(crystal.atomic_numbers):
        raise ValueError("no atoms")
    if len(crystal.atomic_numbers) > max_atoms:
        raise ValueError(f"{len(crystal.atomic_numbers)} atoms, more than --max_atoms {max_atoms}")
    if not (np.isfinite(crystal.frac_coords).all() and np.isfinite(crystal.lattice).all()):
        raise ValueError("a coordinate is not finite")
    if crystal.atomic_numbers.min() < 1 or crystal.atomic_numbers.max() > MAX_ATOMIC_NUMBER:
        raise ValueError(f"an atomic number is not between 1 and {MAX_ATOMIC_NUMBER}")
    if not 1e-3 <= volume(crystal.lattice) < np.inf:
        raise ValueError("the cell is flat, or larger than numbers are")
