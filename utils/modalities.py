"""The modalities: which there are, and which a run is of. Imports no torch."""

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
