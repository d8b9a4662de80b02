"""Flags of image autoencoders, and checks of their combinations. Imports no torch."""

from argparse import ArgumentParser, Namespace

from utils.args.parsing import non_negative_float, non_negative_int, positive_float, positive_int
from utils.errors import UserError


def add_vae_loss_args(parser: ArgumentParser) -> None:
    """Adds the flags of the losses."""
    group = parser.add_argument_group("losses")
    group.add_argument(
        "--reconstruction_loss", choices=["l1", "mse"], default="l1", help="Reconstruction error per pixel value."
    )
    group.add_argument(
        "--gradient_weight",
        type=non_negative_float,
        default=0.0,
        help="Weight of the multi-scale gradient loss, which sharpens edges without a pretrained network; 1 is usual.",
    )
    group.add_argument(
        "--lpips_weight",
        type=non_negative_float,
        default=0.0,
        help="Weight of LPIPS (1 in LDM); needs the package lpips and torchvision's weights.",
    )
    group.add_argument("--lpips_net", choices=["vgg", "alex"], default="vgg", help="Network of LPIPS (vgg in LDM).")
    group.add_argument(
        "--lpips_weights",
        default=None,
        metavar="FILE|FOLDER",
        help="File or folder with torchvision's weights of that network, vgg16-*.pth or alexnet-*.pth. Default: "
        "download them.",
    )
    group.add_argument(
        "--kl_weight",
        type=non_negative_float,
        default=1e-4,
        help="Weight of the KL divergence per latent value, in nats.",
    )
    group.add_argument(
        "--kl_warmup_steps", type=non_negative_int, default=0, help="Steps in which the KL weight rises from zero."
    )


def add_discriminator_args(parser: ArgumentParser) -> None:
    """Adds the flags of the discriminator."""
    group = parser.add_argument_group("discriminator")
    group.add_argument(
        "--disc_start",
        type=non_negative_int,
        default=None,
        help="Step at which the patch discriminator starts. Default: no discriminator.",
    )
    group.add_argument(
        "--disc_weight",
        type=positive_float,
        default=0.5,
        help="Weight of the adversarial loss, times VQGAN's adaptive weight.",
    )
    group.add_argument(
        "--disc_num_layers",
        type=positive_int,
        default=3,
        help="Number of strided layers of the discriminator; 3 have a receptive field of 70 x 70 pixels.",
    )
    group.add_argument(
        "--disc_channels", type=positive_int, default=64, help="Channels of the discriminator's first layer."
    )


def add_vae_validation_args(parser: ArgumentParser) -> None:
    """Adds the flags of the validation on held-out images."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_steps", type=positive_int, default=1000, help="Steps between validations of the reconstructions."
    )
    group.add_argument("--validation_split", default=None, help="Split of the dataset to validate on, such as test.")
    group.add_argument(
        "--num_validation_images",
        type=positive_int,
        default=None,
        help="Number of validation images. With --validation_split: from that split (default: all). Without: held "
        "out of training (default: 0).",
    )
    group.add_argument(
        "--eval_features",
        default=None,
        metavar="SPEC",
        help="Features for the FID of reconstructions: inception, inception:FILE, clip:FOLDER, classifier:FOLDER.",
    )
    group.add_argument(
        "--num_statistics_samples",
        type=positive_int,
        default=10_000,
        help="Number of training images on which the latents' scaling and shift are measured.",
    )


def check_vae_args(args: Namespace) -> None:
    """Refuses flags of losses that are off, and validation without held-out images."""
    if args.lpips_weights and not args.lpips_weight:
        raise UserError("--lpips_weights without --lpips_weight: LPIPS is off; give its weight, 1 is usual")
    if "lpips_net" in args.typed and not args.lpips_weight:
        raise UserError("--lpips_net without --lpips_weight: LPIPS is off; give its weight, 1 is usual")
    for name in ("disc_weight", "disc_num_layers", "disc_channels"):
        if name in args.typed and args.disc_start is None:
            raise UserError(f"--{name} without --disc_start: there is no discriminator; give the step it starts at")
    if args.kl_warmup_steps and not args.kl_weight:
        raise UserError("--kl_warmup_steps with --kl_weight 0: zero has nothing to rise to; leave one out")
    if args.eval_features and not (args.validation_split or args.num_validation_images):
        raise UserError(
            "--eval_features without --validation_split or --num_validation_images: there are no held-out images to "
            "measure on; give one"
        )
    if args.validation_split is not None and args.validation_split == args.dataset_split:
        raise UserError(
            f"--validation_split {args.validation_split}: that is the split that is trained on (--dataset_split); "
            "give another, or --num_validation_images alone to keep some out"
        )


def check_precision(args: Namespace, mixed_precision: str) -> None:
    """Refuses a discriminator in fp16, which may also come from accelerate's configuration."""
    if args.disc_start is not None and mixed_precision == "fp16":
        raise UserError(
            "--disc_start with --mixed_precision fp16: two losses share one scale there, and the gradients of the "
            "adaptive weight would underflow; use bf16"
        )
