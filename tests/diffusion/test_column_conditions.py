"""Conditions that are columns: what is dropped or missing is null, sums of them, and which are hidden."""

import math

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tests.support.crystals.sets import COLUMNS, VALUES, WIDTH
from utils.diffusion.conditions import COLUMN_CONDITIONS, ColumnCondition, ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.draws import SampleDraws

# ---- conditions ------------------------------------------------------------------------------------------------------

# kind -> settings, values of which the last two are missing, and two that differ
KINDS = {
    "property": ({"mean": 1.5, "std": 0.5}, torch.tensor([1.0, 2.0, math.nan, math.inf])),
    "composition": ({"num_elements": 4}, torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1], [0.0] * 4, [0.0] * 4])),
    "chemical_system": ({"num_elements": 4}, torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1], [0.0] * 4, [0.0] * 4])),
    "class": ({"names": ["a", "b", "c"]}, torch.tensor([0, 2, -1, -1])),
}


def test_every_kind_is_tested():
    assert KINDS.keys() == COLUMN_CONDITIONS.keys()


@pytest.fixture(params=KINDS)
def kind(request):
    torch.manual_seed(0)
    settings, values = KINDS[request.param]
    return COLUMN_CONDITIONS[request.param](8, **settings), values


@torch.no_grad()
def test_null_where_dropped_or_missing(kind):
    condition, values = kind
    kept = condition(values, torch.zeros(4, dtype=torch.bool))
    assert torch.isfinite(kept).all()
    assert torch.equal(kept[2:], condition.null_embedding.expand(2, -1))
    assert (kept[0] - kept[1]).abs().max() > 1e-4
    assert all((row - condition.null_embedding).abs().max() > 1e-4 for row in kept[:2])
    dropped = condition(values, torch.tensor([True, False, True, False]))
    assert torch.equal(dropped[0], condition.null_embedding)
    assert torch.equal(dropped[1:], kept[1:])


def test_gradients_reach_every_parameter_and_are_finite(kind):
    """With missing values in the batch, whose embeddings are not used."""
    condition, values = kind
    condition(values, torch.zeros(4, dtype=torch.bool)).square().sum().backward()
    for name, parameter in condition.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_conditions_save_and_load(kind, tmp_path):
    condition, values = kind
    condition.save_pretrained(tmp_path)
    loaded = type(condition).from_pretrained(tmp_path)
    drop = torch.tensor([True, False, False, False])
    with torch.no_grad():
        assert torch.equal(loaded(values, drop), condition(values, drop))


@torch.no_grad()
def test_properties_are_standardised():
    """The same standardised value has the same embedding, whatever mean and std."""
    torch.manual_seed(0)
    plain = COLUMN_CONDITIONS["property"](8)
    scaled = COLUMN_CONDITIONS["property"](8, mean=-300.0, std=50.0)
    scaled.load_state_dict(plain.state_dict())
    drop, values = torch.zeros(3, dtype=torch.bool), torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(scaled(-300 + 50 * values, drop), plain(values, drop))
    assert (plain(values, drop) - plain(-300 + 50 * values, drop)).abs().max() > 1e-3


def columns_sum() -> ConditionSum:
    torch.manual_seed(0)
    return ConditionSum(WIDTH, COLUMNS)


@torch.no_grad()
def test_a_sum_of_conditions():
    """What each gives by itself, with a drop of all and of each; a name that is not given is null."""
    condition = columns_sum()
    encoders = dict(zip(COLUMNS, condition.encoders, strict=True))
    nulls = [encoder.null_embedding for encoder in encoders.values()]
    assert len({tuple(null.tolist()) for null in nulls}) == len(COLUMNS)
    drops = torch.tensor([[True, False, True], [False, True, False], [False, False, False], [True, True, True]])
    expected = sum(encoder(VALUES[name], drops[:, i]) for i, (name, encoder) in enumerate(encoders.items()))
    found = condition(VALUES, drops).pooled_projections
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[3], sum(nulls))
    assert condition(VALUES, drops).encoder_hidden_states is None
    every = torch.tensor([True, False, True, False])
    torch.testing.assert_close(
        condition(VALUES, every).pooled_projections,
        condition(VALUES, every[:, None].expand(-1, 3)).pooled_projections,
    )
    torch.testing.assert_close(condition(VALUES, every).pooled_projections[0], sum(nulls))
    none = torch.zeros(4, dtype=torch.bool)
    for i, name in enumerate(COLUMNS):
        rest = {key: value for key, value in VALUES.items() if key != name}
        alone = torch.zeros(4, 3, dtype=torch.bool)
        alone[:, i] = True
        torch.testing.assert_close(
            condition(rest, none).pooled_projections, condition(VALUES, alone).pooled_projections
        )
    torch.testing.assert_close(condition({}, none).pooled_projections, sum(nulls).expand(4, -1))


def test_gradients_reach_every_condition_of_a_sum():
    condition = columns_sum()
    condition(VALUES, torch.tensor([False, False, False, True])).pooled_projections.square().sum().backward()
    assert [name for name, each in condition.named_parameters() if each.grad is None or not each.grad.any()] == []


@pytest.mark.parametrize("names", [tuple(COLUMNS), tuple(reversed(COLUMNS))])
def test_a_sum_saves_and_loads(names, tmp_path):
    """In whatever order its columns are named: a file has them in alphabetical order."""
    torch.manual_seed(0)
    condition = ConditionSum(WIDTH, {name: COLUMNS[name] for name in names})
    condition.save_pretrained(tmp_path)
    loaded = ConditionSum.from_pretrained(tmp_path)
    drops = torch.tensor([[True, False, True], [False, True, False], [False, False, False], [False, False, True]])
    with torch.no_grad():
        assert torch.equal(loaded(VALUES, drops).pooled_projections, condition(VALUES, drops).pooled_projections)
        for i, name in enumerate(sorted(names)):  # the order of drops
            alone = torch.zeros(4, 3, dtype=torch.bool)
            alone[:, i] = True
            rest = {key: value for key, value in VALUES.items() if key != name}
            without = loaded(rest, torch.zeros(4, dtype=torch.bool)).pooled_projections
            torch.testing.assert_close(loaded(VALUES, alone).pooled_projections, without)


class CellCondition(ColumnCondition):
    """As a user would write one: three lengths (B, 3), zero = missing."""

    @register_to_config
    def __init__(self, embedding_dim: int, scale: float = 1.0):
        super().__init__(embedding_dim)
        self.linear = nn.Linear(3, embedding_dim)

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(values / self.config.scale), ~values.any(dim=1)


def test_a_condition_of_ones_own(monkeypatch, tmp_path):
    """A subclass and a row in the table, and it trains, drops, saves and loads beside the others."""
    monkeypatch.setitem(COLUMN_CONDITIONS, "cell", CellCondition)
    condition = ConditionSum(8, {"band_gap": COLUMNS["band_gap"], "cell": {"kind": "cell", "scale": 5.0}})
    values = {"band_gap": VALUES["band_gap"], "cell": torch.tensor([[5.0, 5, 5], [4, 5, 6], [0, 0, 0], [3, 3, 3]])}
    drop = torch.tensor([False, False, False, True])
    found = condition(values, drop).pooled_projections
    found.square().sum().backward()
    assert condition.encoders[1].linear.weight.grad.any()
    first, second = condition.encoders
    torch.testing.assert_close(found[0], first(values["band_gap"], drop)[0] + second.linear(torch.ones(3)))
    torch.testing.assert_close(found[2], first.null_embedding + second.null_embedding)  # both are missing there
    torch.testing.assert_close(found[3], first.null_embedding + second.null_embedding)
    condition.save_pretrained(tmp_path)
    assert torch.equal(ConditionSum.from_pretrained(tmp_path)(values, drop).pooled_projections, found)


# ---- which conditions are hidden -------------------------------------------------------------------------------------

NUM_DRAWS = 40_000


def draw_drop(draws, prob, names):
    """What a denoiser with properties of these names hides."""
    columns = {name: {"kind": "property", "mean": 0.0, "std": 1.0} for name in names}
    conditions = ConditionSum(8, columns) if columns else NoCondition()
    return ConditionalDenoiser(nn.Identity(), conditions).draw_drop(draws, prob)


@pytest.mark.parametrize("prob", [0.1, 0.3])
def test_conditions_are_hidden_together_and_alone(prob):
    """All of them with p + (1 - p) p^K, each with p + (1 - p) p, one alone with (1 - p) p (1 - p)^(K - 1)."""
    names = ["a", "b", "c"]
    drops = draw_drop(SampleDraws(0, torch.arange(NUM_DRAWS)), prob, names)
    assert drops.shape == (NUM_DRAWS, 3)
    assert drops.dtype == torch.bool
    tolerance = 4 * math.sqrt(0.25 / NUM_DRAWS)
    assert drops.all(dim=1).float().mean().item() == pytest.approx(prob + (1 - prob) * prob**3, abs=tolerance)
    for i in range(3):
        assert drops[:, i].float().mean().item() == pytest.approx(prob + (1 - prob) * prob, abs=tolerance)
        alone = drops[:, i] & (drops.sum(dim=1) == 1)
        assert alone.float().mean().item() == pytest.approx((1 - prob) * prob * (1 - prob) ** 2, abs=tolerance)


@pytest.mark.parametrize("names", [[], ["a"]])
def test_one_condition_is_hidden_as_everywhere(names):
    drops = draw_drop(SampleDraws(0, torch.arange(NUM_DRAWS)), 0.2, names)
    assert drops.shape == (NUM_DRAWS,)
    assert drops.float().mean().item() == pytest.approx(0.2, abs=0.01)
    several = draw_drop(SampleDraws(0, torch.arange(NUM_DRAWS)), 0.2, ["a", "b"])
    assert several[drops].all()  # the samples that are told nothing are the same


def test_what_is_hidden_depends_on_the_position_alone():
    whole = draw_drop(SampleDraws(3, torch.arange(100)), 0.5, ["a", "b"])
    places = torch.tensor([99, 4, 4, 50])
    assert torch.equal(draw_drop(SampleDraws(3, places), 0.5, ["a", "b"]), whole[places])
    assert not torch.equal(draw_drop(SampleDraws(4, torch.arange(100)), 0.5, ["a", "b"]), whole)
    others = draw_drop(SampleDraws(3, torch.arange(100)), 0.5, ["b", "c"])
    assert torch.equal(others[:, 0], whole[:, 1])  # each by its name


@pytest.mark.parametrize(("prob", "expected"), [(0.0, False), (1.0, True)])
def test_never_and_always(prob, expected):
    drops = draw_drop(SampleDraws(0, torch.arange(1000)), prob, ["a", "b"])
    assert (drops == expected).all()
