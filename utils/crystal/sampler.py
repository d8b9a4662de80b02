"""What a crystal run is asked for: compositions, elements, properties, classes, or nothing; checked against the run
and sampled.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.crystal.cache import elements_of
from utils.crystal.files import save_crystals
from utils.crystal.matching import is_structurally_valid
from utils.crystal.modality import CRYSTAL
from utils.crystal.pictures import crystal_grid
from utils.crystal.pipeline import CrystalPipeline, load_guide, load_run
from utils.crystal.structure import Crystal, parse_chemical_system, parse_formula
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.sampling import batches, image_generators
from utils.errors import UserError
from utils.runs import sampler as base
from utils.runs.requests import column_values, not_a_condition, parse_assignments
from utils.runs.sampler import Request

FLAGS = {"composition": "--composition", "chemical_system": "--chemical_system"}


def requested_crystals(
    pipeline: CrystalPipeline,
    run_dir: Path,
    compositions: Sequence[str] = (),
    chemical_systems: Sequence[str] = (),
    assignments: Sequence[str] = (),
    clamp_composition: bool = False,
) -> list[dict[str, Any]]:
    """One request for each composition (LiFePO4) or chemical system (Li-Fe-O), with the `assignments` (band_gap=1.5)
    of properties and classes; a single one, perhaps empty, without either. Raises UserError for what the run was not
    trained on.
    """
    shared = parse_assignments(pipeline.columns, run_dir, assignments, FLAGS)
    for flag, given in (("composition", compositions), ("chemical_system", chemical_systems)):
        if given and flag not in pipeline.columns and not (flag == "composition" and clamp_composition):
            hint = "; add --clamp_composition to fix the atoms instead" if flag == "composition" else ""
            raise UserError(f"{FLAGS[flag]}: {not_a_condition(pipeline.columns, run_dir, flag)}{hint}")
    if compositions and chemical_systems:
        raise UserError("--composition with --chemical_system: the elements follow from the composition; use one")
    requests = [{"composition": text} for text in compositions]
    requests += [{"chemical_system": text} for text in chemical_systems]
    for request in requests:  # what cannot be read is said here
        for name, text in request.items():
            needed = fewest_atoms(request)
            if needed > pipeline.max_atoms:
                what = "atoms" if name == "composition" else "elements"
                raise UserError(
                    f"{FLAGS[name]} {text}: {needed} {what}, and {run_dir} was trained with up to "
                    f"{pipeline.max_atoms} atoms"
                )
    return [request | shared for request in requests or [{}]]


def fewest_atoms(request: dict[str, Any]) -> int:
    """Atoms that a request needs at least: those of a formula unit, or one of each element of a system."""
    if "composition" in request:
        return sum(parse_formula(request["composition"]).values())
    return len(parse_chemical_system(request["chemical_system"])) if "chemical_system" in request else 1


def condition_values(pipeline: CrystalPipeline, requests: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The values (B, ...) of the run's conditions for requests that all have the same ones."""
    values: dict[str, Tensor] = {}
    for name, settings in pipeline.columns.items():
        given = [request[name] for request in requests if name in request]
        if not given:
            continue
        if settings["kind"] == "composition":
            values[name] = torch.cat([elements_of(atoms_of(parse_formula(text)), name) for text in given])
        elif settings["kind"] == "chemical_system":
            systems = [torch.tensor([parse_chemical_system(text)]) for text in given]
            values[name] = torch.cat([elements_of(numbers, name) for numbers in systems])
        else:
            values[name] = column_values(settings, given)
    return values


def atoms_of(counts: dict[int, int]) -> Tensor:
    """{8: 2} -> [[8, 8]]."""
    return torch.tensor([[number for number, count in counts.items() for _ in range(count)]])


def numbers_of_atoms(
    pipeline: CrystalPipeline, requests: Sequence[dict[str, Any]], num_atoms: int | None, seed: int
) -> np.ndarray:
    """Atoms (B,) of each sample: as given, or from the training histogram; of a composition a multiple of its formula
    unit, of a chemical system one of each element at least. Raises UserError for a number that the run cannot make,
    and for one that does not fit the request.
    """
    fewest = [fewest_atoms(each) for each in requests]
    units = [number if "composition" in each else 1 for each, number in zip(requests, fewest, strict=True)]
    if num_atoms is None:
        return pipeline.draw_num_atoms(len(requests), seed, units, fewest)
    if num_atoms > pipeline.max_atoms:
        raise UserError(f"--num_atoms {num_atoms}: the run was trained with up to {pipeline.max_atoms}")
    wrong = [each["composition"] for each, unit in zip(requests, units, strict=True) if num_atoms % unit]
    if wrong:
        raise UserError(f"--num_atoms {num_atoms}: not a multiple of the atoms in {wrong[0]}; leave it out")
    if num_atoms < max(fewest):  # a system: a composition has no fewer
        text = requests[fewest.index(max(fewest))]["chemical_system"]
        raise UserError(f"--num_atoms {num_atoms}: {text} has {max(fewest)} elements; ask for as many atoms at least")
    return np.full(len(requests), num_atoms)


def clamped_counts(requests: Sequence[dict[str, Any]], num_atoms: np.ndarray) -> list[dict[int, int]]:
    """Atoms of each element in the whole cell of each sample. Raises UserError for a request without composition."""
    counts = []
    for request, total in zip(requests, num_atoms, strict=True):
        if "composition" not in request:
            raise UserError("--clamp_composition without --composition: there are no atoms to fix; name a formula")
        unit = parse_formula(request["composition"])
        times = int(total) // sum(unit.values())
        counts.append({number: count * times for number, count in unit.items()})
    return counts


class Sampler(base.Sampler):
    """A run of crystals that is ready to be sampled. A request is a composition or a chemical system, with properties
    and classes by their names; --num_atoms and --clamp_composition are for all alike.
    """

    modality = CRYSTAL
    load_run = staticmethod(load_run)
    load_guide = staticmethod(load_guide)

    def __init__(self, args: Namespace, run_dir: Path, pipeline: Any, guide: ConditionalDenoiser | None):
        super().__init__(args, run_dir, pipeline, guide)
        self.num_atoms: int | None = args.num_atoms
        self.clamp_composition: bool = args.clamp_composition

    def requests(self, args: Namespace) -> list[dict[str, Any]]:
        """--num_samples times each of --composition or --chemical_system, with --property."""
        asked = requested_crystals(
            self.pipeline,
            self.run_dir,
            compositions=args.composition or [],
            chemical_systems=args.chemical_system or [],
            assignments=args.property or [],
            clamp_composition=args.clamp_composition,
        )
        self.guidance(asked)
        requests = [each for each in asked for _ in range(args.num_samples)]
        num_atoms = numbers_of_atoms(self.pipeline, requests, self.num_atoms, args.seed)
        if self.clamp_composition:
            clamped_counts(requests, num_atoms)
        return requests

    def can_guide(self, requests: Sequence[Request]) -> bool:
        """Whether a request names a condition of the run: a clamped composition need not be one."""
        return any(name in self.pipeline.columns for request in requests for name in request)

    def guidance(self, requests: Sequence[Request]) -> Guidance:
        """As any run is guided. Raises UserError for a learned variance, which a guide knows nothing of."""
        guidance = super().guidance(requests)
        if self.pipeline.learns_variance and (self.guide is not None or guidance.rescale):
            flag = "--guide_model" if self.guide is not None else "--guidance_rescale"
            raise UserError(f"{flag}: not for a run with a learned variance; leave it out")
        return guidance

    def sample(
        self,
        requests: Sequence[dict[str, Any]],
        seed: int,
        batch_size: int,
        mixed_precision: str,
        num_atoms: np.ndarray | None = None,
    ) -> Iterator[list[Crystal]]:
        """Crystals for the requests, a batch at a time; number i has seed `seed` + i, and is the same whatever the
        batch. `num_atoms` (B,) are those of each, by default as --num_atoms says. What the run gives is given: a
        crystal that is not valid, or not finite, is one of the samples.
        """
        if num_atoms is None:
            num_atoms = numbers_of_atoms(self.pipeline, requests, self.num_atoms, seed)
        counts = clamped_counts(requests, num_atoms) if self.clamp_composition else None
        guidance = self.guidance(requests)
        for first, batch in batches(requests, batch_size):
            places = slice(first, first + len(batch))
            sizes = torch.from_numpy(num_atoms[places])
            values = condition_values(self.pipeline, batch)
            generators = image_generators(seed, first, len(batch))
            with self.autocast(mixed_precision):
                latents = self.pipeline.latents(sizes, values, guidance, guide_model=self.guide, generator=generators)
            yield self.pipeline.decode(latents.float(), sizes, counts and counts[places])

    def save(self, folder: Path, samples: list[Crystal], requests: Sequence[dict[str, Any]], seed: int) -> str:
        """Writes CIF files, samples.parquet, samples.jsonl and crystals.png."""
        settings = self.settings(requests) | {"clamp_composition": self.clamp_composition}
        save_crystals(folder, samples, requests, settings, seed)
        crystal_grid(samples[:64]).save(folder / "crystals.png")
        valid = sum(is_structurally_valid(crystal) for crystal in samples)
        return f"{len(samples)} crystals ({valid} of valid structure) and crystals.png in {folder}"
