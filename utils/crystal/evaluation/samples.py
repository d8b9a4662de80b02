"""Crystals that are judged: read as they are, or sampled from a run, beside real ones and nulls."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.crystal.data.cif import crystal_of_arrays, crystal_of_cif, has_arrays
from utils.crystal.data.table import CIF_COLUMN, CrystalTable, load_crystals, open_crystals
from utils.crystal.files import LINES_FILE, TABLE_FILE, read_samples
from utils.crystal.pipeline import CrystalPipeline
from utils.crystal.sampler import clamped_counts, numbers_of_atoms, requested_crystals
from utils.crystal.structure import Crystal, counts_of, element_symbols, formula_of, parse_formula
from utils.diffusion.sampling import batches, image_generators
from utils.errors import UserError
from utils.evaluation.figures import rows_at_most
from utils.runs.requests import not_a_condition

UNREADABLE = Crystal(np.zeros(0, dtype=np.int64), np.zeros((0, 3)), np.zeros((3, 3)))  # valid to nothing
SAMPLES, HELD_OUT, RANDOM_LATENTS, SHUFFLED = "samples", "held-out real", "random latents", "shuffled conditions"


@dataclass
class SampleSet:
    """Crystals that are judged together, and what each of them was asked to be."""

    name: str
    kind: str  # one of the four above
    crystals: list[Crystal]
    requests: list[dict[str, Any]]  # empty where nothing was asked for
    counterparts: list[list[Crystal]]  # the real crystals that each may match; empty where there is none


# ---- real crystals


@dataclass
class Real:
    """Crystals that the run never saw, and those that it was trained on."""

    held_out: CrystalTable
    training: CrystalTable | None
    by_formula: dict[str, list[int]] = field(init=False)  # rows of the held-out ones

    def __post_init__(self) -> None:
        self.by_formula = {}
        for row, formula in enumerate(self.held_out.columns["formula"]):
            self.by_formula.setdefault(str(formula), []).append(row)

    def counterparts(self, requests: Sequence[dict[str, Any]]) -> list[list[Crystal]]:
        """The held-out crystals of the composition that each request names."""
        formulas = [formula_of(atoms_of(each["composition"])) if "composition" in each else "" for each in requests]
        return [[self.held_out.crystal(row) for row in self.by_formula.get(formula, [])] for formula in formulas]

    def sample_set(self, rows: np.ndarray, asked: Sequence[str], with_counterparts: bool) -> SampleSet:
        """Held-out crystals to be judged as samples, each as if it were the answer to what it is: its composition,
        chemical system and numbers, of those that are named in `asked`; and, `with_counterparts`, its own counterpart.
        """
        table = self.held_out.take(rows)
        crystals = table.crystals()
        requests: list[dict[str, Any]] = [{} for _ in crystals]
        for i, (request, crystal) in enumerate(zip(requests, crystals, strict=True)):
            elements = [element_symbols()[number] for number in sorted(set(crystal.atomic_numbers.tolist()))]
            own: dict[str, Any] = {
                "composition": str(table.columns["formula"][i]),
                "chemical_system": "-".join(elements),
            }
            own |= {name: float(v[i]) for name, v in number_columns(table).items() if np.isfinite(v[i])}
            request |= {name: own[name] for name in asked if name in own}
        counterparts = [[crystal] if with_counterparts else [] for crystal in crystals]
        return SampleSet(HELD_OUT, HELD_OUT, crystals, requests, counterparts)


def open_real(
    reference: str, reference_split: str, *, training_data: str | None, training_split: str, max_atoms: int
) -> Real:
    """The real crystals of the flags. Raises UserError where the one is the other."""
    held_out = load_crystals(reference, reference_split, max_atoms, flag="--reference")
    if training_data is None:
        return Real(held_out, None)
    training = load_crystals(training_data, training_split, max_atoms, flag="--training_data")
    if held_out.identity() == training.identity():
        raise UserError(
            f"--reference: {reference} is --training_data; give crystals that the run never saw, such as another "
            "--reference_split"
        )
    return Real(held_out, training)


def atoms_of(formula: str) -> np.ndarray:
    """O2 -> [8, 8]."""
    counts = parse_formula(formula)
    return np.repeat(list(counts), list(counts.values()))


# ---- samples that are there


def read_given(path: str, split: str | None, num_samples: int | None, real: Real) -> tuple[SampleSet, list[str]]:
    """The crystals of --samples, and notes on them. Nothing is left out or mended: what cannot be read is a sample
    that is not valid. Raises UserError where there are none.
    """
    folder = Path(path)
    notes: list[str] = []
    if (folder / TABLE_FILE).is_file() and (folder / LINES_FILE).is_file():
        crystals, requests = read_samples(folder)
    else:
        rows, _ = open_crystals(path, split, "--samples")
        crystals, reasons = read_rows(rows)
        requests = [{} for _ in crystals]
        if reasons:
            notes.append(f"{len(reasons)} of {len(rows)} samples cannot be read and are not valid ({reasons[0]})")
    if not crystals:
        raise UserError(f"--samples: {path} holds no crystals; give some")
    kept = [int(row) for row in rows_at_most(len(crystals), num_samples or len(crystals))]
    crystals, requests = [crystals[row] for row in kept], [requests[row] for row in kept]
    return SampleSet(SAMPLES, SAMPLES, crystals, requests, real.counterparts(requests)), notes


def read_rows(rows: list[dict[str, Any]]) -> tuple[list[Crystal], list[str]]:
    """The crystal of each row as it stands, and why some cannot be read."""
    crystals, reasons = [], []
    for row in rows:
        try:
            crystal = crystal_of_arrays(row) if has_arrays(row) else crystal_of_cif(str(row.get(CIF_COLUMN) or ""))
        except UserError:
            raise
        except Exception as error:  # pymatgen raises many kinds for what it cannot read
            crystal = UNREADABLE
            reasons.append(" ".join(str(error).split())[:200] or type(error).__name__)
        crystals.append(crystal)
    return crystals, reasons


# ---- samples of a run


@dataclass
class Order:
    """What a run is asked for, with one entry for each sample."""

    requests: list[dict[str, Any]]
    num_atoms: np.ndarray  # (B,)
    counterparts: list[list[Crystal]]
    counts: list[dict[int, int]] | None  # atoms of each element, where the composition is clamped


def order_of_flags(
    pipeline: CrystalPipeline,
    run_dir: Path,
    real: Real,
    *,
    num_samples: int,
    num_atoms: int | None,
    seed: int,
    compositions: Sequence[str],
    chemical_systems: Sequence[str],
    assignments: Sequence[str],
    clamp_composition: bool,
    targets: tuple[str, list[float]] | None,
) -> Order:
    """`num_samples` in all of what the flags ask for, turn by turn. Raises UserError for what the run was not trained
    on.
    """
    of_targets: list[list[str]] = [[]]
    if targets is not None:
        name, values = targets
        check_property(pipeline, run_dir, real, name, assignments)
        of_targets = [[f"{name}={value!r}"] for value in values]
    kinds = [
        request
        for more in of_targets
        for request in requested_crystals(
            pipeline,
            run_dir,
            compositions,
            chemical_systems,
            [*assignments, *more],
            clamp_composition=clamp_composition,
        )
    ]
    if num_samples < len(kinds):
        raise UserError(f"--num_samples {num_samples}: {len(kinds)} different things are asked for; give more")
    requests = [kinds[i % len(kinds)] for i in range(num_samples - num_samples % len(kinds))]
    sizes = numbers_of_atoms(pipeline, requests, num_atoms, seed)
    counts = clamped_counts(requests, sizes) if clamp_composition else None
    return Order(requests, sizes, real.counterparts(requests), counts)


def check_property(
    pipeline: CrystalPipeline, run_dir: Path, real: Real, name: str, assignments: Sequence[str]
) -> None:
    """Raises UserError for a property of --property_targets that the run or the real crystals know nothing of."""
    if pipeline.columns.get(name, {}).get("kind") != "property":
        raise UserError(f"--property_targets {name}: {not_a_condition(pipeline.columns, run_dir, name)}")
    if any(text.partition("=")[0] == name for text in assignments):
        raise UserError(f"--property {name} with --property_targets {name}: the targets set it; leave one out")
    for flag, table in (("--training_data", real.training), ("--reference", real.held_out)):
        columns = {} if table is None else number_columns(table)
        if name not in columns:
            raise UserError(f"{flag}: there is no column of numbers {name}; it has {', '.join(columns) or 'none'}")


def number_columns(table: CrystalTable) -> dict[str, np.ndarray]:
    """The columns that are numbers, NaN where there is none."""
    return {name: values for name, values in table.columns.items() if values.dtype == np.float64}


def order_of_reference(
    pipeline: CrystalPipeline,
    run_dir: Path,
    real: Real,
    rows: np.ndarray,
    *,
    assignments: Sequence[str],
    clamp_composition: bool,
) -> Order:
    """The formula and the number of atoms of each of some held-out crystals, which is what a sample may match. Raises
    UserError for a run that cannot be asked.
    """
    flag, table = "--compositions_from_reference", real.held_out.take(rows)
    if "composition" not in pipeline.columns and not clamp_composition:
        hint = "add --clamp_composition to fix the atoms instead"
        raise UserError(f"{flag}: {not_a_condition(pipeline.columns, run_dir, 'composition')}; {hint}")
    if table.num_atoms.max() > pipeline.max_atoms:
        raise UserError(
            f"{flag}: the reference has crystals of {table.num_atoms.max()} atoms, and {run_dir} was trained with up "
            f"to {pipeline.max_atoms}; give --max_atoms {pipeline.max_atoms}"
        )
    (shared,) = requested_crystals(pipeline, run_dir, assignments=assignments)
    crystals = table.crystals()
    requests = [{"composition": str(formula)} | shared for formula in table.columns["formula"]]
    counts = None
    if clamp_composition:
        counts = [dict(Counter(each.atomic_numbers.tolist())) for each in crystals]
    return Order(requests, table.num_atoms, [[crystal] for crystal in crystals], counts)


# ---- nulls


def random_latents(pipeline: CrystalPipeline, order: Order, seed: int, batch_size: int) -> SampleSet:
    """What the decoder makes of noise, with the numbers of atoms of the samples: the run without its denoiser."""
    crystals = [crystal for batch in decoded_noise(pipeline, order, seed, batch_size) for crystal in batch]
    return SampleSet(f"null: {RANDOM_LATENTS}", RANDOM_LATENTS, crystals, order.requests, order.counterparts)


def decoded_noise(pipeline: CrystalPipeline, order: Order, seed: int, batch_size: int) -> Iterator[list[Crystal]]:
    """Standard normal latents, sample i from seed `seed` + i, decoded in batches."""
    shape = (pipeline.max_atoms, pipeline.vae.config.latent_channels)
    for first, sizes in batches(order.num_atoms.tolist(), batch_size):
        places = slice(first, first + len(sizes))
        generators = image_generators(seed, first, len(sizes))
        latents = torch.stack([torch.randn(shape, generator=each) for each in generators])  # (B, N, D)
        counts = order.counts and order.counts[places]
        yield pipeline.decode(latents.to(pipeline.vae.device), torch.tensor(sizes), counts)


def shuffled(samples: SampleSet, seed: int) -> SampleSet | None:
    """The same samples judged by what others were asked for; None where all were asked for the same."""
    if len({tuple(sorted((name, str(value)) for name, value in each.items())) for each in samples.requests}) < 2:
        return None
    places = np.random.default_rng(seed).permutation(len(samples.requests))
    name = "null: shuffled conditions" if samples.name == SAMPLES else f"{samples.name}, null: shuffled conditions"
    return replace(
        samples,
        name=name,
        kind=SHUFFLED,
        requests=[samples.requests[place] for place in places],
        counterparts=[samples.counterparts[place] for place in places],
    )


def asked_counts(request: dict[str, Any]) -> dict[int, int] | None:
    """The smallest formula unit that a request names."""
    return counts_of(atoms_of(request["composition"])) if "composition" in request else None
