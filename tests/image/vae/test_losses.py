"""The image autoencoder's losses, each against an independent truth."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.vaes import autoencoder, images
from utils.errors import UserError
from utils.image.vae import losses
from utils.image.vae import losses as vae_losses
from utils.image.vae.discriminator import Adversary, build_discriminator
from utils.latents import posterior as latents_posterior

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
