"""Processes that match structures and can be killed: some pairs take pymatgen hours."""

import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from utils.crystal.structure import crystal_package
from utils.errors import UserError

TOLERANCES = {"stol": 0.5, "angle_tol": 10, "ltol": 0.3}  # CDVAE's, and of those who compare with it
GRACE_S = 5.0  # from the alarm, which a loop in C does not hear, to the kill
START_TIMEOUT_S = 300.0
MIN_TASKS = 50  # fewer are done before a process has started, which takes a second
DONE, TIMED_OUT, FAILED = "done", "timed out", "failed"
Outcome = tuple[str, Any]  # one of these three, and what the function returned


# ---- two structures


@lru_cache(maxsize=1)
def structure_matcher() -> Any:
    """pymatgen's, with the field's tolerances."""
    return crystal_package("pymatgen.analysis.structure_matcher").StructureMatcher(**TOLERANCES)


# ---- many comparisons, each in its time, in processes


class AlarmRang(BaseException):
    """The time of a comparison is over. No Exception, for libraries catch those."""


def ring(*of_signal: Any) -> None:
    raise AlarmRang


def attempt(function: Callable, arguments: Sequence, timeout_s: float) -> Outcome:
    """Calls a function for at most `timeout_s` seconds; its exceptions, but UserError, are an outcome. Outside of the
    main thread there is no alarm.
    """
    alarm = threading.current_thread() is threading.main_thread()
    try:
        if alarm:
            before = signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, timeout_s, 1.0)  # and again each second: a bare except swallows one
        return DONE, function(*arguments)
    except AlarmRang:
        return TIMED_OUT, None
    except UserError:
        raise
    except Exception:  # the matcher raises many kinds for odd cells; the field counts them as no match
        return FAILED, None
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def serve() -> None:
    """The life of a process: says that it is there, then answers tasks until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    warnings.simplefilter("ignore")
    connection = Connection(int(sys.argv[1]))
    structure_matcher()  # its imports take a second, which is no part of the first task's time
    connection.send((DONE, None))
    with suppress(EOFError):
        while True:
            connection.send(attempt(*connection.recv()))


class Worker:
    """One process, at one task at a time: its own interpreter, neither a fork nor the script again."""

    def __init__(self) -> None:
        """Raises RuntimeError if it does not start."""
        own, other = socket.socketpair()
        paths = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from utils.crystal.workers import serve; serve()", str(other.fileno())],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        other.close()
        self.connection = Connection(own.detach())
        if self.answer(START_TIMEOUT_S)[0] != DONE:
            raise RuntimeError(f"a process that matches structures did not start in {START_TIMEOUT_S:g} s, or died")

    def answer(self, timeout_s: float) -> Outcome:
        """What it says. A process that says nothing in its time, or died, is stopped."""
        try:
            if self.connection.poll(timeout_s):
                return self.connection.recv()
            outcome = TIMED_OUT
        except (EOFError, ConnectionError):
            outcome = FAILED
        self.stop()
        return outcome, None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Workers:
    """Processes that compare, started when there is enough to do; with `num_processes` 1, none: all is done here."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self.idle = deque[Worker | None]([None] * num_processes)  # None: one that is still to be started, or again

    def close(self) -> None:
        while self.idle:
            if worker := self.idle.pop():
                worker.stop()

    def call(self, function: Callable, arguments: Sequence, timeout_s: float) -> Outcome:
        """`attempt` in one of the processes."""
        worker = self.idle.pop()
        try:
            worker = worker or Worker()
            worker.connection.send((function, arguments, timeout_s))
            return worker.answer(timeout_s + GRACE_S)
        finally:
            self.idle.append(worker if worker and not worker.connection.closed else None)

    def map(self, function: Callable, tasks: Sequence[Sequence], timeout_s: float) -> list[Outcome]:
        """The outcome of a function, one of a module, for each tuple of arguments."""
        structure_matcher()  # says here, and not in a process, that a package is missing
        if self.num_processes <= 1 or len(tasks) < MIN_TASKS:
            return [attempt(function, arguments, timeout_s) for arguments in tasks]
        with ThreadPoolExecutor(self.num_processes) as threads:  # each waits for one process
            return list(threads.map(lambda arguments: self.call(function, arguments, timeout_s), tasks))
