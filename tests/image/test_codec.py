"""Codecs: encoding, folding normalisation into the VAE, and loading, on small autoencoders of diffusers."""

import copy

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel

from tests.support.vaes import PER_CHANNEL, random_images, tiny_kl
from utils import frozen
from utils.errors import UserError
from utils.image import codec as codecs
from utils.latents.spec import Normalisation


def tiny_vq():
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=32,
        sample_size=16,
    ).eval()


def tiny_taesd():
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    ).eval()


def tiny_dc():
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
    ).eval()


# name -> (autoencoder, latent channels, downsampling factor, whether it has a posterior)
FAMILIES = {
    "AutoencoderKL": (tiny_kl, 4, 2, True),
    "AutoencoderKL without quant_conv": (
        lambda: tiny_kl(use_quant_conv=False, use_post_quant_conv=False),
        4,
        2,
        True,
    ),
    "AutoencoderTiny": (tiny_taesd, 4, 4, False),
    "AutoencoderDC": (tiny_dc, 4, 4, False),
    "VQModel": (tiny_vq, 3, 2, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_and_decodes(family):
    """Shapes, factor and posterior are those of the architecture, and the latent is what the class itself calls it."""
    make, channels, factor, has_posterior = FAMILIES[family]
    vae = make()
    assert codecs.measure_shape(vae) == (channels, factor)
    assert codecs.has_posterior(vae) == has_posterior
    mean, std = codecs.encode(vae, random_images())
    assert mean.shape == (2, channels, 16 // factor, 16 // factor)
    with torch.no_grad():
        first = vae.encode(random_images(), return_dict=False)[0]
    if has_posterior:
        assert torch.equal(mean, first.mode())
        torch.testing.assert_close(std, first.var.sqrt())
        assert (std > 0).all()
    else:
        assert std is None
        assert torch.equal(mean, first)
    pixels = codecs.decode(vae, mean)
    assert pixels.shape == (2, 3, 16, 16)
    with torch.no_grad():
        truth = vae.decode(mean, return_dict=False)[0].clamp(-1, 1)
    assert torch.equal(pixels, truth)
    assert codecs.decode(vae, 100 * mean).abs().max() <= 1


# Folding


@pytest.mark.parametrize(
    "normalisation",
    [PER_CHANNEL, Normalisation((0.0,) * 4, (5.49,) * 4), Normalisation((0.1159,) * 4, (2.77,) * 4)],
    ids=["per channel", "scaling", "scaling and shift"],
)
def test_folded_vae_works_on_normalised_latents(normalisation):
    """Its posterior is the normalised one, mean and std, and it decodes normalised latents as the original does raw ones."""
    vae = tiny_kl(scaling_factor=0.7, shift_factor=0.1)
    mean, std = codecs.encode(vae, random_images())
    raw = mean + std * torch.randn_like(mean)
    pixels = codecs.decode(vae, raw)
    assert codecs.is_foldable(vae)
    folded = codecs.fold_normalisation(vae, normalisation)
    folded_mean, folded_std = codecs.encode(folded, random_images())
    scale = torch.tensor(normalisation.std).view(1, 4, 1, 1)
    torch.testing.assert_close(folded_mean, normalisation.normalise(mean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded_std, std / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codecs.decode(folded, normalisation.normalise(raw)), pixels, rtol=1e-5, atol=1e-5)
    assert Normalisation.of_vae(folded.config, 4) == Normalisation((0.0,) * 4, (1.0,) * 4)


def test_what_was_folded_is_found_again():
    """Also where a normalisation is folded into a VAE that has one already: the two, one after the other."""
    vae = tiny_kl()
    first = Normalisation((0.3, -1.0, 0.0, 2.0), (0.5, 2.0, 1.0, 3.0))
    second = Normalisation((0.1, 0.2, -0.3, 0.0), (1.5, 0.25, 1.0, 0.9))
    folded = codecs.fold_normalisation(copy.deepcopy(vae), first)
    assert codecs.folded_normalisation(vae, folded, 4).is_close(first)
    twice = codecs.fold_normalisation(copy.deepcopy(folded), second)
    both = codecs.folded_normalisation(vae, twice, 4)
    assert both.is_close(first.then(second))
    assert not both.is_close(second.then(first))
    raw = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(both.normalise(raw), second.normalise(first.normalise(raw)), rtol=1e-4, atol=1e-4)
    assert codecs.folded_normalisation(vae, vae, 4).is_close(Normalisation((0.0,) * 4, (1.0,) * 4))


def test_folded_vae_saves_and_loads(tmp_path):
    """After save and load a folded VAE needs no scaling or shift, the way StableDiffusionPipeline decodes."""
    vae = tiny_kl(scaling_factor=0.7, shift_factor=0.1)
    mean, _ = codecs.encode(vae, random_images())
    pixels = codecs.decode(vae, mean)
    codecs.fold_normalisation(vae, PER_CHANNEL).save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == 1.0
    assert loaded.config.shift_factor is None
    assert loaded.config.latents_mean is None
    decoded = loaded.decode(PER_CHANNEL.normalise(mean) / loaded.config.scaling_factor, return_dict=False)[0]
    torch.testing.assert_close(decoded.clamp(-1, 1), pixels, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_folded():
    """Without the 1x1 convolutions at the latents there is nothing to fold into."""
    for family, (make, *_) in FAMILIES.items():
        assert codecs.is_foldable(make()) == (family == "AutoencoderKL")


@pytest.mark.parametrize(("scaling", "shift", "is_kept"), [(0.18215, None, True), (0.7, 0.1, False)])
def test_export_keeps_plain_scaling(tmp_path, scaling, shift, is_kept):
    """A VAE whose own plain scaling was trained with is exported as it is; with a shift it is folded; both decode alike."""
    from types import SimpleNamespace

    from utils.diffusion.objectives import training_scheduler
    from utils.image.pipeline import Exporter

    original = tiny_kl(scaling_factor=scaling, shift_factor=shift)
    original.save_pretrained(tmp_path)
    normalisation = Normalisation.of_vae(original.config, 4)
    fingerprint = {"vae": {"sha256": frozen.weights_hash(original)}}
    spec = SimpleNamespace(vae=str(tmp_path), text_encoder=None, shape=(4, 8, 8), fingerprint=fingerprint)
    exported = Exporter.of_cache(spec, normalisation, training_scheduler("epsilon"), card=None).vae
    assert (exported.config.scaling_factor == scaling) == is_kept
    assert (frozen.weights_hash(exported) == frozen.weights_hash(original)) == is_kept
    raw, _ = codecs.encode(original, random_images())
    latents = normalisation.normalise(raw) / exported.config.scaling_factor  # as StableDiffusionPipeline does
    torch.testing.assert_close(codecs.decode(exported, latents), codecs.decode(original, raw), rtol=1e-5, atol=1e-5)


# Loading


@pytest.mark.parametrize("family", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel"])
def test_load_vae_from_a_folder(tmp_path, family):
    """Any family loads from its own folder, in fp32 and evaluation mode, frozen, with its own weights."""
    vae = FAMILIES[family][0]()
    vae.save_pretrained(tmp_path)
    loaded = codecs.load_vae(str(tmp_path))
    assert type(loaded) is type(vae)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(codecs.encode(loaded, random_images())[0], codecs.encode(vae, random_images())[0])


def test_load_vae_from_a_pipelines_folder(tmp_path):
    """The `vae/` of a pipeline's or run's folder is found, and half-precision weights become fp32."""
    tiny_kl().half().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    loaded = codecs.load_vae(str(tmp_path))
    assert loaded.dtype == torch.float32
    assert codecs.encode(loaded, random_images())[0].shape == (2, 4, 8, 8)


def refusal(path):
    with pytest.raises(UserError) as caught:
        codecs.load_vae(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("--pretrained_vae_model_name_or_path")
    assert str(path) in message
    return message


def test_missing_folder(tmp_path):
    """A folder that does not exist is refused as such, not looked up on the hub."""
    assert "does not exist" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["empty", "not json", "no class", "no weights", "broken weights"])
def test_folder_that_holds_no_model(tmp_path, content):
    """Whatever is wrong with the folder is one line that names the flag and the folder."""
    if content == "not json":
        (tmp_path / "config.json").write_text("{")
    elif content == "no class":
        (tmp_path / "config.json").write_text("{}")
    elif content in ("no weights", "broken weights"):
        tiny_kl().save_pretrained(tmp_path)
        weights = tmp_path / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000]) if content == "broken weights" else weights.unlink()
    refusal(tmp_path)


def test_model_that_is_no_autoencoder(tmp_path):
    """A diffusers model of another kind is refused by its class."""
    from diffusers import UNet2DModel

    UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(tmp_path)
    assert "UNet2DModel" in refusal(tmp_path)
