"""The last stages: a clip's latents to its frames and its sound, in the form that there is memory for."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ..components import AudioVAE, VideoVAE
from ..decoding import IN_PIECES, ONE_PIECE, DecodeForm, Decoding, SoundForm, Step, choose_form, collect, stream_down
from ..explain import is_out_of_memory
from ..geometry import FPS, frames_of_latents
from ..media import fit_length, mux, write_wav
from ..ram import free_ram
from .clip import Clip, checked_path
from .latents import ClipLatents
from .memory import Components

ADVICE = "make the clip smaller or shorter, or free the memory other programs hold"


def stream_video(
    components: Components, latent: torch.Tensor, decoding: Decoding, step: Step | None = None
) -> Iterator[torch.Tensor]:
    """A video latent -> its frames in 0..1, fp32 on the CPU, in parts (f, height, width, 3) as they come.

    In the first of the forms of ``decoding`` that there is memory for; where memory ends, the next one goes on, after
    the smallest on a GPU the CPU. ``step(done, total)`` is called after each pass of the network, and may raise. Raises
    TooLittleMemoryError where no form gets through.
    """
    with components.loaded("video_vae") as vae:
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
    with components.loaded("audio_vae") as vae:
        fits = components.make_room(vae.decode_bytes(latent.shape))
        forms = (ONE_PIECE, IN_PIECES) if fits else (IN_PIECES,)
        if components.device.type != "cpu":
            forms = (*forms, replace(IN_PIECES, on_cpu=True))
        components.say("Decoding the sound." if fits else f"Decoding the sound in {forms[0]}.")

        def stream(form: SoundForm) -> Iterator[torch.Tensor]:
            yield _sound(vae, latent, form)

        (waveform,) = _down(components, forms, stream, "decoding the sound")
        return fit_length(waveform[0], round(duration * vae.sample_rate)), vae.sample_rate


def decode_clip(components: Components, latents: ClipLatents, decoding: Decoding, step: Step | None = None) -> Clip:
    """The clip of ``latents``, its frames in memory."""
    waveform, rate = _sound_of(components, latents)
    frames = None if latents.video is None else decode_video(components, latents.video, decoding, step)
    return Clip(frames, waveform, rate, latents.video, latents.audio, latents.report, latents.warnings)


def save_clip(
    components: Components,
    latents: ClipLatents,
    path: str | os.PathLike,
    decoding: Decoding,
    step: Step | None = None,
) -> Path:
    """Write the clip of ``latents`` as :meth:`Clip.save` does, each frame as soon as it is decoded.

    Memory does not grow with the clip beside its sound. Returns the path; what fails, or is interrupted, leaves no
    file.
    """
    path = checked_path(path, latents.video is not None)
    waveform, rate = _sound_of(components, latents)
    if latents.video is None:
        write_wav(path, waveform, rate, bits=24)
        return path
    total = frames_of_latents(latents.video.shape[2])
    with closing(stream_video(components, latents.video, decoding, step)) as frames:
        mux(path, frames, waveform, rate or None, FPS, total=total)
    return path


def _sound_of(components: Components, latents: ClipLatents) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if latents.audio is None else decode_audio(components, latents.audio, latents.duration)


def _sound(vae: AudioVAE, latent: torch.Tensor, form: SoundForm) -> torch.Tensor:
    if form.on_cpu:
        vae.to("cpu")
    return vae.decode(latent, form)


def _forms(components: Components, vae: VideoVAE, shape: torch.Size, decoding: Decoding) -> tuple[DecodeForm, ...]:
    """The forms to try: from the first on that there is memory for, and last, on a GPU, without it."""
    on_gpu, ram = components.device.type != "cpu", free_ram()

    def needed(form: DecodeForm) -> int:
        return vae.decode_bytes(shape, form)

    def fits(form: DecodeForm) -> bool:
        in_ram = vae.decode_ram(shape, form)
        if not on_gpu:
            return ram is None or needed(form) + in_ram <= ram
        return (ram is None or in_ram <= ram) and components.make_room(needed(form))

    forms = choose_form(decoding, decoding.forms(*shape[-2:], needed, on_gpu=on_gpu), fits)
    return (*forms, replace(forms[-1], in_ram=False, on_cpu=True)) if on_gpu else forms


def _down(
    components: Components, forms: tuple, stream: Callable[[object], Iterator[torch.Tensor]], what: str
) -> Iterator[torch.Tensor]:
    def recover() -> None:
        gc.collect()
        components.make_room(sys.maxsize)  # the backbone leaves the GPU, too

    return stream_down(
        forms, stream, is_short=is_out_of_memory, recover=recover, say=components.say, what=what, advice=ADVICE
    )
