"""Write the demo's data set: scikit-learn's handwritten digits with captions, and a text tower with random weights.

    python demo/prepare_digits.py --output_dir runs/demo/data

leaves `train/` and `test/` (PNGs and `metadata.jsonl`, the image-folder layout of `datasets`), `prompts.txt`,
`text_encoder/` and `tokenizer/`. The same seed writes the same files. Nothing is downloaded.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {word}",
    "the digit {number}",
    "a picture of the number {word}",
    "{number}",
    "{word}, written by hand",
)
RESOLUTION = 32
TEST_FRACTION = 0.2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as a captioned image folder.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write; must be empty or absent.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the train/test split and of the text tower's weights."
    )
    return parser.parse_args()


def captions_of(digit: int) -> list[str]:
    """Every template, filled with one digit (0 to 9)."""
    return [template.format(word=DIGIT_WORDS[digit], number=digit) for template in TEMPLATES]


def draw_digit(ink: np.ndarray) -> Image.Image:
    """One digit of scikit-learn, (8, 8) with ink from 0 to 16, as a 32 x 32 RGB picture: dark ink on white paper."""
    paper = np.round(255 - ink * (255 / 16)).astype(np.uint8)  # (8, 8)
    return Image.fromarray(paper).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).convert("RGB")


def write_images(output_dir: Path, seed: int) -> dict[str, int]:
    """Write `train/` and `test/`, a fixed split in which every digit has its share. Returns the rows of each."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=TEST_FRACTION, stratify=digits.target, random_state=seed)
    for split, chosen in (("train", train), ("test", test)):
        folder = output_dir / split
        folder.mkdir(parents=True)
        lines = []
        for row in sorted(chosen.tolist()):
            label = int(digits.target[row])
            file_name = f"digit_{row:04d}.png"
            draw_digit(digits.images[row]).save(folder / file_name)
            lines.append(json.dumps({"file_name": file_name, "text": captions_of(label), "label": label}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train": len(train), "test": len(test)}


def write_prompts(output_dir: Path) -> None:
    """Write `prompts.txt`: every template with every digit, one a line."""
    prompts = [caption for digit in range(10) for caption in captions_of(digit)]
    (output_dir / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def write_text_tower(output_dir: Path, seed: int) -> None:
    """Write `tokenizer/`, CLIP's own, and `text_encoder/`, a small CLIP text model whose weights are random.

    A pretrained tower would have to be downloaded. A random one still gives each caption an embedding of its own,
    which is all that fifty captions need; it knows nothing of what the words mean.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, where `utils` is

    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from utils.image.text import build_clip_tokenizer

    tokenizer = build_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=3.0,  # untrained attention is near uniform; sharper, it tells captions apart twice as well
    )
    torch.manual_seed(seed)
    CLIPTextModel(config).save_pretrained(output_dir / "text_encoder")
    tokenizer.save_pretrained(output_dir / "tokenizer")


def main() -> int:
    args = parse_args()
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        message = f"error: --output_dir {args.output_dir} is not an empty folder; remove it or name another one"
        print(message, file=sys.stderr)
        return 2
    rows = write_images(args.output_dir, args.seed)
    write_prompts(args.output_dir)
    write_text_tower(args.output_dir, args.seed)
    print(f"{args.output_dir}: {rows['train']} training and {rows['test']} test images, prompts, a small text tower")
    return 0


if __name__ == "__main__":
    sys.exit(main())
