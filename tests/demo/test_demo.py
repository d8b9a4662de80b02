"""The demo's data set and its judge, on inputs whose verdict is known beforehand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import judge_digits, prepare_digits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare_digits.write_images(folder, seed=0)
    prepare_digits.write_prompts(folder)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def pose_as_samples(real: Path, output_dir: Path, shuffled: bool = False) -> Path:
    """A folder of samples that are real images, with prompts of their own labels or of another row's."""
    rows = rows_of(real)
    prompts = [row["text"][index % 5] for index, row in enumerate(rows)]
    if shuffled:
        np.random.default_rng(0).shuffle(prompts)
    output_dir.mkdir()
    lines = []
    for index, (row, prompt) in enumerate(zip(rows, prompts)):
        shutil.copy(real / row["file_name"], output_dir / f"{index:04d}.png")
        lines.append(json.dumps({"file_name": f"{index:04d}.png", "prompt": prompt, "seed": index}))
    (output_dir / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return output_dir


def judge(data_dir: Path, samples_dir: Path) -> dict:
    train, test = (judge_digits.read_real(data_dir / split) for split in ("train", "test"))
    return judge_digits.judge(train, test, judge_digits.read_samples(samples_dir))


def run_script(script: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "demo" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


# ---- prepare_digits.py


def test_the_split_is_stratified_fixed_and_complete(data_dir: Path, tmp_path: Path) -> None:
    train, test = rows_of(data_dir / "train"), rows_of(data_dir / "test")
    assert (len(train), len(test)) == (1437, 360)
    assert not {row["file_name"] for row in train} & {row["file_name"] for row in test}
    for digit in range(10):
        share = sum(row["label"] == digit for row in test) / sum(row["label"] == digit for row in train + test)
        assert 0.18 < share < 0.22
    prepare_digits.write_images(tmp_path, seed=0)
    again = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert all((tmp_path / path).read_bytes() == (data_dir / path).read_bytes() for path in again)


def test_pictures_are_scikit_learns_digits_in_dark_ink(data_dir: Path) -> None:
    from sklearn.datasets import load_digits

    real = judge_digits.read_real(data_dir / "test")
    assert real.pixels.shape == (360, 32, 32, 3)
    names = [row["file_name"] for row in rows_of(data_dir / "test")]
    index = [int(name.removeprefix("digit_").removesuffix(".png")) for name in names]
    digits = load_digits()
    assert np.array_equal(real.digits, digits.target[index])
    ink = 16 * (1 - judge_digits.features_of(real.pixels))
    assert np.abs(ink - digits.data[index]).mean() < 0.8  # of 16; what enlarging and reducing costs


def test_datasets_reads_the_folder_and_every_caption_names_its_digit(data_dir: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("imagefolder", data_dir=data_dir / "test", split="train", cache_dir=str(tmp_path))
    assert len(data) == 360
    assert data[0]["image"].size == (32, 32)
    for row in data.select_columns(["text", "label"]):
        assert [judge_digits.digit_of_prompt(caption) for caption in row["text"]] == [row["label"]] * 5


def test_prompts_are_every_template_with_every_digit(data_dir: Path) -> None:
    prompts = (data_dir / "prompts.txt").read_text().splitlines()
    assert len(set(prompts)) == len(prompts) == 50
    digits = [judge_digits.digit_of_prompt(prompt) for prompt in prompts]
    assert [digits.count(digit) for digit in range(10)] == [5] * 10


def test_the_script_writes_a_text_tower_that_loads_and_refuses_a_used_folder(tmp_path: Path) -> None:
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    output_dir = tmp_path / "data"
    first = run_script("prepare_digits.py", "--output_dir", output_dir)
    assert first.returncode == 0, first.stderr
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(output_dir / "text_encoder").eval()
    config = text_encoder.config
    assert (config.hidden_size, config.vocab_size, config.eos_token_id) == (64, 49408, 49407)
    prompts = (output_dir / "prompts.txt").read_text().splitlines()
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids  # (50, 77)
    with torch.no_grad():
        states = text_encoder(ids).last_hidden_state.flatten(1)  # (50, 77 * 64)
    apart = torch.cdist(states, states) / states.norm(dim=1).mean() + torch.eye(50)
    assert apart.min() > 0.1  # no two captions look alike

    second = run_script("prepare_digits.py", "--output_dir", output_dir)
    assert second.returncode == 2
    assert second.stderr.startswith("error: --output_dir")


# ---- judge_digits.py


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [("a handwritten seven", 7), ("the digit 0", 0), ("3", 3), ("Nine, written by hand", 9), ("the number one", 1)],
)
def test_digit_of_prompt(prompt: str, digit: int) -> None:
    assert judge_digits.digit_of_prompt(prompt) == digit


@pytest.mark.parametrize("prompt", ["", "someone wrote", "12", "seven or 8"])
def test_a_prompt_without_exactly_one_digit_is_refused(prompt: str) -> None:
    with pytest.raises(judge_digits.JudgeError, match="exactly one"):
        judge_digits.digit_of_prompt(prompt)


def test_held_out_images_as_samples_read_right_and_look_real(data_dir: Path, tmp_path: Path) -> None:
    metrics = judge(data_dir, pose_as_samples(data_dir / "test", tmp_path / "samples"))
    assert metrics["num_samples"] == 360
    assert metrics["share_read_as_prompted"] >= 0.95
    assert metrics["share_read_as_prompted"] == metrics["classifier_accuracy_on_held_out_images"]
    near = metrics["nearest_training_image"]
    assert near["samples"] == near["held_out_images"] > 0.5
    for key in ("nearest_of_same_digit", "mean_distance_within_digit"):
        assert metrics[key]["samples"] == pytest.approx(metrics[key]["training_images"], rel=0.1)
    assert (metrics["duplicate_samples"], metrics["samples_equal_to_a_training_image"]) == (0, 0)


def test_shuffled_prompts_read_right_one_time_in_ten(data_dir: Path, tmp_path: Path) -> None:
    metrics = judge(data_dir, pose_as_samples(data_dir / "test", tmp_path / "samples", shuffled=True))
    assert 0.03 < metrics["share_read_as_prompted"] < 0.2


def test_copies_of_training_images_are_seen(data_dir: Path, tmp_path: Path) -> None:
    metrics = judge(data_dir, pose_as_samples(data_dir / "train", tmp_path / "samples"))
    assert metrics["nearest_training_image"]["samples"] == 0
    assert metrics["samples_equal_to_a_training_image"] == 1437


def test_one_picture_again_and_again_is_seen(data_dir: Path, tmp_path: Path) -> None:
    samples_dir = pose_as_samples(data_dir / "test", tmp_path / "samples")
    for digit in range(10):
        of_digit = [index for index, row in enumerate(rows_of(data_dir / "test")) if row["label"] == digit]
        for index in of_digit[1:]:
            shutil.copy(samples_dir / f"{of_digit[0]:04d}.png", samples_dir / f"{index:04d}.png")
    metrics = judge(data_dir, samples_dir)
    assert metrics["duplicate_samples"] == 350
    assert metrics["nearest_of_same_digit"]["samples"] == 0
    assert metrics["mean_distance_within_digit"]["samples"] == 0


def test_distances_equal_a_brute_force() -> None:
    draw = np.random.default_rng(1)
    first, second = draw.random((4, 64)), draw.random((3, 64))
    expected = [[np.linalg.norm(a - b) for b in second] for a in first]
    assert judge_digits.distances(first, second) == pytest.approx(np.array(expected))
    digits = np.array([5, 5, 5, 5])
    pairs = [np.linalg.norm(first[i] - first[j]) for i in range(4) for j in range(4) if i != j]
    nearest = [min(np.linalg.norm(first[i] - first[j]) for j in range(4) if i != j) for i in range(4)]
    assert judge_digits.spread(first, digits, {5: 4}) == pytest.approx((np.mean(nearest), np.mean(pairs)))
    assert judge_digits.spread(first[:1], digits[:1], {5: 1}) == (None, None)


def test_the_script_writes_metrics_and_a_grid(data_dir: Path, tmp_path: Path) -> None:
    samples_dir = pose_as_samples(data_dir / "test", tmp_path / "samples")
    done = run_script(
        "judge_digits.py", "--data_dir", data_dir, "--samples_dir", samples_dir, "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert "read as prompted" in done.stdout
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["seconds"] > 0
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 12 * 64
        assert grid.height > 10 * 64


def test_few_samples_are_enough(data_dir: Path, tmp_path: Path) -> None:
    samples_dir = pose_as_samples(data_dir / "test", tmp_path / "samples")
    first = (samples_dir / "samples.jsonl").read_text().splitlines()[0]
    (samples_dir / "samples.jsonl").write_text(first + "\n")
    metrics = judge(data_dir, samples_dir)
    assert metrics["nearest_of_same_digit"]["samples"] is None
    assert "-" in judge_digits.format_table(metrics)
    judge_digits.draw_grid(judge_digits.read_samples(samples_dir), judge_digits.read_real(data_dir / "train"))


def break_nothing_there(samples_dir: Path) -> None:
    shutil.rmtree(samples_dir)


def break_empty(samples_dir: Path) -> None:
    (samples_dir / "samples.jsonl").write_text("")


def break_json(samples_dir: Path) -> None:
    (samples_dir / "samples.jsonl").write_text("{\n")


def break_row(samples_dir: Path) -> None:
    (samples_dir / "samples.jsonl").write_text('{"file_name": "0000.png"}\n')


def break_missing_image(samples_dir: Path) -> None:
    (samples_dir / "0003.png").unlink()


def break_truncated_image(samples_dir: Path) -> None:
    (samples_dir / "0003.png").write_bytes((samples_dir / "0003.png").read_bytes()[:200])


def break_size(samples_dir: Path) -> None:
    Image.new("RGB", (64, 64)).save(samples_dir / "0003.png")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (break_nothing_there, "samples.jsonl does not exist"),
        (break_empty, "samples.jsonl is empty"),
        (break_json, "line 1: not JSON"),
        (break_row, "line 1: no 'prompt'"),
        (break_missing_image, "0003.png"),
        (break_truncated_image, "0003.png"),
        (break_size, "images of several sizes"),
    ],
)
def test_bad_samples_are_told_in_one_line(data_dir: Path, tmp_path: Path, capsys, monkeypatch, damage, told) -> None:
    samples_dir = pose_as_samples(data_dir / "test", tmp_path / "samples")
    damage(samples_dir)
    arguments = ["--data_dir", data_dir, "--samples_dir", samples_dir, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["judge_digits.py", *map(str, arguments)])
    assert judge_digits.main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert told in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
