"""The endless stream of training images, decoded as they are needed."""

import logging

import numpy as np
import torch
from torch import Tensor

from utils.draws import StreamOrder, uniform_draws
from utils.errors import UserError
from utils.image.data.pixels import BadImage, Framing

logger = logging.getLogger(__name__)


class ImageStream(torch.utils.data.Dataset):
    """Position in the stream -> image, a pure function of (seed, position): order, crop and flip are keyed by it.

    `dataset` is map-style with an undecoded image column. An unreadable image is named once, and the next readable one
    takes its place; after `max_bad_in_a_row` of them in a row UserError is raised.
    """

    max_bad_in_a_row = 100

    def __init__(self, dataset, image_column: str, framing: Framing, random_flip: bool, seed: int):
        self.dataset, self.image_column = dataset, image_column
        self.framing, self.random_flip = framing, random_flip
        self.seed = seed
        self.order = StreamOrder(seed, len(dataset))
        self.bad_rows: set[int] = set()

    def image(self, row: int, position: int) -> np.ndarray:
        """uint8 (R, R, 3) of a row, or of the first readable one after it."""
        for candidate in range(row, row + min(self.max_bad_in_a_row, len(self.dataset))):
            candidate %= len(self.dataset)
            try:
                generator = np.random.default_rng([self.seed, position])
                return self.framing(self.dataset[candidate][self.image_column], generator)
            except BadImage as reason:
                if candidate not in self.bad_rows:
                    logger.warning("row %d cannot be read (%s): the next one takes its place", candidate, reason)
                self.bad_rows.add(candidate)
        raise UserError(f"the dataset has no readable image in {self.max_bad_in_a_row} rows from row {row} on")

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """Images (B, 3, R, R) uint8 at `positions`."""
        where = np.asarray(positions, dtype=np.int64)
        images = np.stack([self.image(int(row), p) for row, p in zip(self.order.rows(where), positions, strict=True)])
        if self.random_flip:
            flip = uniform_draws(self.seed, "flip", where) < 0.5
            images[flip] = images[flip][:, :, ::-1]
        return {"images": torch.from_numpy(images).permute(0, 3, 1, 2), "positions": torch.from_numpy(where)}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
