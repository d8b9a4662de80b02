"""The sources of the repository, and what a check of them reads: names of modules, imports, arguments."""

import ast
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
TOOLS = sorted([*ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")])
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(path: Path) -> str:
    """`utils/models/dit.py` is `utils.models.dit`, `utils/models/__init__.py` is `utils.models`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(paths: list[Path]) -> dict[str, str]:
    return {module_name(path): path.read_text(encoding="utf-8") for path in paths}


UTILS = sources(sorted(ROOT.glob("utils/**/*.py")))
PACKAGES = {module_name(path) for path in ROOT.glob("utils/**/__init__.py")}
SCRIPT_SOURCES, TOOL_SOURCES = sources(SCRIPTS), sources(TOOLS)
TESTS = sources(sorted(ROOT.glob("tests/*/**/*.py")))


def imported_names(source: str, module: str, is_package: bool = False, only_on_import: bool = False) -> Iterator[str]:
    """Every dotted name that a file may import, wherever the statement stands, or only those that are imported with the
    file; relative imports made absolute."""
    tree = ast.parse(source)
    for node in statements_on_import(tree) if only_on_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_graph(modules: dict[str, str], packages: set[str], only_on_import: bool = False) -> dict[str, set[str]]:
    """Which of the modules each of them imports. The package that a module lies in is no import of its own."""
    graph = {}
    for module, source in modules.items():
        names = set(imported_names(source, module, module in packages, only_on_import)) & modules.keys()
        parents = {name for name in names if name in packages and any(n.startswith(name + ".") for n in names)}
        graph[module] = names - parents - {module}
    return graph


def statements_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a file is imported: all but the bodies of functions and of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        yield node
        yield from statements_on_import(node)


def constant(source: str, name: str) -> Any:
    """The value of a literal that stands at the top of a file."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(node.value) for node in nodes if ast.unparse(node.targets[0]) == name)


def all_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def below_utils(module: str) -> str:
    """`utils.image.args.data` is `image/args/data`."""
    return module.removeprefix("utils").removeprefix(".").replace(".", "/")


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(below_utils(module), pattern) for pattern in patterns)


def assert_none(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def check_each(check: Callable[..., list[str]], modules: dict[str, str], *rest: object) -> None:
    assert_none([fault for module, source in modules.items() for fault in check(source, module, *rest)])
