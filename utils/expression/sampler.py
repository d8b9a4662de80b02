"""What a run of cells is asked for: types, other conditions, or cells as the training set has them; checked against
the run and sampled.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.diffusion.sampling import batches, image_generators
from utils.errors import UserError
from utils.expression.files import CELLS_FILE, save_cells
from utils.expression.modality import EXPRESSION
from utils.expression.pipeline import ExpressionPipeline, load_guide, load_run
from utils.latents.columns import category_name, category_numbers
from utils.runs import sampler as base
from utils.runs.requests import Columns, column_values, known_category, not_a_condition, parse_assignments
from utils.runs.sampler import Request

ROWS_STREAM = 1  # of a sample's seed: which training cell it takes after
MAX_LIBRARY = 1e12  # of a cell; real ones have up to a million counts, and of 1e18 none could be drawn


class DrawnCell(NamedTuple):
    """A cell of a run."""

    counts: np.ndarray  # (G,) fp32
    library_size: np.floating


def requested_cells(
    pipeline: ExpressionPipeline, run_dir: Path, class_labels: Sequence[str] = (), assignments: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One request for each of `class_labels`, of the run's one condition that is a class, with the `assignments`
    (donor=D3, age=61) of others; a single one, perhaps empty, without labels. Raises UserError for what the run was
    not trained on.
    """
    shared = parse_assignments(pipeline.columns, run_dir, assignments)
    if not class_labels:
        return [shared]
    column = the_class_column(pipeline.columns, run_dir)
    if column in shared:
        raise UserError(f"--class_label with --property {column}={shared[column]}: both name the type; use one")
    names = pipeline.columns[column]["names"]
    found = [known_category(names, label, f"--class_label {label}") for label in class_labels]
    twice = [label for label in found if found.count(label) > 1]
    if twice:
        raise UserError(f"--class_label {twice[0]}: named twice; --num_samples says how many cells of each")
    return [{column: label} | shared for label in found]


def the_class_column(columns: Columns, run_dir: Path) -> str:
    """The one condition that is a class. Raises UserError where there is none, or several."""
    found = [name for name, settings in columns.items() if settings["kind"] == "class"]
    if not found:
        raise UserError(f"--class_label: {not_a_condition(columns, run_dir, 'class:COLUMN')}")
    if len(found) > 1:
        raise UserError(f"--class_label: {run_dir} has the classes {', '.join(found)}; use --property NAME=VALUE")
    return found[0]


def as_trained(pipeline: ExpressionPipeline, count: int, seed: int) -> list[dict[str, Any]]:
    """Requests for `count` cells that are conditioned as as many training cells, drawn at random, were: so types, and
    all else, come in their proportions. Sample i depends on `seed` + i alone.
    """
    columns = {name: pipeline.training_columns[name] for name in pipeline.columns}
    if not columns:
        return [{} for _ in range(count)]
    num_rows = len(next(iter(columns.values())))
    rows = [int(np.random.default_rng([seed + i, ROWS_STREAM]).integers(num_rows)) for i in range(count)]
    return [request_of(pipeline, columns, row) for row in rows]


def request_of(pipeline: ExpressionPipeline, columns: dict[str, np.ndarray], row: int) -> dict[str, Any]:
    """The conditions of a training cell, of those that are known."""
    request: dict[str, Any] = {}
    for name, values in columns.items():
        if pipeline.columns[name]["kind"] == "class":
            value: Any = category_name(values[row])
        else:
            value = float(values[row]) if np.isfinite(values[row]) else None
        request |= {} if value is None else {name: value}
    return request


def condition_values(pipeline: ExpressionPipeline, requests: Sequence[Request]) -> dict[str, Tensor]:
    """The values (B,) of the run's conditions; what a request does not name is missing, as in training."""
    values: dict[str, Tensor] = {}
    for name, settings in pipeline.columns.items():
        if any(name in request for request in requests):
            missing = float("nan") if settings["kind"] == "property" else ""
            values[name] = column_values(settings, [request.get(name, missing) for request in requests])
    return values


def draw_batches(pipeline: ExpressionPipeline, requests: Sequence[Request], seed: int) -> np.ndarray | None:
    """(n,) a batch for the decoder of each sample: the one that is asked for, or that of a training cell which has the
    classes that are. None for a decoder that knows none.
    """
    column, names = pipeline.vae.config.batch_column, pipeline.vae.config.batch_names
    if not names:
        return None
    numbers = category_numbers(pipeline.training_columns[column], names)
    known = {name: settings["names"] for name, settings in pipeline.columns.items() if settings["kind"] == "class"}
    places = {name: category_numbers(pipeline.training_columns[name], of) for name, of in known.items()}
    candidates: dict[tuple, np.ndarray] = {}
    drawn = []
    for i, request in enumerate(requests):
        if category_name(request.get(column)) in names:  # of a condition that is a number too
            drawn.append(names.index(str(category_name(request[column]))))
            continue
        asked = tuple((name, request[name]) for name in known if name in request)
        if asked not in candidates:
            fits = numbers >= 0
            for name, value in asked:
                fits &= places[name] == known[name].index(value)
            candidates[asked] = numbers[fits] if fits.any() else np.arange(len(names))
        drawn.append(int(np.random.default_rng([seed + i, ROWS_STREAM, 1]).choice(candidates[asked])))
    return np.array(drawn)


class Sampler(base.Sampler):
    """A run of cells that is ready to be sampled. A request is types and numbers by the names of conditions."""

    modality = EXPRESSION
    load_run = staticmethod(load_run)
    load_guide = staticmethod(load_guide)

    def requests(self, args: Namespace) -> list[dict[str, Any]]:
        """--num_samples cells of each --class_label, with --property; without either, cells as the training set has
        them.
        """
        asked = requested_cells(self.pipeline, self.run_dir, args.class_label or [], args.property or [])
        if asked == [{}]:
            requests = as_trained(self.pipeline, args.num_samples, args.seed)
        else:
            requests = [each for each in asked for _ in range(args.num_samples)]
        self.guidance(requests)
        return requests

    def can_guide(self, requests: Sequence[Request]) -> bool:
        """Whether anything is asked for."""
        return any(requests)

    def sample(
        self, requests: Sequence[Request], seed: int, batch_size: int, mixed_precision: str
    ) -> Iterator[list[DrawnCell]]:
        """Cells for the requests, a batch at a time; number i has seed `seed` + i, and is the same, but for rounding,
        whatever the batch. Raises UserError where the run gives values that are not finite.
        """
        pipeline, guidance = self.pipeline, self.guidance(requests)
        of_batches = draw_batches(pipeline, requests, seed)
        for first, some in batches(requests, batch_size):
            values, device = condition_values(pipeline, some), pipeline.vae.device
            generators = image_generators(seed, first, len(some))
            with self.autocast(mixed_precision):
                latents = pipeline.latents(
                    len(some), values, guidance, guide_model=self.guide, generator=generators
                ).float()
            library_sizes = pipeline.normalisation.denormalise(latents)[:, -1].exp()
            if not (torch.isfinite(latents).all() and (library_sizes < MAX_LIBRARY).all()):
                raise UserError(
                    "--model: it gives cells that are not finite; try --mixed_precision no or a lower "
                    "--guidance_scale, and if that does not help an earlier checkpoint: the weights are damaged"
                )
            index = None
            if of_batches is not None:
                index = torch.from_numpy(of_batches[first : first + len(some)]).to(device)
            drawn = pipeline.decode(latents, index, [seed + first + i for i in range(len(some))])
            yield [DrawnCell(*cell) for cell in zip(*drawn, strict=True)]

    def save(self, folder: Path, samples: list[DrawnCell], requests: Sequence[Request], seed: int) -> str:
        """Writes cells.h5ad."""
        counts, library_sizes = (np.stack(parts) for parts in zip(*samples, strict=True))
        save_cells(
            folder,
            counts,
            library_sizes,
            genes=self.pipeline.genes,
            requests=requests,
            settings=self.settings(requests),
            seed=seed,
        )
        return f"{len(samples)} cells of {len(self.pipeline.genes)} genes in {folder / CELLS_FILE}"
