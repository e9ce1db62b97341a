"""Decoding as it comes: equal to the libraries' own, constant in memory, and on to a smaller form where memory ends."""

import gc
import re
import weakref
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_memory import LiveMemory
from nava_core.components import load_audio_vae, load_video_vae
from nava_core.components.audio_vae import AudioVAE, vae_config
from nava_core.components.video_vae import COUNTS, VideoVAE, _Decoder, video_vae_config
from nava_core.decoding import (
    BY_FRAME,
    BY_FRAME_IN_RAM,
    IN_PIECES,
    WHOLE,
    DecodeForm,
    Decoding,
    choose_form,
    collect,
    forms,
    frames,
    sound,
    stream_frames,
)
from nava_core.demo import AUDIO_CONFIG, make_small_models
from nava_core.explain import TooLittleMemoryError, explain, is_out_of_memory
from nava_core.offload import Placement
from nava_core.parallel.workers import LostWorkerError
from nava_core.pipeline import decode

diffusers = pytest.importorskip("diffusers", reason="the standalone VAEs need diffusers")

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README_LINES = ("whole frames |", "whole frames, one at a time", "the same, what is remembered", "tiles of 256 pixels")
FP32 = torch.float32
DTYPES = [FP32, torch.bfloat16]
TILES = DecodeForm(tile=64, overlap=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)


@pytest.fixture(scope="module")
def vaes(models):
    return {dtype: load_video_vae(models["video_vae"], dtype=dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def vae(vaes):
    return vaes[torch.float32]


@pytest.fixture(scope="module")
def audio_vae(models):
    return load_audio_vae(models["audio_vae"])


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_diffusers(vae, latent):
    """Frames as diffusers decodes them whole, in its own loop."""
    with torch.no_grad():
        decoded = vae.network.decode(latent.to(vae._dtype)).sample[0].float()
    vae.network.clear_cache()
    return ((decoded + 1) / 2).clamp(0, 1).movedim(0, -1)


# --- equal to whole decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 4, 6), (5, 3, 5), (4, 9, 7)])
def test_streamed_frames_are_those_of_whole_decoding_bit_for_bit(vaes, dtype, shape):
    latent = noise(1, 48, *shape)
    parts = list(vaes[dtype].stream(latent))
    assert [len(part) for part in parts] == [1] + [4] * (shape[0] - 1)
    whole = of_diffusers(vaes[dtype], latent)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(vaes[dtype].decode(latent), whole)
    assert whole.std() > 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 3), (5, 4, 6), (4, 9, 7)])
def test_one_frame_at_a_time_gives_the_same_numbers_up_to_rounding(vaes, dtype, shape):
    latent = noise(1, 48, *shape)
    whole = vaes[dtype].decode(latent)
    single = vaes[dtype].decode(latent, BY_FRAME)
    assert single.shape == whole.shape
    assert (single - whole).abs().max() < (1e-5 if dtype is torch.float32 else 4 / 255)
    assert (single - whole).square().mean().sqrt() < (2e-6 if dtype is torch.float32 else 1 / 255)
    assert torch.equal(vaes[dtype].decode(latent, BY_FRAME_IN_RAM), single)


def test_the_real_width_gives_the_same_numbers_in_every_form_of_whole_frames():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = VideoVAE(real_network())
        for name, parameter in vae.network.decoder.named_parameters():
            is_gain = "gamma" in name
            parameter.data = torch.ones_like(parameter) if is_gain else parameter.data
    latent = noise(1, 48, 3, 2, 3)
    whole = of_diffusers(vae, latent)
    assert torch.equal(vae.decode(latent), whole)
    assert (vae.decode(latent, BY_FRAME) - whole).abs().max() < 1e-5
    assert whole.std() > 1e-3


def test_two_streams_at_a_time_and_an_encode_between_do_not_meet(vae):
    one, other = noise(1, 48, 3, 2, 3), noise(1, 48, 3, 4, 2, seed=2)
    frame = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    expected = vae.decode(one), vae.decode(other), vae.encode(frame)
    first, second = vae.stream(one), vae.stream(other)
    parts = [next(first), next(second), next(first)]
    assert torch.equal(vae.encode(frame), expected[2])
    assert torch.equal(torch.cat([parts[0], parts[2], *first]), expected[0])
    assert torch.equal(torch.cat([parts[1], *second]), expected[1])
    third = vae.stream(one.clone().requires_grad_())
    assert not next(third).requires_grad
    assert torch.is_grad_enabled()  # which a stream leaves as it was, between its parts too


def test_steps_are_told_and_what_they_raise_ends_the_stream(vae):
    seen = []
    vae.decode(noise(1, 48, 3, 2, 3), step=lambda *step: seen.append(step))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    seen.clear()
    vae.decode(noise(1, 48, 2, 6, 4), TILES, step=lambda *step: seen.append(step))
    assert seen == [(done, 4) for done in range(5)]  # two tiles of two latent frames

    def stop(done, _):
        if done == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        vae.decode(noise(1, 48, 3, 2, 3), step=stop)


# --- tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tile_is_the_whole_bit_for_bit(vaes, dtype):
    latent = noise(1, 48, 3, 4, 4)
    assert torch.equal(vaes[dtype].decode(latent, TILES), vaes[dtype].decode(latent))


@pytest.mark.parametrize("tile", [64, 80, 128, 256])
@pytest.mark.parametrize("overlap", [0, 16, 32])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 9, 16, 17, 44, 80])
def test_tiles_cover_a_side_with_shares_of_one(tile, overlap, length):
    form = DecodeForm(tile, overlap)
    places, shares = forms.tile_places(length, form), frames._weights(length, form)
    side = forms.tile_side(form, length)
    total = torch.zeros(16 * length)
    for begin in places:
        assert shares[begin].min() > 0
        total[16 * begin : 16 * (begin + side)] += shares[begin]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert places[0] == 0
    assert places[-1] == length - side
    for left, right in pairwise(places):
        assert left + side - right >= overlap // 16


def test_a_tile_far_from_the_others_is_its_own_whole_decode(vae):
    """Where one tile alone has a pixel, it is what decoding that part of the latent gives."""
    latent = noise(1, 48, 2, 4, 7)
    tiled = vae.decode(latent, TILES)
    assert torch.equal(tiled[:, :, :48], vae.decode(latent[..., :4])[:, :, :48])
    assert torch.equal(tiled[:, :, -48:], vae.decode(latent[..., -4:])[:, :, -48:])
    mixed = tiled[:, :, 48:64]
    ramp = (torch.arange(16) + 0.5).view(1, 1, 16, 1) / 16
    left, right = vae.decode(latent[..., :4])[:, :, 48:], vae.decode(latent[..., -4:])[:, :, :16]
    torch.testing.assert_close(mixed, left * (1 - ramp) + right * ramp, rtol=0, atol=1e-6)


def test_tiles_in_rounds_are_tiles_at_once_bit_for_bit(vae, monkeypatch):
    latent = noise(1, 48, 7, 6, 5)
    once = vae.decode(latent, TILES)
    monkeypatch.setattr(frames, "round_of", lambda *_: (2, 0))
    parts = list(vae.stream(latent, TILES))
    assert [len(part) for part in parts] == [5, 8, 8, 4]
    assert torch.equal(torch.cat(parts), once)


def test_seams_of_tiles_are_small_and_smaller_in_larger_tiles(vae):
    """Random weights at a small width: that it holds here says that tiles are blended, not how real ones look."""
    latent = noise(1, 48, 2, 24, 24)
    whole = vae.decode(latent)
    errors = [
        (vae.decode(latent, form) - whole).square().mean().sqrt().item()
        for form in (DecodeForm(64, 16), DecodeForm(128, 32), DecodeForm(256, 64))
    ]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.03 < whole.std()


# --- memory ------------------------------------------------------------------------------------------------------


def real_network():
    """Of the released width; in the default type, on the default device."""
    shapes = {
        "encoder.conv1.weight": (160, 12),
        "decoder.conv1.weight": (1024, 48),
        "decoder.head.0.gamma": (256,),
        "decoder.head.2.weight": (12,),
        **{f"encoder.downsamples.{n}.downsamples.0.residual.6.weight": (160 * m,) for n, m in enumerate((1, 2, 4, 4))},
        **{f"encoder.downsamples.{n}.downsamples.{b}.residual.2.weight": () for n in range(4) for b in range(2)},
        **{f"encoder.downsamples.{n}.downsamples.2.time_conv.weight": () for n in (1, 2)},
    }
    return diffusers.AutoencoderKLWan(**video_vae_config(shapes, "released"))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def counted(vae, shape, form, device):
    """Peak bytes of live tensors on ``device`` beside weights and the latent, and the frames that came."""
    latent = torch.zeros(shape)
    with LiveMemory(device) as memory:
        memory.ignore(*vae.parameters(), *vae.buffers(), latent)
        count = sum(len(part) for part in vae.stream(latent, form))
    return memory.peak, count


@pytest.mark.parametrize("form", [WHOLE, BY_FRAME, TILES], ids=str)
def test_memory_is_constant_in_the_clips_length(vae, form, monkeypatch):
    monkeypatch.setattr(frames, "round_of", lambda *_: (2, 0))
    (short, few), (long, many) = (counted(vae, (1, 48, count, 5, 4), form, None) for count in (9, 37))
    assert (few, many) == (33, 145)
    latent = (37 - 9) * 48 * 5 * 4 * 4
    assert long - short <= latent < short / 10  # the latent itself, made ready


@pytest.mark.parametrize("dtype", DTYPES)
def test_estimates_are_what_a_gpu_holds_at_the_released_size(dtype):
    """Counted tensor by tensor at 1280x704 on a GPU that is played: its tensors have sizes and a device, no values."""
    shape = (1, 48, 4, 44, 80)
    peaks = []
    with FakeTensorMode():
        with default_dtype(dtype), torch.device("cuda"):
            vae = VideoVAE(real_network())
        for form in (WHOLE, BY_FRAME, BY_FRAME_IN_RAM):
            peak, count = counted(vae, shape, form, "cuda")
            assert count == 13
            assert 1.1 < vae.decode_bytes(shape, form) / peak < 1.2  # 15 % for what is not counted
            peaks.append(peak / 1e9)
        assert counted(vae, (1, 48, 7, 44, 80), BY_FRAME_IN_RAM, "cuda")[0] == pytest.approx(peaks[2] * 1e9, rel=1e-6)
        tile = DecodeForm(256, 64)
        peak, _ = counted(vae, (1, 48, 4, 16, 16), tile, "cuda")
        assert 1.1 < vae.decode_bytes(shape, tile) / peak < 1.2
        peaks.append(peak / 1e9)
    size = dtype.itemsize / 2
    for peak, line in zip(peaks, README_LINES, strict=True):
        row = next(row for row in README.splitlines() if row.startswith(f"| {line}")).split("|")
        assert float(re.search(r"[\d.]+", row[3])[0]) == pytest.approx(peak / size, abs=0.051)
    assert vae.decode_ram(shape, BY_FRAME_IN_RAM) / 1e9 == pytest.approx(3.22 * size, rel=0.01)


def test_ram_of_tiles_is_that_of_the_frames_and_then_constant():
    with torch.device("meta"):
        vae = VideoVAE(real_network().bfloat16())
    tile = DecodeForm(256, 64)
    ram = {count: vae.decode_ram((1, 48, count, 44, 80), tile) for count in (7, 37, 61, 361, 1000)}
    frame = 1280 * 704 * 3 * 4
    assert ram[7] == 25 * frame
    assert ram[37] == 145 * frame
    assert ram[361] == ram[1000] < 1441 * frame
    assert ram[1000] / 1e9 == pytest.approx(7.3, abs=0.2)


def test_what_is_remembered_comes_back_to_where_it_is_needed(vae):
    memory = frames.FrameMemory(torch.device("cpu"))
    assert memory[3] is None
    memory[3] = torch.ones(1)
    memory[4] = "Rep"
    assert (memory[3].item(), memory[4]) == (1, "Rep")
    memory.move(torch.device("meta"))
    assert (memory[3].device.type, memory[4]) == ("meta", "Rep")


# --- which form --------------------------------------------------------------------------------------------------


def names(found):
    return [str(form) for form in found]


def forms_of(decoding, rows, columns, **device):
    return decoding.forms(rows, columns, lambda form: COUNTS.device_bytes(form, rows, columns, 256, FP32), **device)


def test_forms_in_their_order_each_smaller_than_the_one_before():
    assert names(forms_of(Decoding(), 44, 80, on_gpu=True)) == [
        "whole frames",
        "whole frames, one at a time",
        "whole frames, one at a time, what is remembered between them in RAM",
        "tiles of 256 pixels",
        "tiles of 128 pixels",
    ]
    assert names(forms_of(Decoding(), 44, 80, on_gpu=False))[1:] == [
        "whole frames, one at a time",
        "tiles of 256 pixels",
        "tiles of 128 pixels",
    ]
    assert names(forms_of(Decoding("tiled", tile=512), 44, 80, on_gpu=True)) == [
        "tiles of 512 pixels",
        "tiles of 256 pixels",
        "tiles of 128 pixels",
    ]
    assert names(forms_of(Decoding("whole"), 26, 28, on_gpu=True))[3:] == ["tiles of 256 pixels", "tiles of 128 pixels"]
    assert names(forms_of(Decoding("whole"), 20, 20, on_gpu=True))[3:] == ["tiles of 128 pixels"]
    assert names(forms_of(Decoding("whole"), 8, 8, on_gpu=True))[3:] == []
    assert [form.overlap for form in forms_of(Decoding(tile=256, overlap=128), 44, 80, on_gpu=True)[3:]] == [128, 64]


@pytest.mark.parametrize(
    ("choice", "free", "first"),
    [
        ("auto", 100, "whole frames"),
        ("auto", 7, "whole frames, one at a time"),
        ("auto", 4, "whole frames, one at a time, what is remembered between them in RAM"),
        ("auto", 1, "tiles of 256 pixels"),
        ("auto", 0.1, "tiles of 128 pixels"),
        ("whole", 7, "whole frames, one at a time"),
        ("whole", 0.1, "whole frames, one at a time, what is remembered between them in RAM"),
        ("tiled", 100, "tiles of 256 pixels"),
        ("tiled", 0.1, "tiles of 128 pixels"),
    ],
)
def test_the_first_form_that_there_is_memory_for(choice, free, first):
    decoding = Decoding(choice)
    needed = dict(zip(forms_of(Decoding(), 44, 80, on_gpu=True), (9.7, 6.4, 3.6, 0.7, 0.2), strict=True))
    found = choose_form(decoding, forms_of(decoding, 44, 80, on_gpu=True), lambda form: needed[form] <= free)
    assert str(found[0]) == first
    assert str(found[-1]) == "tiles of 128 pixels"


def test_choices_that_cannot_be_are_refused_in_a_sentence():
    for wrong, words in (
        ({"choice": "fast"}, "Decoding is one of auto, whole, tiled; got 'fast'"),
        ({"tile": 32}, "Tiles of 32 pixels are too small"),
        ({"tile": 128, "overlap": 80}, "overlap by 0 to 64 pixels, not 80"),
        ({"overlap": -16}, "not -16"),
    ):
        with pytest.raises(ValueError, match=words):
            Decoding(**wrong)


# --- where memory ends -------------------------------------------------------------------------------------------


class Parts:
    """Components of a machine whose GPU is played: the VAEs stay on the CPU, ``free`` bytes are said to be free."""

    def __init__(self, component, free=10**12, device="cuda"):
        self.component, self.free, self.at = component, free, torch.device(device)
        self.said, self.asked = [], []

    def home(self, _):
        return self.at

    def empty_video_vae(self):
        return self.component

    def find_place(self, _, least):
        return Placement(self.at)

    @contextmanager
    def loaded(self, _, where):
        yield self.component

    def say(self, text):
        self.said.append(text)

    def make_room(self, needed):
        self.asked.append(needed)
        return needed <= self.free


@contextmanager
def full(module, when):
    """A GPU that is full in a pass through ``module``, the decoder's or another, ``when`` says so of its input."""

    def allocate(_module, inputs):
        if when(inputs[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.91 GiB.")

    hook = module.register_forward_pre_hook(allocate)
    try:
        yield
    finally:
        hook.remove()


def last_level(vae):
    return vae.network.decoder.up_blocks[-1].resnets[0]


def test_whole_frames_go_on_one_at_a_time_from_where_memory_ended(vae):
    latent, parts, passes = noise(1, 48, 5, 3, 4), Parts(vae), []

    def fourth_frame_of_four(frames_in):
        passes.append(frames_in.shape[2])
        return passes == [1, 4, 4]

    with full(last_level(vae), fourth_frame_of_four):
        decoded = [*decode.stream_video(parts, latent, Decoding())]
    chosen, fallen = parts.said
    assert chosen == "Decoding the picture in whole frames."
    assert fallen.startswith("Out of memory while decoding the picture in whole frames: going on from frame 6 in whole")
    assert fallen.endswith(" in whole frames, one at a time.")
    assert passes == [1, 4, 4, *[1] * 17]
    assert [len(part) for part in decoded] == [1, 4, 4, 4, 4]
    torch.testing.assert_close(torch.cat(decoded), vae.decode(latent), rtol=0, atol=1e-5)


def test_every_form_is_tried_and_the_last_ends_in_a_sentence(vae):
    latent, parts = noise(1, 48, 1, 26, 28), Parts(vae)
    with full(last_level(vae), lambda _: True), pytest.raises(TooLittleMemoryError) as caught:
        decode.decode_video(parts, latent, Decoding())
    assert parts.said[0] == "Decoding the picture in whole frames."
    going_on = [text.split(": going on in ")[1] for text in parts.said[1:]]
    assert going_on == [
        "whole frames, one at a time.",
        "whole frames, one at a time, what is remembered between them in RAM.",
        "tiles of 256 pixels.",
        "tiles of 128 pixels.",
        "tiles of 128 pixels, on the CPU.",
    ]
    sentence = explain(caught.value)
    assert sentence.startswith("There is too little free memory for decoding the picture, even in tiles of 128 pixels")
    assert "smaller or shorter" in sentence
    assert "\n" not in sentence
    assert caught.value.__context__ is None  # which would keep the failed pass's tensors
    assert torch.equal(vae.decode(latent), of_diffusers(vae, latent))  # the VAE is whole after it


def test_tiles_take_over_where_whole_frames_do_not_fit(vae):
    latent, parts = noise(1, 48, 3, 12, 15), Parts(vae)
    with full(last_level(vae), lambda frames_in: frames_in.shape[-1] > 64):  # pixels, two of which are one here
        decoded = decode.decode_video(parts, latent, Decoding())
    assert parts.said[-1].endswith("going on in tiles of 128 pixels.")
    assert torch.equal(decoded, vae.decode(latent, DecodeForm(128, 64)))


def test_the_cpu_is_last_and_the_vae_keeps_its_type(vaes):
    latent, half = noise(1, 48, 2, 3, 4), vaes[torch.bfloat16]
    parts = Parts(half)
    before = half.decode(latent)
    with full(last_level(half), lambda frames_in: frames_in.dtype is torch.bfloat16):
        decoded = decode.decode_video(parts, latent, Decoding())
    assert parts.said[-1].endswith("on the CPU.")
    assert 0 < (decoded - before).abs().max() < 12 / 255  # in fp32 there
    assert {p.dtype for p in half.network.decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(half.decode(latent), before)


def test_what_a_failed_pass_held_is_gone_before_the_next_form_begins(vae):
    latent, held = noise(1, 48, 3, 4, 4), []

    class Watching(Parts):
        def make_room(self, needed):
            held.append(memory.current)
            return super().make_room(needed)

    parts = Watching(vae)
    with LiveMemory() as memory, full(last_level(vae), lambda frames_in: frames_in.shape[2] == 4):
        memory.ignore(*vae.parameters(), latent)
        stream = decode.stream_video(parts, latent, Decoding())
        for part in stream:
            del part
    assert held[0] == 0  # asked before the first form
    assert held[1] <= 64 * 64 * 3 * 4 < memory.peak / 10  # and after it failed: the one frame that it gave


def test_the_form_follows_from_the_memory_that_is_free(vae):
    latent = noise(1, 48, 2, 18, 24)
    found = forms_of(Decoding(), 18, 24, on_gpu=True)
    assert len(found) == 4
    for form in found:
        parts = Parts(vae, free=vae.decode_bytes(latent.shape, form))
        stream = decode.stream_video(parts, latent, Decoding())
        next(stream)
        stream.close()
        assert parts.said == [f"Decoding the picture in {form}."]


def test_short_ram_is_seen_on_the_cpu_and_for_what_waits_there(vae, monkeypatch):
    latent = noise(1, 48, 2, 12, 15)
    monkeypatch.setattr(decode, "free_ram", lambda: vae.decode_bytes(latent.shape, BY_FRAME))
    parts = Parts(vae, device="cpu")
    next(decode.stream_video(parts, latent, Decoding()))
    assert parts.said == ["Decoding the picture in whole frames, one at a time."]
    assert parts.asked == []
    parts = Parts(vae, free=vae.decode_bytes(latent.shape, BY_FRAME_IN_RAM))
    monkeypatch.setattr(decode, "free_ram", lambda: vae.decode_ram(latent.shape, BY_FRAME_IN_RAM) - 1)
    next(decode.stream_video(parts, latent, Decoding()))
    assert parts.said == ["Decoding the picture in tiles of 128 pixels."]


def test_another_error_is_passed_on(vae, monkeypatch):
    parts = Parts(vae)
    monkeypatch.setattr(vae.network.decoder, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode.decode_video(parts, noise(1, 48, 2, 2, 2), Decoding())
    assert len(parts.said) == 1


def test_what_running_out_of_memory_looks_like():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ):
        assert is_out_of_memory(error)
    lost = LostWorkerError("A worker was lost, killed or out of memory.")
    for error in (RuntimeError("The network returned NaN."), ValueError("out of memory"), KeyError("x"), lost):
        assert not is_out_of_memory(error)


def test_a_stream_of_another_length_is_an_error(vae):
    with pytest.raises(RuntimeError, match="5 frames were decoded where there should be 9"):
        collect(vae.stream(noise(1, 48, 2, 2, 2)), 9)


def test_a_stream_that_is_left_gives_everything_back(vae):
    latent = noise(1, 48, 3, 3, 3)
    stream = stream_frames(_watched := decoder_of(vae), latent, WHOLE)
    next(stream)
    kept = [weakref.ref(value) for value in _watched.memory.values() if torch.is_tensor(value)]
    assert len(kept) > 20
    assert all(reference() is not None for reference in kept)
    del _watched.memory
    stream.close()
    gc.collect()
    assert all(reference() is None for reference in kept)


def decoder_of(vae):
    """The VAE's decoder, which shows the memory it was given."""

    class Watched(_Decoder):
        def frames(self, latent, memory, **settings):
            self.memory = memory
            return super().frames(latent, memory, **settings)

    return Watched(vae.network)


# --- sound -------------------------------------------------------------------------------------------------------


def test_sound_in_pieces_is_the_whole_up_to_rounding_and_without_a_seam(audio_vae, monkeypatch):
    latent = noise(1, 8, 110, 16)
    whole, pieces = audio_vae.decode(latent), audio_vae.decode(latent, IN_PIECES)
    assert pieces.shape == whole.shape == (1, 2, (4 * 110 - 3) * 480)
    assert (pieces - whole).abs().max() < 2e-6  # -114 dB of full scale
    assert whole.square().mean().sqrt() > 0.01
    monkeypatch.setattr(sound, "BEFORE", 12)  # less than a sample follows from
    assert (audio_vae.decode(latent, IN_PIECES) - whole).abs().max() > 1e-4


def test_short_sound_is_one_piece_in_every_form(audio_vae):
    latent = noise(1, 8, 26, 16)
    assert torch.equal(audio_vae.decode(latent, IN_PIECES), audio_vae.decode(latent))


def test_sound_goes_on_in_pieces_and_then_on_the_cpu(audio_vae):
    latent = noise(1, 8, 110, 16)
    whole = audio_vae.decode(latent)[0]
    for most, last in ((100, "pieces of 1.3 s"), (10, "pieces of 1.3 s, on the CPU")):
        parts, calls = Parts(audio_vae), []

        def too_many(steps, most=most, calls=calls):
            calls.append(steps.shape[2])
            return steps.shape[2] > most and len(calls) < 3

        with full(audio_vae.decoder, too_many):
            waveform, rate = decode.decode_audio(parts, latent, 4.4)
        assert parts.said[-1] == (
            f"Out of memory while decoding the sound in {'one piece' if most == 100 else 'pieces of 1.3 s'}: "
            f"going on in {last}."
        )
        assert (rate, waveform.shape) == (48000, (2, 211200))
        torch.testing.assert_close(waveform[:, : whole.shape[1]], whole, rtol=0, atol=2e-6)
    parts = Parts(audio_vae, free=audio_vae.decode_bytes(latent.shape) - 1)
    decode.decode_audio(parts, noise(1, 8, 5, 16), 0.2)
    with full(audio_vae.decoder, lambda _: True), pytest.raises(TooLittleMemoryError, match="decoding the sound, even"):
        decode.decode_audio(parts, latent, 4.4)


def test_estimates_of_sound_are_what_a_gpu_holds():
    ltx2 = pytest.importorskip("diffusers.pipelines.ltx2")
    config = {**AUDIO_CONFIG["audio_vae"]}
    params = config["model"]["params"]
    config = {**config, "model": {"params": {**params, "ddconfig": {**params["ddconfig"], "ch": 128}}}}
    with FakeTensorMode():
        with torch.device("cuda"):
            decoder = diffusers.AutoencoderKLLTX2Audio(**vae_config(config)).decoder
            vocoder = ltx2.LTX2VocoderWithBWE()  # LTX-2.3's are its defaults
            vae = AudioVAE(decoder, vocoder, torch.zeros(8, 1, 16), torch.ones(8, 1, 16))

        def peak(steps, *form):
            latent = torch.zeros(1, 8, steps, 16)
            with LiveMemory("cuda") as memory:
                memory.ignore(*vae.parameters(), *vae.buffers())
                vae.decode(latent, *form)
            return memory.peak

        assert 1 < vae.decode_bytes((1, 8, 152, 16)) / peak(152) < 1.3
        assert peak(152) / 1e9 == pytest.approx(0.262, rel=0.02)  # as in README
        pieces = peak(200, IN_PIECES)
        assert pieces == peak(500, IN_PIECES)
        assert 1 < vae.decode_bytes((1, 8, 200, 16), IN_PIECES) / pieces < 1.3
