"""Voices that stay: a timbre with its name and where it comes from, its small file, and blends of several.

A voice's file is safetensors: the tensor ``nava_voice.timbre`` (1, 192) fp32, and metadata ``format`` "nava_voice",
``version``, and ``voice``, JSON with ``name``, ``seconds``, ``encoder`` and ``blend``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    VOICE_TENSOR,
    FileInfo,
    FileKind,
    WrongFileError,
    describe_file,
    explain_wrong_file,
    open_checkpoint,
)
from .media import whole_file
from .timbre import encode_timbre, used_seconds
from .timbre.config import EMBEDDING_SIZE
from .timbre.redimnet import ReDimNet

SUFFIX = ".safetensors"
FORMAT, VERSION = "nava_voice", 1
MAX_FILE = 64 * 2**10  # bytes; a voice takes about one kilobyte
MAX_READ = 600.0  # seconds read of a recording from where its part begins; 30 of them are used
MAX_NAME = 120  # bytes; file systems allow 255, and an ending and a number come behind it
MAX_SHOWN_NAME = 2 * MAX_NAME  # of a voice that is called otherwise than its file
MAX_BLEND = 16
FINGERPRINT = re.compile(r"[0-9a-f]{32}")
SHOWN = 8  # characters of a fingerprint in a sentence
OPPOSITE = 1e-3  # length of a mean of unit vectors that has no direction, and what a cosine of -1 may differ by
BLEND_STEPS = 100

_NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|]')
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows keeps them for itself


class VoiceError(ValueError):
    """A voice cannot be used, saved or blended as asked; the message is the sentence to show."""


# ---------------------------------------------------------------- the speaker encoder


def encoder_fingerprint(model: ReDimNet) -> str:
    """32 hexadecimal digits that stand for a speaker encoder's weights: voices of one encoder can be used together.

    The same for the published file, the same weights as safetensors, a copy of them in fp16, and on every device. Only
    learned weights count, to the precision of fp16: constants of the front end are computed where a file lacks them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point() or (name.startswith("spec.") and not name.startswith("spec.spec_norm.")):
            continue
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        rounded = tensor.detach().cpu().half() + 0.0  # which makes -0 of weights that vanish in fp16 a 0
        digest.update(rounded.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------- a voice


@dataclass(frozen=True, eq=False)
class SavedVoice:
    """A voice that can be kept: its timbre and where that comes from.

    ``timbre`` (1, 192) fp32 on the CPU, which carries this voice with it (see :func:`voice_of`); ``encoder``: the
    :func:`encoder_fingerprint` of what made it; ``seconds``: how much of a recording it was taken from, of a blend the
    sum; ``name``: whose it is; ``blend``: (name, share) of the voices that it is made of. Raises VoiceError for values
    that cannot be a voice's.
    """

    timbre: torch.Tensor
    encoder: str
    seconds: float
    name: str = ""
    blend: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise VoiceError(f"This is no voice that can be used: {problem}.")
        timbre = self.timbre.detach().to("cpu", torch.float32).clone()
        timbre.nava_voice = (self.encoder, self.seconds, self.name, self.blend)  # not itself: that would be a circle
        object.__setattr__(self, "timbre", timbre)

    @property
    def summary(self) -> str:
        """One line: the name, what it is made of, and the encoder's fingerprint in short."""
        source = f"{self.seconds:.1f} s of a recording"
        if self.blend:
            source = "blend of " + ", ".join(f"{share:.0%} {name or 'a voice'}" for name, share in self.blend)
        return f"{self.name or 'A voice without a name'}: {source}, speaker encoder {self.encoder[:SHOWN]}"

    def is_like(self, other: SavedVoice) -> bool:
        """Whether it is the same timbre of the same encoder, whatever it is called."""
        return self.encoder == other.encoder and torch.equal(self.timbre, other.timbre)

    def check_encoder(self, encoder: ReDimNet | str) -> None:
        """Raise VoiceError, in a sentence, where the voice was made with another speaker encoder than ``encoder``, a
        network or its fingerprint."""
        wanted = encoder if isinstance(encoder, str) else encoder_fingerprint(encoder)
        if self.encoder != wanted:
            raise VoiceError(
                f"The voice {self.name!r} was made with another speaker encoder ({self.encoder[:SHOWN]}) than the one "
                f"in use here ({wanted[:SHOWN]}): make it again from its recording with this one, or use that one."
            )

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write its file, whole or not at all; returns the path.

        Raises VoiceError for a name that does not end in .safetensors, FileExistsError where there is a file already
        and ``overwrite`` is off, FileNotFoundError for a folder that is not there.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if path.suffix != SUFFIX:
            raise VoiceError(f"A voice is kept as safetensors: name its file {path.stem}{SUFFIX}.")
        if path.is_dir() or (os.path.lexists(path) and not overwrite):
            raise FileExistsError(f"{path.name} is already there: choose another name, or say that it may be replaced.")
        facts = {"name": self.name, "seconds": self.seconds, "encoder": self.encoder, "blend": self.blend}
        metadata = {"format": FORMAT, "version": str(VERSION), "voice": json.dumps(facts)}
        with whole_file(path) as temporary:
            save_file({VOICE_TENSOR: self.timbre}, str(temporary), metadata)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike | FileInfo) -> SavedVoice:
        """From a file of :meth:`save`; its header is checked before its tensor is read.

        Raises FileNotFoundError, and ValueError in a sentence for a file that is something else, damaged, of a later
        version or made by something else.
        """
        info = path if isinstance(path, FileInfo) else describe_file(path)
        facts = _facts(info)
        with open_checkpoint(info) as source:
            timbre = source.read(VOICE_TENSOR)
        try:
            return cls(timbre, **facts)
        except VoiceError as error:
            raise VoiceError(f"{info.path.name}: {error}") from None


def voice_problem(info: FileInfo) -> str | None:
    """The sentence that loading a voice's file would fail with, told from its header; None where there is none."""
    try:
        _facts(info)
    except ValueError as error:
        return str(error)
    return None


def voice_of(timbre: Any) -> SavedVoice | None:
    """The voice that a timbre belongs to; None for a bare embedding, of which nothing else is known."""
    facts = getattr(timbre, "nava_voice", None)
    return None if facts is None else SavedVoice(timbre, *facts)


def make_voice(
    model: ReDimNet,
    waveform: torch.Tensor,
    sample_rate: int,
    *,
    name: str = "",
    start: float = 0.0,
    duration: float | None = None,
) -> SavedVoice:
    """The voice of a recording; the arguments and what is raised as of :func:`encode_timbre`."""
    timbre = encode_timbre(model, waveform, sample_rate, start=start, duration=duration)
    seconds = used_seconds(waveform, sample_rate, start=start, duration=duration)
    return SavedVoice(timbre, encoder_fingerprint(model), seconds, name)


def open_voice(path: str | os.PathLike) -> SavedVoice | None:
    """The voice in a file; None where the file is no model file of any kind, so perhaps a recording.

    Raises FileNotFoundError, and ValueError, in a sentence, for a model file that is no voice.
    """
    info = describe_file(path)
    return SavedVoice.load(info) if info.is_readable else None


def check_one_encoder(voices: Sequence[Any]) -> None:
    """Raise VoiceError where timbres or voices were made with different speaker encoders; bare embeddings pass."""
    known = [(number, voice_of(voice) or voice) for number, voice in enumerate(voices, start=1)]
    known = [(number, voice) for number, voice in known if isinstance(voice, SavedVoice)]
    for number, voice in known[1:]:
        first, reference = known[0]
        if voice.encoder != reference.encoder:
            raise VoiceError(
                f"Voices {first} and {number} were made with different speaker encoders "
                f"({reference.encoder[:SHOWN]} and {voice.encoder[:SHOWN]}), so they cannot be used together: make "
                "them again from their recordings with one."
            )


# ---------------------------------------------------------------- blends


def blend_voices(voices: Sequence[SavedVoice], weights: Sequence[float], name: str = "") -> SavedVoice:
    """A voice between two or more others, by ``weights`` from 0 that need not add up to 1.

    An encoder tells speakers apart by the direction of the embedding, and its length hardly varies; a plain mean would
    be shorter than any voice. So directions are averaged along the sphere: of two voices the blend lies on the arc
    between them, at its second weight's share of the angle, and of more it is the point from which the weighted arcs
    cancel out. Its length is the weighted mean of the lengths. A voice that has all the weight comes out exactly.

    Raises VoiceError for fewer than two voices, weights that are no shares, voices of different encoders, and
    directions so opposite that nothing is between them.
    """
    shares = _shares(voices, weights)
    check_one_encoder(voices)
    used = [(voice, share) for voice, share in zip(voices, shares, strict=True) if share]
    if len(used) == 1:
        alone = used[0][0]
        return SavedVoice(alone.timbre, alone.encoder, alone.seconds, name or alone.name, alone.blend)
    timbre = _between(torch.cat([voice.timbre for voice, _ in used]), [share for _, share in used])
    blend = tuple((voice.name, share) for voice, share in used)
    seconds = sum(voice.seconds for voice, _ in used)
    return SavedVoice(timbre, used[0][0].encoder, seconds, name, blend)


def _shares(voices: Sequence[SavedVoice], weights: Sequence[float]) -> list[float]:
    if len(voices) != len(weights):
        raise VoiceError(f"{len(voices)} voices are to be blended by {len(weights)} weights: give one for each.")
    if not 2 <= len(voices) <= MAX_BLEND:
        raise VoiceError(f"A blend is of 2 to {MAX_BLEND} voices; got {len(voices)}.")
    total = sum(weights)
    if not all(weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise VoiceError("The weights of a blend are numbers from 0, and not all of them 0.")
    return [weight / total for weight in weights]


def _between(timbres: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """Embeddings (n, 192) -> (1, 192): their weighted mean along the sphere, times that of their lengths."""
    weights = torch.tensor(shares, dtype=torch.float64).unsqueeze(1)
    lengths = timbres.double().norm(dim=1, keepdim=True)
    directions = timbres.double() / lengths
    mean = (weights * directions).sum(dim=0)
    if mean.norm() < OPPOSITE or bool((directions @ mean < (OPPOSITE - 1) * mean.norm()).any()):
        raise VoiceError("These voices are opposite to each other, so that none is between them: change the weights.")
    point = mean / mean.norm()
    for _ in range(BLEND_STEPS):
        cosines = (directions @ point).clamp(-1, 1).unsqueeze(1)
        away = directions - cosines * point
        far = away.norm(dim=1, keepdim=True)
        arcs = away * (torch.atan2(far, cosines) / far.clamp_min(1e-30))
        step = (weights * arcs).sum(dim=0)
        angle = step.norm()
        if angle < 1e-12:
            break
        point = point * angle.cos() + step * (angle.sin() / angle)
        point = point / point.norm()
    return (point * (weights * lengths).sum()).float().unsqueeze(0)


# ---------------------------------------------------------------- names


def voice_file_name(name: str) -> str:
    """The file of a voice of that name, safe in every file system and in no other folder. Raises VoiceError."""
    name = unicodedata.normalize("NFC", name)
    plain = name.isprintable() and not _NOT_IN_NAMES.search(name) and name == name.strip(" .")
    if not name or not plain or len(name.encode()) > MAX_NAME or _DEVICE_NAMES.fullmatch(name):
        raise VoiceError(
            f"The voice's name {name[:60]!r} cannot be a file's: use letters, digits, spaces, '-', '_' and '.', at "
            f"most {MAX_NAME} bytes, not beginning or ending with a dot or space."
        )
    return f"{name}{SUFFIX}"


def save_in_folder(
    voice: SavedVoice, folder: str | os.PathLike, name: str, *, replace: bool = False
) -> tuple[Path, SavedVoice]:
    """Save ``voice`` under ``name`` in ``folder``, which is made if need be: (its file, the voice as it is there).

    The same voice saved before stays as it is. Another one of that name is kept too, the new one getting a number
    behind its name, unless ``replace`` is on. Raises VoiceError for a name that cannot be a file's.
    """
    voice_file_name(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for count in range(1, 10_000):
        called = name if count == 1 else f"{name}_{count}"
        path = folder / voice_file_name(called)
        named = SavedVoice(voice.timbre, voice.encoder, voice.seconds, called, voice.blend)
        if replace or not os.path.lexists(path):
            return named.save(path, overwrite=replace), named
        there = _loaded(path)
        if there is not None and there.is_like(voice):
            return path, there
    raise VoiceError(f"There are too many voices named {name!r} in {folder.name}: choose another name.")


def _loaded(path: Path) -> SavedVoice | None:
    try:
        return SavedVoice.load(path)
    except (ValueError, OSError):
        return None


# ---------------------------------------------------------------- checks


def _problem(voice: SavedVoice) -> str | None:
    """What cannot be a voice's, as a phrase; None where all can."""
    names = [voice.name, *(name for name, _ in voice.blend)]
    if tuple(voice.timbre.shape) != (1, EMBEDDING_SIZE) or not voice.timbre.is_floating_point():
        return f"its timbre is {tuple(voice.timbre.shape)}, not (1, {EMBEDDING_SIZE}) numbers"
    if not bool(voice.timbre.isfinite().all()) or not bool(voice.timbre.any()):
        return "its timbre is not of finite numbers, or nothing but zeros"
    if not FINGERPRINT.fullmatch(voice.encoder):
        return "it does not say which speaker encoder made it"
    if not math.isfinite(voice.seconds) or voice.seconds < 0:
        return "it does not say how long its recording was"
    if not all(name.isprintable() and len(name.encode()) <= MAX_SHOWN_NAME for name in names):
        return "its name is too long, or has signs in it that cannot be shown"
    if len(voice.blend) > MAX_BLEND or not all(0 < share <= 1 for _, share in voice.blend):
        return "the shares that it is blended of are not from 0 to 1"
    return None


def _facts(info: FileInfo) -> dict[str, Any]:
    """What a voice's header says; raises WrongFileError or VoiceError before anything is read."""
    name = info.path.name
    if info.kind is not FileKind.NAVA_VOICE:
        raise WrongFileError(explain_wrong_file(info, FileKind.NAVA_VOICE))
    if info.metadata.get("format") != FORMAT or info.format != "safetensors":
        raise VoiceError(f"{name} was not written as a voice's file: save the voice again.")
    if info.metadata.get("version") != str(VERSION):
        raise VoiceError(
            f"{name} is of version {info.metadata.get('version', 'unknown')[:20]} of voices' files, which this pack "
            "does not know: update the pack."
        )
    tensor = info.tensors.get(VOICE_TENSOR)
    if list(info.tensors) != [VOICE_TENSOR] or info.size > MAX_FILE:
        raise VoiceError(f"{name} holds more than a voice: save the voice again.")
    if tensor.shape != (1, EMBEDDING_SIZE) or tensor.torch_dtype is not torch.float32:
        raise VoiceError(
            f"The timbre in {name} is {tensor.shape} of {tensor.dtype}, but NAVA's is (1, {EMBEDDING_SIZE}) of "
            "float32: save the voice again."
        )
    try:
        facts = json.loads(info.metadata["voice"])
        return {
            "name": str(facts["name"]),
            "seconds": float(facts["seconds"]),
            "encoder": str(facts["encoder"]),
            "blend": tuple((str(part), float(share)) for part, share in facts["blend"]),
        }
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise VoiceError(f"{name} does not say whose voice it is: save the voice again.") from None
