"""NAVA Decode Video and Audio in process, on the host's real classes: equal to the host's own decode, in memory that
does not grow, and on to a smaller form where memory ends. No GPU is here: where one matters, it is played."""

import copy
import logging
import re
from contextlib import contextmanager

import comfy_host
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

comfy_host.import_comfyui()

import comfy.ldm.modules.diffusionmodules.model  # noqa: E402
import comfy.ldm.wan.vae2_2  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402

from benchmarks.live_memory import LiveMemory  # noqa: E402

video = comfy_host.pack_module("nodes.host.video_vae")
audio = comfy_host.pack_module("nodes.host.audio_vae")
shared = comfy_host.pack_module("nodes.host.vae")
decoding = comfy_host.pack_module("nava_core.decoding")
demo = comfy_host.pack_module("nava_core.demo")

MARGIN = comfy_host.pack_module("nava_core.decoding.forms").MARGIN
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
README = (comfy_host.ROOT / "README.md").read_text(encoding="utf-8")
Decoding, DecodeForm = decoding.Decoding, decoding.DecodeForm


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return demo.make_small_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _as_in_a_node():
    with torch.inference_mode():  # ComfyUI runs every node in it
        yield


@pytest.fixture(scope="module")
def vaes(models):
    """The video VAE in each type that the host decodes in."""
    loaded = video.load_video_vae(models["video_vae"])
    return {dtype: in_dtype(loaded, dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def vae(vaes):
    return vaes[torch.float32]


@pytest.fixture(scope="module")
def audio_vae(models):
    return audio.load_audio_vae(models["audio_vae"])


def in_dtype(vae, dtype):
    vae = copy.copy(vae)
    vae.first_stage_model = copy.deepcopy(vae.first_stage_model).to(dtype)
    vae.patcher = type(vae.patcher)(vae.first_stage_model, vae.device, vae.patcher.offload_device)
    vae.vae_dtype = dtype
    return vae


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(vae, latent, form, **settings):
    return list(decoding.stream_frames(video._Decoder(vae), latent, form, **settings))


# --- equal to the host's own decode ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 4, 6), (5, 3, 5), (4, 9, 7)])
@pytest.mark.parametrize("choice", ["auto", "whole"])
def test_frames_are_those_of_the_hosts_decode_bit_for_bit(vaes, dtype, shape, choice):
    latent = noise(1, 48, *shape)
    frames = video.decode_video(vaes[dtype], latent, Decoding(choice))
    assert frames.dtype is torch.float32
    assert frames.is_contiguous()
    assert torch.equal(frames, vaes[dtype].decode(latent)[0].float())
    assert frames.std() > 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 3), (5, 4, 6), (4, 9, 7)])
def test_one_frame_at_a_time_gives_the_same_numbers_up_to_rounding(vaes, dtype, shape):
    latent = noise(1, 48, *shape)
    whole = torch.cat(stream(vaes[dtype], latent, decoding.WHOLE))
    single = torch.cat(stream(vaes[dtype], latent, decoding.BY_FRAME))
    assert (single - whole).abs().max() < (1e-5 if dtype is torch.float32 else 4 / 255)
    assert torch.equal(torch.cat(stream(vaes[dtype], latent, decoding.BY_FRAME_IN_RAM)), single)


def test_a_batch_is_a_list_of_clips(vae):
    latent = noise(3, 48, 2, 2, 3)
    nested = comfy.nested_tensor.NestedTensor([latent, noise(3, 8, 6, 16)])
    clips = video.decode_video_clips(vae, {"samples": nested}, Decoding())
    assert [clip.shape for clip in clips] == [(5, 32, 48, 3)] * 3
    for clip, alone in zip(clips, latent, strict=True):
        assert torch.equal(clip, vae.decode(alone[None])[0])


def test_tiles_are_the_cores_and_one_tile_is_the_whole(vae):
    latent = noise(1, 48, 3, 4, 7)
    whole = video.decode_video(vae, latent)
    one = video.decode_video(vae, latent, Decoding("tiled", 256, 64))
    assert torch.equal(one, whole)
    tiled = video.decode_video(vae, latent, Decoding("tiled", 64, 16))
    left = video.decode_video(vae, latent[..., :4])
    assert torch.equal(tiled[:, :, :48], left[:, :, :48])
    assert 0 < (tiled - whole).abs().mean() < whole.std()


def test_the_core_without_a_host_gives_the_same_frames(models, vae):
    pytest.importorskip("diffusers")
    from nava_core.components import load_video_vae
    from nava_core.decoding import DecodeForm as Form

    core, latent = load_video_vae(models["video_vae"]), noise(1, 48, 3, 6, 7)
    for choice, form in (("whole", Form()), ("tiled", Form(64, 32))):
        frames = video.decode_video(vae, latent, Decoding(choice, 64, 32))
        assert (core.decode(latent.clone(), form) - frames).abs().max() < 1e-4


def test_another_network_is_left_to_the_host(models, monkeypatch):
    """The small preview decoder, and a network with a decode of its own."""
    preview = comfy.sd.VAE(load_file(models["tae"]))
    preview.first_stage_model.show_progress_bar = False
    latent = noise(1, 48, 2, 4, 6)
    frames = video.decode_video(preview, latent)
    assert torch.equal(frames, preview.decode(latent)[0].float())
    assert video.decode_video(preview, noise(1, 48, 1, 20, 20), Decoding("tiled", 256, 64)).shape == (1, 320, 320, 3)

    class Other(comfy.ldm.wan.vae2_2.WanVAE):
        def decode(self, z):
            return torch.zeros(1, 3, 4 * z.shape[2] - 3, 16 * z.shape[3], 16 * z.shape[4])

    other = in_dtype(video.load_video_vae(models["video_vae"]), torch.float32)
    other.first_stage_model.__class__ = Other
    assert (video.decode_video(other, latent) == 0.5).all()


def test_progress_is_told_and_an_interrupt_ends_it(vae, monkeypatch):
    told = []

    class Bar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            told.append((value, total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    video.decode_video(vae, noise(1, 48, 3, 2, 2))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    told.clear()

    def interrupted():
        if len(told) == 2:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        video.decode_video(vae, noise(1, 48, 3, 2, 2))
    assert len(told) == 2


# --- memory ------------------------------------------------------------------------------------------------------


def counted(vae, shape, form, device):
    latent = torch.zeros(shape)
    with LiveMemory(device) as memory:
        memory.ignore(*vae.first_stage_model.parameters(), latent)
        count = sum(len(part) for part in decoding.stream_frames(video._Decoder(vae), latent, form))
    return memory.peak, count


@pytest.mark.parametrize("form", [decoding.WHOLE, decoding.BY_FRAME], ids=str)
def test_memory_is_constant_in_the_clips_length(vae, form):
    with torch.inference_mode(False), torch.no_grad():
        (short, few), (long, many) = (counted(vae, (1, 48, count, 3, 4), form, None) for count in (9, 37))
    assert (few, many) == (33, 145)
    assert 0 <= long - short <= (37 - 9) * 48 * 3 * 4 * 4 < short / 10  # the latent itself, made ready


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_estimates_are_what_a_gpu_holds_at_the_released_size(dtype):
    """Counted tensor by tensor at 1280x704 on a GPU that is played: its tensors have sizes and a device, no values."""
    shape = (1, 48, 4, 44, 80)
    with released_on_gpu(dtype) as played:
        peaks = {}
        for form in (decoding.WHOLE, decoding.BY_FRAME, decoding.BY_FRAME_IN_RAM):
            peak, count = counted(played, shape, form, "cuda")
            assert count == 13
            estimate = video.COUNTS.device_bytes(form, 44, 80, 256, dtype)
            assert 1.1 < estimate / peak < 1.2  # 15 % for what is not counted
            peaks[form] = peak / 1e9 * 2 / dtype.itemsize
    row = next(line for line in README.splitlines() if line.startswith("| Video VAE at 1280x704, bf16 |"))
    for peak in peaks.values():
        assert f"{peak:.1f} GB" in row
    lines = ("whole frames |", "whole frames, one at a time", "the same, what is remembered")
    for peak, line in zip(peaks.values(), lines, strict=True):
        row = next(row for row in README.splitlines() if row.startswith(f"| {line}")).split("|")
        assert float(re.search(r"[\d.]+", row[2])[0]) == pytest.approx(peak, abs=0.051)
    assert video.COUNTS.ram_bytes(decoding.BY_FRAME_IN_RAM, shape, 256, torch.bfloat16) / 1e9 == pytest.approx(
        3.22, rel=0.01
    )


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("size", [(16, 16), (30, 52)])
def test_estimates_of_short_clips_and_other_sizes(size, frames):
    counts, dtype = video.COUNTS if frames > 1 else video.COUNTS_OF_ONE, torch.bfloat16
    with released_on_gpu(dtype) as played:
        for form in (decoding.WHOLE, decoding.BY_FRAME, decoding.BY_FRAME_IN_RAM):
            peak, _ = counted(played, (1, 48, frames, *size), form, "cuda")
            assert counts.device_bytes(form, *size, 256, dtype) / MARGIN == pytest.approx(peak, rel=0.15)


@contextmanager
def released_on_gpu(dtype):
    """The video VAE of the released size on a GPU that is played."""
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                network = video._video_network(video.RELEASED_WIDTHS)
        finally:
            torch.set_default_dtype(before)
        for layer in network.modules():
            if hasattr(layer, "optimized_attention"):  # the host's choice for a CPU asks how much of it is free
                layer.optimized_attention = comfy.ldm.modules.diffusionmodules.model.pytorch_attention
        yield Played(network, dtype)


class Played:
    """A VAE of the host as far as its decoder needs one, on a GPU that is not there."""

    def __init__(self, network, dtype):
        self.first_stage_model, self.vae_dtype = network, dtype
        self.device, self.output_device = torch.device("cuda"), torch.device("cpu")

    def vae_output_dtype(self):
        return torch.float32

    def process_output(self, image):
        return image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)


# --- which form, and where memory ends ---------------------------------------------------------------------------


@contextmanager
def full(module, when=lambda _: True):
    """A GPU that is full in a pass through ``module``, where ``when`` says so of its input."""

    def allocate(_module, inputs):
        if when(inputs[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.91 GiB.")

    hook = module.register_forward_pre_hook(allocate)
    try:
        yield
    finally:
        hook.remove()


def last_level(vae):
    return vae.first_stage_model.decoder.upsamples[-1].upsamples[0]


@pytest.mark.parametrize(
    ("choice", "shape", "free", "form"),
    [
        ("auto", (44, 80), 12, "whole frames"),
        ("auto", (44, 80), 6.5, "whole frames, one at a time"),
        ("auto", (44, 80), 3.1, "whole frames, one at a time, what is remembered between them in RAM"),
        ("auto", (44, 80), 1, "tiles of 256 pixels"),
        ("auto", (44, 80), 0.2, "tiles of 128 pixels"),
        ("whole", (44, 80), 1, "whole frames, one at a time, what is remembered between them in RAM"),
        ("tiled", (44, 80), 12, "tiles of 256 pixels"),
        ("auto", (30, 52), 3.1, "whole frames, one at a time"),
    ],
)
def test_the_form_follows_from_the_memory_that_the_host_makes(vae, monkeypatch, caplog, choice, shape, free, form):
    """The released width's needs in bf16 against ``free`` GB; nothing is decoded."""
    asked = []
    monkeypatch.setattr(video, "has_room", lambda _, needed: asked.append(needed) or needed <= free * 1e9)
    monkeypatch.setattr(video, "stream_in_forms", lambda *arguments, **_: iter([torch.zeros(5, 1, 1, 3)]))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 32 * 10**9)
    played = Played(vae.first_stage_model, torch.bfloat16)
    played.patcher, played.disable_offload = None, False
    monkeypatch.setattr(video._Decoder, "__init__", lambda decoder, vae: vars(decoder).update(
        vae=vae, network=vae.first_stage_model, device=vae.device, dtype=vae.vae_dtype, width=256
    ))  # fmt: skip
    with caplog.at_level(logging.INFO):
        video._decode_clip(played, torch.zeros(1, 48, 2, *shape), Decoding(choice))
    assert f"NAVA decodes {shape[1] * 16}x{shape[0] * 16} in {form}." in caplog.messages
    assert asked == sorted(asked, reverse=True)


def test_other_models_leave_a_gpu_for_the_decode(vae, monkeypatch):
    """The host is asked for what is needed beside the VAE's weights, and what it then has decides."""
    calls, free = [], {"bytes": 10**9}
    management = comfy.model_management
    monkeypatch.setattr(management, "free_memory", lambda needed, device: calls.append((needed, device)))
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 100)
    played = Played(None, torch.bfloat16)
    played.model_size = lambda: 50
    played.patcher = type("Patcher", (), {"get_free_memory": lambda self, device: free["bytes"]})()
    assert shared.has_room(played, 10**9 - 150)
    assert not shared.has_room(played, 10**9 - 149)
    assert calls == [(10**9, played.device), (10**9 + 1, played.device)]


def test_every_form_is_tried_with_a_warning_and_the_last_ends_in_a_sentence(vae, caplog, monkeypatch):
    latent, unloaded = noise(1, 48, 1, 26, 28), []
    unload = comfy.model_management.unload_all_models
    monkeypatch.setattr(comfy.model_management, "unload_all_models", lambda: unloaded.append(1) or unload())
    short = pytest.raises(shared.TooLittleMemoryError)
    with caplog.at_level(logging.WARNING), full(last_level(vae)), short as caught:
        video.decode_video(vae, latent)
    assert [message.split(": going on in ")[1] for message in caplog.messages] == [
        "whole frames, one at a time.",
        "tiles of 256 pixels.",
        "tiles of 128 pixels.",
    ]
    assert len(unloaded) == 4
    sentence = str(caught.value)
    for words in ("decoding the picture, even in tiles of 128 pixels", "smaller or shorter", "--cpu-vae"):
        assert words in sentence
    assert "\n" not in sentence
    assert caught.value.__context__ is None  # which would keep the failed pass's tensors
    assert torch.equal(video.decode_video(vae, latent), vae.decode(latent)[0])  # the VAE is whole after it


def test_the_rest_of_a_clip_comes_in_the_next_form(vae, caplog):
    latent, passes = noise(1, 48, 5, 3, 4), []

    def third(frames_in):
        passes.append(frames_in.shape[2])
        return passes == [1, 4, 4]

    with caplog.at_level(logging.WARNING), full(last_level(vae), third):
        frames = video.decode_video(vae, latent)
    assert "Out of memory while decoding the picture in whole frames: going on from frame 6 in" in caplog.text
    torch.testing.assert_close(frames, vae.decode(latent)[0], rtol=0, atol=1e-5)


def test_what_a_failed_pass_held_is_gone_before_the_next_form_begins(vae, monkeypatch):
    held = []
    recover = shared.free_all
    monkeypatch.setattr(shared, "free_all", lambda: held.append(memory.current) or recover())
    latent = noise(1, 48, 3, 4, 4)
    four_at_a_time = full(last_level(vae), lambda frames_in: frames_in.shape[2] == 4)
    with torch.inference_mode(False), torch.no_grad(), LiveMemory() as memory, four_at_a_time:
        memory.ignore(*vae.first_stage_model.parameters(), latent)
        picture = video.decode_video(vae, latent).untyped_storage().nbytes()
    assert held[0] <= picture + 64 * 64 * 3 * 4 < memory.peak / 2  # the picture, of which one frame is there


def test_another_error_is_passed_on(vae, monkeypatch):
    monkeypatch.setattr(vae.first_stage_model.decoder, "forward", lambda *_, feat_cache, feat_idx, first_chunk: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video.decode_video(vae, noise(1, 48, 2, 2, 2))


def test_tiles_that_cannot_be_are_one_sentence():
    nodes = comfy_host.pack_module("nodes.decode")
    latent = {"samples": noise(1, 48, 1, 2, 2)}
    with pytest.raises(ValueError, match="Tiles of 128 pixels can overlap by 0 to 64 pixels, not 96"):
        nodes.NavaDecodeVideo.execute(latent, None, "tiled", 128, 96)


# --- sound -------------------------------------------------------------------------------------------------------


def test_sound_goes_on_in_pieces_that_are_the_whole(audio_vae, caplog):
    latent = noise(1, 8, 110, 16)
    whole = audio.decode_audio(audio_vae, latent)["waveform"]
    decoder = audio.audio_module(audio_vae).autoencoder.decoder
    with caplog.at_level(logging.WARNING), full(decoder, lambda steps: steps.shape[2] > 100):
        pieces = audio.decode_audio(audio_vae, latent)
    assert "Out of memory while decoding the sound in one piece: going on in pieces of 1.3 s." in caplog.messages
    assert pieces["sample_rate"] == 48000
    assert pieces["waveform"].shape == whole.shape
    assert (pieces["waveform"] - whole).abs().max() < 2e-6
    batch = noise(2, 8, 110, 16)
    with full(decoder, lambda steps: steps.shape[2] > 100):
        both = audio.decode_audio(audio_vae, batch)["waveform"]
    torch.testing.assert_close(both[1:], audio.decode_audio(audio_vae, batch[1:])["waveform"], rtol=0, atol=2e-6)
