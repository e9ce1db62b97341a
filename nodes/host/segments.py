"""Longer clips in segments: how the next one begins, and both as one clip."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...nava_core.geometry import FPS, PIXELS_PER_LATENT, frames_of_latents
from ...nava_core.given import (
    CLEAN,
    HOLDS,
    Originals,
    Statistics,
    fit_frames,
    fit_sound,
    hold_statistics,
    is_given,
    join_sound,
    seam,
)
from ...nava_core.media import fit_length
from ...nava_core.timbre.resample import resample
from ...nava_core.video_files import to_levels
from .given import give_sound, recording
from .latents import all_parts, audio_part, clip_length, clip_masks, video_part, with_parts
from .video_vae import encode_video


def continue_clip(
    frames: torch.Tensor,
    latent: dict,
    vae,
    hold: str,
    *,
    soundtrack: Mapping | None = None,
    start: float = 0.0,
    audio_vae=None,
    rest: str = "silence",
) -> tuple[dict, torch.Tensor, str]:
    """(LATENT of the next segment, its first frame (1, H, W, 3), sentences) after the clip ``frames`` (F, h, w, C).

    ``latent`` is of an empty clip; its frame 0 becomes the last of ``frames``, in the 256 levels that a file keeps,
    with what is to ``hold`` brought back to what the clip's first segment had, taken to be as long as the next. Of
    ``soundtrack``, in which the whole clip begins at ``start`` s, the segment gets its time; what that does not reach
    is ``rest``. Raises ValueError where the latent has content, or begins with a picture already.
    """
    video = video_part(latent)
    if soundtrack is not None:
        audio_part(latent)
    _refuse_content(latent)
    size = (video.shape[4] * PIXELS_PER_LATENT, video.shape[3] * PIXELS_PER_LATENT)
    first = next_first_frame(frames, hold, size, frames_of_latents(video.shape[2]))
    parts, masks = all_parts(latent), clip_masks(latent)
    parts[0] = video.clone()
    parts[0][:, :, :1] = encode_video(vae, first).to(video)
    masks[0][:, :, 0] = CLEAN
    result = with_parts(latent, parts, masks)
    begins, added = (len(frames) - 1) / FPS, frames_of_latents(video.shape[2]) - 1
    notes = [
        f"The segment begins with frame {len(frames) - 1} of the clip so far, at {begins:.2f} s, and adds {added} "
        f"frames, {added / FPS:.2f} s."
    ]
    if soundtrack is not None:
        result, said = _with_soundtrack(result, soundtrack, audio_vae, start + begins, rest)
        notes.append(said)
    return result, first, " ".join(notes)


def next_first_frame(frames: torch.Tensor, hold: str, size: tuple[int, int], segment: int) -> torch.Tensor:
    """(1, H, W, 3) in steps of 1/255: the last of ``frames``, fitted to ``size``, with what is to ``hold`` as in the
    first ``segment`` frames."""
    last = fit_frames(frames[-1:, ..., :3].float(), *size)
    if hold != HOLDS[0]:
        beginning = frames[: min(segment, len(frames)) : FPS, ..., :3]
        last = hold_statistics(to_levels(last[0]), Statistics.of(to_levels(beginning)), hold)[None]
    return to_levels(last.float() / 255 if last.dtype == torch.uint8 else last).float() / 255


def _refuse_content(latent: dict) -> None:
    masks = clip_masks(latent)
    for part, mask in zip(all_parts(latent), masks, strict=True):
        if bool(torch.count_nonzero(part * ~is_given(mask).to(part.device))):
            raise ValueError(
                "This latent has content: a segment begins with the last frame as a picture, for the VAE packs the "
                "first frame of a clip alone and later ones by four, so that latents of the clip so far cannot stand "
                "there. Connect NAVA Empty Latent."
            )
    if bool(is_given(masks[0][:, :, 0]).any()):
        raise ValueError(
            "This latent begins with a picture already, which would be lost: leave NAVA First Frame out, or this node."
        )


def _with_soundtrack(latent: dict, soundtrack: Mapping, audio_vae, start: float, rest: str) -> tuple[dict, str]:
    if audio_vae is None:
        raise ValueError("A soundtrack needs the audio VAE: connect NAVA Load Audio VAE to audio_vae.")
    waveform, rate = recording(soundtrack, "soundtrack")
    missing = clip_length(latent) - (waveform.shape[1] / rate - start)
    if missing >= clip_length(latent):
        if rest != "silence":
            return latent, f"The soundtrack ends before {start:.2f} s: the segment's sound is made."
        raise ValueError(
            f"The soundtrack ends at {waveform.shape[1] / rate:.2f} s, before this segment begins at {start:.2f} s: "
            "leave it out, or set rest to generated."
        )
    result, _, said = give_sound(latent, soundtrack, audio_vae, "clean", start=start, rest=rest, is_track=True)
    return result, said


# ---------------------------------------------------------------- both as one


def join_clips(
    frames: torch.Tensor,
    next_frames: torch.Tensor,
    audio: Mapping | None = None,
    next_audio: Mapping | None = None,
    *,
    soundtrack: Mapping | None = None,
    start: float = 0.0,
) -> tuple[torch.Tensor, dict | None, str]:
    """(frames, AUDIO or None, sentences) of a clip and its next segment, whose first frame is the clip's last.

    The sound is exactly as long as the frames: the two faded over within that frame's time, or of ``soundtrack``, in
    which the clip begins at ``start`` s, the samples themselves. Where it ends before the clip does, the two sounds go
    on. Raises ValueError for pictures of two sizes, a single frame, and one sound without the other.
    """
    if frames.shape[1:] != next_frames.shape[1:]:
        (height, width), (tall, wide) = frames.shape[1:3], next_frames.shape[1:3]
        raise ValueError(
            f"The clip is {width}x{height} and the next segment {wide}x{tall}: make the segment in the clip's size."
        )
    if len(next_frames) < 2:
        raise ValueError("The next segment has a single frame, which the clip has already: make it longer.")
    joined = torch.cat([frames, next_frames[1:].to(frames)])
    seconds = len(joined) / FPS
    sound, notes = _joined_sound(audio, next_audio, len(frames), len(next_frames)), []
    if soundtrack is not None:
        sound, notes = _put_soundtrack(soundtrack, start, seconds, sound)
    drift = seam(frames[-1], next_frames[1], frames[0]).sentence()
    text = " ".join([f"{len(joined)} frames, {seconds:.2f} s.", drift, *notes])
    return joined, None if sound is None else {"waveform": sound[0][None], "sample_rate": sound[1]}, text


def _joined_sound(audio, next_audio, frames: int, next_frames: int) -> tuple[torch.Tensor, int] | None:
    """(waveform (C, N), rate) of the joined clip."""
    if audio is None and next_audio is None:
        return None
    if audio is None or next_audio is None:
        which = "the next segment" if next_audio is None else "the clip so far"
        raise ValueError(f"Sound was given of one part only, none of {which}: connect both or neither.")
    first, rate = recording(audio, "sound of the clip so far")
    second, other_rate = recording(next_audio, "next segment's sound")
    if other_rate != rate:
        second = torch.stack([resample(channel, other_rate, rate) for channel in second])
    first, second = (
        fit_length(each, round(count / FPS * rate)) for each, count in ((first, frames), (second, next_frames))
    )
    total = round((frames + next_frames - 1) / FPS * rate)
    return join_sound(first, second, rate, first.shape[1] + second.shape[1] - total)[0], rate


def _put_soundtrack(soundtrack, start: float, seconds: float, made) -> tuple[tuple[torch.Tensor, int], list[str]]:
    """The joined clip's sound with a soundtrack in it sample for sample, and sentences."""
    rest = "silence" if made is None else "generated"
    given = fit_sound(*recording(soundtrack, "soundtrack"), seconds, start=start, rest=rest, is_track=True)
    if made is None or given.is_whole:
        return (given.waveform, given.sample_rate), list(given.notes)
    return Originals.of_sound(given).put_sound(*made), list(given.notes)
