"""`nava inspect` and `nava convert`: model files looked at; a backbone written in another type, a LoRA for ComfyUI."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from .options import Command, UsageError
from .progress import Progress

MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf")

INSPECT = """Says of every FILE what it is (by its content, not its name), whether NAVA would load it, and how much
memory its weights take. Only headers are read. Of a folder, the model files in it are looked at.

--compare A B runs two backbones, whatever their types, block by block on a small clip, and prints what B loses against
A: relative errors and cosines of picture and sound, of single predictions and of the guided combination that a clip is
made from, and a warning where the sound will suffer. --text-encoder makes its texts real."""

INSPECT_EXAMPLES = """examples:
  nava inspect NAVA.safetensors
  nava inspect models/ --json
  nava inspect --compare NAVA.safetensors NAVA_w4a8.safetensors --text-encoder umt5_xxl_fp16.safetensors"""

CONVERT = """Writes a NAVA backbone in another type, tensor by tensor, in the layout of the released files. TARGET is
there when it is whole, or not at all. fp8: float8 with a scale a row for the blocks' matrices, bf16 for the rest. int8,
mxfp8, nvfp4, w4a8 and w6a8: ComfyUI's own quantised formats for the blocks' matrices, bf16 for the rest.

At 4 bits the sound suffers first. --protect 0.1 keeps the most sensitive tenth of those weights at 8 bits: which, is
measured before, block by block on a small clip, sound counting at least as much as picture. Give it the --text-encoder:
without a text the order of the layers is rougher.

Of a LoRA for NAVA, the layers are renamed as ComfyUI's LoRA loaders look for them; its type stays unless one is given.
peft's adapter_config.json is read where it is beside SOURCE."""

CONVERT_EXAMPLES = """examples:
  nava convert NAVA.safetensors NAVA_fp8.safetensors
  nava convert NAVA.safetensors NAVA_int8.safetensors --to int8
  nava convert NAVA.safetensors NAVA_w4a8.safetensors --to w4a8 --protect 0.1 --text-encoder umt5_xxl_fp16.safetensors
  nava convert last.ckpt NAVA_bf16.safetensors --to bf16
  nava convert trained/adapter_model.safetensors my_lora.safetensors"""

TYPES = ("fp8", "int8", "mxfp8", "nvfp4", "w4a8", "w6a8", "bf16", "fp16", "fp32")


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="model files or folders")
    parser.add_argument("--json", action="store_true", help="one JSON object a file, or of the comparison")
    parser.add_argument("--compare", action="store_true", help="run two backbones and say what the second loses")
    _add_measuring_options(parser)


def _add_measuring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-encoder", type=Path, metavar="FILE", help="umt5, for real texts in what is measured")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="of a text encoder that has none inside")
    parser.add_argument("--device", default="auto", help="where it is computed: auto, cpu, cuda ... (default: auto)")


def run_inspect(args: argparse.Namespace) -> int:
    if args.compare:
        return _run_compare(args)
    paths = [path for given in args.files for path in _model_files(given)]
    if not paths:
        raise UsageError(f"There is no model file in {', '.join(map(str, args.files))} ({', '.join(MODEL_SUFFIXES)}).")
    findings = [_finding(path) for path in paths]
    for finding in findings:
        print(json.dumps(finding, ensure_ascii=False) if args.json else _as_text(finding))
    total = sum(finding["memory_bytes"] for finding in findings if finding["loads"])
    if len(findings) > 1 and not args.json:
        from ..checkpoint import format_bytes

        print(f"\nAll that would load takes {format_bytes(total)} of memory, not all of it at the same time.")
    return 0 if all(finding["loads"] for finding in findings) else 1


def _model_files(path: Path) -> list[Path]:
    """A file itself, or the model files in a folder and below it, links followed."""
    if not path.exists():
        raise UsageError(f"There is no {path}: give a model file or a folder with some.")
    if not path.is_dir():
        return [path]
    found, seen = [], set()
    for here, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # two ways lead here, or a ring
            folders.clear()
            continue
        seen.add(real)
        files = (Path(here, name) for name in names if name.lower().endswith(MODEL_SUFFIXES))
        found += [file for file in files if file.is_file()]
    return sorted(found)


def _finding(path: Path) -> dict[str, Any]:
    from ..checkpoint import describe_file, estimate_memory
    from ..pipeline import load_problem, memory_bytes

    info = describe_file(path)
    problem = load_problem(info)
    finding = {
        "file": str(path),
        "kind": info.kind.value,
        "summary": info.summary,
        "size_bytes": info.size,
        "loads": problem is None,
        "problem": problem,
        "memory_bytes": memory_bytes(info) if info.is_readable else 0,
    }
    if info.is_backbone and problem is None:
        import torch

        finding["memory_bytes_bf16"] = estimate_memory(info, torch.bfloat16)
        if not info.layers:
            finding["memory_bytes_fp8"] = estimate_memory(info, torch.float8_e4m3fn)
        formats: dict[str, list[str]] = {}
        for name, layer in info.layers.items():
            formats.setdefault(layer.format.name, []).append(name)
        finding["formats"] = {name: len(layers) for name, layers in formats.items()}
        if len(formats) > 1:
            rarest = min(formats, key=lambda name: len(formats[name]))
            finding["protected"] = {"format": rarest, "layers": formats[rarest]}
    return finding


def _as_text(finding: dict[str, Any]) -> str:
    from ..checkpoint import format_bytes

    lines = [finding["summary"]]
    if not finding["loads"]:
        lines.append(f"  would not load: {finding['problem']}")
        return "\n".join(lines)
    memory = format_bytes(finding["memory_bytes"])
    others = {name: finding.get(f"memory_bytes_{name}") for name in ("bf16", "fp8")}
    if any(others.values()):
        memory += f" ({', '.join(f'{name} {format_bytes(size)}' for name, size in others.items() if size)})"
    lines.append(f"  would load, its weights in {memory} of memory")
    if "protected" in finding:
        lines.append(f"  in {finding['protected']['format']}: {', '.join(finding['protected']['layers'])}")
    return "\n".join(lines)


# ---------------------------------------------------------------- a comparison


def _run_compare(args: argparse.Namespace) -> int:
    from ..checkpoint import describe_file, format_bytes
    from ..pipeline import choose_device
    from ..quality import compare_files, streamed_bytes

    if len(args.files) != 2:
        raise UsageError(f"--compare takes two files, the reference and the other; got {len(args.files)}.")
    first, second = (describe_file(path) for path in args.files)
    device = choose_device(None if args.device == "auto" else args.device)
    progress = Progress()
    progress.say(
        f"Running both block by block takes about {format_bytes(streamed_bytes(first))} of memory on {device}."
    )
    conditions = _conditions(args, first, progress)
    progress.begin("Comparing", unit="block")
    try:
        found = compare_files(first, second, conditions=conditions, device=device, progress=progress.step)
    finally:
        progress.end()
    print(json.dumps(found.to_dict()) if args.json else _comparison_text(found, first.path.name, second.path.name))
    return 0


def _conditions(args: argparse.Namespace, info: Any, progress: Progress) -> Any:
    from ..checkpoint import backbone_config
    from ..quality import encode_conditions

    if args.text_encoder is None:
        progress.say("Measured without a text, which is rougher; --text-encoder gives real ones.")
        return None
    progress.say(f"Encoding texts with {args.text_encoder.name}.")
    return encode_conditions(args.text_encoder, backbone_config(info), args.tokenizer)


def _comparison_text(found: Any, first: str, second: str) -> str:
    lines = [f"{second} against {first}:", "  noise    one prediction                    guided combination"]
    lines.append("  level    picture          sound            picture          sound")
    for one, both in zip(found.predictions, found.guided, strict=True):
        cells = [
            f"{100 * getattr(each, f'{part}_error'):5.2f} % ({getattr(each, f'{part}_cosine'):.4f})"
            for each in (one, both)
            for part in ("video", "audio")
        ]
        lines.append(f"  {one.sigma:.2f}   {'  '.join(cells)}")
    lines.append("  (relative L2 error, cosine)")
    lines.append("  weights: " + ", ".join(f"{kind} {100 * error:.2f} %" for kind, error in found.weights.items()))
    if found.warning:
        lines.append(f"  {found.warning}")
    return "\n".join(lines)


# ---------------------------------------------------------------- converting


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a NAVA backbone or LoRA, safetensors or torch")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the .safetensors to write")
    parser.add_argument(
        "--to", "--dtype", dest="to", choices=TYPES, help="its type (a backbone: fp8; a LoRA: as it is)"
    )
    parser.add_argument("--protect", type=float, default=0.0, metavar="SHARE", help="of the weights to keep at 8 bits")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET where it is there")
    _add_measuring_options(parser)


def run_convert(args: argparse.Namespace) -> int:
    from ..checkpoint import FileKind, describe_file
    from ..convert import check_target, convert
    from ..lora import convert_lora
    from ..pipeline import choose_device

    if args.target.suffix.lower() != ".safetensors":
        raise UsageError(f"What is written is safetensors: name it {args.target.stem}.safetensors.")
    info = describe_file(args.source)
    progress = Progress()
    if info.kind is FileKind.LORA:
        if args.protect:
            raise UsageError("--protect is for a backbone's weights; a LoRA has none to protect.")
        write, to, more = convert_lora, args.to, {}
    else:
        write, to = convert, args.to or "fp8"
        device = choose_device(None if args.device == "auto" else args.device)
        check_target(info, args.target, args.overwrite)  # before what takes long
        more = {"device": device, "say": progress.say, "protected": _protected(args, info, to, device, progress)}
    progress.begin(f"Converting {args.source.name} to {to or 'ComfyUI names'}", unit="%")
    try:
        made = write(args.source, args.target, dtype=to, overwrite=args.overwrite, progress=progress.step, **more)
    finally:
        progress.end()
    progress.say(made.summary)
    print(args.target)
    return 0


def _protected(args: argparse.Namespace, info: Any, to: str, device: Any, progress: Progress) -> list[str]:
    """The layers that --protect keeps at 8 bits."""
    from ..backbone.formats import PROTECTING
    from ..checkpoint import format_bytes
    from ..quality import measure_sensitivity, most_sensitive, sensitivity_bytes

    if not 0 <= args.protect <= 1:
        raise UsageError(f"--protect takes a share of the weights from 0 to 1, such as 0.1; got {args.protect:g}.")
    if not args.protect:
        if to in PROTECTING and to != "w6a8":
            progress.say(f"At 4 bits the sound suffers first: consider w6a8, or --protect 0.1 beside {to}.")
        return []
    if to not in PROTECTING:
        raise UsageError(f"--protect keeps weights at 8 bits beside {', '.join(PROTECTING)}; {to} has 8 or more.")
    memory = format_bytes(sensitivity_bytes(info))
    progress.say(f"Measuring which layers matter, block by block: about {memory} of memory on {device}.")
    conditions = _conditions(args, info, progress)
    progress.begin("Measuring", unit="block")
    try:
        found = measure_sensitivity(info, to, conditions=conditions, device=device, progress=progress.step)
    finally:
        progress.end()
    chosen = most_sensitive(found, args.protect)
    progress.say(f"In {PROTECTING[to]} stay {len(chosen)} of {len(found.errors)} layers: {', '.join(chosen)}.")
    return chosen


COMMANDS = [
    Command("inspect", "say what model files are", INSPECT, INSPECT_EXAMPLES, add_inspect_options, run_inspect),
    Command(
        "convert",
        "write a backbone in another type, or a LoRA for ComfyUI",
        CONVERT,
        CONVERT_EXAMPLES,
        add_convert_options,
        run_convert,
    ),
]
