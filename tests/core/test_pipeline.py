"""The whole job without a host: clips against a plain composition of their parts, files, memory, interruption."""

import errno
import json
import math
import os
import socket
import sys
import wave
import weakref

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.live_memory import LiveMemory
from nava_core.checkpoint import WrongFileError, load_backbone
from nava_core.components import (
    denormalize_video,
    load_audio_vae,
    load_text_encoder,
    load_tokenizer,
    load_video_vae,
    normalize_video,
)
from nava_core.demo import AUDIO_CONFIG, make_small_models
from nava_core.explain import TooLittleMemoryError, explain
from nava_core.geometry import ClipGeometry, audio_latent_to_tokens, audio_tokens_to_latent
from nava_core.media import NonFiniteError
from nava_core.pipeline import (
    NAMES,
    VAES,
    Clip,
    ClipDecoder,
    ClipLatents,
    Components,
    Decoding,
    ModelFiles,
    NavaPipeline,
    choose_device,
    clip_geometry,
    clip_noise,
    decode,
    default_guidance,
    find_model_files,
    fit_picture,
    memory,
    stages,
)
from nava_core.prompt import default_negative, timbre_inputs
from nava_core.sampling import Guidance, Interrupted, denoise, find_preset, flow_sigmas
from nava_core.timbre import encode_timbre, load_redimnet

pytest.importorskip("diffusers", reason="the standalone VAEs need diffusers")
pytest.importorskip("transformers", reason="the standalone text encoder needs transformers")

PROMPT = "Two friends in a kitchen. One says <S>good morning<E>, the other <S>hello there<E>."
SHORT = {"seconds": 0.5, "width": 64, "height": 32, "steps": 2, "seed": 5}
FRAMES = 13
ROLES = ("backbone", "text_encoder", "video_vae", "audio_vae", "speaker_encoder")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)


@pytest.fixture(scope="module")
def files(models):
    return ModelFiles(**{role: models[role] for role in ROLES})


@pytest.fixture(scope="module")
def pipeline(files):
    return NavaPipeline.from_files(files, device="cpu")


@pytest.fixture(scope="module")
def voice():
    time = torch.arange(48000) / 16000
    return sum(torch.sin(2 * math.pi * 150 * k * time) / k for k in range(1, 6)).unsqueeze(0) / 4, 16000


@pytest.fixture(scope="module")
def picture():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 120), indexing="ij")
    return torch.stack([rows, columns, (torch.sin(12 * rows * columns) + 1) / 2], dim=-1)


@pytest.fixture(scope="module")
def clip(pipeline, picture, voice):
    return pipeline(PROMPT, image=picture, size_from_image=False, voices=[voice], negative="blurred", **SHORT)


@pytest.fixture
def _latents_only(monkeypatch):
    monkeypatch.setattr(decode, "decode_video", lambda *_: None)
    monkeypatch.setattr(decode, "decode_audio", lambda *_: (None, 0))


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the pipeline asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- what a clip is made of --------------------------------------------------------------------------------------


def test_a_clip_is_the_plain_composition_of_its_parts(models, clip, picture, voice):
    tokenizer, encoder = load_tokenizer(models["text_encoder"]), load_text_encoder(models["text_encoder"])
    tokens = tokenizer(PROMPT)
    timbre = encode_timbre(load_redimnet(models["speaker_encoder"]), *voice)
    timbres, positions = timbre_inputs(tokens, [timbre])
    geometry = ClipGeometry(0.5, 64, 32)
    vae = load_video_vae(models["video_vae"])
    first = vae.encode(fit_picture(picture, geometry))
    start = torch.zeros(1, 48, 4, 2, 4)
    start[:, :, :1] = first
    mask = torch.ones(1, 1, 4, 2, 4)
    mask[:, :, 0] = 0
    generator = torch.Generator().manual_seed(5)
    video_noise = torch.randn(1, 48, 4, 2, 4, generator=generator)
    audio_noise = torch.randn(1, 8, 14, 16, generator=generator)
    video, audio = denoise(
        load_backbone(models["backbone"]),
        video_noise,
        audio_latent_to_tokens(audio_noise),
        encoder.encode(tokens.ids),
        sigmas=flow_sigmas(2),
        guidance=Guidance(video_text=2.0, audio_timbre=2.0),
        negative=encoder.encode(tokenizer("blurred").ids),
        timbre=timbres,
        timbre_positions=positions,
        video_latent=normalize_video(start),
        video_mask=mask,
    )
    assert torch.equal(clip.audio_latent, audio_tokens_to_latent(audio))
    assert torch.equal(clip.video_latent[:, :, 1:], denormalize_video(video)[:, :, 1:])
    assert torch.equal(clip.video_latent[:, :, :1], first)
    assert torch.equal(clip.frames, vae.decode(clip.video_latent))
    sound = load_audio_vae(models["audio_vae"]).decode(clip.audio_latent)[0]
    samples = round(FRAMES / 24 * 48000)
    assert sound.shape == (2, (4 * 14 - 3) * 480)  # a little short of the picture, and filled with silence
    assert torch.equal(clip.waveform, torch.nn.functional.pad(sound, (0, samples - sound.shape[1])))
    assert "Span 2: “hello there”" in clip.report
    assert "voice 1" in clip.report


def test_the_first_frame_of_the_clip_is_the_pictures_round_trip(models, clip, picture):
    vae = load_video_vae(models["video_vae"])
    round_trip = vae.decode(vae.encode(fit_picture(picture, ClipGeometry(0.5, 64, 32))))
    assert torch.allclose(clip.frames[:1], round_trip, atol=1e-5)


@pytest.mark.usefixtures("_latents_only")
def test_seed_prompt_voice_and_picture_matter_and_nothing_else_does(pipeline, clip, picture, voice):
    settings = {"image": picture, "size_from_image": False, "voices": [voice], "negative": "blurred", **SHORT}
    torch.manual_seed(99)  # the global generator has no part in it
    again = pipeline(PROMPT, **settings)
    assert torch.equal(again.video_latent, clip.video_latent)
    assert torch.equal(again.audio_latent, clip.audio_latent)
    for change in (
        {"seed": 6},
        {"voices": []},
        {"image": 1 - picture},
        {"negative": None},
        {"negative": "zero"},
        {"guidance": Guidance()},
    ):
        other = pipeline(PROMPT, **{**settings, **change})
        assert (other.audio_latent - clip.audio_latent).abs().max() > 1e-3, change
        assert (other.video_latent - clip.video_latent).abs().max() > 1e-3, change


@pytest.mark.usefixtures("_latents_only")
def test_voices_come_as_files_waveforms_or_embeddings_and_bind_as_assigned(pipeline, files, voice, tmp_path):
    samples, rate = voice
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples[0] * 32768).to(torch.int16).numpy().tobytes())
    stored = (samples * 32768).to(torch.int16).float() / 32768
    embedding = encode_timbre(load_redimnet(files.speaker_encoder), stored, rate)
    clips = [
        pipeline(PROMPT, voices=[each], assignment=[None, 0], mode="audio", **SHORT)
        for each in (tmp_path / "voice.wav", (stored, rate), embedding)
    ]
    assert torch.equal(clips[0].audio_latent, clips[2].audio_latent)
    assert torch.equal(clips[1].audio_latent, clips[2].audio_latent)
    assert clips[0].report.splitlines()[1].endswith("no voice given.")
    assert clips[0].report.splitlines()[2].endswith("voice 1.")
    short = pipeline(PROMPT, voices=[(samples[:, :8000], rate)], mode="audio", **SHORT)
    assert any(warning.startswith("Voice 1: The voice lasts only 0.50 s") for warning in short.warnings)


@pytest.mark.usefixtures("_latents_only")
def test_spans_said_to_have_no_voice_get_the_null_voice(pipeline):
    null = pipeline(PROMPT, assignment=[None, None], mode="audio", **SHORT)
    zeros = pipeline(PROMPT, voices=[torch.zeros(1, 192)], mode="audio", **SHORT)
    silent = pipeline(PROMPT, mode="audio", **SHORT)
    assert torch.equal(null.audio_latent, zeros.audio_latent)
    assert (null.audio_latent - silent.audio_latent).abs().max() > 1e-3


@pytest.mark.usefixtures("_latents_only")
def test_the_makers_other_closing_mark_makes_the_same_clip(pipeline):
    clips = [pipeline(prompt, mode="audio", **SHORT) for prompt in (PROMPT, PROMPT.replace("<E>", "</S>"))]
    assert torch.equal(clips[0].audio_latent, clips[1].audio_latent)
    assert clips[0].report == clips[1].report


def test_noise_is_drawn_picture_first_from_one_generator():
    geometry = ClipGeometry(0.5, 64, 32)
    video, audio = clip_noise(geometry, 2**63)
    torch.manual_seed(2**63)
    assert torch.equal(video, torch.randn(1, 48, 4, 2, 4))
    assert torch.equal(audio, torch.randn(1, 8, 14, 16))
    none, alone = clip_noise(ClipGeometry(0.5, mode="audio"), 3)
    torch.manual_seed(3)
    torch.randn(48)
    assert none is None
    assert torch.equal(alone, torch.randn(1, 8, 13, 16))
    assert clip_noise(ClipGeometry(0.5, 64, 32, "video"), 3)[1] is None


def test_guidance_is_the_makers_unless_given():
    for has_image, has_voice in ((False, False), (True, False), (False, True)):
        assert default_guidance(has_image, has_voice) == Guidance()
    both = default_guidance(True, True)
    assert (both.video_text, both.audio_timbre, both.audio_text) == (2.0, 2.0, 2.0)


def test_the_clip_takes_the_bucket_of_its_picture_unless_told_otherwise(picture):
    assert clip_geometry(1, 64, 32, "video", picture, True) == ClipGeometry(1, 1088, 832, "video")
    assert clip_geometry(1, 64, 32, "video", picture, True, 640) == ClipGeometry(1, 720, 544, "video")
    assert clip_geometry(1, 64, 32, "video", picture, False) == ClipGeometry(1, 64, 32, "video")
    with pytest.raises(ValueError, match="A first frame was given for a clip of sound alone"):
        clip_geometry(1, 64, 32, "audio", picture, True)


def test_a_picture_is_scaled_to_cover_and_cropped_about_its_centre(picture):
    fitted = fit_picture(picture, ClipGeometry(1, 64, 32))
    assert fitted.shape == (1, 32, 64, 3)
    rows = fitted[0, :, :, 0].mean(dim=1)  # red grows from top to bottom, 0 to 1 over 48 rows, of which 8..39 are left
    assert rows[0] == pytest.approx(8.5 / 48, abs=0.02)
    assert rows[-1] == pytest.approx(39.5 / 48, abs=0.02)
    same = fit_picture(picture[:80, :112], ClipGeometry(1, 112, 80))
    assert torch.equal(same[0], (picture[:80, :112] * 255).floor() / 255)


@pytest.mark.usefixtures("_latents_only")
def test_a_picture_file_is_the_same_as_its_pixels(pipeline, picture, tmp_path):
    levels = (picture * 255).to(torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "first.png")
    settings = {**SHORT, "size_from_image": False, "mode": "video"}
    from_file = pipeline("A pier.", image=tmp_path / "first.png", **settings)
    from_pixels = pipeline("A pier.", image=levels.float()[None] / 255, **settings)
    assert torch.equal(from_file.video_latent, from_pixels.video_latent)


def test_an_empty_prompt_is_the_null_and_needs_no_text_encoder(pipeline, monkeypatch):
    monkeypatch.setattr(memory, "load_text_encoder", None)
    clip = pipeline(" ", negative="zero", **SHORT)
    assert clip.report.startswith("Empty: the null")
    assert clip.frames.shape == (FRAMES, 32, 64, 3)


@pytest.mark.usefixtures("_latents_only")
@pytest.mark.parametrize(("mode", "kind"), [("video+audio", "video"), ("video", "video"), ("audio", "audio")])
def test_a_negative_not_chosen_is_the_built_in_chinese_one(pipeline, monkeypatch, mode, kind):
    negatives = []

    def watched(*args, negative, **settings):
        negatives.append(negative)
        return denoise(*args, negative=negative, **settings)

    monkeypatch.setattr(stages, "denoise", watched)
    by_default = pipeline(PROMPT, mode=mode, **SHORT)
    written = pipeline(PROMPT, mode=mode, negative=default_negative(kind, "zh"), **SHORT)
    for part in ("video_latent", "audio_latent"):
        ours, theirs = getattr(by_default, part), getattr(written, part)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(negatives[0], negatives[1])
    assert negatives[0].shape[1] > 50
    for zero in ("zero", ""):
        pipeline(PROMPT, mode=mode, negative=zero, **SHORT)
        assert negatives.pop() is None


@pytest.mark.usefixtures("_latents_only")
def test_a_negative_that_is_cut_is_warned_of(pipeline):
    clip = pipeline("A pier.", negative="word " * 600, mode="audio", **SHORT)
    assert any(warning.startswith("The negative is longer than 512 tokens: its last ") for warning in clip.warnings)
    assert pipeline("A pier.", mode="audio", **SHORT).warnings == ()


def test_bfloat16_is_near_float32(files, pipeline):
    half = NavaPipeline.from_files(files, device="cpu", dtype=torch.bfloat16)(PROMPT, **{**SHORT, "steps": 1})
    full = pipeline(PROMPT, **{**SHORT, "steps": 1})
    error = (half.video_latent - full.video_latent).square().mean().sqrt() / full.video_latent.std()
    assert 1e-4 < error < 0.2
    assert half.frames.dtype is torch.float32


# --- outputs -----------------------------------------------------------------------------------------------------


def streams(path):
    with av.open(str(path)) as container:
        found = {stream.type: stream for stream in container.streams}
        video, audio = found.get("video"), found.get("audio")
        return (
            None if video is None else (video.codec_context.name, video.width, video.height, video.average_rate),
            0 if video is None else sum(1 for _ in container.decode(video=0)),
            None if audio is None else (audio.codec_context.name, audio.rate, audio.codec_context.channels),
            [float(stream.duration * stream.time_base) for stream in container.streams],
        )


def test_a_clip_is_saved_with_picture_and_sound(clip, tmp_path):
    assert clip.save(tmp_path / "clip.mp4") == tmp_path / "clip.mp4"
    video, frames, audio, durations = streams(tmp_path / "clip.mp4")
    assert video == ("h264", 64, 32, 24)
    assert frames == FRAMES
    assert audio == ("aac", 48000, 2)
    assert durations == pytest.approx([FRAMES / 24, FRAMES / 24], abs=1e-3)


def test_sound_alone_is_saved_as_24_bit_wav_of_the_asked_length(pipeline, tmp_path):
    clip = pipeline(PROMPT, mode="audio", **SHORT)
    assert clip.frames is None
    assert clip.video_latent is None
    assert clip.audio_latent.shape == (1, 8, 13, 16)
    clip.save(tmp_path / "clip.wav")
    with wave.open(str(tmp_path / "clip.wav")) as file:
        assert file.getparams()[:4] == (2, 3, 48000, 24000)  # channels, bytes, rate, samples
    with pytest.raises(ValueError, match=r"Cannot write clip\.mp4: sound alone is written as \.wav"):
        clip.save(tmp_path / "clip.mp4")


def test_picture_alone_is_saved_without_a_sound_track(pipeline, tmp_path):
    clip = pipeline(PROMPT, mode="video", **SHORT)
    assert (clip.waveform, clip.audio_latent) == (None, None)
    clip.save(tmp_path / "clip.mp4")
    video, frames, audio, _ = streams(tmp_path / "clip.mp4")
    assert (video[0], frames, audio) == ("h264", FRAMES, None)
    with pytest.raises(ValueError, match=r"Cannot write clip\.wav: a clip with a picture is written as \.mp4"):
        clip.save(tmp_path / "clip.wav")


def test_a_file_is_whole_or_not_there(clip, tmp_path):
    def stop(frame, _):
        if frame == 5:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        clip.save(tmp_path / "clip.mp4", callback=stop)
    broken = Clip(clip.frames * math.nan, clip.waveform, 48000, None, None)
    with pytest.raises(NonFiniteError, match="video VAE"):
        broken.save(tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="does not exist"):
        clip.save(tmp_path / "nowhere" / "clip.mp4")


# --- latents and decoding ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(pipeline):
    return pipeline.denoise(PROMPT, **SHORT)


def test_a_clip_is_denoised_and_then_decoded(pipeline, latents):
    clip = pipeline(PROMPT, **SHORT)
    decoded = pipeline.decode(latents)
    for name in ("frames", "waveform", "video_latent", "audio_latent"):
        assert torch.equal(getattr(decoded, name), getattr(clip, name))
    assert (decoded.report, decoded.warnings, decoded.sample_rate) == (clip.report, clip.warnings, clip.sample_rate)
    assert latents.duration == FRAMES / 24
    assert latents.settings["prompt"] == PROMPT
    assert (latents.settings["seed"], latents.settings["steps"], latents.settings["shift"]) == (5, 2, 5.0)
    assert latents.settings["guidance"]["audio_timbre"] == 3.0


def test_the_streamed_file_is_that_of_the_frames_in_memory(pipeline, latents, models, tmp_path):
    """Also from the latents' file, by a decoder that has the VAEs alone."""
    vaes = ModelFiles(video_vae=models["video_vae"], audio_vae=models["audio_vae"])
    alone = ClipDecoder.from_files(vaes, device="cpu")
    latents.save(tmp_path / "clip.latents.safetensors")
    pipeline.decode(latents).save(tmp_path / "memory.mp4")
    pipeline.save(latents, tmp_path / "streamed.mp4")
    alone.save(ClipLatents.load(tmp_path / "clip.latents.safetensors"), tmp_path / "alone.mp4")
    whole = (tmp_path / "memory.mp4").read_bytes()
    assert (tmp_path / "streamed.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes() == whole


def test_sound_alone_and_picture_alone_are_streamed_too(pipeline, models, tmp_path):
    for mode, suffix, vae in (("audio", ".wav", "audio_vae"), ("video", ".mp4", "video_vae")):
        latents = pipeline.denoise(PROMPT, mode=mode, **SHORT)
        decoder = ClipDecoder.from_files(ModelFiles(**{vae: models[vae]}), device="cpu")
        decoder.save(latents, tmp_path / f"streamed{suffix}")
        decoder.decode(latents).save(tmp_path / f"memory{suffix}")
        assert (tmp_path / f"streamed{suffix}").read_bytes() == (tmp_path / f"memory{suffix}").read_bytes()


def test_ram_for_writing_a_clip_does_not_grow_with_its_frames(pipeline, tmp_path):
    def peak(count):
        latents = ClipLatents(torch.randn(1, 48, count, 4, 6), None, (4 * count - 3) / 24)
        with LiveMemory() as memory:
            memory.ignore(latents.video)
            pipeline.save(latents, tmp_path / f"{count}.mp4")
        return memory.peak

    short, long = peak(5), peak(25)
    assert long - short <= 20 * 48 * 4 * 6 * 4  # the latent itself; the frames between are 80 * 64 * 96 * 3 * 4 bytes


def test_the_sound_is_decoded_before_the_picture_and_progress_is_told(files, latents, tmp_path):
    said, seen = [], []
    pipeline = NavaPipeline.from_files(files, device="cpu", say=said.append)
    pipeline.save(latents, tmp_path / "clip.mp4", callback=lambda done, total: seen.append((done, total)))
    assert [text for text in said if text.startswith("Decoding")] == [
        "Decoding the sound.",
        "Decoding the picture in whole frames.",
    ]
    assert seen == [(done, 4) for done in range(5)]


def test_a_decode_that_ends_leaves_no_file_and_no_models(files, latents, alive, tmp_path):
    pipeline = NavaPipeline.from_files(files, device="cpu")

    def enough(done, _):
        if done == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pipeline.save(latents, tmp_path / "clip.mp4", callback=enough)
    for last in range(0, 6, 2):
        calls = iter([False] * last)
        with pytest.raises(Interrupted):
            pipeline.save(latents, tmp_path / "clip.mp4", should_stop=lambda calls=calls: next(calls, True))
    with pytest.raises(ValueError, match=r"Cannot write clip\.wav: a clip with a picture is written as \.mp4"):
        pipeline.save(latents, tmp_path / "clip.wav")
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        pipeline.save(latents, tmp_path / "nowhere" / "clip.mp4")
    assert list(tmp_path.iterdir()) == []
    assert_all_gone(alive)


def test_how_pictures_are_decoded_is_the_pipelines(files, latents, pipeline):
    said = []
    tiled = NavaPipeline.from_files(files, device="cpu", say=said.append, decoding=Decoding("tiled", 64, 16))
    decoded = tiled.decode(latents)
    assert "Decoding the picture in tiles of 64 pixels." in said
    assert torch.equal(decoded.frames, pipeline.decode(latents).frames)  # 64x32 are one tile


def test_the_next_clip_is_made_after_one_that_ran_out_of_memory(files, latents, monkeypatch):
    """A decode that no form gets through ends in a sentence; the pipeline is whole after it."""
    pipeline = NavaPipeline.from_files(files, device="cpu", keep_loaded=True)
    expected = pipeline.decode(latents)
    kept = pipeline.components._kept["video_vae"].network

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.91 GiB.")

    with monkeypatch.context() as short:
        short.setattr(kept.decoder.up_blocks[-1], "forward", full)
        with pytest.raises(TooLittleMemoryError, match="too little free memory for decoding the picture"):
            pipeline.decode(latents)
    assert torch.equal(pipeline.decode(latents).frames, expected.frames)


# --- interruption and errors -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_latents_only")
def test_a_preset_takes_the_place_of_steps_solver_and_scales(pipeline, models):
    settings = {**SHORT, "steps": 9, "negative": "zero"}
    seen = []
    clip = pipeline("A bell.", preset="distilled", callback=lambda step, steps, *_: seen.append(steps), **settings)
    assert seen == [4] * 4
    tokens = load_tokenizer(models["text_encoder"])("A bell.")
    noise = clip_noise(ClipGeometry(0.5, 64, 32), SHORT["seed"])
    run = find_preset("distilled")
    video, audio = denoise(
        load_backbone(models["backbone"]),
        noise[0],
        audio_latent_to_tokens(noise[1]),
        load_text_encoder(models["text_encoder"]).encode(tokens.ids),
        sigmas=run.sigmas(),
        sampler=run.solver,
        guidance=run.guidance,
    )
    # Up to rounding: some processors' kernels go by where in memory the weights lie, and the pipeline's are mapped.
    torch.testing.assert_close(clip.video_latent, denormalize_video(video), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(clip.audio_latent, audio_tokens_to_latent(audio), atol=2e-5, rtol=1e-5)
    guided = pipeline("A bell.", preset="distilled", guidance=Guidance(), **settings)
    assert (guided.video_latent - clip.video_latent).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no preset"):
        pipeline("A bell.", preset="fast", **settings)


@pytest.mark.usefixtures("_latents_only")
def test_a_negative_that_the_guidance_does_not_use_is_not_encoded(pipeline, monkeypatch):
    seen, encode_text = [], stages.encode_text

    def watched(components, prompts):
        seen.append(prompts[1])
        return encode_text(components, prompts)

    monkeypatch.setattr(stages, "encode_text", watched)
    settings = {**SHORT, "negative": "word " * 600}
    clip = pipeline("A bell.", preset="distilled", **settings)
    assert seen.pop() is None
    assert not any("negative" in warning for warning in clip.warnings)
    zero = pipeline("A bell.", preset="distilled", **{**settings, "negative": "zero"})
    assert torch.equal(zero.video_latent, clip.video_latent)
    late = Guidance(intervals={"video_text": (0.1, 0.0), "audio_text": (0.1, 0.0)})
    for guidance, used in ((None, True), (Guidance(video_text=0, audio_text=0), False), (late, False)):
        pipeline("A bell.", guidance=guidance, **settings)
        assert (seen.pop() is not None) is used
    pipeline("A bell.", preset="distilled", guidance=Guidance(), **settings)
    assert seen.pop() is not None


@pytest.mark.usefixtures("_latents_only")
def test_loras_change_the_clip_and_are_refused_before_anything_is_loaded(files, pipeline, tmp_path, monkeypatch):
    layer, said = "double_blocks.0.self_attn.q", []
    tensors = {f"{layer}.lora_B.weight": torch.ones(64, 2) / 10, f"{layer}.lora_A.weight": torch.ones(2, 64)}
    tensors["elsewhere.lora_A.weight"] = torch.ones(2, 64)
    lora, foreign = tmp_path / "lora.safetensors", tmp_path / "foreign.safetensors"
    save_file(tensors, lora)
    save_file({"blocks.0.q.lora_A.weight": torch.ones(2, 2)}, foreign)

    def clip(*loras):
        return NavaPipeline.from_files(files, device="cpu", say=said.append, loras=loras)("A bell.", **SHORT)

    plain, one, half = pipeline("A bell.", **SHORT), clip(lora), clip((lora, 0.25), (lora, 0.25))
    assert "lora.safetensors: 1 of its 3 tensors are for nothing in this backbone and are not used" in said[0]
    assert any(text.endswith("with lora.safetensors.") for text in said)
    assert (one.video_latent - plain.video_latent).abs().max() > 1e-3
    torch.testing.assert_close(half.video_latent, clip((lora, 0.5)).video_latent, rtol=0, atol=1e-2)
    assert torch.equal(clip((lora, 0.0)).video_latent, plain.video_latent)
    monkeypatch.setattr(memory, "load_backbone", None)
    with pytest.raises(WrongFileError, match="no LoRA for this backbone"):
        NavaPipeline.from_files(files, device="cpu", loras=[foreign])


@pytest.mark.usefixtures("_latents_only")
def test_steps_are_reported_and_a_run_can_be_stopped_at_any_point(pipeline):
    seen, asked = [], []
    pipeline(
        PROMPT,
        callback=lambda step, steps, video, audio: seen.append((step, steps, video.shape, audio.shape)),
        should_stop=lambda: bool(asked.append(None)),
        **SHORT,
    )
    assert seen == [(1, 2, (1, 48, 4, 2, 4), (1, 14, 128)), (2, 2, (1, 48, 4, 2, 4), (1, 14, 128))]
    for last in range(0, len(asked), 3):
        calls = iter([False] * last)
        with pytest.raises(Interrupted):
            pipeline(PROMPT, should_stop=lambda calls=calls: next(calls, True), **SHORT)
        assert next(calls, None) is None


def test_what_does_not_fit_together_is_said_before_anything_is_loaded(pipeline, files, picture, voice, monkeypatch):
    for name in LOADERS:
        monkeypatch.setattr(memory, name, None)
    monkeypatch.setattr(stages, "load_redimnet", None)
    cases = (
        ({"mode": "audio", "image": picture}, "A first frame was given for a clip of sound alone"),
        ({"width": 63}, "multiple of 16"),
        ({"seconds": 0}, "longer than 0 seconds"),
        ({"mode": "both"}, "mode is one of"),
        ({"steps": 0}, "at least 1 step"),
        ({"voices": [voice] * 3}, "3 voices given but the prompt has 2 speech spans"),
        ({"image": torch.zeros(3, 8, 8)}, r"A first frame is \(height, width, 3\)"),
        ({"prompt": "", "voices": [voice]}, "Voices were given but the prompt is empty"),
        ({"prompt": "Open <S>span"}, "<E>"),
        ({"image": "nowhere.png"}, "There is no file"),
    )
    for change, sentence in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            pipeline(**{"prompt": PROMPT, **SHORT, **change})
    alone = NavaPipeline.from_files(ModelFiles(*(getattr(files, role) for role in ROLES[:4])), device="cpu")
    with pytest.raises(ValueError, match="needs the speaker encoder"):
        alone(PROMPT, voices=[voice], **SHORT)


def test_a_prompt_that_is_cut_and_a_clip_that_is_long_are_warned_of(files, monkeypatch):
    said = []
    pipeline = NavaPipeline.from_files(files, device="cpu", say=said.append)
    monkeypatch.setattr(stages, "encode_text", lambda *_: (_ for _ in ()).throw(Interrupted("far enough")))
    with pytest.raises(Interrupted):
        pipeline("word " * 600 + PROMPT, seconds=20)
    assert any("trained on clips of up to 10 s" in sentence for sentence in said)
    assert any("CUT OFF" in sentence for sentence in said)


# --- memory ------------------------------------------------------------------------------------------------------


LOADERS = ("load_text_encoder", "load_video_vae", "load_audio_vae", "load_backbone")


@pytest.fixture
def alive(monkeypatch):
    """What was loaded, in order: [(loader, weak reference, loaders of what else was in memory then)]."""
    loaded = []

    def watched(name, original):
        def load(*args, **settings):
            others = [other for other, reference, _ in loaded if reference() is not None]
            component = original(*args, **settings)
            loaded.append((name, weakref.ref(component), others))
            return component

        return load

    for name in LOADERS:
        monkeypatch.setattr(memory, name, watched(name, getattr(memory, name)))
    return loaded


def assert_all_gone(alive):
    assert alive
    assert all(reference() is None for _, reference, _ in alive)


def test_components_are_in_memory_one_at_a_time(files, picture, alive):
    pipeline = NavaPipeline.from_files(files, device="cpu")
    pipeline(PROMPT, image=picture, size_from_image=False, **SHORT)
    order = ["load_text_encoder", "load_video_vae", "load_backbone", "load_audio_vae", "load_video_vae"]
    assert [(name, others) for name, _, others in alive] == [(name, []) for name in order]
    assert_all_gone(alive)


def test_a_stopped_run_leaves_nothing_in_memory_and_the_next_one_runs(files, alive):
    pipeline = NavaPipeline.from_files(files, device="cpu")
    with pytest.raises(Interrupted):
        pipeline(PROMPT, should_stop=lambda: any(name == "load_backbone" for name, *_ in alive), **SHORT)
    assert [name for name, *_ in alive] == ["load_text_encoder", "load_backbone"]
    assert_all_gone(alive)
    assert pipeline(PROMPT, **SHORT).frames is not None


def test_kept_components_are_loaded_once_and_given_back_by_unload(files, alive):
    pipeline = NavaPipeline.from_files(files, device="cpu", keep_loaded=True)
    first, second = (pipeline(PROMPT, **SHORT) for _ in range(2))
    assert torch.equal(first.frames, second.frames)
    assert sorted(name for name, *_ in alive) == sorted(LOADERS)
    assert all(reference() is not None for _, reference, _ in alive)
    pipeline.unload()
    assert_all_gone(alive)


@pytest.mark.parametrize("keep_loaded", [False, True])
def test_the_backbone_leaves_a_gpu_only_where_another_does_not_fit_beside_it(files, monkeypatch, keep_loaded):
    """A GPU is played by a number of free bytes."""
    moves = []

    class Backbone(torch.nn.Module):
        def to(self, device):
            moves.append(device)
            return self

    def free(_):
        on_gpu = "backbone" in components._kept and not moves
        return 10 if on_gpu else 100

    components = Components(files, torch.device("cuda"), None, print, keep_loaded)
    monkeypatch.setattr(memory, "free_bytes", free)
    components._kept["backbone"] = Backbone()
    assert components.make_room(10)
    assert "backbone" in components._kept
    assert moves == []
    assert components.make_room(100)
    assert ("backbone" in components._kept, moves) == ((True, ["cpu"]) if keep_loaded else (False, []))
    assert not components.make_room(101)


def test_types_by_device_and_file(files):
    def types(device, dtype=None, vae_dtype=None):
        components = Components(files, torch.device(device), dtype, print, False, vae_dtype=vae_dtype)
        return components.backbone_dtype, components.vae_dtype

    assert types("cpu") == (None, torch.float32)
    assert types("cuda") == (torch.bfloat16, torch.bfloat16)
    assert types("cpu", torch.bfloat16) == (torch.bfloat16, torch.bfloat16)
    assert types("cuda", torch.float8_e4m3fn) == (torch.float8_e4m3fn, torch.bfloat16)
    assert types("cuda", torch.float16, torch.float32) == (torch.float16, torch.float32)
    pipeline = NavaPipeline.from_files(files, device="cpu", vae_dtype=torch.bfloat16)
    assert pipeline.components.vae_dtype is torch.bfloat16


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(models, tmp_path):
    """Model files under names that say nothing, in folders."""
    for number, role in enumerate(ROLES):
        target = tmp_path / "models" / str(number % 2) / f"{number}{models[role].suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(models[role], target)
    return tmp_path / "models"


def test_files_are_found_by_what_they_hold(folder):
    (folder / "1" / "again.safetensors").symlink_to(folder / "0" / "0.safetensors")
    (folder / "0" / "loop").symlink_to(folder)
    (folder / "notes.txt").write_text("not a model")
    found = find_model_files(folder)
    assert [getattr(found, role).name[0] for role in ROLES] == list("01234")
    assert found.tokenizer is None
    found.check()


def test_a_missing_an_ambiguous_and_an_unknown_file_are_one_sentence(folder, models):
    (folder / "1" / "3.safetensors").unlink()
    (folder / "1" / "3.safetensors").write_bytes(models["audio_vae"].read_bytes()[:5000])
    with pytest.raises(FileNotFoundError, match=r"no audio VAE in .*3\.safetensors is an incomplete download"):
        find_model_files(folder)
    os.link(models["text_encoder_fp8"], folder / "other.safetensors")
    chosen = {"audio_vae": models["audio_vae"]}
    with pytest.raises(ValueError, match=r"2 that could be the text encoder: other\.safetensors, 1/1\.safetensors"):
        find_model_files(folder, **chosen)
    found = find_model_files(folder, text_encoder=folder / "other.safetensors", **chosen)
    assert found.text_encoder.name == "other.safetensors"
    (folder / "0" / "4.pt").unlink()
    assert find_model_files(folder, text_encoder=folder / "other.safetensors", **chosen).speaker_encoder is None
    with pytest.raises(ValueError, match="no model file called vae"):
        find_model_files(folder, vae="x")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        find_model_files(folder / "nowhere")


def test_the_makers_text_encoder_gets_its_tokenizer_folder(folder, models):
    (folder / "1" / "1.safetensors").unlink()
    os.link(models["text_encoder_pth"], folder / "encoder.pth")
    assert find_model_files(folder).tokenizer is None
    tokenizer = folder / "0" / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    (tokenizer / "spiece.model").write_bytes((models["tokenizer"] / "spiece.model").read_bytes())
    found = find_model_files(folder)
    assert found.tokenizer == tokenizer
    clip = NavaPipeline.from_files(found, device="cpu")(PROMPT, mode="audio", **SHORT)
    assert "timbre token" in clip.report
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="2 that could be the tokenizer"):
        find_model_files(folder)


def test_wrong_files_are_refused_when_the_pipeline_is_made(files, models):
    def make(**change):
        paths = {role: getattr(files, role) for role in ROLES}
        return NavaPipeline.from_files(ModelFiles(**{**paths, **change}), device="cpu")

    with pytest.raises(WrongFileError, match=r"is the LTX audio VAE .* but the Wan2\.2 video VAE is needed"):
        make(video_vae=models["audio_vae"])
    with pytest.raises(WrongFileError, match="but a ReDimNet speaker encoder is needed"):
        make(speaker_encoder=models["backbone"])
    with pytest.raises(FileNotFoundError, match="There is no file nowhere"):
        make(backbone="nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no tokenizer folder nowhere"):
        make(tokenizer="nowhere")


def test_a_pipeline_without_a_needed_file_is_refused(files):
    for role in ROLES[:4]:
        with pytest.raises(FileNotFoundError, match=f"There is no {NAMES[role]} among the model files"):
            NavaPipeline.from_files(with_change(files, **{role: None}), device="cpu")


def test_the_vaes_alone_are_found(folder, models):
    for number in (0, 1):
        (folder / str(number % 2) / f"{number}{models[ROLES[number]].suffix}").unlink()
    found = find_model_files(folder, roles=VAES)
    assert (found.backbone, found.text_encoder, found.tokenizer) == (None, None, None)
    assert [getattr(found, role).name[0] for role in VAES] == ["2", "3"]
    with pytest.raises(FileNotFoundError, match="There is no backbone in"):
        find_model_files(folder)


def with_change(files, **change):
    return ModelFiles(**{**{role: getattr(files, role) for role in ROLES}, **change})


def test_what_a_header_shows_to_be_unusable_is_refused_when_the_pipeline_is_made(files, models, tmp_path):
    tensors = load_file(models["audio_vae"])
    bare, old = tmp_path / "bare.safetensors", tmp_path / "old.safetensors"
    save_file(tensors, bare)
    config = {**AUDIO_CONFIG, "vocoder": AUDIO_CONFIG["vocoder"]["vocoder"]}
    save_file(tensors, old, metadata={"config": json.dumps(config)})
    with pytest.raises(WrongFileError, match=r"bare\.safetensors has no configuration in its metadata"):
        NavaPipeline.from_files(with_change(files, audio_vae=bare), device="cpu")
    with pytest.raises(WrongFileError, match=r"old\.safetensors has a vocoder without bandwidth extension"):
        NavaPipeline.from_files(with_change(files, audio_vae=old), device="cpu")
    backbone = load_file(models["backbone"])
    del backbone[next(name for name in backbone if name.endswith("text_embedding.0.bias"))]
    save_file(backbone, tmp_path / "cut.safetensors")
    with pytest.raises(WrongFileError, match=r"cut\.safetensors does not fit its own configuration"):
        NavaPipeline.from_files(with_change(files, backbone=tmp_path / "cut.safetensors"), device="cpu")


def test_the_audio_vae_of_a_merged_checkpoint_serves_and_other_parts_are_refused(files, models, pipeline, tmp_path):
    """Beside a backbone, so that the kind of the file is another one that NAVA knows."""
    backbone = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(models["backbone"]).items()}
    vae = {f"vae.{name}": tensor for name, tensor in load_file(models["video_vae"]).items()}
    sound = load_file(models["audio_vae"])
    path = tmp_path / "merged.safetensors"
    save_file({**backbone, **vae, **sound}, path, metadata={"config": json.dumps(AUDIO_CONFIG)})
    of_merged = NavaPipeline.from_files(with_change(files, audio_vae=path), device="cpu")
    assert of_merged.components.weight_bytes("audio_vae") == 4 * sum(tensor.numel() for tensor in sound.values())
    latent = torch.randn(1, 8, 5, 16, generator=torch.Generator().manual_seed(1))
    sounds = [decode.decode_audio(each.components, latent, 0.1)[0] for each in (of_merged, pipeline)]
    assert torch.equal(*sounds)
    with pytest.raises(WrongFileError, match=r"merged\.safetensors is a NAVA backbone, but the Wan2\.2 video VAE"):
        NavaPipeline.from_files(with_change(files, video_vae=path), device="cpu")


def test_a_missing_tokenizer_or_package_is_said_when_the_pipeline_is_made(files, models, monkeypatch, tmp_path):
    alone = tmp_path / "encoder.pth"
    os.link(models["text_encoder_pth"], alone)
    with pytest.raises(FileNotFoundError, match=r"encoder\.pth needs a tokenizer"):
        NavaPipeline.from_files(with_change(files, text_encoder=alone), device="cpu")
    for package in ("diffusers", "transformers", "sentencepiece"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(RuntimeError, match=rf"needs the package {package}"):
                NavaPipeline.from_files(files, device="cpu")


# --- device ------------------------------------------------------------------------------------------------------


def test_a_device_is_one_that_is_there_or_a_sentence(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == torch.device("cuda")
    assert [str(choose_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "hpu", "meta", "gpu", "cuda:x"):
        with pytest.raises(ValueError, match=f"There is no device {name} here .*: use cpu or cuda:0 to cuda:1"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(None) == choose_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("cuda", "mps", "hpu"):
        with pytest.raises(ValueError, match=f"There is no device {name} here"):
            NavaPipeline.from_files(files, device=name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")


def test_too_little_memory_of_the_machine_is_said_as_that():
    allocator = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    mapped = "unable to mmap 400 bytes from file <NAVA.safetensors>: Cannot allocate memory (12)"
    for error in (RuntimeError(allocator), RuntimeError(mapped), OSError(errno.ENOMEM, "Cannot allocate memory")):
        assert explain(error).startswith("The machine has too little free memory for this clip")
    assert explain(RuntimeError("The network returned NaN.")) == "The network returned NaN."


# ---------------------------------------------------------------- golden numbers


def test_the_pipelines_backbone_gives_the_golden_numbers(models, golden):
    files = ModelFiles(**{**{role: models[role] for role in ROLES}, "backbone": golden / "backbone_tiny.safetensors"})
    cases = load_file(golden / "backbone_cases.safetensors")
    case = {key.removeprefix("t2av/"): value for key, value in cases.items() if key.startswith("t2av/")}
    inputs = [case[f"in/{name}"][None] for name in ("video", "audio")]
    with torch.inference_mode(), NavaPipeline.from_files(files, device="cpu").components.loaded("backbone") as backbone:
        outputs = backbone(*inputs, case["in/t"], case["in/context"][None])
    for name, output in zip(("video", "audio"), outputs, strict=True):
        assert (output[0] - case[f"out/{name}"]).abs().max() < 2e-4


@pytest.mark.parametrize("case", ["one_second", "six_seconds", "odd_length"])
def test_the_pipelines_voices_are_the_golden_ones(golden, case):
    cases = load_file(golden / "redimnet_small_cases.safetensors")
    (timbre,) = stages.encode_voices(golden / "redimnet_small.pt", [(cases[f"{case}/in"], 16000)], [])
    assert (timbre - cases[f"{case}/out"]).abs().max() < 1e-4
