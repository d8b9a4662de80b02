"""An evaluation of cells from its arguments: real ones, samples of each point of a sweep, control, nulls, report."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from utils.args.parsing import saved_arguments
from utils.args.sampling import sweep_points
from utils.diffusion.sampling import usable_device
from utils.errors import UserError
from utils.evaluation.figures import Group, over_seeds
from utils.evaluation.regressors import number_names
from utils.evaluation.report import Point, Report, described
from utils.expression.evaluation.figures import groups_by_type, groups_of, titles_of
from utils.expression.evaluation.judge import Judge
from utils.expression.evaluation.nulls import Posterior, laws_of_nulls, sets_beside
from utils.expression.evaluation.real import MIN_CELLS, Real, open_real
from utils.expression.evaluation.samples import (
    GAUSSIAN,
    SAMPLES,
    Requests,
    SampleSet,
    draw_rows,
    given_requests,
    known_by_columns,
    label_column_of,
    read_given,
    requests_of,
    sampled_set,
    text_columns_of,
)
from utils.expression.pictures import check_umap, marker_plot, scatter_grid, shown, umap_points
from utils.expression.pipeline import load_run
from utils.expression.sampler import Sampler
from utils.runs.load import RunFolder, next_folder

REMARK = (
    "All columns are judged against the same test cells by the same functions, and normalised by the sum of the genes "
    "that are judged. What real training cells (the control) do not reach, no model needs to reach; what the decoder "
    "makes of their latents (the ceiling), no denoiser can surpass. Classifier and regressors were fitted to training "
    "cells: of the control, they tell the test cells. Where a column is missing, the figure says nothing of it."
)
OF_THE_DRAW = "Brackets hold 95 % intervals over the draw of the cells."
OF_SEEDS = "Figures are means over {} seeds, brackets hold the lowest and the highest; the test cells are the same."


def sample_seed(args: Namespace, sampler: Sampler, requests: Requests, seed: int, folder: Path) -> np.ndarray:
    """Samples as sample.py does, and leaves in `folder` what it leaves -> counts (n, G)."""
    cells = sampler.sample_all(requests, seed, args.batch_size, args.mixed_precision)
    folder.mkdir(parents=True)
    sampler.save(folder, cells, requests, seed)
    return np.stack([cell.counts for cell in cells])


@dataclass
class Measured:
    """The figures of sets of one name, a list for each seed, and the first of these sets, for pictures."""

    first: SampleSet
    groups: list[list[Group]]
    by_type: list[list[Group]]


class Measurements(dict[str, Measured]):
    """What was measured, by the names of the sets, in the order in which they came."""

    def add(self, cells: SampleSet, judge: Judge, progress: tqdm) -> None:
        """Adds the figures of a set to those of its name."""
        if cells.name not in self:
            self[cells.name] = Measured(replace(cells, cells=shown(cells.cells)), [], [])
        self[cells.name].groups.append(groups_of(cells, judge))
        self[cells.name].by_type.append(groups_by_type(cells, judge))
        progress.update()


def pictures_of(
    samples: SampleSet, judge: Judge, gaussian: SampleSet | None, genes: Sequence[str], with_umap: bool
) -> list[tuple[str, Image.Image]]:
    """UMAP and markers of samples beside real cells."""
    real, found = judge.real.test_cells, []
    told = ", by the types that the classifier takes them for" if judge.tells_types_of(samples.cells) else ""
    if with_umap:
        panels = [("real cells", shown(real)), (SAMPLES, samples.cells)]
        panels += [(GAUSSIAN, gaussian.cells)] if gaussian is not None else []
        points = umap_points([cells for _, cells in panels])
        places = [(title, at, judge.types_of(cells)) for (title, cells), at in zip(panels, points, strict=True)]
        found.append((f"UMAP of all together{told}", scatter_grid(places)))
    labels = judge.types_of(samples.cells)
    if real.labels is not None and labels is not None:
        plot = marker_plot(real, samples.cells, labels, genes, ("real cells", SAMPLES))
        caption = f"markers{told}: the area of a dot is the share of cells with the gene, its colour the mean"
        found += [(caption, plot)] if plot is not None else []
    return found


def evaluate(args: Namespace) -> None:
    """`evaluate.py --modality expression`."""
    # Load
    if args.umap:
        check_umap()
    given, pipeline, label_column = None, None, args.label_column
    if args.samples is not None:
        given = read_given(args.samples, args.samples_layer, args.num_samples)
        genes, library, split_of = given.genes, "chosen", Path(args.split_of) if args.split_of else None
    else:
        split_of, pipeline = RunFolder.find(args.model).path, load_run(args.model)
        genes, library = pipeline.genes, pipeline.vae.config.library
        label_column = label_column_of(pipeline.columns, label_column)
    real = open_real(
        args.reference,
        args.reference_split,
        training_data=args.training_data,
        training_split=args.training_data_split,
        counts_layer=args.counts_layer,
        genes=genes,
        library=library,
        split_of=split_of,
        label_column=label_column,
        text_columns=text_columns_of(given) if given is not None else (),
    )
    output_dir = Path(args.output_dir) if args.output_dir else None
    output_dir = output_dir or next_folder((Path(args.model) if args.model else Path("runs")) / "evaluated")

    # Ask
    count = len(given) if given is not None else args.num_samples or len(real.test)
    if count < MIN_CELLS:
        raise UserError(f"--num_samples {count}: figures need at least {MIN_CELLS} cells")
    rows = draw_rows(len(real.test), count, args.seed)
    if given is not None:
        requests = given_requests(given, real)
        known = known_by_columns(requests, real)
    else:
        assert pipeline is not None
        of_test = requests_of(pipeline.columns, real.test, "--reference")
        requests = [of_test[row] for row in rows]
        known = requests_of(pipeline.columns, real.training, "--training_data") if real.training is not None else []
    types = real.test_cells.labels
    wanted = np.zeros(count) if types is None else types[rows]
    why_unlabelled = f"the samples were not asked for a {real.label_column}: the run is not conditioned on it"
    if given is not None:
        why_unlabelled = f"--samples has no column {real.label_column} in adata.obs"
    judge = Judge.learn(real, number_names(requests), why_unlabelled)

    # Measure
    samples, beside = Measurements(), Measurements()
    progress = tqdm(unit=" sets", desc="measured", leave=False)
    settings: dict[str, Any] = {}
    swept: dict[str, Any] = {}
    seeds = [args.seed + i * count for i in range(args.seeds)]
    if given is not None:
        samples.add(sampled_set(SAMPLES, given.dense(slice(None)), requests, real.label_column), judge, progress)
    for swept in sweep_points(args) if given is None else []:
        name = " ".join(f"{key} {value:g}" for key, value in swept.items())
        chosen = Namespace(**(vars(args) | swept))
        sampler = Sampler.of(chosen, Path(args.model))
        settings = sampler.guidance(requests).arguments()
        for i, seed in enumerate(seeds):
            folder = output_dir / "samples" / (name.replace(" ", "_") or "all")
            folder = folder / f"seed_{i}" if args.seeds > 1 else folder
            counts = sample_seed(chosen, sampler, requests, seed, folder)
            samples.add(sampled_set(name or SAMPLES, counts, requests, real.label_column), judge, progress)
    posterior = None
    if pipeline is not None and real.training is not None:
        pipeline.vae.to(usable_device(args.device))
        posterior = Posterior.of(pipeline.vae, real.training)
    for seed in seeds:
        for each in sets_beside(real, asked=requests, known=known, wanted=wanted, posterior=posterior, seed=seed):
            beside.add(each, judge, progress)
    progress.close()

    # Report
    points = []
    gaussian = beside[GAUSSIAN].first if GAUSSIAN in beside else None
    for name, found in (samples | beside).items():
        pictures = pictures_of(found.first, judge, gaussian, genes, args.umap) if name in samples else []
        points.append(Point(name, over_seeds(found.groups), pictures, details=over_seeds(found.by_type)))
    times = f", {args.seeds} times" if args.seeds > 1 else ""
    facts = {"samples": f"{args.samples or args.model} ({count} cells of {len(genes)} genes{times})"}
    facts |= facts_of(args, real, split_of is not None)
    facts |= laws_of_nulls(known, posterior is not None) if beside else {}
    if settings:
        facts["sampling"] = described(settings, without=swept)
    report = Report(
        facts=facts,
        points=points,
        titles=titles_of(judge),
        notes=[*real.notes, *notes_of(judge, [each.first for each in samples.values()])],
        sweep=args.sweep[0] if args.sweep else None,
        arguments=saved_arguments(args),
        heading="{}",
        remark=REMARK,
        brackets=OF_THE_DRAW if args.seeds == 1 else OF_SEEDS.format(args.seeds),
    )
    report.write(output_dir)
    print(report.text())
    print(f"metrics.json and report.html, with figures of each type, in {output_dir}")


def facts_of(args: Namespace, real: Real, with_splits: bool) -> dict[str, str]:
    """Which real cells there are, and by what they are judged."""
    of_split = {name: f", split {getattr(args, name)}" for name in ("reference_split", "training_data_split")}
    if not with_splits:
        of_split = dict.fromkeys(of_split, "")
    facts = {"test cells": f"{args.reference}{of_split['reference_split']} ({len(real.test)} cells)"}
    if real.training is not None:
        path = args.training_data or args.reference
        facts["training cells"] = f"{path}{of_split['training_data_split']} ({len(real.training)} cells)"
    kinds = set() if real.test_cells.labels is None else set(real.test_cells.labels)
    facts["types"] = f"{real.label_column} ({len(kinds)})" if kinds else "none"
    return facts


def notes_of(judge: Judge, samples: Sequence[SampleSet]) -> list[str]:
    """What else a reader of the report must know."""
    notes, labels = [], judge.real.test_cells.labels
    if judge.real.training is None:
        notes.append("without --training_data there is no control and no null: nothing says what a figure is worth")
    elif judge.real.training_cells is not None and labels is not None:
        known = set(judge.real.training_cells.types())
        if strange := sorted(set(labels) - known):
            notes.append(f"no training cell is of the types {', '.join(strange)}: the control is without them")
    if labels is not None and any(each.cells.labels is None for each in samples):
        notes.append(f"{judge.why_unlabelled}; figures that need the type of each sample are not measured")
    return notes
