"""Processes that compare crystals: what hangs, fails or dies costs one pair and no other."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from tests.support.crystals.known import GARBAGE, NACL, ONE, cubes
from tests.support.crystals.planted_matcher import hangs, planted
from tests.support.processes import ROOT
from utils.crystal import matching as metrics_structures
from utils.crystal import workers
from utils.crystal.matching import match_pairs, match_rmsd, novel, unique
from utils.crystal.structure import Crystal


def atom(number: int) -> Crystal:
    return Crystal(np.array([number]), ONE, 4 * np.eye(3))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_hangs_fails_or_dies_costs_one_pair_and_no_other(num_processes) -> None:
    numbers = list(range(10, 70))
    numbers[7], numbers[20], numbers[30], numbers[40] = 1, 2, 3, 4
    started = time.monotonic()
    found = match_pairs([(atom(number), NACL) for number in numbers], num_processes, 1.0, planted)
    assert time.monotonic() - started < 55  # one that hangs takes 60
    assert found.rmsds == [None if number < 5 else number for number in numbers]
    assert (found.num_timed_out, found.num_failed) == (2, 2)


def test_from_a_thread_and_after_the_idle_processes_were_killed() -> None:
    """The same processes serve every call, and new ones where somebody killed them in between."""
    assert match_pairs([(NACL, NACL)]).rmsds == [pytest.approx(0, abs=1e-5)]
    [(_, idle)] = workers.outcomes(os.getpid, [()], 1, 30.0)
    pool = workers.lasting_pool(1)
    os.kill(idle, signal.SIGKILL)
    time.sleep(0.5)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(match_pairs([(NACL, NACL)])))
    thread.start()
    thread.join()
    assert elsewhere[0].rmsds == [pytest.approx(0, abs=1e-5)]
    assert workers.lasting_pool(1) is not pool


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


SCRIPT = """
import sys

import torch

from tests.support.crystals.planted_matcher import says_who
from utils.crystal.workers import outcomes

assert __name__ == "__main__"  # no process runs this again
print(outcomes(says_who, [(sys.argv[1], 0.0)] * 2, 2, 30.0), flush=True)
outcomes(says_who, [(sys.argv[1], 600.0)], 2, 900.0)
"""


def test_a_script_needs_no_guard_and_leaves_no_process_when_it_is_killed(tmp_path) -> None:
    """Neither those in the middle of a task nor those that wait for one."""
    script, folder = tmp_path / "script.py", tmp_path / "processes"
    script.write_text(SCRIPT)
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, script, folder], stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "[('done', None), ('done', None)]\n"
        time.sleep(1.0)
        running.kill()
    pids = [int(path.name) for path in folder.iterdir()]
    until = time.monotonic() + 20
    while any(runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.2)
    assert pids
    assert not any(runs(pid) for pid in pids)


def test_processes_find_what_this_process_finds() -> None:
    crystals = [*cubes(60), NACL, GARBAGE["flat"]]
    pairs = [(crystals[0], each) for each in crystals]
    here = [match_rmsd(*pair) for pair in pairs]
    assert match_pairs(pairs, 2) == (here, 0, 0)
    assert here.count(None) == 2
    assert unique(crystals, 2).sum() == 3
    assert novel(crystals, cubes(1), 2).sum() == 2


def test_pairs_that_had_no_time_are_different_and_warned_about(monkeypatch, caplog) -> None:
    monkeypatch.setattr(metrics_structures, "is_match", hangs)
    assert unique([NACL, NACL], timeout_s=0.1).all()
    assert "1 pairs of structures took over 0.1 s" in caplog.text
