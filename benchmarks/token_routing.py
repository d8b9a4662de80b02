"""What a training step of a DiT costs when a share of its tokens skips the middle blocks (TREAD, --tread_ratio).

    python benchmarks/token_routing.py

Forward and backward of a DiT-B/2 at 1,024 tokens (latents 4 x 64 x 64), one sample, on the CPU or with --device cuda.
The ratios are measured in turn, so that whatever else the machine does falls on all.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.diffusion.conditions import ClassCondition
from utils.diffusion.denoiser import ConditionalDenoiser
from utils.draws import SampleDraws
from utils.models.dit import AFTER_ROUTE, BEFORE_ROUTE, DIT_SIZES, DiT


def seconds(denoiser: ConditionalDenoiser, latents: torch.Tensor, tread_ratio: float) -> float:
    """Wall-clock of a forward and a backward pass, the choice of the tokens included."""
    batch = len(latents)
    labels = torch.zeros(batch, dtype=torch.long, device=latents.device)
    started = time.perf_counter()
    kept_tokens = denoiser.draw_kept_tokens(SampleDraws(0, torch.arange(batch), latents.device), tread_ratio)
    timesteps = torch.full((batch,), 500.0, device=latents.device)
    pred = denoiser(latents, timesteps, {"class_labels": labels}, labels > 0, kept_tokens)
    pred.float().square().mean().backward()
    denoiser.zero_grad()
    if latents.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(DIT_SIZES), default="B", help="Size of the DiT.")
    parser.add_argument("--sample_size", type=int, default=64, help="Side of the latents; patches are 2 x 2.")
    parser.add_argument("--batch_size", type=int, default=1, help="Samples a step.")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75], help="Ratios to measure.")
    parser.add_argument("--rounds", type=int, default=5, help="Steps of each ratio, after one to warm up.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch.")
    parser.add_argument("--device", default="cpu", help="Where to run.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    num_layers, width, heads = DIT_SIZES[args.size]
    dit = DiT(
        args.sample_size,
        2,
        4,
        num_layers,
        width,
        num_attention_heads=heads,
        projection_class_embeddings_input_dim=width,
    )
    denoiser = ConditionalDenoiser(dit, ClassCondition(1000, width)).to(args.device)
    latents = torch.randn(args.batch_size, 4, args.sample_size, args.sample_size, device=args.device)
    times: dict[float, list[float]] = {ratio: [] for ratio in args.ratios}
    for _ in range(args.rounds + 1):
        for ratio, each in times.items():
            each.append(seconds(denoiser, latents, ratio))
    full = statistics.median(times[args.ratios[0]][1:])
    print(
        f"DiT-{args.size}/2, {(args.sample_size // 2) ** 2} tokens, batch {args.batch_size}, {args.device}, ", end=""
    )
    print(
        f"{args.threads} thread(s); {num_layers - BEFORE_ROUTE - AFTER_ROUTE} of {num_layers} blocks are routed past"
    )
    print("| tokens routed | forward + backward, median | least | most | of the first row's |\n|---|---|---|---|---|")
    for ratio, (_, *each) in times.items():
        median = statistics.median(each)
        print(f"| {ratio:.0%} | {median:.2f} s | {min(each):.2f} s | {max(each):.2f} s | {median / full:.2f} |")


if __name__ == "__main__":
    main()
