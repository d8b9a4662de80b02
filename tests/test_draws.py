"""Random numbers by position: independent of how the stream is cut, and distributed as they say."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from utils.draws import PositionBatches, SampleDraws, StreamOrder, uniform_draws

NAMES = ["noise", "timestep", "condition_drop", "posterior", "noise_offset"]


@pytest.mark.parametrize("shape", [(4, 3, 3), (5,), (2, 40)])
def test_draws_do_not_depend_on_the_batch(shape):
    """A position's numbers are bit for bit the same alone, in any batch and in any order."""
    positions = torch.tensor([7, 0, 123_456_789_012, 3, 8])
    together = SampleDraws(5, positions)
    normals, uniforms = together.normal("noise", (5, *shape)), together.uniform("timestep")
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        for batch in (order[:2], order[2:]):
            draws = SampleDraws(5, positions[batch])
            assert torch.equal(draws.normal("noise", (len(batch), *shape)), normals[batch])
            assert torch.equal(draws.uniform("timestep"), uniforms[batch])
    for i in range(5):
        assert torch.equal(SampleDraws(5, positions[i : i + 1]).normal("noise", (1, *shape))[0], normals[i])


def test_draws_repeat_and_do_not_depend_on_other_draws():
    """The same (seed, name, position) gives the same numbers whatever was drawn before."""
    positions = torch.arange(4)
    draws = SampleDraws(0, positions)
    first = draws.normal("noise", (4, 6))
    draws.normal("posterior", (4, 6))
    draws.uniform("timestep")
    assert torch.equal(draws.normal("noise", (4, 6)), first)
    assert torch.equal(SampleDraws(0, positions).normal("noise", (4, 6)), first)


def test_draws_differ_between_seeds_names_and_positions():
    """No number comes twice over several seeds, names and positions."""
    normals, uniforms = [], []
    for seed, name in itertools.product([0, 1, 2, 1000, 2**40], NAMES):
        draws = SampleDraws(seed, torch.arange(200))
        normals.append(draws.normal(name, (200, 2))[:, 0].double().numpy())
        uniforms.append(uniform_draws(seed, name, np.arange(200)))
    assert len(np.unique(np.concatenate(uniforms))) == 5 * len(NAMES) * 200  # 53 bits: a collision is a fault
    duplicates = 5 * len(NAMES) * 200 - len(np.unique(np.concatenate(normals)))
    assert duplicates < 20  # 24 bits: a few come twice by chance


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_uniform_is_uniform(seed):
    """Uniform draws over consecutive positions pass Kolmogorov and Smirnov's test and lie in [0, 1)."""
    uniforms = SampleDraws(seed, torch.arange(20_000)).uniform("timestep").numpy()
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert uniforms.dtype == np.float32
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-3
    bits = (uniform_draws(seed, "timestep", np.arange(20_000)) * 2**53).astype(np.uint64)
    for bit in range(53):  # each bit is fair
        assert abs((bits >> np.uint64(bit) & np.uint64(1)).mean() - 0.5) < 5 * 0.5 / np.sqrt(20_000)


def test_uniform_is_below_one_in_float32(monkeypatch):
    """The largest float64 below 1, which float32 would round up to 1, stays below it."""
    monkeypatch.setattr("utils.draws.uniform_draws", lambda *_: np.array([np.nextafter(1, 0)]))
    assert SampleDraws(0, torch.tensor([0])).uniform("timestep").item() < 1


@pytest.mark.parametrize("seed", [0, 7])
def test_normals_are_normal(seed):
    """Normal draws pass Kolmogorov and Smirnov's test, over positions and within one."""
    over = SampleDraws(seed, torch.arange(5000)).normal("noise", (5000, 3))
    for column in over.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    within = SampleDraws(seed, torch.tensor([3])).normal("noise", (1, 4, 50, 50))
    assert stats.kstest(within.flatten().numpy(), "norm").pvalue > 1e-3


def test_draws_are_uncorrelated():
    """Numbers of neighbouring positions, of names, of seeds and of the elements of one draw do not correlate."""
    rows = 10_000
    limit = 5 / np.sqrt(rows)
    uniform_columns = [uniform_draws(seed, name, np.arange(rows)) for seed in (0, 1) for name in NAMES]
    for lag in (1, 2, 8, 64):
        uniform_columns.append(uniform_draws(0, NAMES[0], np.arange(lag, rows + lag)))
    correlation = np.corrcoef(uniform_columns)
    assert np.abs(correlation - np.eye(len(correlation))).max() < limit
    draws = SampleDraws(0, torch.arange(rows))
    columns = [*draws.normal("noise", (rows, 3)).T, *draws.normal("posterior", (rows, 3)).T]
    columns.append(torch.roll(columns[0], 1))
    columns.append(torch.special.ndtri(draws.uniform("noise").double().clamp(1e-6)).float())
    correlation = np.corrcoef(torch.stack(columns).numpy())
    assert np.abs(correlation - np.eye(len(correlation))).max() < limit


def test_global_random_state_is_left_alone():
    """Neither torch's nor NumPy's global generator moves, and neither decides what is drawn."""
    torch.manual_seed(0)
    np.random.seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = SampleDraws(3, torch.arange(8)).normal("noise", (8, 5))
    SampleDraws(3, torch.arange(8)).uniform("timestep")
    rows = StreamOrder(3, 10).rows(np.arange(25))
    next(iter(PositionBatches(4, 1, 0, 0, 1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(SampleDraws(3, torch.arange(8)).normal("noise", (8, 5)), first)
    assert np.array_equal(StreamOrder(3, 10).rows(np.arange(25)), rows)


def test_dropout_masks_belong_to_the_batch():
    """Two batches of a step have different ones, as two processes have; a batch that is drawn again has the same."""

    def mask(positions):
        SampleDraws(3, torch.tensor(positions)).seed_dropout()
        return torch.nn.functional.dropout(torch.ones(4, 100)) > 0

    first, other = mask([0, 1, 2, 3]), mask([4, 5, 6, 7])
    assert torch.equal(mask([0, 1, 2, 3]), first)
    assert 0.4 < (first == other).float().mean() < 0.6
    assert 0.4 < (first[0] == first[1]).float().mean() < 0.6


# Which positions a process reads


def positions_of_steps(batch_size, micro_steps, processes, steps, first_step=0):
    """For each optimizer step the positions of all processes and micro-steps."""
    samplers = [
        iter(PositionBatches(batch_size, micro_steps, first_step, index, processes)) for index in range(processes)
    ]
    return [[p for sampler in samplers for _ in range(micro_steps) for p in next(sampler)] for _ in range(steps)]


@pytest.mark.parametrize(
    ("batch_size", "micro_steps", "processes"), [(8, 1, 1), (4, 1, 2), (4, 2, 1), (2, 2, 2), (1, 4, 2)]
)
def test_a_step_sees_the_same_samples_however_it_is_cut(batch_size, micro_steps, processes):
    """Step k sees positions 8 k to 8 k + 7, each once, for any division into processes and micro-steps."""
    for step, positions in enumerate(positions_of_steps(batch_size, micro_steps, processes, steps=5)):
        assert sorted(positions) == list(range(8 * step, 8 * step + 8))


@pytest.mark.parametrize(("batch_size", "micro_steps", "processes"), [(3, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("first_step", [1, 4, 1000])
def test_first_step_equals_skipping(first_step, batch_size, micro_steps, processes):
    """Starting at step k gives, process by process, what is left after k steps from the start."""
    for index in range(processes):
        skipped = itertools.islice(
            PositionBatches(batch_size, micro_steps, 0, index, processes), first_step * micro_steps, None
        )
        resumed = iter(PositionBatches(batch_size, micro_steps, first_step, index, processes))
        for _ in range(5):
            assert next(resumed) == next(skipped)


# Which row stands at a position


def test_each_epoch_is_a_permutation():
    """Every row stands once in every epoch, in another order for each epoch and seed."""
    orders = {}
    for seed in (0, 1):
        order = StreamOrder(seed, 50)
        for epoch in range(4):
            rows = order.rows(np.arange(50 * epoch, 50 * epoch + 50))
            assert sorted(rows) == list(range(50))
            orders[seed, epoch] = tuple(rows)
    assert len(set(orders.values())) == 8
    assert orders[0, 0][:3] != (0, 1, 2)  # shuffled at all


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_batches_that_span_epochs(num_rows):
    """A batch across one or several epochs has the rows of single look-ups, whatever was asked for before."""
    reference = [int(StreamOrder(4, num_rows).rows(np.array([position]))[0]) for position in range(40)]
    for size in (2, 5, 20, 40):
        order = StreamOrder(4, num_rows)
        batches = [order.rows(np.arange(start, min(start + size, 40))) for start in range(0, 40, size)]
        assert np.concatenate(batches).tolist() == reference
    order = StreamOrder(4, num_rows)
    jumps = np.array([39, 0, 20, 1, 38])
    assert order.rows(jumps).tolist() == [reference[position] for position in jumps]
    assert order.rows(np.array([0])).tolist() == reference[:1]  # back, after later epochs


def test_positions_do_not_repeat_pairs_of_neighbours():
    """Orders of epochs are independent: as many rows keep their place as in random permutations (one on average)."""
    order = StreamOrder(0, 200)
    epochs = order.rows(np.arange(200 * 60)).reshape(60, 200)
    fixed = (epochs[1:] == epochs[:-1]).sum(axis=1)
    assert fixed.mean() == pytest.approx(1.0, abs=0.6)
