"""`--help` is quick, and comes before torch."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.structure.sources import (
    ROOT,
    SCRIPTS,
    assert_none,
)


def faults_of_help_run(command: list[str], name: str) -> list[str]:
    """`--help` answers within two seconds of processor time, and before torch is imported. How long it takes by the clock
    says as much of what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    user = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    faults = []
    if done.returncode != 0 or "usage:" not in done.stdout:
        faults.append(f"{name} --help ended with {done.returncode}: {done.stderr.splitlines()[-1:]}")
    if "torch" in imported:
        faults.append(f"{name} --help imports torch; import it after the arguments are parsed")
    if user > 2:
        faults.append(f"{name} --help took {user:.1f} s of processor time; two are allowed")
    return faults


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_quick_and_needs_no_torch(script: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(script), "--help"]
    faults = faults_of_help_run(command, script.name)
    assert_none(faults and faults_of_help_run(command, script.name))  # once more: the first may have compiled files


# ---- each check finds what it is there to find


def run_help(program: str) -> list[str]:
    return faults_of_help_run([sys.executable, "-X", "importtime", "-c", program], "planted")


PLANTED: dict[str, Callable[[], list[str]]] = {
    "help imports torch": lambda: run_help("import torch; print('usage:')"),
    "help fails": lambda: run_help("raise SystemExit(1)"),
    "help is slow": lambda: run_help("import os\nwhile os.times().user < 2.3: sum(range(10**6))\nprint('usage:')"),
}

SOUND: dict[str, Callable[[], list[str]]] = {
    "help": lambda: run_help("print('usage:')"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()


@pytest.mark.parametrize("name", SOUND)
def test_no_check_finds_a_fault_where_there_is_none(name: str) -> None:
    assert SOUND[name]() == []
