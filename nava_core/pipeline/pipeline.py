"""NAVA from its files: the stages of a clip in their order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import describe_file, plan_tensors
from ..components import check_decoding_packages, check_packages, load_tokenizer
from ..decoding import Decoding
from ..geometry import MODES, TRAINED_SCALE
from ..lora_merge import Lora, LoraMerge
from ..parallel import Parallel
from ..prompt import negative_text, timbre_inputs
from ..sampling import FlowUniPC, Guidance, Interrupted, find_preset, flow_sigmas
from . import stages
from .clip import Clip
from .decode import clip_frames, clip_sound, decode_clip, save_clip
from .devices import check_memory, choose_device
from .files import KINDS, OPTIONAL, ModelFiles
from .given import (
    MOST_SECONDS,
    Frames,
    Given,
    Retake,
    Sound,
    given_geometry,
    read_frames,
    video_size,
)
from .latents import ClipLatents
from .memory import Components
from .ready import encode_parts, make_parts, ready_source
from .revise import Source, beginning, refine, retake
from .segments import LongClip, make_long
from .stages import Voice, default_guidance


class ClipDecoder:
    """What makes clips of their latents: the two VAEs. Make one with :meth:`from_files`.

    ``decoding``: how pictures are decoded, where that is not to be chosen from the memory that is free.
    """

    def __init__(self, components: Components, decoding: Decoding | None = None) -> None:
        self.components = components
        self.decoding = decoding or Decoding()

    @classmethod
    def from_files(
        cls,
        files: ModelFiles,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        say: Callable[[str], None] | None = None,
        keep_loaded: bool = False,
        vae_dtype: torch.dtype | None = None,
        memory: int | str | None = None,
        decoding: Decoding | None = None,
    ) -> ClipDecoder:
        """A decoder over ``files``, of which the VAEs have to be there that its clips need; the rest as for
        :meth:`NavaPipeline.from_files`."""
        device = choose_device(device)
        check_memory(memory, device)
        files.check()
        check_decoding_packages()
        components = Components(
            files, device, dtype, say or _say_nothing, keep_loaded, vae_dtype=vae_dtype, memory=memory
        )
        return cls(components, decoding)

    def unload(self) -> None:
        """Give back all memory; the next clip loads its components again."""
        self.components.unload()

    def decode(
        self,
        latents: ClipLatents,
        *,
        callback: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Clip:
        """The clip of ``latents``, its frames in memory.

        Sound first, then the picture. ``callback(done, total)`` follows the passes of the picture's decoder, and ends
        it by raising; ``should_stop`` is asked before each stage and each pass. Raises Interrupted when it says so,
        TooLittleMemoryError where memory ends even in the smallest form.
        """
        step = _step(callback, should_stop)
        return decode_clip(self.components, latents, self.decoding, step)

    def save(
        self,
        latents: ClipLatents,
        path: str | os.PathLike,
        *,
        callback: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Path:
        """Write the clip of ``latents``, each frame as soon as it is decoded: the same file that decoding and
        :meth:`Clip.save` give, in memory that does not grow with the clip's frames.

        The rest as for :meth:`decode`, and what :meth:`Clip.save` raises. No file is left where it fails.
        """
        return save_clip(self.components, latents, path, self.decoding, _step(callback, should_stop))

    def sound(self, latents: ClipLatents) -> tuple[torch.Tensor | None, int]:
        """The waveform (C, N) of the clip of ``latents`` and its rate, (None, 0) without sound; as long as the clip
        where it is given in full, and else up to the last sample that is decoded, filled with silence."""
        return clip_sound(self.components, latents)

    def stream(
        self,
        latents: ClipLatents,
        *,
        callback: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[torch.Tensor]:
        """The frames of the clip of ``latents`` in 0..1 in parts (f, H, W, 3), as they are decoded; the rest as for
        :meth:`decode`. Close it where it is not read to its end."""
        return clip_frames(self.components, latents, self.decoding, _step(callback, should_stop))


class NavaPipeline(ClipDecoder):
    """NAVA from its files. Make one with :meth:`from_files` and call it for each clip."""

    def __init__(self, components: Components, decoding: Decoding | None = None) -> None:
        super().__init__(components, decoding)
        self._tokenizer = load_tokenizer(components.files.text_encoder, components.files.tokenizer)

    @classmethod
    def from_files(
        cls,
        files: ModelFiles,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        say: Callable[[str], None] | None = None,
        keep_loaded: bool = False,
        parallel: Parallel | None = None,
        vae_dtype: torch.dtype | None = None,
        loras: Sequence[Lora] = (),
        compile: bool = False,
        memory: int | str | None = None,
        encoder_device: torch.device | str | None = None,
        vae_device: torch.device | str | None = None,
        decoding: Decoding | None = None,
    ) -> NavaPipeline:
        """A pipeline over ``files``, of which only the headers and the tokenizer are read yet.

        ``device``: where the models work, as :func:`choose_device` takes it. ``dtype``: what the
        backbone and the video VAE compute in; None for bfloat16 on a GPU (float8 weights stay float8), and on the CPU
        for the backbone's own type and a float32 VAE; float8_e4m3fn makes the backbone's weights float8. ``vae_dtype``:
        what the video VAE decodes in, where that is to be another type, such as the makers' float32. ``say`` is told in
        short sentences what is going on. ``loras``: files, or (file, strength), that are merged into the
        backbone's weights each time these are read; see :class:`LoraMerge`. ``decoding``: see :class:`Decoding`.

        Text encoder and VAEs are on the device only while they work, and the backbone stays on a GPU between clips as
        long as the others fit beside it. Otherwise a component is dropped after its work and read again for the next
        clip; ``keep_loaded`` keeps all of them in RAM instead, which suits a batch on a machine with much RAM.

        ``compile``: the backbone's blocks go through ``torch.compile``, which makes the first step slow and all others
        quicker, whatever the size of the clips.

        ``memory``: what may be taken of ``device``, a CUDA GPU: "6GB", "80%" of it, or a number of bytes; None for what
        is free there. Within it the backbone is resident, or as many of its blocks as fit while the others come from
        RAM for their turn, with the same results; the text encoder likewise, or else it works on the CPU, as may the
        encoding of a first frame and the decoding of sound. With a number the allocator is held to it while a component
        is at work. Memory that runs out all the same is met in a smaller form of the same stage.
        ``encoder_device`` and ``vae_device``: another device for the text encoder, and for both VAEs.

        ``parallel``: workers that denoise together, a GPU each (or, with the device "cpu", a process each); text
        encoder and VAEs stay in this process.

        Raises, in a sentence, FileNotFoundError and WrongFileError for files that are not what they should be or a
        missing tokenizer, RuntimeError for a missing package, ValueError for a device that is not there, for an amount
        of memory that makes no sense, or for fp8 of a backbone that is quantised already.
        """
        device = choose_device(device)
        encoder, vaes = (None if name is None else choose_device(name) for name in (encoder_device, vae_device))
        check_memory(memory, device, parallel)
        files.check(needed=[role for role in KINDS if role not in OPTIONAL])
        check_packages()
        plan_tensors(describe_file(files.backbone), dtype)  # refuses, before any work, what the file cannot become
        if parallel is not None:
            parallel.check(files.backbone, device.type)
            if compile and parallel.weights == "sharded":
                raise ValueError(
                    "Sharded weights come block by block, which cannot be compiled: leave out one of them."
                )
        say, merge = say or _say_nothing, LoraMerge(loras, files.backbone)
        for note in merge.notes:
            say(note)
        components = Components(
            files,
            device,
            dtype,
            say,
            keep_loaded,
            parallel=parallel,
            vae_dtype=vae_dtype,
            loras=merge,
            compile=compile,
            memory=memory,
            encoder_device=encoder,
            vae_device=vaes,
        )
        return cls(components, decoding)

    @property
    def timing(self) -> dict[str, float]:
        """Seconds of the latest clip: "loading" and "encoding" so far, and, once its first step is done, what that
        "step" took and how long after the call it was done ("first_step")."""
        return dict(self.components.clock.seconds)

    def __call__(
        self,
        prompt: str,
        *,
        callback: Callable[[int, int, torch.Tensor | None, torch.Tensor | None], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **request,
    ) -> Clip:
        """Make one clip, its frames in memory: :meth:`denoise`, which says what ``request`` can hold, and then
        :meth:`decode`."""
        latents = self.denoise(prompt, callback=callback, should_stop=should_stop, **request)
        return self.decode(latents, should_stop=should_stop)

    def denoise(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        width: int = 1280,
        height: int = 704,
        mode: str = "video+audio",
        image: torch.Tensor | str | os.PathLike | None = None,
        size_from_image: bool = True,
        image_scale: int = TRAINED_SCALE,
        voices: Sequence[Voice] = (),
        assignment: Sequence[int | None] | None = None,
        negative: str | None = None,
        seed: int = 0,
        steps: int = 50,
        shift: float = 5.0,
        preset: str | None = None,
        guidance: Guidance | Mapping[str, Any] | None = None,
        sound: Sound | None = None,
        sound_start: float = 0.0,
        sound_at: float = 0.0,
        sound_rest: str = "silence",
        frames: Frames | None = None,
        pictures: Mapping[float | str, torch.Tensor | str | os.PathLike] | None = None,
        shown: str = "clean",
        source: ClipLatents | None = None,
        retake: Retake | None = None,
        denoise: float = 1.0,
        callback: Callable[[int, int, torch.Tensor | None, torch.Tensor | None], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> ClipLatents:
        """What one clip is made of: all stages but the VAEs' decoding.

        ``prompt``: one dense paragraph with speech as ``<S>words<E>``; empty for the null the model was trained with.
        ``negative``: what to stay away from; None for the built-in Chinese terms that suit ``mode``, "zero" for the
        null; where the guidance has no use for it, it is not encoded. ``seconds``, ``width``, ``height`` and ``mode``
        as :class:`ClipGeometry` takes them; ``seconds`` None: 6, or as long as ``frames`` or ``sound``, up to 10.
        ``image``, (H, W, 3) in 0..1 or a file, becomes the first frame: scaled to cover the clip and centre-cropped,
        the clip taking the trained size nearest to its proportions unless ``size_from_image`` is off, at
        ``image_scale`` 960 or the smaller 640 and 512 (the side of a square of as many pixels). ``voices``:
        recordings (a file, or waveform and sample rate) or (1, 192) embeddings, bound to the spans by order, or as
        ``assignment`` says, with a voice's number, or None for the null voice, for each span. ``guidance`` None: the
        makers' scales, which are lower for picture text and timbre where there are both an image and a voice; a mapping
        has those of its fields that differ from them.
        ``preset`` "distilled" is for few-step checkpoints: four Euler steps on the conditional prediction alone, in
        place of ``steps``, ``shift``, the solver and the makers' scales.

        Given parts, which come out of the clip as they are: ``sound``, a file or (waveform (C, N), rate), from its
        second ``sound_start`` on at the clip's second ``sound_at``; where it ends early the rest is "silence" or
        "generated" (``sound_rest``). ``frames``, a video file or frames (F, H, W, 3) at 24 a second, are the clip's
        picture from its beginning on: where they are all of it, sound is made for them. ``pictures``: single ones by
        the second they stand at, "end" for the last frame; each is held for the four frames of a latent. ``source``:
        the latents of a finished clip, of whose size and length this one is, and ``retake`` what of it is made again.
        ``denoise`` below 1 is a second pass instead: from ``source``, or from ``frames``, as noisy as the last part of
        a schedule begins, with the sound given. ``shown``: whether given parts other than frame 0 are shown to the
        network "clean", or noised to the level of the rest ("matched noise").

        After each step ``callback(step, steps, x0_video, x0_audio)`` is called, step from 1, with the estimates in the
        network's space; ``should_stop`` is asked before each stage and each pass.

        Raises ValueError, in a sentence, for inputs that do not fit together, before anything large is loaded;
        Interrupted when ``should_stop`` says so; FloatingPointError where the network returns NaN or infinity.
        """
        stop, parts = should_stop or _never, self.components
        parts.clock.restart()
        given = Given(
            image, sound, sound_start, sound_at, sound_rest, frames, pictures or {}, shown, source, retake, denoise
        )
        given.check(mode)
        mode, run = given.mode(mode), None if preset is None else find_preset(preset)
        sigmas = flow_sigmas(steps, shift, denoise) if run is None else run.sigmas(denoise=denoise)
        stages.check_speaker_encoder(parts.files.speaker_encoder, voices)
        tokens, report = stages.tokenize(self._tokenizer, prompt, voices, assignment)
        given, geometry, ready = make_parts(given, seconds, width, height, mode, size_from_image, image_scale)
        warnings = [*geometry.warnings, *ready.notes, *([report] if tokens is not None and tokens.is_cut else [])]

        _check_stop(stop)
        timbres = stages.encode_voices(parts.files.speaker_encoder, voices, warnings)
        timbre, positions = (None, None) if tokens is None else timbre_inputs(tokens, timbres, assignment)
        if not isinstance(guidance, Guidance):
            usual = default_guidance(given.image is not None, timbre is not None) if run is None else run.guidance
            guidance = replace(usual, **(guidance or {}))
        levels, made = sigmas[:-1].tolist(), guidance.making(*ready.makes)
        if made.uses_text_null(levels, timbre is not None, geometry.has_video, geometry.has_audio):
            negative_tokens = stages.tokenize_negative(self._tokenizer, negative_text(negative, mode), warnings)
        else:
            negative_tokens = None
        for warning in warnings:
            parts.say(warning)
        stages.plan_clip(
            parts,
            geometry,
            made,
            levels,
            has_voice=timbre is not None,
            has_text=tokens is not None or negative_tokens is not None,
            frames=ready.most_frames,
            sound_steps=ready.sound_steps,
        )
        _check_stop(stop)
        context, null = stages.encode_text(parts, [tokens, negative_tokens])
        _check_stop(stop)
        start = encode_parts(parts, ready, geometry, lambda: _check_stop(stop))
        _check_stop(stop)
        video, audio = stages.denoise_clip(
            parts,
            geometry,
            seed,
            start,
            context=context,
            negative=null,
            timbre=timbre,
            timbre_positions=positions,
            sigmas=sigmas,
            sampler=FlowUniPC if run is None else run.solver,
            guidance=guidance,
            callback=callback,
            should_stop=should_stop,
        )
        settings = {
            "prompt": prompt,
            "negative": negative,
            "mode": mode,
            "seed": seed,
            "preset": preset,
            "steps": len(levels),
            "shift": shift if run is None else None,
            "guidance": asdict(guidance),
            **given.settings(),
        }
        return ClipLatents(
            video, audio, geometry.duration, report, tuple(warnings), settings, originals=ready.originals
        )

    def encode(
        self,
        frames: Frames,
        *,
        seconds: float | None = None,
        width: int = 1280,
        height: int = 704,
        size_from_image: bool = True,
        image_scale: int = TRAINED_SCALE,
        should_stop: Callable[[], bool] | None = None,
    ) -> ClipLatents:
        """The latents of a video file, with its sound where it has some, or of frames (F, H, W, 3): a ``source`` for
        :meth:`denoise`, of which all that is kept comes out as it is in the file.

        As long as the video where ``seconds`` is None, up to 10; the size as for :meth:`denoise`. ``warnings`` say what
        was changed of it. Raises ValueError, in a sentence, for what is no video.
        """
        parts, stop = self.components, should_stop or _never
        parts.clock.restart()
        size = video_size(size_from_image, width, height, image_scale)
        most = MOST_SECONDS if seconds is None else seconds
        video = read_frames(frames, most + 1, size)  # a clip of so many seconds has a frame more
        mode = MODES[2] if video.sound is None else MODES[0]
        geometry = given_geometry(Given(), video, seconds, width, height, mode, size_from_image, image_scale)
        ready = ready_source(video, geometry)
        for note in ready.notes:
            parts.say(note)
        parts.prepare(geometry, has_text=False, frames=ready.most_frames, sound_steps=ready.sound_steps)
        start = encode_parts(parts, ready, geometry, lambda: _check_stop(stop))
        return ClipLatents(start.video, start.audio, geometry.duration, warnings=ready.notes, originals=ready.originals)

    def make_long(
        self,
        path: str | os.PathLike,
        prompts: Sequence[str],
        *,
        seconds: float,
        **request,
    ) -> LongClip:
        """Make a clip of ``seconds`` in segments and write it to ``path``, an .mp4; each segment begins with the last
        frame of the one before. See :mod:`.segments` for how.

        ``prompts``: of the segments in their order, the last holding for the rest; voices are bound to speech spans
        counted through all of them. ``segment``: seconds of one at most, 10. ``hold``: whether the frame that a segment
        begins with is brought to the "colour" or the "colour and sharpness" of the first segment, or to "nothing".
        ``state``: the folder that what is finished is kept in, and with which a killed clip goes on, the same as if it
        had not been; None: one beside ``path`` until the clip is whole. ``anew``: what another clip left in it goes.
        ``sound`` goes on through all segments. Segment k has the seed ``seed`` + k. All else as for :meth:`denoise`.

        Raises StateError where the folder holds the state of another clip, ValueError for what does not go together,
        Interrupted when ``should_stop`` says so.
        """
        return make_long(self, path, prompts, seconds=seconds, **request)

    def extend(
        self, path: str | os.PathLike, source: Source, prompts: Sequence[str], *, seconds: float, **request
    ) -> LongClip:
        """Let a finished clip go on for ``seconds`` more and write the whole to ``path``; as :meth:`make_long`, of the
        source's size and with sound where the source has some. ``source``: latents, or their file, which are decoded
        without a loss; or a video file, which is brought to 24 frames a second and, as a first frame, to a size."""
        sizes = ("width", "height", "size_from_image", "image_scale")
        given = {name: request.pop(name) for name in sizes if name in request}
        first = beginning(self, source, should_stop=request.get("should_stop"), **given)
        request["mode"] = MODES[2] if first.sound is None else MODES[0]
        if first.sound is None and request.get("sound") is not None:
            raise ValueError(
                "The clip that is to go on has no sound, so the longer one has none either: leave the given sound out, "
                "or have sound made for the clip first."
            )
        return make_long(self, path, prompts, seconds=seconds, first=first, **request)

    def retake(self, source: Source, prompt: str, span: Retake, **request) -> ClipLatents:
        """A finished clip with a span of it made again. ``source`` as for :meth:`extend`; what is kept of it comes out
        as it is there, frame by frame and sample by sample. ``request`` as for :meth:`denoise`."""
        return retake(self, source, prompt, span, **request)

    def refine(
        self, source: Source, prompt: str, *, denoise: float, size: tuple[int, int] | None = None, **request
    ) -> ClipLatents:
        """A second pass over a finished clip's picture, ``source`` as for :meth:`extend`, its sound being given. At
        another ``size`` (width, height) its frames are scaled first. ``request`` as for :meth:`denoise`."""
        return refine(self, source, prompt, denoise=denoise, size=size, **request)


def _step(callback: Callable[[int, int], None] | None, should_stop: Callable[[], bool] | None):
    """What is called after each pass of the decoder."""

    def step(done: int, total: int) -> None:
        _check_stop(should_stop or _never)
        if callback is not None:
            callback(done, total)

    return step


def _check_stop(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Interrupted("The run was interrupted.")


def _never() -> bool:
    return False


def _say_nothing(_: str) -> None:
    pass
