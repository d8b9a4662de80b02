"""The latent cache against what it stands for: the frozen models run on the images and captions themselves."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.data import COLOURS
from tests.support.models import TRAIN_FLAGS, cache_flags
from tests.support.processes import refused, run, scalars
from utils.draws import SampleDraws, uniform_draws
from utils.errors import UserError
from utils.image import codec as codecs
from utils.image.cache import ImageCache
from utils.latents.cache import LatentCache, LatentStream
from utils.latents.spec import LatentSpec

NUM_ROWS, EPOCHS = 48, 16
CAPTIONS = [[f"a {name} square", name] for name in COLOURS]  # of label 0, 1, 2


@pytest.fixture(scope="module")
def opened(cache):
    return ImageCache(cache)


@pytest.fixture(scope="module")
def table(cache):
    return datasets.load_from_disk(str(cache / "latents"))


@pytest.fixture(scope="module")
def caption_table(cache):
    return datasets.load_from_disk(str(cache / "captions"))


@pytest.fixture(scope="module")
def vae(tiny_vae):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_vae).eval()


@pytest.fixture(scope="module")
def pixels(image_folder):
    """The images as the cache should have seen them, (48, 3, 16, 16) in [-1, 1]: 20 x 24 pixels, of which a square of 20 x 20
    at a height that the row decides becomes 16 x 16."""
    images = []
    for row in range(NUM_ROWS):
        top = int(np.random.default_rng([0, row]).integers(24 * 16 // 20 - 16 + 1)) * 20 / 16
        image = Image.open(image_folder / f"{row:03d}.png").convert("RGB")
        images.append(np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS, box=(0, top, 20, top + 20))))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def stored(table, column: str) -> torch.Tensor:
    """(48, 2, 4, 4, 4): mean and std."""
    return torch.tensor(table[column][:]).view(NUM_ROWS, 2, 4, 4, 4)


@pytest.fixture(scope="module")
def epochs(opened):
    """Positions of 16 epochs, their rows, and the batch that the stream gives for them."""
    stream = LatentStream(opened, seed=3)
    positions = np.arange(NUM_ROWS * EPOCHS)
    return positions, stream.order.rows(positions), stream.__getitems__(positions.tolist())


# ---- what is stored -------------------------------------------------------------------------------------------------


def test_the_spec_says_what_is_stored(cache, tiny_vae, tiny_text_encoder):
    spec = json.loads((cache / "latent_spec.json").read_text())
    expected = {
        "kind": "image",
        "shape": [4, 4, 4],
        "dtype": "float16",
        "content": "moments",
        "flips": True,
        "num_rows": NUM_ROWS,
        "num_skipped": 0,
        "captions": {"content": "hidden_states", "shape": [77, 16], "count": 7, "hidden_size": 16},
        "labels": {"num_classes": 3, "names": None},
        "vae": str(tiny_vae),
        "text_encoder": {"name": str(tiny_text_encoder), "library": "transformers", "tokenizer": None},
    }
    assert {name: spec[name] for name in expected} == expected
    fingerprint = spec["fingerprint"]
    assert {"dataset", "columns", "vae", "text_encoder", "resolution", "crop", "random_flip"} <= set(fingerprint)
    assert not {"learning_rate", "output_dir", "latents_dir"} & set(fingerprint)
    assert LatentSpec.read(cache).shape == (4, 4, 4)


def test_both_tables_open_with_datasets(table, caption_table):
    tensor = datasets.List(datasets.Value("float16"), length=2 * 4 * 4 * 4)
    assert table.features["latents"] == table.features["latents_flipped"] == tensor
    assert caption_table.features["hidden_states"] == datasets.List(datasets.Value("float16"), length=77 * 16)
    assert table["row"][:] == list(range(NUM_ROWS))
    assert table["label"][:] == [row % 3 for row in range(NUM_ROWS)]
    assert table["caption"][:] == [CAPTIONS[row % 3] for row in range(NUM_ROWS)]
    assert len(table.data.column("latents").chunks) == 5  # --rows_per_shard 10


@pytest.mark.parametrize("column", ["latents", "latents_flipped"])
def test_latents_are_those_of_the_vae(table, vae, pixels, column):
    """Mirrored latents are the encode of the mirrored image, which is not the mirrored encode."""
    flipped = column == "latents_flipped"
    with torch.no_grad():
        posterior = vae.encode(pixels.flip(-1) if flipped else pixels).latent_dist
    expected = torch.stack([posterior.mean, posterior.std], dim=1)
    torch.testing.assert_close(stored(table, column), expected.half().float(), atol=1e-3, rtol=2e-3)
    if flipped:
        mirrored = stored(table, "latents").flip(-1)
        assert (mirrored - expected).abs().max() > 0.05


def test_caption_states_are_those_of_the_text_encoder(caption_table, tiny_text_encoder):
    from transformers import CLIPTextModel, CLIPTokenizer

    text_encoder = CLIPTextModel.from_pretrained(tiny_text_encoder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tiny_text_encoder / "tokenizer")
    captions = caption_table["caption"][:]
    assert captions[0] == ""
    assert sorted(captions[1:]) == sorted(text for texts in CAPTIONS for text in texts)
    tokens = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = text_encoder(tokens.input_ids).last_hidden_state
    states = torch.tensor(caption_table["hidden_states"][:]).view(7, 77, 16)
    torch.testing.assert_close(states, expected.half().float(), atol=1e-3, rtol=2e-3)
    assert caption_table["num_tokens"][:] == tokens.attention_mask.sum(1).tolist()


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_gather_gives_the_rows_asked_for(opened, table, caption_table):
    rows = np.array([47, 0, 10, 9, 10, 31])
    batch = opened.gather(rows)
    assert torch.equal(batch["latents"].float(), stored(table, "latents")[rows])
    assert batch["class_labels"].tolist() == [row % 3 for row in rows]
    states = dict(zip(caption_table["caption"][:], caption_table["hidden_states"][:], strict=True))
    expected = torch.tensor([states[CAPTIONS[row % 3][0]] for row in rows]).view(6, 77, 16)
    assert torch.equal(batch["encoder_hidden_states"].float(), expected)
    assert opened.gather(rows[:0])["latents"].shape == (0, 2, 4, 4, 4)


def test_latents_alone_are_read_of_any_modality(cache, opened):
    """What a modality stores beside them is read by its own class; without it, nothing else is drawn."""
    asked, rows = [], np.array([5, 0])
    batch = LatentCache(cache).gather(rows, lambda name: np.zeros(asked.append(name) or 2))
    assert asked == ["flip"]
    assert list(batch) == ["latents"]
    assert torch.equal(batch["latents"], opened.gather(rows, lambda name: np.zeros(2))["latents"])


def test_every_epoch_has_every_row_once_and_its_own_order(epochs):
    _, rows, _ = epochs
    orders = rows.reshape(EPOCHS, NUM_ROWS)
    assert all(sorted(order) == list(range(NUM_ROWS)) for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS


def test_half_of_the_samples_are_mirrored(epochs, table):
    _, rows, batch = epochs
    plain, mirrored = stored(table, "latents")[rows], stored(table, "latents_flipped")[rows]
    is_plain = (batch["latents"].float() == plain).flatten(1).all(1)
    is_mirrored = (batch["latents"].float() == mirrored).flatten(1).all(1)
    assert (is_plain ^ is_mirrored).all()
    assert abs(is_mirrored.float().mean() - 0.5) < 0.06  # three standard deviations of 768 draws
    for row in range(NUM_ROWS):
        assert 0 < is_mirrored[rows == row].sum() < EPOCHS


def test_each_caption_of_a_list_is_drawn(epochs, caption_table):
    _, rows, batch = epochs
    states = {
        tuple(state): text
        for text, state in zip(caption_table["caption"][:], caption_table["hidden_states"][:], strict=True)
    }
    drawn = [states[tuple(state)] for state in batch["encoder_hidden_states"].flatten(1).tolist()]
    counts = dict(zip(caption_table["caption"][:], caption_table["num_tokens"][:], strict=True))
    assert batch["num_tokens"].tolist() == [counts[text] for text in drawn]
    first = np.array([CAPTIONS[row % 3].index(text) == 0 for row, text in zip(rows, drawn, strict=True)])
    assert abs(first.mean() - 0.5) < 0.06
    for row in range(NUM_ROWS):
        assert 0 < first[rows == row].sum() < EPOCHS


def test_the_posterior_is_sampled_afresh_each_time(opened, table):
    """The samples of one row have the stored mean and std; the same position always has the same sample."""
    count = 4000
    batch = {"latents": stored(table, "latents")[7:8].expand(count, -1, -1, -1, -1)}
    samples = opened.normalise(batch, SampleDraws(0, torch.arange(count)))
    raw = samples / 0.7 + 0.1
    mean, std = stored(table, "latents")[7]
    assert ((raw.mean(0) - mean).abs() < 5 * std / count**0.5 + 1e-5).all()
    torch.testing.assert_close(raw.std(0), std, rtol=0.06, atol=1e-6)
    again = opened.normalise({"latents": batch["latents"][:9]}, SampleDraws(0, torch.arange(9)))
    assert torch.equal(again, samples[:9])
    assert not torch.equal(samples[0], samples[1])


def test_draws_do_not_share_their_numbers():
    """A mirrored sample must not be likelier to have one of its captions, or to lose it."""
    positions = np.arange(4000)
    draws = [uniform_draws(0, name, positions) for name in ("flip", "caption", "condition_drop", "timestep")]
    correlations = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlations).max() < 0.06


# ---- normalisation --------------------------------------------------------------------------------------------------


def test_normalisation_by_the_vae(opened, table):
    positions = torch.arange(NUM_ROWS)
    latents = opened.normalise(opened.gather(np.arange(NUM_ROWS)), SampleDraws(0, positions))
    mean, std = stored(table, "latents").unbind(1)
    z = mean + std * SampleDraws(0, positions).normal("posterior", mean.shape)
    torch.testing.assert_close(latents, (z - 0.1) * 0.7)


def test_measured_normalisation_whitens_each_channel(cache, epochs):
    measured = ImageCache(cache, "measured")
    positions, _, batch = epochs
    latents = measured.normalise(batch, SampleDraws(0, torch.from_numpy(positions)))
    assert latents.mean((0, 2, 3)).abs().max() < 0.03
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.03
    by_vae = ImageCache(cache).normalise(batch, SampleDraws(0, torch.from_numpy(positions)))
    assert (by_vae.std((0, 2, 3)) - 1).abs().max() > 0.1  # otherwise this would test nothing


@pytest.mark.parametrize("name", ["vae", "measured"])
def test_round_trip(cache, vae, pixels, tiny_vae, name):
    """encode, normalise, denormalise, decode gives what the VAE gives; so does the VAE that carries the normalisation in its
    convolutions, with neither scaling nor shift."""
    normalisation = ImageCache(cache, name).normalisation
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        expected = vae.decode(posterior.mean).sample
        latents = normalisation.normalise(posterior.mean)
        assert (latents - posterior.mean).abs().max() > 0.05
        torch.testing.assert_close(
            vae.decode(normalisation.denormalise(latents)).sample, expected, atol=1e-4, rtol=1e-4
        )
        folded = codecs.fold_normalisation(codecs.load_vae(str(tiny_vae)), normalisation)
        assert folded.config.scaling_factor == 1
        assert not folded.config.shift_factor
        torch.testing.assert_close(folded.decode(latents).sample, expected, atol=1e-4, rtol=1e-4)
        again = folded.encode(pixels).latent_dist
        torch.testing.assert_close(again.mean, latents, atol=1e-4, rtol=1e-4)
        std = torch.tensor(normalisation.std).view(1, -1, 1, 1)
        torch.testing.assert_close(again.std, posterior.std / std, atol=1e-4, rtol=1e-3)


# ---- captions by token ids, and faults ------------------------------------------------------------------------------


def test_encoder_in_the_loop_gives_the_losses_of_cached_states(
    cache, image_folder, tiny_vae, tiny_text_encoder, model_flags, tmp_path
):
    """With more captions than --max_cached_captions the cache holds token ids; what is trained is the same."""
    flags = [*cache_flags(image_folder, tiny_vae, tiny_text_encoder), "--max_cached_captions", 1]
    run("precompute_latents.py", *flags, "--latents_dir", tmp_path / "ids")
    ids = ImageCache(tmp_path / "ids")
    assert ids.caption_content == "input_ids"
    assert datasets.load_from_disk(str(tmp_path / "ids" / "captions")).features["input_ids"] == datasets.List(
        datasets.Value("int32"), length=77
    )
    assert ids.gather(np.arange(3))["input_ids"].shape == (3, 77)
    losses = []
    for latents_dir in (cache, tmp_path / "ids"):
        folder = tmp_path / f"run{len(losses)}"
        common = [*model_flags["dit"], *TRAIN_FLAGS, "--logging_steps", 1, "--cond_drop_prob", 0.3]
        run("train_text_to_image_ldm.py", "--latents_dir", latents_dir, "--output_dir", folder, *common)
        losses.append(scalars(folder, "train/loss"))
    assert sorted(losses[0]) == list(range(1, 9))
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=2e-4)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a missing shard": (lambda c: (c / "latents" / "shard-000002.arrow").unlink(), "shard-000002.arrow is missing"),
    "a missing manifest": (lambda c: (c / "latents" / "shard-000002.json").unlink(), "shard-000002.json is missing"),
    "a missing list": (lambda c: (c / "captions" / "state.json").unlink(), "state.json is missing"),
    "a flipped bit": (lambda c: flip_a_byte(c / "latents" / "shard-000001.arrow"), "shard-000001.arrow is damaged"),
    "a flipped bit in a caption": (lambda c: flip_a_byte(c / "captions" / "shard-000000.arrow"), "shard-000000.arrow is damaged"),
    "a truncated shard": (lambda c: (c / "latents" / "shard-000004.arrow").write_bytes(b""), "shard-000004.arrow is damaged"),
    "an unfinished cache": (lambda c: (c / "latent_spec.json").unlink(), "is not finished"),
    "another version": (lambda c: (c / "latent_spec.json").write_text('{"version": 0}'), "version 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(cache, tmp_path, name):
    damage, expected = DAMAGE[name]
    shutil.copytree(cache, tmp_path / "cache")
    ImageCache(tmp_path / "cache")
    damage(tmp_path / "cache")
    with pytest.raises(UserError, match=expected):
        ImageCache(tmp_path / "cache")


def test_trainer_refuses_a_damaged_cache(cache, model_flags, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    flip_a_byte(tmp_path / "cache" / "latents" / "shard-000003.arrow")
    flags = ["--latents_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", *model_flags["dit"], *TRAIN_FLAGS]
    line = refused(run("train_class_cond_ldm.py", *flags, check=False))
    assert "--latents_dir" in line
    assert "shard-000003.arrow is damaged" in line
    assert not (tmp_path / "run").exists()
