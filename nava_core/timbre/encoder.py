"""A recording of a voice -> its (1, 192) timbre embedding, and sentences on what is wrong with the recording."""

import math
import numbers

import torch

from .config import SAMPLE_RATE
from .redimnet import ReDimNet
from .resample import resample

MAX_SECONDS = 30.0
MIN_SECONDS = 1.0
GOOD_SECONDS = 3.0

# Source samples kept past the 30 s limit while resampling, so that the cut leaves the last samples unchanged.
_RESAMPLING_MARGIN_SECONDS = 0.1
_RATE_LIMITS = (1000, 768000)
_MAX_CHANNELS = 64
_MAX_FLOAT_PEAK = 32.0
_PCM_SCALES = {torch.int16: 2.0**15, torch.int32: 2.0**31}

_SILENCE_DBFS = -60.0
_CLIPPED_SHARE = 1e-3
_FLAT_SHARE = 2e-4


def encode_timbre(
    model: ReDimNet,
    waveform: torch.Tensor,
    sample_rate: int,
    *,
    start: float = 0.0,
    duration: float | None = None,
    use_torchaudio: bool | None = None,
) -> torch.Tensor:
    """Timbre embedding of one voice: channels averaged, resampled to 16 kHz, at most the first 30 s, padded with
    silence to at least 1 s, through ReDimNet.

    waveform: (samples,), (channels, samples) or (1, channels, samples); floats of -1..1, or 8-bit unsigned, 16- or
    32-bit signed PCM, which is scaled. sample_rate in Hz. start and duration in seconds choose the part (duration
    None: to the end); it is cut out before anything is computed. use_torchaudio: see `resample`.
    Returns (1, 192) float32 on the CPU, wherever the model is; the same input gives the same embedding.
    ValueError for a waveform that is empty, a batch, not finite or not sound, and for a start past its end.
    """
    sample_rate = _check_sample_rate(sample_rate)
    channels = _select(waveform, sample_rate, start, duration, limit=MAX_SECONDS + _RESAMPLING_MARGIN_SECONDS)
    mono = resample(channels.mean(dim=0), sample_rate, SAMPLE_RATE, use_torchaudio=use_torchaudio)
    mono = mono[: int(MAX_SECONDS * SAMPLE_RATE)]
    padding = max(0, int(MIN_SECONDS * SAMPLE_RATE) - mono.numel())
    mono = torch.nn.functional.pad(mono, (0, padding))
    device = next(model.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        embedding = model(mono.unsqueeze(0).to(device)).float().cpu()
    if not embedding.isfinite().all():
        raise RuntimeError(
            "The speaker encoder gave values that are not finite; its file is damaged, download it again."
        )
    return embedding


def check_voice(
    waveform: torch.Tensor, sample_rate: int, *, start: float = 0.0, duration: float | None = None
) -> list[str]:
    """What will make this voice come out worse, a sentence each; an empty list for a good recording.

    Takes what `encode_timbre` takes, and raises the ValueErrors it raises for the waveform.
    """
    sample_rate = _check_sample_rate(sample_rate)
    channels = _select(waveform, sample_rate, start, duration, limit=MAX_SECONDS)
    begin, end = _part(waveform.shape[-1], sample_rate, start, duration)
    warnings = [
        _silence_warning(channels.mean(dim=0)),
        _clipping_warning(channels),
        _length_warning((end - begin) / sample_rate),
        _bandwidth_warning(sample_rate),
    ]
    return [warning for warning in warnings if warning]


def used_seconds(
    waveform: torch.Tensor, sample_rate: int, *, start: float = 0.0, duration: float | None = None
) -> float:
    """How many seconds of a recording `encode_timbre` takes for these arguments, which are its own."""
    begin, end = _part(waveform.shape[-1], sample_rate, start, duration)
    return min(MAX_SECONDS, (end - begin) / sample_rate)


def _check_sample_rate(sample_rate) -> int:
    low, high = _RATE_LIMITS
    whole = isinstance(sample_rate, numbers.Real) and not isinstance(sample_rate, bool) and sample_rate % 1 == 0
    if not whole or not low <= sample_rate <= high:
        raise ValueError(f"The sample rate {sample_rate!r} is not a whole number of Hz from {low} to {high}.")
    return int(sample_rate)


def _select(waveform, sample_rate: int, start: float, duration: float | None, *, limit: float) -> torch.Tensor:
    """(channels, samples) float32 of -1..1 on the CPU: the chosen part, at most `limit` seconds of it."""
    channels = _channels_first(waveform)
    begin, end = _part(channels.shape[-1], sample_rate, start, duration)
    part = _to_float(channels[:, begin : min(end, begin + math.ceil(limit * sample_rate))].detach().cpu())
    if not part.isfinite().all():
        raise ValueError("The voice holds values that are not finite (NaN or infinity); load or make it again.")
    if part.abs().max() > _MAX_FLOAT_PEAK:
        raise ValueError(
            f"The voice reaches {part.abs().max().item():.0f} where floats of -1 to 1 were expected; divide 16-bit "
            "samples by 32768."
        )
    return part


def _channels_first(waveform) -> torch.Tensor:
    """A view (channels, samples) of a waveform in any of the accepted shapes."""
    if not isinstance(waveform, torch.Tensor):
        raise ValueError(f"The voice is a {type(waveform).__name__}; a tensor of samples was expected.")
    shape = tuple(waveform.shape)
    if waveform.ndim == 3 and shape[0] > 1:
        raise ValueError(f"The voice is a batch of {shape[0]} recordings; encode one recording at a time.")
    if waveform.ndim not in (1, 2, 3):
        raise ValueError(f"The voice has the shape {shape}; (channels, samples) was expected.")
    if waveform.numel() == 0:
        raise ValueError("The voice has no samples; choose a recording with sound in it.")
    channels = waveform[None] if waveform.ndim == 1 else waveform[0] if waveform.ndim == 3 else waveform
    if channels.shape[0] > _MAX_CHANNELS:
        raise ValueError(f"The voice has the shape {shape}, which is {channels.shape[0]} channels; put channels first.")
    return channels


def _part(samples: int, sample_rate: int, start: float, duration: float | None) -> tuple[int, int]:
    """First sample and end of the part that start and duration (seconds) choose."""
    if not math.isfinite(start) or start < 0:
        raise ValueError(f"The start of the voice is {start} s; a number of seconds from 0 was expected.")
    if duration is not None and (not math.isfinite(duration) or duration <= 0):
        raise ValueError(f"The duration of the voice is {duration} s; a number of seconds above 0 was expected.")
    begin = round(start * sample_rate)
    if begin >= samples:
        raise ValueError(
            f"The voice is to start at {start:g} s, but the recording lasts {samples / sample_rate:.2f} s; "
            "choose an earlier start."
        )
    end = samples if duration is None else min(samples, begin + max(1, round(duration * sample_rate)))
    return begin, end


def _to_float(part: torch.Tensor) -> torch.Tensor:
    if part.is_floating_point():
        return part.float()
    if part.dtype == torch.uint8:
        return (part.float() - 128) / 128
    if part.dtype in _PCM_SCALES:
        return (part.double() / _PCM_SCALES[part.dtype]).float()
    raise ValueError(f"The voice has samples of type {part.dtype}; floats, uint8, int16 or int32 were expected.")


def _silence_warning(mono: torch.Tensor) -> str | None:
    level = mono.double().square().mean().sqrt().item()
    decibels = 20 * math.log10(max(level, 1e-10))
    if decibels >= _SILENCE_DBFS:
        return None
    shown = f"{decibels:.0f} dB below full scale".replace("-", "") if level > 1e-7 else "digital silence"
    return f"The voice is nearly silent ({shown}), so its timbre will be arbitrary; choose a louder part or recording."


def _clipping_warning(channels: torch.Tensor) -> str | None:
    """Clipping shows as samples at full scale, or, where it was made quieter after, as flat tops at the peak."""
    magnitude = channels.abs()
    peak = magnitude.max()
    if peak < 10 ** (_SILENCE_DBFS / 20):
        return None
    full_scale = (magnitude >= 0.999).float().mean().item()
    tops = channels[:, 1:] == channels[:, :-1]
    flat = (tops[:, 1:] & tops[:, :-1] & (magnitude[:, 2:] >= 0.98 * peak)).float().mean().item()
    if full_scale < _CLIPPED_SHARE and (math.isnan(flat) or flat < _FLAT_SHARE):
        return None
    return (
        f"The voice is clipped ({100 * max(full_scale, flat):.1f} % of its samples), so its timbre will sound harsh; "
        "record it at a lower level."
    )


def _length_warning(seconds: float) -> str | None:
    if seconds < MIN_SECONDS:
        return (
            f"The voice lasts only {seconds:.2f} s and is padded with silence to 1 s; 3 to 10 s of clear speech carry "
            "a timbre better."
        )
    if seconds < GOOD_SECONDS:
        return f"The voice lasts only {seconds:.1f} s; 3 to 10 s of clear speech carry a timbre better."
    if seconds > MAX_SECONDS:
        return (
            f"The voice lasts {seconds:.0f} s, of which only the first 30 s are used; choose another part with start "
            "and duration."
        )
    return None


def _bandwidth_warning(sample_rate: int) -> str | None:
    if sample_rate >= SAMPLE_RATE:
        return None
    return (
        f"The voice is sampled at {sample_rate} Hz and has nothing above {sample_rate / 2000:g} kHz, so its timbre "
        "will sound dull; use a recording of 16 kHz or more."
    )
