"""Measures of a finished clip: each against known values, and against a clip that was broken for it."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import pytest
import torch

from nava_core.cli import main
from nava_core.media import mux, read_audio, write_wav
from nava_core.report import (
    accent_strength,
    block_flow,
    came_in_order,
    clipped_share,
    flicker,
    frozen_spans,
    integrated_loudness,
    loudness,
    measure_sync,
    onset_strength,
    report_clip,
    report_file,
    speech_segments,
    split_speech,
    true_peak,
    word_errors,
)
from nava_core.report.curves import picture_curves
from nava_core.timbre import encode_timbre, load_redimnet
from nava_core.timbre.resample import find_torchaudio, resample
from nava_core.video_files import read_video
from nava_core.voices import SavedVoice, make_voice

RATE, FPS = 48_000, 24
GOLDEN = Path(__file__).parents[1] / "golden"
HITS = (0.5, 1.25, 1.75, 2.625, 3.25, 3.5)  # whole frames at 24 a second
SECONDS = 4.0
needs_voices = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng to speak")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sine(hertz, seconds, decibels, channels=2, rate=RATE, phase=0.0):
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    wave = 10 ** (decibels / 20) * torch.sin(2 * math.pi * hertz * time + phase)
    return wave.float().expand(channels, -1)


def knocks(times=HITS, seconds=SECONDS, late=0.0, rate=RATE):
    """A short burst of noise at each time, over a faint hiss: (2, N)."""
    generator = seeded(1)
    sound = 5e-4 * torch.randn(2, round(seconds * rate), generator=generator)
    for time in times:
        begin = round((time + late) * rate)
        length = min(round(0.08 * rate), sound.shape[1] - begin)
        fading = torch.exp(-torch.arange(length) / (0.015 * rate))
        sound[:, begin : begin + length] += 0.15 * fading * torch.randn(length, generator=generator)
    return sound


def texture(height, width, seed, low, high):
    fine = low + (high - low) * torch.rand(height // 4, width // 4, generator=seeded(seed))
    return fine.repeat_interleave(4, 0).repeat_interleave(4, 1)[..., None].expand(-1, -1, 3)


def bouncing(hits=HITS, seconds=SECONDS, fps=FPS):
    """A square that turns round at each hit before a still wall: (F, 96, 128, 3) in 0..1."""
    frames = texture(96, 128, 0, 0.3, 0.5).repeat(round(seconds * fps), 1, 1, 1)
    square = texture(32, 32, 3, 0.6, 0.9) * torch.tensor([1.0, 0.9, 0.3])
    turns, place, step = {round(time * fps) for time in hits}, 40, 2
    for number, frame in enumerate(frames):
        if number in turns:
            step = -step
        frame[32:64, place : place + 32] = square
        place = min(max(place + step, 0), 96)
    return frames


@pytest.fixture(scope="module")
def good():
    return bouncing()


def faults(report):
    return {fault.measure for fault in report.faults}


# ---------------------------------------------------------------- loudness


@pytest.mark.parametrize(("rate", "close"), [(48000, 0.001), (44100, 0.01), (16000, 0.05)])
def test_a_sine_of_997_hz_has_the_loudness_that_the_standard_says(rate, close):
    assert integrated_loudness(sine(997, 2, 0, channels=1, rate=rate), rate) == pytest.approx(-3.0103, abs=close)
    assert integrated_loudness(sine(997, 2, -23, rate=rate), rate) == pytest.approx(-23.0, abs=close)


def test_the_filters_are_those_of_the_standard_at_48_khz():
    """An impulse through the coefficients that BS.1770 prints."""
    shelf = ((1.53512485958697, -2.69169618940638, 1.19839281085285), (-1.69065929318241, 0.73248077421585))
    high_pass = ((1.0, -2.0, 1.0), (-1.99004745483398, 0.99007225036621))
    signal = [1.0] + [0.0] * 999
    for top, bottom in (shelf, high_pass):
        made = []
        for n in range(len(signal)):
            value = sum(top[k] * signal[n - k] for k in range(3) if n >= k)
            made.append(value - sum(bottom[k - 1] * made[n - k] for k in (1, 2) if n >= k))
        signal = made
    impulse = torch.zeros(1, 1000)
    impulse[0, 0] = 1
    (ours,) = loudness._k_weighted(impulse, 48000)
    assert torch.allclose(ours[0], torch.tensor(signal, dtype=torch.float64), atol=1e-9)


def test_quiet_parts_are_gated():
    """As in EBU Tech 3341: what is 10 LU below the rest does not count."""
    quiet, loud = sine(1000, 3, -36), sine(1000, 12, -23)
    assert integrated_loudness(torch.cat([quiet, loud, quiet], dim=1), RATE) == pytest.approx(-23.0, abs=0.1)
    near = torch.cat([sine(1000, 6, -28), sine(1000, 6, -23)], dim=1)
    assert integrated_loudness(near, RATE) == pytest.approx(10 * math.log10((10**-2.8 + 10**-2.3) / 2), abs=0.1)
    assert integrated_loudness(torch.zeros(2, RATE), RATE) is None
    assert integrated_loudness(sine(997, 0.3, -20), RATE) is None
    assert integrated_loudness(sine(997, 1, -75), RATE) is None


def test_surround_weighs_more_and_the_low_channel_nothing():
    front = sine(997, 1, -20, channels=1)
    silent = torch.zeros_like(front)

    def only(channel):
        return integrated_loudness(torch.cat([front if n == channel else silent for n in range(6)]), RATE)

    assert only(4) - only(0) == pytest.approx(10 * math.log10(1.41), abs=1e-6)
    assert only(3) is None


def test_parts_give_what_the_whole_gives(monkeypatch):
    sound = 0.1 * torch.randn(2, RATE, generator=seeded())
    whole = integrated_loudness(sound, RATE), true_peak(sound, RATE)
    monkeypatch.setattr(loudness, "CHUNK", 7000)
    assert (integrated_loudness(sound, RATE), true_peak(sound, RATE)) == pytest.approx(whole, abs=1e-9)


@pytest.mark.skipif(not hasattr(av.AudioFrame, "metadata"), reason="this PyAV does not hand on a filter's figures")
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_loudness_and_true_peak_are_those_of_ffmpeg(rate):
    time = torch.arange(5 * rate) / rate
    sound = torch.stack([torch.randn(5 * rate, generator=seeded(n)) for n in (1, 2)])
    sound = 0.1 * sound * (0.12 + (time % 2.0 < 1.2) * (0.3 + time / 5))  # passages and pauses of other levels
    loud, peak = ebur128(sound, rate)
    assert integrated_loudness(sound, rate) == pytest.approx(loud, abs=0.06)  # told to a tenth
    assert true_peak(sound, rate) == pytest.approx(peak, abs=0.3)


def ebur128(sound, rate):
    """FFmpeg's integrated loudness (LUFS) and true peak (dBTP) of a stereo sound."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="fltp", layout="stereo", time_base=Fraction(1, rate))
    meter, sink = graph.add("ebur128", "peak=true:metadata=1"), graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(sound.numpy(), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    graph.push(frame)
    graph.push(None)
    told = {}
    while True:
        try:
            told = dict(graph.pull().metadata) or told
        except (av.BlockingIOError, av.EOFError):
            break
    return float(told["lavfi.r128.I"]), 20 * math.log10(float(told["lavfi.r128.true_peak"]))


@pytest.mark.skipif(find_torchaudio() is None, reason="no torchaudio to compare with")
def test_loudness_is_near_torchaudios_which_rounds_the_filters():
    sound = 0.05 * torch.randn(2, 2 * RATE, generator=seeded())
    theirs = float(find_torchaudio().functional.loudness(sound, RATE))
    assert integrated_loudness(sound, RATE) == pytest.approx(theirs, abs=0.2)


def test_true_peak_finds_what_lies_between_samples():
    """A quarter of the sample rate at 45 degrees: every sample is 3 dB below the top."""
    sound = sine(RATE / 4, 0.2, -6, channels=1, phase=math.pi / 4) * torch.hann_window(round(0.2 * RATE))
    assert 20 * math.log10(float(sound.abs().max())) == pytest.approx(-9.01, abs=0.05)
    assert true_peak(sound, RATE) == pytest.approx(-6.0, abs=0.05)
    assert true_peak(sound, 192_000) == pytest.approx(-9.01, abs=0.05)
    assert true_peak(torch.zeros(1, 100), RATE) is None


# ---------------------------------------------------------------- sound on motion


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (-5, 2), (0, -7), (9, 9)])
def test_flow_is_the_shift_of_the_picture(right, down):
    picture = torch.rand(96, 128, generator=seeded())
    flow = block_flow(picture[None], picture.roll((down, right), dims=(0, 1))[None])
    assert flow.shape == (1, 35, 2)
    assert flow[0].median(dim=0).values.tolist() == [right, down]


@pytest.mark.parametrize("milliseconds", [0, 100, 200, -200, 400, -400])
def test_the_lag_is_found_and_200_ms_are_a_fault(good, milliseconds):
    report = report_clip(good, knocks(late=milliseconds / 1000), RATE)
    sync = report.values["sync"]
    assert sync["linked"]
    assert sync["lag_ms"] == pytest.approx(milliseconds, abs=10)
    assert sync["correlation"] > 2 * sync["chance_correlation"]
    assert faults(report) == ({"sync"} if abs(milliseconds) >= 200 else set())


@pytest.mark.parametrize(("milliseconds", "is_fault"), [(-40, False), (-90, True), (120, False), (170, True)])
def test_the_lag_is_a_fault_where_viewers_notice(good, milliseconds, is_fault):
    report = report_clip(good, knocks(late=milliseconds / 1000), RATE)
    assert faults(report) == ({"sync"} if is_fault else set())


def test_a_lag_that_may_be_chance_is_a_note_alone(good, monkeypatch):
    found = replace(measure_sync(onset_strength(knocks(late=0.3), RATE), _accents_at(HITS), FPS), chance=0.03)
    monkeypatch.setattr("nava_core.report.clip.measure_sync", lambda *_: found)
    report = report_clip(good, knocks(), RATE)
    assert report.faults == []
    assert report.notes == ["The sound may come 300 ms late; 3.0 % of shuffled sounds fit as well."]


def test_sounds_that_have_nothing_to_do_with_the_picture_are_told_from_late_ones(good):
    linked = 0
    for seed in range(4):
        times = (0.3 + 3.4 * torch.rand(6, generator=seeded(seed))).tolist()
        report = report_clip(good, knocks(times), RATE)
        linked += report.values["sync"]["linked"]
        assert faults(report) <= ({"sync"} if report.values["sync"]["linked"] else set())
    assert linked == 0


@pytest.mark.parametrize(("fps", "rate"), [(25, 44100), (30, 16000)])
def test_lights_that_go_on_with_a_tone_at_other_rates(fps, rate):
    times = (0.4, 1.2, 1.6, 2.6, 3.2)
    frames = texture(48, 64, 0, 0.2, 0.4).repeat(4 * fps, 1, 1, 1)
    for time in times:
        frames[round(time * fps) : round((time + 0.2) * fps)] += 0.2
    sound = torch.zeros(1, 4 * rate)
    for time in times:
        tone = sine(440, 0.2, -12, channels=1, rate=rate)
        sound[:, round((time + 0.25) * rate) :][:, : tone.shape[1]] = tone
    report = report_clip(frames, sound, rate, fps)
    assert report.values["sync"]["lag_ms"] == pytest.approx(250, abs=15)
    assert "sync" in faults(report)


def test_of_beats_that_come_again_and_again_the_nearest_lag_is_taken():
    """Each accent is a little weaker than the one before, so that a beat later the fit is even 3 % better."""
    times = torch.arange(0.5, 3.8, 0.25).tolist()
    accents = _accents_at(times)
    accents[accents > 0] *= 0.97 ** torch.arange(len(times))
    onsets = torch.zeros(400)
    onsets[[round(100 * (time + 0.05)) for time in times[1:]]] = 1
    assert measure_sync(onsets, accents, FPS).lag == pytest.approx(0.05, abs=0.011)


def _accents_at(times):
    accents = torch.zeros(round(SECONDS * FPS))
    accents[[round(time * FPS) for time in times]] = 1
    return accents


def test_where_nothing_begins_nothing_is_said():
    assert measure_sync(torch.zeros(400), _accents_at(HITS), FPS) is None
    assert measure_sync(onset_strength(knocks(), RATE), torch.zeros(96), FPS) is None
    still = accent_strength(torch.zeros(95, 4, 2), torch.zeros(95))
    assert still.tolist() == [0.0] * 96


# ---------------------------------------------------------------- what is broken


def test_a_good_clip_has_no_fault_in_memory_or_from_its_file(good, tmp_path):
    sound = knocks()
    report = report_clip(good, sound, RATE)
    assert (report.faults, report.notes) == ([], [])
    mux(tmp_path / "clip.mp4", good, sound, RATE)
    read = report_file(tmp_path / "clip.mp4")
    assert (read.faults, read.notes) == ([], [])
    assert read.values["picture"]["size"] == [128, 96]
    for measure, value, close in (("sound", "loudness_lufs", 0.3), ("sync", "lag_ms", 10), ("picture", "motion", 0.05)):
        assert read.values[measure][value] == pytest.approx(report.values[measure][value], abs=close)


@pytest.mark.parametrize(("count", "is_fault"), [(10, False), (12, True), (20, True)])
def test_a_picture_frozen_for_half_a_second(good, tmp_path, count, is_fault):
    """12 equal frames last half a second; through the codec they are no longer quite equal."""
    frames = good.clone()
    frames[40 : 40 + count] = frames[40]
    mux(tmp_path / "clip.mp4", frames)
    for report in (report_clip(frames), report_file(tmp_path / "clip.mp4")):
        assert faults(report) == ({"frozen"} if is_fault else set())
        for begin, end in report.values["frozen"]["spans"]:
            assert (begin, end) == pytest.approx((40 / 24, (40 + count) / 24), abs=0.01)


def test_what_moves_in_a_corner_alone_is_not_frozen():
    frames = torch.full((24, 96, 192, 3), 0.5)
    for number, frame in enumerate(frames):
        frame[:6, number % 12 : number % 12 + 6] = 0.9
    assert faults(report_clip(frames)) == set()
    assert faults(report_clip(torch.full((24, 96, 192, 3), 0.5))) == {"frozen"}
    noise = 0.5 + 0.8 / 255 * torch.randn(24, 96, 192, 3, generator=seeded())
    assert frozen_spans(picture_curves(noise).changes, 24) == [(0.0, 1.0)]


@pytest.mark.parametrize(("jump", "count", "is_fault"), [(0.019, 8, False), (0.021, 8, True), (0.1, 2, False)])
def test_brightness_that_jumps_by_2_percent_and_back(good, jump, count, is_fault):
    frames = good.clone() * 0.8
    frames[20 : 20 + 4 * count : 4] += jump
    report = report_clip(frames)
    assert faults(report) == ({"flicker"} if is_fault else set())
    assert report.values["flicker"]["count"] == (count if jump > 0.02 else 0)


def test_a_cut_is_no_flicker_and_slow_pulses_are_none(good):
    frames = good.clone()
    frames[48:] = (1.4 * frames[48:]).clamp(max=1)
    assert report_clip(frames).values["flicker"]["count"] == 0
    pulse = 0.5 + 0.2 * torch.sin(torch.arange(96) / 24 * 2 * math.pi * 0.5)
    assert flicker(pulse, 24).times == ()
    every_other = 0.5 + 0.05 * (torch.arange(24) % 2)
    assert len(flicker(every_other, 24).times) == 11


@pytest.mark.parametrize(("decibels", "is_fault"), [(-54, False), (-63, True)])
def test_silence_is_below_60_dbfs(good, decibels, is_fault):
    noise = 10 ** (decibels / 20) * torch.randn(2, round(SECONDS * RATE), generator=seeded())
    assert faults(report_clip(good, noise, RATE)) == ({"silence"} if is_fault else set())
    assert faults(report_clip(good, torch.zeros(2, round(SECONDS * RATE)), RATE)) == {"silence"}


def test_silence_within_a_clip_is_noted_with_its_place():
    sound = torch.cat([sine(300, 1, -20), torch.zeros(2, round(1.2 * RATE)), sine(300, 0.8, -20)], dim=1)
    report = report_clip(None, sound, RATE)
    assert report.faults == []
    assert report.notes == ["The sound is silent from 1.00 to 2.20 s."]


@pytest.mark.parametrize(("gain", "is_fault"), [(0.5, False), (0.99, False), (1.1, True), (2.0, True), (4.0, True)])
@pytest.mark.parametrize("later", [1.0, 0.5])
def test_clipping_is_found_also_turned_down_and_through_a_codec(tmp_path, gain, is_fault, later):
    """Of a voice-like sound that swells; at a gain of 1.1 it is the sine that shows."""
    swell = 1.0 if gain == 1.1 else 0.4 + 0.6 * torch.sin(torch.arange(RATE) / RATE * 2 * math.pi).abs()
    sound = later * (gain * swell * sine(220, 1, 0)).clamp(-1, 1)
    assert (clipped_share(sound) >= 1e-3) == is_fault
    if later == 1.0:
        mux(tmp_path / "clip.mp4", torch.rand(24, 32, 32, 3, generator=seeded()), 0.9 * sound, RATE)
        assert ("clipping" in faults(report_file(tmp_path / "clip.mp4"))) == is_fault


def test_noise_and_loud_sines_are_not_clipped():
    assert clipped_share(0.9 * (2 * torch.rand(1, RATE, generator=seeded()) - 1)) == 0
    assert clipped_share(sine(997, 1, -0.1)) == 0
    assert clipped_share(torch.zeros(1, 100)) == 0


def test_one_value_that_is_not_finite_is_a_fault_and_all_else_is_measured(good):
    frames, sound = good.clone(), knocks()
    frames[7, 3, 2, 1], sound[0, 100] = float("nan"), float("inf")
    report = report_clip(frames, sound, RATE)
    assert [fault.text for fault in report.faults] == [
        "NaN or infinity in the picture, 1 value(s).",
        "NaN or infinity in the sound, 1 value(s).",
    ]
    assert report.values["sound"]["loudness_lufs"] < 0
    assert json.loads(report.to_json())["sync"]["lag_ms"] == pytest.approx(0, abs=10)
    all_broken = report_clip(frames * float("nan"), sound * float("nan"), RATE)
    assert faults(all_broken) == {"not finite", "frozen", "silence"}


@pytest.mark.parametrize(("shorter", "is_fault"), [(0.05, False), (0.2, True)])
def test_lengths_that_differ(good, shorter, is_fault):
    assert faults(report_clip(good, knocks()[:, round(shorter * RATE) :], RATE)) >= ({"length"} if is_fault else set())
    assert ("length" in faults(report_clip(good, knocks()[:, round(shorter * RATE) :], RATE))) == is_fault


# ---------------------------------------------------------------- voices


def hum(pitch, seconds):
    """Something like a voice: harmonics of a pitch that wavers."""
    time = torch.arange(round(seconds * 16000)) / 16000
    angle = 2 * math.pi * pitch * (time + 0.004 * torch.sin(2 * math.pi * 3 * time))
    return 0.1 * sum(torch.sin(n * angle) / n for n in range(1, 8))


def talk(*parts, pause=0.6):
    gap = 1e-4 * torch.randn(round(pause * 16000), generator=seeded())
    return torch.cat([gap, *(piece for part in parts for piece in (part, gap))])[None]


def spectrum(waveform, rate):
    """A speaker encoder to stand in: the mean spectrum, in steps of a few Hz."""
    frames = waveform.mean(dim=0).unfold(0, 2048, 1024) * torch.hann_window(2048)
    return torch.fft.rfft(frames).abs().mean(dim=0, keepdim=True)[:, :200]


LOW, HIGH = hum(110, 1.5)[None], hum(190, 1.5)[None]
TWO = "He says <S>good morning<E>, she says <S>come on in<E>."


def voices_of(sound, prompt=TWO, **options):
    references = [spectrum(voice, 16000) for voice in (LOW, HIGH)]
    return report_clip(None, sound, 16000, prompt=prompt, voices=references, encode=spectrum, **options)


def test_segments_of_speech_are_found():
    found = speech_segments(talk(hum(110, 1.0), hum(190, 0.5)), 16000)
    assert torch.tensor(found).flatten().tolist() == pytest.approx([0.6, 1.6, 2.2, 2.7], abs=0.03)
    assert speech_segments(torch.zeros(1, 16000), 16000) == []
    noisy = talk(hum(110, 1.0)) + 0.01 * torch.randn(1, 35200, generator=seeded(5))
    assert torch.tensor(speech_segments(noisy, 16000)).flatten().tolist() == pytest.approx([0.6, 1.6], abs=0.05)


def test_segments_go_to_the_spans_by_length_and_pause():
    segments = [(0.0, 1.0), (1.3, 2.3), (3.0, 3.5)]
    assert split_speech(segments, [20, 5]) == [segments[:2], segments[2:]]
    assert split_speech(segments, [10, 10, 5]) == [[each] for each in segments]
    assert split_speech(segments, [1]) == [segments]
    assert split_speech([(1.0, 3.0)], [1, 3]) == [[(1.0, 1.5)], [(1.5, 3.0)]]
    assert split_speech([(0.0, 1.0), (2.0, 3.0)], [1, 1, 2]) == [[(0.0, 0.5)], [(0.5, 1.0)], [(2.0, 3.0)]]
    assert split_speech([], [1, 2]) == [[], []]
    long_pause = [(0.0, 1.1), (1.4, 2.2), (3.2, 4.2)]
    assert split_speech(long_pause, [1, 1]) == [long_pause[:2], long_pause[2:]]
    four = [(0.0, 1.0), (1.3, 2.3), (2.6, 3.6), (3.9, 4.9)]
    assert [len(group) for group in split_speech(four, [1, 2, 1])] == [1, 2, 1]


def test_voices_in_order_pass_and_swapped_ones_are_a_fault():
    right = voices_of(talk(hum(110, 1.2), hum(190, 1.0)))
    assert right.values["speech"]["in_order"] is True
    assert right.faults == []
    assert all(span["similarity"] > 0.9 for span in right.values["speech"]["spans"])
    swapped = voices_of(talk(hum(190, 1.2), hum(110, 1.0)))
    assert swapped.values["speech"]["in_order"] is False
    assert [fault.text for fault in swapped.faults] == [
        "The voices did not come in order: span 1 sounds like voice 2, not 1, span 2 sounds like voice 1, not 2."
    ]
    one_for_both = voices_of(talk(hum(110, 1.2), hum(110, 1.0)))
    assert [span["resembles"] for span in one_for_both.values["speech"]["spans"]] == [1, 1]
    assert faults(one_for_both) == {"voices"}


def test_voices_are_bound_to_spans_as_they_were_made():
    three = TWO + " He adds: <S>thanks a lot<E>"
    sound = talk(hum(110, 1.0), hum(190, 1.0), hum(110, 1.0))
    assert voices_of(sound, three, assignment=[0, 1, 0]).faults == []
    assert faults(voices_of(sound, three, assignment=[1, 0, 0])) == {"voices"}
    unbound = voices_of(sound, three, assignment=[None, 1, 0])
    assert unbound.values["speech"]["spans"][0]["similarity"] is None
    assert unbound.faults == []
    assert voices_of(talk(hum(110, 1.2), hum(190, 1.0)), None).values["speech"]["in_order"] is True
    assert came_in_order([None, None]) is None


def test_speech_that_is_missing_is_a_fault():
    report = voices_of(torch.zeros(1, 32000))
    assert faults(report) == {"silence", "speech"}


@needs_voices
def test_the_small_speaker_encoder_keeps_two_very_unlike_voices_apart(tmp_path):
    """Its weights are arbitrary, so that all it shows is the way from sound to order: of one text said by a deep and by
    a high voice each is nearest to itself, by little. How like a voice is needs the published weights."""
    said = {}
    for name, options in (("low", ("-v", "en-gb", "-p", "15")), ("high", ("-v", "en-us+f3", "-p", "85"))):
        path = tmp_path / f"{name}.wav"
        subprocess.run(["espeak-ng", *options, "-w", str(path), "The storm has passed."], check=True)
        waveform, rate = read_audio(path)
        waveform = resample(waveform[0], rate, 16000)
        ((begin, end),) = speech_segments(waveform[None], 16000)
        said[name] = waveform[round(begin * 16000) : round(end * 16000)]
    encode = partial(encode_timbre, load_redimnet(GOLDEN / "redimnet_small.pt"))
    references = [encode(said[name][None], 16000) for name in ("low", "high")]
    options = {"prompt": TWO, "voices": references, "encode": encode}
    right = report_clip(None, talk(said["low"], said["high"]), 16000, **options)
    assert right.values["speech"]["in_order"] is True
    assert all(span["similarity"] > 0.98 for span in right.values["speech"]["spans"])
    assert faults(report_clip(None, talk(said["high"], said["low"]), 16000, **options)) == {"voices"}


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("expected", "heard", "unit", "figures"),
    [
        ("Good morning, Anna!", "good morning anna", "word", (0, 0, 0)),
        ("Good morning, Anna!", "good evening anna", "word", (1, 0, 0)),
        ("It's half past nine.", "it’s past nine now", "word", (0, 1, 1)),
        ("one two three", "", "word", (0, 3, 0)),
        ("one", "one one one", "word", (0, 0, 2)),
        ("no one two", "no two three", "word", (0, 1, 1)),
        ("早上好，安娜！", "早上好 安娜", "character", (0, 0, 0)),
        ("今天天气很好。", "今天天汽好", "character", (1, 1, 0)),
        ("ＡＢＣ 123", "abc 123", "word", (0, 0, 0)),
    ],
)
def test_word_and_character_errors(expected, heard, unit, figures):
    errors = word_errors(expected, heard)
    assert errors.unit == unit
    assert (errors.wrong, errors.missing, errors.added) == figures
    assert errors.rate == sum(figures) / errors.expected
    assert word_errors("", heard) is None


def test_a_quarter_of_the_words_wrong_is_a_fault():
    asked = []

    def asr(waveform, rate):
        asked.append((tuple(waveform.shape), rate))
        return "good night come in in"

    sound = talk(hum(110, 1.2), hum(190, 1.0))
    heard = report_clip(None, sound, 16000, prompt=TWO, asr=asr)
    assert asked == [(tuple(sound.shape), 16000)]
    assert heard.values["words"]["rate"] == 2 / 5
    assert faults(heard) == {"words"}
    assert faults(report_clip(None, sound, 16000, prompt=TWO, transcript="good morning come in in")) == set()
    unasked = report_clip(None, sound, 16000, prompt="Rain falls.", transcript="good morning")
    assert unasked.notes == ["Words were heard, but the prompt has none that were to be said."]


def test_a_recogniser_that_goes_on_and_on_costs_no_other_figure():
    heard = report_clip(None, talk(hum(110, 1.2)), 16000, prompt=TWO, transcript="yes " * 5001)
    assert faults(heard) == {"words"}
    assert heard.values["sound"]["loudness_lufs"] < 0


# ---------------------------------------------------------------- the whole


def test_what_cannot_be_measured_is_refused():
    frames, sound = torch.rand(4, 16, 16, 3), torch.rand(1, 4000)
    for arguments, options, words in (
        ((None,), {}, "nothing to measure"),
        ((frames[0],), {}, r"Frames are \(frames, height, width, 3\)"),
        ((frames, None, None, 0), {}, "frame rate must be above 0"),
        ((frames, sound, None), {}, "sample rate"),
        ((frames, sound, 16000), {"voices": [torch.rand(1, 8)]}, "compared by a speaker encoder"),
        ((frames, sound, 16000), {"prompt": "<S>yes"}, "never closed"),
        ((frames,), {"prompt": TWO, "voices": [torch.rand(1, 8)] * 3, "encode": spectrum}, "3 voices given"),
    ):
        with pytest.raises(ValueError, match=words):
            report_clip(*arguments, **options)


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 100, 4000])
def test_the_shortest_clips_are_measured(frames, samples):
    report = report_clip(torch.rand(frames, 8, 8, 3, generator=seeded()), torch.rand(1, samples) - 0.5, 16000)
    assert json.loads(report.to_json())["sync"] is None
    assert report.picture().shape[1:] == (1200, 3)


def test_progress_ends_whole_and_an_interrupt_ends_it(good):
    told = []
    report_clip(good, knocks(), RATE, callback=lambda *step: told.append(step))
    assert [step for step, _ in told] == sorted(step for step, _ in told)
    assert told[-1] == (told[0][1], told[0][1])

    def stop(step, steps):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_clip(good, knocks(), RATE, callback=stop)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_frames():
    """Of 200 frames that would take 540 MB in floats."""
    spec = importlib.util.spec_from_file_location("_ram", Path(__file__).with_name("_ram.py"))
    ram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ram)
    frames = torch.randint(0, 256, (1, 352, 640, 3), dtype=torch.uint8).expand(200, -1, -1, -1)
    picture_curves(frames[:8])
    peak, _ = ram.measure(lambda: picture_curves(frames))
    assert peak < 150e6


def test_its_picture_shows_what_is_silent_frozen_and_faulty(good):
    def colours(report):
        picture = report.picture()
        assert picture.dtype == torch.uint8
        packed = (picture.long() * torch.tensor([1 << 16, 1 << 8, 1])).sum(dim=-1).unique().tolist()
        return {(value >> 16, value >> 8 & 255, value & 255) for value in packed}

    from nava_core.report import picture

    fine = colours(report_clip(good, knocks(), RATE))
    assert {picture.WAVE, picture.ONSET, picture.ACCENT} <= fine
    assert not {picture.SILENT, picture.FROZEN, picture.FAULT} & fine
    broken = colours(report_clip(good[:1].expand(96, -1, -1, -1), torch.zeros(2, 4 * RATE), RATE))
    assert {picture.SILENT, picture.FROZEN, picture.FAULT} <= broken


def test_a_file_of_sound_alone_and_one_of_picture_alone(tmp_path, good):
    write_wav(tmp_path / "a.wav", sine(997, 1, -23), RATE)
    report = report_file(tmp_path / "a.wav")
    assert report.values["sound"]["loudness_lufs"] == pytest.approx(-23, abs=0.01)
    assert "picture" not in report.values
    mux(tmp_path / "b.mp4", good[:24])
    assert "sound" not in report_file(tmp_path / "b.mp4").values
    assert report_file(tmp_path / "b.mp4", 0.5).values["picture"]["frames"] == 12
    with pytest.raises(FileNotFoundError):
        report_file(tmp_path / "c.mp4")
    (tmp_path / "page.mp4").write_text("<html>")
    with pytest.raises(ValueError, match=r"Cannot read page\.mp4"):
        report_file(tmp_path / "page.mp4")


def test_a_large_video_is_measured_small_and_says_its_own_size(tmp_path):
    frames = torch.rand(3, 3, 4, 3, generator=seeded()).repeat_interleave(120, 1).repeat_interleave(120, 2)
    mux(tmp_path / "clip.mp4", frames)
    report = report_file(tmp_path / "clip.mp4")
    assert report.values["picture"]["size"] == [480, 360]
    assert tuple(report.drawing.curves.thumbnails.shape) == (3, 144, 192, 3)
    assert report.values["picture"]["brightness"] == pytest.approx(
        float(picture_curves(frames).brightness.mean()), abs=0.01
    )
    assert read_video(tmp_path / "clip.mp4").size == (480, 360)


# ---------------------------------------------------------------- the command


@pytest.fixture
def nava(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["report", *(str(argument) for argument in arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command_says_what_is_wrong_and_writes_where_it_is_told(nava, tmp_path, good):
    mux(tmp_path / "clip.mp4", good, torch.zeros(2, 4 * RATE), RATE)
    code, out, _ = nava("clip.mp4")
    assert code == 0
    assert "FAULT (silence) 100 %" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]
    assert nava("clip.mp4", "--strict")[0] == 1
    assert nava("clip.mp4", "--json", "a.json", "--picture", "b.png")[0] == 0
    assert json.loads((tmp_path / "a.json").read_text())["faults"][0]["measure"] == "silence"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = nava("clip.mp4", "--json", "a.json")
    assert (code, "already there" in err) == (2, True)
    assert nava("clip.mp4", "--json", "a.json", "--overwrite")[0] == 0


def test_a_folder_of_a_batch_keeps_its_own_report(nava, tmp_path, good):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "report.jsonl").write_text("{}\n")
    for name in ("a.mp4", "b.mp4", "report.mp4"):
        mux(folder / name, good[:24], knocks((0.5,), 1.0), RATE)
    write_wav(folder / "a.wav", sine(300, 1, -20), RATE)
    (folder / "broken.mp4").write_text("no video")
    code, _, err = nava("clips", "--json")
    assert code == 1
    assert "4 of 5 clips were measured" in err
    assert "Cannot read broken.mp4" in err
    assert (folder / "report.jsonl").read_text() == "{}\n"
    made = sorted(path.name for path in folder.glob("*.json"))
    assert made == ["a.mp4.report.json", "a.wav.report.json", "b.report.json", "report.report.json"]
    assert [json.loads((folder / name).read_text())["clip"] for name in made[:2]] == ["a.mp4", "a.wav"]
    assert "picture" not in json.loads((folder / made[1]).read_text())


def test_any_recogniser_and_the_voices_on_the_command_line(nava, tmp_path):
    write_wav(tmp_path / "talk.wav", talk(hum(110, 1.2), hum(190, 1.0)), 16000)
    write_wav(tmp_path / "her.wav", HIGH, 16000)
    (tmp_path / "asr.py").write_text(
        "import sys, wave; wave.open(sys.argv[1]); print('good evening'); print('come on in')"
    )
    asr = f'"{sys.executable}" asr.py {{file}}'
    code, _, err = nava(
        "talk.wav", "--prompt", TWO, "--asr", asr, "--voice", "2=her.wav",
        "--speaker-encoder", GOLDEN / "redimnet_small.pt", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads((tmp_path / "talk.report.json").read_text())
    assert told["words"]["transcript"] == "good evening\ncome on in"
    assert told["words"]["rate"] == 0.2
    assert [span["voice"] for span in told["speech"]["spans"]] == [None, 1]
    (tmp_path / "asr.py").write_text("raise SystemExit(3)")
    code, _, err = nava("talk.wav", "--prompt", TWO, "--asr", asr)
    assert code == 1
    assert "failed with exit code 3" in err


def test_saved_voices_serve_if_the_same_encoder_made_them(nava, tmp_path):
    write_wav(tmp_path / "talk.wav", talk(hum(110, 1.2)), 16000)
    encoder = GOLDEN / "redimnet_small.pt"
    voice = make_voice(load_redimnet(encoder), LOW, 16000, name="He")
    voice.save(tmp_path / "he.safetensors")
    options = ("--voice", "he.safetensors", "--speaker-encoder", encoder)
    code, out, err = nava("talk.wav", *options)
    assert code == 0, err
    assert "similarity 0.9" in out or "similarity 1.0" in out
    SavedVoice(voice.timbre, "0" * 32, 1.5, "He").save(tmp_path / "he.safetensors", overwrite=True)
    code, _, err = nava("talk.wav", *options)
    assert code == 1
    assert "made with another speaker encoder" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.mp4"], "There is no gone.mp4"),
        (["."], "There is no clip in ."),
        (["a.wav", "--asr", "whisper"], 'say where the file goes, as in "command {file}"'),
        (["a.wav", "--asr", "x {file}", "--transcript", "y"], "not both"),
        (["a.wav", "--prompt", "<S>yes"], "never closed"),
        (["a.wav", "--prompt", TWO, "--voice", "3=a.wav"], "there is no span 3"),
        (["a.wav", "--prompt", TWO, "--voice", "a.wav"], "give --speaker-encoder FILE"),
        (["a.wav", "--prompt", "Rain.", "--voice", "1=a.wav"], "there is no span 1"),
        (["a.wav", "--voice", "gone.wav"], "no voice"),
        (["--json", "a.wav"], "required: CLIP"),
        (["a.wav", "--json", "b.txt"], "is no name of a .json file"),
        (["a.wav", "b.wav", "--json", "b.json"], "one file for 2 clips"),
        (["a.wav", "--picture", "gone/b.png"], "there is no folder"),
        (["a.wav", "--max-seconds", "0"], "above 0"),
    ],
)
def test_a_wrong_command_is_one_sentence(nava, tmp_path, arguments, words):
    if arguments != ["."]:
        for name in ("a.wav", "b.wav"):
            write_wav(tmp_path / name, sine(300, 0.5, -20), RATE)
    code, out, err = nava(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
