"""Data sets become latent caches: killed and continued, by several processes, from every source, with bad images."""

import json
import os
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.support.images import png
from tests.support.processes import ROOT, SignalAt, contents, refused, run, run_script, snapshot, start
from utils.files import replace_durably
from utils.image.cache import ImageCache
from utils.latents.spec import LatentSpec
from utils.latents.writer import ShardFolder, finished_cache

PRECOMPUTE = "precompute_latents.py"

NUM_IMAGES, BAD = 200, {3: b"", 77: b"not an image", 130: None}  # None: cut short


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """200 images of 18 x 16 in one folder, three of them unreadable, with captions, some shared, and labels."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    lines = []
    for i in range(NUM_IMAGES):
        content = png(generator.integers(0, 256, (16, 18, 3), dtype=np.uint8))
        if i in BAD:
            content = content[:200] if BAD[i] is None else BAD[i]
        (folder / f"{i:03d}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"caption {i // 2}", "label": i % 7}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def flags(images, tiny_vae, tiny_text_encoder):
    return [
        *("--train_data_dir", images, "--caption_column", "text", "--label_column", "label", "--resolution", 16),
        *("--random_flip", "--rows_per_shard", 8, "--encode_batch_size", 4),
        *("--pretrained_vae_model_name_or_path", tiny_vae),
        *("--pretrained_text_encoder_name_or_path", tiny_text_encoder),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The cache that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    run(PRECOMPUTE, *flags, "--latents_dir", folder)
    return folder


@pytest.fixture(scope="module")
def unfinished(flags, tmp_path_factory):
    """A cache that was killed after some shards."""
    folder = tmp_path_factory.mktemp("unfinished") / "cache"
    fault = SignalAt(ShardFolder.write, 4)
    assert start(PRECOMPUTE, *flags, "--latents_dir", folder, fault=fault).wait_for_kill()
    assert not (folder / "latent_spec.json").exists()
    return folder


def num_shards(folder) -> int:
    """Shards, of both tables, that are done."""
    return len(list(folder.glob("*/shard-*.json")))


# ---- kills and processes --------------------------------------------------------------------------------------------


def test_skipped_images_are_counted_and_listed(whole):
    spec = json.loads((whole / "latent_spec.json").read_text())
    assert (spec["num_rows"], spec["num_skipped"]) == (NUM_IMAGES - len(BAD), len(BAD))
    skipped = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in skipped] == sorted(BAD)
    assert all(entry["path"].endswith(f"{entry['row']:03d}.png") for entry in skipped)
    assert skipped[0]["reason"] == "zero bytes"
    assert "known format" in skipped[1]["reason"]
    assert skipped[2]["reason"]
    rows = datasets.load_from_disk(str(whole / "latents"))
    kept = [row for row in range(NUM_IMAGES) if row not in BAD]
    assert rows["row"][:] == kept
    assert rows["label"][:] == [row % 7 for row in kept]
    assert rows["caption"][:] == [[f"caption {row // 2}"] for row in kept]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_continued_it_is_the_same(flags, whole, tmp_path, processes):
    """SIGKILL at random moments, again and again: what stands there at the end is, file for file, what one run leaves.
    The moments are those before something is forced to the disk, under its temporary name or its own."""
    chance = random.Random(processes)
    folder = tmp_path / "cache"
    for _ in range(5):
        fault = SignalAt(os.fsync, chance.randint(1, 40 // processes), rank=chance.randrange(processes), within=os)
        running = start(PRECOMPUTE, *flags, "--latents_dir", folder, processes=processes, fault=fault)
        assert running.wait_for_kill(), running.wait().stderr
        assert not (folder / "latent_spec.json").exists()
    assert 0 < num_shards(folder) < num_shards(whole)
    run(PRECOMPUTE, *flags, "--latents_dir", folder, processes=processes)
    assert contents(folder) == contents(whole)


def test_killed_while_it_writes_a_text_it_leaves_nothing_behind(flags, tmp_path):
    """plan.json, a manifest, skipped.jsonl, ... latent_spec.json: each before it has its name; and before plan.json goes."""
    flags = [*flags, "--max_samples", 20, "--max_skipped_fraction", 0.1, "--rows_per_shard", 32]
    run(PRECOMPUTE, *flags, "--latents_dir", tmp_path / "whole")
    last = tmp_path / "last"
    assert start(PRECOMPUTE, *flags, "--latents_dir", last, fault=SignalAt(Path.unlink, 1)).wait_for_kill()
    assert {"plan.json", "latent_spec.json"} <= contents(last).keys()
    run(PRECOMPUTE, *flags, "--latents_dir", last)
    assert contents(last) == contents(tmp_path / "whole")
    for count in range(1, 20):
        folder, fault = tmp_path / str(count), SignalAt(replace_durably, count)
        if not start(PRECOMPUTE, *flags, "--latents_dir", folder, fault=fault).wait_for_kill():
            break
        run(PRECOMPUTE, *flags, "--latents_dir", folder)
        assert contents(folder) == contents(tmp_path / "whole"), fault
    assert count == 8  # seven texts, and then it was not killed


def test_a_finished_cache_that_nothing_can_be_written_to_is_read(whole, tmp_path, monkeypatch):
    """With the plan.json that a killed process left there."""
    shutil.copytree(whole, tmp_path / "cache")
    (tmp_path / "cache" / "plan.json").write_text("{}")

    def refuse(path, missing_ok=False):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "unlink", refuse)
    spec = LatentSpec.read(whole)
    assert finished_cache(tmp_path / "cache", spec.fingerprint, is_main_process=True) == spec


def test_two_processes_make_the_cache_of_one(flags, whole, tmp_path):
    """Under torch's launcher. Each process says how many they are: a launcher that silently starts one would prove nothing."""
    script = tmp_path / "witness.py"
    script.write_text(
        "import runpy\n"
        "from accelerate import PartialState\n"
        f"runpy.run_path({str(ROOT / PRECOMPUTE)!r}, run_name='__main__')\n"
        "print(f'rank {PartialState().process_index} of {PartialState().num_processes} done')\n"
    )
    result = run_script(script, *flags, "--latents_dir", tmp_path / "cache", processes=2)
    assert "rank 0 of 2 done" in result.stdout
    assert "rank 1 of 2 done" in result.stdout
    assert contents(tmp_path / "cache") == contents(whole)


# ---- fingerprints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory, images, tiny_vae, tiny_text_encoder):
    """The same things changed a little, and copies of them that are not changed."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("others")
    vae = AutoencoderKL.from_pretrained(tiny_vae)
    shutil.copytree(tiny_vae, folder / "same_vae")
    shutil.copytree(tiny_text_encoder, folder / "same_text")
    shutil.copytree(tiny_text_encoder, folder / "other_text")
    text_encoder = CLIPTextModel.from_pretrained(tiny_text_encoder / "text_encoder")
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
        text_encoder.get_input_embeddings().weight[0, 0] += 1e-3
    vae.save_pretrained(folder / "other_vae")
    text_encoder.save_pretrained(folder / "other_text" / "text_encoder")
    for name in ("other_images", "other_captions", "same_images"):
        shutil.copytree(images, folder / name)
    image = folder / "other_images" / "150.png"
    image.write_bytes(png(255 - np.asarray(Image.open(image))))
    metadata = folder / "other_captions" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("caption 42", "caption 24"))
    return folder


CHANGES = {
    "vae": (["--pretrained_vae_model_name_or_path", "other_vae"], "vae = "),
    "text encoder": (["--pretrained_text_encoder_name_or_path", "other_text"], "text_encoder = "),
    "resolution": (["--resolution", 20], "resolution = "),
    "crop": (["--center_crop"], "crop = "),
    "crop's seed": (["--seed", 1], "crop = "),
    "flips": (["--no-random_flip"], "random_flip = "),
    "an image": (["--train_data_dir", "other_images"], "dataset = "),
    "a caption": (["--train_data_dir", "other_captions"], "dataset = "),
    "number of samples": (["--max_samples", 100], "max_samples = "),
    "content": (["--latent_content", "mean"], "content = "),
}


# What may differ between two caches of the same content, but not between two halves of one.
HALVES = {
    "shards": (["--rows_per_shard", 9], "rows_per_shard = "),
    "content of captions": (["--max_cached_captions", 3], "max_cached_captions = "),
    "precision": (["--mixed_precision", "bf16"], "mixed_precision = "),
}


@pytest.mark.parametrize(
    ("name", "state"),
    [(name, state) for state in ("whole", "unfinished") for name in CHANGES]
    + [(name, "unfinished") for name in HALVES],
)
def test_a_cache_of_something_else_is_refused(flags, others, request, name, state):
    folder = request.getfixturevalue(state)
    changed, key = (CHANGES | HALVES)[name]
    changed = [others / value if (others / str(value)).exists() else value for value in changed]
    before = snapshot(folder)
    line = refused(run(PRECOMPUTE, *flags, "--latents_dir", folder, *changed, check=False))
    assert "--latents_dir" in line
    assert str(folder) in line
    made, asked = line.split("this run asks for")
    assert key in made
    assert key in asked
    assert made.split(key)[1].split(", and")[0] != asked.split(key)[1].split(";")[0]
    assert snapshot(folder) == before


def test_the_same_things_elsewhere_are_the_same(flags, others, whole, unfinished, tmp_path):
    """Equal weights and images under other paths go on with an unfinished cache and accept a finished one."""
    moved = [
        *("--pretrained_vae_model_name_or_path", others / "same_vae", "--train_data_dir", others / "same_images"),
        *("--pretrained_text_encoder_name_or_path", others / "same_text"),
    ]
    before = snapshot(whole)
    run(PRECOMPUTE, *flags, *moved, "--latents_dir", whole)
    assert snapshot(whole) == before
    shutil.copytree(unfinished, tmp_path / "cache")
    run(PRECOMPUTE, *flags, *moved, "--latents_dir", tmp_path / "cache")
    for table in ("latents", "captions"):
        arrow = {name: digest for name, digest in contents(tmp_path / "cache" / table).items() if name.endswith("w")}
        expected = {name: digest for name, digest in contents(whole / table).items() if name.endswith("w")}
        assert arrow == expected


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """24 images of three classes, in every layout; in the same order everywhere."""
    root = tmp_path_factory.mktemp("sources")
    generator = np.random.default_rng(1)
    contents = [png(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(24)]
    labels, names = [i // 8 for i in range(24)], ["cat", "dog", "emu"]
    lines = []
    for i, content in enumerate(contents):
        path = root / "classes" / names[labels[i]] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        (root / "listed").mkdir(exist_ok=True)
        (root / "listed" / f"{i:02d}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "label": labels[i]}))
    (root / "listed" / "metadata.jsonl").write_text("\n".join(lines))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": labels}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(root / "train.parquet")
    (root / "hub" / "data").mkdir(parents=True)
    dataset.select(range(10)).to_parquet(root / "hub" / "data" / "train-00000-of-00002.parquet")
    dataset.select(range(10, 24)).to_parquet(root / "hub" / "data" / "train-00001-of-00002.parquet")
    return root


SOURCES = {
    "class folders": ["--train_data_dir", "classes"],
    "metadata.jsonl": ["--train_data_dir", "listed"],
    "parquet": ["--dataset_name", "train.parquet"],
    "hub layout": ["--dataset_name", "hub"],
}


@pytest.fixture(scope="module")
def expected_latents(sources, tiny_vae):
    """What the VAE makes of the 24 images."""
    from diffusers import AutoencoderKL

    files = sorted((sources / "listed").glob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files]))
    with torch.no_grad():
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return AutoencoderKL.from_pretrained(tiny_vae).eval().encode(images).latent_dist.mean


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_rows(sources, expected_latents, tiny_vae, tmp_path, monkeypatch, name, streaming):
    flag, path = SOURCES[name]
    flags = [
        *(flag, sources / path, "--label_column", "label", "--resolution", 16, "--rows_per_shard", 7),
        *("--latent_content", "mean", "--pretrained_vae_model_name_or_path", tiny_vae),
    ]
    run(PRECOMPUTE, *flags, "--latents_dir", tmp_path / "cache", "--streaming" if streaming else "--no-streaming")
    cache = ImageCache(tmp_path / "cache")
    batch = cache.gather(np.arange(24))
    assert batch["class_labels"].tolist() == [i // 8 for i in range(24)]
    torch.testing.assert_close(batch["latents"][:, 0].float(), expected_latents, atol=1e-3, rtol=2e-3)
    assert cache.spec.content == "mean"
    has_names = name != "metadata.jsonl"
    assert cache.spec.labels == {"num_classes": 3, "names": ["cat", "dog", "emu"] if has_names else None}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_max_samples_takes_the_first_rows(flags, whole, tmp_path, streaming):
    extra = ["--max_samples", 20, "--streaming" if streaming else "--no-streaming", "--max_skipped_fraction", 0.1]
    run(PRECOMPUTE, *flags, *extra, "--latents_dir", tmp_path / "cache")
    rows = datasets.load_from_disk(str(tmp_path / "cache" / "latents"))
    assert rows["row"][:] == [row for row in range(20) if row not in BAD]
    assert rows["latents"][:] == datasets.load_from_disk(str(whole / "latents"))["latents"][:19]


# ---- bad images, bad rows, other autoencoders -----------------------------------------------------------------------


def test_too_many_bad_images_stop_and_a_higher_limit_continues(images, tiny_vae, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    for i in range(100, 140):
        (tmp_path / "images" / f"{i:03d}.png").write_bytes(b"")
    flags = [
        *("--train_data_dir", tmp_path / "images", "--resolution", 16, "--rows_per_shard", 8),
        *("--pretrained_vae_model_name_or_path", tiny_vae, "--latents_dir", tmp_path / "cache"),
    ]
    line = refused(run(PRECOMPUTE, *flags, check=False))
    assert "--max_skipped_fraction 0.05" in line
    assert "of 200" in line
    assert "zero bytes" in line
    skipped = tmp_path / "cache" / "skipped.jsonl"
    assert str(skipped) in line
    assert len(skipped.read_text().splitlines()) > 10
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "latents").iterdir()}
    assert done
    run(PRECOMPUTE, *flags, "--max_skipped_fraction", 0.5)
    assert (
        done.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "latents").iterdir()}.items()
    )
    cache = ImageCache(tmp_path / "cache")
    assert cache.spec.num_skipped == len(skipped.read_text().splitlines()) == 42
    assert len(cache) == 158


def test_no_readable_image_at_all(tiny_vae, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"")
    flags = ["--train_data_dir", tmp_path / "images", "--resolution", 16, "--max_skipped_fraction", 1]
    flags += ["--pretrained_vae_model_name_or_path", tiny_vae, "--latents_dir", tmp_path / "cache"]
    assert "1 of 1 images are unreadable" in refused(run(PRECOMPUTE, *flags, check=False))


@pytest.mark.parametrize("label", [-1, 3, None, 1.5], ids=str)
def test_labels_that_are_none(tiny_vae, tmp_path, label):
    """A label outside the classes stops with its row; a row without one is skipped; a column of fractions is no label."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    rows = {"image": [{"bytes": png(pixels), "path": None}] * 3, "label": [0, label, 1]}
    kind = datasets.Value("float64") if label == 1.5 else datasets.Value("int64")
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "label": kind}))
    if label == 3:  # three classes by name: parquet keeps them, and whoever wrote the column did not look
        dataset.to_parquet(tmp_path / "plain.parquet")
        table = pq.read_table(tmp_path / "plain.parquet")
        info = {
            "info": {
                "features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
            }
        }
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "data.parquet")
    else:
        dataset.to_parquet(tmp_path / "data.parquet")
    flags = ["--dataset_name", tmp_path / "data.parquet", "--label_column", "label", "--resolution", 16]
    flags += ["--pretrained_vae_model_name_or_path", tiny_vae, "--latents_dir", tmp_path / "cache"]
    if label is None:
        run(PRECOMPUTE, *flags, "--max_skipped_fraction", 0.5)
        assert ImageCache(tmp_path / "cache").gather(np.arange(2))["class_labels"].tolist() == [0, 1]
        assert "no label" in (tmp_path / "cache" / "skipped.jsonl").read_text()
        return
    line = refused(run(PRECOMPUTE, *flags, check=False))
    assert "--label_column label" in line
    if label != 1.5:
        assert f"row 1 has the label {label}" in line


def test_captions_of_every_kind(tiny_vae, tiny_text_encoder, tmp_path):
    """Empty, missing, numbers, lists, 10,000 characters, emoji, spaces: each is a caption, and equal ones are one row."""
    captions = ["", None, 7, ["one", "two", "one"], "x" * 10_000, "🦄" * 300, "  two ", [], [None, ""]]
    expected = [[""], [""], ["7"], ["one", "two", "one"], ["x" * 10_000], ["🦄" * 300], ["two"], [""], [""]]
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i, caption in enumerate(captions):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    run(
        PRECOMPUTE, "--train_data_dir", folder, "--caption_column", "text", "--resolution", 16, "--latents_dir", tmp_path / "cache",
        "--pretrained_vae_model_name_or_path", tiny_vae, "--pretrained_text_encoder_name_or_path", tiny_text_encoder,
    )  # fmt: skip
    assert datasets.load_from_disk(str(tmp_path / "cache" / "latents"))["caption"][:] == expected
    table = datasets.load_from_disk(str(tmp_path / "cache" / "captions"))
    assert sorted(table["caption"][:]) == sorted({text for texts in expected for text in texts})
    assert table["caption"][0] == ""
    assert max(table["num_tokens"][:]) == 77
    cache = ImageCache(tmp_path / "cache")
    states = torch.tensor(table["hidden_states"][:]).view(len(table), 77, 16)
    drawn = cache.gather(np.full(2, 3), {"caption": np.array([0.4, 0.0])}.__getitem__)["encoder_hidden_states"].float()
    assert torch.equal(drawn, states[[table["caption"][:].index(text) for text in ("two", "one")]])


def test_autoencoder_tiny(images, tmp_path):
    """An autoencoder without a posterior: its one latent is stored; moments, which it has not, are refused."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    flags = ["--train_data_dir", images, "--resolution", 16, "--center_crop", "--max_samples", 3]
    flags += ["--pretrained_vae_model_name_or_path", tmp_path / "vae", "--latents_dir", tmp_path / "cache"]
    line = refused(run(PRECOMPUTE, *flags, "--latent_content", "moments", check=False))
    assert "--latent_content moments" in line
    assert "AutoencoderTiny" in line
    assert not (tmp_path / "cache").exists()
    run(PRECOMPUTE, *flags)
    cache = ImageCache(tmp_path / "cache")
    assert cache.spec.content == "mean"
    pixels = [np.asarray(Image.open(images / f"{i:03d}.png"))[:, 1:17] for i in range(3)]
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1).latents
    latents = cache.gather(np.arange(3))["latents"]
    assert latents.shape == (3, 1, *cache.spec.shape) == (3, 1, *expected.shape[1:])
    torch.testing.assert_close(latents[:, 0].float(), expected, atol=2e-3, rtol=2e-3)
