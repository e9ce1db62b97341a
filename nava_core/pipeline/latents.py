"""A clip's latents: what denoising leaves, and their file, from which the clip can be finished at any time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import CLIP_LATENTS, FileInfo, FileKind, describe_file, open_checkpoint
from ..geometry import (
    AUDIO_BINS,
    AUDIO_CHANNELS,
    AUDIO_LATENTS_PER_SECOND,
    FPS,
    VIDEO_CHANNELS,
    frames_of_latents,
)
from ..media import LATENTS_STAGE, check_finite, whole_file

if TYPE_CHECKING:
    from ..given.originals import Originals

SUFFIX = ".latents.safetensors"
FORMAT, VERSION = "nava_latents", 1
COMFYUI_TENSOR = "latent_tensor"
SOUND_TENSOR = "nava_latents.given_sound"  # (C, N) of what was given of the sound
FRAMES_NOT_KEPT = (
    "The frames that were given are not in the latents' file: a clip that is decoded of it has them as the video VAE "
    "gives them back."
)
MOST_APART = 1.0  # seconds between the lengths that a clip's picture and sound latents say
SHAPES = {
    "video": ("picture", 5, {0: 1, 1: VIDEO_CHANNELS}, f"(1, {VIDEO_CHANNELS}, frames, height / 16, width / 16)"),
    "audio": ("sound", 4, {0: 1, 1: AUDIO_CHANNELS, 3: AUDIO_BINS}, f"(1, {AUDIO_CHANNELS}, steps, {AUDIO_BINS})"),
}


class LatentsError(ValueError):
    """A file holds no latents that a clip can be made of; the message is the sentence to show."""


@dataclass(frozen=True)
class ClipLatents:
    """What denoising leaves of a clip, from which the VAEs make it.

    ``video`` (1, 48, T, H / 16, W / 16) and ``audio`` (1, 8, L, 16), fp32 on the CPU in the VAEs' own spaces, None
    for what the clip does not have; ``duration``: its exact length in seconds, picture and sound alike. ``report`` says
    how the prompt's tokens were used; ``warnings`` are sentences on what will have made the clip worse, or other than
    asked for. ``settings``: what it was made with, as JSON has it, for those who go on from it; ``key``: the hash of
    all that it follows from, of a clip of a batch. ``originals``: what of the finished clip comes out as it was given,
    and not through the VAEs. Raises ValueError for latents of other shapes.
    """

    video: torch.Tensor | None
    audio: torch.Tensor | None
    duration: float
    report: str = ""
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    originals: Originals | None = None

    def __post_init__(self) -> None:
        if self.video is None and self.audio is None:
            raise ValueError("These latents are of neither picture nor sound.")
        for part in SHAPES:
            tensor = getattr(self, part)
            if tensor is not None:
                _check_shape(part, tuple(tensor.shape))

    @property
    def suffix(self) -> str:
        """What the clip's file ends in: ".wav" for sound alone, else ".mp4"."""
        return ".wav" if self.video is None else ".mp4"

    @property
    def not_kept(self) -> str:
        """A sentence on what :meth:`save` leaves out; empty where that is nothing."""
        has_frames = self.originals is not None and self.originals.frames is not None
        return FRAMES_NOT_KEPT if has_frames else ""

    def save(self, path: str | os.PathLike) -> Path:
        """Write a safetensors file, fp32, whole or not at all; returns the path.

        A given sound is in it; given frames are not: see ``not_kept``. Raises NonFiniteError for NaN or infinity,
        FileNotFoundError for a folder that is not there.
        """
        path, tensors = Path(path), {}
        for name, tensor in zip(CLIP_LATENTS, (self.video, self.audio), strict=True):
            if tensor is not None:
                check_finite(tensor, LATENTS_STAGE)
                tensors[name] = tensor.detach().to("cpu", torch.float32).contiguous()
        clip = {"duration": self.duration, "fps": FPS, "report": self.report, "warnings": list(self.warnings)}
        clip |= {"settings": dict(self.settings), "key": self.key}
        if self.originals is not None and self.originals.waveform is not None:
            check_finite(self.originals.waveform, "given sound")
            tensors[SOUND_TENSOR] = self.originals.waveform.detach().to("cpu", torch.float32).contiguous()
            spans = [list(span) for span in self.originals.kept_sound]
            clip["given_sound"] = {"sample_rate": self.originals.sample_rate, "spans": spans}
        metadata = {"format": FORMAT, "version": str(VERSION), "clip": json.dumps(clip)}
        with whole_file(path) as temporary:
            write_tensors(tensors, temporary, metadata)
        return path

    @classmethod
    def load(cls, *paths: str | os.PathLike) -> ClipLatents:
        """From a file of :meth:`save`, or from one or two of ComfyUI's Save Latent: a clip's picture and its sound.

        Sizes are checked in the header before memory is taken. Raises FileNotFoundError, and LatentsError or
        NonFiniteError, in a sentence, for a file that is something else, damaged, or of another model, and for latents
        that are not of one clip.
        """
        infos = [describe_file(path) for path in paths]
        for info in infos:
            if info.kind not in (FileKind.NAVA_LATENTS, FileKind.COMFYUI_LATENT):
                advice = "" if info.is_readable else "; use a whole copy, or make the clip again"
                raise LatentsError(f"{info.path.name} is {info.what}, but a clip's latents are needed here{advice}.")
        if len(infos) == 1 and infos[0].kind is FileKind.NAVA_LATENTS:
            return cls._of_ours(infos[0])
        if any(info.kind is FileKind.NAVA_LATENTS for info in infos):
            raise LatentsError("Give the latents of one clip: one file of NAVA's, or a picture's and a sound's.")
        return cls._of_comfyui(infos)

    @classmethod
    def _of_ours(cls, info: FileInfo) -> ClipLatents:
        if info.metadata.get("version") != str(VERSION):
            raise LatentsError(
                f"{info.path.name} is of version {info.metadata.get('version', 'unknown')} of these files, which this "
                "pack does not know: update the pack."
            )
        try:
            clip = json.loads(info.metadata["clip"])
            about = {
                "duration": float(clip["duration"]),
                "report": str(clip["report"]),
                "warnings": tuple(map(str, clip["warnings"])),
                "settings": dict(clip["settings"]),
                "key": str(clip["key"]),
            }
        except (KeyError, TypeError, ValueError, RecursionError):
            raise LatentsError(f"{info.path.name} does not say of what clip it is: make the latents again.") from None
        parts = dict(zip(SHAPES, CLIP_LATENTS, strict=True))
        found = {part: _read(info, name, part) for part, name in parts.items() if name in info.tensors}
        originals = _given_sound(info, clip.get("given_sound"))
        latents = cls(found.get("video"), found.get("audio"), **about, originals=originals)
        latents._check_lengths(info.path.name)
        return latents

    @classmethod
    def _of_comfyui(cls, infos: Sequence[FileInfo]) -> ClipLatents:
        found: dict[str, torch.Tensor] = {}
        for info in infos:
            name = info.prefix + COMFYUI_TENSOR
            shape = info.tensors[name].shape
            part = "audio" if len(shape) == SHAPES["audio"][1] else "video"
            if part in found:
                raise LatentsError(f"{info.path.name} is a second {SHAPES[part][0]}'s latent: give one clip's.")
            tensor = _read(info, name, part)
            absent = shape[2:] == (1, 1, 1) if part == "video" else shape[2] == 1  # as the nodes stand for it
            if not absent:
                found[part] = tensor
        if not found:
            raise LatentsError(f"There is neither picture nor sound in {' and '.join(i.path.name for i in infos)}.")
        video, audio = found.get("video"), found.get("audio")
        latents = cls(video, audio, _picture_seconds(video) or audio.shape[2] / AUDIO_LATENTS_PER_SECOND)
        latents._check_lengths(" and ".join(info.path.name for info in infos))
        return latents

    def _check_lengths(self, name: str) -> None:
        """That picture, sound and the duration are of one length."""
        picture = _picture_seconds(self.video)
        fits = math.isfinite(self.duration) and self.duration > 0
        if picture is not None:
            fits = fits and abs(picture - self.duration) < 1e-6
        if self.audio is not None and fits:
            fits = abs(self.audio.shape[2] / AUDIO_LATENTS_PER_SECOND - self.duration) < MOST_APART
        if not fits:
            raise LatentsError(f"The picture and the sound in {name} are not of one length, so not of one clip.")


def _picture_seconds(video: torch.Tensor | None) -> float | None:
    return None if video is None else frames_of_latents(video.shape[2]) / FPS


def _check_shape(part: str, shape: tuple[int, ...], where: str = "") -> None:
    noun, dimensions, wanted, text = SHAPES[part]
    fits = len(shape) == dimensions and all(shape[place] == size for place, size in wanted.items()) and 0 not in shape
    if fits:
        return
    if len(shape) == dimensions and shape[1:2] == (wanted[1],) and shape[0] > 1:
        raise LatentsError(f"There are {shape[0]} clips{where}: give the latents of one.")
    raise LatentsError(f"The {noun}'s latent{where} is {shape}, of another model: NAVA's is {text}.")


def _given_sound(info: FileInfo, about: Any) -> Originals | None:
    """What was given of the sound; None where nothing was."""
    if about is None and SOUND_TENSOR not in info.tensors:
        return None
    from ..given.originals import Originals

    try:
        rate = int(about["sample_rate"])
        spans = tuple((float(begin), float(end)) for begin, end in about["spans"])
        channels, samples = info.tensors[SOUND_TENSOR].shape
        fits = rate > 0 and channels in (1, 2) and samples > 0
        fits = fits and info.tensors[SOUND_TENSOR].torch_dtype is torch.float32
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise LatentsError(f"The given sound in {info.path.name} is not as it was written: make the latents again.")
    with open_checkpoint(info) as source:
        waveform = source.read(SOUND_TENSOR.removeprefix(info.prefix)).float()
    check_finite(waveform, f"given sound in {info.path.name}")
    return Originals(waveform=waveform, sample_rate=rate, kept_sound=spans)


def _read(info: FileInfo, name: str, part: str) -> torch.Tensor:
    """A tensor whose shape and type are right, fp32."""
    described = info.tensors[name]
    _check_shape(part, described.shape, f" in {info.path.name}")
    if described.torch_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        noun = SHAPES[part][0]
        raise LatentsError(f"The {noun}'s latent in {info.path.name} is of the type {described.dtype}, not of floats.")
    with open_checkpoint(info) as source:
        tensor = source.read(name.removeprefix(info.prefix)).float()
    check_finite(tensor, f"{SHAPES[part][0]}'s latent in {info.path.name}")
    return tensor


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Raises OSError with the system's own number where the disk is full or cannot be
    written, which safetensors has in its text only."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), str(path), dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
