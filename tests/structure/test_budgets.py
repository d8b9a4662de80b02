"""The budgets of the style, held by reading the source.

Every check takes source text or a table of it and returns the faults it finds as sentences, so that
`test_every_check_finds_a_planted_fault` can show that it would fail.
"""

import ast
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.structure.sources import (
    FUNCTIONS,
    ROOT,
    SCRIPT_SOURCES,
    SCRIPTS,
    TOOL_SOURCES,
    UTILS,
    all_arguments,
    assert_none,
    check_each,
)

MAX_LINES_OF_SCRIPT, MAX_LINES_OF_UTILS, MAX_NESTING = 260, 400, 5
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


# ---- budgets


def faults_of_length(source: str, module: str, limit: int) -> list[str]:
    lines = len(source.splitlines())
    return [f"{module} has {lines} lines, more than {limit}"] if lines > limit else []


def faults_of_nesting(source: str, module: str) -> list[str]:
    """Blocks inside blocks, five at most. An `elif` is no deeper than its `if`; functions and classes do not count."""
    faults = []

    def visit(node: ast.AST, depth: int, is_elif: bool = False) -> None:
        if isinstance(node, BLOCKS) and not is_elif:
            depth += 1
            if depth == MAX_NESTING + 1:
                faults.append(f"{module}:{node.lineno} is nested {depth} deep, more than {MAX_NESTING}")
        for child in ast.iter_child_nodes(node):
            # `else:` with an `if` below it parses as an elif does, but for the column
            chained = (
                isinstance(node, ast.If)
                and isinstance(child, ast.If)
                and node.orelse == [child]
                and child.col_offset == node.col_offset
            )
            visit(child, depth, chained)

    visit(ast.parse(source), 0)
    return faults


# ---- what belongs in a script


def faults_of_training_in_utils(source: str, module: str) -> list[str]:
    """`backward` and `optimizer.step` stand in a script's loop, and no helper takes all that a trainer class would."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).lower()
            if node.attr == "backward" or (node.attr == "step" and ("optim" in owner or "scaler" in owner)):
                faults.append(f"{module}:{node.lineno} has {ast.unparse(node)}, which belongs in a script's loop")
        elif isinstance(node, FUNCTIONS):
            names = " ".join(argument.arg for argument in all_arguments(node))
            if "optimizer" in names and "batch" in names.replace("batch_size", ""):
                faults.append(f"{module}:{node.lineno} {node.name} takes optimizer and batch: a trainer in disguise")
    return faults


def faults_of_literals(source: str, module: str) -> list[str]:
    """The scaling of latents comes from the VAE's config or from a measurement, never from Stable Diffusion's."""
    return [
        f"{module}:{node.lineno} has the literal {node.value}: read the scaling from the VAE's config or measure it"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value == 0.18215
    ]


# ---- options


def declared_options(tree: ast.AST) -> Iterator[tuple[ast.Call, str | None]]:
    """Every `add_argument` and the attribute that its value is read from; None where no literal flag is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            dest = [keyword.value for keyword in node.keywords if keyword.arg == "dest"]
            if dest and isinstance(dest[0], ast.Constant):
                names = [str(dest[0].value)]
            long = [name for name in names if not name.startswith("-") or name.startswith("--")] or names
            yield node, long[0].lstrip("-").replace("-", "_") if long else None


def names_read(tree: ast.AST) -> set[str]:
    """Options that a file reads, as `args.name` or by a string that is the name."""
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value).endswith("args")
    }
    declarations = {id(part) for call, _ in declared_options(tree) for part in ast.walk(call)}
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in declarations
    }
    return attributes | strings


def faults_of_help(source: str, module: str) -> list[str]:
    faults = []
    for call, option in declared_options(ast.parse(source)):
        texts = [keyword.value for keyword in call.keywords if keyword.arg == "help"]
        if option is None:
            faults.append(f"{module}:{call.lineno} declares an option whose name is no literal")
        elif not texts or (isinstance(texts[0], ast.Constant) and not str(texts[0].value or "").strip()):
            faults.append(f"{module}:{call.lineno} --{option} has no help text")
    return faults


def faults_of_dead_options(scripts: dict[str, str], utils: dict[str, str]) -> list[str]:
    """An option must be read by the script that has it, or by `utils`. A script has those that it declares, and those
    of the groups (functions of `utils` that declare some) that it calls; a group that no script calls is dead. A script
    that reads a field of the table of modalities calls the groups that stand in it.
    """
    groups: dict[str, set[str]] = {}
    calls_of_groups: dict[str, set[str]] = {}
    for source in utils.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, FUNCTIONS):
                options = {option for _, option in declared_options(node) if option}
                groups[node.name] = groups.get(node.name, set()) | options
                calls_of_groups[node.name] = calls_of_groups.get(node.name, set()) | names_called(node)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Modality":
                for field in node.keywords:
                    name = str(field.arg)
                    groups.setdefault(name, set())
                    calls_of_groups[name] = calls_of_groups.get(name, set()) | names_called(field.value)
    read_in_utils = set().union(*(names_read(ast.parse(source)) for source in utils.values()))

    faults, used = [], set()
    for script, source in scripts.items():
        tree = ast.parse(source)
        waiting, called = names_called(tree) & groups.keys(), set()
        while waiting:
            group = waiting.pop()
            called.add(group)
            waiting |= (calls_of_groups[group] & groups.keys()) - called
        used |= called
        options = {option for _, option in declared_options(tree) if option}
        options |= set().union(*(groups[group] for group in called))
        dead = options - names_read(tree) - read_in_utils
        faults += [f"{script} has the option --{option}, and nothing reads it" for option in sorted(dead)]
    for group in sorted(groups.keys() - used):
        faults += [f"--{option} of {group} belongs to no script" for option in sorted(groups[group])]
    return faults


def names_called(tree: ast.AST) -> set[str]:
    """The last names of everything that is called or handed on: `args.add_run_args(parser)` is `add_run_args`."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


# ---- the tree as it is


def test_length() -> None:
    check_each(faults_of_length, SCRIPT_SOURCES | TOOL_SOURCES, MAX_LINES_OF_SCRIPT)
    check_each(faults_of_length, UTILS, MAX_LINES_OF_UTILS)


def test_nesting() -> None:
    check_each(faults_of_nesting, SCRIPT_SOURCES | TOOL_SOURCES | UTILS)


def test_training_stays_in_scripts() -> None:
    check_each(faults_of_training_in_utils, UTILS)


def test_no_literal_scaling_factor() -> None:
    check_each(faults_of_literals, SCRIPT_SOURCES | UTILS)


def test_every_option_has_a_help_text() -> None:
    check_each(faults_of_help, SCRIPT_SOURCES | TOOL_SOURCES | UTILS)


@pytest.mark.skipif(not SCRIPTS, reason="no script yet that could read an option")
def test_every_option_of_the_scripts_is_read() -> None:
    assert_none(faults_of_dead_options(SCRIPT_SOURCES, UTILS))


def test_every_option_of_the_tools_is_read() -> None:
    assert_none(faults_of_dead_options(TOOL_SOURCES, {}))


# ---- --help


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

DEEP = "def f():\n" + "".join(f"{'    ' * i}for i in x:\n" for i in range(1, 7)) + "    " * 7 + "pass\n"
DEEP_ELSE = "".join(f"{'    ' * i}if x: pass\n{'    ' * i}else:\n" for i in range(6)) + "    " * 6 + "pass\n"
FLAG = "parser.add_argument('--depth', help='How deep.')\n"


def dead(script: str, *utils: str) -> list[str]:
    return faults_of_dead_options({"train": script}, {f"utils.m{i}": source for i, source in enumerate(utils)})


def run_help(program: str) -> list[str]:
    return faults_of_help_run([sys.executable, "-X", "importtime", "-c", program], "planted")


PLANTED: dict[str, Callable[[], list[str]]] = {
    "too long": lambda: faults_of_length("x = 1\n" * 251, "m", 250),
    "too deep": lambda: faults_of_nesting(DEEP, "m"),
    "too deep below else": lambda: faults_of_nesting(DEEP_ELSE, "m"),
    "backward": lambda: faults_of_training_in_utils("accelerator.backward(loss)", "m"),
    "optimizer step": lambda: faults_of_training_in_utils("def f(o):\n    o.optimizer.step()", "m"),
    "trainer in disguise": lambda: faults_of_training_in_utils("def f(model, optimizer, batch): pass", "m"),
    "literal scaling": lambda: faults_of_literals("latents = 0.18215 * latents", "m"),
    "no help": lambda: faults_of_help("p.add_argument('--depth')", "m"),
    "empty help": lambda: faults_of_help("p.add_argument('--depth', help=' ')", "m"),
    "name is no literal": lambda: faults_of_help("p.add_argument(name, help='x')", "m"),
    "dead option": lambda: dead(FLAG),
    "dead option, read from something else": lambda: dead(FLAG + "print(config.depth)"),
    "dead option, only set": lambda: dead(FLAG + "args.depth = 1"),
    "dead option of a group": lambda: dead("add_x(parser)", f"def add_x(parser): {FLAG}"),
    "dead option of a group in a group": lambda: dead(
        "add_y(parser)", f"def add_x(parser): {FLAG}", "def add_y(parser):\n    add_x(parser)"
    ),
    "group of a row that no script reads": lambda: dead(
        "print(args.depth)", f"def add_x(parser): {FLAG}", "Modality(name='x', flags=(add_x,))"
    ),
    "group of no script": lambda: dead("print(args.depth)", f"def add_x(parser): {FLAG}"),
    "help imports torch": lambda: run_help("import torch; print('usage:')"),
    "help fails": lambda: run_help("raise SystemExit(1)"),
    "help is slow": lambda: run_help("import os\nwhile os.times().user < 2.3: sum(range(10**6))\nprint('usage:')"),
}

SOUND: dict[str, Callable[[], list[str]]] = {
    "a chain of elif": lambda: faults_of_nesting("if a: pass\n" + "elif b: pass\n" * 9, "m"),
    "scheduler step": lambda: faults_of_training_in_utils("scheduler.step(x)\nema.step(model)", "m"),
    "read as an attribute": lambda: dead(FLAG + "print(args.depth)"),
    "read by a string": lambda: dead(FLAG + "print(getattr(args, 'depth'))"),
    "read in utils": lambda: dead("add_x(parser)", f"def add_x(parser): {FLAG}", "def f(args): return args.depth"),
    "group of a row": lambda: dead(
        "row.flags(parser)", f"def add_x(parser): {FLAG}", "Modality(name='x', flags=(add_x,))",
        "def f(args): return args.depth",
    ),
    "help": lambda: run_help("print('usage:')"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()


@pytest.mark.parametrize("name", SOUND)
def test_no_check_finds_a_fault_where_there_is_none(name: str) -> None:
    assert SOUND[name]() == []
