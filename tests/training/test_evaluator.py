"""What is best so far, and when to stop."""

import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.control import make_control
from utils.errors import UserError
from utils.plan import instruments as measuring
from utils.plan.arithmetic import Overheads, planned_steps
from utils.training import evaluator as evaluation
from utils.training.evaluator import EvaluationSettings, Evaluator, without_improvement
from utils.training.held_out import hold_out
from utils.training.run import Run


def test_without_improvement():
    nan, inf = math.nan, math.inf
    for values, min_delta, expected in (
        ([], 0, 0), ([3], 0, 0), ([3, 3], 0, 1), ([3, 2, 4, 5], 0, 2), ([3, 4, 2], 0, 0), ([nan, nan], 0, 2),
        ([3, nan, 2.9], 0, 0), ([3, 2.95, 2.9, 2.85], 0.1, 0), ([3, 2.95, 2.91], 0.1, 2), ([inf, 3], 0, 0),
    ):  # fmt: skip
        assert without_improvement(values, min_delta) == expected, (values, min_delta)


@pytest.fixture
def rigged(accelerator, opened, flow, monkeypatch, tmp_path):
    """(make(first_step, **settings), evaluate(evaluator, {step: loss})): an Evaluator whose losses are given."""
    losses: dict[int, float] = {}
    monkeypatch.setattr(evaluation, "validation_losses", lambda *_, **__: [losses["now"]] * 4)

    def write_model(folder, model, step):
        folder.mkdir()
        save_file({"step": torch.tensor(step)}, folder / "model.safetensors")

    def make(first_step=0, sample_metric=None, **settings):
        return Evaluator(
            Run(accelerator, tmp_path),
            held_out=hold_out(opened, 4),
            objective=flow,
            write_model=write_model,
            first_step=first_step,
            settings=EvaluationSettings(batch_size=4, **settings),
            sample_metric=sample_metric,
        )

    def evaluate(evaluator, given):
        for step, loss in given.items():
            losses["now"] = loss
            evaluator.evaluate(None, step)

    return make, evaluate


def best_step(folder) -> int:
    step = int(load_file(folder / "best" / "model.safetensors")["step"])
    assert json.loads((folder / "best" / "evaluation.json").read_text())["global_step"] == step
    return step


def checkpoint(folder, step) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "manifest.json").write_text("{}")


def test_best_of_a_past_that_is_given_up(rigged, tmp_path):
    make, evaluate = rigged
    evaluator = make()
    evaluate(evaluator, {1: 5.0, 2: 3.0, 3: 4.0})
    assert best_step(tmp_path) == 2
    checkpoint(tmp_path, 3)
    evaluate(evaluator, {4: 2.0, 5: math.nan, 6: 1.0})
    checkpoint(tmp_path, 6)
    assert best_step(tmp_path) == 6
    assert {path.name for path in tmp_path.glob(".best-*")} == {".best-2"}
    evaluator = make(first_step=3)  # evaluations 4 to 6 never were
    assert best_step(tmp_path) == 2
    assert [each["global_step"] for each in evaluator.history] == [1, 2, 3]
    evaluate(evaluator, {4: 3.5})
    assert best_step(tmp_path) == 2
    evaluate(evaluator, {5: 2.5})
    assert best_step(tmp_path) == 5
    make(first_step=1)  # what was the best then is gone: none is better than another one's
    assert not (tmp_path / "best").exists()
    evaluate(make(first_step=1), {2: 6.0, 3: 5.5})
    assert best_step(tmp_path) == 2


def test_what_was_best_goes_with_the_checkpoints(rigged, tmp_path):
    make, evaluate = rigged
    evaluator = make()
    for step in range(1, 7):
        evaluate(evaluator, {step: 10.0 - step})
        checkpoint(tmp_path, step)
        if step > 2:
            (tmp_path / f"checkpoint-{step - 2}" / "manifest.json").unlink()
    assert best_step(tmp_path) == 6
    assert {path.name for path in tmp_path.glob(".best-*")} == {".best-4", ".best-5"}


def test_patience_fires_when_it_should(rigged):
    make, evaluate = rigged
    evaluator = make(patience=2)
    for step, (loss, ends) in enumerate([(3.0, False), (3.5, False), (2.9, False), (2.9, False), (2.9, True)]):
        evaluate(evaluator, {step: loss})
        assert (evaluator.reason_to_end is not None) == ends
    assert make(first_step=3, patience=2).reason_to_end is None
    evaluator = make(first_step=2, patience=1)
    evaluate(evaluator, {3: math.nan})
    assert "2.9, is of step 2" in evaluator.reason_to_end
    assert make(first_step=3).reason_to_end is None


def test_a_metric_of_samples_decides(rigged, tmp_path):
    make, evaluate = rigged
    values = iter([2.0, 1.0, 3.0])

    class Samples:
        key, title, identity = "validation/kid_x", "X", "x"

        def __call__(self, model):
            return next(values)

    evaluator = make(best_metric="samples", sample_metric=Samples(), patience=1)
    evaluate(evaluator, {1: 1.0, 2: 2.0})
    assert best_step(tmp_path) == 2
    assert evaluator.reason_to_end is None
    evaluate(evaluator, {3: 0.5})
    assert "validation/kid_x" in evaluator.reason_to_end
    evaluator = make(first_step=3)  # now by the loss, whose best was not kept
    assert not (tmp_path / "best").exists()
    evaluate(evaluator, {4: 0.6})
    assert best_step(tmp_path) == 4
    Samples.identity = "y"
    with pytest.raises(UserError, match=r"validation/kid_x in .* was measured on x, "):
        make(first_step=4, best_metric="samples", sample_metric=Samples())


def test_hours_leave_time_for_evaluations(clock, tmp_path):
    """One of 40 s after every seventh step of 10 s, and one after the last."""
    started = clock.now
    control = make_control(
        tmp_path, max_train_steps=None, max_train_hours=0.5, max_nonfinite_steps=20, first_step=0, is_resumed=False
    )
    for global_step in control.steps():
        clock.now += 10
        control.may_step(torch.tensor(1.0), torch.tensor(1.0))
        if (global_step + 1) % 7 == 0 or control.is_finished:
            clock.now += 40
    assert 1800 - 10 - 2 * 40 < clock.now - started <= 1800


def test_an_early_end_is_an_ordinary_one(clock, tmp_path, caplog):
    control = make_control(
        tmp_path, max_train_steps=9, max_train_hours=None, max_nonfinite_steps=20, first_step=0, is_resumed=False
    )
    caplog.set_level("INFO")
    for global_step in control.steps():
        control.may_step(torch.tensor(1.0), torch.tensor(1.0))
        control.end_early("no use" if global_step == 3 else None)
        assert control.is_last == control.is_finished == (global_step == 3)
    control.say_how_it_ended()
    assert control.steps_done == 4
    assert "ended after step 4: no use" in caplog.text


def test_planned_steps_leave_time_for_evaluations():
    overheads = Overheads(evaluation=100.0)
    assert planned_steps(1, 1.0, overheads, 1000, 1000) == 3500
    assert planned_steps(1, 1.0, overheads, 1000, 1000, eval_steps=100) == 1750


def test_seconds_of_an_evaluation(monkeypatch):
    """100 latents in 4 batches, each at 4 timesteps, and 50 samples in 2 batches of 10 steps."""
    monkeypatch.setattr(measuring, "seconds_of", lambda *_: 1.0)
    cache = measuring.SyntheticCache(measuring.synthetic_spec((4, 4, 4), "mean", 3, (7, 8), "hidden_states"))
    count = partial(measuring.evaluation_seconds, torch.nn.Identity(), cache)
    assert count(100, 50, 32, 10, 2.0, torch.device("cpu")) == 4 * 4 + 2 * 10
    assert count(0, 0, 32, 10, 2.0, torch.device("cpu")) == 0
