"""Memory of sampling and decoding at the released size, and on a GPU time: README's tables come from here.

python -m benchmarks.memory                  no GPU: live tensors are counted, nothing is computed; about five minutes
python -m benchmarks.memory --device cuda    measured with random weights; 13 GB of RAM
python -m benchmarks.memory --readme         the tables anew from the figures that are there; nothing is run

Sampling: every kind of weights, with 100, 50, 25 and 0 % of the blocks resident and the others streamed from RAM.
Decoding: every form. The figures go to ``benchmarks/results/memory.json``, or to ``--json``.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import decode, streaming
from benchmarks.backbone import CONFIGS, SIZES, case_inputs, clip_of, device_name, tidy
from benchmarks.live_memory import LiveMemory, peak_of_pass
from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.geometry import ClipGeometry
from nava_core.offload import Weights, spread

ROOT = Path(__file__).parents[1]
README, FIGURES = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
WEIGHTS = ("bf16", "int8", "fp8", "mxfp8", "w6a8", "w4a8", "nvfp4")
FEW_BITS = ("w6a8", "w4a8", "nvfp4")
SMALL = (640, 352, 37)  # width, height, latent frames: the smaller class of sizes, 6 s as the large one
STEPS = 3  # of a measured run, the first by itself
DECODED_LATENTS = 4  # what is counted: decoding takes no more for longer clips
GB = 1e9


# ---------------------------------------------------------------- counted


def bytes_of_weights(model: NavaBackbone) -> Weights:
    blocks = tuple(sum(p.nbytes for p in block.parameters()) for block in streaming.blocks_of(model))
    return Weights(sum(p.nbytes for p in model.parameters()) - sum(blocks), blocks)


class _Network:
    """Takes and gives what a backbone does, and notes how many bytes are alive meanwhile."""

    dtype = torch.bfloat16

    def __init__(self, config: BackboneConfig, memory: LiveMemory) -> None:
        self.config, self.memory, self.most = config, memory, 0

    def __call__(self, video: Tensor, audio: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.most = max(self.most, self.memory.current)
        return torch.zeros_like(video), torch.zeros_like(audio)


def bytes_of_loop(config: BackboneConfig, clip: ClipGeometry) -> int:
    """What guided sampling holds while the network works: latents, predictions, the solver's state, contexts."""
    with LiveMemory() as memory:
        network = _Network(config, memory)
        streaming.run_steps(network, clip, "cpu", STEPS)
    return network.most


def count_sampling(config: BackboneConfig, clip: ClipGeometry, weights: str, shares=streaming.SHARES) -> dict:
    """Live tensors of sampling; attention is taken to make nothing but its output."""
    with torch.device("meta"):
        model = NavaBackbone(config, dtype=torch.bfloat16, attention=lambda q, *_: torch.empty_like(q))
        for block in streaming.blocks_of(model):
            streaming.quantise_linears(block, weights)
    stored, number = bytes_of_weights(model), len(streaming.blocks_of(model))
    beside = bytes_of_loop(config, clip) + peak_of_pass(
        model, **case_inputs("one timestep", config, clip, torch.bfloat16, "meta")
    )
    cases = []
    for share in shares:
        streamed = number - round(share * number)
        held = stored.on_device(spread(number, streamed) if streamed else ())
        cases.append({"resident": share, "peak_bytes": held + beside})
    return _sampling(clip, weights, stored.total, cases)


def _sampling(clip: ClipGeometry, weights: str, nbytes: int, cases: list[dict]) -> dict:
    size = {"width": clip.width, "height": clip.height, "seconds": round(clip.duration, 2)}
    return {**size, "weights": weights, "weight_bytes": nbytes, "cases": cases}


def count_decoding(width: str = "released", size: tuple[int, int, int] | None = None) -> list[dict]:
    """Live tensors on the GPU of every form of decoding in bf16, weights aside; of tensors that hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = size or (*SIZES["720p"][:2], DECODED_LATENTS)
    vae = decode.random_video_vae(width, torch.bfloat16, "meta")
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        _on_fake_gpu(vae)
        latent = torch.empty(1, vae.network.config.z_dim, size[2], size[1] // 16, size[0] // 16, device="cuda")
        for form in decode.FORMS:
            if form.tile >= max(size[:2]):
                continue
            with LiveMemory("cuda") as memory:
                memory.ignore(*vae.parameters(), *vae.buffers(), latent)
                decode.decode_video(vae, latent, form, keep=False)
            found.append({"form": str(form), "tile": form.tile, "overlap": form.overlap, "peak_bytes": memory.peak})
    return found


def _on_fake_gpu(module: nn.Module) -> None:
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    like = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    held[name] = nn.Parameter(like, requires_grad=False) if held is part._parameters else like


def count(say: Callable[[str], None] = print) -> dict:
    """All figures, counted."""
    config, clip = CONFIGS["released"], clip_of(*SIZES["720p"])
    sampling = []
    for weights in WEIGHTS:
        say(f"sampling, {weights} ...")
        sampling.append(count_sampling(config, clip, weights))
    say("sampling, the smaller size ...")
    sampling.append(count_sampling(config, clip_of(*SMALL), "bf16"))
    say("decoding ...")
    about = {"device": None, "memory": "live tensors, counted", "torch": torch.__version__}
    return with_targets({**about, "sampling": sampling, "decoding": count_decoding()})


# ---------------------------------------------------------------- measured


def measure_sampling(config: BackboneConfig, clip: ClipGeometry, weights: str, device: str) -> dict:
    report = streaming.measure(config, clip, device, weights, STEPS)
    kept = ("resident", "step_seconds", "first_step_seconds", "time_ratio", "equal_to_resident", "peak_reserved_bytes")
    cases = [
        {
            **{name: case[name] for name in kept if name in case},
            "peak_bytes": case["peak_allocated_bytes"] if device == "cuda" else case["live_bytes_beside_weights"],
        }
        for case in report["cases"]
    ]
    return _sampling(clip, weights, report["weight_bytes"], cases)


def measure(kinds: tuple[str, ...], say: Callable[[str], None] = print) -> dict:
    """All figures, on the GPU at hand."""
    config, clip = CONFIGS["released"], clip_of(*SIZES["720p"])
    sampling = []
    for weights, size in (*((kind, clip) for kind in kinds), ("bf16", clip_of(*SMALL))):
        say(f"sampling at {size.width}x{size.height}, {weights} ...")
        try:
            with tidy("cuda"):
                sampling.append(measure_sampling(config, size, weights, "cuda"))
        except RuntimeError as error:  # a GPU without the kernels of a format, or too small; the others are measured
            gc.collect()
            reason = str(error).strip().splitlines()[0]
            say(f"not measured: {reason}")
            sampling.append({**_sampling(size, weights, 0, []), "not_measured": reason})
    say("decoding ...")
    forms = decode.measure(decode.parse(["--device", "cuda"])[0])["video"]
    about = {"device": device_name("cuda"), "memory": "torch.cuda.max_memory_allocated", "torch": torch.__version__}
    about["memory_bytes_of_device"] = torch.cuda.mem_get_info()[1]
    return with_targets({**about, "sampling": sampling, "decoding": forms})


# ---------------------------------------------------------------- what was aimed at


def with_targets(report: dict) -> dict:
    """``report`` with what this project wants to keep to, and whether the figures do."""
    goals = [
        ("bf16, resident", ("bf16", 1.0, "large"), "peak_bytes", 16.0 * GB),
        ("fp8, resident", ("fp8", 1.0, "large"), "peak_bytes", 10.0 * GB),
        *((f"{weights}, resident", (weights, 1.0, "large"), "peak_bytes", 7.0 * GB) for weights in FEW_BITS),
        ("bf16, streamed", ("bf16", 0.0, "large"), "peak_bytes", 7.0 * GB),
        ("bf16, streamed, the smaller size", ("bf16", 0.0, "small"), "peak_bytes", 6.0 * GB),
        ("bf16, 25 % resident, time over resident", ("bf16", 0.25, "large"), "time_ratio", 1.15),
        ("fp8, 25 % resident, time over resident", ("fp8", 0.25, "large"), "time_ratio", 1.15),
    ]
    report["targets"] = [
        {"what": what, "at_most": most, "found": found, "met": None if found is None else found <= most}
        for what, where, figure, most in goals
        for found in [_figure(report, *where, figure)]
    ]
    return report


def _figure(report: dict, weights: str, share: float, size: str, figure: str) -> float | None:
    for entry in report["sampling"]:
        if entry["weights"] == weights and (entry["width"] == SMALL[0]) == (size == "small"):
            for case in entry["cases"]:
                if case["resident"] == share:
                    return case.get(figure)
    return None


# ---------------------------------------------------------------- tables


def source(report: dict) -> str:
    """Where the figures come from, in a sentence."""
    if report["device"] is None:
        return "Live tensors counted without running anything: kernels' workspaces and an allocator's gaps come on top."
    return f"Measured on one {report['device']} with random weights (torch {report['torch']}): allocated memory."


def sampling_table(report: dict) -> str:
    """Markdown: peak memory of sampling, and where it was measured the time of a step."""
    lines = [
        f"GB on the GPU while sampling, weights included. {source(report)}",
        "",
        "| Weights | Clip | all blocks resident | 50 % | 25 % | none |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_sampling_row(entry) for entry in report["sampling"]]
    return "\n".join(lines)


def _sampling_row(entry: dict) -> str:
    clip = f"{entry['width']}x{entry['height']}, {entry['seconds']:.0f} s"
    if "not_measured" in entry:
        return f"| {entry['weights']} | {clip} | not measured: {entry['not_measured']} | | | |"
    cells = [
        f"{case['peak_bytes'] / GB:.1f}" + (f" ({case['step_seconds']:.2f} s a step)" if "step_seconds" in case else "")
        for case in entry["cases"]
    ]
    return f"| {entry['weights']}, {entry['weight_bytes'] / GB:.1f} GB | {clip} | {' | '.join(cells)} |"


def decoding_table(report: dict) -> str:
    """Markdown: peak memory of decoding without ComfyUI."""
    lines = [
        f"GB on the GPU while decoding 1280x704 in bf16 without ComfyUI, the VAE's weights (1.4 GB) aside. "
        f"{source(report)}",
        "",
        "| Form | GB |",
        "|---|---|",
    ]
    for form in report["decoding"]:
        shared = f", {form['overlap']} shared" if form["tile"] else ""
        time = f" ({form['seconds']:.1f} s)" if "seconds" in form else ""
        lines.append(f"| {form['form']}{shared} | {form['peak_bytes'] / GB:.2f}{time} |")
    return "\n".join(lines)


def targets_table(report: dict) -> str:
    """Text: what was aimed at, and what was found."""
    lines = []
    for target in report["targets"]:
        unit = GB if target["at_most"] > 100 else 1
        found = "not measured" if target["found"] is None else f"{target['found'] / unit:.2f}"
        met = {True: "met", False: "MISSED", None: ""}[target["met"]]
        lines.append(f"{target['what']}: {found}, aimed at {target['at_most'] / unit:g} at most  {met}".rstrip())
    return "\n".join(lines)


TABLES = {README: ("sampling memory", sampling_table), FIGURES: ("decoding memory", decoding_table)}


def with_table(page: Path, report: dict) -> str:
    """The text of a page of :data:`TABLES` with the table between its marks made anew. Raises ValueError where a mark
    is gone."""
    text, (name, table) = page.read_text(), TABLES[page]
    marks = [f"<!-- {name}: python -m benchmarks.memory --readme -->", f"<!-- end of {name} -->"]
    if any(text.count(mark) != 1 for mark in marks):
        raise ValueError(f"{page.name} has no place for {name}: it needs the lines {marks[0]} and {marks[1]}.")
    before, rest = text.split(f"{marks[0]}\n")
    return f"{before}{marks[0]}\n{table(report)}\n{marks[1]}{rest.split(marks[1])[1]}"


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("none", "cuda"), default="none", help="none (the default) counts")
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=WEIGHTS, help="what is measured")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the figures (default %(default)s)")
    parser.add_argument(
        "--readme", action="store_true", help="write the tables of both README.md, alone from the file of figures"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device.")
    if options.readme and options.device == "none":
        if not options.json.is_file():
            parser.error(f"--json: there is no file {options.json}.")
        report = json.loads(options.json.read_text())
    else:
        report = measure(tuple(options.weights)) if options.device == "cuda" else count()
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.readme:
        for page in TABLES:
            page.write_text(with_table(page, report))
    print(f"{sampling_table(report)}\n\n{decoding_table(report)}\n\n{targets_table(report)}")


if __name__ == "__main__":
    main()
