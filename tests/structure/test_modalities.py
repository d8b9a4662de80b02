"""The table of modalities: what a row names is there, and takes what scripts give it."""

import inspect
from argparse import ArgumentParser

import pytest

from tests.structure.sources import SCRIPTS, UTILS
from utils.args.modality import AddFlags, Modality
from utils.modalities import MODALITIES, add_request_args
from utils.runs import sampler

ROWS = list(MODALITIES.values())
ROOMS = (
    *("modality", "setup", "codec", "precompute", "pipeline", "sampler", "validation", "pictures"),
    *("evaluation.args", "evaluation.evaluate", "evaluation.figures"),
)


def flags_of(*add_flags: AddFlags) -> dict[str, object]:
    """The flags that some groups declare, by name, with their defaults."""
    parser = ArgumentParser(add_help=False)
    for each in add_flags:
        each(parser)
    return vars(parser.parse_args([]))


def test_there_are_rows_and_each_stands_under_its_name() -> None:
    assert len(ROWS) >= 3
    assert all(name == row.name for name, row in MODALITIES.items())
    for field in ("samples", "autoencoder"):
        assert len({getattr(row, field) for row in ROWS}) == len(ROWS), field


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_branch_has_the_same_rooms(row: Modality) -> None:
    missing = [room for room in ROOMS if f"utils.{row.name}.{room}" not in UTILS]
    assert not missing
    assert (SCRIPTS[0].parent / f"requirements-{row.name}.txt").is_file() or row.name == "image"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_a_row_loads_takes_what_scripts_give_it(row: Modality) -> None:
    assert list(inspect.signature(row.load("precompute:build_cache")).parameters) == [
        "args",
        "accelerator",
        "cache_dir",
    ]
    assert list(inspect.signature(row.load("precompute:facts_of")).parameters) == ["spec"]
    assert list(inspect.signature(row.load("evaluation.evaluate:evaluate")).parameters) == ["args"]
    kind = row.load("sampler:Sampler")
    assert issubclass(kind, sampler.Sampler)
    assert not inspect.isabstract(kind)
    assert kind.modality is row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_flags_of_a_row_go_together(row: Modality) -> None:
    for add_flags, check_flags in (row.precompute_flags, row.evaluation_flags):
        assert flags_of(add_flags)
        assert list(inspect.signature(check_flags).parameters) == ["args"]
    assert row.request_names() == set(flags_of(*row.request_flags))


def test_a_flag_means_one_thing() -> None:
    """A request flag that two modalities take is declared by one group, else argparse refuses the second."""
    shared = flags_of(add_request_args)
    for row in ROWS:
        own = flags_of(*row.request_flags)
        assert own.items() <= shared.items()
        others = [each.request_names() for each in ROWS if each is not row]
        assert row.request_names() - set().union(*others), "nothing can be asked of this modality alone"
