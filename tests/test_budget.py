"""Budgets: FLOPs against those of the layers, one by one, peaks, the arithmetic of a plan in closed form, and plans that trainers
take."""

import importlib
import json
import math
import statistics
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel, UNet2DModel

from tests.support.flops import flops_by_hand
from tests.support.models import UNET_CONFIG
from tests.support.processes import ROOT, refused, run, scalars
from utils.diffusion.conditions import ClassCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.errors import UserError
from utils.latents.writer import ShardFolder, caption_features, latent_features
from utils.models.dit import DIT_SIZES, DiT
from utils.models.unet import UNET_PRESETS, build_unet, unet_config
from utils.plan import args as plan_args
from utils.plan import arithmetic as planning
from utils.plan import instruments as measuring
from utils.plan.arithmetic import Overheads, Pace
from utils.training import flops as budget

# ---- FLOPs


def counted(model, shape, length, device) -> int:
    """FLOPs of one forward pass, layer by layer."""
    config = model.config
    pooled = config.get("projection_class_embeddings_input_dim")
    if isinstance(model, UNet2DConditionModel) and config.class_embed_type == "identity":
        pooled = 4 * config.block_out_channels[0]
    with torch.no_grad():
        return flops_by_hand(
            model,
            torch.zeros(1, *shape, device=device),
            torch.zeros(1, device=device),
            encoder_hidden_states=torch.zeros(1, length, config.cross_attention_dim, device=device)
            if length
            else None,
            class_labels=torch.zeros(1, pooled, device=device) if pooled else None,
            return_dict=False,
        )


@pytest.mark.parametrize("length", [0, 77])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_flops_of_unets(preset, with_labels, length):
    config = unet_config(preset, 32, 4, 768 if length else None, with_labels)
    with torch.device("meta"):
        model = build_unet(config)
    assert budget.forward_flops(model, (4, 32, 32), length) == counted(model, (4, 32, 32), length, "meta")


@pytest.mark.parametrize("shape", [(4, 15, 15), (4, 8, 24), (4, 6, 10)])
def test_flops_of_a_unet_on_odd_and_oblong_latents(shape):
    with torch.device("meta"):
        model = build_unet(unet_config("cifar10", 16, 4, 8, False))
    assert budget.forward_flops(model, shape, 5) == counted(model, shape, 5, "meta")


DITS = {
    "paper's S/2": {"num_layers": 12, "hidden_size": 384, "num_attention_heads": 6},
    "plain, labels": {"style": "plain", "projection_class_embeddings_input_dim": 384},
    "text as wide as the model": {"cross_attention_dim": 384, "projection_class_embeddings_input_dim": 384},
    "text, patch 4": {"cross_attention_dim": 96, "patch_size": 4, "num_layers": 3},
}


@pytest.mark.parametrize("name", DITS)
def test_flops_of_dits(name):
    length = 77 if "text" in name else 0
    with torch.device("meta"):
        model = DiT(**DITS[name])
    assert budget.forward_flops(model, (4, 32, 32), length) == counted(model, (4, 32, 32), length, "meta")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_flops_of_a_forward_on_the_cpu(kind):
    """A model with weights: the count is made on the meta device, and leaves it as it is."""
    config = unet_config("tiny", 8, 4, 16, False) | {
        k: tuple(v) if isinstance(v, list) else v for k, v in UNET_CONFIG.items()
    }
    model = (
        build_unet(config)
        if kind == "unet"
        else DiT(8, num_layers=2, hidden_size=32, num_attention_heads=2, cross_attention_dim=16)
    )
    assert budget.forward_flops(model, (4, 8, 8), 7) == counted(model, (4, 8, 8), 7, "cpu")


def test_flops_of_the_paper():
    """Table 1 of arXiv 2212.09748 gives 6.06, 23.01, 80.71 and 118.64 "Gflops" for S/2 to XL/2 at 32 x 32: there a
    multiply and an add are one. SwiGLU's width is rounded up, hence 2 %."""
    for size, expected in {"S": 6.06, "B": 23.01, "L": 80.71, "XL": 118.64}.items():
        num_layers, hidden_size, heads = DIT_SIZES[size]
        with torch.device("meta"):
            model = DiT(num_layers=num_layers, hidden_size=hidden_size, num_attention_heads=heads)
        assert budget.forward_flops(model, (4, 32, 32)) / 2e9 == pytest.approx(expected, rel=0.02)


def test_training_is_three_forwards_and_a_conditional_denoiser_is_its_model():
    with torch.device("meta"):
        model = DiT(8, hidden_size=32, num_attention_heads=2, num_layers=1, class_embed_type="identity")
        denoiser = ConditionalDenoiser(model, ClassCondition(3, 32))
    forward = budget.forward_flops(model, (4, 8, 8))
    assert budget.forward_flops(denoiser, (4, 8, 8)) == forward
    assert budget.training_flops(denoiser, (4, 8, 8)) == 3 * forward


def test_flops_that_cannot_be_known():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="sequence_length"):
            budget.forward_flops(DiT(cross_attention_dim=8), (4, 32, 32))
        with pytest.raises(ValueError, match="UNet2DModel"):
            budget.forward_flops(UNet2DModel(), (4, 32, 32))


# ---- peaks

GPU_NAMES = {
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
}
STRANGERS = [
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A10G",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GH200 480GB", "NVIDIA H20", "Tesla V100-SXM2-32GB", "Tesla T4",
]  # fmt: skip


@pytest.fixture
def gpu_called(monkeypatch):
    """A CUDA device of a name; what would be measured is 1."""

    def be(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(budget, "measured_flops", lambda *_: 1.0)

    return be


@pytest.mark.parametrize("name", GPU_NAMES)
def test_published_peaks(gpu_called, name):
    gpu_called(name)
    for precision in ("bf16", "fp16"):
        assert budget.peak_flops("cuda", precision) == budget.Peak(GPU_NAMES[name] * 1e12, "published")


@pytest.mark.parametrize("name", STRANGERS)
def test_a_device_or_mode_that_is_not_in_the_table_is_measured(gpu_called, name):
    """Volta and Turing are in it, without bf16."""
    gpu_called(name)
    assert budget.peak_flops("cuda", "bf16") == budget.Peak(1.0, "measured")


def test_peaks_in_full_precision_follow_tf32(gpu_called):
    gpu_called("NVIDIA A100-SXM4-40GB")
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed, expected in ((False, 19.5e12), (True, 156e12)):
            matmul.allow_tf32 = allowed
            assert budget.peak_flops("cuda", "no") == budget.Peak(expected, "published")
    finally:
        matmul.allow_tf32 = before


def test_the_peak_of_a_cpu_is_measured_once():
    budget.measured_flops.cache_clear()
    peak = budget.peak_flops("cpu")
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e14
    assert budget.peak_flops("cpu") == peak
    assert budget.measured_flops.cache_info().misses == 1


def test_utilisation():
    peak = budget.Peak(100e12, "published")
    assert budget.model_flops_utilisation(500, 60e9, peak) == pytest.approx(0.3)
    assert budget.model_flops_utilisation(500, 60e9, peak, num_devices=4) == pytest.approx(0.075)


# ---- the arithmetic of a plan


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 100, 128])
def test_largest_that_fits(limit):
    for largest in range(limit + 3):
        tried: list[int] = []
        found = planning.largest_that_fits(lambda size, n=largest, tried=tried: tried.append(size) or size <= n, limit)
        assert found == min(largest, limit)
        assert max(tried) <= limit
        assert len(tried) <= 2 * math.log2(limit) + 2
        assert len(set(tried)) == len(tried)


def pace(seconds: float, peak_bytes: float = 0, update: float = 0.0) -> Pace:
    return Pace({"forward + backward": seconds, "optimizer": update}, int(peak_bytes))


def test_quickest_that_fits():
    """0.1 s and 0.01 s a sample up to 8, 0.02 s a sample above: 8 is the best, and 32 is not tried."""
    tried = []

    def pace_of(size):
        tried.append(size)
        return pace(0.1 + (0.01 if size <= 8 else 0.05) * size)

    assert planning.quickest_that_fits(pace_of, 64, 64, math.inf) == 8
    assert tried == [1, 2, 4, 8, 16]


def test_a_size_that_would_not_fit_is_not_tried():
    """1 GB and 1 GB a sample in 10 GB: after 4 samples, 5 GB, come 9; 16 would take 17 and end the process."""
    tried = []

    def pace_of(size):
        tried.append(size)
        return pace(1.0, 1e9 + size * 1e9)

    assert planning.find_micro_batch(pace_of, 64, 64, 10e9, by_memory=False) == 8
    assert tried == [1, 2, 4, 8]


def test_micro_batch_by_memory():
    def pace_of(size):
        return None if size > 40 else pace(1.0, size * 1e9)  # None: out of memory

    assert planning.find_micro_batch(pace_of, 256, 256, 100e9, by_memory=True) == 40
    assert planning.find_micro_batch(pace_of, 256, 256, 23.5e9, by_memory=True) == 23
    assert planning.find_micro_batch(pace_of, 8, 256, 100e9, by_memory=True) == 8
    with pytest.raises(UserError, match=r"does not fit in 500 MB.*--gradient_checkpointing"):
        planning.find_micro_batch(pace_of, 256, 256, 0.5e9, by_memory=True)


@pytest.mark.parametrize(
    ("effective", "largest", "expected"),
    [(256, 256, (256, 1)), (256, 300, (256, 1)), (256, 255, (128, 2)), (256, 40, (32, 8)), (256, 23, (16, 16)), (1, 9, (1, 1)), (96, 23, (16, 6)), (97, 10, (10, 10)), (254, 100, (85, 3))],
)  # fmt: skip
def test_settle_batch(effective, largest, expected):
    """Exact where a divisor is at least half of what fits; otherwise the nearest, here 100 for 97 and 255 for 254."""
    assert planning.settle_batch(effective, largest) == expected


def test_pace_of_accumulated_steps():
    """Two micro-steps were measured in 4 s and an update in 1: eight take 16 + 1."""
    measured = Pace.of_step({"forward + backward": 3.0, "other": 1.0, "optimizer": 0.75, "EMA": 0.25}, 2, 5)
    assert measured.step_seconds(8) == 17
    assert measured.stages(8) == {"forward + backward": 12, "other": 4, "optimizer": 0.75, "EMA": 0.25}


def test_planned_steps():
    assert planning.planned_steps(1, 2.0, Overheads(), 1000, 1000) == 1800
    # 3600 s less 60 at the start, 20 for the last checkpoint and 40 for the last validation; 0.9 s a step, 0.02 and 0.08
    assert planning.planned_steps(1, 0.9, Overheads(60, 20, 40), 1000, 500) == 3480
    with pytest.raises(UserError, match=r"--hours 0\.01"):
        planning.planned_steps(0.01, 40.0, Overheads(), 1000, 1000)


def test_planned_steps_take_the_hours_when_they_are_run_through():
    """Against a run that is simulated step by step: it ends in time, and one checkpoint interval more would not."""
    overheads, seconds, every = Overheads(30, 11.0, 47.0), 0.37, (250, 400)
    steps = planning.planned_steps(3, seconds, overheads, *every)

    def duration(steps: int) -> float:
        time = overheads.once
        for done in range(1, steps + 1):
            time += seconds
            time += overheads.checkpoint * (done % every[0] == 0 or done == steps)
            time += overheads.validation * (done % every[1] == 0 or done == steps)
        return time

    assert duration(steps) <= 3 * 3600 < duration(steps + 400)


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("content", ["hidden_states", "input_ids", None])
def test_cache_bytes_are_those_on_disk(tmp_path, flips, content):
    rows, shape, states = 600, (4, 8, 8), (77, 16)
    latents = ShardFolder(
        tmp_path / "latents", latent_features(2 * math.prod(shape), flips, True, content is not None)
    )
    columns = {"row": list(range(rows)), "latents": np.zeros((rows, 2, *shape), np.float16), "label": [0] * rows}
    columns |= {"latents_flipped": columns["latents"], "caption": [["x" * 40]] * rows, "caption_id": [[1]] * rows}
    latents.write(0, columns, {})
    if content:
        length = math.prod(states) if content == "hidden_states" else states[0]
        values = np.zeros((rows, length), np.float16 if content == "hidden_states" else np.int32)
        columns = {"caption_id": [1] * rows, "caption": ["x" * 40] * rows, "num_tokens": [2] * rows, content: values}
        ShardFolder(tmp_path / "captions", caption_features(content, length)).write(0, columns, {})
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    expected = planning.cache_bytes(
        rows, shape, moments=True, flips=flips, labels=True, num_captions=rows if content else 0,
        states_shape=states if content == "hidden_states" else None, caption_bytes=40,
    )  # fmt: skip
    assert written == pytest.approx(expected, rel=0.01)


def test_readable():
    values = {0: "0 B", 999: "999 B", 16400: "16.4 KB", 5e9: "5 GB", 3.2e15: "3.2 PB"}
    assert {value: planning.readable(value) for value in values} == values


# ---- docs/scale.md


@pytest.fixture(scope="module")
def scale():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("scale")
    finally:
        sys.path.pop(0)


def test_the_tables_of_the_page_on_scale(scale):
    page = (ROOT / "docs" / "scale.md").read_text()
    gpu = scale.Gpu(209.5, 0.35, 1.0)
    for table in (scale.work_table(), scale.images_table(gpu), scale.week_table(gpu)):
        assert table in page


def test_hours_and_epochs_of_the_page_on_scale(scale):
    """A GPU that does 3.6 PFLOP an hour: 1 TFLOP/s, all of it used."""
    gpu = scale.Gpu(1.0, 1.0, 2.0)
    assert gpu.hours(7.2e15) == 2.0
    image, caption = scale.encoder_flops()
    work = scale.training_flops()["unet base"]
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in scale.images_table(gpu).splitlines()
    )
    few, million = (dict(zip(head, row, strict=True)) for row in rows[:2])
    assert few["encoding, h"] == scale.number(1e5 * (image + caption) / 3.6e15)  # states are cached
    assert few["one epoch, h"] == scale.number(1e5 * work / 3.6e15)
    assert million["encoding, h"] == scale.number(1e6 * image / 3.6e15)
    assert million["one epoch, h"] == scale.number(1e6 * (work + caption) / 3.6e15)  # captions are encoded in the loop
    assert million["both, cost"] == scale.number(2 * 1e6 * (image + work + caption) / 3.6e15)
    assert million["latents"] == "16.4 GB"  # 1e6 x (2 x 2 x 4096 + 8) bytes


def test_encoders_of_the_page_on_scale(scale):
    """CLIP-L's text tower has 85.0M weights in linear layers, used for 77 tokens, and attention over them."""
    _, caption = scale.encoder_flops()
    linear = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert caption == 77 * 2 * linear + 12 * 2 * 2 * 77**2 * 768


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
