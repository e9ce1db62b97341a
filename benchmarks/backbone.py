"""Time, peak memory and difference of ``NavaBackbone`` and the plain implementation, on the same random weights.

python -m benchmarks.backbone                                      a middle-sized model on the CPU
python -m benchmarks.backbone --device cuda --json results.json    the released size at 1280x704, 6 s
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.live_memory import peak_of_pass
from benchmarks.plain import PlainBackbone
from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.geometry import ClipGeometry, seconds_of_latents

CONFIGS = {
    "middle": BackboneConfig(dim=768, ffn_dim=3584, num_heads=6, num_double_layers=2, num_single_layers=4),
    "released": BackboneConfig(),
}
SIZES = {"cpu": (640, 352, 7), "720p": (1280, 704, 37)}  # width, height, latent frames
TRUTH_FRAMES = 9  # latent frames of the comparison with fp32 on a GPU; the whole clip would take minutes
TRUTH_DRAWS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = ("one timestep", "first frame clean", "interaction off", "audio only")
TIMESTEP = 731.0
GB = 1e9


# ---------------------------------------------------------------- what is run


def nava(config: BackboneConfig, weights: dict[str, Tensor], **kwargs) -> NavaBackbone:
    """This project's backbone on ``weights``, which are shared, not copied."""
    first = next(iter(weights.values()))
    with torch.device("meta"):
        model = NavaBackbone(config, dtype=first.dtype, **kwargs)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def plain(config: BackboneConfig, weights: dict[str, Tensor]) -> PlainBackbone:
    """The plain implementation on ``weights``, which are shared, not copied."""
    with torch.device("meta"):
        model = PlainBackbone(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


BUILDERS = {"nava": nava, "plain": plain}


def random_weights(config: BackboneConfig, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """A full state dict drawn on ``device``, scaled so that activations stay near one through all blocks."""
    return dict(draw_weights(config, dtype, device, seed))


def draw_weights(
    config: BackboneConfig, dtype: torch.dtype, device: str, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """The weights of :func:`random_weights`, one by one."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in PlainBackbone(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        if name.endswith("modulation"):
            values.mul_(0.3)
        elif len(shape) == 1:
            values.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
        elif not name.endswith("null_token"):
            values.mul_(values[0].numel() ** -0.5)
        yield name, values


def case_inputs(
    case: str, config: BackboneConfig, clip: ClipGeometry, dtype: torch.dtype, device: str, seed: int = 0
) -> dict:
    """The arguments of one pass over random latents."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    inputs = {
        "video": draw(1, *clip.latent_shape),
        "audio": draw(1, clip.audio_tokens, config.audio_in_dim),
        "timestep": torch.full((1,), TIMESTEP, device=device),
        "context": draw(1, config.text_len, config.text_dim),
    }
    if case == "first frame clean":
        frames = torch.full((1, clip.latent_frames), TIMESTEP, device=device)
        frames[:, 0] = 0
        inputs["timestep"] = (frames, inputs["timestep"])
    if case == "interaction off":
        inputs["cross_modal"] = False
    if case == "audio only":
        inputs["video"] = None
    return inputs


def run(model, inputs: dict) -> tuple[Tensor | None, Tensor | None]:
    with torch.inference_mode():
        return model(**inputs)


# ---------------------------------------------------------------- what is measured


@contextmanager
def tidy(device: str):
    """Leaves no tensor of what ran inside in the allocator's cache."""
    try:
        yield
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def seconds_of_pass(model, inputs: dict, device: str) -> float:
    """Wall clock of one pass on a GPU; on the CPU the time its cores spent, as other programs may run beside it."""
    if device != "cuda":
        start = time.process_time()
        run(model, inputs)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(model, inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(model, inputs: dict, device: str) -> int:
    """Peak memory of one pass beside what is there before it (weights and inputs)."""
    if device != "cuda":
        return peak_of_pass(model, **inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(model, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def difference(got, expected) -> dict:
    """Largest absolute and relative L2 difference of two passes' results, by modality."""
    report = {}
    for modality, a, b in zip(("video", "audio"), got, expected, strict=True):
        if a is None:
            continue
        a, b = a.double(), b.double()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise RuntimeError(f"A pass over random weights gave {modality} that is not finite; use another --dtype.")
        report[modality] = {
            "max_abs": (a - b).abs().max().item(),
            "relative_l2": ((a - b).norm() / b.norm()).item(),
        }
    return report


def compare(case: str, config: BackboneConfig, weights: dict, clip: ClipGeometry, device: str, steps: int) -> dict:
    """Both implementations on one case: peak of a first pass, then ``steps`` timed passes of each in turn."""
    dtype = next(iter(weights.values())).dtype
    inputs = case_inputs(case, config, clip, dtype, device)
    models = {name: build(config, weights) for name, build in BUILDERS.items()}
    report = {"case": case, **{name: {"peak_bytes": peak_bytes(m, inputs, device)} for name, m in models.items()}}
    times = {name: [] for name in models}
    for _ in range(steps):
        for name, model in models.items():
            times[name].append(seconds_of_pass(model, inputs, device))
    for name in models:
        report[name] |= {"seconds": statistics.median(times[name]), "all_seconds": times[name]}
    # of passes run back to back: clocks and caches are then the same for both
    report["time_ratio"] = statistics.median(p / n for n, p in zip(times["nava"], times["plain"], strict=True))
    report["memory_ratio"] = report["plain"]["peak_bytes"] / report["nava"]["peak_bytes"]
    report["difference"] = difference(*(run(model, inputs) for model in models.values()))
    return report


def error_against_fp32(config: BackboneConfig, weights: dict, clip: ClipGeometry, device: str, dtype) -> dict:
    """Relative L2 error of both implementations in ``dtype`` against the plain one in fp32 on the same numbers."""
    report = {"dtype": str(dtype).removeprefix("torch."), "tokens": clip.tokens, "draws": []}
    if device == "cuda":
        need, free = sum(w.numel() for w in weights.values()) * 4 + 12 * GB, torch.cuda.mem_get_info()[0]
        if free < need:
            return {"not_measured": f"fp32 weights and one pass need {need / GB:.0f} GB, {free / GB:.0f} GB are free"}
    low = {name: value.to(dtype) for name, value in weights.items()}
    full = {name: value.float() for name, value in low.items()}
    for seed in range(TRUTH_DRAWS):
        inputs = case_inputs("first frame clean", config, clip, dtype, device, seed)
        precise = {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}
        truth = run(plain(config, full), precise)
        report["draws"].append(
            {name: difference(run(build(config, low), inputs), truth) for name, build in BUILDERS.items()}
        )
    return report


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, options: object = None) -> Tensor:
    """PyTorch's attention in the form that the backbone calls."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def attention_kernels(config: BackboneConfig, weights: dict, clip: ClipGeometry, steps: int) -> dict:
    """Seconds of a pass of this project's backbone with each attention kernel of a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = next(iter(weights.values())).dtype
    inputs = case_inputs("one timestep", config, clip, dtype, "cuda")

    def measure(**kwargs) -> float:
        model = nava(config, weights, **kwargs)
        run(model, inputs)
        return statistics.median(seconds_of_pass(model, inputs, "cuda") for _ in range(steps))

    report = {"torch, its own choice": measure(attention=sdpa)}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                report[f"torch {name}"] = measure(attention=sdpa)
        except RuntimeError as error:
            report[f"torch {name}"] = f"not run: {str(error).splitlines()[0]}"
    try:
        import flash_attn
    except ImportError:
        report["flash-attn"] = "not installed"
    else:
        report[f"flash-attn {flash_attn.__version__}"] = measure()
    return report


def live_memory_at_real_size(config: BackboneConfig = CONFIGS["released"]) -> dict:
    """Peak bytes of live tensors of one bf16 pass of the released model at 1280x704, 6 s; nothing is computed."""
    clip = clip_of(*SIZES["720p"])
    with torch.device("meta"):
        models = {
            "nava": NavaBackbone(config, dtype=torch.bfloat16, attention=lambda q, *_: torch.empty_like(q)),
            "plain": PlainBackbone(config, attention=lambda q, *_: torch.empty_like(q)).to(torch.bfloat16),
        }
        return {
            case: {
                name: peak_of_pass(model, **case_inputs(case, config, clip, torch.bfloat16, "meta"))
                for name, model in models.items()
            }
            for case in CASES
            if case != "first frame clean"  # how many timesteps differ is data, which this device does not hold
        }


# ---------------------------------------------------------------- the report


def clip_of(width: int, height: int, latent_frames: int) -> ClipGeometry:
    return ClipGeometry(seconds_of_latents(latent_frames), width, height)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s)"


@dataclass(frozen=True)
class Job:
    """One run of the command: what is compared, where, and how often each pass is timed."""

    config: BackboneConfig
    clip: ClipGeometry
    device: str
    dtype: torch.dtype
    steps: int


def measure(job: Job) -> dict:
    """Everything the command reports, as it goes to JSON."""
    config, clip, device = job.config, job.clip, job.device
    torch.backends.cudnn.allow_tf32 = False  # the comparison with fp32 means fp32
    torch.backends.cuda.matmul.allow_tf32 = False
    weights = random_weights(config, job.dtype, device)
    report = {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "config": asdict(config),
        "parameters": sum(w.numel() for w in weights.values()),
        "latent": list(clip.latent_shape),
        "tokens": {"video": clip.video_tokens, "audio": clip.audio_tokens},
        "dtype": str(job.dtype).removeprefix("torch."),
        "timed_passes": job.steps,
        "time": "wall clock" if device == "cuda" else "CPU time, all threads",
        "memory": "torch.cuda.max_memory_allocated" if device == "cuda" else "live tensors",
        "cases": [],
    }
    run(nava(config, weights), case_inputs("audio only", config, clip, job.dtype, device))  # libraries' workspaces
    for case in CASES:
        with tidy(device):
            print(f"{case} ...", flush=True)
            report["cases"].append(compare(case, config, weights, clip, device, job.steps))
    if device == "cuda":
        with tidy(device):
            print("attention kernels ...", flush=True)
            report["attention_seconds"] = attention_kernels(config, weights, clip, job.steps)
    with tidy(device):
        print("error against fp32 ...", flush=True)
        short = clip_of(clip.width, clip.height, min(clip.latent_frames, TRUTH_FRAMES))
        low = job.dtype if job.dtype != torch.float32 else torch.bfloat16
        report["error_against_fp32"] = error_against_fp32(config, weights, short, device, low)
    print("live tensors at the released size ...", flush=True)
    report["live_memory_720p"] = live_memory_at_real_size()
    return report


def table(report: dict) -> str:
    """The report to read, in Markdown."""
    tokens = report["tokens"]
    lines = [
        f"{report['device']}; torch {report['torch']}; {report['parameters'] / 1e9:.3f} B parameters, "
        f"{report['dtype']}; {tokens['video']} video + {tokens['audio']} audio tokens; "
        f"time: {report['time']}, median of {report['timed_passes']} passes; "
        f"memory beside weights and inputs: {report['memory']}.",
        "",
        "| case | plain s | nava s | ratio | plain GB | nava GB | ratio | relative L2 difference, video / audio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        ours, theirs = case["nava"], case["plain"]
        memory = f"{theirs['peak_bytes'] / GB:.3f} | {ours['peak_bytes'] / GB:.3f} | {case['memory_ratio']:.2f}"
        apart = " / ".join(f"{part['relative_l2']:.1e}" for part in case["difference"].values())
        lines.append(
            f"| {case['case']} | {theirs['seconds']:.3f} | {ours['seconds']:.3f} | {case['time_ratio']:.2f} "
            f"| {memory} | {apart} |"
        )
    lines += ["", *_error_lines(report["error_against_fp32"])]
    for kernel, seconds in report.get("attention_seconds", {}).items():
        lines.append(f"Attention, {kernel}: {seconds if isinstance(seconds, str) else f'{seconds:.3f} s a pass'}")
    lines += ["", "Live tensors of a bf16 pass of the released model at 1280x704, 37 latent frames (counted, not run):"]
    for case, peak in report["live_memory_720p"].items():
        ratio = peak["plain"] / peak["nava"]
        lines.append(f"{case}: plain {peak['plain'] / GB:.2f} GB, nava {peak['nava'] / GB:.2f} GB, ratio {ratio:.2f}")
    return "\n".join(lines)


def _error_lines(errors: dict) -> list[str]:
    if "not_measured" in errors:
        return [f"Error against fp32: not measured ({errors['not_measured']})."]
    return [
        f"Error of {errors['dtype']} against fp32, {errors['tokens']} tokens, draw {number}, video / audio: "
        + ", ".join(
            f"{name} " + " / ".join(f"{part['relative_l2']:.5f}" for part in draw[name].values()) for name in BUILDERS
        )
        for number, draw in enumerate(errors["draws"])
    ]


def parse(arguments: list[str] | None) -> tuple[Job, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbone", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", help=f"{', '.join(SIZES)} or WIDTHxHEIGHTxLATENT_FRAMES; by default the device's")
    parser.add_argument("--model", choices=CONFIGS, help="by default middle on the CPU, released on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="by default float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--steps", type=int, default=5, help="timed passes of each (default 5)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device.")
    if options.steps < 1:
        parser.error("--steps must be at least 1.")
    size = options.size or ("720p" if gpu else "cpu")
    try:
        clip = clip_of(*(SIZES[size] if size in SIZES else map(int, size.split("x"))))
    except (TypeError, ValueError) as error:
        parser.error(f"--size {size}: give {', '.join(SIZES)} or WIDTHxHEIGHTxLATENT_FRAMES ({error}).")
    job = Job(
        config=CONFIGS[options.model or ("released" if gpu else "middle")],
        clip=clip,
        device=options.device,
        dtype=DTYPES[options.dtype or ("bfloat16" if gpu else "float32")],
        steps=options.steps,
    )
    return job, options.json


def main(arguments: list[str] | None = None) -> None:
    job, path = parse(arguments)
    report = measure(job)
    print(table(report))
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
