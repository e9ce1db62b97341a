"""How loud a clip's sound is: integrated loudness and true peak after ITU-R BS.1770-5.

FFmpeg's filter ebur128 measures the same, and the tests hold these figures to it. But PyAV hands on what a filter tells
from a later release on than the oldest that ComfyUI asks for (14.2 does not); torchaudio's loudness, which newer hosts
do not bring, rounds the filters, and neither it nor torch has a true peak.
"""

from __future__ import annotations

import math

import torch

STEPS, STEPS_IN_BLOCK = 10, 4  # steps a second; a gating block of 400 ms begins with each and shares three quarters
ABSOLUTE_GATE, RELATIVE_GATE = -70.0, -10.0  # LUFS; LU below the mean of what passes the first
OFFSET = -0.691  # so that 997 Hz at full scale in one channel is -3.01
WEIGHTS = {5: (1.0, 1.0, 1.0, 1.41, 1.41), 6: (1.0, 1.0, 1.0, 0.0, 1.41, 1.41)}  # FFmpeg's order, LFE left out

# The analogue filters behind the coefficients that BS.1770 lists for 48 kHz, so that they can be had at any rate:
# frequency in Hz, quality, gain in dB of the shelf that stands for the head.
SHELF = (1681.974450955533, 0.7071752369554196, 3.999843853973347)
HIGH_PASS = (38.13547087602444, 0.5003270373238773)

CHUNK = 1 << 17  # samples filtered or oversampled at a time
SETTLING = 0.5  # seconds after which nothing is left of the filters' memory: below 1e-30

OVERSAMPLING = 4
TAPS = 24  # source samples that a sample in between is made from


def integrated_loudness(waveform: torch.Tensor, sample_rate: int) -> float | None:
    """Integrated loudness in LUFS of ``waveform`` (C, N) in -1..1 (ITU-R BS.1770-5, annex 1).

    K-weighted mean squares of blocks of 400 ms every 100 ms, first those above -70 LUFS, then of these the ones above
    10 LU below their mean. Left, centre and right count 1, surrounds 1.41, LFE nothing; other layouts 1 throughout, and
    a mono sound as it is, 3 dB less than played by two loudspeakers. None where there is no block of 400 ms, or none
    above -70 LUFS.
    """
    blocks = _block_powers(waveform, sample_rate)
    heard = blocks[blocks > _power(ABSOLUTE_GATE)]
    if not len(heard):
        return None
    heard = heard[heard > _power(_lufs(heard.mean()) + RELATIVE_GATE)]
    return _lufs(heard.mean())


def true_peak(waveform: torch.Tensor, sample_rate: int) -> float | None:
    """True peak in dBTP of ``waveform`` (C, N): of the sound four times oversampled (ITU-R BS.1770-5, annex 2).

    Below 96 kHz; above, twice, and from 192 kHz on not at all. Within 0.1 dB up to 0.4 times the sample rate. None for
    digital silence.
    """
    times = OVERSAMPLING if sample_rate < 96_000 else 2 if sample_rate < 192_000 else 1
    peak = float(waveform.abs().max())
    if times > 1:
        filters = _between(times).to(torch.float64)
        padded = torch.nn.functional.pad(waveform.float(), (TAPS // 2, TAPS // 2))
        for begin in range(0, waveform.shape[1], CHUNK):
            part = padded[:, begin : begin + CHUNK + TAPS].double()
            made = torch.nn.functional.conv1d(part[:, None], filters[:, None])
            peak = max(peak, float(made.abs().max()))
    return 20 * math.log10(peak) if peak > 0 else None


def _power(lufs: float) -> float:
    return 10 ** ((lufs - OFFSET) / 10)


def _lufs(power: torch.Tensor | float) -> float:
    return OFFSET + 10 * math.log10(float(power))


def _block_powers(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """The channels' weighted sum of mean squares of each gating block, (blocks,) fp64."""
    steps = waveform.shape[1] * STEPS // sample_rate
    if steps < STEPS_IN_BLOCK:
        return torch.empty(0, dtype=torch.float64)
    weights = torch.tensor(WEIGHTS.get(waveform.shape[0], (1.0,) * waveform.shape[0]), dtype=torch.float64)
    sums, done = torch.zeros(steps + 1, dtype=torch.float64), 0
    for part in _k_weighted(waveform, sample_rate):
        places = (torch.arange(done, done + part.shape[1]) * STEPS // sample_rate).clamp(max=steps)
        sums.index_add_(0, places, (weights[:, None] * part.square()).sum(dim=0))
        done += part.shape[1]
    starts = (torch.arange(steps + 1) * sample_rate + STEPS - 1) // STEPS
    lengths = starts.diff().unfold(0, STEPS_IN_BLOCK, 1).sum(dim=1)
    return sums[:steps].unfold(0, STEPS_IN_BLOCK, 1).sum(dim=1) / lengths


def _k_weighted(waveform: torch.Tensor, sample_rate: int):
    """The filtered sound in parts (C, n) fp64: by the filters' frequency response, with what they remember before."""
    memory = round(SETTLING * sample_rate)
    size = 1 << math.ceil(math.log2(CHUNK + 2 * memory))
    response = _k_response(sample_rate, size)
    for begin in range(0, waveform.shape[1], CHUNK):
        first = max(0, begin - memory)
        part = waveform[:, first : begin + CHUNK].double()
        made = torch.fft.irfft(torch.fft.rfft(part, size) * response, size)
        yield made[:, begin - first : part.shape[1]]


def _k_response(sample_rate: int, size: int) -> torch.Tensor:
    """What both filters do to each bin of a transform of ``size`` samples, complex (size / 2 + 1,)."""
    delay = torch.exp(-2j * math.pi * torch.arange(size // 2 + 1, dtype=torch.float64) / size)
    response = torch.ones_like(delay)
    for top, bottom in (_shelf(sample_rate), _high_pass(sample_rate)):
        response = response * sum(value * delay**n for n, value in enumerate(top))
        response = response / sum(value * delay**n for n, value in enumerate(bottom))
    return response


def _shelf(sample_rate: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The first filter's coefficients, by the bilinear transform of its analogue form."""
    frequency, quality, gain = SHELF
    k = math.tan(math.pi * frequency / sample_rate)
    high = 10 ** (gain / 20)
    middle = high**0.4996667741545416
    scale = 1 + k / quality + k * k
    top = (high + middle * k / quality + k * k, 2 * (k * k - high), high - middle * k / quality + k * k)
    return tuple(value / scale for value in top), _denominator(k, quality)


def _high_pass(sample_rate: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    frequency, quality = HIGH_PASS
    return (1.0, -2.0, 1.0), _denominator(math.tan(math.pi * frequency / sample_rate), quality)


def _denominator(k: float, quality: float) -> tuple[float, ...]:
    scale = 1 + k / quality + k * k
    return 1.0, 2 * (k * k - 1) / scale, (1 - k / quality + k * k) / scale


def _between(times: int) -> torch.Tensor:
    """Filters (times - 1, TAPS + 1) that give the samples between a sample and the next: a sinc under a Hann window."""
    places = torch.arange(TAPS + 1, dtype=torch.float64) - TAPS // 2
    steps = torch.arange(1, times, dtype=torch.float64)[:, None] / times
    distance = places - steps
    window = torch.cos(math.pi * distance / (TAPS + 2)).square()
    filters = torch.sinc(distance) * window
    return filters / filters.sum(dim=1, keepdim=True)
