"""Calls that can be read: at most five values by place, the rest by keyword."""

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.structure.sources import FUNCTIONS, SCRIPT_SOURCES, TOOL_SOURCES, UTILS, assert_none

MAX_BY_PLACE = 5


def definitions(modules: dict[str, str]) -> dict[str, set[str]]:
    """The functions and classes of each module, by name; a class's methods too."""
    return {
        module: {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
        for module, source in modules.items()
    }


def callee(node: ast.Call, imported: dict[str, str], defined: dict[str, set[str]], module: str) -> str | None:
    """The function of `utils` that is called, as module:name; None where it is another library's or cannot be told."""
    function = node.func
    if isinstance(function, ast.Name):
        home = imported.get(function.id, f"{module}.{function.id}")
        owner, _, name = home.rpartition(".")
        return f"{owner}:{name}" if name in defined.get(owner, ()) else None
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = imported.get(function.value.id, "")
        if function.attr in defined.get(owner, ()):
            return f"{owner}:{function.attr}"
        if function.value.id == "self" and function.attr in defined.get(module, ()):
            return f"{module}:{function.attr}"
    return None


def imported_as(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names and what they stand for: a module, or something in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def faults_of_calls(modules: dict[str, str], utils: dict[str, str]) -> list[str]:
    """Calls of functions of `utils` with more than five values by place; those with stars are told by their names."""
    defined, faults = definitions(utils), []
    for module, source in modules.items():
        tree = ast.parse(source)
        imported = dict(imported_as(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and len(node.args) > MAX_BY_PLACE:
                name = callee(node, imported, defined, module)
                if name is not None and not any(isinstance(each, ast.Starred) for each in node.args):
                    faults.append(f"{module}:{node.lineno} gives {name} {len(node.args)} values by place")
    return faults


def test_calls_can_be_read() -> None:
    assert_none(faults_of_calls(SCRIPT_SOURCES | TOOL_SOURCES | UTILS, UTILS))


def calls(source: str) -> list[str]:
    return faults_of_calls({"train": source}, {"utils.a": "def f(*x): pass\nclass C:\n    def g(self, *x): pass"})


PLANTED: dict[str, Callable[[], list[str]]] = {
    "a function by its name": lambda: calls("from utils.a import f\nf(1, 2, 3, 4, 5, 6)"),
    "a function of a module": lambda: calls("from utils import a\na.f(1, 2, 3, 4, 5, 6)"),
    "under another name": lambda: calls("from utils.a import f as g\ng(1, 2, 3, 4, 5, 6)"),
    "a class": lambda: calls("from utils.a import C\nC(1, 2, 3, 4, 5, 6)"),
    "a late import": lambda: calls("def main():\n    from utils.a import f\n    f(1, 2, 3, 4, 5, 6, x=7)"),
}

SOUND: dict[str, Callable[[], list[str]]] = {
    "five values": lambda: calls("from utils.a import f\nf(1, 2, 3, 4, 5, x=6)"),
    "stars": lambda: calls("from utils.a import f\nf(1, *x, 2, 3, 4, 5, 6)"),
    "another library": lambda: calls("import torch\ntorch.f(1, 2, 3, 4, 5, 6)"),
    "logging": lambda: calls("logger.info(1, 2, 3, 4, 5, 6)"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()


@pytest.mark.parametrize("name", SOUND)
def test_no_check_finds_a_fault_where_there_is_none(name: str) -> None:
    assert SOUND[name]() == []
