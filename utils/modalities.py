"""The modalities: which there are, which a run is of, and what each can be asked for. Imports no torch."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from utils.args.modality import Modality, autoencoders_of
from utils.crystal.modality import CRYSTAL
from utils.errors import UserError
from utils.expression.modality import EXPRESSION
from utils.image.modality import IMAGE

MODALITIES = {row.name: row for row in (IMAGE, CRYSTAL, EXPRESSION)}


def modality_of(path: Path) -> Modality:
    """The modality of a run's folder, or of one of its checkpoints: images, where its autoencoder is none of ours."""
    classes = autoencoders_of(path)
    return next((row for row in MODALITIES.values() if row.autoencoder in classes), IMAGE)


def check_modality(path: Path, wanted: str) -> None:
    """Raises UserError for a run, or a checkpoint, of another modality than is judged. Whoever loads what is no run
    refuses it."""
    found = modality_of(path)
    if found.name != wanted and autoencoders_of(path):
        advice = f"leave out --modality {wanted}" if found is IMAGE else f"add --modality {found.name}"
        raise UserError(
            f"--model: {path} is a run of {found.samples}; {advice}, or give a run of {MODALITIES[wanted].samples}"
        )


def add_request_args(parser: ArgumentParser) -> None:
    """What a run of any modality is asked for."""
    for add_flags in dict.fromkeys(each for row in MODALITIES.values() for each in row.request_flags):
        add_flags(parser)


def check_request_args(args: Namespace) -> None:
    """Raises UserError for request flags that are wrong whatever the run is."""
    for row in MODALITIES.values():
        if row.check_requests is not None:
            row.check_requests(args)


def refuse_other_requests(args: Namespace, run_dir: Path) -> None:
    """Raises UserError for request flags that only runs of other modalities take."""
    row = modality_of(run_dir)
    names = set().union(*(each.request_names() for each in MODALITIES.values())) - row.request_names()
    for name in sorted(names & args.given):
        raise UserError(f"--{name}: {run_dir} makes {row.samples}; leave it out")
