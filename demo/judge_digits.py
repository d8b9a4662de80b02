"""Judge generated digits as an outsider would: with a classifier that has seen real images only.

    python demo/judge_digits.py --data_dir runs/demo/data --samples_dir runs/demo/samples --output_dir runs/demo

prints a table and writes `metrics.json` and `grid.png`. Distances are L2 between 8 x 8 grey images with values 0 to 1.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PATTERN = re.compile(rf"\b(?:{'|'.join(DIGIT_WORDS)}|[0-9])\b", re.IGNORECASE)

CELL, GAP, SAMPLES_PER_ROW, REAL_PER_ROW = 64, 4, 10, 2  # of the grid, in pixels and pictures


class JudgeError(Exception):
    """Something in the input is missing or wrong; the message says what, and where."""


class Pictures(NamedTuple):
    pixels: np.ndarray  # (N, H, W, 3) uint8
    digits: np.ndarray  # (N,) the label of a real image, the digit asked for of a sample
    prompts: list[str]  # of samples; empty strings for real images


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge generated digits with a classifier trained on real ones.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder that demo/prepare_digits.py wrote.")
    parser.add_argument("--samples_dir", type=Path, required=True, help="Folder with samples.jsonl and its PNGs.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where metrics.json and grid.png go.")
    return parser.parse_args()


# ---- reading


def digit_of_prompt(prompt: str) -> int:
    """The one digit that a prompt names, in words or as a number."""
    found = {word.lower() for word in DIGIT_PATTERN.findall(prompt)}
    digits = {int(word) if word.isdigit() else DIGIT_WORDS.index(word) for word in found}
    if len(digits) != 1:
        raise JudgeError(f"the prompt {prompt!r} names {len(digits)} digits; it must name exactly one")
    return digits.pop()


def read_rows(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, each of which must have `keys`."""
    if not path.is_file():
        raise JudgeError(f"{path} does not exist")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise JudgeError(f"{path}, line {number}: not JSON ({error.msg})") from error
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise JudgeError(f"{path}, line {number}: no {missing[0]!r}")
        rows.append(row)
    if not rows:
        raise JudgeError(f"{path} is empty")
    return rows


def read_pixels(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """The images that rows name, all of one size: (N, H, W, 3) uint8."""
    pixels = []
    for row in rows:
        try:
            with Image.open(folder / row["file_name"]) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise JudgeError(f"cannot read the image {folder / row['file_name']}: {error}") from error
        if pixels[-1].shape != pixels[0].shape:
            raise JudgeError(f"{folder}: images of several sizes, {pixels[0].shape[:2]} and {pixels[-1].shape[:2]}")
    return np.stack(pixels)


def read_real(folder: Path) -> Pictures:
    """One split of the real images."""
    rows = read_rows(folder / "metadata.jsonl", ("file_name", "label"))
    return Pictures(read_pixels(folder, rows), np.array([row["label"] for row in rows]), [""] * len(rows))


def read_samples(folder: Path) -> Pictures:
    """The samples, with the digit that each prompt asked for."""
    rows = read_rows(folder / "samples.jsonl", ("file_name", "prompt"))
    digits = [digit_of_prompt(row["prompt"]) for row in rows]
    return Pictures(read_pixels(folder, rows), np.array(digits), [row["prompt"] for row in rows])


# ---- measuring


def features_of(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 to (N, 64): grey, averaged over areas down to 8 x 8, 0 (black) to 1 (white)."""
    grey = [Image.fromarray(picture).convert("L").resize((8, 8), Image.Resampling.BOX) for picture in pixels]
    return np.stack([np.asarray(picture, dtype=np.float64).ravel() / 255 for picture in grey])


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """L2 between every pair of rows: (N, D) and (M, D) to (N, M). Exactly 0 for equal rows."""
    return np.stack([np.sqrt(((second - row) ** 2).sum(axis=1)) for row in first])


def spread(features: np.ndarray, digits: np.ndarray, per_digit: dict[int, int]) -> tuple[float | None, float | None]:
    """Mean distance of an image to the nearest other of the same digit, and between any two of the same digit.

    Among more images the nearest is nearer, so `per_digit` says how many of each are compared: of samples as many as
    of real images, drawn at random. None where no digit has two.
    """
    draw = np.random.default_rng(0)
    to_nearest, to_any = [], []
    for digit, count in per_digit.items():
        if count < 2:
            continue
        chosen = draw.choice(np.flatnonzero(digits == digit), count, replace=False)
        apart = distances(features[chosen], features[chosen])  # (count, count), 0 on the diagonal
        to_any.append(apart.sum() / (count * (count - 1)))
        to_nearest.append((apart + np.diag(np.full(count, np.inf))).min(axis=1).mean())
    return (float(np.mean(to_nearest)), float(np.mean(to_any))) if to_any else (None, None)


def count_copies(samples: np.ndarray, train: np.ndarray) -> tuple[int, int]:
    """Samples with the very pixels of an earlier sample, and of a training image."""
    sample_bytes = [picture.tobytes() for picture in samples]
    train_bytes = {picture.tobytes() for picture in train}
    return len(sample_bytes) - len(set(sample_bytes)), sum(picture in train_bytes for picture in sample_bytes)


def judge(train: Pictures, test: Pictures, samples: Pictures) -> dict[str, Any]:
    """Everything that `metrics.json` holds, but for the seconds."""
    from sklearn.svm import SVC

    if samples.pixels.shape[1:] != train.pixels.shape[1:]:
        raise JudgeError(f"the samples are {samples.pixels.shape[1:3]}, the real images {train.pixels.shape[1:3]}")
    train_features, test_features, sample_features = (features_of(part.pixels) for part in (train, test, samples))
    classifier = SVC(kernel="rbf", C=10.0).fit(train_features, train.digits)
    right = classifier.predict(sample_features) == samples.digits

    counts = {d: min(int((samples.digits == d).sum()), int((train.digits == d).sum())) for d in range(10)}
    sample_nearest, sample_any = spread(sample_features, samples.digits, counts)
    real_nearest, real_any = spread(train_features, train.digits, counts)
    duplicates, copies = count_copies(samples.pixels, train.pixels)
    return {
        "num_samples": len(right),
        "num_training_images": len(train.digits),
        "num_held_out_images": len(test.digits),
        "classifier_accuracy_on_held_out_images": float((classifier.predict(test_features) == test.digits).mean()),
        "share_read_as_prompted": float(right.mean()),
        "share_read_as_prompted_per_digit": {
            str(digit): float(right[samples.digits == digit].mean()) for digit in np.unique(samples.digits)
        },
        "distance": "L2 between 8 x 8 grey images with values 0 to 1",
        "nearest_training_image": {
            "samples": float(distances(sample_features, train_features).min(axis=1).mean()),
            "held_out_images": float(distances(test_features, train_features).min(axis=1).mean()),
        },
        "nearest_of_same_digit": {"samples": sample_nearest, "training_images": real_nearest},
        "mean_distance_within_digit": {"samples": sample_any, "training_images": real_any},
        "duplicate_samples": duplicates,
        "samples_equal_to_a_training_image": copies,
    }


# ---- showing


def draw_grid(samples: Pictures, train: Pictures) -> Image.Image:
    """One row per digit: a prompt, its first samples, and at the right real images of that digit to compare with."""
    font, top, left = ImageFont.load_default(16), 34, 250
    step = CELL + GAP
    real_x = left + SAMPLES_PER_ROW * step + 24
    size = (real_x + REAL_PER_ROW * step + GAP, top + 10 * step + GAP)
    grid = Image.new("RGB", size, (236, 236, 236))
    pen = ImageDraw.Draw(grid)
    for x, heading in ((12, "prompt"), (left, "samples"), (real_x, "real images")):
        pen.text((x, 9), heading, fill=(90, 90, 90), font=font)

    for digit in range(10):
        y = top + digit * step
        of_digit = np.flatnonzero(samples.digits == digit)
        asked = list(dict.fromkeys(samples.prompts[row] for row in of_digit))
        prompt = asked[digit % len(asked)] if asked else "(no samples)"  # another template in every row
        pen.text((12, y + CELL // 2), prompt, fill=(0, 0, 0), font=font, anchor="lm")
        shown = samples.pixels[[row for row in of_digit if samples.prompts[row] == prompt][:SAMPLES_PER_ROW]]
        real = train.pixels[train.digits == digit][:REAL_PER_ROW]
        for x, pictures in ((left, shown), (real_x, real)):
            for column, pixels in enumerate(pictures):
                picture = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
                grid.paste(picture, (x + column * step, y))
    return grid


def format_table(metrics: dict[str, Any]) -> str:
    """The metrics as lines that a person reads."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    shares = metrics["share_read_as_prompted_per_digit"].items()
    near, same = metrics["nearest_training_image"], metrics["nearest_of_same_digit"]
    pairs = metrics["mean_distance_within_digit"]
    lines = [
        ("classifier right on held-out real images", f"{metrics['classifier_accuracy_on_held_out_images']:.1%}"),
        (f"of {metrics['num_samples']:,} samples read as prompted", f"{metrics['share_read_as_prompted']:.1%}"),
        *((f"    of those asked for a {digit}", f"{share:.1%}") for digit, share in shares),
        (f"distances: {metrics['distance']}", ""),
        ("    sample to nearest training image", number(near["samples"])),
        ("    held-out real image to nearest training image", number(near["held_out_images"])),
        ("    sample to nearest sample of the same digit", number(same["samples"])),
        ("    real image to nearest real image of the same digit", number(same["training_images"])),
        ("    two samples of the same digit, on average", number(pairs["samples"])),
        ("    two real images of the same digit, on average", number(pairs["training_images"])),
        ("samples equal to another sample", str(metrics["duplicate_samples"])),
        ("samples equal to a training image", str(metrics["samples_equal_to_a_training_image"])),
    ]
    return "\n".join(f"{name:<58}{value:>8}".rstrip() for name, value in lines)


def main() -> int:
    args = parse_args()
    start = time.perf_counter()
    try:
        train, test = read_real(args.data_dir / "train"), read_real(args.data_dir / "test")
        samples = read_samples(args.samples_dir)
        metrics = judge(train, test, samples)
    except JudgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_grid(samples, train).save(args.output_dir / "grid.png")
    metrics["seconds"] = round(time.perf_counter() - start, 2)
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(format_table(metrics))
    print(f"wrote {args.output_dir / 'metrics.json'} and {args.output_dir / 'grid.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
