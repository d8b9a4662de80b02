"""Lengths, nesting and what belongs in a script, held by reading the source.

Every check takes source text or a table of it and returns the faults it finds as sentences, so that
`test_every_check_finds_a_planted_fault` can show that it would fail.
"""

import ast
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest

from tests.structure.sources import (
    FUNCTIONS,
    SCRIPT_SOURCES,
    TESTS,
    TOOL_SOURCES,
    UTILS,
    all_arguments,
    assert_none,
    check_each,
)

MAX_LINES_OF_SCRIPT, MAX_LINES_OF_UTILS, MAX_LINES_OF_TESTS, MAX_NESTING = 250, 400, 500, 5
# Scripts that are read more than others: the first of these patterns that fits.
LIMITS = {"train_text_to_image_ldm": 150, "train_*": 175, "sample": 70, "evaluate": 60, "precompute_latents": 80}
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def limit_of_script(module: str) -> int:
    return next((limit for name, limit in LIMITS.items() if fnmatchcase(module, name)), MAX_LINES_OF_SCRIPT)


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


def test_length() -> None:
    for module, source in (SCRIPT_SOURCES | TOOL_SOURCES).items():
        assert_none(faults_of_length(source, module, limit_of_script(module)))
    check_each(faults_of_length, UTILS, MAX_LINES_OF_UTILS)
    check_each(faults_of_length, TESTS, MAX_LINES_OF_TESTS)


def test_nesting() -> None:
    check_each(faults_of_nesting, SCRIPT_SOURCES | TOOL_SOURCES | UTILS)


def test_training_stays_in_scripts() -> None:
    check_each(faults_of_training_in_utils, UTILS)


def test_no_literal_scaling_factor() -> None:
    check_each(faults_of_literals, SCRIPT_SOURCES | UTILS)


# ---- each check finds what it is there to find

DEEP = "def f():\n" + "".join(f"{'    ' * i}for i in x:\n" for i in range(1, 7)) + "    " * 7 + "pass\n"

DEEP_ELSE = "".join(f"{'    ' * i}if x: pass\n{'    ' * i}else:\n" for i in range(6)) + "    " * 6 + "pass\n"


PLANTED: dict[str, Callable[[], list[str]]] = {
    "too long": lambda: faults_of_length("x = 1\n" * 251, "m", 250),
    "too deep": lambda: faults_of_nesting(DEEP, "m"),
    "too deep below else": lambda: faults_of_nesting(DEEP_ELSE, "m"),
    "backward": lambda: faults_of_training_in_utils("accelerator.backward(loss)", "m"),
    "optimizer step": lambda: faults_of_training_in_utils("def f(o):\n    o.optimizer.step()", "m"),
    "trainer in disguise": lambda: faults_of_training_in_utils("def f(model, optimizer, batch): pass", "m"),
    "literal scaling": lambda: faults_of_literals("latents = 0.18215 * latents", "m"),
}

SOUND: dict[str, Callable[[], list[str]]] = {
    "a chain of elif": lambda: faults_of_nesting("if a: pass\n" + "elif b: pass\n" * 9, "m"),
    "scheduler step": lambda: faults_of_training_in_utils("scheduler.step(x)\nema.step(model)", "m"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()


@pytest.mark.parametrize("name", SOUND)
def test_no_check_finds_a_fault_where_there_is_none(name: str) -> None:
    assert SOUND[name]() == []
