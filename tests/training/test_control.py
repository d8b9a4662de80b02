"""When a training ends, by a clock that tests set."""

import json
import math
import signal

import pytest
import torch

from tests.support.control import Clock, make_control
from utils.errors import UserError
from utils.training import control as run_control
from utils.training.optimizers import LearningRate

# ---- hours ----------------------------------------------------------------------------------------------------------


def trained_steps(clock, folder, hours, steps=None, resumed=False, first_step=0) -> list[tuple[float, float]]:
    """(share of time at the start, time at the end) of each step: 10 s, the first 60 s, and every tenth with 30 s for
    a checkpoint."""
    control = make_control(
        folder,
        max_train_steps=steps,
        max_train_hours=hours,
        max_nonfinite_steps=20,
        first_step=first_step,
        is_resumed=resumed,
    )
    done = []
    for global_step in control.steps():
        share = control.time_share
        clock.now += 60 if global_step == first_step else 10
        assert control.may_step(torch.tensor(1.0), torch.tensor(1.0))
        if (global_step + 1) % 10 == 0 or control.is_last:
            clock.now += 30
        done.append((share, clock.now))
    control.say_how_it_ended()
    assert control.steps_done == first_step + len(done)
    return done


def test_hours_end_a_run_on_time(clock, tmp_path):
    """With its last checkpoint, and not more than one step and two checkpoints early: this step might end with one."""
    started = clock.now
    done = trained_steps(clock, tmp_path, hours=0.5)
    assert 1800 - 10 - 2 * 30 < done[-1][1] - started <= 1800
    shares = [share for share, _ in done]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.94 < shares[-1] <= 1


def test_steps_end_a_run_that_has_hours_left(clock, tmp_path):
    assert len(trained_steps(clock, tmp_path, hours=0.5, steps=7)) == 7


def test_hours_count_over_all_resumes(clock, tmp_path, monkeypatch):
    first = trained_steps(clock, tmp_path, hours=0.25)
    assert first[-1][1] - 1000 > 900 - 71
    assert json.loads((tmp_path / "elapsed.json").read_text())["seconds"] == 900  # what was kept free is spent too
    clock.now += 99_999  # a pause costs nothing
    again = Clock(monkeypatch)
    again.now = clock.now
    process = type("Process", (), {"create_time": lambda _, started=clock.now: started})
    monkeypatch.setattr(run_control.psutil, "Process", process)
    second = trained_steps(again, tmp_path, hours=0.5, resumed=True, first_step=len(first))
    assert 900 + second[-1][1] - clock.now == pytest.approx(1800, abs=71)
    assert trained_steps(again, tmp_path, hours=0.5, resumed=True, first_step=len(first)) == []  # all is spent


def test_schedule_follows_the_clock():
    """The decay starts when four fifths of the hours are spent and ends with them; the warm-up counts steps."""

    def rate(step, share, max_train_steps=None):
        return LearningRate(1.0, "constant_with_decay", 10, max_train_steps).at(step, share)

    assert rate(4, 0.9) == pytest.approx(0.5)
    assert rate(500, 0.5) == 1
    assert rate(500, 0.8) == pytest.approx(1)
    assert rate(500, 0.9) == pytest.approx(0.5)
    assert rate(500, 1.0) == 0
    assert rate(505, 0.1, max_train_steps=510) == pytest.approx(5 / 500 / 0.2)  # steps lead where they end first


# ---- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_ends_the_run_after_its_step_and_its_echo_is_ignored(clock, tmp_path):
    control = make_control(
        tmp_path, max_train_steps=5, max_train_hours=None, max_nonfinite_steps=20, first_step=0, is_resumed=False
    )
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert control.may_step(torch.tensor(1.0), torch.tensor(1.0))
    assert control.is_last
    assert control.interrupted
    assert not control.is_finished


def test_a_second_signal_ends_the_process(clock, tmp_path, monkeypatch):
    control = make_control(
        tmp_path, max_train_steps=5, max_train_hours=None, max_nonfinite_steps=20, first_step=0, is_resumed=False
    )
    signal.raise_signal(signal.SIGTERM)
    control.received_at -= 6
    raised = []
    monkeypatch.setattr(run_control.signal, "raise_signal", raised.append)
    control._receive(signal.SIGTERM, None)
    assert raised == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("grad_norm", [torch.tensor(1.0), None])
def test_steps_in_a_row_are_counted(clock, tmp_path, grad_norm):
    control = make_control(
        tmp_path, max_train_steps=50, max_train_hours=None, max_nonfinite_steps=2, first_step=0, is_resumed=False
    )
    assert not control.may_step(torch.tensor(math.nan), grad_norm)
    assert control.may_step(torch.tensor(1.0), grad_norm)
    assert not control.may_step(torch.tensor(math.inf), grad_norm)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        control.may_step(torch.tensor(1.0), torch.tensor(math.nan))
