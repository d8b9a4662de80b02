"""Figures of crystals: validity, reconstruction, coverage, distributions, what was asked for, and energies."""

import importlib
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from utils.crystal.matching import formula_if_any, is_structurally_valid, reduced_if_valid
from utils.crystal.structure import (
    MAX_ATOMIC_NUMBER,
    Crystal,
    cell_parameters,
    counts_of,
    crystal_package,
    element_symbols,
    volume,
)
from utils.errors import UserError
from utils.evaluation.figures import Figure, at_most, half_sampling_figure, mean_figure, random_halves, share_figure

OXIDATION_STATES = "smact14"  # the set of SMACT's that CDVAE's figures were made with; SMACT's own default is newer
MAX_COMBINATIONS = 10**7  # of oxidation states: seconds; eight transition metals in one formula have about as many
GRAMS_PER_CM3 = 1.66053906660  # of one atomic mass unit in a cubic Angstrom
MAX_COMPARED = 5_000  # samples, reference and held-out crystals, drawn at random, where every pair counts
NEAR = 0.95  # share of real crystals that lie near others
RADII, SMEARING = np.arange(0.5, 7.01, 0.1), 0.2  # of the structure fingerprint, Angstrom


# ---- validity


def is_compositionally_valid(atomic_numbers: np.ndarray) -> bool:
    """Whether SMACT finds oxidation states that balance, anions more electronegative than cations; one element, or
    metals only, are valid as they are. An element without data makes it invalid, as do over 10^7 combinations.

    Source: CDVAE, Xie et al. 2022, arXiv 2110.06197, section 5.2; SMACT's oxidation states of 2014, as there.
    """
    formula = formula_if_any(atomic_numbers)
    return formula is not None and balances(formula)


@lru_cache(maxsize=100_000)
def balances(formula: str) -> bool:
    """`is_compositionally_valid` of a smallest formula unit: slow, and the same few are asked for again and again."""
    smact, screening = crystal_package("smact"), crystal_package("smact.screening")
    symbols = crystal_package("pymatgen.core").Composition(formula).as_dict()
    try:
        states = [smact.Element(symbol).oxidation_states_smact14 or [] for symbol in symbols]
        alloy = all(symbol in smact.metals for symbol in symbols)
        if not alloy and len(symbols) > 1 and math.prod(map(len, states)) > MAX_COMBINATIONS:
            return False
        return bool(screening.smact_validity(formula, oxidation_states_set=OXIDATION_STATES))
    except (KeyError, NameError):  # an element that SMACT does not know
        return len(symbols) == 1


def share(hits: Sequence[bool] | np.ndarray, note: str = "") -> Figure:
    """`share_figure` of what is no tensor."""
    return share_figure(torch.as_tensor(np.asarray(hits, dtype=bool)), note)


# ---- fingerprints and coverage


@lru_cache(maxsize=1)
def element_table() -> np.ndarray:
    """(119, 4) by atomic number: period, group, Pauling electronegativity (the mean of all where there is none, of He
    say) and mass in u.
    """
    element = crystal_package("pymatgen.core").Element
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each element without electronegativity
        for number, one in enumerate(map(element, element_symbols()[1:]), start=1):
            table[number] = one.row, one.group, one.X or np.nan, float(one.atomic_mass)
    table[0] = np.nan
    table[:, 2] = np.where(np.isnan(table[:, 2]), np.nanmean(table[:, 2]), table[:, 2])
    return table


def structure_fingerprint(crystal: Crystal) -> np.ndarray | None:
    """(2 x 66,): at distances of 0.5 to 7 Angstrom, the mean density of neighbours about a site, in atoms per cubic
    Angstrom, smeared by 0.2; and the same with each pair weighted by its difference of electronegativity. It knows
    nothing of the choice of cell. None for what is not valid. This program's own: it compares with no published table.
    """
    reduced = reduced_if_valid(crystal)
    if reduced is None or min(cell_parameters(reduced.lattice)[0]) < RADII[0]:
        return None
    reach = RADII[-1] + 4 * SMEARING
    heights = 1 / np.linalg.norm(np.linalg.inv(reduced.lattice), axis=0)  # of the cell over each of its faces
    counts = np.ceil(reach / heights).astype(int) + 1
    cells = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in counts], indexing="ij"), axis=-1).reshape(-1, 3)
    difference = reduced.frac_coords[:, None] - reduced.frac_coords[None]  # (n, n, 3)
    distances = np.linalg.norm((difference[:, :, None] + cells) @ reduced.lattice, axis=-1)  # (n, n, cells)
    near = (distances > 1e-6) & (distances < reach)
    electronegativity = element_table()[reduced.atomic_numbers, 2]
    weights = np.abs(electronegativity[:, None] - electronegativity[None])[:, :, None].repeat(len(cells), axis=2)
    bells = np.exp(-0.5 * ((distances[near][:, None] - RADII) / SMEARING) ** 2) / (SMEARING * (2 * np.pi) ** 0.5)
    sums = np.stack([np.ones(int(near.sum())), weights[near]]) @ bells  # (2, 66)
    return (sums / (4 * np.pi * RADII**2 * len(difference))).reshape(-1)


def composition_fingerprint(atomic_numbers: np.ndarray) -> np.ndarray:
    """(118 + 3,): the fraction of each element, and the means of period, group and electronegativity. This program's
    own: it compares with no published table.
    """
    fractions = np.bincount(atomic_numbers, minlength=MAX_ATOMIC_NUMBER + 1)[1:] / len(atomic_numbers)
    return np.concatenate([fractions, element_table()[atomic_numbers, :3].mean(axis=0)])


def fingerprints(crystals: Sequence[Crystal]) -> np.ndarray:
    """Both fingerprints (n, 132 + 121) of at most 5,000 crystals; rows of NaN for crystals that are not valid."""
    crystals = [crystals[int(row)] for row in at_most(torch.arange(len(crystals)), MAX_COMPARED)]
    rows = np.full((len(crystals), 2 * len(RADII) + MAX_ATOMIC_NUMBER + 3), np.nan)
    for row, crystal in enumerate(crystals):
        structure = structure_fingerprint(crystal)
        if structure is not None:
            rows[row] = np.concatenate([structure, composition_fingerprint(crystal.atomic_numbers)])
    return rows


def finite(rows: np.ndarray) -> np.ndarray:
    """The rows without NaN."""
    return rows[np.isfinite(rows).all(axis=1)]


def fingerprint_scale(reference: np.ndarray) -> np.ndarray:
    """(D,) to divide fingerprints by, from those of the reference (n, D): structure, fractions and means of elements
    then count alike, with a variance of one each.
    """
    spread = reference.std(axis=0)
    structure, fractions, means = np.split(spread, [2 * len(RADII), 2 * len(RADII) + MAX_ATOMIC_NUMBER])
    blocks = [np.full_like(block, np.linalg.norm(block)) for block in (structure, fractions)]
    scale = np.concatenate([*blocks, means * len(means) ** 0.5])
    return np.where(scale > 1e-9, scale, 1.0)


def coverage_figures(
    samples: Sequence[Crystal], reference: Sequence[Crystal], held_out: Sequence[Crystal] | None = None
) -> dict[str, Figure]:
    """Recall: the share of the reference that has a sample near it; precision: the share of samples that have a
    reference near them; and AMSD, the mean distances that these count. Near is what 95 % of held-out real crystals are
    to the reference or, without any, 95 % of the reference to the rest of itself; so real samples have a precision of
    0.95. Samples that are not valid are near nothing. Of the reference at least two must be valid.

    Source of the definitions: CDVAE, section 5.2 (COV-R, COV-P, AMSD); fingerprints and thresholds are our own.
    """
    of_samples, of_reference = fingerprints(samples), finite(fingerprints(reference))
    scale = fingerprint_scale(of_reference)
    real = cdist((finite(fingerprints(held_out)) if held_out else of_reference) / scale, of_reference / scale)
    if not held_out:
        np.fill_diagonal(real, np.inf)
    near = float(np.quantile(real.min(axis=1), NEAR)) + 1e-6  # copies lie within rounding of each other
    distances = np.nan_to_num(cdist(of_samples / scale, of_reference / scale), nan=np.inf)  # (S, R)
    halves = random_halves(len(distances)).numpy()
    recalls = [float((distances[half].min(axis=0, initial=np.inf) <= near).mean()) for half in halves]
    recall, note = float((distances.min(axis=0) <= near).mean()), f"near is {near:.3g}"
    figures = {
        "coverage_recall": half_sampling_figure(recall, recalls, len(distances), note, lowest=0, highest=1),
        "coverage_precision": share(distances.min(axis=1) <= near, note),
    }
    distances = finite(distances)
    if len(distances) < 2:
        return figures
    amsds = [float(distances[half].min(axis=0).mean()) for half in random_halves(len(distances)).numpy()]
    amsd = float(distances.min(axis=0).mean())
    figures["amsd_recall"] = half_sampling_figure(amsd, amsds, len(distances), lowest=0)
    figures["amsd_precision"] = mean_figure(torch.as_tensor(distances.min(axis=1)))
    return figures


# ---- distributions


def density(crystal: Crystal) -> float:
    """Mass over volume, in g/cm^3."""
    return float(element_table()[crystal.atomic_numbers, 3].sum() * GRAMS_PER_CM3 / volume(crystal.lattice))


PROPERTIES: dict[str, Callable[[Crystal], float]] = {
    "density": density,
    "num_elements": lambda crystal: len(set(crystal.atomic_numbers.tolist())),
    "num_atoms": lambda crystal: len(crystal.atomic_numbers),
}


def wasserstein_figures(samples: Sequence[Crystal], reference: Sequence[Crystal]) -> dict[str, Figure]:
    """Wasserstein-1 distances of density (g/cm^3), number of elements and number of atoms, of what is structurally
    valid; nothing where fewer than two samples are. Source: CDVAE, section 5.2, and FlowMM, arXiv 2406.04713.
    """
    samples, reference = ([each for each in group if is_structurally_valid(each)] for group in (samples, reference))
    if len(samples) < 2 or not reference:
        return {}
    figures, halves = {}, random_halves(len(samples)).numpy()
    for name, measure in PROPERTIES.items():
        ours, real = (np.array([measure(each) for each in group]) for group in (samples, reference))
        parts = [ours, *(ours[half] for half in halves)]
        value, *of_halves = (float(wasserstein_distance(part, real)) for part in parts)
        figures[f"wasserstein_{name}"] = half_sampling_figure(value, of_halves, len(ours), lowest=0)
    return figures


# ---- what was asked for


def formula_match(crystals: Sequence[Crystal], asked: Sequence[Mapping[int, int]]) -> Figure:
    """Share with the smallest formula unit that was asked for, atomic number -> count, in whatever multiple."""
    hits = []
    for (numbers, *_), counts in zip(crystals, asked, strict=True):
        wanted = counts_of(np.repeat(list(counts), list(counts.values())))
        hits.append(formula_if_any(numbers) is not None and counts_of(numbers) == wanted)
    return share(hits)


def chemical_system_match(crystals: Sequence[Crystal], asked: Sequence[Collection[int]]) -> Figure:
    """Share that consists of the elements asked for, of all of them and of no others."""
    found = (set(np.asarray(crystal.atomic_numbers).tolist()) for crystal in crystals)
    return share([elements == set(wanted) for elements, wanted in zip(found, asked, strict=True)])


def is_cubic(crystal: Crystal, length_tol: float = 0.02, angle_tol: float = 1.0) -> bool:
    """Whether the cell, as it stands, is a cube: lengths within a share `length_tol` of their mean, angles within
    `angle_tol` degrees of 90. The primitive cell of a face-centred cube is none.
    """
    with np.errstate(all="ignore"):
        lengths, angles = cell_parameters(np.asarray(crystal.lattice, dtype=np.float64))
        equal = np.abs(lengths / lengths.mean() - 1) <= length_tol
    return bool(equal.all() and (np.abs(angles - 90) <= angle_tol).all())


# ---- energies


def load_calculator(text: str, flag: str = "--calculator") -> Any:
    """The ASE calculator that `package.module:factory` returns, called with nothing. Raises UserError, which names the
    flag, where it cannot be had.
    """
    module, _, factory = text.partition(":")
    if not module or not factory:
        raise UserError(f"{flag} {text}: write package.module:factory, a function that returns an ASE calculator")
    try:
        calculator = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # it is the user's code
        raise UserError(f"{flag} {text}: cannot make the calculator: {type(error).__name__}: {error}") from error
    if not hasattr(calculator, "get_potential_energy"):
        raise UserError(f"{flag} {text}: returns {type(calculator).__name__}, which is no ASE calculator")
    return calculator


def energies(crystals: Sequence[Crystal], calculator: Any) -> list[float | None]:
    """Energy per atom in eV, by an ASE calculator; None where it raises or finds no finite one, and for what is not
    structurally valid.
    """
    atoms_class = crystal_package("ase").Atoms
    found: list[float | None] = []
    for crystal in crystals:
        found.append(None)
        if not is_structurally_valid(crystal):
            continue
        numbers, frac_coords, lattice = crystal
        atoms = atoms_class(numbers, scaled_positions=frac_coords, cell=lattice, pbc=True, calculator=calculator)
        try:
            energy = float(atoms.get_potential_energy()) / len(atoms)
        except Exception:  # it is the user's code
            continue
        found[-1] = energy if math.isfinite(energy) else None
    return found


def energy_above_hull(
    counts: Mapping[int, int], energy_per_atom: float, entries: Sequence[tuple[Mapping[int, int], float]]
) -> float | None:
    """Energy per atom in eV above the convex hull of reference entries (atomic number -> count, energy per atom in eV)
    by the same calculator; negative below it. None where the entries lack an element of it.
    """
    diagrams, core = crystal_package("pymatgen.analysis.phase_diagram"), crystal_package("pymatgen.core")

    def entry(of: Mapping[int, int], energy: float) -> Any:
        composition = core.Composition({element_symbols()[number]: count for number, count in of.items()})
        return diagrams.PDEntry(composition, energy * composition.num_atoms)

    if not set(counts) <= {number for of, _ in entries if len(of) == 1 for number in of}:
        return None
    diagram = diagrams.PhaseDiagram([entry(of, energy) for of, energy in entries if set(of) <= set(counts)])
    return float(diagram.get_decomp_and_e_above_hull(entry(counts, energy_per_atom), allow_negative=True)[1])
