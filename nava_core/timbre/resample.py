"""Band-limited resampling: torchaudio's where it can be imported, else an equal windowed-sinc resampler."""

import math

import torch

# The interpolation filter: a sinc cut off at 99 % of the lower Nyquist frequency, under a Hann window of six
# zero crossings to each side. These are torchaudio's defaults, which the speaker encoder's users rely on.
ZERO_CROSSINGS = 6
ROLLOFF = 0.99

# torchaudio's kernel has up_phases x source_step entries, nearly all zero. At rates without a common divisor
# (44101 Hz) that is gigabytes, so beyond this size our own resampler, which keeps only the filter's support, runs.
_MAX_DENSE_KERNEL = 1 << 22
_MAX_WINDOW_ELEMENTS = 1 << 22


def find_torchaudio():
    """The torchaudio module, or None where it is missing or does not fit the installed torch."""
    try:
        import torchaudio
        import torchaudio.functional
        import torchaudio.transforms
    except Exception:  # a torchaudio built for another torch fails with more than ImportError
        return None
    return torchaudio


def resample(
    waveform: torch.Tensor, source_rate: int, target_rate: int, *, use_torchaudio: bool | None = None
) -> torch.Tensor:
    """Resample a mono waveform.

    waveform: (samples,) float. Returns (ceil(samples * target_rate / source_rate),) float32.
    use_torchaudio: None takes torchaudio where it can be imported, False never, True insists on it. Both ways
    compute in float64 (torchaudio's float32 kernel alone is off by up to 1e-5), on the CPU, and agree to rounding.
    """
    if source_rate == target_rate:
        return waveform.float()
    divisor = math.gcd(source_rate, target_rate)
    step, phases = source_rate // divisor, target_rate // divisor
    torchaudio = None if use_torchaudio is False else find_torchaudio()
    if use_torchaudio and torchaudio is None:
        raise RuntimeError("torchaudio was asked for but cannot be imported; install it or leave the choice open.")
    samples = waveform.detach().cpu().double()
    if torchaudio is not None and step * phases <= _MAX_DENSE_KERNEL:
        result = torchaudio.functional.resample(
            samples, source_rate, target_rate, lowpass_filter_width=ZERO_CROSSINGS, rolloff=ROLLOFF
        )
    else:
        result = _sinc_resample(samples, step, phases)
    return result.float()


def _sinc_filters(step: int, phases: int) -> torch.Tensor:
    """Filter taps (phases, taps) in float64; tap j weighs the source sample j - half from the output's floor."""
    cutoff = ROLLOFF * min(1.0, phases / step)  # in units of the source's Nyquist frequency
    half = math.ceil(ZERO_CROSSINGS / cutoff)
    offsets = torch.arange(-half, half + 2, dtype=torch.float64)
    # The part of a source sample by which each phase's output lies behind its floor, exact in integers.
    behind = (torch.arange(phases, dtype=torch.int64) * step % phases).double() / phases
    t = ((offsets - behind[:, None]) * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = torch.cos(t * (math.pi / (2 * ZERO_CROSSINGS))) ** 2
    return torch.sinc(t) * window * cutoff


def _sinc_resample(samples: torch.Tensor, step: int, phases: int) -> torch.Tensor:
    """Resample (samples,) by phases / step (coprime): output n lies at source position n * step / phases."""
    filters = _sinc_filters(step, phases)
    taps = filters.shape[1]
    half = taps // 2 - 1
    length = -(-samples.numel() * phases // step)
    windows = torch.nn.functional.pad(samples, (half, half + 2)).unfold(0, taps, 1)
    output = samples.new_empty(length)
    chunk = max(1, _MAX_WINDOW_ELEMENTS // taps)  # bounds the memory of the gathered windows
    for begin in range(0, length, chunk):
        n = torch.arange(begin, min(begin + chunk, length), dtype=torch.int64)
        output[n] = (windows[n * step // phases] * filters[n % phases]).sum(dim=1)
    return output
