"""A latent cache in parts, each for other processes: made, read, resumed, and refused where the parts do not fit."""

import json
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import cache_flags
from tests.support.processes import SignalAt, refused, run, scalars
from utils.draws import PositionBatches
from utils.errors import UserError
from utils.image.cache import ImageCache
from utils.latents.cache import LatentStream
from utils.latents.parts import pool, readers_of, unevenness
from utils.latents.spec import LatentSpec
from utils.training.step_log import StepLog

SCRIPT = "train_text_to_image_ldm.py"


@pytest.fixture(scope="module")
def parts(tmp_path_factory, image_folder, tiny_vae, tiny_text_encoder):
    """part-0 (28 rows) and part-1 (20 rows) of the cache of `image_folder`, made apart."""
    folder = tmp_path_factory.mktemp("parts")
    flags = cache_flags(image_folder, tiny_vae, tiny_text_encoder)
    for index in (0, 1):
        run(
            "precompute_latents.py",
            *flags,
            "--num_parts",
            2,
            "--part_index",
            index,
            "--latents_dir",
            folder / f"part-{index}",
        )
    return folder  # fmt: skip


def specs_of(folder, *indices):
    return [LatentSpec.read(folder / f"part-{i}") for i in indices]


def test_parts_hold_the_rows_of_the_whole(parts, cache):
    """Chunks of ten rows in turn, encoded as the whole cache has them."""
    whole, pieces = ImageCache(cache), [ImageCache(parts / f"part-{i}") for i in (0, 1)]
    rows = [np.r_[0:10, 20:30, 40:48], np.r_[10:20, 30:40]]
    for piece, own in zip(pieces, rows, strict=True):
        expected, found = whole.gather(own), piece.gather(np.arange(len(piece)))
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)


def test_pooled_spec_is_that_of_the_whole(parts, cache):
    pooled, whole = pool(specs_of(parts, 0, 1)), LatentSpec.read(cache)
    assert pooled.num_rows == whole.num_rows == 48
    assert pooled.labels == whole.labels
    for name in ("mean", "std"):
        assert pooled.normalisation["measured"][name] == pytest.approx(whole.normalisation["measured"][name], rel=1e-3)
    assert pool(specs_of(parts, 1, 0, 0, 1)) == pooled  # whoever opened them
    assert unevenness(specs_of(parts, 0, 1)) == pytest.approx(0.4)


def test_pooled_statistics_are_those_of_all_rows(parts):
    """Of parts as unlike in size and values as parts can be, against numpy on all rows at once."""
    generator = np.random.default_rng(0)
    rows = [generator.normal(mean, std, (count, 4)) for mean, std, count in ((1, 2, 300), (-3, 0.5, 20))]
    specs = []
    for spec, values in zip(specs_of(parts, 0, 1), rows, strict=True):
        measured = {"mean": values.mean(0).tolist(), "std": values.std(0).tolist()}
        normalisation = spec.normalisation | {"measured": measured}
        specs.append(replace(spec, num_rows=len(values), normalisation=normalisation))
    pooled, everything = pool(specs).normalisation["measured"], np.concatenate(rows)
    assert pooled["mean"] == pytest.approx(everything.mean(0))
    assert pooled["std"] == pytest.approx(everything.std(0))


@pytest.mark.parametrize("opened", [[0, 1], [0, 0, 1, 1], [1, 0, 1, 0, 1, 0]])
def test_every_row_of_a_part_is_read_once_an_epoch(opened):
    """Together the readers of a part read its endless stream without a gap, whichever processes they are."""
    positions: dict[int, list[int]] = {part: [] for part in opened}
    for process, reader in enumerate(readers_of(opened, batch_size=3)):
        batches = iter(PositionBatches(3, 1, 5, process, len(opened)))
        for _ in range(4):
            positions[opened[process]] += reader.positions(np.array(next(batches)))[1].tolist()
    num_readers = len(opened) // 2
    for found in positions.values():
        assert sorted(found) == list(range(5 * 3 * num_readers, 9 * 3 * num_readers))


def test_streams_read_their_own_part(parts):
    """Four processes: in as many steps as an epoch of the smaller part takes each of its rows comes once."""
    opened, seen = [0, 0, 1, 1], []
    pooled = pool(specs_of(parts, *opened))
    for process, reader in enumerate(readers_of(opened, batch_size=2)):
        part = ImageCache(parts / f"part-{opened[process]}")
        part.join_parts(pooled, "measured", reader)
        stream = LatentStream(part, seed=3)
        batches = iter(PositionBatches(2, 1, 0, process, 4))
        positions = [next(batches) for _ in range(5)]
        rows = [stream.order.rows(reader.positions(np.array(each))[1]) for each in positions]
        seen.append(np.concatenate(rows).tolist())
        latents = torch.cat([stream.__getitems__(each)["latents"] for each in positions])
        draws = [lambda name, share=share: np.full(10, share) for share in (0.5, 0.0)]
        plain, flipped = (part.gather(np.array(seen[-1]), draw)["latents"] for draw in draws)
        assert all(any(torch.equal(a, b) for b in both) for a, *both in zip(latents, plain, flipped, strict=True))
    assert sorted(seen[2] + seen[3]) == list(range(20))
    assert len(set(seen[0] + seen[1])) == 20


def test_the_stream_does_not_depend_on_the_numbers_of_the_machines(parts):
    """Two machines of two processes each, once in one order and once in the other: together the same samples, with the
    same positions, and so with the same noise."""
    samples = []
    for opened in ([0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]):
        samples.append({})
        for process, reader in enumerate(readers_of(opened, batch_size=2)):
            part = ImageCache(parts / f"part-{opened[process]}")
            part.join_parts(pool(specs_of(parts, *opened)), "measured", reader)
            batches = iter(PositionBatches(2, 1, 3, process, 4))
            for batch in (LatentStream(part, seed=3).__getitems__(next(batches)) for _ in range(3)):
                samples[-1] |= dict(zip(batch["positions"].tolist(), batch["latents"], strict=True))
    first, *others = samples
    assert sorted(first) == list(range(3 * 8, 6 * 8))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[position], latents) for position, latents in first.items())


def test_a_stream_of_files_is_cut_by_files(tmp_path, image_folder, tiny_vae):
    """No part reads another's files, together they hold every row once, and no two rows of theirs have one number."""
    images, latents = {}, []
    rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    for i in range(3):
        chosen = rows[i::3][: 10 + i]
        values = {"image": [(image_folder / row["file_name"]).read_bytes() for row in chosen]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        values = {"image": [{"bytes": each, "path": None} for each in values["image"]]}
        table = datasets.Dataset.from_dict(values | {"label": [100 * i + k for k in range(len(chosen))]}, features)
        images[i] = tmp_path / "data" / f"{i}.parquet"
        images[i].parent.mkdir(exist_ok=True)
        table.to_parquet(images[i])
    flags = [
        *("--dataset_name", str(tmp_path / "data" / "*.parquet"), "--label_column", "label", "--resolution", 16),
        *("--pretrained_vae_model_name_or_path", tiny_vae, "--streaming", "--rows_per_shard", 4, "--num_parts", 2),
    ]
    for index in (0, 1):
        folder = tmp_path / f"part-{index}"
        run("precompute_latents.py", *flags, "--part_index", index, "--latents_dir", folder)
        latents.append(datasets.load_from_disk(str(folder / "latents")))
        assert LatentSpec.read(folder).fingerprint["part"]["cut"] == "by files"
    labels = [sorted({label // 100 for label in part["label"]}) for part in latents]
    assert labels == [[0, 1], [2]]
    labels, numbers = (np.concatenate([part[name][:] for part in latents]).tolist() for name in ("label", "row"))
    assert sorted(labels) == [*range(10), *range(100, 111), *range(200, 212)]
    assert len(set(numbers)) == len(numbers) == 33
    assert pool(specs_of(tmp_path, 0, 1)).num_rows == 33


@pytest.fixture(scope="module")
def flags(parts, model_flags):
    return [
        *("--latents_dir", parts / "part-{process}", *model_flags["dit"], "--latent_normalisation", "measured"),
        *("--max_train_steps", 8, "--checkpointing_steps", 4, "--logging_steps", 1, "--train_batch_size", 4),
        *("--learning_rate", 1e-3, "--resume_from_checkpoint", "latest"),
    ]


def test_two_processes_train_on_two_parts_and_resume_exactly(parts, flags, tmp_path):
    """Also where the machines come back with each other's numbers."""
    result = run(SCRIPT, *flags, "--output_dir", tmp_path / "whole", processes=2)
    assert "2 parts, read by 2 processes" in result.stderr
    assert "40.0 % more often" in result.stderr
    assert "48 samples in the data" in result.stderr
    for count in (6, 1):
        fault = SignalAt(StepLog.step_done, count, rank=1)
        run(SCRIPT, *flags, "--output_dir", tmp_path / "killed", processes=2, fault=fault, check=False)
    for process in (0, 1):
        (tmp_path / f"part-{process}").symlink_to(parts / f"part-{1 - process}")
    swapped = ["--latents_dir", tmp_path / "part-{process}"]
    run(SCRIPT, *flags, *swapped, "--output_dir", tmp_path / "killed", processes=2)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(files) > 5
    for file in files:
        ours, theirs = load_file(tmp_path / "killed" / file), load_file(tmp_path / "whole" / file)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    losses = scalars(tmp_path / "whole", "train/loss")
    assert len(losses) == 8
    assert scalars(tmp_path / "killed", "train/loss") == losses
    line = refused(
        run(SCRIPT, *flags, "--train_batch_size", 2, "--gradient_accumulation_steps", 2,
            "--output_dir", tmp_path / "whole", processes=2, check=False)
    )  # fmt: skip
    assert "in parts, by 2 x 4" in line
    assert "in parts, by 2 x 2" in line


# ---- parts that do not fit ------------------------------------------------------------------------------------------


def test_a_part_that_nobody_opened(parts):
    with pytest.raises(UserError, match=r"opened by \[3, 1\] processes"):
        pool(specs_of(parts, 0, 0, 0, 1))
    with pytest.raises(UserError, match=r"opened by \[1, 0\] processes"):
        pool(specs_of(parts, 0))


def test_a_part_beside_a_whole_cache(parts, cache):
    with pytest.raises(UserError, match="part 0 of 2"):
        pool([*specs_of(parts, 0), LatentSpec.read(cache)])


def test_processes_that_opened_different_whole_caches(cache, other_settings):
    with pytest.raises(UserError, match="processes 0 and 2 opened different caches"):
        pool([LatentSpec.read(cache), LatentSpec.read(cache), other_settings])


@pytest.fixture
def other_settings(cache):
    spec = LatentSpec.read(cache)
    return replace(spec, fingerprint=spec.fingerprint | {"resolution": 32})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", 32),
        ("vae", "other"),
        ("part", {"index": 1, "of": 2, "cut": "by chunks", "rows_per_shard": 7}),
        ("dataset", {}),
    ],
)
def test_parts_of_different_settings(parts, tmp_path, key, value):
    shutil.copytree(parts, tmp_path / "parts")
    file = tmp_path / "parts" / "part-1" / "latent_spec.json"
    spec = json.loads(file.read_text())
    spec["fingerprint"][key] = value
    file.write_text(json.dumps(spec))
    with pytest.raises(UserError, match=f"part 0 was made with {key} = .* part 1 with {key} = "):
        pool(specs_of(tmp_path / "parts", 0, 1))


def test_captions_of_different_content(parts, tmp_path):
    """States in one part and token ids in the other: the limit lay between their numbers of captions."""
    shutil.copytree(parts, tmp_path / "parts")
    file = tmp_path / "parts" / "part-1" / "latent_spec.json"
    spec = json.loads(file.read_text())
    spec["captions"]["content"] = "input_ids"
    file.write_text(json.dumps(spec))
    with pytest.raises(UserError, match="--max_cached_captions"):
        pool(specs_of(tmp_path / "parts", 0, 1))


def test_a_part_that_is_not_there_is_said_by_the_main_process(parts, flags, tmp_path):
    shutil.copytree(parts / "part-0", tmp_path / "parts" / "part-0")
    flags = [*flags, "--latents_dir", tmp_path / "parts" / "part-{process}", "--output_dir", tmp_path / "run"]
    line = refused(run(SCRIPT, *flags, processes=2, check=False))
    assert "part-1 does not exist" in line


def test_a_part_out_of_range(image_folder, tmp_path):
    flags = ["--train_data_dir", image_folder, "--num_parts", 2, "--part_index", 2, "--latents_dir", tmp_path / "x"]
    assert "--part_index 2: the parts are 0 to 1" in refused(run("precompute_latents.py", *flags, check=False))
