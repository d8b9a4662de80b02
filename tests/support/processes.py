"""Scripts in processes of their own, forked from one that has imported everything: a real process, which can be killed
and has its own rank, for a tenth of a second instead of the ten that the imports cost."""

import hashlib
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# One thread, so that runs can be compared bit for bit, and never a GPU: a process forked after CUDA started cannot use it.
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
PRELOADED = [
    "bitsandbytes",
    "scanpy",
    "scipy.stats",
    "torch.utils.tensorboard",
    "torch_fidelity",
    "utils.image.networks",
    "utils.image.pictures",
    "utils.image.precompute",
    "utils.image.sampler",
    "utils.image.validation",
]
_context = multiprocessing.get_context("forkserver")


def _start_fork_server() -> None:
    from multiprocessing.forkserver import ensure_running

    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # the server hands its own environment to every process
    try:
        _context.set_forkserver_preload(PRELOADED)
        ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in a process when it calls a function for the `count`-th time: the same moment on every
    machine, however fast. With several processes it goes wrong in `rank` only. A function that a module has imported by
    name is replaced for that module alone, which is named as `within`.

    What travels to the process is the function's address, "module:name"."""

    function: Callable[..., Any] | str
    count: int
    rank: int = 0
    within: ModuleType | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if callable(self.function):
            module = self.within.__name__ if isinstance(self.within, ModuleType) else self.function.__module__
            object.__setattr__(self, "function", f"{module}:{self.function.__qualname__}")
            object.__setattr__(self, "within", module)

    def install(self) -> None:
        module_name, _, name = str(self.function).partition(":")
        owner = importlib.import_module(module_name)
        *parents, name = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function = getattr(owner, name)
        calls = itertools.count(1)

        def faulty(*arguments, **named):
            return self.call(next(calls), lambda: function(*arguments, **named))

        setattr(owner, name, faulty)

    def call(self, number: int, function: Callable[[], Any]) -> Any:
        """The function's `number`-th call."""
        raise NotImplementedError


@dataclass(frozen=True)
class SignalAt(Fault):
    """A signal that the process sends to itself just before that call."""

    signal: int = signal.SIGKILL

    def call(self, number, function):
        if number == self.count:
            os.kill(os.getpid(), self.signal)
        return function()


@dataclass(frozen=True)
class NotFinite(Fault):
    """A tensor that the function returns is made infinite, in that call and the `times` - 1 after it; its gradient only
    `with_gradient`."""

    times: int = 1
    with_gradient: bool = True

    def call(self, number, function):
        value = function()
        if self.count <= number < self.count + self.times:
            return value * float("inf") if self.with_gradient else value + float("inf")
        return value


@dataclass(frozen=True)
class SeedsWrittenDown(Fault):
    """No fault: at each call, what torch's own generators were last seeded with, on a line of the file `path`."""

    path: str = ""

    def call(self, number, function):
        import torch

        with open(self.path, "a") as file:
            file.write(f"{torch.initial_seed()}\n")
        return function()


def dropout_seeds(script: str, *flags: object, path: Path, rank: int = 0, **settings: Any) -> list[int]:
    """Runs a trainer; what dropout was seeded with in each micro-step of a process, in their order. It is looked at
    when noise is drawn, which is before the model is called."""
    from utils.draws import SampleDraws

    run(script, *flags, fault=SeedsWrittenDown(SampleDraws.normal, 0, rank, str(path)), **settings)
    return list(dict.fromkeys(int(line) for line in path.read_text().splitlines()))


def _run_as_main(
    script: str, flags: list[str], environment: dict[str, str], out: str, err: str, fault: Fault | None
) -> None:
    """In the new process: the script as `python script flags` would run it."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    multiprocessing.current_process()._config["daemon"] = False  # it may start processes, as what a user starts may
    os.environ.update(environment)
    os.chdir(ROOT)
    if fault is not None and fault.rank == int(environment.get("RANK", 0)):
        fault.install()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


@dataclass
class Result:
    """What `subprocess.run` would give. `returncode` is the first one that is not 0, over all ranks."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A script under way, in one process or several ranks of gloo."""

    def __init__(
        self, script: str, flags: tuple[object, ...], processes: int, fault: Fault | None, extra: dict[str, str]
    ):
        _start_fork_server()
        self.folder = Path(tempfile.mkdtemp(prefix="run-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = []
        for rank in range(processes):
            environment = extra if processes == 1 else extra | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            logs = (str(self.folder / f"out{rank}"), str(self.folder / f"err{rank}"))
            arguments = (str(ROOT / script), list(map(str, flags)), environment, *logs, fault)
            self.ranks.append(_context.Process(target=_run_as_main, args=arguments, daemon=True))
        for process in self.ranks:
            process.start()

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def wait_for_kill(self, timeout: float = 120) -> bool:
        """Waits for the SIGKILL that `fault` sends, kills the other ranks, and says whether it came."""
        multiprocessing.connection.wait([process.sentinel for process in self.ranks], timeout)
        killed = any(process.exitcode == -signal.SIGKILL for process in self.ranks)
        self.kill()
        return killed

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def kill_when(self, condition: Callable[[], bool], delay: float = 0.0, timeout: float = 120) -> bool:
        """SIGKILL `delay` seconds after `condition()` holds; False if the script had ended before."""
        deadline = time.monotonic() + timeout
        while self.is_alive() and not condition():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"waited {timeout} s in vain\n{self.wait().stderr}")
            time.sleep(0.001)
        time.sleep(delay)
        was_alive = self.is_alive()
        self.kill()
        return was_alive

    def wait(self, timeout: float = 180) -> Result:
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        ended = all(process.exitcode is not None for process in self.ranks)
        self.kill()
        out, err = (
            "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}*"))) for name in ("out", "err")
        )
        assert ended, f"still running after {timeout} s\n{out}\n{err}"
        codes = [process.exitcode for process in self.ranks]
        return Result(next((code for code in codes if code), 0), out, err)


def start(
    script: str,
    *flags: object,
    processes: int = 1,
    fault: Fault | None = None,
    environment: dict[str, str] | None = None,
) -> Running:
    """Starts a script and returns at once."""
    return Running(script, flags, processes, fault, environment or {})


def run(script: str, *flags: object, check: bool = True, **settings: Any) -> Result:
    """Runs a script to its end, with the `settings` of `start`; fails, with all it printed, if its exit code is not 0."""
    result = start(script, *flags, **settings).wait()
    if check and result.returncode:
        raise AssertionError(
            f"{script} {' '.join(map(str, flags))}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        )
    return result


def snapshot(*folders: Path) -> dict[str, str]:
    """Every file and folder below `folders` with the sha256 of its content."""
    paths = [path for folder in folders for path in [folder, *folder.rglob("*")] if path.exists()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def contents(folder: Path) -> dict[str, str]:
    """The same with names relative to `folder`: equal for folders that hold the same."""
    return {str(Path(name).relative_to(folder)): digest for name, digest in snapshot(folder).items()}


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    """step -> value of a curve in the TensorBoard logs of a run, over all the processes that wrote some of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for file in sorted(run_dir.glob("logs/**/events.out.tfevents*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return dict(sorted(values.items()))


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint: weights, averages and the states of optimizers."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted((run_dir / f"checkpoint-{step}").iterdir()):
        if path.suffix == ".safetensors":
            found |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
        elif path.name.startswith("optimizer"):
            states = torch.load(path, weights_only=True)["state"]
            found |= {f"{path.name}/{i}/{k}": v for i, state in states.items() for k, v in state.items()}
    return found


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of the tensors that are not the same to the bit; both sides must have the same names."""
    import torch

    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def with_random_weights(model: Any, seed: int = 0) -> Any:
    """A model whose weights are all something: what is initialised to zero would hide faults."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def run_script(
    script: str, *flags: str | Path | int | float, processes: int = 1, timeout: float = 300, check: bool = True
):
    """Runs a top-level script in a process of its own, from the repository, with one thread (so that runs can be compared
    bit for bit); with `processes` 2, under torch's launcher as gloo on the CPU."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def refused(result) -> str:
    """The one line that a script which refuses its input prints; fails unless it exits with 2 and prints no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]
