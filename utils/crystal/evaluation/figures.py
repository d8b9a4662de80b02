"""Which figures of crystals there are, what each needs, and why one cannot be had: chosen by table."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from utils.crystal.evaluation.judge import Evidence, Judge, all_fingerprints, properties_of
from utils.crystal.evaluation.metrics import (
    MAX_COMPARED,
    chemical_system_match,
    coverage_figures,
    formula_match,
    is_cubic,
    share,
    wasserstein_figures,
)
from utils.crystal.evaluation.samples import HELD_OUT, SAMPLES, Column, asked_counts
from utils.crystal.matching import is_structurally_valid, match_pairs
from utils.crystal.structure import parse_chemical_system
from utils.evaluation.figures import (
    HIGHER,
    LOWER,
    MIN_FOR_HALVES,
    NEITHER,
    Figure,
    Group,
    halves_figure,
    mean_figure,
    spearman,
)

METASTABLE = 0.1  # eV per atom above the hull: MatterGen's bound, arXiv 2312.03687
MAX_TARGETS = 12  # values of a property that get a row each
Found = tuple[dict[str, Figure], dict[str, str]]  # figures, and what is not measured with the reason

# name -> what stands in tables, and which way is better
TITLES: dict[str, tuple[str, str]] = {
    "structurally_valid": ("structurally valid", HIGHER),
    "compositionally_valid": ("compositionally valid (SMACT)", HIGHER),
    "valid": ("both valid", HIGHER),
    "unique": ("structurally valid and unique", HIGHER),
    "novel": ("structurally valid and novel", HIGHER),
    "vun": ("both valid, unique and novel", HIGHER),
    "coverage_recall": ("coverage recall", HIGHER),
    "coverage_precision": ("coverage precision", HIGHER),
    "amsd_recall": ("distance of the reference to samples", LOWER),
    "amsd_precision": ("distance of samples to the reference", LOWER),
    "wasserstein_density": ("Wasserstein distance of density, g/cm3", LOWER),
    "wasserstein_num_elements": ("Wasserstein distance of numbers of elements", LOWER),
    "wasserstein_num_atoms": ("Wasserstein distance of numbers of atoms", LOWER),
    "cubic": ("cubic cells", NEITHER),
    "formula_match": ("formula as asked", HIGHER),
    "chemical_system_match": ("elements as asked", HIGHER),
    "match_rate": ("matches the real crystal", HIGHER),
    "rmsd": ("RMSD of those that match", LOWER),
    "energy_above_hull": ("energy above the hull, eV/atom, median", LOWER),
    "metastable": ("at most 0.1 eV/atom above the hull", HIGHER),
    "sun": ("both valid, unique, novel and at most 0.1 eV/atom above", HIGHER),
}


# ---- figures


def validity(evidence: Evidence) -> Found:
    figures = {
        "structurally_valid": share(evidence.structural),
        "compositionally_valid": share(evidence.compositional),
        "valid": share(evidence.valid),
    }
    return figures, {}


def originality(evidence: Evidence) -> Found:
    figures = {"unique": share(evidence.is_unique)}
    if evidence.is_novel is None:
        return figures, dict.fromkeys(("novel", "vun"), "needs --training_data")
    figures["novel"] = share(evidence.is_novel)
    return figures | {"vun": share(evidence.valid & evidence.is_unique & evidence.is_novel)}, {}


def distributions(evidence: Evidence) -> Found:
    real, column, judge = evidence.judge.real, evidence.column, evidence.judge
    cubic = {"cubic": share([is_cubic(crystal) for crystal in column.crystals])}
    if real.training is None and column.kind == HELD_OUT:
        return cubic, {}  # it would be compared with itself
    held_out = judge.held_out.crystals
    reference = held_out if real.training is None else real.training.crystals()
    if sum(is_structurally_valid(each) for each in reference[:MAX_COMPARED]) < 2:
        return cubic, {"coverage_recall": "needs at least two real crystals that are valid"}
    figures = coverage_figures(column.crystals, reference, None if real.training is None else held_out)
    figures |= wasserstein_figures(column.crystals, reference)
    missing = {} if "wasserstein_density" in figures else {"wasserstein_density": "needs two samples that are valid"}
    return figures | cubic, missing


def answers(evidence: Evidence) -> Found:
    """Whether compositions, elements and structures are those that were asked for."""
    column, figures = evidence.column, {}
    of_formula = [(i, counts) for i, each in enumerate(column.requests) if (counts := asked_counts(each)) is not None]
    if of_formula:
        crystals = [column.crystals[i] for i, _ in of_formula]
        figures["formula_match"] = formula_match(crystals, [counts for _, counts in of_formula])
    of_system = [(i, each["chemical_system"]) for i, each in enumerate(column.requests) if "chemical_system" in each]
    if of_system:
        systems = [parse_chemical_system(text) for _, text in of_system]
        figures["chemical_system_match"] = chemical_system_match([column.crystals[i] for i, _ in of_system], systems)
    if any(column.counterparts):
        figures |= match_figures(evidence)
    missing = {}
    if of_formula and not any(column.counterparts):
        missing["match_rate"] = "--reference has no crystal of the formulas that were asked for"
    return figures, missing


def match_figures(evidence: Evidence) -> dict[str, Figure]:
    """Share of the samples that match their real crystal (any of them, of several of one formula), and the RMSD of
    those that do, the smallest of several. Source: CDVAE, arXiv 2110.06197, section 5.1.
    """
    column, judge = evidence.column, evidence.judge
    pairs = [(i, other) for i, others in enumerate(column.counterparts) for other in others]
    matches = match_pairs([(column.crystals[i], other) for i, other in pairs], judge.num_processes, judge.timeout_s)
    best: dict[int, float] = {}
    for (i, _), rmsd in zip(pairs, matches.rmsds, strict=True):
        best[i] = min(best.get(i, np.inf), np.inf if rmsd is None else rmsd)
    rmsds = np.array(list(best.values()))
    note = f"{matches.num_timed_out} comparisons took over {judge.timeout_s:g} s" if matches.num_timed_out else ""
    figures = {"match_rate": share(np.isfinite(rmsds), note)}
    found = rmsds[np.isfinite(rmsds)]
    return figures | ({"rmsd": mean_figure(torch.as_tensor(found))} if len(found) else {})


def properties(evidence: Evidence) -> Found:
    """What the regressor says of each property that was asked for: of held-out crystals, whose property is known, how
    far it can be believed.
    """
    figures: dict[str, Figure] = {}
    column, judge = evidence.column, evidence.judge
    features = all_fingerprints(column.crystals) if judge.regressors else None
    for name, regressor in judge.regressors.items():
        rows = [i for i, request in enumerate(column.requests) if name in request]
        asked = np.array([column.requests[i][name] for i in rows], dtype=np.float64)
        predicted = regressor.predict(features[rows]) if features is not None and rows else np.zeros(0)
        known = np.isfinite(predicted)
        note = f"{int((~known).sum())} are not valid and have none" if not known.all() else ""
        asked, predicted = asked[known], predicted[known]
        if len(asked) < MIN_FOR_HALVES:
            continue
        figures[f"{name}_spearman"] = halves_figure(spearman, np.stack([asked, predicted], axis=1), note, -1, 1)
        figures[f"{name}_error"] = mean_figure(torch.as_tensor(np.abs(asked - predicted)), note)
        values = [value for value in set(asked.tolist()) if (asked == value).sum() >= MIN_FOR_HALVES]
        for value in sorted(values) if column.kind != HELD_OUT and len(values) <= MAX_TARGETS else []:
            figures[f"{name}_at_{value:g}"] = halves_figure(np.median, predicted[asked == value])
    return figures, {f"{name}_spearman": why for name, why in judge.reasons.items()}


def stability(evidence: Evidence) -> Found:
    """Energies above the hull; a sample without one counts as unstable."""
    judge = evidence.judge
    if judge.hull is None:
        needs = "--calculator" if judge.calculator is None else "--training_data, whose stable crystals are the hull"
        return {}, dict.fromkeys(("energy_above_hull", "metastable", "sun"), f"needs {needs}")
    above = judge.hull.above(evidence.column.crystals)
    known = np.isfinite(above)
    if known.sum() < MIN_FOR_HALVES:
        reason = f"{int(known.sum())} crystals have one: the calculator fails, or the hull lacks an element"
        return {}, dict.fromkeys(("energy_above_hull", "metastable", "sun"), reason)
    stable = known & (np.nan_to_num(above, nan=np.inf) <= METASTABLE)
    note = "" if known.all() else f"{int((~known).sum())} have none: not valid, or an element is not in the hull"
    figures = {"energy_above_hull": halves_figure(np.median, above[known], note), "metastable": share(stable, note)}
    if evidence.is_novel is not None:
        figures["sun"] = share(evidence.valid & evidence.is_unique & evidence.is_novel & stable, note)
    return figures, {}


GROUPS: dict[str, Callable[[Evidence], Found]] = {
    "Validity": validity,
    "Uniqueness and novelty": originality,
    "Coverage and distributions": distributions,
    "What was asked for": answers,
    "Properties, as a regressor predicts them": properties,
    "Energies": stability,
}
OF_REQUESTS = ("What was asked for", "Properties, as a regressor predicts them")


def groups_of(column: Column, judge: Judge, only: Sequence[str] = tuple(GROUPS)) -> list[Group]:
    """The figures of a column; why some cannot be had is said with the samples."""
    evidence = Evidence(column, judge)
    groups = []
    for title in only:
        figures, missing = GROUPS[title](evidence)
        groups.append(Group(title, figures, missing if column.kind == SAMPLES else {}))
    return [group for group in groups if group.figures or group.not_measured]


def titles_of(requests: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """`TITLES`, and those of the properties that are asked for."""
    titles = dict(TITLES)
    for name in properties_of(requests):
        titles[f"{name}_spearman"] = (f"{name}: Spearman of asked and predicted", HIGHER)
        titles[f"{name}_error"] = (f"{name}: mean distance of asked and predicted", LOWER)
        for value in sorted({float(request[name]) for request in requests if name in request}):
            titles[f"{name}_at_{value:g}"] = (f"{name} asked {value:g}: median predicted", NEITHER)
    return titles
