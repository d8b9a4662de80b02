"""The latent cache of cells: vectors (D,), of which the last number is the logarithm of the library size, with the
columns of obs that can become conditions.
"""

import numpy as np

from utils.latents.columns import ColumnCache

CONDITION_KINDS = ("class", "property")


class VectorCache(ColumnCache):
    """An open cache of vectors."""

    kind, title = "vector", "cells"

    @property
    def cell_ids(self) -> np.ndarray:
        """(R,) which cell each row is."""
        return self.table.data.column("cell_id").to_numpy()
