"""What tests of training share."""

import signal

import pytest

from tests.support.control import Clock
from utils.training import control as run_control


@pytest.fixture
def clock(monkeypatch):
    kept = {number: signal.getsignal(number) for number in run_control.SIGNALS}
    yield Clock(monkeypatch)
    for number, handler in kept.items():
        signal.signal(number, handler)
