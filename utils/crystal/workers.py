"""Processes that work on crystals, each task within its time: some pairs of structures take pymatgen hours.

Processes start from a fresh interpreter by loky, which neither forks (CUDA forbids it) nor runs the script again; they
import the module of the task and not the script, so torch must not be found there. pebble hands tasks out and kills
what takes too long.
"""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as TimedOut
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.util import Finalize
from typing import Any

from utils.crystal.structure import crystal_package
from utils.errors import UserError

DONE, TIMED_OUT, FAILED = "done", "timed out", "failed"
Outcome = tuple[str, Any]  # one of these three, and what the function returned


def start(parent: int, module: str) -> None:
    """The first thing that a process does. `module` takes a second to import, which is no part of a task's time."""
    warnings.simplefilter("ignore")
    crystal_package("threadpoolctl").threadpool_limits(1)
    crystal_package(module)
    threading.Thread(target=leave_with, args=[parent], daemon=True).start()


def leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, in the middle of a task too."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def make_pool(num_processes: int, module: str) -> Any:
    """A `pebble.ProcessPool`, whose processes import a module of requirements-crystal.txt first."""
    crystal_package(module.partition(".")[0])  # says here, and not in a process, that a package is missing
    context = crystal_package("loky.backend").get_context("loky")
    arguments = (os.getpid(), module)
    return crystal_package("pebble").ProcessPool(num_processes, initializer=start, initargs=arguments, context=context)


@contextmanager
def process_pool(num_processes: int, module: str) -> Iterator[Any]:
    """`make_pool`, stopped at the end, whatever is left to do."""
    pool = make_pool(num_processes, module)
    try:
        yield pool
    finally:
        stop(pool)


def stop(pool: Any) -> None:
    pool.stop()
    pool.join()


@lru_cache
def lasting_pool(num_processes: int) -> Any:
    """Processes that compare structures, kept for the next comparison; they end with this process."""
    pool = make_pool(num_processes, "pymatgen.analysis.structure_matcher")
    Finalize(pool, stop, [pool], exitpriority=1)  # before a process of multiprocessing waits for those it started
    return pool


def attempt(function: Callable, arguments: Sequence) -> Outcome:
    """Calls a function. Its exceptions, but UserError, are an outcome: many cannot be sent between processes."""
    try:
        return DONE, function(*arguments)
    except UserError:
        raise
    except Exception:  # the matcher raises many kinds for odd cells; the field counts them as no match
        return FAILED, None


def outcomes(function: Callable, tasks: Sequence[Sequence], num_processes: int, timeout_s: float) -> list[Outcome]:
    """The outcome of a function, one of a module, for each tuple of arguments, in order. What takes longer than
    `timeout_s` seconds, and what ends its process, costs no other task. Raises RuntimeError where no process starts.
    """
    if not tasks:
        return []
    pool = lasting_pool(num_processes)
    if not pool.active:  # a process was killed while it had nothing to do
        stop(pool)
        lasting_pool.cache_clear()
        pool = lasting_pool(num_processes)
    futures = [pool.schedule(attempt, (function, arguments), timeout=timeout_s) for arguments in tasks]
    return [outcome_of(future) for future in futures]


def outcome_of(future: Any) -> Outcome:
    try:
        return future.result()
    except TimedOut:
        return TIMED_OUT, None
    except crystal_package("pebble").ProcessExpired:
        return FAILED, None
