"""Pictures of crystals: unit cells as balls and edges."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.crystal.files import any_formula
from utils.crystal.structure import MAX_ATOMIC_NUMBER, Crystal, crystal_package, volume, wrapped

LAST_RADIUS, LAST_COLOUR = 96, 109  # curium and meitnerium: what is heavier looks like them
ATOM_SCALE = 0.42  # of the covalent radius, so that the cell can be seen through
FACE_DISTANCE = 0.25  # Angstrom from a face, within which an atom is drawn on the opposite one too
AZIMUTH, ELEVATION = 0.35, 0.22  # radians between the view and the cell's first vector, c pointing up
OVERSAMPLING = 3
LINE_COLOUR, CROSS_COLOUR, TEXT_COLOUR = (60, 60, 70), (200, 60, 60), (30, 30, 40)


# ---- pictures


def crystal_grid(
    crystals: Sequence[Crystal], labels: Sequence[str] | None = None, columns: int = 8, cell: int = 200
) -> Image.Image:
    """Unit cells, each scaled to `cell` pixels, its label (the formula) below; what is no crystal is crossed out."""
    width = max(1, min(columns, len(crystals)))
    height = max(1, -(-len(crystals) // width))
    caption = max(18, cell // 8)
    grid = Image.new("RGB", (width * cell, height * (cell + caption)), "white")
    for i, crystal in enumerate(crystals):
        label = any_formula(crystal.atomic_numbers) if labels is None else labels[i]
        place = (i % width * cell, i // width * (cell + caption))
        grid.paste(draw_crystal(crystal, cell), place)
        grid.paste(draw_label(label, cell, caption, subscripts=labels is None), (place[0], place[1] + cell))
    return grid


def is_drawable(crystal: Crystal) -> bool:
    """Whether there is a cell, and elements in it."""
    numbers = crystal.atomic_numbers
    finite = np.isfinite(crystal.lattice).all() and np.isfinite(crystal.frac_coords).all()
    if not finite or not len(numbers) or min(numbers) < 1 or max(numbers) > MAX_ATOMIC_NUMBER:
        return False
    return np.abs(crystal.lattice).max() < 1e4 and volume(crystal.lattice) > 1e-3


def draw_crystal(crystal: Crystal, cell: int) -> Image.Image:
    """A square picture: edges of the cell and atoms, the nearer over the farther ones, seen in parallel projection."""
    size = cell * OVERSAMPLING
    canvas = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(canvas)
    if not is_drawable(crystal):
        low, high = size // 5, size - size // 5
        draw.rectangle((low, low, high, high), outline=LINE_COLOUR, width=OVERSAMPLING)
        draw.line((low, low, high, high), fill=CROSS_COLOUR, width=2 * OVERSAMPLING)
        draw.line((low, high, high, low), fill=CROSS_COLOUR, width=2 * OVERSAMPLING)
        return canvas.reduce(OVERSAMPLING)
    lattice = np.asarray(crystal.lattice, dtype=np.float64)
    turn = view_axes(lattice)
    numbers, frac_coords = with_repeats(crystal)
    atoms = frac_coords @ lattice @ turn  # (m, 3): right, up and towards the viewer, in Angstrom
    radii = ATOM_SCALE * covalent_radii(numbers)
    segments = cell_edges() @ lattice @ turn  # (s, 2, 3)
    inside = (np.linalg.norm(segments.mean(axis=1)[:, None] - atoms, axis=-1) < radii).any(axis=1)  # of an atom
    segments = segments[~inside]
    corners = np.concatenate([atoms[:, :2] - radii[:, None], atoms[:, :2] + radii[:, None], segments[:, 0, :2]])
    low, high = corners.min(axis=0), corners.max(axis=0)
    scale = 0.92 * size / (high - low).max()
    depths = np.concatenate([segments.mean(axis=1)[:, 2], atoms[:, 2]])
    haze = 0.35 * (depths.max() - depths) / max(np.ptp(depths), 1e-6)

    def pixel(point: np.ndarray) -> tuple[float, float]:
        x, y = (point[:2] - (low + high) / 2) * scale + size / 2
        return x, size - y

    for i in np.argsort(depths):
        if i < len(segments):
            colour = tuple(int(value + (255 - value) * haze[i]) for value in LINE_COLOUR)
            draw.line([pixel(point) for point in segments[i]], fill=colour, width=2 * OVERSAMPLING - 2)
            continue
        atom = i - len(segments)
        sprite = ball(int(numbers[atom]), max(2, round(radii[atom] * scale)), round(float(haze[i]), 1))
        x, y = pixel(atoms[atom])
        canvas.paste(sprite, (round(x) - sprite.width // 2, round(y) - sprite.height // 2), sprite)
    return canvas.reduce(OVERSAMPLING)


def view_axes(lattice: np.ndarray) -> np.ndarray:
    """(3, 3), its columns the directions right, up and towards the viewer: c upwards, a towards the viewer, and both a
    little off so that no atom hides another.
    """
    up = lattice[2] / np.linalg.norm(lattice[2])
    front = lattice[0] - (lattice[0] @ up) * up
    front /= np.linalg.norm(front)
    right = np.cross(up, front)
    level = np.cos(AZIMUTH) * front + np.sin(AZIMUTH) * right
    view = np.cos(ELEVATION) * level + np.sin(ELEVATION) * up
    right = np.cross(up, level)
    return np.stack([right, np.cross(view, right), view], axis=1)


def with_repeats(crystal: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers (m,) and fractional coordinates (m, 3), atoms at a face of the cell on the opposite one too."""
    heights = 1 / np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)  # between opposite faces, in Angstrom
    near = np.minimum(FACE_DISTANCE / heights, 0.25)
    numbers, positions = [], []
    for number, position in zip(crystal.atomic_numbers, wrapped(np.asarray(crystal.frac_coords)), strict=True):
        shifts = [[0, *([1] if x < d else []), *([-1] if x > 1 - d else [])] for x, d in zip(position, near)]
        for shift in product(*shifts):
            numbers.append(number)
            positions.append(position + shift)
    return np.array(numbers), np.array(positions)


def cell_edges(pieces: int = 30) -> np.ndarray:
    """The twelve edges of a cell in short pieces (12 pieces, 2, 3), fractional."""
    corners = list(map(np.array, product((0, 1), repeat=3)))
    along = np.linspace(0, 1, pieces + 1)[:, None]
    edges = [p + along * (q - p) for p in corners for q in corners if sorted(q - p) == [0, 0, 1]]
    return np.concatenate([np.stack([points[:-1], points[1:]], axis=1) for points in edges])


def covalent_radii(numbers: np.ndarray) -> np.ndarray:
    """In Angstrom: Cordero et al. 2008, doi 10.1039/b801115j."""
    return crystal_package("ase.data").covalent_radii[np.minimum(numbers, LAST_RADIUS)]


@lru_cache(maxsize=256)
def ball(number: int, radius: int, haze: float) -> Image.Image:
    """A shaded ball in an element's colour by Jmol, lit from the upper left; `haze` in [0, 1] fades it to white."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1] / radius
    distance = np.sqrt(x**2 + y**2)
    z = np.sqrt(np.clip(1 - distance**2, 0, 1))
    light = np.clip((-0.45 * x - 0.55 * y + 0.7 * z) / np.linalg.norm([0.45, 0.55, 0.7]), 0, 1)
    colour = (255 * crystal_package("ase.data.colors").jmol_colors[min(number, LAST_COLOUR)]).round()
    shaded = colour * (0.5 + 0.5 * light)[..., None]
    shaded += (255 - shaded) * (0.55 * light**12)[..., None]
    shaded[distance > 1 - 1.5 * OVERSAMPLING / (radius + OVERSAMPLING)] *= 0.55
    pixels = np.concatenate([shaded + (255 - shaded) * haze, 255.0 * (distance <= 1)[..., None]], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8), "RGBA")


def draw_label(text: str, width: int, height: int, subscripts: bool) -> Image.Image:
    """A line of text in the middle, digits lowered if asked for; cut where it is too long."""
    picture = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), "white")
    size = 0.62 * height * OVERSAMPLING
    fonts = {small: ImageFont.load_default(size=size * (0.7 if small else 1)) for small in (False, True)}
    parts = [(each, fonts[subscripts and each.isdigit()]) for each in text]
    ends = np.cumsum([0.0, *(font.getlength(each) for each, font in parts)])
    fitting = int((ends < picture.width).sum()) - 1
    left = (picture.width - ends[fitting]) / 2
    draw = ImageDraw.Draw(picture)
    for (each, font), x in zip(parts[:fitting], ends, strict=False):
        lower = 0.2 * size if font is fonts[True] else 0
        draw.text((left + x, 0.7 * picture.height + lower), each, fill=TEXT_COLOUR, font=font, anchor="ls")
    return picture.reduce(OVERSAMPLING)
