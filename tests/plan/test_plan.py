"""Plans that trainers read: what is measured, what is written, and what is refused."""

import importlib
import json
import statistics
import sys

import pytest
import torch
import yaml

from tests.support.plan import pace
from tests.support.processes import refused, run, scalars
from utils.plan import args as plan_args
from utils.plan import instruments as measuring
from utils.plan.arithmetic import Pace

# ---- instruments


def test_memory_that_runs_out_is_no_error_and_other_errors_are(monkeypatch):
    def fail(message):
        raise RuntimeError(message)

    device = torch.device("cpu")
    assert measuring.pace_or_none(lambda: pace(1.0), device) == pace(1.0)
    assert measuring.pace_or_none(lambda: fail("CUDA out of memory. Tried to allocate 2 GiB"), device) is None
    with pytest.raises(RuntimeError, match="shapes"):
        measuring.pace_or_none(lambda: fail("shapes do not fit"), device)


def run_one_step(clock: measuring.StageClock) -> None:
    for _ in range(2):  # the first does not count
        clock.start_step()
        clock.end_stage("optimizer")


def test_a_size_that_did_not_fit_is_not_in_the_memory_of_the_next(monkeypatch):
    """A search tries sizes until one does not fit: what that one filled is not what the plan's own size takes."""
    held = {"now": 0, "peak": 0}

    def hold(num_bytes):
        held.update(now=num_bytes, peak=max(held["peak"], num_bytes))

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    monkeypatch.setattr(measuring.StageClock, "_stamp", lambda clock: 0.0)
    monkeypatch.setattr(measuring, "wait_for", lambda device: None)
    device = torch.device("cuda")

    def measured(num_bytes):
        clock = measuring.StageClock(device)
        hold(num_bytes)
        run_one_step(clock)
        hold(1)
        return clock.pace(1).peak_bytes

    assert [measured(9), measured(80), measured(7)] == [9, 80, 7]


def test_the_clock_takes_medians_and_leaves_out_the_first_step(monkeypatch):
    clock, now = measuring.StageClock(torch.device("cpu")), [0.0]
    monkeypatch.setattr(measuring, "peak_memory", lambda device: 7)
    monkeypatch.setattr(clock, "_stamp", lambda: now[0])
    for seconds in (100.0, 1.0, 2.0, 9.0):
        clock.start_step()
        for stage in ("other", "forward + backward", "other", "forward + backward", "optimizer"):
            now[0] += seconds
            clock.end_stage(stage)
    measured = clock.pace(2)
    assert measured == Pace({"forward + backward": 2.0, "optimizer": 2.0, "EMA": 0.0, "other": 2.0}, 7)


# ---- the script


@pytest.fixture(scope="module")
def planned(model_flags, tmp_path_factory):
    """Runs the script at a tiny size: `planned(flags)` -> (result, path of its config)."""
    tiny = [*("--resolution", 32, "--text_width", 16, "--num_classes", 3, "--measure_seconds", 0.1)]

    def plan(*flags, kind="dit", shapes=True, check=True):
        path = tmp_path_factory.mktemp("plan") / "plan.yaml"
        flags = (*model_flags[kind], *(tiny if shapes else tiny[-2:]), "--output_config", path, *flags)
        return run("plan_budget.py", *flags, check=check), path

    return plan


def parsed_by(script: str, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    return importlib.import_module(script.removesuffix(".py")).parse_args()


@pytest.mark.parametrize(("trainer", "kind"), [("text", "unet"), ("class", "dit")])
def test_a_plan_is_a_config_of_the_trainer(planned, monkeypatch, tmp_path, trainer, kind):
    preset = tmp_path / "preset.yaml"
    own = {"text": {"validation_prompts": ["one", "two"]}, "class": {"validation_labels": [0, 2], "tread_ratio": 0.0}}
    given = own[trainer] | {
        "learning_rate": 3.0e-4,
        "train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "ema_decay": 0.99,
    }
    preset.write_text(yaml.safe_dump(given | {"max_train_steps": 77, "lr_warmup_steps": 5}))
    result, path = planned("--config", preset, "--hours", 0.5, "--dataset_size", 1000, kind=kind)
    args = parsed_by(plan_args.SCRIPTS[trainer], monkeypatch, "--config", path, "--output_dir", tmp_path / "run")
    assert args.train_batch_size * args.gradient_accumulation_steps == 12
    assert args.max_train_hours == 0.5
    assert args.max_train_steps > 100
    assert (args.learning_rate, args.ema_decay, args.lr_warmup_steps, args.model) == (3.0e-4, 0.99, 5, kind)
    assert getattr(args, next(iter(own[trainer]))) == next(iter(own[trainer].values()))
    samples = 12 * args.max_train_steps
    for words in (
        f"{samples} samples",
        f"{samples / 1000:.2f} epochs of 1000 images",
        "MFU",
        "(measured)",
        "samples/s",
        "EMA",
        "cache",
    ):
        assert words in result.stdout
    assert all("# " + line in path.read_text() for line in result.stdout.splitlines()[:-1])


def test_a_plan_has_the_flags_of_both_trainers(monkeypatch):
    """What a trainer learns, a plan must learn too."""

    def flags(script):
        names = set()
        monkeypatch.setattr(sys, "argv", [script])
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(
            module, "parse_with_config", lambda parser: names.update(a.dest for a in parser._actions) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            module.parse_args()
        return names

    text, by_class, plan = (flags(script) for script in (*plan_args.SCRIPTS.values(), "plan_budget.py"))
    only = {name for names in plan_args.ONLY.values() for name in names}
    assert text | by_class <= plan
    assert text ^ by_class == only
    assert not (plan - text - by_class) & only


def test_a_plan_from_a_cache(planned, cache):
    """The cache's shapes count (4 x 4 latents, texts of width 16), and its size."""
    result, _ = planned(
        "--latents_dir", cache, "--trainer", "text", "--hours", 0.1, "--train_batch_size", 2, shapes=False
    )
    assert "epochs of 48 images" in result.stdout


def test_the_text_encoder_runs_in_the_loop_and_encoders_are_timed(planned, tiny_text_encoder, tiny_vae):
    flags = [
        "--pretrained_text_encoder_name_or_path",
        tiny_text_encoder,
        "--pretrained_vae_model_name_or_path",
        tiny_vae,
    ]
    flags += ["--trainer", "text", "--hours", 0.1, "--train_batch_size", 2, "--vae_factor", 4]
    plain, _ = planned(*flags, "--dataset_size", 100)
    in_loop, _ = planned(*flags, "--dataset_size", 100, "--max_cached_captions", 50, "--measure_precompute")
    assert "cache 3" in plain.stdout
    assert "cache 1" in in_loop.stdout


def test_a_cap_on_memory(planned):
    result, path = planned("--trainer", "class", "--hours", 1, "--memory_gb", 0.001, check=False)
    assert refused(result).endswith("or add --gradient_checkpointing or --optimizer adamw_8bit")
    assert not path.exists()


# fmt: off
REFUSED = {
    "no hours": (["--trainer", "text"], "--hours is required"),
    "no hours to spare": (["--trainer", "class", "--hours", 0.0001], "--hours 0.0001: start"),
    "trainer unknown": (["--hours", 1], "--trainer: the other flags do not tell"),
    "two trainers": (["--hours", 1, "--caption_column", "text", "--label_column", "label"], "--trainer: the other flags do not tell"),
    "flag of the other trainer": (["--hours", 1, "--trainer", "text", "--unconditional"], "--unconditional with --trainer text"),
    "steps": (["--hours", 1, "--trainer", "text", "--max_train_steps", 5], "--max_train_steps: the plan sets it"),
    "hours twice": (["--hours", 1, "--trainer", "text", "--max_train_hours", 5], "--max_train_hours: the plan sets it"),
    "batch twice": (["--hours", 1, "--trainer", "text", "--train_batch_size", 5, "--effective_batch_size", 5], "--train_batch_size with --effective_batch_size"),
    "no memory": (["--hours", 1, "--trainer", "text", "--memory_margin", 1], "--memory_margin 1"),
    "resolution": (["--hours", 1, "--trainer", "text", "--resolution", 100], "--resolution: 100 is not divisible"),
    "precompute of nothing": (["--hours", 1, "--trainer", "text", "--measure_precompute"], "--measure_precompute without --dataset_size"),
    "objective": (["--hours", 1, "--trainer", "text", "--prediction_type", "flow", "--snr_gamma", 5], "--snr_gamma with --prediction_type flow"),
    "no cache": (["--hours", 1, "--trainer", "text", "--latents_dir", "absent"], "absent does not exist"),
}


# fmt: on


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(planned, name):
    flags, message = REFUSED[name]
    result, path = planned(*flags, shapes="--latents_dir" not in flags, check=False)
    assert message in refused(result)
    assert not path.exists()


def test_a_config_is_not_written_over(planned, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: dit\n")
    flags = ["--hours", 1, "--trainer", "text", "--output_config", tmp_path / "mine.yaml"]
    assert "mine.yaml exists" in refused(planned(*flags, check=False)[0])
    assert (tmp_path / "mine.yaml").read_text() == "model: dit\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_training_is_as_fast_as_planned(cache, tmp_path, kind):
    """On a quiet machine within a tenth; here with room for a busy one."""
    (tmp_path / "dit.json").write_text(json.dumps({"num_layers": 6, "hidden_size": 512, "num_attention_heads": 8}))
    (tmp_path / "unet.json").write_text(json.dumps({"block_out_channels": [128, 256]}))
    model = [
        "--model",
        kind,
        "--model_size",
        "S/1" if kind == "dit" else "tiny",
        "--model_config",
        tmp_path / f"{kind}.json",
    ]
    flags = [
        "--latents_dir",
        cache,
        "--checkpointing_steps",
        10_000,
        "--logging_steps",
        2,
        "--report_to",
        "tensorboard",
    ]
    run(
        "plan_budget.py", *model, *flags, "--trainer", "text", "--effective_batch_size", 64, "--max_micro_batch_size", 32,
        "--hours", 0.02, "--output_config", tmp_path / "plan.yaml", "--measure_seconds", 10,
    )  # fmt: skip
    comments = (tmp_path / "plan.yaml").read_text()
    planned_speed = float(comments.partition("speed: ")[2].split()[0])
    run("train_text_to_image_ldm.py", "--config", tmp_path / "plan.yaml", "--output_dir", tmp_path / "run")
    speeds = list(scalars(tmp_path / "run", "train/samples_per_second").values())[1:]
    assert statistics.median(speeds) == pytest.approx(planned_speed, rel=0.3)
