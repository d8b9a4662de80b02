"""What makes sampling faster changes no image, and the benchmarks measure what they say. No test depends on a time."""

import json
import sys
import time

import numpy as np
import pytest
from diffusers.models.attention_processor import Attention
from PIL import Image

from tests.support.models import TRAIN_FLAGS
from tests.support.processes import ROOT, refused, run, run_script
from utils.diffusion.sampling import speed_up
from utils.image.cache import ImageCache
from utils.image.pipeline import load_run


@pytest.fixture(scope="module")
def common():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import common

    yield common
    sys.path.remove(str(ROOT / "benchmarks"))


def sampled(run_dir, output_dir, *flags, check=True):
    """Images of a run, (N, H, W, 3)."""
    settings = ["--num_inference_steps", 3, "--num_images_per_prompt", 2, "--guidance_scale", 3, "--seed", 5]
    done = run("sample.py", "--model", run_dir, *settings, "--output_dir", output_dir, *flags, check=check)
    if not check:
        return done
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in sorted(output_dir.glob("0*.png"))])


# ---- sampling


def test_compiled_samples_are_the_same(class_run, tmp_path):
    """To rounding, with a last batch that is smaller than the others."""
    flags = ["--class_labels", 0, 2, "--batch_size", 3]
    plain = sampled(class_run, tmp_path / "plain", *flags)
    compiled = sampled(class_run, tmp_path / "compiled", *flags, "--torch_compile")
    assert np.abs(plain - compiled).max() <= 1
    assert np.abs(plain[0] - plain[1]).max() > 1


def test_fused_projections_give_the_same_samples(text_run, tmp_path):
    plain = sampled(text_run, tmp_path / "plain", "--prompt", "a red square")
    fused = sampled(text_run, tmp_path / "fused", "--prompt", "a red square", "--fuse_qkv_projections")
    assert np.abs(plain - fused).max() <= 1


def test_what_is_asked_for_is_done(text_run):
    """A flag that did nothing would change no image either."""
    unet = load_run(text_run).denoiser
    speed_up(unet, torch_compile=False)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    assert attentions
    assert not any(module.fused_projections for module in attentions)
    assert unet._compiled_call_impl is None
    speed_up(unet, torch_compile=True, fuse_qkv_projections=True)
    assert all(module.fused_projections for module in attentions)
    assert unet._compiled_call_impl is not None


def test_projections_that_cannot_be_fused_are_refused(class_run, tmp_path):
    """A DiT of this suite has its keys and values in one matrix already."""
    message = refused(sampled(class_run, tmp_path / "none", "--fuse_qkv_projections", check=False))
    assert "--fuse_qkv_projections: DiT has none apart" in message


# ---- benchmarks


def test_candidates_take_turns_and_the_warm_up_counts_for_nothing(common):
    """A call that takes twice as long reads so, in each round; the first calls, which are slow, are not counted."""
    calls = []

    def taking(name, seconds):
        calls.append(name)
        time.sleep(seconds + (0.2 if calls.count(name) == 1 else 0))

    times = common.alternate({"once": lambda: taking("once", 0.02), "twice": lambda: taking("twice", 0.04)}, rounds=5)
    assert calls == ["once", "twice"] * 6
    assert [len(values) for values in times.values()] == [5, 5]
    assert max(map(min, times.values())) < 0.2
    assert common.median_ratio([4.0, 9.0, 30.0], [2.0, 3.0, 5.0]) == 3.0


def test_a_measured_trainer_is_the_trainer_and_ends_before_its_export(common, cache, model_flags, tmp_path):
    """As many steps as were asked for, in order; nothing of what `after_step` takes is in one of them."""
    seen = []

    def after_step(args, step, seconds):
        seen.append((args.train_batch_size, step, seconds))
        time.sleep(0.5)

    flags = [*TRAIN_FLAGS, *model_flags["dit"], "--latents_dir", cache, "--output_dir", tmp_path / "run"]
    common.run_trainer("train_text_to_image_ldm", flags, 4, after_step)
    assert [(size, step) for size, step, _ in seen] == [(4, i) for i in range(4)]
    assert min(seconds for _, _, seconds in seen[1:]) < 0.5
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_train_steps_tells_what_a_training_takes(cache, model_flags, tmp_path):
    """The script itself."""
    flags = [*TRAIN_FLAGS, *model_flags["dit"], "--latents_dir", cache]
    settings = ["--num_steps", 3, "--warm_up", 2, "--profile", "--output", tmp_path / "figures.json"]
    run_script("benchmarks/train_steps.py", *settings, "--", *flags)
    (row,), operators = json.loads((tmp_path / "figures.json").read_text())["tables"]
    assert (row["processes"], row["samples a step"]) == (1, 4)
    assert row["samples/s"] == pytest.approx(4000 / row["ms a step"])
    assert row["memory, GB"] > 0.1
    assert 0 < row["utilisation"] < 1
    assert 0 <= row["waiting for data"] < 1
    shares = [operator["share"] for operator in operators]
    assert shares == sorted(shares, reverse=True)
    assert 0.3 < sum(shares) <= 1


def test_waiting_for_data_is_told(common, cache, model_flags, tmp_path, monkeypatch):
    import train_steps

    from utils.training import flops as budget
    from utils.training import setup as run

    make_loader = run.make_loader

    def slow_loader(*args):
        for batch in make_loader(*args):
            time.sleep(1)
            yield batch

    monkeypatch.setattr(run, "make_loader", slow_loader)
    monkeypatch.setattr(budget, "measured_flops", lambda *_: 1e12)
    clock = train_steps.Clock(warm_up=1)
    flags = [*TRAIN_FLAGS, *model_flags["dit"], "--latents_dir", cache, "--output_dir", tmp_path / "run"]
    clock.run(flags, 3)
    assert len(clock.seconds) == 3
    assert clock.row()["waiting for data"] > 0.5


@pytest.mark.slow
def test_scaling_measures_processes_sizes_and_plans(model_flags, tmp_path):
    """The script itself: two processes have two batches, and a plan's training takes what the plan says."""
    settings = ["--batch_sizes", 2, 4, "--sides", 8, "--num_steps", 3, "--threads", 1]
    output = ["--output", tmp_path / "figures.json"]
    run_script("benchmarks/scaling.py", *settings, *output, "--", *model_flags["dit"])
    processes, sizes, (plan,) = json.loads((tmp_path / "figures.json").read_text())["tables"]
    assert [(row["processes"], row["samples a step"]) for row in processes] == [(1, 4), (2, 8)]
    assert processes[0]["of ideal"] == 1
    assert [row["samples a step"] for row in sizes] == [2, 4]
    assert 0.3 < plan["samples/s, ratio"] < 3


def test_a_random_cache_is_one_that_readers_know(common, tmp_path):
    import random_data

    random_data.write_random_cache(tmp_path, 20, (4, 2, 2), rows_per_shard=7)
    cache = ImageCache(tmp_path)
    batch = cache.gather(np.array([19, 0]))
    assert batch["latents"].shape == (2, 1, 4, 2, 2)
    assert batch["encoder_hidden_states"].shape == (2, 77, 768)
    assert batch["num_tokens"].tolist() == [2 + 20, 2 + 1]
    assert cache.first_captions(np.array([3])) == ["caption 3"]


def test_a_report_says_with_what_it_was_made(common, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    args = common.benchmark_parser("").parse_args(["--output", str(tmp_path / "new" / "figures.json")])
    common.report(args, [{"case": "a", "ms": 1234.5}, {"case": "b", "ms": 0.012345, "note": 1}])
    assert "| b | 0.0123 | 1 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert written["machine"].keys() >= {"device", "torch", "diffusers", "commit"}
    assert written["tables"] == [[{"case": "a", "ms": 1234.5}, {"case": "b", "ms": 0.012345, "note": 1}]]


def test_cache_read_measures_an_epoch_that_may_not_grow(tmp_path):
    """The script itself: every way to read gives the same rows (it asserts that), and an epoch stays within bounds."""
    flags = ["--rows", 300, "--rounds", 60, "--batch_size", 16, "--output", tmp_path / "figures.json"]
    run_script("benchmarks/cache_read.py", *flags)
    ways, (epoch,) = json.loads((tmp_path / "figures.json").read_text())["tables"]
    assert [row["from"] for row in ways][:2] == ["latent cache", "latent cache, loader"]
    assert all(row["median, ms"] > 0 for row in ways)
    assert epoch["memory, grown by"].split()[1] in ("B", "KB")
