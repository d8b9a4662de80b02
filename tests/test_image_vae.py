"""The image autoencoder's losses, discriminator, figures and statistics, each against an independent truth."""

import importlib
import itertools
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from tests.support.processes import ROOT
from utils.errors import UserError
from utils.image import codec as codecs
from utils.image.vae import losses
from utils.image.vae import losses as vae_losses
from utils.image.vae import training as vae_training
from utils.image.vae.discriminator import Adversary, PatchDiscriminator, build_discriminator
from utils.image.vae.network import VAE_PRESETS, TrainableVAE, build_vae
from utils.image.vae.quality import psnr, ssim
from utils.latents import posterior as latents_posterior
from utils.latents import spec


def images(count=4, side=16, seed=0):
    """Smooth random images (B, 3, H, W) in [-1, 1]."""
    noise = torch.randn(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=side, mode="bilinear").clamp(-1, 1)


# ---- losses


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(latents_posterior.kl_to_standard_normal(mean, logvar), expected)


def test_kl_weight_rises_linearly():
    weights = [latents_posterior.kl_weight_at(step, 0.5, 4) for step in range(7)]
    assert weights == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert latents_posterior.kl_weight_at(0, 0.5, 0) == 0.5


def test_gradient_loss_is_the_sum_written_out():
    first, second = images(2).double(), images(2, seed=1).double()
    expected = []
    for scale in (1, 2, 4, 8):
        a, b = (
            each.numpy().reshape(2, 3, 16 // scale, scale, 16 // scale, scale).mean((3, 5)) for each in (first, second)
        )
        across = np.abs((a[..., 1:] - a[..., :-1]) - (b[..., 1:] - b[..., :-1])).mean()
        down = np.abs((a[..., 1:, :] - a[..., :-1, :]) - (b[..., 1:, :] - b[..., :-1, :])).mean()
        expected.append(across + down)
    assert vae_losses.multi_scale_gradient_loss(first, second).item() == pytest.approx(np.mean(expected))


def test_gradient_loss_sees_blur_and_no_shade():
    sharp = images(2)
    blurred = F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
    assert vae_losses.multi_scale_gradient_loss(sharp + 0.3, sharp).item() == pytest.approx(0, abs=1e-6)
    assert vae_losses.multi_scale_gradient_loss(blurred, sharp) > 0.01


def test_fit_loss_sums_its_terms():
    first, second = images(2), images(2, seed=1)

    def distance(a, b):
        return torch.tensor([1.0, 3.0])

    loss, terms = vae_losses.FitLoss("mse", 0.5, 0.1, distance)(first, second)
    assert terms["lpips"] == 2
    expected = F.mse_loss(first, second) + 0.5 * vae_losses.multi_scale_gradient_loss(first, second) + 0.2
    assert loss.item() == pytest.approx(expected.item())
    loss, terms = vae_losses.FitLoss("l1", 0.0, 0.0, None)(first, second)
    assert list(terms) == ["reconstruction_loss"]
    assert loss == F.l1_loss(first, second)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.5])
    on_real, on_fake = vae_losses.discriminator_losses(real, fake)
    assert on_real.item() == pytest.approx((0 + 0.5 + 2) / 3)
    assert on_fake.item() == pytest.approx((0 + 1 + 2.5) / 3)
    assert vae_losses.generator_loss(fake).item() == pytest.approx(0.5 / 3)


# ---- discriminator


def test_discriminator_is_that_of_pix2pix():
    """C64-C128-C256-C512 of 4 x 4 convolutions and one more, and 70 x 70 pixels seen by each logit."""
    model = PatchDiscriminator()
    widths = [3, 64, 128, 256, 512, 1]
    convolutions = 16 * sum(a * b for a, b in itertools.pairwise(widths))
    biases, norms = 64 + 1, 2 * (128 + 256 + 512)
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + biases + norms == 2_765_633
    for layer in model.layers:
        if isinstance(layer, nn.GroupNorm):  # it sees the whole image, through two numbers a group
            layer.forward = lambda hidden_states: hidden_states
    pixels = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = model(pixels)
    assert logits.shape == (1, 1, 18, 18)
    logits[0, 0, 9, 9].backward()
    rows = pixels.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


def gradients_in_parts(model, parts):
    """The mean gradient of the discriminator's loss over micro-batches."""
    model.zero_grad()
    for real, fake in parts:
        logits = model(torch.cat([real, fake]))
        (sum(vae_losses.discriminator_losses(*logits.chunk(2))) / len(parts)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("norm", ["as it is", "batch norm"])
def test_micro_batches_are_one_batch(norm):
    """What the choice of the normalisation is for: batch norm fails it."""
    torch.manual_seed(0)
    model = build_discriminator(2, 8, 16)
    if norm == "batch norm":
        for index, layer in enumerate(model.layers):
            if isinstance(layer, nn.GroupNorm):
                model.layers[index] = nn.BatchNorm2d(layer.num_channels)
    real, fake = images(8), images(8, seed=1)
    whole = gradients_in_parts(model, [(real, fake)])
    split = gradients_in_parts(model, [(real[:4], fake[:4]), (real[4:], fake[4:])])
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5) == (norm == "as it is")


def test_discriminators_that_cannot_be_built():
    assert build_discriminator(3, 64, 24)(torch.zeros(1, 3, 24, 24)).numel() == 1
    with pytest.raises(UserError, match=r"--disc_num_layers 3: .* at least 24 pixels.*23"):
        build_discriminator(3, 64, 23)
    with pytest.raises(UserError, match="--disc_channels 12: expected a multiple of 8"):
        build_discriminator(2, 12, 64)


def test_discriminator_saves_and_loads(tmp_path):
    model = build_discriminator(2, 8, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(PatchDiscriminator.from_pretrained(tmp_path)(images()), model(images()))


def autoencoder():
    torch.manual_seed(0)
    return TrainableVAE(build_vae("fast", 16))


def losses_at(model, adversary, batch):
    reconstruction, _ = model(batch, torch.zeros(model.latent_shape(batch)))
    return F.l1_loss(reconstruction, batch), vae_losses.generator_loss(adversary(reconstruction))


def norms_by_hand(model, adversary, batch):
    """|gradient| of both losses at the last layer: each after a backward of its own over everything."""
    norms = []
    for which in (0, 1):
        model.zero_grad()
        losses_at(model, adversary, batch)[which].backward()
        norms.append(model.vae.decoder.conv_out.weight.grad.norm().item())
    return norms


def test_adaptive_weight_is_the_ratio_of_norms_and_independent_of_micro_batches():
    model, adversary = autoencoder(), Adversary(build_discriminator(2, 8, 16))
    batch = images(8)
    reconstruction, adversarial = norms_by_hand(model, adversary, batch)
    expected = reconstruction / (adversarial + 1e-4)
    for parts in ([batch], [batch[:4], batch[4:]]):
        adversary.gradients.clear()
        for part in parts:
            adversary.measure(*losses_at(model, adversary, part), model.last_layer)
        adversary.rebalance(lambda gradients: gradients)
        assert adversary.adaptive_weight.item() == pytest.approx(expected, rel=1e-3)
    assert "adaptive_weight" in adversary.state_dict()


def test_adaptive_weight_leaves_gradients_alone_and_is_clamped():
    model, adversary = autoencoder(), Adversary(build_discriminator(2, 8, 16))
    assert adversary.adaptive_weight == 0  # until it has been measured
    model.zero_grad()
    adversary.measure(*losses_at(model, adversary, images()), model.last_layer)
    assert all(parameter.grad is None for parameter in model.parameters())
    adversary.rebalance(lambda gradients: gradients * torch.tensor([1e9, 0.0]).view(2, 1, 1, 1, 1))
    assert adversary.adaptive_weight == 1e4


# ---- LPIPS


def random_trunk(network):
    """torchvision's network with random weights, and its state dict as the file holds it, less the large classifier."""
    import torchvision

    torch.manual_seed(0)
    features = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[network](weights=None).features
    return features, {f"features.{name}": value for name, value in features.state_dict().items()}


RELUS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # of torchvision's features


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the files of both networks."""
    folder = tmp_path_factory.mktemp("lpips")
    for network, name in (("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth")):
        torch.save(random_trunk(network)[1] | {"classifier.6.bias": torch.zeros(1000)}, folder / name)
    return folder


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_lpips_on_local_weights_is_the_papers_formula(network, weights):
    """Equation 1 of arXiv 1801.03924, with the package's own linear weights, on torchvision's features."""
    pytest.importorskip("lpips")
    first, second = images(2, 64), images(2, 64, seed=1)
    distance = losses.load_lpips(network, str(weights), torch.device("cpu"))
    trunk, _ = random_trunk(network)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    hidden = [(each - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for each in (first, second)]
    expected = torch.zeros(2)
    with torch.no_grad():
        for index, layer in enumerate(trunk):
            hidden = [layer(each) for each in hidden]
            if index in RELUS[network]:
                linear = distance.lins[RELUS[network].index(index)].model[-1].weight
                unit = [each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in hidden]
                expected += (linear * (unit[0] - unit[1]).square()).sum(1).mean((1, 2))
        torch.testing.assert_close(distance(first, second).flatten(), expected, rtol=1e-4, atol=1e-6)
    moved = first.clone().requires_grad_()
    distance(moved, second).sum().backward()
    assert moved.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_lpips_says_what_is_missing(weights, tmp_path, monkeypatch):
    pytest.importorskip("lpips")
    cpu = torch.device("cpu")
    (tmp_path / "vgg16-broken.pth").write_bytes(b"no weights")
    torch.save({"w": print}, tmp_path / "code.pth")
    for path, message in [
        (tmp_path / "nowhere.pth", r"--lpips_weights: .*nowhere.pth does not exist; expected torchvision's vgg16"),
        (weights / "alexnet-owt-7be5be79.pth", r"expected features.0.weight of shape .* found shape .*--lpips_net"),
        (tmp_path, "cannot be read"),
        (tmp_path / "code.pth", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            losses.load_lpips("vgg", str(path), cpu)
    (tmp_path / "vgg16-broken.pth").unlink()
    with pytest.raises(UserError, match="holds 0 files vgg16"):
        losses.load_lpips("vgg", str(tmp_path), cpu)

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route.*https://.*--lpips_weights FILE.*gradient"):
        losses.load_lpips("alex", None, cpu)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install lpips; or .*--gradient_weight"):
        losses.load_lpips("vgg", str(weights), cpu)


# ---- figures


def bytes_of(batch):
    return vae_training.to_uint8(batch)


def test_psnr_in_closed_form():
    black = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    others = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (255, 10, 0)])
    expected = [0.0, 20 * math.log10(25.5), 100.0]
    assert psnr(black, others).tolist() == pytest.approx(expected)


def test_ssim_in_closed_form():
    """Of flat images only the luminance counts; a window fits into a small image too."""
    flat = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, flat + 50).item() == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    noisy = bytes_of(images(2, 8))
    assert ssim(noisy, noisy).tolist() == pytest.approx([1, 1])
    assert ssim(noisy, 255 - noisy).max() < 0.5


@pytest.mark.parametrize("side", [16, 33])
def test_ssim_and_psnr_are_those_of_skimage(side):
    from skimage import metrics

    first, second = bytes_of(images(3, 64)[..., :side, :side]), bytes_of(images(3, 64, seed=1)[..., :side, :side])
    second[2] = (first[2].int() + torch.randint(-9, 9, first[2].shape)).clamp(0, 255).byte()
    for ours_p, ours_s, a, b in zip(
        psnr(first, second), ssim(first, second), first.numpy(), second.numpy(), strict=True
    ):
        assert ours_p.item() == pytest.approx(metrics.peak_signal_noise_ratio(a, b))
        expected = metrics.structural_similarity(
            a, b, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ours_s.item() == pytest.approx(expected, abs=1e-6)


def test_pictures_hold_what_they_show():
    first, second = bytes_of(images(3)), bytes_of(images(3, seed=1))
    picture = vae_training.side_by_side(first, second)
    assert picture.shape == (32, 48, 3)
    assert np.array_equal(picture[16:, 32:], second[2].permute(1, 2, 0).numpy())
    assert bytes_of(torch.tensor([[[[math.nan, -1.0, 0.0, 1.0, 9.0]]]])).flatten().tolist() == [0, 0, 128, 255, 255]


# ---- the posterior


def posterior(count=4000, scale=(1.0, 2.0), noise=(0.1, 0.2), seed=0):
    """Means (N, 2, 2, 2) drawn with a std for each channel, about an offset for each position, and log-variances."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mean = offset + torch.tensor(scale).view(2, 1, 1) * torch.randn(count, 2, 2, 2, generator=generator)
    return mean, (2 * torch.tensor(noise).log()).view(2, 1, 1).expand(count, 2, 2, 2)


def statistics_of(mean, logvar, parts=3):
    sums = vae_training.PosteriorSums()
    for part in zip(mean.chunk(parts), logvar.chunk(parts), strict=True):
        sums.add(*part)
    return sums.statistics()


def test_statistics_of_a_known_posterior():
    mean, logvar = posterior()
    found = statistics_of(mean, logvar)
    assert found.num_samples == 4000
    assert found.mean == pytest.approx([2.5, 0.0], abs=0.05)
    assert found.std_of_mean == pytest.approx([1.0, 2.0], rel=0.03)  # the offsets of positions are not in it
    assert found.posterior_std == pytest.approx([0.1, 0.2])
    samples = mean.double() + (0.5 * logvar).exp() * torch.randn(mean.shape)
    assert found.std == pytest.approx(samples.std((0, 2, 3)).tolist(), rel=0.01)
    shift, scaling = found.shift_and_scaling
    normalised = (samples - shift) * scaling
    assert normalised.mean().item() == pytest.approx(0, abs=0.01)
    assert normalised.std().item() == pytest.approx(1, abs=0.01)
    assert found.kl == pytest.approx(latents_posterior.kl_to_standard_normal(mean, logvar).mean().item(), rel=1e-5)
    assert found.active_channels == 2
    assert found.faults() == []
    assert statistics_of(mean, logvar, parts=1).std == pytest.approx(found.std)


@pytest.mark.parametrize(
    ("scale", "noise", "active", "faults"),
    [
        ((1e-3, 1e-3), (1.0, 1.0), 0, ["posterior collapse"]),
        ((1e-3, 1.0), (1.0, 0.1), 1, ["only 1 of 2"]),
        ((0.05, 0.05), (1e-3, 1e-3), 2, []),  # small, but all signal
        ((100.0, 1.0), (0.1, 0.1), 2, ["variance blow-up: latents have a std of"]),
        ((1.0, 1.0), (500.0, 0.1), 1, ["only 1 of 2", "variance blow-up"]),
        ((math.nan, 1.0), (0.1, 0.1), 1, ["latents are not finite"]),
    ],
)
def test_faults_of_the_posterior_are_named(scale, noise, active, faults):
    found = statistics_of(*posterior(scale=scale, noise=noise))
    if not math.isnan(scale[0]):
        assert found.active_channels == active
    said = found.faults()
    assert len(said) == len(faults)
    assert all(expected in fault for expected, fault in zip(faults, said, strict=True))


# ---- presets and diffusers


def test_sd_preset_is_sd_vae_ft_mse():
    """Its config.json on the hub, and its 83,653,863 parameters."""
    with torch.device("meta"):
        vae = build_vae("sd", 256)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    published = {
        "act_fn": "silu",
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    stock = dict(AutoencoderKL.from_config(published).config) | {"scaling_factor": 1.0}
    ours = dict(vae.config)
    for config in (stock, ours):
        config.pop("_use_default_values", None)
    assert ours == stock


@pytest.mark.parametrize(("preset", "shape"), [("fast", (4, 8, 8)), ("small", (4, 8, 8)), ("base", (4, 4, 4))])
def test_latent_shapes(preset, shape):
    model = TrainableVAE(build_vae(preset, 32))
    batch = images(1, 32)
    assert model.latent_shape(batch) == (1, *shape)
    with torch.no_grad():
        assert model.vae.encode(batch).latent_dist.mean.shape == (1, *shape)


def test_stock_diffusers_loads_the_measured_vae(tmp_path, caplog):
    """No warning; and what the trainers normalise, a StableDiffusionPipeline's decoder undoes: latents / scaling_factor
    on the folded VAE that an export holds, and latents / scaling_factor + shift_factor on this one."""
    from diffusers.utils import logging as diffusers_logging

    vae = autoencoder().vae.eval()
    sums = vae_training.PosteriorSums()
    with torch.no_grad():
        encoded = vae.encode(images(8)).latent_dist
    sums.add(encoded.mean, encoded.logvar)
    statistics = sums.statistics()
    shift, scaling = statistics.shift_and_scaling
    vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    vae_training.save_vae(vae, statistics, tmp_path)
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert caplog.records == []
    saved = json.loads((tmp_path / vae_training.STATISTICS_FILE).read_text())
    assert len(saved["mean"]) == len(saved["std"]) == 4

    normalisation = spec.Normalisation.of_vae(loaded.config, 4)
    with torch.no_grad():
        raw = loaded.encode(images(2)).latent_dist.mean
        expected = loaded.decode(raw).sample
        latents = normalisation.normalise(raw)
        undone = loaded.decode(latents / loaded.config.scaling_factor + loaded.config.shift_factor).sample
        folded = codecs.fold_normalisation(loaded, normalisation)
        torch.testing.assert_close(undone, expected, atol=1e-4, rtol=1e-4)
        again = folded.decode(latents / folded.config.scaling_factor).sample
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


RECIPES = [path for path in sorted(ROOT.glob("configs/*/*vae.yaml")) if "resolution:" in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_accepted(monkeypatch, path):
    train_image_vae = importlib.import_module("train_image_vae")
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(path), "--output_dir", "o"])
    args = train_image_vae.parse_args()
    assert args.resolution % 2 ** (len(VAE_PRESETS[args.vae_size].block_out_channels) - 1) == 0
