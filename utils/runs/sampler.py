"""A run that is ready to be sampled: what `sample.py` and `evaluate.py` do with a run of any modality."""

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tqdm.auto import tqdm

from utils.args.modality import Modality
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.diffusion.guidance import Guidance
from utils.diffusion.sampling import checked_guidance, sampling_scheduler, speed_up, usable_device
from utils.errors import UserError

GUIDED_SCALE = 2.0  # the default scale where a weaker run guides
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision
Request = Mapping[str, Any]  # what one sample is asked to be


class Sampler(ABC):
    """A run, its guide and its sampler, on the device. Each modality says what can be asked for, how it is sampled and
    what files that gives.
    """

    modality: ClassVar[Modality]
    load_run: ClassVar[Callable[..., Any]]  # of the branch's pipeline.py: path, ema_sigma_rel, lora_dir -> pipeline
    load_guide: ClassVar[Callable[..., ConditionalDenoiser]]  # path, pipeline -> the weaker run
    nothing_to_guide: ClassVar[str] = (
        "no condition is asked for, there is nothing to guide towards; leave it out, or give a condition of the run"
    )

    def __init__(self, args: Namespace, run_dir: Path, pipeline: Any, guide: ConditionalDenoiser | None):
        self.run_dir, self.pipeline, self.guide = run_dir, pipeline, guide
        self.guidance_scale: float | None = args.guidance_scale
        self.others = Guidance(1.0, args.guidance_interval, args.guidance_rescale, args.num_inference_steps)
        self.origin = {"model": str(run_dir), "scheduler": type(pipeline.scheduler).__name__}

    @classmethod
    def of(cls, args: Namespace, run_dir: Path, lora_dir: str | None = None) -> Self:
        """The run of a folder as the sampler flags say, with the adapters of `lora_dir`. Raises UserError for a folder
        that is no run, a guide that does not fit, and a sampler or a device that cannot be.
        """
        pipeline = cls.load_run(run_dir, args.ema_sigma_rel, lora_dir=lora_dir)
        guide = cls.load_guide(args.guide_model, pipeline) if args.guide_model else None
        pipeline.scheduler = sampling_scheduler(pipeline.scheduler, args.scheduler, args.num_inference_steps)
        device = usable_device(args.device)
        pipeline.to(device)
        if guide is not None:
            guide.to(device)
        sampler = cls(args, run_dir, pipeline, guide)
        named = {"guide_model": args.guide_model, "ema_sigma_rel": args.ema_sigma_rel, "lora": lora_dir}
        sampler.origin = {name: value for name, value in named.items() if value} | sampler.origin
        return sampler

    def speed_up(self, torch_compile: bool, fuse_qkv_projections: bool) -> None:
        """Makes the denoiser's calls faster. Raises UserError for one that has no projections to fuse."""
        speed_up(self.pipeline.denoiser, torch_compile, fuse_qkv_projections)

    @abstractmethod
    def requests(self, args: Namespace) -> list[dict[str, Any]]:
        """What the request flags ask for, one entry a sample. Raises UserError for what the run was not trained on,
        and for guidance that contradicts itself or would do nothing.
        """

    @abstractmethod
    def sample(self, requests: Sequence[Any], seed: int, batch_size: int, mixed_precision: str) -> Iterator[list[Any]]:
        """Samples for the requests, a batch at a time; number i has seed `seed` + i, and is the same, to rounding,
        whatever the batch.
        """

    @abstractmethod
    def save(self, folder: Path, samples: list[Any], requests: Sequence[Any], seed: int) -> str:
        """Writes the samples, what each was asked to be, how they were made, and a picture; says so in a line."""

    @abstractmethod
    def can_guide(self, requests: Sequence[Request]) -> bool:
        """Whether the requests give guidance something to lead towards, without a weaker run."""

    def has_negative_prompt(self, requests: Sequence[Request]) -> bool:
        """Whether the requests name what guidance leads away from."""
        return False

    def guidance(self, requests: Sequence[Request]) -> Guidance:
        """How samples for the requests are guided: as the flags say, by default with the scale of the modality, with
        that of a weaker run where one guides, or not at all. Raises UserError for guidance that contradicts itself or
        would do nothing.
        """
        scale, with_guide = self.guidance_scale, self.guide is not None
        can_guide = with_guide or self.can_guide(requests)
        if scale is None:
            scale = (GUIDED_SCALE if with_guide else self.modality.guidance_scale) if can_guide else 1.0
        elif scale != 1 and not can_guide:
            raise UserError(f"--guidance_scale {scale:g}: {self.nothing_to_guide}")
        guidance = self.others._replace(scale=scale)
        negative = self.has_negative_prompt(requests)
        return checked_guidance(
            guidance, self.pipeline.scheduler, with_guide=with_guide, with_negative_prompt=negative
        )

    def settings(self, requests: Sequence[Request]) -> dict[str, Any]:
        """What is written beside the samples: enough to make them again."""
        return self.guidance(requests).arguments() | self.origin

    def autocast(self, mixed_precision: str) -> torch.autocast:
        """The precision that samples are made in: no, fp16 or bf16."""
        dtype = DTYPES[mixed_precision]
        return torch.autocast(self.pipeline.vae.device.type, dtype=dtype, enabled=dtype is not None)

    def sample_all(
        self, requests: Sequence[Any], seed: int, batch_size: int, mixed_precision: str, **more: Any
    ) -> list[Any]:
        """All samples for the requests, with a progress bar that goes when they are there."""
        samples: list[Any] = []
        with tqdm(total=len(requests), unit=f" {self.modality.samples}", desc="samples", leave=False) as progress:
            for batch in self.sample(requests, seed, batch_size, mixed_precision, **more):
                samples += batch
                progress.update(len(batch))
        return samples
