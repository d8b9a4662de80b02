"""Trains the small classifier that reads which class a sample shows (evaluate.py --classifier, --features).

    python benchmarks/train_classifier.py --dataset_name uoft-cs/cifar10 --label_column label \\
        --output_dir runs/classifier

On the real training split, with random crops and mirror images; its accuracy on the real test split is printed and
stored in its config. It never sees a generated image.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.args.parsing import run_script
from utils.image.data.pixels import BACKGROUNDS, Framing
from utils.image.data.rows import resolve_columns, undecoded
from utils.image.data.sources import open_image_dataset
from utils.image.data.stream import to_pixels
from utils.image.evaluation.classifier import ImageClassifier


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Hub name, local folder, or .parquet file or pattern.")
    parser.add_argument("--image_column", default=None, help="Default: the only image column.")
    parser.add_argument("--label_column", required=True, help="Class label: an integer.")
    parser.add_argument("--train_split", default="train", help="Split to learn from.")
    parser.add_argument("--test_split", default="test", help="Split that the accuracy is measured on.")
    parser.add_argument("--resolution", type=int, default=32, help="Pixels of a side.")
    parser.add_argument(
        "--block_out_channels", type=int, nargs="+", default=[32, 64, 128, 256], help="Channels of each level."
    )
    parser.add_argument("--epochs", type=int, default=10, help="Epochs of training.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images a step.")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="Peak learning rate.")
    parser.add_argument("--max_samples", type=int, default=None, help="Use the first N rows of each split only.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, data order and augmentation.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to run.")
    parser.add_argument("--output_dir", required=True, help="Where the classifier goes.")
    return parser.parse_args()


def read_split(args: argparse.Namespace, split: str) -> tuple[Tensor, Tensor, list[str] | None]:
    """Images (N, 3, R, R) uint8, labels (N,) and the names of the classes, of a whole split in memory."""
    dataset = open_image_dataset(args.dataset_name, None, None, split=split)
    dataset = dataset.select(range(min(args.max_samples or len(dataset), len(dataset))))
    columns = resolve_columns(dataset, args.image_column, None, args.label_column)
    framing = Framing(args.resolution, True, BACKGROUNDS["white"])
    rows = undecoded(dataset, columns.image)
    generator = np.random.default_rng(0)  # a centre crop draws nothing from it
    images = np.stack([framing(row[columns.image], generator) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(rows[columns.label]), columns.label_names


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images (B, 3, H, W) and shifts each by up to an eighth of its side, with reflected edges."""
    size, side = len(images), images.shape[2]
    room = side // 8
    flip = torch.rand(size, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = torch.nn.functional.pad(images.float(), (room,) * 4, mode="reflect").to(images.dtype)
    down, right = torch.randint(2 * room + 1, (2, size), generator=generator)
    rows = (down[:, None] + torch.arange(side))[:, None, :, None]  # (B, 1, H, 1)
    columns = (right[:, None] + torch.arange(side))[:, None, None, :]  # (B, 1, 1, W)
    return padded[torch.arange(size)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


@torch.no_grad()
def accuracy(model: ImageClassifier, images: Tensor, labels: Tensor, device: str) -> float:
    """Share of images whose most likely class is their label."""
    model.eval()
    right = 0
    for batch, label in zip(images.split(500), labels.split(500), strict=True):
        right += int((model(to_pixels(batch.to(device))).argmax(1).cpu() == label).sum())
    return right / len(labels)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels, names = read_split(args, args.train_split)
    test_images, test_labels, _ = read_split(args, args.test_split)
    num_classes = len(names) if names else int(labels.max()) + 1
    model = ImageClassifier(num_classes, args.resolution, tuple(args.block_out_channels), names)
    model.to(args.device, memory_format=torch.channels_last)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    steps_per_epoch = math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.epochs * steps_per_epoch, pct_start=0.2
    )

    started = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(args.batch_size):
            batch = to_pixels(augment(images[rows], generator).to(args.device))
            with torch.autocast(torch.device(args.device).type, torch.bfloat16):
                loss = model.loss(batch.contiguous(memory_format=torch.channels_last), labels[rows].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}, {time.perf_counter() - started:.0f} s", flush=True)

    right = accuracy(model, test_images, test_labels, args.device)
    model.register_to_config(test_accuracy=right)
    model.save_pretrained(args.output_dir)
    print(f"accuracy on {len(test_labels)} images of split {args.test_split}: {right:.4f}; saved in {args.output_dir}")


if __name__ == "__main__":
    run_script(main, parse_args)
