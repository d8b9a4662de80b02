"""The endless stream of training images, decoded as they are needed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.data_images import BadImage, decode_image, resize_and_crop
from utils.draws import StreamOrder, uniform_draws


class ImageStream(torch.utils.data.Dataset):
    """Position in the stream -> image, a pure function of (seed, position): order, crop and flip are keyed by it.

    `dataset` is map-style with an undecoded image column. An unreadable image is replaced by the next readable one;
    after `max_bad_in_a_row` of them in a row BadImage is raised.
    """

    max_bad_in_a_row = 100

    def __init__(self, dataset, image_column: str, resolution: int, center_crop: bool, random_flip: bool, seed: int):
        self.dataset, self.image_column = dataset, image_column
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.seed = seed
        self.order = StreamOrder(seed, len(dataset))

    def image(self, row: int, position: int) -> np.ndarray:
        """uint8 (R, R, 3) of a row, or of the first readable one after it."""
        generator = np.random.default_rng([self.seed, position])
        reason = ""
        for offset in range(min(self.max_bad_in_a_row, len(self.dataset))):
            value: Any = self.dataset[(row + offset) % len(self.dataset)][self.image_column]
            try:
                return resize_and_crop(decode_image(value), self.resolution, self.center_crop, generator)
            except BadImage as error:
                reason = str(error)
        raise BadImage(f"no readable image in {self.max_bad_in_a_row} rows from {row} on: {reason}")

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
