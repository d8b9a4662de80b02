"""The latent cache of images: grids (C, H, W) with labels and captions, which can become conditions."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.latents.cache import Draw, LatentCache, RowGatherer, open_table


class ImageCache(LatentCache):
    """An open cache of images. A batch has `class_labels` (B,) where there are labels; and where there are captions
    `num_tokens` (B,) beside `encoder_hidden_states` (B, S, D) or `input_ids` (B, S), whichever is stored.
    """

    def __init__(self, cache_dir: str | Path, normalisation: str = "vae"):
        super().__init__(cache_dir, normalisation)
        self.class_labels = self.table.data.column("label").to_numpy() if self.spec.labels else None  # (R,)
        if self.spec.captions:
            self.caption_content = self.spec.captions["content"]
            self._open_captions(Path(cache_dir) / "captions", tuple(self.spec.captions["shape"]))

    def _open_captions(self, folder: Path, shape: tuple[int, ...]) -> None:
        ids = self.table.data.column("caption_id").combine_chunks()
        captions = open_table(folder)
        known = captions.data.column("caption_id").to_numpy()
        order = np.argsort(known)
        # Row of the caption table for each (image, caption) pair, and where each image's captions begin.
        self.caption_rows = order[np.searchsorted(known[order], ids.flatten().to_numpy())]
        self.caption_starts = ids.offsets.to_numpy().astype(np.int64)
        self.caption_starts -= self.caption_starts[0]
        self.num_tokens = captions.data.column("num_tokens").to_numpy()
        self.caption_texts = captions.data.column("caption")
        self.caption_states = RowGatherer(captions, self.caption_content, shape)

    def gather(self, rows: np.ndarray, draw: Draw | None = None) -> dict[str, Tensor]:
        """A batch of rows (B,), as `LatentCache.gather`; `draw("caption")` picks one of the captions of each, the
        first without it.
        """
        batch = super().gather(rows, draw)
        if self.class_labels is not None:
            batch["class_labels"] = torch.from_numpy(self.class_labels[rows])
        if self.spec.captions:
            counts = self.caption_starts[rows + 1] - self.caption_starts[rows]
            chosen = 0 if draw is None else (draw("caption") * counts).astype(np.int64)
            captions = self.caption_rows[self.caption_starts[rows] + chosen]
            name = "input_ids" if self.caption_content == "input_ids" else "encoder_hidden_states"
            batch[name] = self.caption_states(captions)
            batch["num_tokens"] = torch.from_numpy(self.num_tokens[captions])
        return batch

    def first_captions(self, rows: np.ndarray) -> list[str]:
        """The text of the first caption of each of the rows (B,)."""
        return self.caption_texts.take(self.caption_rows[self.caption_starts[rows]]).to_pylist()

    def null_caption(self) -> tuple[Tensor, int]:
        """What is stored for the empty caption, (S, D) states or (S,) token ids, and its count of real tokens. Always
        row 0.
        """
        return self.caption_states(np.array([0]))[0], int(self.num_tokens[0])
