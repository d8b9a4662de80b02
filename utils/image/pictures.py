"""Pictures of a report: grids of samples, and samples beside the real images they are nearest to."""

from PIL import Image

from utils.diffusion.sampling import labelled_grid
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
