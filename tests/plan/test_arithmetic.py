"""The arithmetic of a plan in closed form, and the tables of the page on scale."""

import importlib
import math
import sys

import numpy as np
import pytest

from tests.support.plan import pace
from tests.support.processes import ROOT
from utils.errors import UserError
from utils.latents.writer import ShardFolder, caption_features, latent_features
from utils.plan import arithmetic as planning
from utils.plan.arithmetic import Overheads, Pace

# ---- the arithmetic of a plan


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 100, 128])
def test_largest_that_fits(limit):
    for largest in range(limit + 3):
        tried: list[int] = []
        found = planning.largest_that_fits(lambda size, n=largest, tried=tried: tried.append(size) or size <= n, limit)
        assert found == min(largest, limit)
        assert max(tried) <= limit
        assert len(tried) <= 2 * math.log2(limit) + 2
        assert len(set(tried)) == len(tried)


def test_quickest_that_fits():
    """0.1 s and 0.01 s a sample up to 8, 0.02 s a sample above: 8 is the best, and 32 is not tried."""
    tried = []

    def pace_of(size):
        tried.append(size)
        return pace(0.1 + (0.01 if size <= 8 else 0.05) * size)

    assert planning.quickest_that_fits(pace_of, 64, 64, math.inf) == 8
    assert tried == [1, 2, 4, 8, 16]


def test_a_size_that_would_not_fit_is_not_tried():
    """1 GB and 1 GB a sample in 10 GB: after 4 samples, 5 GB, come 9; 16 would take 17 and end the process."""
    tried = []

    def pace_of(size):
        tried.append(size)
        return pace(1.0, 1e9 + size * 1e9)

    assert planning.find_micro_batch(pace_of, 64, 64, 10e9, by_memory=False) == 8
    assert tried == [1, 2, 4, 8]


def test_micro_batch_by_memory():
    def pace_of(size):
        return None if size > 40 else pace(1.0, size * 1e9)  # None: out of memory

    assert planning.find_micro_batch(pace_of, 256, 256, 100e9, by_memory=True) == 40
    assert planning.find_micro_batch(pace_of, 256, 256, 23.5e9, by_memory=True) == 23
    assert planning.find_micro_batch(pace_of, 8, 256, 100e9, by_memory=True) == 8
    with pytest.raises(UserError, match=r"does not fit in 500 MB.*--gradient_checkpointing"):
        planning.find_micro_batch(pace_of, 256, 256, 0.5e9, by_memory=True)


@pytest.mark.parametrize(
    ("effective", "largest", "expected"),
    [(256, 256, (256, 1)), (256, 300, (256, 1)), (256, 255, (128, 2)), (256, 40, (32, 8)), (256, 23, (16, 16)), (1, 9, (1, 1)), (96, 23, (16, 6)), (97, 10, (10, 10)), (254, 100, (85, 3))],
)  # fmt: skip
def test_settle_batch(effective, largest, expected):
    """Exact where a divisor is at least half of what fits; otherwise the nearest, here 100 for 97 and 255 for 254."""
    assert planning.settle_batch(effective, largest) == expected


def test_pace_of_accumulated_steps():
    """Two micro-steps were measured in 4 s and an update in 1: eight take 16 + 1."""
    measured = Pace.of_step({"forward + backward": 3.0, "other": 1.0, "optimizer": 0.75, "EMA": 0.25}, 2, 5)
    assert measured.step_seconds(8) == 17
    assert measured.stages(8) == {"forward + backward": 12, "other": 4, "optimizer": 0.75, "EMA": 0.25}


def test_planned_steps():
    assert planning.planned_steps(1, 2.0, Overheads(), 1000, 1000) == 1800
    # 3600 s less 60 at the start, 20 for the last checkpoint and 40 for the last validation; 0.9 s a step, 0.02 and 0.08
    assert planning.planned_steps(1, 0.9, Overheads(60, 20, 40), 1000, 500) == 3480
    with pytest.raises(UserError, match=r"--hours 0\.01"):
        planning.planned_steps(0.01, 40.0, Overheads(), 1000, 1000)


def test_planned_steps_take_the_hours_when_they_are_run_through():
    """Against a run that is simulated step by step: it ends in time, and one checkpoint interval more would not."""
    overheads, seconds, every = Overheads(30, 11.0, 47.0), 0.37, (250, 400)
    steps = planning.planned_steps(3, seconds, overheads, *every)

    def duration(steps: int) -> float:
        time = overheads.once
        for done in range(1, steps + 1):
            time += seconds
            time += overheads.checkpoint * (done % every[0] == 0 or done == steps)
            time += overheads.validation * (done % every[1] == 0 or done == steps)
        return time

    assert duration(steps) <= 3 * 3600 < duration(steps + 400)


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("content", ["hidden_states", "input_ids", None])
def test_cache_bytes_are_those_on_disk(tmp_path, flips, content):
    rows, shape, states = 600, (4, 8, 8), (77, 16)
    latents = ShardFolder(
        tmp_path / "latents", latent_features(2 * math.prod(shape), flips, True, content is not None)
    )
    columns = {"row": list(range(rows)), "latents": np.zeros((rows, 2, *shape), np.float16), "label": [0] * rows}
    columns |= {"latents_flipped": columns["latents"], "caption": [["x" * 40]] * rows, "caption_id": [[1]] * rows}
    latents.write(0, columns, {})
    if content:
        length = math.prod(states) if content == "hidden_states" else states[0]
        values = np.zeros((rows, length), np.float16 if content == "hidden_states" else np.int32)
        columns = {"caption_id": [1] * rows, "caption": ["x" * 40] * rows, "num_tokens": [2] * rows, content: values}
        ShardFolder(tmp_path / "captions", caption_features(content, length)).write(0, columns, {})
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    expected = planning.cache_bytes(
        rows, shape, moments=True, flips=flips, labels=True, num_captions=rows if content else 0,
        states_shape=states if content == "hidden_states" else None, caption_bytes=40,
    )  # fmt: skip
    assert written == pytest.approx(expected, rel=0.01)


def test_readable():
    values = {0: "0 B", 999: "999 B", 16400: "16.4 KB", 5e9: "5 GB", 3.2e15: "3.2 PB"}
    assert {value: planning.readable(value) for value in values} == values


# ---- docs/scale.md


@pytest.fixture(scope="module")
def scale():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("scale")
    finally:
        sys.path.pop(0)


def test_the_tables_of_the_page_on_scale(scale):
    page = (ROOT / "docs" / "scale.md").read_text()
    gpu = scale.Gpu(209.5, 0.35, 1.0)
    for table in (scale.work_table(), scale.images_table(gpu), scale.week_table(gpu)):
        assert table in page


def test_hours_and_epochs_of_the_page_on_scale(scale):
    """A GPU that does 3.6 PFLOP an hour: 1 TFLOP/s, all of it used."""
    gpu = scale.Gpu(1.0, 1.0, 2.0)
    assert gpu.hours(7.2e15) == 2.0
    image, caption = scale.encoder_flops()
    work = scale.training_flops()["unet base"]
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in scale.images_table(gpu).splitlines()
    )
    few, million = (dict(zip(head, row, strict=True)) for row in rows[:2])
    assert few["encoding, h"] == scale.number(1e5 * (image + caption) / 3.6e15)  # states are cached
    assert few["one epoch, h"] == scale.number(1e5 * work / 3.6e15)
    assert million["encoding, h"] == scale.number(1e6 * image / 3.6e15)
    assert million["one epoch, h"] == scale.number(1e6 * (work + caption) / 3.6e15)  # captions are encoded in the loop
    assert million["both, cost"] == scale.number(2 * 1e6 * (image + work + caption) / 3.6e15)
    assert million["latents"] == "16.4 GB"  # 1e6 x (2 x 2 x 4096 + 8) bytes


def test_encoders_of_the_page_on_scale(scale):
    """CLIP-L's text tower has 85.0M weights in linear layers, used for 77 tokens, and attention over them."""
    _, caption = scale.encoder_flops()
    linear = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert caption == 77 * 2 * linear + 12 * 2 * 2 * 77**2 * 768
