"""A crystal as arrays, and the geometry of its cell. Packages of requirements-crystal.txt are imported where they are
used.
"""

import re
from collections import Counter
from functools import lru_cache, reduce
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from utils.errors import UserError

MAX_ATOMIC_NUMBER = 118
# Every cell vector of the 3 x 3 x 3 cells around one: enough for the nearest image in a reduced cell.
NEIGHBOUR_CELLS = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)


class Crystal(NamedTuple):
    atomic_numbers: np.ndarray  # (n,) int, 1 = hydrogen
    frac_coords: np.ndarray  # (n, 3) in [0, 1)
    lattice: np.ndarray  # (3, 3), rows are the cell's vectors in Angstrom


def crystal_package(name: str) -> Any:
    """A module of requirements-crystal.txt. Raises UserError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"crystals need the package {package}: pip install -r requirements-crystal.txt ({error})"
        ) from error


@lru_cache(maxsize=1)
def element_symbols() -> tuple[str, ...]:
    """By atomic number; that of number 0, which is no element, is X."""
    return tuple(crystal_package("ase.data").chemical_symbols[: MAX_ATOMIC_NUMBER + 1])


@lru_cache(maxsize=1)
def elements() -> dict[str, int]:
    """Atomic numbers by symbol."""
    return {symbol: number for number, symbol in enumerate(element_symbols()) if number}


def cell_parameters(lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row vectors (..., 3, 3) -> lengths (..., 3) in Angstrom and angles alpha, beta, gamma (..., 3) in degrees."""
    lengths = np.linalg.norm(lattice, axis=-1)
    unit = lattice / np.maximum(lengths, 1e-12)[..., None]
    cosines = [(unit[..., i, :] * unit[..., j, :]).sum(axis=-1) for i, j in ((1, 2), (0, 2), (0, 1))]
    return lengths, np.degrees(np.arccos(np.clip(np.stack(cosines, axis=-1), -1, 1)))


def cell_matrix(lengths: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The inverse of `cell_parameters`, with a along x and b in the xy plane. Angles that no cell has, such as
    three of 130 degrees, give a flat one.
    """
    cos_alpha, cos_beta, cos_gamma = np.moveaxis(np.cos(np.radians(angles)), -1, 0)
    sin_gamma = np.maximum(np.sin(np.radians(angles[..., 2])), 1e-6)
    matrix = np.zeros((*lengths.shape[:-1], 3, 3))
    matrix[..., 0, 0] = 1
    matrix[..., 1, 0], matrix[..., 1, 1] = cos_gamma, sin_gamma
    matrix[..., 2, 0] = cos_beta
    matrix[..., 2, 1] = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    matrix[..., 2, 2] = np.sqrt(np.maximum(1 - matrix[..., 2, 0] ** 2 - matrix[..., 2, 1] ** 2, 0))
    return matrix * lengths[..., None]


def volume(lattice: np.ndarray) -> float:
    """Of a cell (3, 3), in cubic Angstrom."""
    return float(abs(np.linalg.det(lattice)))


def pair_distances(crystal: Crystal) -> np.ndarray:
    """The shortest distance (n, n) of each pair of sites, periodic images included, in Angstrom; on the diagonal that
    of a site to its own images. Exact for reduced cells.
    """
    difference = crystal.frac_coords[:, None] - crystal.frac_coords[None]  # (n, n, 3)
    difference -= np.round(difference)
    vectors = (difference[:, :, None] + NEIGHBOUR_CELLS) @ crystal.lattice  # (n, n, 27, 3)
    distances = np.linalg.norm(vectors, axis=-1)
    own = np.eye(len(difference), dtype=bool)[:, :, None] & (NEIGHBOUR_CELLS == 0).all(axis=1)  # a site and itself
    return np.where(own, np.inf, distances).min(axis=-1)


def min_distance(crystal: Crystal) -> float:
    """The shortest distance of two sites, periodic images included, in Angstrom."""
    return float(pair_distances(crystal).min())


def niggli_reduced(crystal: Crystal) -> Crystal:
    """The same crystal in its Niggli cell, right-handed, sites in [0, 1). Raises ValueError where there is none, of a
    flat cell say.
    """
    lattice = np.asarray(crystal.lattice, dtype=np.float64)
    cartesian = crystal.frac_coords @ lattice
    reduced = crystal_package("spglib").niggli_reduce(lattice)
    if reduced is None or not 1e-3 <= volume(reduced) < np.inf:
        raise ValueError("the cell cannot be reduced")
    if np.linalg.det(reduced) < 0:
        reduced = -reduced
    frac_coords = wrapped(cartesian @ np.linalg.inv(reduced))
    return Crystal(crystal.atomic_numbers, frac_coords, cell_matrix(*cell_parameters(reduced)))


def wrapped(frac_coords: np.ndarray) -> np.ndarray:
    """Fractional coordinates (..., 3) in [0, 1)."""
    inside = frac_coords - np.floor(frac_coords)
    return np.where(inside >= 1, 0.0, inside)  # of -1e-17 the difference rounds to one


def counts_of(atomic_numbers: np.ndarray) -> dict[int, int]:
    """Atoms of each element in the smallest formula unit: 4 Si and 8 O are {14: 1, 8: 2}, by ascending number."""
    found = Counter(int(number) for number in atomic_numbers)
    divisor = reduce(gcd, found.values())
    return {number: found[number] // divisor for number in sorted(found)}


def formula_of(atomic_numbers: np.ndarray) -> str:
    """The smallest formula unit, elements in alphabetical order: the same for every crystal of a composition."""
    counts = {element_symbols()[number]: count for number, count in counts_of(atomic_numbers).items()}
    return "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in sorted(counts.items()))


def parse_formula(text: str, flag: str = "--composition") -> dict[int, int]:
    """LiFePO4 -> {3: 1, 26: 1, 15: 1, 8: 4}, and Ca(OH)2 -> {20: 1, 8: 2, 1: 2}. Raises UserError, which names the
    flag, for anything but element symbols, whole numbers and brackets.
    """
    formula = text.strip()
    if not formula:
        raise UserError(f"{flag}: the formula is empty; give one such as LiFePO4")
    # Checked here, for pymatgen also takes 1e2 or 0.5 atoms, counts D as hydrogen and leaves out what is zero times.
    if rest := re.sub(r"^([A-Z][a-z]?|[0-9]+|[()\[\]{}])+", "", formula):
        raise UserError(
            f"{flag} {text}: cannot read '{rest}'; write element symbols, whole numbers and brackets, as in LiFePO4 "
            "or Ca(OH)2, without charges or dots"
        )
    for symbol in re.findall("[A-Z][a-z]?", formula):
        if symbol not in elements():
            raise UserError(f"{flag} {text}: there is no element {symbol}")
    if zero := re.search(r"([A-Z][a-z]?|[)\]}])0+(?![0-9])", formula):
        raise UserError(f"{flag} {text}: {zero[0]} asks for no atoms; leave it out")
    composition = crystal_package("pymatgen.core").Composition
    try:
        return {element.Z: int(count) for element, count in composition(formula).items()}
    except (ValueError, OverflowError) as error:
        raise UserError(f"{flag} {text}: it is no formula: {error}") from error


def parse_chemical_system(text: str, flag: str = "--chemical_system") -> list[int]:
    """Li-Fe-O -> [3, 8, 26]. Raises UserError, which names the flag, for what is no element."""
    symbols = [part.strip() for part in text.split("-")]
    for symbol in symbols:
        if symbol not in elements():
            raise UserError(f"{flag} {text}: there is no element '{symbol}'; write symbols with dashes, as in Li-Fe-O")
    if len(set(symbols)) < len(symbols):
        raise UserError(f"{flag} {text}: an element is named twice; name it once")
    return sorted(elements()[symbol] for symbol in symbols)


def to_structure(crystal: Crystal) -> Any:
    """As a `pymatgen.core.Structure`."""
    structure = crystal_package("pymatgen.core").Structure
    return structure(crystal.lattice, [int(number) for number in crystal.atomic_numbers], crystal.frac_coords)
