"""Processes that compare crystals: what hangs, fails or dies costs one pair and no other."""

import threading
import time

import numpy as np
import pytest

from tests.support.known_crystals import GARBAGE, NACL, NACL_IN_CSCL, ONE, SRTIO3, cubes
from utils.crystal import matching as metrics_structures
from utils.crystal import workers
from utils.crystal.matching import match_pairs, novel, unique
from utils.crystal.structure import Crystal

PLANTED = """
import os, signal, sys, time

def planted(a, b):
    assert "torch" not in sys.modules
    if a.atomic_numbers[0] == 1:
        time.sleep(60)
    if a.atomic_numbers[0] == 2:  # as a loop in C: deaf to the alarm
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)
    if a.atomic_numbers[0] == 3:
        raise ValueError
    if a.atomic_numbers[0] == 4:
        os._exit(1)
    return float(a.atomic_numbers[0])
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted_matcher.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "GRACE_S", 1.0)
    import planted_matcher

    return planted_matcher.planted


def atom(number: int) -> Crystal:
    return Crystal(np.array([number]), ONE, 4 * np.eye(3))


def test_what_hangs_fails_or_dies_costs_one_pair_and_no_other(planted) -> None:
    numbers = list(range(10, 70))
    numbers[7], numbers[20], numbers[30], numbers[40] = 1, 2, 3, 4
    started = time.monotonic()
    found = match_pairs([(atom(number), NACL) for number in numbers], 2, 1.0, planted)
    assert time.monotonic() - started < 55  # one that hangs takes 60
    assert found.rmsds == [None if number < 5 else number for number in numbers]
    assert (found.num_timed_out, found.num_failed) == (2, 2)


def test_a_few_pairs_are_timed_in_this_process(tmp_path, monkeypatch) -> None:
    import signal

    def slow(a: Crystal, b: Crystal) -> float:
        if a is NACL:
            time.sleep(30)
        if a is SRTIO3:
            raise ValueError
        return 1.0

    before = signal.getsignal(signal.SIGALRM)
    found = match_pairs([(NACL_IN_CSCL, NACL), (NACL, NACL), (SRTIO3, NACL), (NACL_IN_CSCL, NACL)], 4, 1.0, slow)
    assert found == ([1.0, None, None, 1.0], 1, 1)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(match_pairs([(NACL, NACL)])))
    thread.start()
    thread.join()
    assert elsewhere[0].rmsds == [pytest.approx(0, abs=1e-5)]


def test_processes_find_what_this_process_finds() -> None:
    crystals = [*cubes(60), NACL, GARBAGE["flat"]]
    pairs = [(crystals[0], each) for each in crystals]
    here, there = match_pairs(pairs), match_pairs(pairs, 2)
    assert here == there
    assert sum(rmsd is None for rmsd in here.rmsds) == 2
    assert unique(crystals, 2).sum() == 3
    assert novel(crystals, cubes(1), 2).sum() == 2


def test_pairs_that_had_no_time_are_different_and_warned_about(monkeypatch, caplog) -> None:
    def hang(a: Crystal, b: Crystal) -> bool:
        time.sleep(30)
        return True

    monkeypatch.setattr(metrics_structures, "is_match", hang)
    assert unique([NACL, NACL], timeout_s=0.1).all()
    assert "1 pairs of structures took over 0.1 s" in caplog.text
