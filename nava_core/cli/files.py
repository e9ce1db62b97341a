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
memory its weights take. Only headers are read. Of a folder, the model files in it are looked at."""

INSPECT_EXAMPLES = """examples:
  nava inspect NAVA.safetensors
  nava inspect models/ --json"""

CONVERT = """Writes a NAVA backbone in another type, tensor by tensor, in the layout of the released files. TARGET is
there when it is whole, or not at all. fp8: float8 with a scale a row for the blocks' matrices, bf16 for the rest.

Of a LoRA for NAVA, the layers are renamed as ComfyUI's LoRA loaders look for them; its type stays unless one is given.
peft's adapter_config.json is read where it is beside SOURCE."""

CONVERT_EXAMPLES = """examples:
  nava convert NAVA.safetensors NAVA_fp8.safetensors
  nava convert last.ckpt NAVA_bf16.safetensors --dtype bf16
  nava convert trained/adapter_model.safetensors my_lora.safetensors"""


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="model files or folders")
    parser.add_argument("--json", action="store_true", help="one JSON object a file")


def run_inspect(args: argparse.Namespace) -> int:
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
        finding["memory_bytes_fp8"] = estimate_memory(info, torch.float8_e4m3fn)
    return finding


def _as_text(finding: dict[str, Any]) -> str:
    from ..checkpoint import format_bytes

    lines = [finding["summary"]]
    if not finding["loads"]:
        lines.append(f"  would not load: {finding['problem']}")
        return "\n".join(lines)
    memory = format_bytes(finding["memory_bytes"])
    if "memory_bytes_fp8" in finding:
        memory += f" (bf16 {format_bytes(finding['memory_bytes_bf16'])}"
        memory += f", fp8 {format_bytes(finding['memory_bytes_fp8'])})"
    lines.append(f"  would load, its weights in {memory} of memory")
    return "\n".join(lines)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a NAVA backbone or LoRA, safetensors or torch")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the .safetensors to write")
    types = ["fp8", "bf16", "fp16", "fp32"]
    parser.add_argument("--dtype", choices=types, help="its type (a backbone: fp8; a LoRA: as it is)")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET where it is there")


def run_convert(args: argparse.Namespace) -> int:
    from ..checkpoint import FileKind, describe_file
    from ..convert import convert
    from ..lora import convert_lora

    if args.target.suffix.lower() != ".safetensors":
        raise UsageError(f"What is written is safetensors: name it {args.target.stem}.safetensors.")
    is_lora = describe_file(args.source).kind is FileKind.LORA
    write, dtype = (convert_lora, args.dtype) if is_lora else (convert, args.dtype or "fp8")
    progress = Progress()
    progress.begin(f"Converting {args.source.name} to {dtype or 'ComfyUI names'}", unit="%")
    try:
        made = write(args.source, args.target, dtype=dtype, overwrite=args.overwrite, progress=progress.step)
    finally:
        progress.end()
    progress.say(made.summary)
    print(args.target)
    return 0


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
