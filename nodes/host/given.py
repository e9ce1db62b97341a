"""Given parts of a LATENT: sound, pictures, and all but a span of a finished clip.

Each function takes a LATENT and gives one back with more of it given: its latents in the samples, where they stand in
the noise mask, and what comes out as it is among the originals. What was given before stays, whatever came first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ...nava_core.geometry import AUDIO_LATENTS_PER_SECOND, FPS, PIXELS_PER_LATENT, cover_crop, frames_of_latents
from ...nava_core.given import (
    CLEAN,
    SHOWN,
    GivenSound,
    Originals,
    chosen,
    fit_frames,
    fit_sound,
    frames_touching,
    is_given,
    place_pictures,
    resample_indices,
    steps_touching,
)
from ...nava_core.given.frames import kept_as
from ...nava_core.media import fit_length
from .audio_vae import encode_audio
from .latents import all_parts, audio_part, clip_length, clip_masks, clip_parts, video_part, with_parts
from .originals import originals_of, with_originals
from .video_vae import encode_video

EVERYTHING = "All of this clip is given now: let NAVA Retake open a span of it, or there is nothing to make."
Report = str


# ---------------------------------------------------------------- sound


def give_sound(latent: dict, audio: Mapping | None, audio_vae, shown: str, **part) -> tuple[dict, dict, Report]:
    """(LATENT with the recording as its sound, AUDIO as it is in the clip and as long, sentences).

    ``part``: start, at, duration, rest, is_track, as :func:`fit_sound` takes them; all clips of a batch get the same.
    Raises ValueError for a LATENT or an AUDIO without sound, several recordings, and as fit_sound does.
    """
    steps = audio_part(latent).shape[2]
    sound = fit_sound(*recording(audio, "given sound"), clip_length(latent), **part)
    encoded = _encode_sound(audio_vae, sound, steps)
    values = sound.steps(steps, shown)
    parts, masks, earlier = all_parts(latent), clip_masks(latent), originals_of(latent)
    where = is_given(values)
    parts[-1] = parts[-1].clone()
    parts[-1][:, :, where] = encoded[:, :, where].to(parts[-1])
    masks[-1][:, :, where] = values[where, None]
    originals = (earlier or Originals()).merged(Originals.of_sound(sound))
    result = with_originals(with_parts(latent, parts, masks), originals)
    waveform = {"waveform": sound.waveform[None], "sample_rate": sound.sample_rate}
    return result, waveform, " ".join([_what_sound(sound), *sound.notes, *_all_given(masks, result)])


def recording(audio: Mapping | None, what: str) -> tuple[torch.Tensor, int]:
    """(waveform (C, N), rate) of an AUDIO; ValueError in a sentence for none and for several."""
    if audio is None:
        raise ValueError(f"There is no {what}: the AUDIO is empty, as of a video without sound; connect a recording.")
    waveform = audio["waveform"]
    if waveform.ndim != 3 or waveform.shape[0] != 1:
        raise ValueError(
            f"The {what} is a batch of {waveform.shape[0]} recordings: pick one with a stock batch node; all clips of "
            "a batch get the same."
        )
    return waveform[0].float().cpu(), int(audio["sample_rate"])


def _encode_sound(audio_vae, sound: GivenSound, steps: int) -> torch.Tensor:
    """(1, 8, steps, 16); where there are more steps than the clip is long, they are of silence."""
    waveform, rate = sound.to_encode()
    if waveform.shape[1] * AUDIO_LATENTS_PER_SECOND < (steps - 1) * rate:
        waveform = fit_length(waveform, math.ceil(steps * rate / AUDIO_LATENTS_PER_SECOND))
    return encode_audio(audio_vae, {"waveform": waveform[None], "sample_rate": rate})[:, :, :steps]


def _what_sound(sound: GivenSound) -> str:
    if sound.is_whole:
        return f"All {sound.seconds:.2f} s of the sound are given, at {sound.sample_rate} Hz."
    spans = " and ".join(f"{begin:.2f} to {end:.2f} s" for begin, end in sound.spans)
    return f"The sound is given from {spans}, at {sound.sample_rate} Hz."


# ---------------------------------------------------------------- pictures


def give_frames(
    latent: dict, images: torch.Tensor, vae, at: float | None, fps: float, shown: str, *, keep: bool
) -> tuple[dict, torch.Tensor, Report]:
    """(LATENT with pictures in it, the pictures as they are in the clip (n, H, W, 3), sentences).

    ``images`` (F, h, w, C) follow one another at ``fps``, the first ``at`` s into the clip, or where that is None the
    last of them at its end. They stay as they are, unless ``keep`` is false: then they are what the clip starts from.
    All clips of a batch get the same. Raises ValueError for an audio-only LATENT and a time beyond its end.
    """
    video = video_part(latent)
    frames = frames_of_latents(video.shape[2])
    numbers, notes = _at_clip_rate(len(images), fps)
    first = _first_frame(at, len(numbers), frames)
    if at is None and len(numbers) > frames:
        notes.append(f"The clip has {frames} frames: of {len(numbers)} pictures the last ones are taken.")
        numbers = numbers[-frames:]
    stretch = place_pictures(len(numbers), first, frames)
    used = sorted(set(stretch.to_encode))
    size = (video.shape[4] * PIXELS_PER_LATENT, video.shape[3] * PIXELS_PER_LATENT)
    fitted = fit_frames(chosen(images[..., :3], [numbers[number] for number in used]), *size)
    place = {number: index for index, number in enumerate(used)}
    encoded = stretch.taken(encode_video(vae, chosen(fitted, [place[number] for number in stretch.to_encode])))
    pictures = chosen(fitted, [place[number] for number in stretch.pictures])

    parts, masks, originals = all_parts(latent), clip_masks(latent), originals_of(latent)
    parts[0] = video.clone()
    parts[0][:, :, stretch.latents] = encoded.to(video)
    masks[0][:, :, stretch.latents] = SHOWN[shown] if keep else 1.0
    _clean_first_frame(masks[0])
    if keep and not stretch.is_held and len(pictures) > 1:  # a single one comes through the VAE, to go with the others
        originals = (originals or Originals()).merged(_given_frames(pictures, stretch.frames, frames))
    unmasked = not keep and latent.get("noise_mask") is None
    result = with_originals(with_parts(latent, parts, None if unmasked else masks), originals)
    notes = [_scaled(images.shape, size), *notes, *stretch.notes]
    return result, pictures, " ".join([_what_frames(stretch.frames, frames, keep), *notes, *_all_given(masks, result)])


def _clean_first_frame(mask: torch.Tensor) -> None:
    """A given frame 0 is always shown clean, as in training; ``mask`` (B, 1, T, H, W)."""
    if bool(is_given(mask[:, :, 0]).all()):
        mask[:, :, 0] = CLEAN


def _at_clip_rate(count: int, fps: float) -> tuple[list[int], list[str]]:
    """Which of the pictures are frames of the clip, and a sentence where its rate is another."""
    if count == 1 or fps == FPS:
        return list(range(count)), []
    numbers = resample_indices(count, fps)
    return numbers, [f"{count} pictures at {fps:g} frames a second are {len(numbers)} at {FPS}."]


def _first_frame(at: float | None, count: int, frames: int) -> int:
    return max(0, frames - count) if at is None else math.floor(at * FPS + 0.5)


def _given_frames(pictures: torch.Tensor, where: slice, frames: int) -> Originals:
    """Originals of a clip of ``frames`` that has these; the memory of the others is never touched."""
    if len(pictures) == frames:
        return Originals().with_frames(pictures.cpu())
    pictures = kept_as(pictures)
    clip = torch.zeros(frames, *pictures.shape[1:], dtype=pictures.dtype)
    clip[where] = pictures.cpu()
    kept = torch.zeros(frames, dtype=torch.bool)
    kept[where] = True
    return Originals().with_frames(clip, kept)


def _what_frames(where: slice, frames: int, keep: bool) -> str:
    what = "given" if keep else "what the clip starts from"
    if where == slice(0, frames):
        return f"All {frames} frames are {what}."
    if where.stop - where.start == 1:
        return f"Frame {where.start} of {frames} is {what}."
    return f"Frames {where.start} to {where.stop - 1} of {frames}, {_seconds(where)}, are {what}."


def _seconds(frames: slice) -> str:
    return f"{frames.start / FPS:.2f} to {frames.stop / FPS:.2f} s"


def _scaled(shape, size: tuple[int, int]) -> str:
    """A sentence on how pictures (F, height, width, C) were fitted to ``size``, width by height."""
    height, width = shape[1:3]
    if (width, height) == size:
        return f"The pictures have the clip's size, {width}x{height}."
    scaled, _ = cover_crop(width, height, *size)
    cut = " and cropped" if scaled != size else ""
    return f"The pictures were scaled from {width}x{height} to {scaled[0]}x{scaled[1]}{cut}: the clip is {_by(size)}."


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _all_given(masks: list[torch.Tensor], latent: dict) -> list[str]:
    """A sentence where nothing of the clip is left to make."""
    present = [part is not None for part in clip_parts(latent)]
    present = present if len(masks) == 2 else [any(present)]
    made = [bool((~is_given(mask)).any()) for mask, there in zip(masks, present, strict=True) if there]
    return [] if any(made) else [EVERYTHING]


# ---------------------------------------------------------------- a span made again


def retake(
    latent: dict,
    span: tuple[float, float],
    parts: tuple[bool, bool],
    shown: str,
    mask: torch.Tensor | None = None,
    frames: torch.Tensor | None = None,
    audio: Mapping | None = None,
) -> tuple[dict, Report]:
    """(LATENT of a finished clip with the seconds ``span`` to make again, sentences).

    ``parts``: whether its picture and its sound are. ``mask`` (1 or F, h, w) is 1 where the picture is, fitted to it;
    ``frames`` (F, H, W, 3) and ``audio`` are what was decoded of the clip, to come out as they are where they stay, as
    do originals that the LATENT has. Raises ValueError where the LATENT is empty, nothing lies in the span, or frames
    or sound are not this clip's.
    """
    clip = clip_parts(latent)
    picture, sound = _wanted(latent, clip, parts)
    begin, end = _checked_span(span, clip_length(latent))
    masks = [torch.full_like(each, SHOWN[shown]) for each in clip_masks(latent)]
    notes = _made_anew(clip, masks)
    originals = _decoded(latent, frames, audio)
    if picture:
        made = frames_touching(begin, end, clip[0].shape[2])
        notes.insert(0, _open_picture(masks[0], made, mask))
    if clip[0] is not None:
        _clean_first_frame(masks[0])
    if sound:
        made = steps_touching(begin, end, clip[1].shape[2])
        masks[-1][:, :, made] = 1.0
        first, last = made.start / AUDIO_LATENTS_PER_SECOND, made.stop / AUDIO_LATENTS_PER_SECOND
        notes.insert(int(picture), f"The sound from {first:.2f} to {last:.2f} s is made again.")
        kept = [(0.0, first), (last, math.inf)]
        originals = originals and originals.within(keep_sound_spans=kept)
    result = with_originals(with_parts(latent, all_parts(latent), masks), originals)
    return result, " ".join(notes)


def _wanted(latent: dict, clip: list, parts: tuple[bool, bool]) -> tuple[bool, bool]:
    """Of picture and sound, what there is of what is to be made again."""
    if not any(part is not None and bool(torch.count_nonzero(part)) for part in clip):
        raise ValueError("This latent is empty: a retake needs a finished clip, so connect the output of NAVA Sampler.")
    picture, sound = (wanted and part is not None for wanted, part in zip(parts, clip, strict=True))
    if not picture and not sound:
        video_part(latent) if parts[0] else audio_part(latent)  # say what it has not
    return picture, sound


def _checked_span(span: tuple[float, float], seconds: float) -> tuple[float, float]:
    begin, end = span
    if not begin < end:
        raise ValueError(f"The span from {begin:g} to {end:g} s is empty: let it end after it starts.")
    if begin >= seconds:
        raise ValueError(f"The clip is {seconds:.2f} s long: a span from {begin:g} s is past its end.")
    return begin, min(end, seconds)


def _made_anew(clip: list, masks: list[torch.Tensor]) -> list[str]:
    """Opens a picture or sound that has no content: there is nothing to keep of it. Sentences."""
    notes = []
    for name, part, number in zip(("picture", "sound"), clip, (0, -1), strict=True):
        if part is not None and not torch.count_nonzero(part):
            masks[number][:] = 1.0
            notes.append(f"The clip's {name} is empty and is made from beginning to end.")
    return notes


def _open_picture(mask: torch.Tensor, made: slice, region: torch.Tensor | None) -> str:
    """Marks the latent frames ``made`` of ``mask`` (B, 1, T, H, W), or a region of them; a sentence."""
    frames = slice(max(0, 4 * made.start - 3), frames_of_latents(made.stop))
    what = f"Frames {frames.start} to {frames.stop - 1}, {_seconds(frames)}, are made again"
    if region is None:
        mask[:, :, made] = 1.0
        return f"{what}."
    opened = _latent_region(region, mask.shape[2:])[made]
    if not bool(opened.any()):
        raise ValueError("The mask is black in the whole span, so that nothing would be made: paint what is to be.")
    mask[:, :, made] = torch.where(opened, torch.ones(()), mask[:, :, made])
    return f"{what} in {float(opened.float().mean()):.0%} of the picture."


def _latent_region(region: torch.Tensor, shape) -> torch.Tensor:
    """A MASK (1 or F, h, w), fitted to the clip's size -> (T, H, W) bool: the latents of which any is above a half."""
    latents, height, width = shape
    region = region[None] if region.ndim == 2 else region
    frames = frames_of_latents(latents)
    if len(region) not in (1, frames):
        raise ValueError(f"{len(region)} masks were given for a clip of {frames} frames: give one, or one for each.")
    white = torch.nn.functional.adaptive_max_pool2d(region.float()[:, None], (height, width))[:, 0] > 0.5
    if len(white) == 1:
        return white.expand(latents, -1, -1)
    later = white[1:].reshape(latents - 1, 4, height, width).any(dim=1)
    return torch.cat([white[:1], later])


def _decoded(latent: dict, frames: torch.Tensor | None, audio: Mapping | None) -> Originals | None:
    """The LATENT's originals, with a decoded clip's frames and sound in place of those."""
    originals = originals_of(latent)
    if frames is None and audio is None:
        return originals
    batch = all_parts(latent)[0].shape[0]
    if batch > 1:
        raise ValueError(
            f"Decoded frames or sound of one clip cannot stay in {batch}: retake one clip of the batch, or leave them "
            "unconnected."
        )
    decoded = Originals()
    if frames is not None:
        decoded = decoded.with_frames(_frames_of_clip(frames, video_part(latent)).cpu())
    if audio is not None:
        audio_part(latent)
        decoded = decoded.with_sound(*_sound_of_clip(audio, clip_length(latent)))
    return decoded if originals is None else originals.merged(decoded)


def _frames_of_clip(frames: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    _, _, latents, height, width = video.shape
    expected = (frames_of_latents(latents), height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT)
    if tuple(frames.shape[:3]) != expected:
        count, rows, columns = frames.shape[:3]
        raise ValueError(
            f"These are {count} frames of {columns}x{rows}, but the clip has {expected[0]} of "
            f"{expected[2]}x{expected[1]}: connect the frames that were decoded of this latent."
        )
    return frames[..., :3]


def _sound_of_clip(audio: Mapping, seconds: float) -> tuple[torch.Tensor, int]:
    waveform, rate = recording(audio, "decoded sound")
    if abs(waveform.shape[1] / rate - seconds) > 1 / FPS:
        raise ValueError(
            f"This sound is {waveform.shape[1] / rate:.2f} s long and the clip {seconds:.2f} s: connect the sound that "
            "was decoded of this latent."
        )
    return fit_length(waveform, round(seconds * rate)), rate
