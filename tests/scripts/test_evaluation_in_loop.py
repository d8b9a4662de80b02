"""Evaluation while a model trains: it does not touch training, and what is best can be sampled, resumed and waited for."""

import importlib
import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import FSDP, cache_flags
from tests.support.processes import Fault, SignalAt, contents, refused, run, scalars
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.image.evaluation.classifier import ImageClassifier
from utils.image.evaluation.features import load_features
from utils.image.pipeline import load_run
from utils.runs.load import newest_run
from utils.training.evaluator import Evaluator, step_of
from utils.training.held_out import hold_out, validation_losses
from utils.training.step_log import StepLog

TEXT, CLASS = "train_text_to_image_ldm.py", "train_class_cond_ldm.py"

TRAIN = [
    *("--max_train_steps", 12, "--checkpointing_steps", 4, "--logging_steps", 1, "--train_batch_size", 4),
    *("--learning_rate", 3e-3, "--lr_warmup_steps", 0, "--prediction_type", "flow"),
]

GRIDS = ["--validation_labels", 0, "--num_validation_images", 1, "--validation_inference_steps", 2]

HELD_OUT = ["--eval_steps", 2, "--num_validation_samples", 12]

LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """`--eval_features` of a small classifier with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    ImageClassifier(num_classes=3, resolution=16, block_out_channels=(4, 8)).save_pretrained(folder)
    return f"classifier:{folder}"


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


@dataclass(frozen=True)
class Watched(Fault):
    """Writes down the rows that the stream of training reads (they alone may be mirrored), one line a batch."""

    path: str = ""

    def install(self) -> None:
        owner = importlib.import_module("utils.latents.cache").LatentCache
        gather = owner.gather

        def watched(cache, rows, draw=None):
            if draw is not None:
                with open(self.path, "a") as file:
                    file.write(json.dumps(rows.tolist()) + "\n")
            return gather(cache, rows, draw)

        owner.gather = watched


@pytest.mark.parametrize("script", [TEXT, CLASS])
def test_held_out_rows_never_reach_training(opened, cache, model_flags, tmp_path, script):
    watched = Watched("", 0, path=str(tmp_path / "rows"))
    flags = ["--latents_dir", cache, *model_flags["dit"], *TRAIN, *HELD_OUT]
    run(script, *flags, "--output_dir", tmp_path / "run", "--seed", 7, fault=watched)
    seen = {row for line in (tmp_path / "rows").read_text().splitlines() for row in json.loads(line)}
    assert seen == set(hold_out(opened, 12).training_rows.tolist())


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
        return sum(validation_losses(accelerator, model, held_out, flow, batch_size=32)) / 4

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
        SignalAt(StepLog.step_done, 7),
        SignalAt(step_of, 2),
        SignalAt(Evaluator._write_history, 3),
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
    killed = run(CLASS, *flags, processes=processes, fault=SignalAt(StepLog.step_done, 5), check=False)
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
