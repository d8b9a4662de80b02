"""Whether structures are valid, equal, unique and novel, by pymatgen's matcher in processes that can be killed.

A matcher that has met a bad pair may compute for hours, so each comparison has its time. The processes import this
module and not the script, and so must not find torch here.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from utils.crystal.structure import (
    MAX_ATOMIC_NUMBER,
    Crystal,
    crystal_package,
    formula_of,
    niggli_reduced,
    pair_distances,
    to_structure,
    volume,
)
from utils.crystal.workers import FAILED, TIMED_OUT, outcomes
from utils.errors import UserError

logger = logging.getLogger(__name__)
MIN_DISTANCE, MIN_VOLUME = 0.5, 0.1  # Angstrom and cubic Angstrom
TOLERANCES = {"stol": 0.5, "angle_tol": 10, "ltol": 0.3}  # CDVAE's, and of those who compare with it
TIMEOUT_S = 30.0  # a pair of 20 atoms takes 0.02 s


# ---- structural validity


def is_structurally_valid(crystal: Crystal) -> bool:
    """Volume at least 0.1 cubic Angstrom and no two sites nearer than 0.5 Angstrom, periodic images included; those of
    a site itself do not count. Whatever is no crystal (not finite, no such element, a flat cell) is invalid.

    Source: CDVAE, Xie et al. 2022, arXiv 2110.06197, section 5.2, with the code's bound on the volume.
    """
    return reduced_if_valid(crystal) is not None


def reduced_if_valid(crystal: Crystal) -> Crystal | None:
    """Its Niggli cell, or None where `is_structurally_valid` says no. Never raises but for a missing package."""
    try:
        atomic_numbers = np.asarray(crystal.atomic_numbers, dtype=np.int64)
        frac_coords, lattice = (np.asarray(each, dtype=np.float64) for each in crystal[1:])
        sound = (
            len(atomic_numbers) > 0
            and frac_coords.shape == (len(atomic_numbers), 3)
            and np.isfinite(frac_coords).all()
            and np.isfinite(lattice).all()
            and 1 <= atomic_numbers.min() <= atomic_numbers.max() <= MAX_ATOMIC_NUMBER
        )
        with np.errstate(all="ignore"):
            if not sound or not MIN_VOLUME <= volume(lattice) < np.inf:
                return None
            reduced = niggli_reduced(Crystal(atomic_numbers, frac_coords, lattice))
            distances = pair_distances(reduced)
        others = distances[~np.eye(len(distances), dtype=bool)]
        return None if (others < MIN_DISTANCE).any() or not np.isfinite(distances).all() else reduced
    except UserError:
        raise
    except Exception:  # of cells that cannot be reduced, spglib and numpy raise many kinds
        return None


def formula_if_any(atomic_numbers: np.ndarray) -> str | None:
    """`formula_of`, or None where there are no atoms or no such elements."""
    numbers = np.asarray(atomic_numbers)
    return formula_of(numbers) if numbers.size and ((numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER)).all() else None


@lru_cache(maxsize=1)
def structure_matcher() -> Any:
    """pymatgen's, with the field's tolerances."""
    return crystal_package("pymatgen.analysis.structure_matcher").StructureMatcher(**TOLERANCES)


def comparable(a: Crystal, b: Crystal) -> bool:
    """Whether both are valid structures of one composition: no others ever match."""
    same = formula_if_any(a.atomic_numbers) == formula_if_any(b.atomic_numbers)
    return same and is_structurally_valid(a) and is_structurally_valid(b)


def match_rmsd(a: Crystal, b: Crystal) -> float | None:
    """Root mean square displacement of two crystals' sites, in units of (V / n)^(1/3); None if they do not match.
    pymatgen scales both to one volume and takes their primitive cells. Source: CDVAE, section 5.1.
    """
    if not comparable(a, b):
        return None
    found = structure_matcher().get_rms_dist(to_structure(a), to_structure(b))
    return None if found is None else float(found[0])


def is_match(a: Crystal, b: Crystal) -> bool:
    """Whether `match_rmsd` finds a match: several times faster, for it stops at the first."""
    return comparable(a, b) and bool(structure_matcher().fit(to_structure(a), to_structure(b)))


class Matches(NamedTuple):
    rmsds: list[float | None]  # None where a pair does not match
    num_timed_out: int  # of those without a match
    num_failed: int  # of those without a match: the matcher raised, or its process died


def match_pairs(
    pairs: Sequence[tuple[Crystal, Crystal]],
    num_processes: int = 1,
    timeout_s: float = TIMEOUT_S,
    matcher: Callable[[Crystal, Crystal], float | None] = match_rmsd,
) -> Matches:
    """`match_rmsd` of each pair, each within `timeout_s` seconds."""
    found = outcomes(matcher, pairs, num_processes, timeout_s)
    happened = [what for what, _ in found]
    return Matches([rmsd for _, rmsd in found], happened.count(TIMED_OUT), happened.count(FAILED))


# ---- sets of structures


def rows_by_formula(crystals: Sequence[Crystal], formulas: Collection[str] | None = None) -> dict[str, list[int]]:
    """Rows of the valid ones of each smallest formula, in order; of some formulas only, if said which."""
    rows: dict[str, list[int]] = {}
    for row, crystal in enumerate(crystals):
        formula = formula_if_any(crystal.atomic_numbers)
        if formula is not None and (formulas is None or formula in formulas) and is_structurally_valid(crystal):
            rows.setdefault(formula, []).append(row)
    return rows


def matched(pairs: list[tuple[Crystal, Crystal]], num_processes: int, timeout_s: float) -> list[bool]:
    """`is_match` of each; a pair that had no time counts as different, with a warning."""
    found = outcomes(is_match, pairs, num_processes, timeout_s)
    if late := sum(what == TIMED_OUT for what, _ in found):
        logger.warning("%d pairs of structures took over %g s to compare and count as different", late, timeout_s)
    return [bool(equal) for _, equal in found]


def unique(crystals: Sequence[Crystal], num_processes: int = 1, timeout_s: float = TIMEOUT_S) -> np.ndarray:
    """(n,) bool: True for the first of each group of equal structures (`is_match`): MatterGen's uniqueness, arXiv
    2312.03687. Invalid ones equal nothing and are True: count them together with validity.
    """
    is_unique = np.ones(len(crystals), dtype=bool)
    groups = list(rows_by_formula(crystals).values())
    while groups := [rows for rows in groups if len(rows) > 1]:
        rows = [(first, row) for first, *others in groups for row in others]
        equal = matched([(crystals[first], crystals[row]) for first, row in rows], num_processes, timeout_s)
        is_unique[[row for (_, row), found in zip(rows, equal, strict=True) if found]] = False
        groups = [[row for row in others if is_unique[row]] for _, *others in groups]
    return is_unique


def novel(
    crystals: Sequence[Crystal], training: Sequence[Crystal], num_processes: int = 1, timeout_s: float = TIMEOUT_S
) -> np.ndarray:
    """(n,) bool: True where no training structure is equal (`is_match`). Invalid ones equal nothing and are True."""
    is_novel = np.ones(len(crystals), dtype=bool)
    ours = rows_by_formula(crystals)
    known = rows_by_formula(training, ours)
    rows = [(row, other) for formula, others in known.items() for row in ours[formula] for other in others]
    equal = matched([(crystals[row], training[other]) for row, other in rows], num_processes, timeout_s)
    is_novel[[row for (row, _), found in zip(rows, equal, strict=True) if found]] = False
    return is_novel
