"""Pictures of a report: grids of samples, and samples beside the real images they are nearest to."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from utils.image.evaluation.figures import Neighbours
from utils.image.evaluation.images import Images

MAX_CELL = 128  # pixels of a side: a report is one file


def thumbnails(images: Images, rows: list[int], resolution: int) -> list[Image.Image]:
    """The images of `rows` as they are compared."""
    return [Image.fromarray(image.numpy()) for image in images.read(rows, resolution, same_size=False)]


def cell_of(resolution: int) -> int:
    """Pixels of a side in a grid: small images enlarged by a whole factor, large ones made smaller."""
    return MAX_CELL if resolution > MAX_CELL else resolution * max(1, 64 // resolution)


def grid_of_samples(images: Images, resolution: int, columns: int = 10, max_rows: int = 10) -> Image.Image:
    """A row for each of the first classes or captions; without them, the first images in rows."""
    asked = images.captions or (None if images.class_labels is None else [str(int(i)) for i in images.class_labels])
    if asked is None:
        first = list(range(min(len(images), columns * max_rows)))
        rows = {str(i): first[i : i + columns] for i in range(0, len(first), columns)}
        names = [""] * len(rows)
    else:
        kinds = sorted(set(asked), key=asked.index)[:max_rows]
        rows = {kind: [i for i, each in enumerate(asked) if each == kind][:columns] for kind in kinds}
        names = list(rows)
    shown = [thumbnails(images, indices, resolution) for indices in rows.values()]
    return labelled_grid(shown, names, cell_of(resolution))


def grid_of_neighbours(samples: Images, real: Images, near: Neighbours, resolution: int) -> Image.Image:
    """Samples in the upper row, the real image nearest to each below it."""
    rows = [thumbnails(samples, near.sample_rows, resolution), thumbnails(real, near.real_rows, resolution)]
    return labelled_grid(rows, ["samples", "nearest real"], cell_of(resolution))


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """A PNG with its parameters as JSON in the text chunk "parameters"."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    image.save(path, pnginfo=info)


def labelled_grid(rows: list[list[Image.Image]], labels: list[str], cell: int | None = None) -> Image.Image:
    """One row of images for each label, the label at the left. Small images are enlarged to at least 64 pixels."""
    size = rows[0][0].size[0]
    cell = cell or size * max(1, -(-64 // size))
    font = ImageFont.load_default(size=14)
    longest = max((font.getlength(label[:60]) for label in labels), default=0)
    margin = int(longest) + 12 if longest else 0
    grid = Image.new("RGB", (margin + max(map(len, rows)) * (cell + 2), len(rows) * (cell + 2)), "white")
    draw = ImageDraw.Draw(grid)
    for y, (label, images) in enumerate(zip(labels, rows, strict=True)):
        draw.text((6, y * (cell + 2) + cell / 2), label[:60], fill="black", font=font, anchor="lm")
        for x, image in enumerate(images):
            enlarged = image.resize(
                (cell, cell), Image.Resampling.NEAREST if size < cell else Image.Resampling.LANCZOS
            )
            grid.paste(enlarged, (margin + x * (cell + 2), y * (cell + 2)))
    return grid
