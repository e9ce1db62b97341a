"""Time of a step and memory when a share of the backbone's blocks is resident and the others are streamed from RAM.

python -m benchmarks.streaming                                     a small model on the CPU, where nothing moves
python -m benchmarks.streaming --device cuda --json results.json   the released size at 1280x704, 6 s: 12.6 GB of RAM
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from benchmarks.backbone import CONFIGS, SIZES, clip_of, device_name, draw_weights, tidy
from benchmarks.live_memory import LiveMemory
from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.backbone.quantized import Fp8Linear
from nava_core.checkpoint import assign_tensor
from nava_core.geometry import ClipGeometry
from nava_core.offload import stream_blocks
from nava_core.sampling import Guidance, denoise, flow_sigmas

SMALL = BackboneConfig(
    dim=128, ffn_dim=512, freq_dim=32, text_dim=64, num_heads=2, num_double_layers=3, num_single_layers=6
)
MODELS = {"small": SMALL, **CONFIGS}
SHARES = (1.0, 0.5, 0.25, 0.0)
TINY = (64, 64, 3)  # width, height, latent frames
GB = 1e9


def model_in_ram(config: BackboneConfig, device: str, weights: str) -> NavaBackbone:
    """A backbone of random weights in RAM, bf16, or with the blocks' Linears in fp8; drawn on ``device`` one by one."""
    with torch.device("meta"):
        model = NavaBackbone(config, dtype=torch.bfloat16)
    for name, tensor in draw_weights(config, torch.bfloat16, device):
        assign_tensor(model, name, tensor.to("cpu"))
    if weights == "fp8":
        for block in (*model.double_blocks, *model.single_blocks):
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    block.set_submodule(name, Fp8Linear.from_linear(module.to(device)).to("cpu"))
    return model.eval().requires_grad_(False)


def run_steps(model: NavaBackbone, clip: ClipGeometry, device: str, steps: int) -> tuple[list[float], tuple]:
    """Seconds of each step of three predictions, apart, and the latents that they end in."""
    config, draw = model.config, torch.Generator().manual_seed(1)
    video = torch.randn(1, *clip.latent_shape, generator=draw).to(device)
    audio = torch.randn(1, clip.audio_tokens, config.audio_in_dim, generator=draw).to(device)
    text = [torch.randn(1, config.text_len, config.text_dim, generator=draw).to(device, model.dtype) for _ in range(2)]
    marks = []

    def mark(*_) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    mark()
    latents = denoise(
        model, video, audio, text[0], negative=text[1], sigmas=flow_sigmas(steps), guidance=Guidance(), callback=mark
    )
    return [after - before for before, after in pairwise(marks)], latents


def measure_share(model: NavaBackbone, share: float, clip: ClipGeometry, device: str, steps: int) -> tuple[dict, tuple]:
    """One case: ``share`` of the blocks resident; and the latents, on the CPU."""
    stream = stream_blocks(model, device, share, say=print)
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            seconds, latents = run_steps(model, clip, device, steps)
            peaks = {
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        else:
            with LiveMemory() as live:
                live.ignore(*model.parameters())
                seconds, latents = run_steps(model, clip, device, steps)
            peaks = {"live_bytes_beside_weights": live.peak}
        report = {
            "resident": share,
            "streamed_blocks": list(stream.streamed),
            "page_locked_bytes": stream.locked_bytes,
            # of the first step's passes the first fetches each block in its turn, without overlap
            "first_step_seconds": seconds[0],
            "step_seconds": statistics.median(seconds[1:]),
            "all_seconds": seconds,
            **peaks,
        }
        return report, tuple(part.cpu() for part in latents)
    finally:
        stream.close()
        model.to("cpu")


def measure(config: BackboneConfig, clip: ClipGeometry, device: str, weights: str, steps: int) -> dict:
    """Everything the command reports, as it goes to JSON."""
    model = model_in_ram(config, device, weights)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in (*model.double_blocks, *model.single_blocks)]
    report = {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "config": asdict(config),
        "weights": weights,
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "block_bytes": sizes,
        "tokens": clip.tokens,
        "predictions_a_step": 3,
        "cases": [],
    }
    resident = None
    for share in SHARES:
        with tidy(device):
            print(f"{share:.0%} resident ...", flush=True)
            case, latents = measure_share(model, share, clip, device, steps)
        resident = resident or latents
        case["equal_to_resident"] = all(map(torch.equal, latents, resident))
        case["time_ratio"] = case["step_seconds"] / (report["cases"] or [case])[0]["step_seconds"]
        report["cases"].append(case)
    return report


def table(report: dict) -> str:
    """The report to read, in Markdown."""
    lines = [
        f"{report['device']}; torch {report['torch']}; {report['weights']} weights of "
        f"{report['weight_bytes'] / GB:.2f} GB; {report['tokens']:,} tokens; steps of three predictions.",
        "",
        "| resident | s a step | ratio | first step s | peak GB | equal to the last bit |",
        "|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        peak = case.get("peak_reserved_bytes", case.get("live_bytes_beside_weights"))
        lines.append(
            f"| {case['resident']:.0%} | {case['step_seconds']:.3f} | {case['time_ratio']:.2f} "
            f"| {case['first_step_seconds']:.3f} | {peak / GB:.3f} | {'yes' if case['equal_to_resident'] else 'NO'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, help="by default small on the CPU, released on a GPU")
    parser.add_argument("--size", help="WIDTHxHEIGHTxLATENT_FRAMES, or 720p; by default tiny on the CPU, 720p on a GPU")
    parser.add_argument("--weights", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--steps", type=int, default=4, help="of which the first is reported by itself (default 4)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device.")
    if options.steps < 2:
        parser.error("--steps must be at least 2.")
    try:
        size = SIZES.get(options.size) or tuple(map(int, options.size.split("x"))) if options.size else None
        clip = clip_of(*(size or (SIZES["720p"] if gpu else TINY)))
    except (TypeError, ValueError) as error:
        parser.error(f"--size {options.size}: give WIDTHxHEIGHTxLATENT_FRAMES or 720p ({error}).")
    config = MODELS[options.model or ("released" if gpu else "small")]
    if config is SMALL:
        torch.set_num_threads(1)  # of its small matrices, threads only wait for one another
    report = measure(config, clip, options.device, options.weights, options.steps)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
