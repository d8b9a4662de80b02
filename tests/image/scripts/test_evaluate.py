"""evaluate.py as a user runs it: images whose figures are known beforehand, tiny runs, and everything that is wrong."""

import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.data import COLOURS
from tests.support.processes import refused, run
from utils.image.evaluation.classifier import ImageClassifier


def make_images(folder: Path, count: int, seed: int, noise: float = 20, size: int = 16) -> Path:
    """`count` noisy squares of three colours in one folder a class: blue, green, red."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        name = list(COLOURS)[i % 3]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.array(COLOURS[name]) + generator.normal(0, noise, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder


def read_folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) in [-1, 1] and labels (N,), the classes in the order of their names."""
    names = sorted(path.name for path in folder.iterdir())
    files = [(path, names.index(path.parent.name)) for path in sorted(folder.glob("*/*.png"))]
    images = np.stack([np.asarray(Image.open(path)) for path, _ in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor([label for _, label in files])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Real images (train, test, fewer at 24 pixels), a classifier trained on them for a second, another without."""
    folder = tmp_path_factory.mktemp("world")
    make_images(folder / "train", 240, seed=0)
    make_images(folder / "test", 150, seed=1)
    make_images(folder / "large", 60, seed=2, size=24)
    images, labels = read_folder(folder / "train")
    torch.manual_seed(0)
    model = ImageClassifier(3, 16, (8, 12), sorted(COLOURS))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "classifier")
    ImageClassifier(3, 16, (8, 12)).save_pretrained(folder / "another")
    return folder


def flags(world: Path, out: Path, **changes) -> list[object]:
    """Flags of an evaluation in the features of the classifier; None leaves one out, a list gives several values."""
    chosen = {
        "reference": world / "train",
        "features": f"classifier:{world / 'classifier'}",
        "statistics_dir": world / "statistics",
        "output_dir": out,
        "device": "cpu",
    } | changes
    given = [
        (f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in chosen.items() if value
    ]
    return [part for each in given for part in each]


def figures(out: Path, point: int = 0, group: int = 0) -> dict[str, dict]:
    return json.loads((out / "metrics.json").read_text())["points"][point]["groups"][group]["figures"]


# ---- folders


def test_real_images_are_near_and_noise_is_far(world, tmp_path):
    samples = {"real": world / "test", "noise": make_images(tmp_path / "noisy", 150, seed=3, noise=120)}
    for name, folder in samples.items():
        classes = {"label_column": "label", "classifier": world / "classifier"}
        run("evaluate.py", *flags(world, tmp_path / name, samples=folder, **classes))
    real, noise = figures(tmp_path / "real"), figures(tmp_path / "noise")
    assert real["fid"]["value"] < 0.1 * noise["fid"]["value"]
    assert real["kid"]["low"] <= 0 <= real["kid"]["high"] < noise["kid"]["low"]
    assert real["precision"]["value"] > 0.8 > 0.5 > noise["precision"]["value"]
    assert real["accuracy"]["value"] > 0.97
    for figure in real.values():
        assert figure["num_samples"] == 150
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["interval"]
    values = json.loads((tmp_path / "real" / "metrics.json").read_text())
    (group,) = values["points"][0]["groups"]  # the classifier's own features and its accuracy are of one kind
    assert re.search(r"weights [0-9a-f]{8}, 16 px", group["features"])
    assert set(group["not_measured"]) == {"cmmd", "clip_score", "copies"}


def test_figures_are_those_of_the_features(world, tmp_path):
    """FID of the script, on files, against scipy on what the classifier says of the same pixels."""
    import scipy.linalg

    run("evaluate.py", *flags(world, tmp_path / "out", samples=world / "test", metrics=["fid"]))
    model = ImageClassifier.from_pretrained(world / "classifier").eval()
    with torch.no_grad():
        x, y = (model.features(read_folder(world / name)[0]).double().numpy() for name in ("test", "train"))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = shift + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * np.trace(root)
    assert figures(tmp_path / "out")["fid"]["value"] == pytest.approx(expected, rel=1e-3)


def test_report_needs_nothing_beside_it(world, tmp_path):
    result = run("evaluate.py", *flags(world, tmp_path / "out", samples=world / "test", metrics=["fid", "kid"]))
    report = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]{0,40})", report)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^']*", "", report)
    assert "@import" not in report
    for said in (result.stdout, report):
        assert "n = 150" in said
        assert "half-sampling" in said
        assert "weights" in said
    assert len(sources) == 2  # samples, and those nearest to real images


def test_features_of_two_kinds_never_share_a_table(world, tmp_path):
    both = [f"classifier:{world / name}" for name in ("classifier", "another")]
    run("evaluate.py", *flags(world, tmp_path / "out", samples=world / "test", features=both, metrics=["fid"]))
    report = (tmp_path / "out" / "report.html").read_text()
    tables = re.findall(r"<table>.*?</table>", report, re.DOTALL)
    assert sum("FID" in table for table in tables) == 2
    assert all(table.count("FID (lower") <= 1 for table in tables)
    for group, which in enumerate(both):
        value = f"<b>{figures(tmp_path / 'out', group=group)['fid']['value']:.4g}</b>"
        (holds,) = [table for table in tables if value in table]
        heading = report[: report.index(holds)].rindex("<h2>")
        assert which.removeprefix("classifier:") in report[heading : report.index(holds)]


# ---- statistics of real images


def test_statistics_are_kept_and_given(world, tmp_path):
    kept = tmp_path / "kept"
    reference = shutil.copytree(world / "train", tmp_path / "reference")
    common = {"samples": world / "test", "statistics_dir": kept, "metrics": ["fid", "kid"]}
    run("evaluate.py", *flags(world, tmp_path / "a", reference=reference, **common))
    (file,) = kept.iterdir()
    written = file.stat().st_mtime_ns
    moved = reference.rename(tmp_path / "moved")
    run("evaluate.py", *flags(world, tmp_path / "b", reference=moved, **common))
    assert [path.stat().st_mtime_ns for path in kept.iterdir()] == [written]  # the same content elsewhere
    run("evaluate.py", *flags(world, tmp_path / "c", reference=file, **common))
    assert figures(tmp_path / "a") == figures(tmp_path / "b") == figures(tmp_path / "c")
    Image.new("RGB", (16, 16)).save(next(moved.glob("*/*.png")))
    run("evaluate.py", *flags(world, tmp_path / "d", reference=moved, **common))
    assert len(list(kept.iterdir())) == 2  # another image is another reference
    assert figures(tmp_path / "d") != figures(tmp_path / "a")

    others = {**common, "features": f"classifier:{world / 'another'}"}
    error = refused(run("evaluate.py", *flags(world, tmp_path / "e", reference=file, **others), check=False))
    assert "FIDs of different features cannot be compared" in error
    large = {**common, "samples": make_images(tmp_path / "larger", 40, seed=5, size=24)}
    error = refused(run("evaluate.py", *flags(world, tmp_path / "f", reference=file, **large), check=False))
    assert "16 x 16" in error
    assert "24 x 24" in error
    assert not (tmp_path / "f").exists()


def test_statistics_of_other_tools(world, tmp_path):
    model = ImageClassifier.from_pretrained(world / "classifier").eval()
    with torch.no_grad():
        x = model.features(read_folder(world / "train")[0]).double().numpy()
    np.savez(tmp_path / "reference.npz", mu=x.mean(0), sigma=np.cov(x.T))
    given = {"samples": world / "test", "reference": tmp_path / "reference.npz"}
    run("evaluate.py", *flags(world, tmp_path / "a", **given))
    run("evaluate.py", *flags(world, tmp_path / "b", samples=world / "test"))
    assert figures(tmp_path / "a")["fid"]["value"] == pytest.approx(figures(tmp_path / "b")["fid"]["value"], rel=1e-3)
    missing = json.loads((tmp_path / "a" / "metrics.json").read_text())["points"][0]["groups"][0]["not_measured"]
    assert "statistics alone" in missing["kid"]
    error = refused(run("evaluate.py", *flags(world, tmp_path / "c", **given, metrics=["kid"]), check=False))
    assert "--metrics kid" in error
    np.savez(tmp_path / "reference.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert "5 features" in refused(run("evaluate.py", *flags(world, tmp_path / "d", **given), check=False))


# ---- copies


def test_copies_of_training_images_are_found(world, tmp_path):
    samples = shutil.copytree(world / "test", tmp_path / "samples")
    for path in (samples / "red").iterdir():  # a third of the samples
        shutil.copy(world / "train" / "red" / path.name, path)
    held_out = make_images(tmp_path / "held_out", 120, seed=9)
    sources = {"training_data": world / "train", "held_out_data": held_out, "held_out_data_split": "train"}
    for name, folder in (("copied", samples), ("honest", world / "test")):
        run("evaluate.py", *flags(world, tmp_path / name, samples=folder, metrics=["copies"], **sources))
    pixels = figures(tmp_path / "copied", group=1)
    assert pixels["copies"]["value"] > 0.3
    assert figures(tmp_path / "copied")["copies"]["value"] > 0.3  # in features too
    assert figures(tmp_path / "honest", group=1)["copies"]["value"] < 0.1
    assert "pixels at 32 x 32" in (tmp_path / "copied" / "report.html").read_text()
    same = {**sources, "held_out_data": world / "train"}
    error = refused(run("evaluate.py", *flags(world, tmp_path / "x", samples=samples, **same), check=False))
    assert "--held_out_data" in error
    assert "never saw" in error


# ---- runs


def test_sweep_over_a_run(world, class_run, tmp_path):
    chosen = {"model": class_run, "num_samples": 30, "num_inference_steps": 3, "batch_size": 16, "seed": 5}
    out = tmp_path / "out"
    result = run(
        "evaluate.py",
        *flags(
            world, out, **chosen, classifier=world / "classifier", sweep=["guidance_scale", "1", "3"], metrics=["fid"]
        ),
    )
    values = json.loads((out / "metrics.json").read_text())
    assert [point["point"] for point in values["points"]] == ["guidance_scale 1", "guidance_scale 3"]
    assert values["sweep"] == "guidance_scale"
    for i in range(2):
        assert set(figures(out, i)) == {"fid", "accuracy"}
    assert "guidance_scale 3" in result.stdout
    drawings = re.findall(r"<svg.*?</svg>", (out / "report.html").read_text(), re.DOTALL)
    assert len(drawings) == 2  # FID against accuracy, and over the scale
    for drawing in drawings:
        assert len(xml.etree.ElementTree.fromstring(drawing).findall("circle")) == 2
    # The same pictures as sample.py's: label i % 3 has seed 5 + i there too, if it makes one of each.
    few = ("--num_images_per_prompt", 1, "--num_inference_steps", 3, "--batch_size", 16, "--seed", 5)
    run(
        "sample.py",
        "--model",
        class_run,
        "--guidance_scale",
        3,
        *few,
        "--output_dir",
        tmp_path / "s",
        "--device",
        "cpu",
    )
    for name in ("00000.png", "00002.png"):
        ours, theirs = out / "samples" / "guidance_scale_3" / name, tmp_path / "s" / name
        np.testing.assert_allclose(
            np.asarray(Image.open(ours), dtype=int), np.asarray(Image.open(theirs), dtype=int), atol=1
        )


def test_captions_of_the_reference_are_prompts(text_run, tiny_clip, image_folder, tmp_path):
    """A text-to-image run in CLIP's features: captions of real images go in, and are what the CLIP score compares."""
    out = tmp_path / "out"
    run(
        "evaluate.py",
        *("--model", text_run, "--reference", image_folder, "--caption_column", "text", "--num_samples", 24),
        *("--features", f"clip:{tiny_clip}", "--num_inference_steps", 2, "--statistics_dir", tmp_path / "kept"),
        *("--metrics", "cmmd", "clip_score", "kid", "--output_dir", out, "--device", "cpu"),
    )
    assert set(figures(out)) == {"cmmd", "clip_score", "kid"}
    prompts = {
        json.loads(line)["prompt"] for line in (out / "samples" / "all" / "samples.jsonl").read_text().splitlines()
    }
    assert prompts == {"a red square", "a green square", "a blue square"}
    notes = json.loads((out / "metrics.json").read_text())["notes"]
    assert any("reference: 48 of 48 images were cropped" in note for note in notes)  # 20 x 24 -> 16 x 16


def test_run_whose_weights_are_damaged(world, class_run, tmp_path):
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(class_run, tmp_path / "run")
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[next(iter(weights))][:] = float("nan")
    save_file(weights, path)
    steps = ("--num_inference_steps", 2)
    of_samples = ("--model", damaged, "--output_dir", tmp_path / "s", "--device", "cpu", *steps)
    of_evaluation = (*flags(world, tmp_path / "e", model=damaged, num_samples=30), *steps)
    for script, given in (("sample.py", of_samples), ("evaluate.py", of_evaluation)):
        assert "NaN" in refused(run(script, *given, check=False)), script


# ---- what is wrong


def grey_images(folder: Path) -> Path:
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_grey_against_colour_is_said(world, tmp_path):
    grey = grey_images(tmp_path / "grey")
    result = run("evaluate.py", *flags(world, tmp_path / "out", samples=grey, metrics=["fid"]))
    said = "samples: 40 of 40 images are grey, read as colour with three equal channels"
    assert said in result.stdout
    assert said in (tmp_path / "out" / "report.html").read_text()


def test_mixed_sizes_are_resized_on_demand_and_that_is_said(world, tmp_path):
    samples = shutil.copytree(world / "test", tmp_path / "samples")
    Image.new("RGB", (40, 24)).save(samples / "red" / "000.png")
    error = refused(run("evaluate.py", *flags(world, tmp_path / "a", samples=samples), check=False))
    assert "000.png is 40 x 24" in error
    assert "--resolution 16" in error
    result = run("evaluate.py", *flags(world, tmp_path / "b", samples=samples, resolution=16, metrics=["fid"]))
    assert "samples: 1 of 150 images were cropped" in result.stdout


def damaged_folder(folder: Path, world: Path) -> Path:
    shutil.copytree(world / "test", folder)
    (folder / "red" / "003.png").write_bytes(b"no image")
    return folder


def empty_folder(folder: Path, _: Path) -> Path:
    folder.mkdir()
    return folder


# name -> (flags that are wrong, what the message must hold)
BAD = {
    "empty folder": (lambda w, t: {"samples": empty_folder(t / "x", w)}, ["--samples", "found nothing"]),
    "no such folder": (lambda w, t: {"samples": t / "nowhere"}, ["--samples", "nowhere"]),
    "broken image": (lambda w, t: {"samples": damaged_folder(t / "x", w)}, ["003.png", "cannot be read"]),
    "fewer samples than features": (
        lambda w, t: {"samples": make_images(t / "few", 24, 0, size=32), "features": f"classifier:{t / 'wide'}"},
        ["24 samples", "40 features", "at least 41", "--metrics without fid"],
    ),
    "hardly any samples": (lambda w, t: {"samples": w / "test", "num_samples": 5}, ["5 samples", "at least 20"]),
    "small reference": (
        lambda w, t: {"samples": w / "large"},
        ["--reference", "16 x 16", "24 x 24", "--resolution 16"],
    ),
    "sweep without a run": (
        lambda w, t: {"samples": w / "test", "sweep": ["guidance_scale", "1", "2"]},
        ["--sweep with --samples"],
    ),
    "sweep over nonsense": (lambda w, t: {"sweep": ["learning_rate", "1", "2"]}, ["learning_rate", "guidance_scale"]),
    "sweep over one value": (lambda w, t: {"sweep": ["guidance_scale", "1"]}, ["at least two"]),
    "sweep over words": (lambda w, t: {"sweep": ["num_inference_steps", "a", "b"]}, ["--sweep num_inference_steps"]),
    "guidance of made images": (lambda w, t: {"samples": w / "test", "guidance_scale": 3}, ["--guidance_scale"]),
    "metric that no features give": (lambda w, t: {"samples": w / "test", "metrics": ["cmmd"]}, ["CLIP features"]),
    "copies without held-out images": (lambda w, t: {"training_data": w / "train"}, ["--held_out_data"]),
    "classifier of fewer classes": (
        lambda w, t: {"samples": labelled(t / "x", w, 7), "classifier": w / "classifier"},
        ["--classifier", "3 classes", "class 7"],
    ),
    "no run": (lambda w, t: {"model": t}, ["--model", "is no run"]),
    "taken folder": (lambda w, t: {"samples": w / "test", "output_dir": w}, ["--output_dir", "not empty"]),
    "labels of a run": (lambda w, t: {"label_column": "label"}, ["--label_column without --samples"]),
    "split of nothing": (lambda w, t: {"samples": w / "test", "held_out_data_split": "test"}, ["nothing to split"]),
}


def labelled(folder: Path, world: Path, label: int) -> Path:
    """Images as sample.py leaves them, for a class."""
    folder.mkdir()
    lines = []
    for path in sorted((world / "test" / "red").iterdir()):
        shutil.copy(path, folder)
        lines.append(json.dumps({"file_name": path.name, "class_labels": label}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    Image.new("RGB", (99, 77)).save(folder / "grid.png")  # not one of the samples
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, world, tmp_path):
    ImageClassifier(3, 16, (8, 40)).save_pretrained(tmp_path / "wide")
    wrong, said = BAD[name]
    result = run("evaluate.py", *flags(world, **{"out": tmp_path / "out"} | wrong(world, tmp_path)), check=False)
    message = refused(result)
    for part in said:
        assert part in message, message
    assert not (tmp_path / "out").exists()


def test_what_sample_py_leaves_is_read_without_its_grid(world, tmp_path):
    samples = labelled(tmp_path / "x", world, 2)  # red is the last of the three names
    chosen = {"samples": samples, "classifier": world / "classifier", "metrics": ["fid"]}
    run("evaluate.py", *flags(world, tmp_path / "out", **chosen))
    accuracy = figures(tmp_path / "out")["accuracy"]
    assert (accuracy["value"], accuracy["num_samples"]) == (1.0, 50)
