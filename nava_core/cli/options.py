"""Options that commands share: which models, how a clip is made; and their values as the core takes them."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

MODEL_ROLES = {
    "backbone": "NAVA backbone (NAVA.safetensors, NAVA_fp8.safetensors)",
    "text_encoder": "umt5 text encoder",
    "video_vae": "Wan2.2 video VAE",
    "audio_vae": "LTX audio VAE with its vocoder",
    "speaker_encoder": "ReDimNet speaker encoder, for reference voices",
    "tokenizer": "tokenizer folder, where the text encoder's file has none in it",
}
NEEDED_ROLES = ("backbone", "text_encoder", "video_vae", "audio_vae")
SIZES = {
    "landscape": (1280, 704),
    "portrait": (704, 1280),
    "square": (960, 960),
    "small": (832, 480),
    "small-portrait": (480, 832),
    "small-square": (640, 640),
    "small-wide": (896, 448),
    "small-tall": (448, 896),
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
SCALES = {
    "video_text": "how closely the picture follows the prompt (3)",
    "video_align": "how closely the picture follows the sound (3)",
    "audio_text": "how closely the sound follows the prompt (2)",
    "audio_align": "how closely the sound follows the picture (2)",
    "audio_timbre": "how closely speech follows the reference voices (3)",
}
PLACED = ("encoder_device", "vae_device")  # options that put a part on a device of its own
SIZE = re.compile(r"(\d{1,5})[xX×](\d{1,5})")


class Command(NamedTuple):
    """A subcommand: its texts, what adds its options, and what runs it and returns the exit code."""

    name: str
    help: str
    description: str
    examples: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class UsageError(ValueError):
    """The command line is wrong, or names what is not there; the message is the sentence to show."""


# --- types of arguments ------------------------------------------------------------------------------------------


def size(text: str) -> tuple[int, int]:
    if text in SIZES:
        return SIZES[text]
    found = SIZE.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give WIDTHxHEIGHT or one of {', '.join(SIZES)}")
    return int(found[1]), int(found[2])


def positive(text: str) -> float:
    value = number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"it must be above 0, got {text}")
    return value


def scale(text: str) -> float:
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a scale is 0 or more, got {text}")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def whole_number(lowest: int, highest: int):
    def check(text: str) -> int:
        if not re.fullmatch(r"\d{1,20}", text) or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"it must be a whole number from {lowest} to {highest}, got {text!r}")
        return int(text)

    return check


def lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH; a file whose name ends like a strength is taken as it is."""
    name, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:
        value = None
    if Path(text).is_file() or not name or value is None:
        name, value = text, 1.0
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a strength is a number such as 0.8, got {strength}")
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return Path(os.path.abspath(name)), value


# --- models ------------------------------------------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="folder with the model files, looked through and told apart by content (ComfyUI's models folder works)",
    )
    for role, what in MODEL_ROLES.items():
        metavar = "FOLDER" if role == "tokenizer" else "FILE"
        group.add_argument(f"--{role.replace('_', '-')}", type=Path, metavar=metavar, help=what)
    group.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA to merge into the backbone, at strength 1 or another, as often as needed; those of few-step "
        "students go with --preset distilled",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (default: auto)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="type of the backbone's weights; auto: bf16 on a GPU, as in the file on a CPU; quantised files stay as "
        "they are; also for the video VAE",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the backbone's blocks (torch.compile): minutes at the first step, then quicker ones",
    )
    group.add_argument(
        "--vae-dtype",
        default="auto",
        choices=["auto", *(name for name in DTYPES if name != "fp8")],
        help="type that the video VAE decodes in, if not that of --dtype; fp32 as the makers do takes twice the memory",
    )
    add_memory_option(group)
    group.add_argument(
        "--encoder-device", metavar="DEVICE", help="another device for the text encoder: cpu, cuda:1 ..."
    )
    group.add_argument("--vae-device", metavar="DEVICE", help="another device for both VAEs: cpu, cuda:1 ...")


def add_memory_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--memory",
        metavar="AMOUNT",
        help="what may be taken of the GPU: 6GB, 80%%, ...; what does not fit is streamed from RAM, or done in parts "
        "or on the CPU (default: what is free)",
    )


def model_files(args: argparse.Namespace, needed: Sequence[str] | None = None) -> Any:
    """``ModelFiles`` from --models and the single files, which come before it; with ``needed`` of these roles alone."""
    from ..pipeline import ModelFiles, find_model_files

    roles, needed = (tuple(MODEL_ROLES), NEEDED_ROLES) if needed is None else (needed, needed)
    options = {role: f"--{role.replace('_', '-')}" for role in roles}
    given = {role: getattr(args, role) for role in roles if getattr(args, role) is not None}
    for role, path in given.items():
        if not path.exists():
            raise UsageError(f"{options[role]}: there is no {path}.")
    missing = [role for role in needed if role not in given]
    if args.models is None:
        if missing:
            singles = ", ".join(options[role] for role in missing)
            raise UsageError(f"Say where the models are: --models FOLDER, or the single files {singles}.")
        return ModelFiles(**given)
    if not args.models.is_dir():
        raise UsageError(f"--models: there is no folder {args.models}.")
    try:
        return find_model_files(args.models, roles=roles, **given)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--models: {error} Single files are given with {', '.join(options.values())}.") from None


def model_names(files: Any) -> dict[str, str]:
    """The files' names and sizes by role, for a report."""
    names = {}
    for role in MODEL_ROLES:
        path = getattr(files, role, None)
        if path is not None:
            path = Path(path)
            names[role] = f"{path.name} ({path.stat().st_size} bytes)" if path.is_file() else path.name
    return names


def pipeline_opener(
    args: argparse.Namespace, files: Any, say: Callable[[str], None] | None, *, keep_loaded: bool = False
) -> Callable[[], Callable[..., Any]]:
    """A function that opens the pipeline with the command's device and type."""
    from ..pipeline import NavaPipeline

    opener = args.open_pipeline or NavaPipeline.from_files
    device, options = device_of(args), types_of(args)
    parallel = parallel_of(args, files, device.type)
    options |= placement_of(args, device, parallel)
    if parallel is not None:
        options["parallel"] = parallel
    more = {"loras": args.lora, "compile": args.compile, **options}
    return lambda: opener(files, device=device, say=say, keep_loaded=keep_loaded, **more)


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several GPUs")
    group.add_argument(
        "--parallel",
        type=whole_number(1, 64),
        metavar="N",
        help="N workers make the clip together, a GPU each; with --device cpu N processes. On this machine, or on the "
        "Ray cluster that NAVA_RAY_ADDRESS names",
    )
    group.add_argument(
        "--layout",
        default="auto",
        metavar="AxB",
        help="A predictions side by side, B workers sharing the tokens of each (default: auto, the quickest)",
    )
    group.add_argument(
        "--weights",
        choices=["replicated", "sharded"],
        default="replicated",
        help="all weights on every GPU, or a part on each for GPUs that cannot hold them (default: replicated)",
    )


def parallel_of(args: argparse.Namespace, files: Any, device: str | None) -> Any:
    """``Parallel`` from --parallel and its like, checked; None without. ``device`` None: one that is found elsewhere.
    Raises UsageError."""
    from ..parallel import Parallel

    workers = getattr(args, "parallel", None)
    if workers is None:
        if getattr(args, "layout", "auto") != "auto" or getattr(args, "weights", "replicated") != "replicated":
            raise UsageError("--layout and --weights are for several workers: give --parallel N too.")
        return None
    parallel = Parallel(workers, args.layout, args.weights)
    if args.compile and parallel.weights == "sharded":
        raise UsageError("--compile: sharded weights come block by block, which cannot be compiled: leave out one.")
    try:
        parallel.check(files.backbone, device or "cpu")
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--parallel: {error}") from None
    return parallel


def portable_opener(
    args: argparse.Namespace, files: Any, device: str | None, parallel: Any = None, *, keep_loaded: bool = False
) -> Callable[[], Callable[..., Any]]:
    """As ``pipeline_opener``, to be called in another process: ``device`` (None: what is there) is sought there."""
    from ..pipeline import NavaPipeline

    opener = args.open_pipeline or NavaPipeline.from_files
    options = {**types_of(args), **_placement_in_workers(args, device, parallel)}
    if parallel is not None:
        options["parallel"] = parallel
    more = {"loras": args.lora, "compile": args.compile, **options}
    return partial(opener, files, device=device, keep_loaded=keep_loaded, **more)


def device_of(args: argparse.Namespace) -> Any:
    """The torch device of --device. Raises UsageError for one that this machine or torch has not."""
    from ..pipeline import choose_device

    try:
        return choose_device(None if args.device == "auto" else args.device)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from None


def placement_of(args: argparse.Namespace, device: Any, parallel: Any = None) -> dict[str, Any]:
    """--memory, --encoder-device and --vae-device, checked, as far as they were given. Raises UsageError."""
    from ..pipeline import check_memory, choose_device

    given = _given_places(args)
    try:
        check_memory(given.get("memory"), device, parallel)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None
    for name in set(PLACED) & set(given):
        try:
            given[name] = choose_device(given[name])
        except ValueError as error:
            raise UsageError(f"--{name.replace('_', '-')}: {error}") from None
    return given


def _placement_in_workers(args: argparse.Namespace, device: str | None, parallel: Any = None) -> dict[str, Any]:
    """The same for workers, each of which has one GPU or none. Raises UsageError."""
    from ..offload import check_amount

    given = _given_places(args)
    for name in PLACED:
        if given.get(name, "cpu") != "cpu":
            raise UsageError(f"--{name.replace('_', '-')} {given[name]}: a worker has one GPU, so say cpu.")
    if "memory" in given:
        if parallel is not None:
            raise UsageError("--memory: it is for one GPU, and --parallel has several: leave out one of them.")
        if device == "cpu":
            raise UsageError("--memory: it is for GPUs, and the workers work on the CPU: leave it out.")
        try:
            check_amount(given["memory"])
        except ValueError as error:
            raise UsageError(f"--memory: {error}") from None
    return given


def _given_places(args: argparse.Namespace) -> dict[str, str]:
    options = {name: getattr(args, name, None) for name in ("memory", *PLACED)}
    return {name: value for name, value in options.items() if value is not None}


def types_of(args: argparse.Namespace) -> dict[str, Any]:
    """The torch types of --dtype and --vae-dtype, None for auto, and how pictures are decoded."""
    import torch

    from .decoding import decoding_of

    names = {"dtype": args.dtype, "vae_dtype": args.vae_dtype}
    types = {key: None if name == "auto" else getattr(torch, DTYPES[name]) for key, name in names.items()}
    return {**types, "decoding": decoding_of(args) if hasattr(args, "decoding") else None}


# --- how a clip is made ------------------------------------------------------------------------------------------


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clip")
    group.add_argument(
        "--seconds",
        type=positive,
        help="length; longer than 10 in segments (default: 6, or as long as a given sound or video)",
    )
    group.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="WIDTHxHEIGHT in multiples of 16, or one of "
        + ", ".join(f"{name} {width}x{height}" for name, (width, height) in SIZES.items())
        + " (default: landscape; with a first frame the trained size nearest to its proportions)",
    )
    group.add_argument(
        "--image-scale",
        type=int,
        choices=[960, 640, 512],
        default=960,
        help="how large that size is, in the side of a square of as many pixels (default: 960, the trained scale)",
    )
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--mode", choices=["video+audio", "audio", "video"], help="what the clip has (video+audio)")
    mode.add_argument("--audio-only", dest="mode", action="store_const", const="audio", help="sound alone, a .wav")
    mode.add_argument("--video-only", dest="mode", action="store_const", const="video", help="picture alone")
    add_sampling_options(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How anything is sampled, which commands share that make a clip and that make one again."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--negative",
        metavar="TEXT",
        help='what to stay away from: a text, "default" for the built-in Chinese terms that suit the mode, '
        'or "zero" for the all-zero null of training (default: default)',
    )
    sampling.add_argument("--seed", type=whole_number(0, 2**64 - 1), default=0, help="the noise it starts from (0)")
    sampling.add_argument("--steps", type=whole_number(1, 1000), help="denoising steps (50)")
    sampling.add_argument("--shift", type=positive, help="more of the schedule at high noise (5)")
    sampling.add_argument(
        "--preset",
        choices=["distilled"],
        help="distilled: for few-step checkpoints and LoRAs, 4 Euler steps on the conditional prediction alone; "
        "--steps, --shift and --negative do not count then",
    )
    for name, what in SCALES.items():
        sampling.add_argument(f"--{name.replace('_', '-')}", type=scale, metavar="SCALE", help=what)
    sampling.add_argument(
        "--no-alignment", action="store_true", help="do not set picture and sound against each other: a pass less"
    )


def defaults_of(args: argparse.Namespace) -> Any:
    """``Defaults`` of the command's options, checked. Raises UsageError."""
    from ..geometry import ClipGeometry
    from ..jobs import Defaults

    mode, seconds = getattr(args, "mode", None) or "video+audio", args.seconds or 6.0
    scales = {name: getattr(args, name) for name in SCALES if getattr(args, name) is not None}
    if args.no_alignment:
        scales["alignment"] = False
    try:
        if args.size is not None:
            ClipGeometry(seconds, *args.size)
        return Defaults(
            seconds,
            args.size,
            mode,
            args.seed,
            50 if args.steps is None else args.steps,
            5.0 if args.shift is None else args.shift,
            "default" if args.negative is None else args.negative,
            scales,
            preset=args.preset,
            image_scale=getattr(args, "image_scale", 960),
            **_segments_of(args),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def _segments_of(args: argparse.Namespace) -> dict[str, Any]:
    if not hasattr(args, "segment"):
        return {}
    return {"segment": args.segment, "hold": args.hold.replace("+", " and ")}


def ignored_options(args: argparse.Namespace) -> list[str]:
    """A sentence on options that were given and that --preset makes void; none where all of them count."""
    void = ["steps", "shift"]
    if all(getattr(args, name) is None for name in SCALES):
        void.append("negative")
    given = [f"--{name}" for name in void if args.preset is not None and getattr(args, name) is not None]
    if not given:
        return []
    return [f"Not used, because --preset {args.preset} brings its own: {', '.join(given)}."]


def writable_folder(path: Path, option: str = "--out") -> Path:
    """An absolute folder that files can be made in, itself or its nearest parent being there. Raises UsageError."""
    path = Path(os.path.abspath(path))
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise UsageError(f"{option}: {there} is a file, not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: {there} cannot be written to.")
    return path
