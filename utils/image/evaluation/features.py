"""What evaluation measures in: features of images by networks that others trained, chosen by table.

A specification is a kind and what it needs, `inception`, `inception:FILE`, `clip:NAME_OR_FOLDER`,
`open_clip:NAME_OR_FILE` or `classifier:FOLDER`. Figures of different features cannot be compared, so every extractor
has a name that holds the hash of its weights, and the name is stored beside every figure.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import read_json
from utils.frozen import load_component, weights_hash
from utils.image.evaluation.classifier import ImageClassifier
from utils.image.text import import_open_clip, load_open_clip_model

INCEPTION_DIM, INCEPTION_SIZE = 2048, 299
# transformers' OPENAI_CLIP_MEAN and OPENAI_CLIP_STD: of CLIPs whose folder has no preprocessor_config.json.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class FeatureBatch(NamedTuple):
    """Features and logits of a batch of images."""

    features: Tensor  # (B, D) float32, on the CPU
    logits: Tensor | None  # (B, K) float32, on the CPU; None of networks that know no classes


def clean_resize(images: Tensor, size: int) -> Tensor:
    """Images (B, H, W, 3) uint8 -> (B, 3, size, size) float32 in [0, 255], by clean-fid's way: each channel as floats
    through PIL's bicubic filter, whose support grows with the scale, so that nothing aliases and nothing is rounded.

    Source: Parmar et al. 2022, arXiv 2104.11222, section 3.
    """
    if tuple(images.shape[1:3]) == (size, size):
        return images.permute(0, 3, 1, 2).float()
    planes = images.permute(0, 3, 1, 2).flatten(0, 1).cpu().numpy().astype(np.float32)  # (B * 3, H, W)
    resized = [Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC) for plane in planes]
    stacked = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized]))
    return stacked.clamp(0, 255).view(len(images), 3, size, size)


class Features:
    """Images to features. `name` says which network and weights, `dim` how many features, `kind` what they are good
    for."""

    kind = ""

    def __init__(self, network: nn.Module, title: str, size: int, device: str | torch.device):
        sha256 = weights_hash(network)
        self.name = f"{title} (weights {sha256[:8]}, {size} px)"
        self.identity = f"{self.kind} {sha256} {size}"  # of what is measured, wherever the weights lie
        self.network: Any = network.to(device).eval().requires_grad_(False)
        self.device, self.size = torch.device(device), size
        self.dim = self(torch.zeros(1, size, size, 3, dtype=torch.uint8)).features.shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> FeatureBatch:
        """Images (B, H, W, 3) uint8, of any size. Raises UserError where a feature is not finite."""
        batch = self.extract(clean_resize(images, self.size).to(self.device))
        features, logits = (None if part is None else part.float().cpu() for part in batch)
        if features is None or not torch.isfinite(features).all():
            raise UserError(f"{self.name} gives features that are not finite; its weights are damaged: load it again")
        return FeatureBatch(features, logits)

    def extract(self, pixels: Tensor) -> FeatureBatch:
        """The network on images (B, 3, size, size) float32 in [0, 255]."""
        raise NotImplementedError


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 255] -> (pixels / 255 - mean) / std, a mean and std for each channel."""
    mean_tensor, std_tensor = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels / 255 - mean_tensor) / std_tensor


class InceptionFeatures(Features):
    """The Inception network of FID, as torch-fidelity has it: pool features and the logits without bias."""

    kind = "inception"

    @classmethod
    def load(cls, path: str, device: str | torch.device, flag: str) -> "InceptionFeatures":
        """Reads a file of torch-fidelity's weights, by default the one that the library downloads."""
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError(f"{flag} inception needs torch-fidelity: pip install torch-fidelity") from error
        if path and not Path(path).is_file():
            raise UserError(f"{flag} inception:{path}: the file does not exist; give the weights, or plain inception")
        try:
            if path:
                torch.load(path, weights_only=True)  # the library itself would also run code from the file
            network = FeatureExtractorInceptionV3(cls.kind, ["2048", "logits_unbiased"], path or None)
        except Exception as error:  # urllib, pickle, a state dict that does not fit: they share no base class
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            advice = (
                "expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
                if path
                else "without a network, give the file of its weights as inception:FILE"
            )
            raise UserError(f"{flag} inception{path and ':'}{path}: cannot be loaded: {reason}; {advice}") from error
        return cls(network, "inception-v3 of FID", INCEPTION_SIZE, device)

    def extract(self, pixels: Tensor) -> FeatureBatch:
        # The library's network takes 8 bits a channel, and leaves images of its own size as they are.
        return FeatureBatch(*self.network(pixels.round().to(torch.uint8)))


class ClipFeatures(Features):
    """Image embeddings of transformers' CLIPModel, after the projection, not normalised; text embeddings beside."""

    kind = "clip"

    def __init__(self, network: nn.Module, title: str, size: int, device, *, tokenizer: Any, mean, std):
        self.tokenizer, self.mean, self.std = tokenizer, tuple(mean), tuple(std)
        super().__init__(network, title, size, device)

    @classmethod
    def load(cls, path: str, device: str | torch.device, flag: str) -> "ClipFeatures":
        """Reads a hub name, or a folder with the model, its tokenizer and, where it has one, its preprocessor."""
        from transformers import AutoTokenizer, CLIPModel

        network = load_whole(CLIPModel, path, "CLIP model", flag)
        tokenizer = load_component(AutoTokenizer.from_pretrained, path, "tokenizer", flag)
        settings = preprocessor_of(path)
        mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
        size = network.config.vision_config.image_size
        return cls(network, f"CLIP {path}", size, device, tokenizer=tokenizer, mean=mean, std=std)

    def extract(self, pixels: Tensor) -> FeatureBatch:
        pixel_values = normalised(pixels, self.mean, self.std)
        pooled = self.network.vision_model(pixel_values=pixel_values).pooler_output
        return FeatureBatch(self.network.visual_projection(pooled), None)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """Text embeddings (B, D) float32 of captions, cut to what the model can read."""
        limit = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return self.network.text_projection(self.network.text_model(**tokens).pooler_output).float().cpu()


class OpenClipFeatures(ClipFeatures):
    """Image and text embeddings of open_clip's models."""

    kind = "open_clip"

    @classmethod
    def load(cls, path: str, device: str | torch.device, flag: str) -> "OpenClipFeatures":
        """Reads a hub name, a folder with open_clip_config.json, or ARCHITECTURE:FILE."""
        network: Any
        network, name = load_open_clip_model(path, flag)
        tokenizer = import_open_clip(flag).get_tokenizer(name)
        size, settings = network.visual.image_size, network.visual.preprocess_cfg
        size = size[0] if isinstance(size, tuple | list) else size
        mean, std = settings["mean"], settings["std"]
        return cls(network, f"open_clip {path}", size, device, tokenizer=tokenizer, mean=mean, std=std)

    def extract(self, pixels: Tensor) -> FeatureBatch:
        return FeatureBatch(self.network.encode_image(normalised(pixels, self.mean, self.std)), None)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        return self.network.encode_text(self.tokenizer(captions).to(self.device)).float().cpu()


class ClassifierFeatures(Features):
    """Our ImageClassifier, or an image classifier of transformers: what enters its last layer, and its logits."""

    kind = "classifier"

    def __init__(self, network: nn.Module, title: str, size: int, device, *, mean, std):
        self.mean, self.std = tuple(mean), tuple(std)
        super().__init__(network, title, size, device)

    @classmethod
    def load(cls, path: str, device: str | torch.device, flag: str) -> "ClassifierFeatures":
        """Reads a folder, or a hub name of a classifier of transformers."""
        config = Path(path) / "config.json"
        if config.is_file() and read_json(config).get("_class_name") == ImageClassifier.__name__:
            ours = load_component(ImageClassifier.from_pretrained, path, "classifier", flag)
            half = (0.5, 0.5, 0.5)  # [0, 1] -> [-1, 1]
            return cls(ours, f"classifier {path}", ours.config.resolution, device, mean=half, std=half)
        from transformers import AutoModelForImageClassification
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        network = load_whole(AutoModelForImageClassification, path, "classifier", flag)
        settings = preprocessor_of(path)
        size = settings.get("size") or {}
        size = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
        size = size or getattr(network.config, "image_size", None) or 224
        mean = settings.get("image_mean", IMAGENET_DEFAULT_MEAN)
        std = settings.get("image_std", IMAGENET_DEFAULT_STD)
        return cls(network, f"classifier {path}", size, device, mean=mean, std=std)

    def extract(self, pixels: Tensor) -> FeatureBatch:
        images = normalised(pixels, self.mean, self.std)
        if isinstance(self.network, ImageClassifier):
            features = self.network.features(images)
            return FeatureBatch(features, self.network.head(features))
        entered: list[Tensor] = []
        last = [layer for layer in self.network.modules() if isinstance(layer, nn.Linear)][-1]
        hook = last.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            logits = self.network(pixel_values=images).logits
        finally:
            hook.remove()
        return FeatureBatch(entered[0].flatten(1), logits)


def load_whole(model_class: Any, name_or_path: str, component: str, flag: str) -> Any:
    """A model of transformers. Raises UserError for one of which some weights are missing: transformers would draw
    those at random."""
    load = partial(model_class.from_pretrained, output_loading_info=True)
    network, info = load_component(load, name_or_path, component, flag)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{flag}: {name_or_path} lacks weights of a {component}, such as {missing}; give a whole one")
    return network


def preprocessor_of(name_or_path: str) -> dict[str, Any]:
    """`preprocessor_config.json` of a folder or hub name; empty where there is none."""
    from transformers.utils import cached_file

    found = cached_file(name_or_path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return read_json(Path(found)) if found else {}


KINDS: dict[str, type[InceptionFeatures] | type[ClipFeatures] | type[ClassifierFeatures]] = {
    features.kind: features for features in (InceptionFeatures, ClipFeatures, OpenClipFeatures, ClassifierFeatures)
}


def load_features(spec: str, device: str | torch.device, flag: str = "--features") -> Features:
    """The extractor that `spec` asks for, on `device`. Raises UserError, which names the flag, for a kind that does
    not exist and for weights that cannot be had."""
    kind, _, path = spec.partition(":")
    if kind not in KINDS:
        raise UserError(
            f"{flag} {spec}: expected inception, inception:FILE, clip:NAME_OR_FOLDER, open_clip:NAME_OR_FILE or "
            "classifier:FOLDER"
        )
    if not path and kind != InceptionFeatures.kind:
        raise UserError(f"{flag} {spec}: name the weights, as {kind}:FOLDER")
    return KINDS[kind].load(path, device, flag)


class PixelFeatures(Features):
    """The pixels themselves, of the image made small: for a look at copies that no network had a part in."""

    kind = "pixels"

    def __init__(self, size: int = 32):
        self.name = f"pixels at {size} x {size}"
        self.identity, self.size, self.device = f"pixels {size}", size, torch.device("cpu")
        self.dim = 3 * size * size

    def extract(self, pixels: Tensor) -> FeatureBatch:
        # Root mean square over channels and positions, so that distances do not depend on the size: 0 to 1.
        return FeatureBatch(pixels.flatten(1) / 255 / self.dim**0.5, None)
