"""Which figures of cells there are, what each needs, and why one cannot be had: chosen by table."""

from collections.abc import Callable

import numpy as np

from utils.evaluation.figures import (
    HIGHER,
    LOWER,
    MIN_FOR_HALVES,
    NEITHER,
    Figure,
    Found,
    Group,
    attempt,
    halves_figure,
    measured_groups,
    merged,
    missing,
)
from utils.evaluation.regressors import spearman_figure, spearman_titles
from utils.expression.evaluation.judge import Judge, train_on_synthetic_test_on_real
from utils.expression.evaluation.markers import marker_figures
from utils.expression.evaluation.metrics import (
    MAX_JUDGED,
    distance_figures,
    forest_figure,
    gene_figures,
    lisi_figure,
    memorising_figures,
    random_forest_figures,
)
from utils.expression.evaluation.real import Cells, equal_numbers, per_type
from utils.expression.evaluation.samples import CEILING, CONTROL, SAMPLES, SampleSet

MIN_OF_TYPE = 20  # cells on both sides, for figures of a type by itself

# name -> what stands in tables, and which way is better
TITLES: dict[str, tuple[str, str]] = {
    "rf_auc": ("AUC of a random forest on genes, 0.5 = cannot tell", LOWER),
    "rf_auc_pca50": ("AUC of a random forest on 50 components", LOWER),
    "lisi": ("mixing (LISI, from 1 to 2)", HIGHER),
    "w2": ("Wasserstein-2 distance", LOWER),
    "mmd": ("squared MMD", LOWER),
    "zero_fraction": ("share of zeros", NEITHER),
    "zero_fraction_error": ("share of zeros minus the real one", NEITHER),
    "zero_fraction_per_gene_error": ("share of zeros, mean difference over genes", LOWER),
    "gene_variance_correlation": ("correlation of the variances of genes", HIGHER),
    "gene_variance_slope": ("slope of the variances of genes, 1 is right", NEITHER),
    "gene_mean_correlation": ("correlation of the means of genes (0.999 for anything: no evidence)", NEITHER),
    "accuracy": ("taken for its type by a classifier; the control's is right", NEITHER),
    "train_on_samples": ("accuracy on real cells of a classifier trained on these", HIGHER),
    "marker_overlap": ("shared marker genes of the types", HIGHER),
    "lfc_slope": ("slope of log-fold changes, 1 is right", NEITHER),
    "lfc_correlation": ("correlation of log-fold changes", HIGHER),
    "type_distribution": ("proportions of types, total variation distance", LOWER),
    "copies": ("share of copies; 1 % is none", LOWER),
    "nearest_ratio": ("distance to training cells, 1 = as held-out cells", NEITHER),
}
NO_CLASSIFIER = "needs --training_data, which the classifier learns from"
NEED_TYPES = ("accuracy", "train_on_samples", "marker_overlap", "lfc_slope", "lfc_correlation")


# ---- figures


def told_apart(samples: SampleSet, judge: Judge) -> Found:
    """How well a random forest, and the neighbours of each cell, tell the cells from real ones."""
    real = judge.real.test_cells
    return merged(
        attempt(("rf_auc", "rf_auc_pca50"), lambda: random_forest_figures(real, samples.cells, seed=0)),
        attempt(("lisi",), lambda: lisi_figure(real, samples.cells)),
    )


def distances(samples: SampleSet, judge: Judge) -> Found:
    """Distances between the distributions of the cells and of real ones."""
    return attempt(("w2", "mmd"), lambda: distance_figures(judge.real.test_cells, samples.cells, seed=0))


def genes(samples: SampleSet, judge: Judge) -> Found:
    """Zeros, means and variances of genes; the figure that says nothing comes last."""
    figures, reasons = attempt(("zero_fraction",), lambda: gene_figures(judge.real.test_cells, samples.cells))
    return Found({name: figures[name] for name in TITLES if name in figures}, reasons)


def types(samples: SampleSet, judge: Judge) -> Found:
    """Whether the cells are of their types, and the types in their proportions."""
    if judge.real.test_cells.labels is None:
        return missing(*NEED_TYPES, "type_distribution", why="needs --label_column")
    return merged(types_as_asked(samples, judge), types_as_told(samples, judge))


def types_as_asked(samples: SampleSet, judge: Judge) -> Found:
    """Figures that need the type that each cell was asked to be."""
    cells, test = samples.cells, judge.real.test_cells
    if cells.labels is None:
        return missing(*NEED_TYPES, why=judge.why_unlabelled)
    accuracy = missing("accuracy", why=NO_CLASSIFIER)
    if judge.classifier is not None:
        accuracy = Found({"accuracy": judge.classifier.accuracy(samples.told)}, {})
    return merged(
        accuracy,
        attempt(NEED_TYPES[1:2], lambda: {NEED_TYPES[1]: train_on_synthetic_test_on_real(cells, test, seed=0)}),
        attempt(NEED_TYPES[2:], lambda: marker_figures(test, cells)),
    )


def types_as_told(samples: SampleSet, judge: Judge) -> Found:
    """Figures that need the types of the test cells alone."""
    labels = judge.real.test_cells.labels
    if judge.classifier is None or labels is None:
        return missing("type_distribution", why=NO_CLASSIFIER)
    predicted = judge.classifier.model.predict(samples.told.log_normalised())
    return Found({"type_distribution": type_distribution(predicted, labels)}, {})


def type_distribution(predicted: np.ndarray, labels: np.ndarray) -> Figure:
    """Total variation distance, from 0 to 1, of the types (n,) that a classifier tells from the types (m,) of the real
    test cells. Their own is not 0: it holds the classifier's errors, and the draw of the cells adds to it.
    """
    kinds = sorted(set(predicted) | set(labels))
    shares = np.array([(labels == kind).mean() for kind in kinds])
    codes = np.searchsorted(np.array(kinds, dtype=str), predicted.astype(str))

    def distance(some: np.ndarray) -> float:
        return 0.5 * float(np.abs(np.bincount(some, minlength=len(kinds)) / len(some) - shares).sum())

    return halves_figure(distance, codes, f"against {len(labels)}", 0, 1)


def answers(samples: SampleSet, judge: Judge) -> Found:
    """Numbers that were asked for, against what the regressor says of the cells."""
    figures: dict[str, Figure] = {}
    for name, regressor in judge.regressors.by_name.items():
        asked = samples.asked.get(name, np.full(len(samples.told), np.nan))
        known = np.isfinite(asked)
        if known.sum() >= MIN_FOR_HALVES:
            predicted = regressor.predict(samples.told.log_normalised())
            figures |= spearman_figure(name, asked[known], predicted[known])
    return Found(figures, judge.regressors.not_measured())


def copies(samples: SampleSet, judge: Judge) -> Found:
    """Whether the cells lie nearer to training cells than held-out cells do."""
    if samples.kind == CONTROL:
        return Found({}, {})  # they are training cells
    training = judge.real.training_cells
    if training is None:
        return missing("copies", why="needs --training_data")
    names = ("copies", "nearest_ratio")
    return attempt(names, lambda: memorising_figures(samples.cells, judge.real.test_cells, training))


GROUPS: dict[str, Callable[[SampleSet, Judge], Found]] = {
    "Can it be told from real": told_apart,
    "Distances": distances,
    "Genes": genes,
    "Types": types,
    "What was asked for": answers,
    "Copies": copies,
}


def groups_of(samples: SampleSet, judge: Judge) -> list[Group]:
    """The figures of a set of cells; why some could not be measured is said with the samples alone."""
    return measured_groups(GROUPS, samples, judge, with_reasons=samples.kind == SAMPLES)


# ---- type by type


def forest_of_type(real: Cells, generated: Cells) -> dict[str, Figure]:
    """How well a random forest tells cells of one type from as many real ones."""
    real, generated = equal_numbers(real, generated, MAX_JUDGED, seed=0)
    return {"rf_auc": forest_figure(real.log_normalised(), generated.log_normalised(), seed=0)}


OF_TYPES: dict[str, Callable[[Cells, Cells], dict[str, Figure]]] = {
    "rf_auc": forest_of_type,
    "w2": lambda real, generated: distance_figures(real, generated, seed=0),
    "lisi": lisi_figure,
}
IN_TYPES = {  # figure -> the heading of its table, in which each type has a row
    "rf_auc": "By type: AUC of a random forest on genes, 0.5 = cannot tell",
    "w2": "By type: Wasserstein-2 distance",
    "lisi": "By type: mixing (LISI, from 1 to 2)",
    "accuracy": "By type: taken for it by a classifier; the control's is right",
}


def groups_by_type(samples: SampleSet, judge: Judge) -> list[Group]:
    """The figures of each type by itself, of samples, control and ceiling, where both sides have 20 cells of it."""
    test = judge.real.test_cells
    if samples.kind not in (SAMPLES, CONTROL, CEILING) or test.labels is None:
        return []
    if samples.cells.labels is None:
        return [Group(IN_TYPES["rf_auc"], {}, {"By type": judge.why_unlabelled})]
    few = {f"rf_auc of {kind}": f"fewer than {MIN_OF_TYPE} cells" for kind in sorted(set(test.labels))}
    groups = []
    for name, measure in OF_TYPES.items():
        of_types = per_type(measure, test, samples.cells, MIN_OF_TYPE)
        figures = {f"{name} of {kind}": found[name] for kind, found in of_types.items()}
        few = {key: why for key, why in few.items() if key not in figures}
        groups.append(Group(IN_TYPES[name], figures, few if name == "rf_auc" and samples.kind == SAMPLES else {}))
    if judge.classifier is not None:
        labels = samples.told.types()
        own = {kind: samples.told.take(labels == kind) for kind in sorted(set(labels)) if (labels == kind).any()}
        figures = {f"accuracy of {k}": judge.classifier.accuracy(v) for k, v in own.items() if len(v) >= MIN_OF_TYPE}
        groups.append(Group(IN_TYPES["accuracy"], figures, {}))
    return [group for group in groups if group.figures or group.not_measured]


def titles_of(judge: Judge) -> dict[str, tuple[str, str]]:
    """`TITLES`, and those of the types and of the numbers that are asked for."""
    titles = TITLES | spearman_titles([*judge.regressors.by_name, *judge.regressors.reasons])
    labels = judge.real.test_cells.labels
    for kind in sorted(set(labels)) if labels is not None else []:
        titles |= {f"{name} of {kind}": (str(kind), "") for name in IN_TYPES}
    return titles
