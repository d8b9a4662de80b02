"""What is asked of a run: cells as trained, values of conditions, batches for the decoder, and a sample that is its own."""

import math
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.support.cells.models import BATCHES, CHANNELS, GENES, TIMESTEPS, WIDTH, make_vae, normals
from tests.support.processes import with_random_weights
from utils.diffusion.conditions import ConditionSum, NoCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.objectives import training_scheduler
from utils.diffusion.sampling import sampling_scheduler
from utils.errors import UserError
from utils.expression.pipeline import ExpressionPipeline
from utils.expression.sampler import Sampler, as_trained, condition_values, draw_batches
from utils.latents.spec import Normalisation
from utils.models.vector_mlp import VectorMLP

COLUMNS = {
    "cell_type": {"kind": "class", "names": ["B", "NK", "T"]},
    "age": {"kind": "property", "mean": 40.0, "std": 10.0},
}
TYPES = np.array(["T"] * 60 + ["B"] * 30 + ["NK"] * 8 + [None] * 2, dtype=object)
KNOWN = {
    "cell_type": TYPES,
    "age": np.where(np.arange(100) % 10 == 9, np.nan, np.arange(100.0)),
    "donor": np.array(["D1", "D2", "D3", "D1"] * 25, dtype=object),
}
KNOWN["donor"][:60] = "D3"  # that of every T cell


def make_pipeline(columns=COLUMNS, **settings) -> ExpressionPipeline:
    conditions = with_random_weights(ConditionSum(6, columns)) if columns else NoCondition()
    torch.manual_seed(0)
    model = VectorMLP(CHANNELS + 1, 2, WIDTH, projection_class_embeddings_input_dim=6 if columns else None)
    denoiser = ConditionalDenoiser(with_random_weights(model), conditions).eval()
    normalisation = Normalisation((0.1,) * CHANNELS + (6.0,), (0.9,) * CHANNELS + (0.4,))
    known = {name: KNOWN[name] for name in (*columns, *(["donor"] if "batch_names" in settings else []))}
    scheduler = sampling_scheduler(training_scheduler("flow"))
    return ExpressionPipeline(denoiser, scheduler, make_vae(**settings), normalisation, known)


def test_cells_as_trained():
    """In the proportions of the training set, with all that is known of a training cell together, and nothing else."""
    pipeline = make_pipeline()
    requests = as_trained(pipeline, 6000, 0)
    found = Counter(request.get("cell_type") for request in requests)
    expected = Counter(TYPES.tolist())
    assert set(found) == set(expected)
    assert chisquare([found[name] for name in expected], [60 * times for times in expected.values()]).pvalue > 1e-3
    rows = {(name, None if math.isnan(age) else age) for name, age in zip(TYPES, KNOWN["age"], strict=True)}
    assert {(request.get("cell_type"), request.get("age")) for request in requests} == rows
    assert as_trained(pipeline, 5, 100) == requests[100:105]  # each belongs to its seed
    assert as_trained(make_pipeline({}), 3, 0) == [{}] * 3


def test_values_of_conditions():
    pipeline = make_pipeline()
    values = condition_values(pipeline, [{"cell_type": "T", "age": 61.5}, {"age": 3.0}, {"cell_type": "B"}, {}])
    assert values["cell_type"].tolist() == [2, -1, 0, -1]
    assert values["age"][:2].tolist() == [61.5, 3.0]
    assert values["age"][2:].isnan().all()
    assert list(condition_values(pipeline, [{"cell_type": "T"}])) == ["cell_type"]
    assert condition_values(pipeline, [{}, {}]) == {}
    alone = condition_values(pipeline, [{"cell_type": "T", "age": 61.5}])  # what is missing is not told, however said
    noisy, drop = normals(1, CHANNELS + 1), torch.tensor([False])
    for name in alone:
        left = {name: alone[name]}
        missing = condition_values(pipeline, [{name: 61.5 if name == "age" else "T"}, {"cell_type": "B", "age": 1.0}])
        first = {each: tensor[:1] for each, tensor in missing.items()}
        with torch.no_grad():
            one, other = (pipeline.denoiser(noisy, TIMESTEPS[:1], each, drop) for each in (left, first))
        torch.testing.assert_close(one, other)


def test_batches_for_the_decoder():
    """Those of training cells of the same type; the one that is asked for; of a type that no cell has, any."""
    pipeline = make_pipeline(**BATCHES)
    drawn = draw_batches(pipeline, [{"cell_type": "T"}] * 50 + [{"cell_type": "B"}] * 300 + [{}] * 3000, 0)
    assert set(drawn[:50]) == {2}
    of_b = Counter(KNOWN["donor"][60:90])
    found = Counter(BATCHES["batch_names"][i] for i in drawn[50:350])
    assert chisquare([found[name] for name in of_b], [10 * times for times in of_b.values()]).pvalue > 1e-3
    found, everywhere = Counter(drawn[350:].tolist()), Counter(KNOWN["donor"])
    expected = [30 * everywhere[name] for name in BATCHES["batch_names"]]
    assert chisquare([found[i] for i in range(3)], expected).pvalue > 1e-3
    np.testing.assert_array_equal(draw_batches(pipeline, [{}] * 10, 360), draw_batches(pipeline, [{}] * 20, 350)[10:])
    assert draw_batches(make_pipeline(), [{}], 0) is None


@pytest.mark.parametrize("kind", ["class", "property"])
def test_a_batch_that_is_a_condition_is_the_one_asked_for(kind):
    """Numbers too, whole or not."""
    names = ["1", "2"]
    settings = {"kind": "class", "names": names} if kind == "class" else {"kind": "property", "mean": 1.5, "std": 0.5}
    pipeline = make_pipeline(batch_column="lane", batch_names=names, columns={})
    pipeline.training_columns = {"lane": np.array([1.0, 2.0] * 20)}
    pipeline.denoiser.conditions = ConditionSum(6, {"lane": settings})
    asked = "2" if kind == "class" else 2.0
    assert draw_batches(pipeline, [{"lane": asked}] * 8, 0).tolist() == [1] * 8
    if kind == "property":  # between two batches: either
        assert set(draw_batches(pipeline, [{"lane": 1.5}] * 40, 0)) == {0, 1}


def sample(pipeline, requests, seed: int, batch_size: int, guidance_scale: float = 2.0):
    """Counts (n, G) and library sizes (n,)."""
    args = Namespace(
        guidance_scale=guidance_scale, guidance_interval=[0.0, 1.0], guidance_rescale=0.0, num_inference_steps=3
    )
    found = Sampler(args, Path("run"), pipeline, guide=None).sample(requests, seed, batch_size, "no")
    return tuple(np.stack(parts) for parts in zip(*(cell for batch in found for cell in batch), strict=True))


@pytest.mark.parametrize("settings", [{}, BATCHES, {"likelihood": "zinb"}, {"likelihood": "gaussian"}], ids=str)
def test_a_sample_is_its_own(settings):
    """Whatever stands beside it; counts too, for they are drawn by a seed of their own."""
    pipeline = make_pipeline(**settings)
    requests = [{"cell_type": "T", "age": 50.0}, {"cell_type": "B"}, {}, {"age": 10.0}] * 3
    counts, library_sizes = sample(pipeline, requests, 5, 100)
    assert counts.shape == (12, GENES)
    assert (counts == np.rint(counts)).all()
    assert counts.min() >= 0
    for size in (1, 5):
        mine, libraries = sample(pipeline, requests, 5, size)
        np.testing.assert_allclose(libraries, library_sizes, rtol=1e-4)
        assert (mine != counts).mean() < 0.01  # a mean that is rounded otherwise may tip a draw
    np.testing.assert_allclose(sample(pipeline, requests[4:], 9, 100)[1], library_sizes[4:], rtol=1e-4)
    assert (sample(pipeline, requests, 50, 100)[1] != library_sizes).all()


@pytest.mark.parametrize("fault", ["not finite", "without bounds"])
def test_a_run_that_gives_no_cells_is_refused(fault):
    """Libraries of more counts than could be drawn, too."""
    pipeline = make_pipeline()
    with torch.no_grad():
        bias = pipeline.denoiser.model.proj_out.bias
        bias.fill_(math.nan) if fault == "not finite" else bias.fill_(-500.0)  # flow goes against its velocity
    with pytest.raises(UserError, match="--model: it gives cells that are not finite"):
        sample(pipeline, [{}] * 2, 0, 8, guidance_scale=1.0)
