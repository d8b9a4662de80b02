"""Evaluation while a model trains: latents that are held out, what is best so far, and when to stop."""

import importlib
import json
import math
import os
import signal
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.scripts.test_sharding import FSDP
from tests.support.models import cache_flags
from tests.support.processes import ROOT, Fault, SignalAt, contents, refused, run, scalars
from tests.training.test_control import OneProcess, clock  # noqa: F401
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.objectives import OBJECTIVES, training_scheduler
from utils.draws import SampleDraws
from utils.errors import UserError
from utils.image.evaluation.classifier import ImageClassifier
from utils.image.evaluation.features import load_features
from utils.image.pipeline import load_run
from utils.image.validation import fid, held_out_requests, kid
from utils.latents.cache import LatentCache, LatentStream
from utils.latents.spec import LatentSpec
from utils.plan import instruments as measuring
from utils.plan.arithmetic import Overheads, planned_steps
from utils.runs.load import newest_run
from utils.training import evaluator as evaluation
from utils.training.control import RunControl
from utils.training.evaluator import Evaluator, without_improvement
from utils.training.held_out import check_split, hold_out, open_split, stratified, validation_losses

TEXT, CLASS = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"
TRAIN = [
    *("--max_train_steps", 12, "--checkpointing_steps", 4, "--logging_steps", 1, "--train_batch_size", 4),
    *("--learning_rate", 3e-3, "--lr_warmup_steps", 0, "--prediction_type", "flow"),
]
GRIDS = ["--validation_labels", 0, "--num_validation_images", 1, "--validation_inference_steps", 2]
HELD_OUT = ["--eval_steps", 2, "--num_validation_samples", 12]
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def opened(cache):
    return LatentCache(cache)


@pytest.fixture(scope="module")
def flow():
    return OBJECTIVES["flow"](training_scheduler("flow"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """`--eval_features` of a small classifier with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    ImageClassifier(num_classes=3, resolution=16, block_out_channels=(4, 8)).save_pretrained(folder)
    return f"classifier:{folder}"


@pytest.fixture(scope="module")
def other_split(tmp_path_factory, tiny_vae, tiny_text_encoder):
    """A cache made like `cache`, of other images."""
    images = tmp_path_factory.mktemp("split")
    lines, generator = [], np.random.default_rng(1)
    for i in range(15):
        Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(images / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": ["noise"], "label": i % 3}))
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path_factory.mktemp("other") / "latents"
    run("precompute_latents.py", *cache_flags(images, tiny_vae, tiny_text_encoder), "--latents_dir", folder)
    return folder


@pytest.fixture(scope="module")
def common(cache, model_flags):
    """Of the class-conditional trainer."""
    return ["--latents_dir", cache, *model_flags["dit"], *TRAIN, *GRIDS]


@pytest.fixture(scope="module")
def uninterrupted(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = run(CLASS, *common, *HELD_OUT, "--output_dir", folder)
    assert "36 samples in the data" in result.stderr
    assert "an evaluation takes about" in result.stderr
    return folder


def history_of(folder) -> list[dict[str, float]]:
    return json.loads((folder / "evaluations.json").read_text())["evaluations"]


def assert_same_model(one, other) -> None:
    ours, theirs = (load_file(next(folder.glob("transformer/*.safetensors"))) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_held_out_rows_are_random_the_same_and_nested(opened):
    few, more = hold_out(opened, 5), hold_out(opened, 20)
    assert set(few.rows) < set(more.rows)
    assert sorted([*more.rows, *more.training_rows]) == list(range(48))
    assert len(set(more.rows % 3)) == 3  # the labels of the data set go round
    assert sorted(more.rows) != list(more.rows)
    assert few.identity != more.identity
    with pytest.raises(UserError, match="--num_validation_samples 48: the cache has 48 rows"):
        hold_out(opened, 48)


def test_a_stream_without_held_out_rows(opened):
    """Over three epochs each training row comes three times, and no other; with none held out it is as it always was."""
    held_out = hold_out(opened, 12)
    stored = opened.gather(np.arange(48))["latents"].flatten(1)
    mirrored = opened.gather(np.arange(48), variant_draw=np.full(48, 0.5))["latents"].flatten(1)

    def rows_of(stream, count):
        latents = stream.__getitems__(list(range(count)))["latents"].flatten(1)
        found = [(stored == each).all(1) | (mirrored == each).all(1) for each in latents]
        return [int(each.nonzero()[0, 0]) for each in found]

    seen = rows_of(LatentStream(opened, 3, held_out.training_rows), 108)
    assert sorted(seen) == sorted(list(held_out.training_rows) * 3)
    stream = LatentStream(opened, 3)
    assert rows_of(stream, 96) == stream.order.rows(np.arange(96)).tolist()


@dataclass(frozen=True)
class Watched(Fault):
    """Writes down the rows that the stream of training reads (they alone may be mirrored), one line a batch."""

    path: str = ""

    def install(self) -> None:
        owner = importlib.import_module("utils.latents.cache").LatentCache
        gather = owner.gather

        def watched(cache, rows, variant_draw=None, caption_draw=None):
            if variant_draw is not None:
                with open(self.path, "a") as file:
                    file.write(json.dumps(rows.tolist()) + "\n")
            return gather(cache, rows, variant_draw, caption_draw)

        owner.gather = watched


@pytest.mark.parametrize("script", [TEXT, CLASS])
def test_held_out_rows_never_reach_training(opened, cache, model_flags, tmp_path, script):
    watched = Watched("", 0, path=str(tmp_path / "rows"))
    flags = ["--latents_dir", cache, *model_flags["dit"], *TRAIN, *HELD_OUT]
    run(script, *flags, "--output_dir", tmp_path / "run", "--seed", 7, fault=watched)
    seen = {row for line in (tmp_path / "rows").read_text().splitlines() for row in json.loads(line)}
    assert seen == set(hold_out(opened, 12).training_rows.tolist())


def test_another_split(opened, other_split, cache):
    held_out = open_split(opened, other_split)
    assert (len(held_out), held_out.training_rows) == (15, None)
    assert held_out.cache.normalisation == opened.normalisation
    ours, other = opened.spec, LatentSpec.read(other_split)
    for changed, words in (
        ({"shape": (4, 8, 8)}, r"shape = \(4, 8, 8\)"),
        ({"fingerprint": other.fingerprint | {"resolution": 32}}, "resolution = 32"),
        ({"fingerprint": other.fingerprint | {"content": "mean"}}, "content = mean"),
        ({"captions": None}, "captions = None"),
        ({"labels": None}, "labels = None"),
        ({"labels": {"num_classes": 4, "names": None}}, "labels up to 3"),
    ):
        with pytest.raises(UserError, match=f"--validation_latents_dir: .*{words}"):
            check_split(ours, replace(other, **changed))
    with pytest.raises(UserError, match="the cache that is trained on"):
        open_split(opened, cache)
    with pytest.raises(UserError, match=r"--validation_latents_dir: .* does not exist"):
        open_split(opened, "nowhere")


# ---- the loss -------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Predicts the same share of its input, and notes the timesteps."""

    def __init__(self, share: float):
        super().__init__()
        self.share, self.timesteps = share, []

    def forward(self, noisy_latents, timesteps, values, drop):
        assert not drop.any()
        self.timesteps += timesteps.tolist()
        return self.share * noisy_latents


def test_timesteps_lie_one_in_each_stratum():
    rows = np.random.default_rng(0).permutation(1000)[:50]
    drawn = torch.cat([stratified(rows, np.arange(50), 50, quarter) for quarter in range(4)])
    assert ((drawn * 200).long() == torch.arange(200)).all()
    parts = torch.cat([stratified(rows[i : i + 7], np.arange(50)[i : i + 7], 50, 3) for i in range(0, 50, 7)])
    assert torch.equal(parts, drawn[150:])
    assert stratified(np.array([0]), np.array([10**9 - 1]), 10**9, 3) < 1


def test_the_loss_by_closed_form(accelerator, opened):
    """Of epsilon = noise ~ N(0, 1) predicted as 0 the loss is 1; with x0 as target, the second moment of the latents."""
    held_out = hold_out(opened, 40)
    epsilon = OBJECTIVES["epsilon"](training_scheduler("epsilon"))
    losses = validation_losses(accelerator, Model(0.0), held_out, epsilon, 16)
    assert losses == pytest.approx([1] * 4, abs=4 * (2 / (40 * 64)) ** 0.5)
    model = Model(0.0)
    losses = validation_losses(accelerator, model, held_out, OBJECTIVES["sample"](training_scheduler("sample")), 16)
    moments = opened.gather(held_out.rows)["latents"].double()
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (opened.normalisation.mean, opened.normalisation.std))
    expected = (((moments[:, 0] - mean) / std).square() + (moments[:, 1] / std).square()).mean().item()
    assert sum(losses) / 4 == pytest.approx(expected, rel=0.1)
    assert sorted(int(t) * 4 // 1000 for t in model.timesteps) == sorted([0, 1, 2, 3] * 40)


def test_the_loss_by_hand(accelerator, opened, flow):
    """Sample by sample, with the formulas of rectified flow written out."""
    held_out, total = hold_out(opened, 6), [0.0] * 4
    for quarter in range(4):
        for place, row in enumerate(held_out.rows):
            draws = SampleDraws(4_242_424_242 + quarter, torch.tensor([row]))
            latents = opened.normalise(opened.gather(np.array([row])), draws)
            noise = draws.normal("noise", latents.shape)
            uniform = stratified(np.array([row]), np.array([place]), 6, quarter).double()
            sigma = torch.sigmoid(torch.special.ndtri(uniform)).item()
            prediction = 0.5 * ((1 - sigma) * latents + sigma * noise)
            total[quarter] += (prediction - (noise - latents)).square().mean().item() / 6
    found = validation_losses(accelerator, Model(0.5), held_out, flow, 4)
    assert found == pytest.approx(total, rel=1e-5)


def test_the_loss_depends_on_nothing_but_the_weights(accelerator, opened, flow):
    """Neither on the random state, which it leaves alone, nor on the batch size."""
    held_out = hold_out(opened, 12)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = validation_losses(accelerator, Model(0.5), held_out, flow, 5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert validation_losses(accelerator, Model(0.5), held_out, flow, 5) == first
    assert validation_losses(accelerator, Model(0.5), held_out, flow, 12) == pytest.approx(first, rel=1e-6)
    assert validation_losses(accelerator, Model(0.4), held_out, flow, 5) != first


def test_kid_and_fid_of_few_samples():
    """KID is unbiased: its mean over pairs of small sets of one distribution is 0, as FID's is not."""
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(200, 2, 16, 4, generator=generator)
    values = torch.tensor([kid(*pair) for pair in sets])
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5
    assert kid(sets[0, 0], sets[0, 1] + 1) > 10 * values.std()
    assert fid(sets[0, 0], sets[0, 0]) == pytest.approx(0, abs=1e-6)
    assert fid(sets[0, 0], sets[0, 0] + 2) == pytest.approx(16, rel=1e-6)


# ---- runs -----------------------------------------------------------------------------------------------------------


def training_state(folder) -> dict[str, torch.Tensor]:
    state = {}
    for path in sorted(folder.glob("checkpoint-*/*.safetensors")):
        state |= {f"{path.parent.name}/{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(folder.glob("checkpoint-*/optimizer.bin")):
        for index, each in torch.load(path, weights_only=True)["state"].items():
            state |= {f"{path.parent.name}/{index}/{k}": v for k, v in each.items() if torch.is_tensor(v)}
    return state


@pytest.mark.parametrize(("script", "model"), [(TEXT, "unet"), (CLASS, "dit")])
def test_evaluation_does_not_touch_training(cache, other_split, classifier, model_flags, tmp_path, script, model):
    """Losses, weights, averages and optimizer are bit-identical with the loss and samples of another split, and without."""
    flags = ["--latents_dir", cache, *model_flags[model], *TRAIN, "--max_train_steps", 8]
    flags += ["--ema_sigma_rels", 0.1]
    evaluated = ["--eval_steps", 2, "--validation_latents_dir", other_split, "--eval_features", classifier]
    evaluated += ["--num_eval_images", 6, "--eval_guidance_scale", 2, "--eval_batch_size", 4]
    evaluated += ["--validation_inference_steps", 2]
    run(script, *flags, "--output_dir", tmp_path / "plain")
    run(script, *flags, *evaluated, "--output_dir", tmp_path / "evaluated")
    ours, theirs = training_state(tmp_path / "evaluated"), training_state(tmp_path / "plain")
    assert len(ours) > 100
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for tag in ("train/loss", "train/grad_norm"):
        assert scalars(tmp_path / "evaluated", tag) == scalars(tmp_path / "plain", tag)
    for tag in ("validation/loss", "validation/loss_quarter_4", "validation/kid_classifier"):
        values = scalars(tmp_path / "evaluated", tag)
        assert list(values) == [2, 4, 6, 8]
        assert len(set(values.values())) == 4


def test_two_processes_give_the_same(common, uninterrupted, classifier, tmp_path):
    """And two that divide the weights between them."""
    samples = ["--eval_features", classifier, "--num_eval_images", 5, "--eval_batch_size", 2]
    run(CLASS, *common, *HELD_OUT, *samples, "--output_dir", tmp_path / "one", "--max_train_steps", 2)
    for name, environment in (("two", {}), ("divided", FSDP)):
        flags = [*common, *HELD_OUT, *samples, "--train_batch_size", 2, "--max_train_steps", 2]
        run(CLASS, *flags, "--output_dir", tmp_path / name, processes=2, environment=environment)
        (ours,), (theirs,) = history_of(tmp_path / name), history_of(tmp_path / "one")
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3, abs=1e-5)
        best, one = (
            load_file(next((tmp_path / each / "best").glob("transformer/*.safetensors"))) for each in (name, "one")
        )
        for key, tensor in one.items():
            torch.testing.assert_close(best[key], tensor, rtol=1e-3, atol=1e-3)
    first = history_of(uninterrupted)[0]["validation/loss"]  # of larger batches
    assert history_of(tmp_path / "one")[0]["validation/loss"] == pytest.approx(first, rel=1e-6)


def test_best_is_the_average_and_can_be_sampled(accelerator, cache, opened, flow, uninterrupted, tmp_path):
    """The figure in the log is that of the weights in `best/`, and lower than that of the first evaluation; the weights
    that are trained have another."""
    history = history_of(uninterrupted)
    assert [each["global_step"] for each in history] == [2, 4, 6, 8, 10, 12]
    assert [each["validation/loss"] for each in history] == pytest.approx(
        list(scalars(uninterrupted, "validation/loss").values())
    )
    kept = json.loads((uninterrupted / "best" / "evaluation.json").read_text())
    lowest = min(history, key=lambda each: each["validation/loss"])
    assert {key: kept[key] for key in lowest} == lowest
    assert lowest["validation/loss"] < history[0]["validation/loss"]
    held_out = hold_out(opened, 12)

    def loss_of(model):
        return sum(validation_losses(accelerator, model, held_out, flow, 32)) / 4

    pipeline = load_run(uninterrupted / "best")
    assert loss_of(ConditionalDenoiser(pipeline.denoiser, pipeline.conditions)) == pytest.approx(
        lowest["validation/loss"], rel=1e-6
    )
    step = lowest["global_step"]
    assert step in (4, 8, 12), "no checkpoint of the best to compare with: change the learning rate"
    average = load_run(uninterrupted / f"checkpoint-{step}")
    trained = ConditionalDenoiser(average.denoiser, average.conditions)
    assert loss_of(trained) == pytest.approx(lowest["validation/loss"], rel=1e-6)
    trained.load_state_dict(load_file(uninterrupted / f"checkpoint-{step}" / "model.safetensors"))
    assert loss_of(trained) != pytest.approx(lowest["validation/loss"], rel=1e-4)
    os.utime(uninterrupted / "best" / "model_index.json")
    assert newest_run(uninterrupted.parent) == uninterrupted
    result = run(
        *("sample.py", "--model", uninterrupted / "best", "--class_labels", 0, "--num_images_per_prompt", 1),
        *("--num_inference_steps", 2, "--output_dir", tmp_path / "samples"),
    )
    assert "1 images" in result.stdout
    assert (tmp_path / "samples" / "00000.png").is_file()


def test_killed_and_resumed_run_has_the_same_best(common, uninterrupted, tmp_path):
    """Killed after evaluations that no checkpoint followed, and while a best one was put in its place."""
    folder = tmp_path / "run"
    flags = [*common, *HELD_OUT, "--output_dir", folder, *LATEST]
    for fault in (
        SignalAt("utils.training.step_log:StepLog.step_done", 7),
        SignalAt("utils.training.evaluator:step_of", 2),
        SignalAt("utils.training.evaluator:Evaluator._write_history", 3),
    ):
        assert run(CLASS, *flags, fault=fault, check=False).returncode == -signal.SIGKILL
    run(CLASS, *flags)
    assert history_of(folder) == history_of(uninterrupted)
    assert_same_model(folder / "best", uninterrupted / "best")
    ours, theirs = (contents(each / "best") for each in (folder, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert not list(folder.glob(".tmp*"))
    spares = [{path.name for path in each.glob(".best-*")} for each in (folder, uninterrupted)]
    assert spares[0] == spares[1]


STILL = ["--learning_rate", 1e-30, "--adam_weight_decay", 0, "--early_stopping_patience", 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_patience_ends_a_run_that_does_not_improve(common, tmp_path, processes):
    """The weights stand still: the first evaluation is the best, two more in vain end the run, and a kill in between
    does not change that. It is an ordinary end; going on ends at once."""
    folder = tmp_path / "run"
    flags = [*common, *HELD_OUT, *STILL, "--train_batch_size", 4 // processes, "--output_dir", folder, *LATEST]
    killed = run(
        CLASS, *flags, processes=processes, fault=SignalAt("utils.training.step_log:StepLog.step_done", 5), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [each["global_step"] for each in history_of(folder)] == [2, 4]
    result = run(CLASS, *flags, processes=processes)
    assert "ended after step 6: --early_stopping_patience 2" in result.stderr
    assert f"is of step 2: {folder / 'best'}" in result.stderr
    assert [each["global_step"] for each in history_of(folder)] == [2, 4, 6]
    assert json.loads((folder / "best" / "evaluation.json").read_text())["global_step"] == 2
    assert (folder / "checkpoint-6" / "manifest.json").is_file()
    assert (folder / "model_index.json").is_file()
    if processes == 1:
        again = run(CLASS, *flags)
        assert "ended after step 6" in again.stderr
        assert not (folder / "checkpoint-7").exists()
        longer = run(CLASS, *flags, "--early_stopping_patience", 3)
        assert "ended after step 8" in longer.stderr


def test_an_unconditional_run_is_evaluated_too(cache, model_flags, classifier, tmp_path):
    flags = ["--latents_dir", cache, *model_flags["unet"], *TRAIN, "--max_train_steps", 2, "--unconditional"]
    samples = ["--eval_features", classifier, "--eval_metric", "fid", "--validation_inference_steps", 2]
    result = run(CLASS, *flags, *HELD_OUT, *samples, "--best_metric", "samples", "--output_dir", tmp_path / "run")
    assert "validation/fid_classifier" in result.stderr
    kept = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    assert kept["best_metric"] == "validation/fid_classifier"
    assert kept["validation/fid_classifier"] > 0
    assert kept["samples"].startswith(f"12 images in {load_features(classifier, 'cpu').name}, guidance 1, 2 steps")


def test_samples_are_made_for_the_conditions_of_held_out_rows(cache, opened):
    rows = hold_out(opened, 7).rows
    table = load_from_disk(str(cache / "latents"))
    assert held_out_requests(hold_out(opened, 7), "text", 5) == [
        {"prompt": table[int(i)]["caption"][0]} for i in rows[:5]
    ]
    assert held_out_requests(hold_out(opened, 7), "class", 5) == [
        {"class_labels": table[int(i)]["label"]} for i in rows[:5]
    ]
    assert held_out_requests(hold_out(opened, 7), "none", 2) == [{}, {}]


def test_captions_by_token_ids_have_the_loss_of_their_states(
    cache, image_folder, tiny_vae, tiny_text_encoder, model_flags, tmp_path
):
    flags = [*cache_flags(image_folder, tiny_vae, tiny_text_encoder), "--max_cached_captions", 1]
    run("precompute_latents.py", *flags, "--latents_dir", tmp_path / "ids")
    for name, latents in (("states", cache), ("ids", tmp_path / "ids")):
        flags = ["--latents_dir", latents, *model_flags["dit"], *TRAIN, "--max_train_steps", 2]
        run(TEXT, *flags, *HELD_OUT, "--output_dir", tmp_path / f"run of {name}")
    values = [list(history_of(tmp_path / f"run of {name}")[0].values()) for name in ("states", "ids")]
    assert values[0] == pytest.approx(values[1], rel=2e-4)


def test_the_two_trainers_evaluate_alike():
    """The same text in both."""
    blocks = [
        ("    held_out = training_data", "    # Prepare\n"),
        ("    evaluator = None\n", "    step_log = StepLog("),
        ("        if evaluator is not None and (", "        if done % args.logging_steps"),
    ]
    for start, end in blocks:
        text, by_class = (
            source[source.index(start) : source.index(end)]
            for source in ((ROOT / each).read_text() for each in (TEXT, CLASS))
        )
        assert len(text) > 100
        assert text == by_class


# ---- the history ----------------------------------------------------------------------------------------------------


def test_without_improvement():
    nan, inf = math.nan, math.inf
    for values, min_delta, expected in (
        ([], 0, 0), ([3], 0, 0), ([3, 3], 0, 1), ([3, 2, 4, 5], 0, 2), ([3, 4, 2], 0, 0), ([nan, nan], 0, 2),
        ([3, nan, 2.9], 0, 0), ([3, 2.95, 2.9, 2.85], 0.1, 0), ([3, 2.95, 2.91], 0.1, 2), ([inf, 3], 0, 0),
    ):  # fmt: skip
        assert without_improvement(values, min_delta) == expected, (values, min_delta)


@pytest.fixture
def rigged(accelerator, opened, flow, monkeypatch, tmp_path):
    """(make(first_step, **settings), evaluate(evaluator, {step: loss})): an Evaluator whose losses are given."""
    losses: dict[int, float] = {}
    monkeypatch.setattr(evaluation, "validation_losses", lambda *_: [losses["now"]] * 4)

    def write_model(folder, model, step):
        folder.mkdir()
        save_file({"step": torch.tensor(step)}, folder / "model.safetensors")

    def make(first_step=0, **settings):
        return Evaluator(accelerator, tmp_path, hold_out(opened, 4), flow, write_model, first_step, 4, **settings)

    def evaluate(evaluator, given):
        for step, loss in given.items():
            losses["now"] = loss
            evaluator.evaluate(None, step)

    return make, evaluate


def best_step(folder) -> int:
    step = int(load_file(folder / "best" / "model.safetensors")["step"])
    assert json.loads((folder / "best" / "evaluation.json").read_text())["global_step"] == step
    return step


def checkpoint(folder, step) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "manifest.json").write_text("{}")


def test_best_of_a_past_that_is_given_up(rigged, tmp_path):
    make, evaluate = rigged
    evaluator = make()
    evaluate(evaluator, {1: 5.0, 2: 3.0, 3: 4.0})
    assert best_step(tmp_path) == 2
    checkpoint(tmp_path, 3)
    evaluate(evaluator, {4: 2.0, 5: math.nan, 6: 1.0})
    checkpoint(tmp_path, 6)
    assert best_step(tmp_path) == 6
    assert {path.name for path in tmp_path.glob(".best-*")} == {".best-2"}
    evaluator = make(first_step=3)  # evaluations 4 to 6 never were
    assert best_step(tmp_path) == 2
    assert [each["global_step"] for each in evaluator.history] == [1, 2, 3]
    evaluate(evaluator, {4: 3.5})
    assert best_step(tmp_path) == 2
    evaluate(evaluator, {5: 2.5})
    assert best_step(tmp_path) == 5
    make(first_step=1)  # what was the best then is gone: none is better than another one's
    assert not (tmp_path / "best").exists()
    evaluate(make(first_step=1), {2: 6.0, 3: 5.5})
    assert best_step(tmp_path) == 2


def test_what_was_best_goes_with_the_checkpoints(rigged, tmp_path):
    make, evaluate = rigged
    evaluator = make()
    for step in range(1, 7):
        evaluate(evaluator, {step: 10.0 - step})
        checkpoint(tmp_path, step)
        if step > 2:
            (tmp_path / f"checkpoint-{step - 2}" / "manifest.json").unlink()
    assert best_step(tmp_path) == 6
    assert {path.name for path in tmp_path.glob(".best-*")} == {".best-4", ".best-5"}


def test_patience_fires_when_it_should(rigged):
    make, evaluate = rigged
    evaluator = make(patience=2)
    for step, (loss, ends) in enumerate([(3.0, False), (3.5, False), (2.9, False), (2.9, False), (2.9, True)]):
        evaluate(evaluator, {step: loss})
        assert (evaluator.reason_to_end is not None) == ends
    assert make(first_step=3, patience=2).reason_to_end is None
    evaluator = make(first_step=2, patience=1)
    evaluate(evaluator, {3: math.nan})
    assert "2.9, is of step 2" in evaluator.reason_to_end
    assert make(first_step=3).reason_to_end is None


def test_a_metric_of_samples_decides(rigged, tmp_path):
    make, evaluate = rigged
    values = iter([2.0, 1.0, 3.0])

    class Samples:
        key, title, identity = "validation/kid_x", "X", "x"

        def __call__(self, model):
            return next(values)

    evaluator = make(best_metric="samples", sample_metric=Samples(), patience=1)
    evaluate(evaluator, {1: 1.0, 2: 2.0})
    assert best_step(tmp_path) == 2
    assert evaluator.reason_to_end is None
    evaluate(evaluator, {3: 0.5})
    assert "validation/kid_x" in evaluator.reason_to_end
    evaluator = make(first_step=3)  # now by the loss, whose best was not kept
    assert not (tmp_path / "best").exists()
    evaluate(evaluator, {4: 0.6})
    assert best_step(tmp_path) == 4
    Samples.identity = "y"
    with pytest.raises(UserError, match=r"validation/kid_x in .* was measured on x, "):
        make(first_step=4, best_metric="samples", sample_metric=Samples())


def test_hours_leave_time_for_evaluations(clock, tmp_path):  # noqa: F811
    """One of 40 s after every seventh step of 10 s, and one after the last."""
    started = clock.now
    control = RunControl(OneProcess(), tmp_path, None, 0.5, 20, 0, is_resumed=False)
    for global_step in control.steps():
        clock.now += 10
        control.may_step(torch.tensor(1.0), torch.tensor(1.0))
        if (global_step + 1) % 7 == 0 or control.is_finished:
            clock.now += 40
    assert 1800 - 10 - 2 * 40 < clock.now - started <= 1800


def test_an_early_end_is_an_ordinary_one(clock, tmp_path, caplog):  # noqa: F811
    control = RunControl(OneProcess(), tmp_path, 9, None, 20, 0, is_resumed=False)
    caplog.set_level("INFO")
    for global_step in control.steps():
        control.may_step(torch.tensor(1.0), torch.tensor(1.0))
        control.end_early("no use" if global_step == 3 else None)
        assert control.is_last == control.is_finished == (global_step == 3)
    control.say_how_it_ended()
    assert control.steps_done == 4
    assert "ended after step 4: no use" in caplog.text


def test_planned_steps_leave_time_for_evaluations():
    overheads = Overheads(evaluation=100.0)
    assert planned_steps(1, 1.0, overheads, 1000, 1000) == 3500
    assert planned_steps(1, 1.0, overheads, 1000, 1000, eval_steps=100) == 1750


def test_seconds_of_an_evaluation(monkeypatch):
    """100 latents in 4 batches, each at 4 timesteps, and 50 samples in 2 batches of 10 steps."""
    monkeypatch.setattr(measuring, "seconds_of", lambda *_: 1.0)
    cache = measuring.SyntheticCache(measuring.synthetic_spec((4, 4, 4), "mean", 3, (7, 8), "hidden_states"))
    count = partial(measuring.evaluation_seconds, torch.nn.Identity(), cache)
    assert count(100, 50, 32, 10, 2.0, torch.device("cpu")) == 4 * 4 + 2 * 10
    assert count(0, 0, 32, 10, 2.0, torch.device("cpu")) == 0


# ---- refusals -------------------------------------------------------------------------------------------------------


REFUSALS = {
    "nothing held out": (["--eval_steps", 2], "--eval_steps without latents"),
    "no steps": (["--num_validation_samples", 8], "--num_validation_samples without --eval_steps"),
    "patience without steps": (["--early_stopping_patience", 2], "--early_stopping_patience without --eval_steps"),
    "both": ([*HELD_OUT, "--validation_latents_dir", "x"], "--num_validation_samples with --validation_latents_dir"),
    "images without features": ([*HELD_OUT, "--num_eval_images", 8], "--num_eval_images without --eval_features"),
    "best of no samples": ([*HELD_OUT, "--best_metric", "samples"], "--best_metric samples without --eval_features"),
    "delta": ([*HELD_OUT, "--early_stopping_min_delta", 0.1], "without --early_stopping_patience"),
    "all rows": ([*HELD_OUT, "--num_validation_samples", 48], "leave some to train on"),
    "more images than rows": ([*HELD_OUT, "--eval_features", "C", "--num_eval_images", 13], "there are 12"),
    "too few for FID": (
        [*HELD_OUT, "--eval_features", "C", "--eval_metric", "fid", "--num_eval_images", 7],
        "at least 9",
    ),
    "features": ([*HELD_OUT, "--eval_features", "vgg"], "--eval_features vgg: expected inception"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(common, classifier, tmp_path, name):
    flags, words = REFUSALS[name]
    flags = [classifier if flag == "C" else flag for flag in flags]
    assert words in refused(run(CLASS, *common, *flags, "--output_dir", tmp_path / "run", check=False))
    assert not (tmp_path / "run").exists()


def test_other_held_out_rows_are_another_run(common, uninterrupted):
    flags = [*common, "--output_dir", uninterrupted, *LATEST]
    line = refused(run(CLASS, *flags, "--eval_steps", 2, "--num_validation_samples", 8, check=False))
    assert "num_validation_samples = 12" in line


def test_a_cache_in_parts_holds_nothing_out(cache):
    part = LatentCache(cache)
    part.reader = object()
    with pytest.raises(UserError, match="--num_validation_samples with a cache in parts"):
        hold_out(part, 4)
