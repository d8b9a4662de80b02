"""Random numbers that belong to a sample, and not to a process, a batch or a moment in time.

Training reads an endless stream of samples, and each has a position in it: 0, 1, 2, ... Every random number of
training (noise, timestep, condition dropout, flip, caption, posterior sample) is a pure function of (seed, name,
position). So there is no generator state to save; a resumed run draws what the killed one would have drawn; and the
numbers are the same however the stream is cut into micro-batches and processes.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Mixes uint64 values of any shape into uint64 values that look independent (Steele et al. 2014, SplitMix64)."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def keys(seed: int, name: str, positions: np.ndarray) -> np.ndarray:
    """One uint64 key for each position (B,), different for every seed and every name of a draw."""
    stream = splitmix64(np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64))
    with np.errstate(over="ignore"):
        return splitmix64(splitmix64(positions.astype(np.uint64) ^ stream[0]) + stream[1])


def uniform_draws(seed: int, name: str, positions: np.ndarray) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), one for each position (B,)."""
    return (keys(seed, name, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class SampleDraws:
    """The draws of one batch, whose samples stand at `positions` (B,) of the endless stream.

    Each kind of draw has a name of its own, so that adding one never changes another.
    """

    def __init__(self, seed: int, positions: Tensor, device: torch.device | str = "cpu"):
        self.seed = seed
        self.positions = positions.cpu().numpy()
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device)

    def uniform(self, name: str) -> Tensor:
        """(B,) float32 in [0, 1)."""
        draws = uniform_draws(self.seed, name, self.positions)
        # float32 rounds the largest float64 below one up to one: keep the interval half open.
        return torch.from_numpy(draws).float().clamp(max=1 - 2**-24).to(self.device, non_blocking=True)

    def normal(self, name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Standard normal float32 numbers of `shape` (B, ...)."""
        normals = torch.empty(tuple(shape), device=self.device)
        for row, key in zip(normals, keys(self.seed, name, self.positions), strict=True):
            row.normal_(generator=self.generator.manual_seed(int(key >> np.uint64(1))))
        return normals

    def seed_dropout(self) -> None:
        """Seeds torch's own generators, which dropout draws from, by the first sample of the batch: no two processes
        or micro-steps have the same masks, and a resumed run has those of the killed one. They alone depend on how the
        stream is cut.
        """
        torch.manual_seed(int(keys(self.seed, "dropout", self.positions[:1])[0] >> np.uint64(1)))

    def subset(self, name: str, size: int, count: int) -> Tensor:
        """`count` of the numbers 0 to `size` - 1, ascending: (B, count) int64, every choice as likely as any other."""
        with np.errstate(over="ignore"):  # each row is SplitMix64's stream from the sample's key on
            steps = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            lots = splitmix64(keys(self.seed, name, self.positions)[:, None] + steps)  # (B, size)
        lowest = np.argpartition(lots, count - 1, axis=1)[:, :count]  # (B, count)
        return torch.from_numpy(np.sort(lowest, axis=1)).to(self.device, non_blocking=True)


class StreamOrder:
    """Which row stands where in the endless stream: position p is the (p mod N)-th row of a permutation that is drawn
    anew for each epoch p // N.
    """

    def __init__(self, seed: int, num_rows: int):
        self.seed = seed
        self.num_rows = num_rows
        self.permutations: dict[int, np.ndarray] = {}

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of rows in `epoch`; the last two are kept, for batches that span two epochs."""
        if epoch not in self.permutations:
            self.permutations = {k: v for k, v in self.permutations.items() if k == epoch - 1}
            self.permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return self.permutations[epoch]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows (B,) at `positions` (B,)."""
        epochs, offsets = np.divmod(positions, self.num_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self.permutation(int(epoch))[offsets[epochs == epoch]]
        return rows


class PositionBatches(torch.utils.data.Sampler):
    """Positions of this process's micro-batches, for ever, from `first_step` on.

    The samples of one optimizer step are contiguous, so N processes or N accumulated micro-batches see the same ones
    as one batch N times as large.
    """

    def __init__(self, batch_size: int, micro_steps: int, first_step: int, process_index: int, num_processes: int):
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.first_micro_batch = first_step * micro_steps

    def __iter__(self):
        micro_batch = self.first_micro_batch
        while True:
            start = (micro_batch * self.num_processes + self.process_index) * self.batch_size
            yield list(range(start, start + self.batch_size))
            micro_batch += 1


@dataclass(frozen=True)
class PartReader:
    """One process among those that train, and its place among the readers of its part."""

    batch_size: int  # of a micro-batch of one process
    process_index: int
    num_processes: int
    part: int
    reader: int
    num_readers: int  # of each part

    def positions(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (B,) that are this process's by its number -> those of its reader in the stream of all, and those
        in the endless stream of its part. Both are the same whatever numbers the machines are given.
        """
        slots, places = np.divmod(positions, self.batch_size)
        micro_batches, processes = np.divmod(slots, self.num_processes)
        assert (processes == self.process_index).all()
        slots = micro_batches * self.num_processes + self.part * self.num_readers + self.reader
        in_part = micro_batches * self.num_readers + self.reader
        return slots * self.batch_size + places, in_part * self.batch_size + places


def identity(batch):
    """A collate function for a dataset that gives whole batches (a lambda could not be sent to workers)."""
    return batch
