"""Features: the resizing that all share, and every kind of network, loaded as a user loads it from weights of the real
shape with random values."""

import json
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from utils.errors import UserError
from utils.image.evaluation.classifier import ImageClassifier
from utils.image.evaluation.features import PixelFeatures, clean_resize, load_features
from utils.image.text import build_clip_tokenizer


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


# ---- resizing


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 299), (96, 64, 17), (20, 20, 20)])
def test_resizing_is_pils_bicubic_on_floats(height: int, width: int, size: int) -> None:
    images = random_images(2, height, width)
    resized = clean_resize(images, size)
    for image, ours in zip(images.numpy(), resized, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[:, :, channel].astype(np.float32))
            expected = np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_array_equal(ours[channel].numpy(), expected)


def test_resizing_is_clean_fids() -> None:
    resize = pytest.importorskip("cleanfid.resize")
    image = random_images(1, 75, 75)
    expected = resize.make_resizer("PIL", False, "bicubic", (24, 24))(image[0].numpy())
    np.testing.assert_allclose(clean_resize(image, 24)[0].permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_resizing_does_not_alias() -> None:
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert (clean_resize(stripes, 16) - 127.5).abs().max() < 12  # grey, but for the border
    aliased = torch.nn.functional.interpolate(stripes.permute(0, 3, 1, 2).float(), size=(16, 16), mode="nearest")
    assert (aliased - 127.5).abs().min() > 100  # what an ordinary resize makes of it


# ---- Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Weights of FID's Inception with random values, as the library's file has them."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


def test_inception_from_a_file(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    features = load_features(f"inception:{inception_file}", "cpu")
    assert features.dim == 2048
    assert "inception" in features.name
    small, large = random_images(1, 32, 32), random_images(1, 299, 299)
    found = features(large)
    assert found.logits is not None
    assert found.logits.shape == (1, 1008)
    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception_file))
    pooled, logits = network(large.permute(0, 3, 1, 2))
    torch.testing.assert_close(found.features, pooled)
    torch.testing.assert_close(found.logits, logits)
    ours, aliased = features(small).features, network(small.permute(0, 3, 1, 2))[0]
    assert not torch.allclose(ours, aliased, rtol=1e-3)  # the network's own resize is not used


def test_inception_runs_no_code_from_its_file(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match=r"--features inception:.*cannot be loaded"):
        load_features(f"inception:{tmp_path / 'weights.pth'}", "cpu")
    assert not (tmp_path / "ran").exists()


def test_inception_of_other_weights_and_without_a_network(tmp_path: Path, monkeypatch) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected torch-fidelity's weights"):
        load_features(f"inception:{tmp_path / 'other.pth'}", "cpu")

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="give the file of its weights as inception:FILE"):
        load_features("inception", "cpu")


# ---- CLIP


def test_clip_of_transformers(tiny_clip: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    features = load_features(f"clip:{tiny_clip}", "cpu")
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), CLIPTokenizer.from_pretrained(tiny_clip)
    images = random_images(3, 32, 32)
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)(list(images.numpy()), return_tensors="pt")["pixel_values"]
    captions = ["a red square", "blue"]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**tokens, pixel_values=pixels)
    normalise = torch.nn.functional.normalize
    torch.testing.assert_close(normalise(features(images).features, dim=1), outputs.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normalise(features.text(captions), dim=1), outputs.text_embeds, atol=1e-5, rtol=1e-5)
    assert features(images).logits is None
    features.text(["long " * 500])  # cut to what the model can read


def test_clip_without_its_image_tower_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--features"):
        load_features(f"clip:{tmp_path}", "cpu")


def test_open_clip_folder(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    sizes = {"width": 16, "layers": 1}
    vision = sizes | {"image_size": 32, "patch_size": 8, "head_width": 8}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": sizes | {"heads": 2, "context_length": 20}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    features = load_features(f"open_clip:{tmp_path}", "cpu")
    assert features.dim == 12
    image = random_images(1, 32, 32)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    with torch.no_grad():
        expected = model.encode_image(preprocess(Image.fromarray(image[0].numpy()))[None])
        expected_text = model.encode_text(open_clip.SimpleTokenizer(context_length=20)(["a bird"]))
    torch.testing.assert_close(features(image).features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.text(["a bird"]), expected_text)


@pytest.mark.slow
def test_open_clip_of_the_real_shape(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    features = load_features(f"open_clip:ViT-B-32:{tmp_path / 'weights.pt'}", "cpu")
    assert features.dim == 512
    image = random_images(1, 224, 224)
    model.eval()
    with torch.no_grad():
        expected = model.encode_image(preprocess(Image.fromarray(image[0].numpy()))[None])
        expected_text = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a bird"]))
    torch.testing.assert_close(features(image).features, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.text(["a bird"]), expected_text)


# ---- classifiers


def test_our_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ImageClassifier(5, 16, (8, 12)).eval()
    model.save_pretrained(tmp_path)
    features = load_features(f"classifier:{tmp_path}", "cpu")
    images = random_images(4, 16, 16)
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(features(images).features, model.features(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features(images).logits, model(pixels), atol=1e-5, rtol=1e-5)
    assert features.dim == 12


def test_classifiers_of_transformers(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {
        "vit": ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)),
        "resnet": ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        found = load_features(f"classifier:{tmp_path / name}", "cpu")(random_images(2, 24, 24))
        head = model.classifier if name == "vit" else model.classifier[-1]
        assert found.logits is not None
        torch.testing.assert_close(head(found.features), found.logits)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = ImageClassifier(5, 16, (8, 12))
    model.head.weight.data[:] = float("nan")
    model.levels[0][0].weight.data[:] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not finite"):
        load_features(f"classifier:{tmp_path}", "cpu")


def test_names_tell_weights_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        ImageClassifier(5, 16, (8, 12)).save_pretrained(tmp_path / str(seed))
        ImageClassifier.from_pretrained(tmp_path / str(seed)).save_pretrained(tmp_path / "moved" / str(seed))
    first, second = (load_features(f"classifier:{tmp_path / name}", "cpu") for name in ("0", "1"))
    moved = load_features(f"classifier:{tmp_path / 'moved' / '0'}", "cpu")
    assert first.name != second.name
    assert first.identity != second.identity
    assert first.identity == moved.identity  # the same weights elsewhere are the same features


@pytest.mark.parametrize(
    "spec", ["vgg", "clip", "classifier:", "classifier:/nowhere/at/all", "inception:/nowhere.pth"]
)
def test_what_does_not_exist_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="--features"):
        load_features(spec, "cpu")


def test_distances_of_pixels_are_root_mean_squares() -> None:
    black, grey = torch.zeros(1, 40, 40, 3, dtype=torch.uint8), torch.full((1, 40, 40, 3), 51, dtype=torch.uint8)
    pixels = PixelFeatures()
    assert torch.dist(pixels(black).features, pixels(grey).features).item() == pytest.approx(0.2)
