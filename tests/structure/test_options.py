"""Options have a help text and are read, held by reading the source.

Every check takes source text or a table of it and returns the faults it finds as sentences, so that
`test_every_check_finds_a_planted_fault` can show that it would fail.
"""

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.structure.sources import (
    FUNCTIONS,
    SCRIPT_SOURCES,
    SCRIPTS,
    TOOL_SOURCES,
    UTILS,
    assert_none,
    check_each,
)


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


def test_every_option_has_a_help_text() -> None:
    check_each(faults_of_help, SCRIPT_SOURCES | TOOL_SOURCES | UTILS)


@pytest.mark.skipif(not SCRIPTS, reason="no script yet that could read an option")
def test_every_option_of_the_scripts_is_read() -> None:
    assert_none(faults_of_dead_options(SCRIPT_SOURCES, UTILS))


def test_every_option_of_the_tools_is_read() -> None:
    assert_none(faults_of_dead_options(TOOL_SOURCES, {}))


# ---- each check finds what it is there to find

FLAG = "parser.add_argument('--depth', help='How deep.')\n"


def dead(script: str, *utils: str) -> list[str]:
    return faults_of_dead_options({"train": script}, {f"utils.m{i}": source for i, source in enumerate(utils)})


PLANTED: dict[str, Callable[[], list[str]]] = {
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
}

SOUND: dict[str, Callable[[], list[str]]] = {
    "read as an attribute": lambda: dead(FLAG + "print(args.depth)"),
    "read by a string": lambda: dead(FLAG + "print(getattr(args, 'depth'))"),
    "group of a row": lambda: dead(
        "row.flags(parser)", f"def add_x(parser): {FLAG}", "Modality(name='x', flags=(add_x,))",
        "def f(args): return args.depth",
    ),
    "read in utils": lambda: dead("add_x(parser)", f"def add_x(parser): {FLAG}", "def f(args): return args.depth"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()


@pytest.mark.parametrize("name", SOUND)
def test_no_check_finds_a_fault_where_there_is_none(name: str) -> None:
    assert SOUND[name]() == []
