"""An evaluation of crystals from its arguments: real ones, samples of each point of a sweep, nulls, report."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.args.parsing import saved_arguments
from utils.args.sampling import sweep_points
from utils.crystal.evaluation.args import DEFAULT_CRYSTALS_OF_A_RUN, parse_targets
from utils.crystal.evaluation.figures import REQUEST_GROUPS, groups_of, titles_of
from utils.crystal.evaluation.judge import Judge
from utils.crystal.evaluation.metrics import load_calculator
from utils.crystal.evaluation.samples import (
    SAMPLES,
    Order,
    Real,
    SampleSet,
    open_real,
    order_of_flags,
    order_of_reference,
    random_latents,
    read_given,
    shuffled,
)
from utils.crystal.files import save_crystals
from utils.crystal.pictures import crystal_grid
from utils.crystal.pipeline import CrystalPipeline, load_run
from utils.crystal.sampler import Sampler
from utils.evaluation.figures import rows_at_most
from utils.evaluation.report import Point, Report, described
from utils.runs.load import next_folder

SHOWN = 32  # crystals in a picture
REMARK = (
    "A sample that is not valid, or cannot be read, counts as a sample. Where a column is missing, the figure says "
    "nothing of it."
)


def make_order(args: Namespace, pipeline: CrystalPipeline, real: Real) -> Order:
    """What the run is asked for. Raises UserError for what it was not trained on."""
    run_dir, properties = Path(args.model), args.property or []
    num_samples = args.num_samples or DEFAULT_CRYSTALS_OF_A_RUN
    if args.compositions_from_reference:
        rows = rows_at_most(len(real.held_out), num_samples).numpy()
        clamp = args.clamp_composition
        return order_of_reference(pipeline, run_dir, real, rows, assignments=properties, clamp_composition=clamp)
    return order_of_flags(
        pipeline,
        run_dir,
        real,
        num_samples=num_samples,
        num_atoms=args.num_atoms,
        seed=args.seed,
        compositions=args.composition or [],
        chemical_systems=args.chemical_system or [],
        assignments=properties,
        clamp_composition=args.clamp_composition,
        targets=parse_targets(args.property_targets) if args.property_targets else None,
    )


def sample_point(
    args: Namespace, real: Real, folder: Path, name: str, with_null: bool
) -> tuple[SampleSet, SampleSet | None, dict[str, Any]]:
    """Samples the run as sample.py does, and leaves in `folder` what it leaves -> the samples, the null of random
    latents if it is wanted, and the settings.
    """
    sampler = Sampler.of(args, Path(args.model))
    order = make_order(args, sampler.pipeline, real)
    crystals = sampler.sample_all(
        order.requests, args.seed, args.batch_size, args.mixed_precision, num_atoms=order.num_atoms
    )
    settings = sampler.settings(order.requests)
    folder.mkdir(parents=True)
    save_crystals(folder, crystals, order.requests, settings, args.seed)
    null = random_latents(sampler.pipeline, order, args.seed, args.batch_size) if with_null else None
    return SampleSet(name or SAMPLES, SAMPLES, crystals, order.requests, order.counterparts), null, settings


def evaluate(args: Namespace) -> None:
    """`evaluate.py --modality crystal`."""
    # Load
    calculator = load_calculator(args.calculator) if args.calculator else None
    if args.model is not None:
        load_run(args.model)  # what is wrong with it shows before the real crystals are read
    real = open_real(
        args.reference,
        args.reference_split,
        training_data=args.training_data,
        training_split=args.training_data_split,
        max_atoms=args.max_atoms,
    )
    output_dir = Path(args.output_dir) if args.output_dir else None
    output_dir = output_dir or next_folder((Path(args.model) if args.model else Path("runs")) / "evaluated")

    # Sample
    samples: list[SampleSet] = []
    nulls: list[SampleSet] = []
    notes: list[str] = []
    settings: dict[str, Any] = {}
    swept: dict[str, Any] = {}
    if args.samples is not None:
        given, notes = read_given(args.samples, args.samples_split, args.num_samples, real)
        samples.append(given)
    for swept in sweep_points(args) if args.samples is None else []:
        name = " ".join(f"{key} {value:g}" for key, value in swept.items())
        chosen = Namespace(**(vars(args) | swept))
        folder = output_dir / "samples" / (name.replace(" ", "_") or "all")
        sampled, null, settings = sample_point(chosen, real, folder, name, with_null=not nulls)
        samples.append(sampled)
        nulls += [null] if null is not None else []
    requests = samples[0].requests
    asked = list(dict.fromkeys(name for request in requests for name in request))
    rows = rows_at_most(len(real.held_out), len(requests)).numpy()
    held_out = real.sample_set(rows, asked, with_counterparts=any(samples[0].counterparts))
    permuted = [null for each in samples if (null := shuffled(each, args.seed)) is not None]

    # Measure
    judge = Judge.learn(
        real,
        held_out,
        requests,
        calculator=calculator,
        num_processes=args.num_match_processes,
        timeout_s=args.match_timeout,
    )
    points = []
    for each in [*samples, held_out, *nulls]:
        pictures = [("structures", crystal_grid(each.crystals[:SHOWN]))]
        points.append(Point(each.name, groups_of(each, judge), pictures))
    points += [Point(each.name, groups_of(each, judge, REQUEST_GROUPS)) for each in permuted]

    # Report
    of_split = f", split {args.reference_split}" if "split" in real.held_out.columns else ""
    facts = {
        "samples": f"{args.samples or args.model} ({len(requests)} crystals)",
        "held-out real": f"{args.reference}{of_split} ({len(held_out.crystals)} of {len(real.held_out)} crystals)",
    }
    if real.training is not None:
        facts["training data"] = f"{args.training_data} ({len(real.training)} crystals)"
    if settings:
        facts["sampling"] = described(settings, without=swept)
    for flag, table in (("--reference", real.held_out), ("--training_data", real.training)):
        if table is not None and table.skipped:
            notes.append(f"{flag}: {len(table.skipped)} crystals are left out ({table.skipped[0]['reason']}, ...)")
    if asked and not permuted:
        notes.append("all samples were asked for the same: there is no null of shuffled conditions")
    report = Report(
        facts=facts,
        points=points,
        titles=titles_of(requests),
        notes=notes,
        sweep=args.sweep[0] if args.sweep else None,
        arguments=saved_arguments(args),
        heading="{}",
        remark=REMARK,
    )
    report.write(output_dir)
    print(report.text())
    print(f"metrics.json and report.html in {output_dir}")
