"""What each layout of several GPUs costs: bytes and operations counted, a time modelled from them, and, where several
GPUs are at hand, measured.

    python -m benchmarks.parallel                             # counts and the model, at the real size
    python -m benchmarks.parallel --measure NAVA.safetensors --workers 8
    python -m benchmarks.parallel --measure small.safetensors --workers 2 --device cpu --size 96x64 --seconds 1

The time model knows a GPU's speed and its link's, and adds up the busiest GPU's operations and exchanges without
overlap. It is a model: nothing of it was measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from nava_core.backbone import BackboneConfig
from nava_core.geometry import ClipGeometry
from nava_core.parallel.layout import (
    Layout,
    Machine,
    choose_layout,
    exchanged_bytes,
    fitting_layouts,
    pass_operations,
    step_seconds,
)

# Assumed, not measured: dense bf16 that such a GPU may reach, and what its link gives in all-to-all.
PCIE = Machine(flops=8e13, bytes_per_second=1.2e10, latency=1e-4)
NVLINK = Machine(flops=4.5e14, bytes_per_second=2e11, latency=3e-5)
NETWORK = Machine(flops=4.5e14, bytes_per_second=2.5e9, latency=1e-4)
# name: workers, workers a machine, links inside a machine and between machines
MACHINES = {
    "2 cards over PCIe 4.0 x16": (2, 2, PCIE, PCIE),
    "8 GPUs over NVLink": (8, 8, NVLINK, NVLINK),
    "2 machines of 4 GPUs over NVLink, 100 Gbit/s between them": (8, 4, NVLINK, NETWORK),
}
PREDICTIONS = 4  # of a step: alignment guidance on, with a voice


def tokens_of(geometry: ClipGeometry) -> tuple[int, int]:
    _, frames, height, width = geometry.latent_shape
    return frames * -(-height // 2) * -(-width // 2), geometry.audio_tokens


def counts(config: BackboneConfig, workers: int, video: int, audio: int) -> list[tuple[Layout, float, float]]:
    """(layout, operations, bytes sent) of the busiest of ``workers`` workers in one step."""
    rows = []
    for layout in fitting_layouts(config, workers, PREDICTIONS, video, audio):
        if layout.workers == workers:
            rounds = layout.rounds(PREDICTIONS)
            operations = rounds * pass_operations(config, video + audio) / layout.sequence
            rows.append((layout, operations, rounds * exchanged_bytes(config, video, audio, layout.sequence)))
    return rows


def report(video: int, audio: int) -> str:
    config = BackboneConfig()
    lines = [
        f"One step of {PREDICTIONS} predictions, {video:,} video and {audio:,} audio tokens, bf16.",
        "Operations and bytes of the busiest GPU are counted; seconds are a MODEL from assumed speeds, not measured.",
    ]
    for name, (workers, neighbours, inside, between) in MACHINES.items():
        alone = step_seconds(config, Layout(), PREDICTIONS, video, audio, inside)
        lines += ["", f"{name} (one GPU alone: {alone:.2f} s modelled)"]
        lines += [f"{'layout':>7} {'TFLOP':>8} {'GB sent':>8} {'s a step (model)':>17} {'gain (model)':>13}"]
        for layout, operations, sent in counts(config, workers, video, audio):
            machine = inside if layout.sequence <= neighbours else between
            seconds = step_seconds(config, layout, PREDICTIONS, video, audio, machine)
            figures = f"{operations / 1e12:8.0f} {sent / 1e9:8.2f} {seconds:17.3f} {alone / seconds:12.2f}x"
            lines.append(f"{layout!s:>7} {figures}")
        chosen = choose_layout(config, workers, PREDICTIONS, video, audio, inside, neighbours)
        lines.append(f"quickest that keeps tokens inside a machine: {chosen}")
    return "\n".join(lines)


def measure(path: Path, workers: int, device: str, video: torch.Size, audio: int, repeats: int) -> str:
    """Seconds of one step under every layout of the workers, the first of which is one GPU alone."""
    from nava_core.parallel.workers import ParallelBackbone

    backbone = ParallelBackbone(
        path, workers=workers, device=device, dtype=torch.bfloat16 if device == "cuda" else None
    )
    config, dtype = backbone.config, backbone.dtype
    one = {
        "video": torch.randn(1, *video, dtype=dtype),
        "audio": torch.randn(1, audio, 128, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "context": torch.randn(1, config.text_len, config.text_dim, dtype=dtype),
    }
    passes = [one, one, {**one, "cross_modal": False}, one]
    tokens = video[1] * -(-video[2] // 2) * -(-video[3] // 2)
    lines, alone = [f"{'layout':>7} {'s a step':>10} {'gain':>7}   measured on {workers} x {device}"], None
    for layout in fitting_layouts(config, workers, PREDICTIONS, tokens, audio):
        backbone.layout = layout
        backbone.run_together(passes)  # warm
        start = time.perf_counter()
        for _ in range(repeats):
            backbone.run_together(passes)
        seconds = (time.perf_counter() - start) / repeats
        alone = alone or seconds
        lines.append(f"{layout!s:>7} {seconds:10.3f} {alone / seconds:6.2f}x")
    backbone.close()
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="BACKBONE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="1280x704")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    width, height = (int(each) for each in args.size.split("x"))
    geometry = ClipGeometry(args.seconds, width, height)
    if args.measure is None:
        print(report(*tokens_of(geometry)))
    else:
        shape = torch.Size(geometry.latent_shape)
        print(measure(args.measure, args.workers, args.device, shape, geometry.audio_tokens, args.repeats))


if __name__ == "__main__":
    main()
