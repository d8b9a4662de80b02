"""Which figures of crystals there are, what each needs, and why one cannot be had: chosen by table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from utils.crystal.evaluation.judge import Evidence, Judge, all_fingerprints
from utils.crystal.evaluation.metrics import (
    MAX_COMPARED,
    chemical_system_match,
    coverage_figures,
    formula_match,
    is_cubic,
    share,
    wasserstein_figures,
)
from utils.crystal.evaluation.samples import HELD_OUT, SAMPLES, SampleSet, asked_counts
from utils.crystal.matching import is_structurally_valid, match_pairs
from utils.crystal.structure import parse_chemical_system
from utils.evaluation.figures import (
    HIGHER,
    LOWER,
    MIN_FOR_HALVES,
    NEITHER,
    Figure,
    Found,
    Group,
    halves_figure,
    mean_figure,
    measured_groups,
    missing,
)
from utils.evaluation.regressors import number_names, spearman_figure, spearman_titles

METASTABLE = 0.1  # eV per atom above the hull: MatterGen's bound, arXiv 2312.03687
MAX_TARGETS = 12  # values of a property that get a row each
OF_ENERGIES = ("energy_above_hull", "metastable", "sun")

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
    """Shares of crystals that are valid, in structure, in composition and in both."""
    figures = {
        "structurally_valid": share(evidence.structural),
        "compositionally_valid": share(evidence.compositional),
        "valid": share(evidence.valid),
    }
    return Found(figures, {})


def originality(evidence: Evidence) -> Found:
    """Shares of crystals that no other sample and no training crystal equals."""
    figures = {"unique": share(evidence.is_unique)}
    if evidence.is_novel is None:
        return Found(figures, dict.fromkeys(("novel", "vun"), "needs --training_data"))
    figures["novel"] = share(evidence.is_novel)
    return Found(figures | {"vun": share(evidence.valid & evidence.is_unique & evidence.is_novel)}, {})


def distributions(evidence: Evidence) -> Found:
    """Coverage of the reference and distances of distributions, against the training crystals where they are known."""
    real, samples, judge = evidence.judge.real, evidence.samples, evidence.judge
    cubic = {"cubic": share([is_cubic(crystal) for crystal in samples.crystals])}
    if real.training is None and samples.kind == HELD_OUT:
        return Found(cubic, {})  # it would be compared with itself
    held_out = judge.held_out.crystals
    reference = held_out if real.training is None else real.training.crystals()
    if sum(is_structurally_valid(each) for each in reference[:MAX_COMPARED]) < 2:
        return Found(cubic, {"coverage_recall": "needs at least two real crystals that are valid"})
    figures = coverage_figures(samples.crystals, reference, None if real.training is None else held_out)
    figures |= wasserstein_figures(samples.crystals, reference)
    lacking = {} if "wasserstein_density" in figures else {"wasserstein_density": "needs two samples that are valid"}
    return Found(figures | cubic, lacking)


def answers(evidence: Evidence) -> Found:
    """Whether compositions, elements and structures are those that were asked for."""
    samples, figures = evidence.samples, {}
    of_formula = [(i, counts) for i, each in enumerate(samples.requests) if (counts := asked_counts(each)) is not None]
    if of_formula:
        crystals = [samples.crystals[i] for i, _ in of_formula]
        figures["formula_match"] = formula_match(crystals, [counts for _, counts in of_formula])
    of_system = [(i, each["chemical_system"]) for i, each in enumerate(samples.requests) if "chemical_system" in each]
    if of_system:
        systems = [parse_chemical_system(text) for _, text in of_system]
        figures["chemical_system_match"] = chemical_system_match([samples.crystals[i] for i, _ in of_system], systems)
    if any(samples.counterparts):
        figures |= match_figures(evidence)
    lacking = {}
    if of_formula and not any(samples.counterparts):
        lacking["match_rate"] = "--reference has no crystal of the formulas that were asked for"
    return Found(figures, lacking)


def match_figures(evidence: Evidence) -> dict[str, Figure]:
    """Share of the samples that match their real crystal (any of them, of several of one formula), and the RMSD of
    those that do, the smallest of several. Source: CDVAE, arXiv 2110.06197, section 5.1.
    """
    samples, judge = evidence.samples, evidence.judge
    pairs = [(i, other) for i, others in enumerate(samples.counterparts) for other in others]
    matches = match_pairs([(samples.crystals[i], other) for i, other in pairs], judge.num_processes, judge.timeout_s)
    best: dict[int, float] = {}
    for (i, _), rmsd in zip(pairs, matches.rmsds, strict=True):
        best[i] = min(best.get(i, np.inf), np.inf if rmsd is None else rmsd)
    rmsds = np.array(list(best.values()))
    note = f"{matches.num_timed_out} comparisons took over {judge.timeout_s:g} s" if matches.num_timed_out else ""
    figures = {"match_rate": share(np.isfinite(rmsds), note)}
    found = rmsds[np.isfinite(rmsds)]
    return figures | ({"rmsd": mean_figure(torch.as_tensor(found))} if len(found) else {})


def properties(evidence: Evidence) -> Found:
    """What the regressor says of each property that was asked for. Its figures of held-out crystals, whose property is
    known, tell how far it can be believed.
    """
    figures: dict[str, Figure] = {}
    samples, judge = evidence.samples, evidence.judge
    features = all_fingerprints(samples.crystals) if judge.regressors.by_name else None
    for name, regressor in judge.regressors.by_name.items():
        rows = [i for i, request in enumerate(samples.requests) if name in request]
        asked = np.array([samples.requests[i][name] for i in rows], dtype=np.float64)
        predicted = regressor.predict(features[rows]) if features is not None and rows else np.zeros(0)
        known = np.isfinite(predicted)
        note = f"{int((~known).sum())} are not valid and have none" if not known.all() else ""
        asked, predicted = asked[known], predicted[known]
        if len(asked) < MIN_FOR_HALVES:
            continue
        figures |= spearman_figure(name, asked, predicted, note)
        figures[f"{name}_error"] = mean_figure(torch.as_tensor(np.abs(asked - predicted)), note)
        values = [value for value in set(asked.tolist()) if (asked == value).sum() >= MIN_FOR_HALVES]
        for value in sorted(values) if samples.kind != HELD_OUT and len(values) <= MAX_TARGETS else []:
            figures[f"{name}_at_{value:g}"] = halves_figure(np.median, predicted[asked == value])
    return Found(figures, judge.regressors.not_measured())


def stability(evidence: Evidence) -> Found:
    """Energies above the hull; a sample without one counts as unstable."""
    judge = evidence.judge
    if judge.hull is None:
        needs = "--calculator" if judge.calculator is None else "--training_data, whose stable crystals are the hull"
        return missing(*OF_ENERGIES, why=f"needs {needs}")
    above = judge.hull.above(evidence.samples.crystals)
    known = np.isfinite(above)
    if known.sum() < MIN_FOR_HALVES:
        reason = f"{int(known.sum())} crystals have one: the calculator fails, or the hull lacks an element"
        return missing(*OF_ENERGIES, why=reason)
    stable = known & (np.nan_to_num(above, nan=np.inf) <= METASTABLE)
    note = "" if known.all() else f"{int((~known).sum())} have none: not valid, or an element is not in the hull"
    figures = {"energy_above_hull": halves_figure(np.median, above[known], note), "metastable": share(stable, note)}
    if evidence.is_novel is not None:
        figures["sun"] = share(evidence.valid & evidence.is_unique & evidence.is_novel & stable, note)
    return Found(figures, {})


REQUEST_GROUPS: dict[str, Callable[[Evidence], Found]] = {
    "What was asked for": answers,
    "Properties, as a regressor predicts them": properties,
}
GROUPS: dict[str, Callable[[Evidence], Found]] = {
    "Validity": validity,
    "Uniqueness and novelty": originality,
    "Coverage and distributions": distributions,
    **REQUEST_GROUPS,
    "Energies": stability,
}


def groups_of(
    samples: SampleSet, judge: Judge, table: Mapping[str, Callable[[Evidence], Found]] = GROUPS
) -> list[Group]:
    """The figures of a set of crystals; why some could not be measured is said with the samples alone."""
    return measured_groups(table, Evidence(samples, judge), with_reasons=samples.kind == SAMPLES)


def titles_of(requests: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """`TITLES`, and those of the properties that are asked for."""
    names = number_names(requests)
    titles = TITLES | spearman_titles(names)
    for name in names:
        titles[f"{name}_error"] = (f"{name}: mean distance of asked and predicted", LOWER)
        for value in sorted({float(request[name]) for request in requests if name in request}):
            titles[f"{name}_at_{value:g}"] = (f"{name} asked {value:g}: median predicted", NEITHER)
    return titles
