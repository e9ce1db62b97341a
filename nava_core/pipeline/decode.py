"""The last stages: a clip's latents to its frames and its sound, in the form that there is memory for."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..components import AudioVAE, VideoVAE
from ..decoding import IN_PIECES, ONE_PIECE, DecodeForm, Decoding, SoundForm, Step, choose_form, collect, stream_down
from ..explain import is_out_of_memory
from ..geometry import FPS, frames_of_latents
from ..media import fit_length, mux, write_wav
from ..offload import CPU, Placement
from ..ram import free_ram
from .clip import Clip, checked_path
from .files import NAMES
from .latents import ClipLatents
from .memory import Components

GIVEN_AT_ONCE = 8  # frames that are handed out at a time where none is decoded
ADVICE = "make the clip smaller or shorter, or free the memory other programs hold"


def stream_video(
    components: Components, latent: torch.Tensor, decoding: Decoding, step: Step | None = None
) -> Iterator[torch.Tensor]:
    """A video latent -> its frames in 0..1, fp32 on the CPU, in parts (f, height, width, 3) as they come.

    In the first of the forms of ``decoding`` that there is memory for; where memory ends, the next one goes on, after
    the smallest on a GPU the CPU. ``step(done, total)`` is called after each pass of the network, and may raise. Raises
    TooLittleMemoryError where no form gets through.
    """
    with _loaded(components, "video_vae", _least_bytes(components, latent.shape, decoding)) as vae:
        forms = _forms(components, vae, latent.shape, decoding)
        components.say(f"Decoding the picture in {forms[0]}.")

        def stream(form: DecodeForm) -> Iterator[torch.Tensor]:
            with vae.on_cpu() if form.on_cpu else nullcontext():
                yield from vae.stream(latent, form, step)

        yield from _down(components, forms, stream, "decoding the picture")


def decode_video(
    components: Components, latent: torch.Tensor, decoding: Decoding, step: Step | None = None
) -> torch.Tensor:
    """A video latent -> frames (T, height, width, 3) in 0..1; as for :func:`stream_video`."""
    return collect(stream_video(components, latent, decoding, step), frames_of_latents(latent.shape[2]))


def decode_audio(components: Components, latent: torch.Tensor, duration: float) -> tuple[torch.Tensor, int]:
    """Waveform (2, N), as long as the clip, and its sample rate.

    In one piece where there is memory for it, else in pieces, which are equal up to rounding, last on the CPU.
    """
    with _loaded(components, "audio_vae", AudioVAE.decode_bytes(latent.shape, IN_PIECES)) as vae:
        fits = components.make_room(vae.decode_bytes(latent.shape))
        forms = (ONE_PIECE, IN_PIECES) if fits else (IN_PIECES,)
        if components.at.type != "cpu":
            forms = (*forms, replace(IN_PIECES, on_cpu=True))
        elif _is_away(components, "audio_vae"):
            forms = tuple(replace(form, on_cpu=True) for form in forms)
        components.say("Decoding the sound." if forms[0] == ONE_PIECE else f"Decoding the sound in {forms[0]}.")

        def stream(form: SoundForm) -> Iterator[torch.Tensor]:
            yield _sound(vae, latent, form)

        (waveform,) = _down(components, forms, stream, "decoding the sound")
        return fit_length(waveform[0], round(duration * vae.sample_rate)), vae.sample_rate


def decode_clip(components: Components, latents: ClipLatents, decoding: Decoding, step: Step | None = None) -> Clip:
    """The clip of ``latents``, its frames in memory; what is given in full is not decoded, nor its VAE loaded."""
    waveform, rate = clip_sound(components, latents)
    if latents.video is None:
        frames = None
    elif latents.originals is None:
        frames = decode_video(components, latents.video, decoding, step)
    else:
        with closing(clip_frames(components, latents, decoding, step)) as parts:
            frames = collect(parts, frames_of_latents(latents.video.shape[2]))
    return Clip(frames, waveform, rate, latents.video, latents.audio, latents.report, latents.warnings)


def save_clip(
    components: Components,
    latents: ClipLatents,
    path: str | os.PathLike,
    decoding: Decoding,
    step: Step | None = None,
) -> Path:
    """Write the clip of ``latents`` as :meth:`Clip.save` does, each frame as soon as it is decoded.

    Memory does not grow with the clip beside its sound and the frames that were given. Returns the path; what fails, or
    is interrupted, leaves no file.
    """
    path = checked_path(path, latents.video is not None)
    waveform, rate = clip_sound(components, latents)
    if latents.video is None:
        write_wav(path, waveform, rate, bits=24)
        return path
    total = frames_of_latents(latents.video.shape[2])
    with closing(clip_frames(components, latents, decoding, step)) as frames:
        mux(path, frames, waveform, rate or None, FPS, total=total)
    return path


def clip_sound(components: Components, latents: ClipLatents) -> tuple[torch.Tensor | None, int]:
    """A clip's waveform (C, N) and its rate, (None, 0) without sound: decoded, with what was given of it as it was.

    A sound that is given in full comes at its own rate, and the audio VAE is not loaded.
    """
    if latents.audio is None:
        return None, 0
    originals = latents.originals
    if originals is not None and originals.has_all_sound:
        components.say("The sound is the given one: nothing of it is decoded.")
        return originals.put_sound(None, originals.sample_rate)
    waveform, rate = decode_audio(components, latents.audio, latents.duration)
    return (waveform, rate) if originals is None else originals.put_sound(waveform, rate)


def clip_frames(
    components: Components, latents: ClipLatents, decoding: Decoding, step: Step | None = None
) -> Iterator[torch.Tensor]:
    """A clip's frames in parts (f, height, width, 3) as :func:`stream_video` gives them, with the given ones as they
    were. Frames that are given in full are not decoded, and the video VAE is not loaded."""
    originals = latents.originals
    if originals is None:
        yield from stream_video(components, latents.video, decoding, step)
        return
    if originals.has_all_frames:
        components.say("The picture is the given one: nothing of it is decoded.")
        total = len(originals.frames)
        for first in range(0, total, GIVEN_AT_ONCE):
            if step is not None:
                step(first, total)
            frames = originals.frames[first : first + GIVEN_AT_ONCE]
            yield frames.float() / 255 if frames.dtype is torch.uint8 else frames.float()
        return
    done = 0
    with closing(stream_video(components, latents.video, decoding, step)) as parts:
        for part in parts:
            yield originals.put_frames(part, done)
            done += len(part)


def _sound(vae: AudioVAE, latent: torch.Tensor, form: SoundForm) -> torch.Tensor:
    if form.on_cpu:
        vae.to("cpu")
    return vae.decode(latent, form)


@contextmanager
def _loaded(components: Components, role: str, least: int) -> Iterator[VideoVAE | AudioVAE]:
    """A VAE where it works: on the CPU where its device has no room for its weights and ``least`` bytes beside them."""
    where = components.find_place(role, least)
    with ExitStack() as stack:
        vae = None
        try:
            vae = stack.enter_context(components.loaded(role, where))
        except RuntimeError as error:
            if where.device.type == "cpu" or not is_out_of_memory(error):
                raise
        if vae is None:  # only here are the tensors that were loaded gone
            components.say(f"Out of memory while loading the {NAMES[role]}: it works on the CPU.")
            vae = stack.enter_context(components.loaded(role, Placement(CPU)))
        yield vae


def _is_away(components: Components, role: str) -> bool:
    """Whether a component at work is on the CPU for want of memory on its device."""
    return components.at.type == "cpu" != components.home(role).type


def _least_bytes(components: Components, shape: torch.Size, decoding: Decoding) -> int:
    """Bytes that the smallest form for a latent of ``shape`` takes on a GPU beside the weights."""
    needed = partial(components.empty_video_vae().decode_bytes, shape)
    return needed(decoding.forms(*shape[-2:], needed, on_gpu=True)[-1])


def _forms(components: Components, vae: VideoVAE, shape: torch.Size, decoding: Decoding) -> tuple[DecodeForm, ...]:
    """The forms to try: from the first on that there is memory for, and last, on a GPU, without it."""
    on_gpu, is_away, ram = components.at.type != "cpu", _is_away(components, "video_vae"), free_ram()

    def needed(form: DecodeForm) -> int:
        return vae.decode_bytes(shape, replace(form, on_cpu=is_away))

    def fits(form: DecodeForm) -> bool:
        in_ram = vae.decode_ram(shape, form)
        if not on_gpu:
            return ram is None or needed(form) + in_ram <= ram
        return (ram is None or in_ram <= ram) and components.make_room(needed(form))

    forms = choose_form(decoding, decoding.forms(*shape[-2:], needed, on_gpu=on_gpu), fits)
    if on_gpu:
        return (*forms, replace(forms[-1], in_ram=False, on_cpu=True))
    return tuple(replace(form, on_cpu=True) for form in forms) if is_away else forms


def _down(
    components: Components, forms: tuple, stream: Callable[[object], Iterator[torch.Tensor]], what: str
) -> Iterator[torch.Tensor]:
    def recover() -> None:
        gc.collect()
        components.make_room(sys.maxsize)  # the backbone leaves the GPU, too

    return stream_down(
        forms, stream, is_short=is_out_of_memory, recover=recover, say=components.say, what=what, advice=ADVICE
    )
