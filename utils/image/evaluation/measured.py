"""What was measured on images: features of samples, and features and statistics of real images, kept for next time."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from utils.errors import UserError
from utils.files import replace_durably, sha256_json, temporary_path
from utils.image.evaluation.features import Features, PixelFeatures
from utils.image.evaluation.images import Images, conversions
from utils.image.evaluation.metrics import Statistics


@dataclass
class Measured:
    """Features of a set of images; of a file with statistics alone there are none."""

    title: str
    features_name: str
    resolution: int | None  # None where a file does not tell
    count: int
    features: Tensor | None = None  # (N, D) float32
    logits: Tensor | None = None  # (N, K) float32
    statistics: Statistics | None = None
    seen: dict[str, int] = field(default_factory=dict)
    path: str | None = None  # of the file that keeps it


def measure(
    images: Images, extractors: list[Features], resolution: int, batch_size: int, same_size: bool
) -> list[Measured]:
    """Features and logits of all images by each of the extractors; the images are read once."""
    features: list[list[Tensor]] = [[] for _ in extractors]
    logits: list[list[Tensor]] = [[] for _ in extractors]
    images.seen.clear()
    progress = tqdm(total=len(images), unit=" images", desc=images.flag.lstrip("-"), leave=False)
    for rows in torch.arange(len(images)).split(batch_size):
        batch = images.read(rows.tolist(), resolution, same_size)
        for i, extractor in enumerate(extractors):
            found = extractor(batch)
            features[i].append(found.features)
            logits[i] += [] if found.logits is None else [found.logits]
        progress.update(len(rows))
    progress.close()
    return [
        Measured(
            images.title,
            extractor.name,
            resolution,
            len(images),
            features=torch.cat(features[i]),
            logits=torch.cat(logits[i]) if logits[i] else None,
            seen=dict(images.seen),
        )
        for i, extractor in enumerate(extractors)
    ]


def measure_reference(
    images: Images, extractors: list[Features], resolution: int, batch_size: int, folder: Path
) -> list[Measured]:
    """The same of real images, with the statistics of FID; kept in `folder`, one file for each extractor, under a name
    that says what was measured, so that the next evaluation reads them."""
    paths = [folder / f"{reference_key(images, extractor, resolution)}.safetensors" for extractor in extractors]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        measured = measure(images, [extractors[i] for i in missing], resolution, batch_size, same_size=False)
        for i, found in zip(missing, measured, strict=True):
            save_measured(found, extractors[i], paths[i])
    return [load_measured(path, extractor, images.flag) for path, extractor in zip(paths, extractors, strict=True)]


def reference_key(images: Images, extractor: Features, resolution: int) -> str:
    """Name of the file that keeps what an extractor says of the images: content, features and size decide."""
    return sha256_json({"images": images.identity, "features": extractor.identity, "resolution": resolution})[:20]


def save_measured(measured: Measured, extractor: Features, path: Path) -> None:
    """Writes a safetensors file, which `--reference` takes too; complete or absent."""
    assert measured.features is not None
    tensors = {"features": measured.features}
    if not isinstance(extractor, PixelFeatures) and len(measured.features) > 1:
        statistics = Statistics.of(measured.features)
        tensors |= {"mean": statistics.mean, "covariance": statistics.covariance}
    metadata = {
        "title": measured.title,
        "features": extractor.name,
        "identity": extractor.identity,
        "resolution": str(measured.resolution),
        "count": str(measured.count),
        "seen": json.dumps(measured.seen),
    }
    temporary = temporary_path(path)
    save_file(tensors, str(temporary), metadata)
    replace_durably(temporary, path)


def load_measured(path: Path, extractor: Features, flag: str) -> Measured:
    """What `save_measured` wrote, or a .npz with `mu` and `sigma` of other tools, whose features are taken on trust.
    Raises UserError for features that are not the extractor's."""
    if path.suffix == ".npz":
        return load_npz(path, extractor, flag)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(str(path))
    except Exception as error:  # safetensors has its own error, which is no OSError
        raise UserError(f"{flag}: {path} cannot be read: {error}; delete it to measure again") from error
    if metadata.get("identity") != extractor.identity:
        raise UserError(
            f"{flag} {path}: holds statistics of {metadata.get('features') or 'unknown features'}, not of "
            f"{extractor.name}; FIDs of different features cannot be compared"
        )
    statistics = None
    if "mean" in tensors:
        statistics = Statistics(tensors["mean"], tensors["covariance"], int(metadata["count"]), extractor.name)
    return Measured(
        metadata["title"],
        extractor.name,
        int(metadata["resolution"]),
        int(metadata["count"]),
        features=tensors.get("features"),
        statistics=statistics,
        seen=json.loads(metadata["seen"]),
        path=str(path),
    )


def load_npz(path: Path, extractor: Features, flag: str) -> Measured:
    """Mean and covariance as pytorch-fid, clean-fid and EDM keep them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
    except Exception as error:  # zipfile, numpy and a missing key share no base class
        raise UserError(f"{flag} {path}: expected an .npz with mu and sigma: {error}") from error
    if len(mean) != extractor.dim:
        raise UserError(f"{flag} {path}: statistics of {len(mean)} features; {extractor.name} has {extractor.dim}")
    title = f"{path} (features and resolution taken on trust)"
    return Measured(title, extractor.name, None, 0, statistics=Statistics(mean, covariance, 0, extractor.name))


class RealImages:
    """The sources of real images, "reference", "training_data" and "held_out_data", and what the extractors say of
    them; `statistics_file` stands for a reference without images."""

    def __init__(
        self,
        sources: dict[str, Images],
        statistics_file: str | None,
        extractors: list[Features],
        *,
        batch_size: int,
        folder: Path,
    ):
        self.sources, self.statistics_file, self.extractors = sources, statistics_file, extractors
        self.batch_size, self.folder = batch_size, folder
        self.measured: dict[str, list[Measured]] = {}
        self.resolution: int | None = None

    def measure(self, resolution: int) -> None:
        """Measures all sources at the resolution of the samples, once. Raises UserError for statistics of another."""
        if self.resolution == resolution:
            return
        self.resolution = resolution
        for name, images in self.sources.items():
            self.measured[name] = measure_reference(images, self.extractors, resolution, self.batch_size, self.folder)
        if self.statistics_file is not None:
            path = Path(self.statistics_file)
            found = [load_measured(path, each, "--reference") for each in self.extractors if each.kind != "pixels"]
            if found[0].resolution not in (None, resolution):
                raise UserError(
                    f"--reference {path}: its statistics are of images at {found[0].resolution} x "
                    f"{found[0].resolution}, the samples are {resolution} x {resolution}; give statistics or images "
                    "of the same size, or --resolution"
                )
            self.measured["reference"] = found

    def of(self, name: str, extractor: Features) -> Measured | None:
        """Features of a source by an extractor; None where there is no such source, or no such features of it."""
        found = [each for each in self.measured.get(name, []) if each.features_name == extractor.name]
        return found[0] if found else None

    def notes(self) -> list[str]:
        """Sentences on what was converted in the images of each source."""
        each_first = {name: found[0] for name, found in self.measured.items()}
        return [note for name, first in each_first.items() for note in conversions(name, first.count, first.seen)]
