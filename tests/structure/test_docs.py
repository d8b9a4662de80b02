"""Pages, docstrings and presets name files that exist.

Every check takes text and returns the faults it finds as sentences, so that `test_every_check_finds_a_planted_fault` can
show that it would fail.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.structure.sources import ROOT, assert_none

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
NAMING = [
    *(path for path in PAGES),
    *(ROOT / name for name in ("Makefile", "accelerate_config.yaml", "pyproject.toml")),
    *sorted(ROOT.glob("configs/**/*.*")),
    *sorted(ROOT.glob("*.py")),
    *sorted(path for folder in ("utils", "demo", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")),
]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
PATH = re.compile(r"(?<![\w/.-])(?:configs|docs|utils|benchmarks|demo)/[\w/.*-]*\.(?:py|md|ya?ml|sh|png)\b")


def anchors(page: str) -> set[str]:
    """What the headings of a page are linked by, as GitHub makes it."""
    titles = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def faults_of_links(page: str, path: Path) -> list[str]:
    """Links to files that do not exist, or to a heading that their page does not have."""
    faults = []
    for target, anchor in LINK.findall(page):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        if not file.exists():
            faults.append(f"{path.relative_to(ROOT)} links to {target}, which does not exist")
        elif anchor and anchor not in anchors(page if not target else file.read_text(encoding="utf-8")):
            faults.append(f"{path.relative_to(ROOT)} links to {target}#{anchor}, a heading that is not there")
    return faults


def faults_of_paths(text: str, name: str) -> list[str]:
    """Paths of this repository that lead nowhere; `*` stands for any name."""
    return [f"{name} names {path}, which does not exist" for path in sorted(set(PATH.findall(text)))
            if not any(ROOT.glob(path))]  # fmt: skip


def test_links() -> None:
    assert_none([fault for path in PAGES for fault in faults_of_links(path.read_text(encoding="utf-8"), path)])


def test_paths() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in NAMING}
    assert_none([fault for name, text in texts.items() for fault in faults_of_paths(text, name)])


README = ROOT / "README.md"
PLANTED: dict[str, Callable[[], list[str]]] = {
    "a page that does not exist": lambda: faults_of_links("[x](docs/nothing.md)", README),
    "a picture that does not exist": lambda: faults_of_links("![x](docs/nothing.png)", README),
    "a heading that does not exist": lambda: faults_of_links("[x](docs/results.md#nothing)", README),
    "a heading of the same page": lambda: faults_of_links("# Some\n[x](#other)", README),
    "a preset that does not exist": lambda: faults_of_paths("--config configs/nothing.yaml --seed 0", "m"),
    "presets that do not exist": lambda: faults_of_paths("`configs/nothing_*.yaml`", "m"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_every_check_finds_a_planted_fault(name: str) -> None:
    assert PLANTED[name]()


def test_no_check_finds_a_fault_where_there_is_none() -> None:
    page = "# A b, c: 1\n[x](#a-b-c-1) [y](docs/training.md) [z](https://a.b/c.md#d)"
    assert faults_of_links(page, README) == []
    assert faults_of_paths("configs/crystal/perov5_*.yaml, docs/training.md; runs/demo/x.png", "m") == []
