"""What a clip goes through up to its latents: inputs made ready, encode and denoise, functions over the components."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backbone import NavaBackbone
from ..checkpoint import describe_file
from ..components import AudioVAE, TextEncoder, VideoVAE, denormalize_video, normalize_video
from ..components.weights import need
from ..geometry import (
    AUDIO_BINS,
    AUDIO_CHANNELS,
    TRAINED_SCALE,
    VIDEO_CHANNELS,
    ClipGeometry,
    audio_latent_to_tokens,
    audio_tokens_to_latent,
    choose_bucket,
    cover_crop,
)
from ..given import is_given
from ..media import read_audio, read_image
from ..prompt import PromptTokenizer, TokenizedPrompt, bind_voices
from ..sampling import Guidance, denoise
from ..timbre import check_voice, encode_timbre, load_redimnet
from ..voices import SavedVoice, check_one_encoder, open_voice, voice_of
from .memory import Components

Voice = str | os.PathLike | torch.Tensor | SavedVoice | tuple[torch.Tensor, int]

BATCH_TOKENS = 8192  # up to here a GPU is faster with several predictions in one pass
VOICE_SECONDS = 600.0  # read of a recording; the encoder takes 30 s of it

# ---------------------------------------------------------------- inputs


def default_guidance(has_image: bool, has_voice: bool) -> Guidance:
    """The makers' guidance scales: with an image and a voice, 2 for the picture's text and for timbre instead of 3."""
    return Guidance(video_text=2.0, audio_timbre=2.0) if has_image and has_voice else Guidance()


def clip_geometry(
    seconds: float,
    width: int,
    height: int,
    mode: str,
    picture: torch.Tensor | None,
    size_from_image: bool,
    image_scale: int = TRAINED_SCALE,
) -> ClipGeometry:
    """The clip's geometry, for a first frame (H, W, 3) in the bucket nearest to its proportions if so wished.

    Raises ValueError as :class:`ClipGeometry` does, for an ``image_scale`` that there are no buckets of, and for a
    first frame of a clip without picture.
    """
    if picture is None:
        return ClipGeometry(seconds, width, height, mode)
    if mode == "audio":
        raise ValueError("A first frame was given for a clip of sound alone: leave it out, or choose another mode.")
    if size_from_image:
        width, height = choose_bucket(picture.shape[1], picture.shape[0], image_scale)
    return ClipGeometry(seconds, width, height, mode)


def clip_noise(geometry: ClipGeometry, seed: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Noise of a clip's (video (1, 48, T, H, W), audio (1, 8, L, 16)) latents, fp32 on the CPU, None for an absent one.

    Both come from one generator, video first, as ComfyUI draws them for a clip's nested latent; there an absent picture
    is one value a channel, and draws its noise too.
    """
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(1, *(geometry.latent_shape or (VIDEO_CHANNELS, 1, 1, 1)), generator=generator)
    audio = torch.randn(1, *(geometry.audio_shape or (AUDIO_CHANNELS, 1, AUDIO_BINS)), generator=generator)
    return video if geometry.has_video else None, audio if geometry.has_audio else None


def fit_picture(picture: torch.Tensor, geometry: ClipGeometry) -> torch.Tensor:
    """A picture (H, W, 3) in 0..1 -> (1, height, width, 3): scaled to cover the clip's size (Lanczos), then cropped."""
    image = need("PIL.Image", "A first frame")
    numpy = need("numpy", "A first frame")
    scaled, box = cover_crop(picture.shape[1], picture.shape[0], geometry.width, geometry.height)
    levels = (picture.float() * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
    fitted = image.fromarray(levels).resize(scaled, image.Resampling.LANCZOS).crop(box)
    return torch.from_numpy(numpy.asarray(fitted).astype("float32") / 255)[None]


def read_picture(image: torch.Tensor | str | os.PathLike) -> torch.Tensor:
    """(H, W, 3) fp32 in 0..1 from a file or a tensor."""
    if not torch.is_tensor(image):
        return read_image(image)
    picture = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if picture.ndim != 3 or picture.shape[-1] not in (3, 4) or not picture.is_floating_point():
        raise ValueError(
            f"A first frame is (height, width, 3) floats in 0..1; got {tuple(image.shape)} of {image.dtype}."
        )
    return picture[..., :3].float()


# ---------------------------------------------------------------- stages


def tokenize(
    tokenizer: PromptTokenizer, prompt: str, voices: Sequence[Voice], assignment: Sequence[int | None] | None
) -> tuple[TokenizedPrompt | None, str]:
    """The prompt's tokens, None for an empty one, and the report; voices are checked against the spans."""
    if not prompt.strip():
        if voices:
            raise ValueError("Voices were given but the prompt is empty: write the words to be said as <S>words<E>.")
        return None, "Empty: the null the model was trained with."
    tokens = tokenizer(prompt)
    return tokens, tokens.report(bind_voices(tokens.spans, voices, assignment))


def tokenize_negative(tokenizer: PromptTokenizer, negative: str, warnings: list[str]) -> TokenizedPrompt | None:
    """The negative's tokens, None for the null; that some were cut is added to ``warnings``."""
    if not negative:
        return None
    tokens = tokenizer(negative)
    if tokens.is_cut:
        over = tokens.total_tokens - tokens.max_length
        warnings.append(f"The negative is longer than {tokens.max_length} tokens: its last {over} were cut.")
    return tokens


def check_speaker_encoder(path: Path | None, voices: Sequence[Voice]) -> None:
    """Raise ValueError where a voice is a recording and there is nothing to encode it with."""
    if path is None and any(_is_recording(_opened(voice)) for voice in voices):
        raise ValueError(
            "A reference voice needs the speaker encoder: give M-vb2+vox2+cnc-ft_mix.pt as speaker_encoder."
        )


def encode_voices(speaker_encoder: Path | None, voices: Sequence[Voice], warnings: list[str]) -> list[torch.Tensor]:
    """(1, 192) for each voice; what weakens one is added to ``warnings``. Small, so it runs on the CPU.

    Saved voices are checked against the speaker encoder where there is one, else against each other: raises
    VoiceError, in a sentence, for one of another encoder.
    """
    voices = [_opened(voice) for voice in voices]
    saved = [voice for voice in voices if isinstance(voice, SavedVoice)]
    check_one_encoder(saved)
    encoder = None
    if speaker_encoder is not None and (saved or any(_is_recording(voice) for voice in voices)):
        encoder = load_redimnet(speaker_encoder)
        for voice in saved[:1]:
            voice.check_encoder(encoder)
    timbres = []
    for number, voice in enumerate(voices, start=1):
        if not _is_recording(voice):
            timbres.append(voice.timbre if isinstance(voice, SavedVoice) else voice)
            continue
        waveform, rate = voice if isinstance(voice, tuple) else read_audio(voice, VOICE_SECONDS)
        timbres.append(encode_timbre(encoder, waveform, rate))
        warnings += [f"Voice {number}: {sentence}" for sentence in check_voice(waveform, rate)]
    return timbres


def plan_clip(
    components: Components,
    geometry: ClipGeometry,
    guidance: Guidance,
    levels: Sequence[float],
    *,
    has_voice: bool,
    has_text: bool,
    frames: int = 0,
    sound_steps: int = 0,
) -> None:
    """Decide where the components work for a clip, before any is loaded; ``levels``: the noise levels of its steps,
    ``frames``, ``sound_steps``: the most frames that are encoded at a time, and audio latents.

    Raises ValueError where it cannot be made within the memory that was allowed.
    """
    needed = [guidance.needed(sigma, has_voice, geometry.has_video, geometry.has_audio) for sigma in levels]
    # The prediction without interaction, m, is a pass of its own; compiled blocks are of one number of samples.
    alone = geometry.tokens > BATCH_TOKENS or components.compile
    together = 1 if alone else max(sum(name != "m" for name in names) for names in needed)
    components.prepare(geometry, together=together, has_text=has_text, frames=frames, sound_steps=sound_steps)


def encode_text(
    components: Components, prompts: Sequence[TokenizedPrompt | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Context (1, n, d) of the prompt and of the negative; None stands for the all-zero context."""
    if all(tokens is None for tokens in prompts):
        return torch.zeros(1, 1, _text_width(components)), None

    def encode(encoder: TextEncoder) -> list[torch.Tensor | None]:
        components.say("Encoding the prompt.")
        components.make_room(encoder.encode_bytes(max(len(tokens.ids) for tokens in prompts if tokens is not None)))
        with components.clock.measure("encoding"):
            return [None if tokens is None else encoder.encode(tokens.ids) for tokens in prompts]

    context, negative = components.attempt(encode, "text_encoder")
    return torch.zeros_like(negative[:, :1]) if context is None else context, negative


def encode_frames(
    components: Components, clips: Sequence[torch.Tensor], check_stop: Callable[[], None] | None = None
) -> list[torch.Tensor]:
    """The latents (1, 48, t, H, W) of ``clips``, each (f, height, width, 3) in 0..1 or of 8 bits; ``check_stop`` is
    asked before each."""

    def encode(vae: VideoVAE) -> list[torch.Tensor]:
        latents = []
        for frames in clips:
            if check_stop is not None:
                check_stop()
            what = "the first frame" if len(frames) == 1 else f"{len(frames)} frames"
            components.say(f"Encoding {what}.")
            components.make_room(components.frames_bytes(tuple(frames.shape)))
            with components.clock.measure("encoding"):
                latents.append(vae.encode(frames.float() / 255 if frames.dtype is torch.uint8 else frames))
        return latents

    return components.attempt(encode, "video_vae", components.plan.first_frame)


def encode_sound(components: Components, waveform: torch.Tensor, rate: int, steps: int) -> torch.Tensor:
    """A waveform (C, N) at ``rate`` -> the audio latent (1, 8, steps, 16)."""

    def encode(vae: AudioVAE) -> torch.Tensor:
        components.say("Encoding the sound.")
        components.make_room(vae.encode_bytes(steps))
        with components.clock.measure("encoding"):
            return vae.encode(waveform, rate, steps)

    return components.attempt(encode, "audio_vae", components.plan.sound)


@dataclass(frozen=True)
class Start:
    """What denoising starts from, in the VAEs' spaces on the CPU, and which of it is given.

    ``video`` (1, 48, T, H, W) with ``video_mask`` (1, 1, T, H, W), ``audio`` (1, 8, L, 16) with ``audio_mask``
    (1, L, 1): as :func:`denoise` takes masks. None where nothing is given of that part.
    """

    video: torch.Tensor | None = None
    video_mask: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    audio_mask: torch.Tensor | None = None

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Those of :func:`denoise`, in the network's spaces."""
        found = {}
        if self.video is not None:
            found |= {"video_latent": normalize_video(self.video), "video_mask": self.video_mask}
        if self.audio is not None:
            found |= {"audio_latent": audio_latent_to_tokens(self.audio), "audio_mask": self.audio_mask}
        return {name: tensor.to(device) for name, tensor in found.items()}

    def put_back(
        self, video: torch.Tensor | None, audio: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The finished latents with the given ones exactly, not up to the rounding of there and back."""
        if self.video is not None:
            video = torch.where(is_given(self.video_mask), self.video, video)
        if self.audio is not None:
            audio = torch.where(is_given(self.audio_mask)[:, None], self.audio, audio)
        return video, audio


def denoise_clip(
    components: Components, geometry: ClipGeometry, seed: int, start: Start, **settings
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(video latent, audio latent) in the VAEs' spaces on the CPU, None for an absent one; ``settings`` as
    :func:`denoise` takes them."""
    device = components.device
    noise = [None if part is None else part.to(device) for part in clip_noise(geometry, seed)]
    inputs = {name: settings.pop(name) for name in ("context", "negative", "timbre", "timbre_positions")}
    callback = settings.pop("callback", None)

    def work(backbone: NavaBackbone) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        components.say(f"Denoising {geometry.tokens:,} tokens in {len(settings['sigmas']) - 1} steps.")
        begun = time.monotonic()

        def stepped(step: int, *rest) -> None:
            if step == 1:
                components.say(components.clock.first_step(begun))
            if callback is not None:
                callback(step, *rest)

        return denoise(
            backbone,
            noise[0],
            None if noise[1] is None else audio_latent_to_tokens(noise[1]),
            batch_predictions=components.plan.batched and geometry.tokens <= BATCH_TOKENS,
            callback=stepped,
            on_out_of_memory=lambda: components.shrink(backbone),
            **_on_device(inputs, device, backbone.dtype),
            **start.arguments(device),
            **settings,
        )

    video, tokens = components.attempt(work, "backbone")
    video = None if video is None else denormalize_video(video).cpu()
    return start.put_back(video, None if tokens is None else audio_tokens_to_latent(tokens).cpu())


def _on_device(
    inputs: Mapping[str, torch.Tensor | None], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor | None]:
    """The conditions where and as the backbone computes; positions stay whole numbers."""
    return {
        name: None if tensor is None else tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def _text_width(components: Components) -> int:
    return describe_file(components.files.backbone).model_tensors["text_embedding.0.weight"].shape[1]


def _opened(voice: Voice) -> Voice:
    """A voice that was saved, or made by one's own encoder, as such; others as they are."""
    if isinstance(voice, (str, os.PathLike)):
        return open_voice(voice) or voice
    return voice_of(voice) or voice if torch.is_tensor(voice) else voice


def _is_recording(voice: Voice) -> bool:
    return not torch.is_tensor(voice) and not isinstance(voice, SavedVoice)
