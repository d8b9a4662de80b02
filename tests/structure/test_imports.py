"""Who may import whom, held by reading the source: the trunk by stage, a branch for each modality, scripts on top.

Every check takes source text or a table of it and returns the faults it finds as sentences, so that
`test_every_check_finds_a_planted_fault` can show that it would fail.
"""

import ast
from collections import Counter
from collections.abc import Callable

import pytest

from tests.structure.sources import (
    FUNCTIONS,
    PACKAGES,
    ROOT,
    SCRIPT_SOURCES,
    SCRIPTS,
    TOOL_SOURCES,
    UTILS,
    all_arguments,
    assert_none,
    below_utils,
    check_each,
    constant,
    import_graph,
    imported_names,
    matches,
    statements_on_import,
)
from utils.modalities import MODALITIES

GROUND = ("errors", "files", "draws", "tensor_ops", "frozen")  # of which anyone may import
TRUNK: dict[str, set[str]] = {
    "args": set(),
    "data": set(),
    "models": set(),
    "diffusion": set(),
    "latents": set(),
    "evaluation": set(),
    "training": {"models", "diffusion", "latents"},
    "runs": {"args", "models", "diffusion", "latents", "training"},
}
ALLOWED = TRUNK | {name: set(TRUNK) for name in MODALITIES} | {"plan": {*TRUNK, "modalities", "image"}}
ROW = "modality"  # the one file of a branch that the table of modalities imports
# Files that may take the parsed arguments: run set-up, and whatever else is by its name about flags.
TAKE_ARGS = {"args", "modalities", "setup", "networks", "base", "precompute", "encoding", "sampler", "evaluate"}
# Files that are imported before the arguments are parsed, or in processes that are started by the dozen.
NO_TORCH = (
    *("errors", "files", "args/*", "*/args", "*/args/*", "*/modality", "modalities", "plan/args", "plan/arithmetic"),
    *("crystal/structure", "crystal/matching", "crystal/workers", "crystal/data/cif"),
)
# With an exported run, which samples where this repository is not installed: file -> its name there.
TRAVELS: dict[str, str] = constant(UTILS["utils.image.pipeline"], "TRAVELS")
MAX_ENTRIES = 20
HEAVY = {
    *("open_clip", "bitsandbytes", "xformers", "peft", "pymatgen", "spglib", "smact", "ase", "anndata", "scanpy"),
    *("skmisc", "h5py", "torchmetrics", "torch_fidelity", "gradio", "pebble"),
}
OUTSIDERS = {path.stem for path in SCRIPTS} | {"demo", "benchmarks", "tests"}


def package_of(module: str) -> str:
    """The folder of `utils` that a module lies in; of a file right below `utils`, its own name."""
    return below_utils(module).partition("/")[0]


def faults_of_imports(modules: dict[str, str], packages: set[str]) -> list[str]:
    """Imports against the table."""
    faults = []
    for module, imported in import_graph(modules, packages).items():
        here = package_of(module)
        for other in sorted(imported):
            there = package_of(other)
            if there in ("", here) or (there in GROUND and here != "modalities") or other == "utils":
                continue
            if here == "modalities":
                fits = there in ("errors", "args") or other.rpartition(".")[2] == ROW
            else:
                fits = there in ALLOWED.get(here, set())
            if not fits:
                allowed = sorted(ALLOWED.get(here, set())) or ["the ground"]
                faults.append(f"{module} imports {other}; {here} may import {', '.join(allowed)}")
    return faults


def faults_of_absent_modules(source: str, module: str, modules: set[str]) -> list[str]:
    """An import inside a function may name a module that does not exist, and nobody notices until it runs."""
    names = {name for name in imported_names(source, module) if name.startswith("utils.")}
    absent = {name for name in names if name not in modules and name.rpartition(".")[0] not in modules}
    return [f"{module} imports {name}, which does not exist" for name in sorted(absent)]


def faults_of_circles(modules: dict[str, str], packages: set[str]) -> list[str]:
    graph = import_graph(modules, packages)
    faults, finished = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            faults.append("a circle of imports: " + " -> ".join([*path[path.index(module) :], module]))
        elif module not in finished:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            finished.add(module)

    for module in graph:
        visit(module, [])
    return faults


def faults_of_first_party_imports(source: str, module: str, forbidden: set[str]) -> list[str]:
    """Scripts and `utils` know nothing of scripts, of the demo, of benchmarks and of tests."""
    tops = {name.partition(".")[0] for name in imported_names(source, module)}
    return [f"{module} imports {top}; of this repository it may import only utils" for top in sorted(tops & forbidden)]


def faults_of_heavy_imports(source: str, module: str) -> list[str]:
    faults = []
    for node in statements_on_import(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for top in sorted({name.partition(".")[0] for name in names} & HEAVY):
                faults.append(f"{module}:{node.lineno} imports {top} with the file; import it where it is used")
    return faults


def faults_of_seeing_args(source: str, module: str) -> list[str]:
    """Only files whose name says so take the parsed arguments; all others take named values."""
    if TAKE_ARGS & set(module.split(".")[1:]):
        return []
    return [
        f"{module}:{node.lineno} {node.name} takes args; outside {', '.join(sorted(TAKE_ARGS))}, take named values"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, FUNCTIONS) and any(argument.arg == "args" for argument in all_arguments(node))
    ]


def faults_of_torch(modules: dict[str, str], packages: set[str]) -> list[str]:
    """Files of NO_TORCH that reach torch, through whatever chain of imports."""
    graph = import_graph(modules, packages, only_on_import=True)
    imports_torch = {
        module
        for module, source in modules.items()
        if "torch" in {name.partition(".")[0] for name in imported_names(source, module, only_on_import=True)}
    }

    def chain(module: str, path: list[str]) -> list[str] | None:
        if module in imports_torch:
            return [*path, module, "torch"]
        found = (chain(other, [*path, module]) for other in sorted(graph[module]) if other not in path)
        return next((each for each in found if each), None)

    chains = (chain(module, []) for module in modules if matches(module, NO_TORCH))
    return ["torch is imported: " + " -> ".join(each) for each in chains if each]


def faults_of_travellers(source: str, module: str) -> list[str]:
    """A file that is copied into exported runs imports torch, diffusers and siblings that are copied too."""
    faults, folder = [], below_utils(module).rpartition("/")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.level:
                if node.level != 1 or f"{folder}/{node.module}" not in TRAVELS:
                    faults.append(f"{module}:{node.lineno} imports .{node.module}, which does not travel with it")
                continue
        else:
            continue
        faults += [
            f"{module}:{node.lineno} imports {name}: this file travels with runs, where only torch and diffusers are"
            for name in names
            if name.partition(".")[0] not in STANDARD | {"torch", "diffusers", "xformers"}
        ]
    return faults


STANDARD = {"contextlib", "collections", "functools", "inspect", "math", "typing", "dataclasses", "itertools", "json"}


def faults_of_width(folders: dict[str, int]) -> list[str]:
    """A folder with more entries than can be taken in at a glance."""
    return [f"{folder} has {count} entries, more than {MAX_ENTRIES}" for folder, count in folders.items()
            if count > MAX_ENTRIES]  # fmt: skip


def entries() -> dict[str, int]:
    """How many entries each folder has, `__init__.py` and what Python leaves aside."""
    found = {}
    for top in ("utils",):
        for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
            names = {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}
            if "__pycache__" not in folder.parts:
                found[str(folder.relative_to(ROOT))] = len(names)
    return found


# ---- the tree as it is


def test_imports() -> None:
    assert_none(faults_of_imports(UTILS, PACKAGES))


def test_modules_that_are_imported_exist() -> None:
    check_each(faults_of_absent_modules, SCRIPT_SOURCES | TOOL_SOURCES | UTILS, set(UTILS))


def test_no_circles() -> None:
    assert_none(faults_of_circles(UTILS, PACKAGES))


def test_scripts_and_utils_import_only_utils() -> None:
    check_each(faults_of_first_party_imports, SCRIPT_SOURCES | UTILS, OUTSIDERS)
    # tools may use their neighbours in the same folder, but no script
    check_each(faults_of_first_party_imports, TOOL_SOURCES, {path.stem for path in SCRIPTS} | {"tests"})


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    check_each(faults_of_heavy_imports, SCRIPT_SOURCES | TOOL_SOURCES | UTILS)


def test_only_scripts_and_run_setup_see_args() -> None:
    check_each(faults_of_seeing_args, UTILS)


def test_files_that_scripts_import_first_reach_no_torch() -> None:
    assert_none(faults_of_torch(UTILS, PACKAGES))


def test_files_that_travel_import_only_what_travels() -> None:
    travellers = {module: source for module, source in UTILS.items() if below_utils(module) in TRAVELS}
    assert len(travellers) == len(TRAVELS)
    check_each(faults_of_travellers, travellers)


def faults_of_names_on_the_way(travels: dict[str, str], utils: dict[str, str]) -> list[str]:
    """A file that a sibling imports keeps its name in a run; no two files have one name there."""
    faults = [f"two files travel as {name}" for name, count in Counter(travels.values()).items() if count > 1]
    for file in travels:
        for node in ast.walk(ast.parse(utils["utils." + file.replace("/", ".")])):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                sibling = f"{file.rpartition('/')[0]}/{node.module}"
                if travels.get(sibling) != f"{node.module}.py":
                    faults.append(f"{file} imports .{node.module}, which travels as {travels.get(sibling)}")
    return faults


def test_files_that_travel_find_each_other() -> None:
    assert_none(faults_of_names_on_the_way(TRAVELS, UTILS))


def test_packages_say_nothing() -> None:
    """A process that imports one file of a package must not import the others."""
    assert_none([f"{package} has code in __init__.py" for package in PACKAGES if UTILS[package].strip()])


def test_width() -> None:
    assert_none(faults_of_width(entries()))


# ---- each check finds what it is there to find


def imports(**modules: str) -> list[str]:
    named = {f"utils.{name.replace('__', '.')}": text for name, text in modules.items()}
    return faults_of_imports(named, {"utils", *(name.rpartition(".")[0] for name in named)})


def circles(**modules: str) -> list[str]:
    return faults_of_circles({f"utils.{name}": text for name, text in modules.items()}, {"utils"})


def torch_of(**modules: str) -> list[str]:
    return faults_of_torch({f"utils.{name.replace('__', '.')}": text for name, text in modules.items()}, {"utils"})


def travels(source: str) -> list[str]:
    return faults_of_travellers(source, "utils.diffusion.guidance")


PLANTED: dict[str, Callable[[], list[str]]] = {
    "a branch imports another": lambda: imports(image__codec="from utils.crystal.codec import x", crystal__codec=""),
    "a branch imports another's row": lambda: imports(
        image__setup="from utils.crystal import modality", crystal__modality=""
    ),
    "the trunk imports a branch": lambda: imports(training__setup="import utils.image.codec", image__codec=""),
    "the trunk imports upwards": lambda: imports(latents__spec="from utils.runs.load import x", runs__load=""),
    "the ground imports the trunk": lambda: imports(errors="from utils.args import parsing", args__parsing=""),
    "a branch imports the modalities": lambda: imports(image__setup="from utils import modalities", modalities=""),
    "the modalities import a branch": lambda: imports(modalities="from utils.image.setup import x", image__setup=""),
    "relative import upwards": lambda: imports(models__dit="from ..runs.load import x", runs__load=""),
    "late import upwards": lambda: imports(models__dit="def f():\n    from utils.runs import load", runs__load=""),
    "a package that the table lacks": lambda: imports(surprise__a="import utils.args.b", args__b=""),
    "absent module": lambda: faults_of_absent_modules("def f():\n    from utils.b import x", "m", {"utils.a"}),
    "circle of two": lambda: circles(a="import utils.b", b="def f():\n    from utils.a import x"),
    "circle of three": lambda: circles(a="from . import b", b="from .c import x", c="from utils import a"),
    "script imports a script": lambda: faults_of_first_party_imports("import sample", "train", {"sample"}),
    "utils import the demo": lambda: faults_of_first_party_imports("from demo.x import y", "utils.a", {"demo"}),
    "heavy import": lambda: faults_of_heavy_imports("import peft", "m"),
    "heavy import of a part": lambda: faults_of_heavy_imports("from torchmetrics.image import x", "m"),
    "heavy import in a try": lambda: faults_of_heavy_imports("try:\n    import xformers\nexcept E:\n    pass", "m"),
    "heavy import in a class": lambda: faults_of_heavy_imports("class A:\n    import gradio", "m"),
    "args in utils": lambda: faults_of_seeing_args("def f(args): pass", "utils.image.codec"),
    "torch in args": lambda: torch_of(args__groups="import torch"),
    "torch through a chain": lambda: torch_of(
        image__args__data="from utils.a import x", a="from utils.b import y", b="import torch.nn"
    ),
    "a file that travels imports utils": lambda: travels("from utils.errors import UserError"),
    "a file that travels imports a sibling that stays": lambda: travels("from .sampling import x"),
    "a file that travels imports a parent": lambda: travels("from ..models.dit import x"),
    "a file that travels imports another library": lambda: travels("def f():\n    import accelerate"),
    "a file that travels under another name": lambda: faults_of_names_on_the_way(
        {"a/b": "b.py", "a/c": "d.py"}, {"utils.a.b": "from .c import x", "utils.a.c": ""}
    ),
    "two files that travel under one name": lambda: faults_of_names_on_the_way(
        {"a/b": "c.py", "a/c": "c.py"}, {"utils.a.b": "", "utils.a.c": ""}
    ),
    "a folder too wide": lambda: faults_of_width({"utils/image": 21}),
}

SOUND: dict[str, Callable[[], list[str]]] = {
    "imports downwards": lambda: imports(
        image__codec="from utils.latents.spec import x\nfrom utils.errors import y\nfrom . import text",
        image__text="", latents__spec="from ..tensor_ops import z", tensor_ops="", errors="",
        modalities="from utils.image.modality import IMAGE", image__modality="from utils.args import modality",
        args__modality="", plan__args="from utils.modalities import x",
    ),
    "a module that exists": lambda: faults_of_absent_modules("from utils.a.b import x", "m", {"utils.a.b"}),
    "no circle": lambda: circles(a="from utils import b, c", b="from .c import x", c="import torch"),
    "heavy import in a function": lambda: faults_of_heavy_imports("def f():\n    import peft", "m"),
    "heavy import for types": lambda: faults_of_heavy_imports("if TYPE_CHECKING:\n    import peft", "m"),
    "args in set-up": lambda: faults_of_seeing_args("def f(args): pass", "utils.crystal.setup"),
    "args in a package of args": lambda: faults_of_seeing_args("def f(args): pass", "utils.image.args.data"),
    "torch in a function": lambda: torch_of(args__groups="def f():\n    import torch"),
    "torch above": lambda: torch_of(image__codec="import torch\nfrom utils.args.a import x", args__a=""),
    "travelling siblings": lambda: travels("import torch\nfrom .conditions import x\nfrom diffusers import y"),
    "a folder": lambda: faults_of_width({"utils/image": 20}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()


@pytest.mark.parametrize("name", SOUND)
def test_no_check_finds_a_fault_where_there_is_none(name: str) -> None:
    assert SOUND[name]() == []
