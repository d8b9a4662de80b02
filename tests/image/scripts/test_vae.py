"""train_image_vae.py as a user runs it: with everything on, killed, divided, with planted faults, and refused."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.processes import (
    NotFinite,
    SignalAt,
    checkpoint_tensors,
    contents,
    differing,
    refused,
    run,
    scalars,
    start,
)
from utils.files import fsync_path
from utils.image.vae.discriminator import Adversary
from utils.image.vae.losses import generator_loss
from utils.training import checkpoints
from utils.training.step_log import StepLog

SCRIPT = "train_image_vae.py"
LATEST = ["--resume_from_checkpoint", "latest"]
# fmt: off
TRAIN = [
    "--resolution", 16, "--vae_size", "fast", "--center_crop", "--num_statistics_samples", 16, "--learning_rate", 1e-3,
    "--lr_warmup_steps", 0, "--logging_steps", 1, "--checkpointing_steps", 2, "--validation_steps", 100,
]
DISC = ["--disc_start", 1, "--disc_num_layers", 2, "--disc_channels", 8]
# fmt: on


@pytest.fixture(scope="module")
def flags(image_folder):
    """Without the folder, the steps and the batch."""
    return ["--train_data_dir", image_folder, *TRAIN]


# ---- everything on


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Features to measure in: a classifier with random weights, eight features."""
    from utils.image.evaluation.classifier import ImageClassifier

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    ImageClassifier(num_classes=3, resolution=16, block_out_channels=(4, 8)).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(flags, classifier, tmp_path_factory):
    """A run with a discriminator, all losses but LPIPS, and held-out images."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run(
        SCRIPT, *flags, *DISC, "--gradient_weight", 0.5, "--kl_warmup_steps", 2, "--reconstruction_loss", "mse",
        "--num_validation_images", 12, "--validation_steps", 4, "--eval_features", f"classifier:{classifier}",
        "--max_train_steps", 6, "--train_batch_size", 4, "--output_dir", folder,
    )  # fmt: skip
    return folder, result.stderr


def test_all_losses_are_in_the_trackers(whole):
    folder, _ = whole
    for name in ("reconstruction_loss", "gradient_loss", "kl", "loss"):
        assert list(scalars(folder, f"train/{name}")) == [1, 2, 3, 4, 5, 6]
    for name in ("generator_loss", "disc_loss_real", "disc_loss_fake", "adaptive_weight"):
        assert list(scalars(folder, f"train/{name}")) == [2, 3, 4, 5, 6]  # --disc_start 1: the second step
    weights = list(scalars(folder, "train/adaptive_weight").values())
    assert weights[0] == 0
    assert all(weight > 0 for weight in weights[1:])
    kl, fit = scalars(folder, "train/kl")[1], scalars(folder, "train/reconstruction_loss")[1]
    expected = (
        fit + 0.5 * scalars(folder, "train/gradient_loss")[1] + 1e-4 / 3 * kl
    )  # the first of 2 + 1 warm-up steps
    assert scalars(folder, "train/loss")[1] == pytest.approx(expected, rel=1e-5)


def test_held_out_images_are_measured(whole):
    folder, log = whole
    assert "36 samples in the data" in log
    assert "on 12 held-out images" in log
    for name in ("psnr", "ssim", "rfid", "kl", "active_channels", "latent_std"):
        assert list(scalars(folder, f"validation/{name}")) == [4, 6]
    assert "rFID" in log
    assert "classifier" in log
    assert Image.open(folder / "samples" / "step-0000006.png").size == (8 * 16, 2 * 16)


def test_psnr_and_rfid_are_those_of_the_exported_model(whole, classifier, image_folder):
    """Measured again from the files, with none of the run's code but the choice of rows."""
    from diffusers import AutoencoderKL

    from utils.image.data.pixels import resize_and_crop
    from utils.image.evaluation.features import load_features
    from utils.image.evaluation.metrics import Statistics, frechet_distance
    from utils.training.held_out import in_fixed_order

    folder, _ = whole
    paths = sorted(image_folder.glob("*.png"))
    rows = in_fixed_order(len(paths))[:12].tolist()
    assert len(set(rows)) == 12
    originals = torch.from_numpy(
        np.stack([resize_and_crop(Image.open(paths[row]), 16, True, None) for row in rows])
    )  # (N, H, W, 3)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        pixels = originals.permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    reconstructions = (decoded.clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1)
    mse = (reconstructions - originals).double().square().mean((1, 2, 3))
    psnr = (20 * np.log10(255) - 10 * mse.log10()).mean().item()
    assert scalars(folder, "validation/psnr")[6] == pytest.approx(psnr, abs=1e-3)
    features = load_features(f"classifier:{classifier}", "cpu")
    both = [Statistics.of(features(each.byte()).features) for each in (originals, reconstructions)]
    assert scalars(folder, "validation/rfid")[6] == pytest.approx(frechet_distance(*both), rel=0.02)


def test_validation_split_is_another_split(tmp_path, image_folder):
    for split, names in (("train", range(0, 30)), ("test", range(30, 48))):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in names:
            (tmp_path / "data" / split / f"{i:03d}.png").write_bytes((image_folder / f"{i:03d}.png").read_bytes())
    flags = ["--train_data_dir", tmp_path / "data", *TRAIN, "--max_train_steps", 1, "--train_batch_size", 2]
    log = run(SCRIPT, *flags, "--validation_split", "test", "--output_dir", tmp_path / "a").stderr
    assert "30 samples in the data" in log
    assert "on 18 held-out images" in log
    log = run(
        SCRIPT, *flags, "--validation_split", "test", "--num_validation_images", 7, "--output_dir", tmp_path / "b"
    ).stderr
    assert "on 7 held-out images" in log
    log = run(SCRIPT, *flags, "--output_dir", tmp_path / "c").stderr
    assert "on 8 training images" in log


def test_lpips_trains(flags, tmp_path):
    pytest.importorskip("lpips")
    import torchvision

    torch.manual_seed(0)
    features = torchvision.models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{name}": value for name, value in features.items()}, tmp_path / "alexnet-random.pth")
    # AlexNet needs 31 pixels
    run(
        SCRIPT, *flags, "--resolution", 32, "--lpips_weight", 1, "--lpips_net", "alex", "--lpips_weights", tmp_path,
        "--max_train_steps", 2, "--train_batch_size", 2, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert all(value > 0 for value in scalars(tmp_path / "run", "train/lpips").values())


# ---- exact resume

KINDS = {
    "accumulated, bf16": (1, ["--gradient_accumulation_steps", 2, "--mixed_precision", "bf16"]),
    "two processes": (2, ["--no-use_ema"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_killed_and_resumed_with_a_discriminator_is_bit_identical(flags, tmp_path, name):
    """Killed before the discriminator started, while a checkpoint is written, and after a step of both."""
    processes, extra = KINDS[name]
    flags = [*flags, *DISC, "--disc_start", 3, *extra, "--max_train_steps", 8, "--train_batch_size", 2]
    run(SCRIPT, *flags, "--output_dir", tmp_path / "whole", processes=processes)
    folder = tmp_path / "killed"
    chance = random.Random(name)
    for fault in (
        SignalAt(StepLog.step_done, 3),
        SignalAt(fsync_path, 2, within=checkpoints),
        SignalAt(StepLog.step_done, 4),
    ):
        if "StepLog" in fault.function:
            fault = replace(fault, rank=chance.randrange(processes))
        running = start(SCRIPT, *flags, "--output_dir", folder, *LATEST, processes=processes, fault=fault)
        assert running.wait_for_kill(), running.wait().stderr
    result = run(SCRIPT, *flags, "--output_dir", folder, *LATEST, processes=processes)
    assert "resuming from" in result.stderr
    found = checkpoint_tensors(folder, 8)
    assert {name.partition("/")[0] for name in found} >= {"model_1.safetensors", "optimizer_1.bin"}
    assert differing(found, checkpoint_tensors(tmp_path / "whole", 8)) == []
    assert found["model_1.safetensors/adaptive_weight"] > 0
    assert contents(folder / "vae") == contents(tmp_path / "whole" / "vae")


def test_a_discriminator_is_not_added_to_a_run_without(flags, tmp_path):
    flags = [*flags, "--max_train_steps", 2, "--train_batch_size", 2, "--output_dir", tmp_path / "run", *LATEST]
    run(SCRIPT, *flags)
    assert "was trained with discriminator = None" in refused(run(SCRIPT, *flags, *DISC, check=False))
    message = refused(run(SCRIPT, *flags, "--num_validation_images", 4, check=False))
    assert "was trained with data" in message


# ---- one step is one step, however it is cut


@pytest.fixture(scope="module")
def one_batch(flags, tmp_path_factory):
    """Four steps of eight images at once, from the second one with a discriminator."""
    folder = tmp_path_factory.mktemp("one_batch") / "run"
    run(SCRIPT, *flags, *DISC, *CUT, "--train_batch_size", 8, "--output_dir", folder)
    return folder


# SGD would show the gradients themselves; a large epsilon brings Adam near to it, so that rounding is not magnified.
CUT = ["--max_train_steps", 4, "--adam_epsilon", 1e-3, "--no-use_ema"]


@pytest.mark.parametrize(
    ("processes", "batch_size", "micro_steps"),
    [(2, 4, 1), (1, 2, 4), (2, 2, 2)],
    ids=["2 x 4", "4 + 4", "2 x (2 + 2)"],
)
def test_processes_and_micro_batches_are_one_batch(flags, one_batch, tmp_path, processes, batch_size, micro_steps):
    """Weights of autoencoder and discriminator agree to 2e-5, a fiftieth of one step's learning rate, and the adaptive
    weight to 0.1 %."""
    run(
        SCRIPT, *flags, *DISC, *CUT, "--train_batch_size", batch_size, "--gradient_accumulation_steps", micro_steps,
        "--output_dir", tmp_path / "run", processes=processes,
    )  # fmt: skip
    ours, theirs = checkpoint_tensors(tmp_path / "run", 4), checkpoint_tensors(one_batch, 4)
    weights = [name for name in ours if name.startswith("model") and "adaptive" not in name]
    assert len(weights) > 100
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in weights)
    assert worst < 2e-5
    name = "model_1.safetensors/adaptive_weight"
    assert ours[name].item() == pytest.approx(theirs[name].item(), rel=1e-3)


# ---- faults


@pytest.mark.parametrize(
    ("function", "count"),
    [(generator_loss, 2), (Adversary.forward, 4)],
    ids=["in the autoencoder's loss", "in the discriminator's loss"],
)
def test_a_step_that_is_not_finite_moves_neither(flags, tmp_path, function, count):
    """In the third step, which is the second with a discriminator; that one is called twice a step."""
    flags = [*flags, *DISC, "--checkpointing_steps", 1, "--checkpoints_total_limit", 9, "--train_batch_size", 2]
    run(SCRIPT, *flags, "--max_train_steps", 4, "--output_dir", tmp_path / "run", fault=NotFinite(function, count))
    before, after, later = (checkpoint_tensors(tmp_path / "run", step) for step in (2, 3, 4))
    assert differing(before, after) == []
    assert len(differing(after, later)) > 100
    assert scalars(tmp_path / "run", "train/skipped_steps")[3] == 1


def test_the_discriminator_learns_from_its_own_loss_alone(flags, tmp_path):
    """What it says of reconstructions moves the autoencoder, by --disc_weight, and not itself; and nobody in its first step,
    before the adaptive weight is known."""
    flags = [*flags, *DISC, "--max_train_steps", 3, "--train_batch_size", 2]
    for weight in (0.5, 1.0):
        run(SCRIPT, *flags, "--disc_weight", weight, "--output_dir", tmp_path / str(weight))
    after_two, after_three = (
        differing(checkpoint_tensors(tmp_path / "0.5", step), checkpoint_tensors(tmp_path / "1.0", step))
        for step in (2, 3)
    )
    assert after_two == []
    assert len([name for name in after_three if name.startswith("model.")]) > 50
    assert [name for name in after_three if "_1." in name and "adaptive" not in name] == []


def test_posterior_collapse_is_said(flags, tmp_path):
    flags = [*flags, "--max_train_steps", 18, "--train_batch_size", 4, "--output_dir", tmp_path / "run"]
    log = run(SCRIPT, *flags, "--kl_weight", 1000, "--ema_decay", 0.5, "--validation_steps", 15).stderr
    for moment in ("step 15", "step 18", "at the end"):
        assert f"{moment}: posterior collapse" in log
    assert "lower --kl_weight" in log


def test_variance_blow_up_is_said(flags, tmp_path):
    flags = [*flags, "--max_train_steps", 10, "--train_batch_size", 4, "--output_dir", tmp_path / "run"]
    log = run(SCRIPT, *flags, "--kl_weight", 0, "--learning_rate", 0.3, "--ema_decay", 0.5).stderr
    assert "step 10: variance blow-up" in log
    assert "at the end: variance blow-up" in log


def test_a_sound_run_says_nothing(flags, tmp_path):
    flags = [*flags, "--max_train_steps", 15, "--train_batch_size", 8, "--output_dir", tmp_path / "run"]
    log = run(SCRIPT, *flags, "--ema_decay", 0.5).stderr
    assert "collapse" not in log
    assert "blow-up" not in log


def test_statistics_are_those_in_the_config(whole):
    folder, _ = whole
    config = json.loads((folder / "vae" / "config.json").read_text())
    statistics = json.loads((folder / "vae" / "latent_statistics.json").read_text())
    mean, std = np.array(statistics["mean"]), np.array(statistics["std"])
    assert config["shift_factor"] == pytest.approx(mean.mean())
    assert config["scaling_factor"] == pytest.approx((std**2 + (mean - mean.mean()) ** 2).mean() ** -0.5)
    assert config.get("latents_mean") is None


# ---- refusals


@pytest.mark.parametrize(
    ("flags_given", "words"),
    [
        (["--disc_weight", 1], ["--disc_weight without --disc_start"]),
        (["--disc_channels", 8], ["--disc_channels without --disc_start"]),
        (["--disc_start", 0, "--disc_num_layers", 3], ["--disc_num_layers 3", "at least 24 pixels", "16"]),
        (["--disc_start", 0, "--disc_num_layers", 1, "--mixed_precision", "fp16"], ["fp16", "use bf16"]),
        (["--lpips_weights", "x"], ["--lpips_weights without --lpips_weight"]),
        (["--lpips_net", "alex"], ["--lpips_net without --lpips_weight"]),
        (["--lpips_weight", 1, "--lpips_weights", "nowhere.pth"], ["nowhere.pth does not exist", "vgg16"]),
        (["--kl_warmup_steps", 5, "--kl_weight", 0], ["--kl_warmup_steps with --kl_weight 0"]),
        (["--eval_features", "classifier:x"], ["--eval_features without --validation_split"]),
        (["--num_validation_images", 4, "--eval_features", "classifier:nowhere"], ["--eval_features", "nowhere"]),
        (["--num_validation_images", 48], ["--num_validation_images 48: the dataset has 48 images"]),
        (["--validation_split", "train"], ["that is the split that is trained on"]),
        (["--validation_split", "test"], ["test"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_refusals(flags, tmp_path, flags_given, words):
    result = run(SCRIPT, *flags, "--max_train_steps", 1, "--output_dir", tmp_path / "run", *flags_given, check=False)
    message = refused(result)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_too_few_images_for_rfid(flags, classifier, tmp_path):
    extra = ["--num_validation_images", 8, "--eval_features", f"classifier:{classifier}"]
    message = refused(run(SCRIPT, *flags, *extra, "--output_dir", tmp_path / "run", check=False))
    assert "8 features needs more images than that, and 8 are held out" in message


@pytest.mark.slow
def test_compiled_with_a_discriminator(flags, tmp_path):
    """The same losses, and the same adaptive weight, as without the compiler."""
    flags = [*flags, *DISC, *CUT, "--train_batch_size", 4]
    run(SCRIPT, *flags, "--output_dir", tmp_path / "plain")
    run(SCRIPT, *flags, "--torch_compile", "--output_dir", tmp_path / "compiled")
    for name in ("loss", "adaptive_weight", "disc_loss_real"):
        first, second = (scalars(tmp_path / run_, f"train/{name}") for run_ in ("plain", "compiled"))
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-3)
