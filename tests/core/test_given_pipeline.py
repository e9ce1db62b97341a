"""Given parts without a host: what denoising is given, what comes out as it was, and what does not go together."""

import socket
import wave
from fractions import Fraction

import pytest
import torch

from nava_core.checkpoint import load_backbone
from nava_core.components import (
    denormalize_video,
    load_audio_vae,
    load_text_encoder,
    load_tokenizer,
    load_video_vae,
    normalize_video,
)
from nava_core.demo import make_small_models
from nava_core.geometry import ClipGeometry, audio_latent_to_tokens, audio_tokens_to_latent
from nava_core.given import CLEAN, NOISED, fit_sound
from nava_core.media import mux, read_audio
from nava_core.pipeline import (
    ClipLatents,
    Components,
    ModelFiles,
    NavaPipeline,
    Retake,
    clip_noise,
    decode,
    given,
    stages,
)
from nava_core.sampling import Guidance, Interrupted, denoise, flow_sigmas
from nava_core.video_files import VideoFile, read_video, to_levels

pytest.importorskip("diffusers", reason="the standalone VAEs need diffusers")
pytest.importorskip("transformers", reason="the standalone text encoder needs transformers")

SHORT = {"seconds": 0.5, "width": 64, "height": 64, "size_from_image": False, "steps": 2, "seed": 5}
FRAMES, LATENTS, STEPS = 13, 4, 14
RATE = 22050
ROLES = ("backbone", "text_encoder", "video_vae", "audio_vae", "speaker_encoder")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)


@pytest.fixture(scope="module")
def pipeline(models):
    return NavaPipeline.from_files(ModelFiles(**{role: models[role] for role in ROLES}), device="cpu")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the pipeline asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def sound():
    time = torch.arange(round(1.2 * RATE)) / RATE
    return torch.stack([torch.sin(900 * time) * (1 + time) / 4, torch.sin(1400 * time) / 4]), RATE


def moving(frames, height=64, width=64):
    """Frames of 8 bits in which no two are alike."""
    generator = torch.Generator().manual_seed(frames)
    small = torch.rand(1, 3, frames, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(small, (frames, height, width), mode="trilinear")
    return (large[0].movedim(0, -1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def video(tmp_path_factory, sound):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    mux(path, moving(FRAMES).float() / 255, *sound, crf=0)
    return path


@pytest.fixture(scope="module")
def source(pipeline):
    return pipeline.denoise("A bell.", **SHORT)


@pytest.fixture
def seen(monkeypatch):
    """The arguments that denoising was called with, the latest last; it makes nothing but noise."""
    calls = []

    def instead(_, video_noise, audio_noise, context, **arguments):
        calls.append(arguments)
        return video_noise, audio_noise

    monkeypatch.setattr(stages, "denoise", instead)
    return calls


@pytest.fixture
def loaded(pipeline, monkeypatch):
    """The roles of the components that were loaded, in their order."""
    roles, load = [], Components._load
    monkeypatch.setattr(Components, "_load", lambda self, role, *rest: (roles.append(role), load(self, role, *rest))[1])
    return roles


# --- sound -------------------------------------------------------------------------------------------------------


def test_a_clip_with_a_given_sound_is_the_plain_composition_of_its_parts(pipeline, models, sound):
    made = pipeline.denoise("A bell.", sound=sound, negative="blurred", **SHORT)
    given = fit_sound(*sound, FRAMES / 24)
    latent = load_audio_vae(models["audio_vae"]).encode(*given.to_encode(), STEPS)
    tokenizer, encoder = load_tokenizer(models["text_encoder"]), load_text_encoder(models["text_encoder"])
    noise = clip_noise(ClipGeometry(0.5, 64, 64), 5)
    expected, audio = denoise(
        load_backbone(models["backbone"]),
        noise[0],
        audio_latent_to_tokens(noise[1]),
        encoder.encode(tokenizer("A bell.").ids),
        sigmas=flow_sigmas(2),
        negative=encoder.encode(tokenizer("blurred").ids),
        audio_latent=audio_latent_to_tokens(latent),
        audio_mask=torch.zeros(1, STEPS, 1),
    )
    assert torch.allclose(made.video, denormalize_video(expected), atol=1e-5)
    assert torch.equal(made.audio, latent)
    assert torch.equal(audio_tokens_to_latent(audio), latent)
    assert made.warnings == ("The given sound: it goes on for 0.66 s past the clip's end, which were cut.",)
    assert made.settings["sound"] is True


def test_a_whole_given_sound_comes_out_sample_for_sample_and_its_vae_is_not_loaded(pipeline, sound, loaded, tmp_path):
    latents = pipeline.denoise("A bell.", sound=sound, sound_start=0.25, **SHORT)
    assert loaded[:2] == ["text_encoder", "audio_vae"]  # to encode it
    loaded.clear()
    clip = pipeline.decode(latents)
    assert loaded == ["video_vae"]
    first = round(0.25 * RATE)
    assert clip.sample_rate == RATE
    assert torch.equal(clip.waveform, sound[0][:, first : first + round(FRAMES / 24 * RATE)])
    pipeline.save(latents, tmp_path / "clip.mp4")
    assert read_audio(tmp_path / "clip.mp4")[1] == RATE
    assert len(read_video(tmp_path / "clip.mp4").frames) == FRAMES


def test_sound_that_ends_early_leaves_the_rest_silent_or_to_be_made(pipeline, sound, seen):
    waveform, rate = sound
    short = (waveform[:, : round(0.2 * rate)], rate)
    silent = pipeline.denoise("A bell.", sound=short, **SHORT)
    assert silent.originals.has_all_sound
    assert not bool(silent.originals.waveform[:, round(0.2 * rate) :].any())
    made = pipeline.denoise(
        "A bell.", sound=short, sound_at=0.1, sound_rest="generated", shown="matched noise", **SHORT
    )
    mask = seen[-1]["audio_mask"][0, :, 0]
    assert mask.tolist() == [1, 1, 1, *[NOISED] * 4, *[1] * 7]  # steps of 0.04 s that are wholly within 0.1 to 0.3 s
    assert "video_mask" not in seen[-1]
    clip = pipeline.decode(made)
    begin, end = round(0.1 * rate), round(0.3 * rate)
    assert clip.sample_rate == rate
    assert torch.equal(clip.waveform[:, begin:end], short[0][:, : end - begin])
    assert clip.waveform.shape == (2, round(FRAMES / 24 * rate))


def test_a_clip_of_sound_alone_goes_on_from_a_given_one(pipeline, sound, seen):
    waveform, rate = sound
    made = pipeline.denoise(
        "A bell.", mode="audio", seconds=0.4, steps=2, sound=(waveform[:, : rate // 5], rate), sound_rest="generated"
    )
    assert seen[-1]["audio_mask"][0, :, 0].tolist() == [CLEAN] * 5 + [1] * 5
    clip = pipeline.decode(made)
    assert torch.equal(clip.waveform[:, : rate // 5], waveform[:, : rate // 5])


def test_given_sound_stays_in_the_latents_file_and_given_frames_do_not(pipeline, sound, video, tmp_path):
    latents = pipeline.denoise("A bell.", sound=sound, **SHORT)
    assert latents.not_kept == ""
    again = ClipLatents.load(latents.save(tmp_path / "a.latents.safetensors"))
    assert torch.equal(again.originals.waveform, latents.originals.waveform)
    assert (again.originals.sample_rate, again.originals.kept_sound) == (RATE, latents.originals.kept_sound)
    assert torch.equal(pipeline.sound(again)[0], pipeline.sound(latents)[0])
    framed = pipeline.denoise("A bell.", frames=video, **{**SHORT, "seconds": None})
    assert "frames that were given are not in the latents' file" in framed.not_kept
    assert ClipLatents.load(framed.save(tmp_path / "b.latents.safetensors")).originals is None


# --- frames ------------------------------------------------------------------------------------------------------


def test_sound_is_made_for_a_video_whose_frames_come_out_as_they_are(pipeline, models, video, loaded, seen, tmp_path):
    latents = pipeline.denoise("A bell.", frames=video, **{**SHORT, "seconds": None})
    assert loaded[:2] == ["text_encoder", "video_vae"]
    assert latents.duration == FRAMES / 24
    assert seen[-1]["video_mask"].flatten(2).amax(2).tolist() == [[CLEAN]]
    assert "audio_mask" not in seen[-1]
    frames = read_video(video).frames
    encoded = load_video_vae(models["video_vae"]).encode(frames.float() / 255)
    assert torch.equal(latents.video, encoded)
    assert torch.equal(seen[-1]["video_latent"], normalize_video(encoded))
    loaded.clear()
    clip = pipeline.decode(latents)
    assert loaded == ["audio_vae"]
    assert torch.equal((clip.frames * 255).round().to(torch.uint8), frames)
    pipeline.save(latents, tmp_path / "clip.mp4")
    assert len(read_video(tmp_path / "clip.mp4").frames) == FRAMES
    assert latents.warnings == ("The video's own sound is left out: sound is made for its picture.",)


def test_frames_that_are_shown_at_the_level_of_the_rest_leave_the_first_clean(pipeline, seen):
    made = pipeline.denoise("A bell.", frames=moving(7), shown="matched noise", **SHORT)
    mask = seen[-1]["video_mask"][0, 0].flatten(1)
    assert mask.amin(1).tolist() == mask.amax(1).tolist() == [CLEAN, NOISED, 1, 1]
    assert made.originals.kept_frames.tolist() == [True] * 5 + [False] * 8
    assert any("left out" in warning for warning in made.warnings)  # two that fill no latent
    clip = pipeline.decode(made)
    assert torch.equal((clip.frames[:5] * 255).round().to(torch.uint8), moving(7)[:5])


def test_a_video_of_another_rate_and_size_is_fitted_and_that_is_said(pipeline, seen, tmp_path):
    path = tmp_path / "wide.mp4"
    mux(path, moving(10, 48, 128).float() / 255, fps=12)
    made = pipeline.denoise("A bell.", frames=path, **{**SHORT, "seconds": None})
    assert made.video.shape == (1, 48, 5, 4, 4)  # 20 frames at 24 a second, of which 17 fill latents
    text = " ".join(made.warnings)
    assert "wide.mp4 has 12 frames a second: resampled to 24." in text
    assert "The video has 128x48: scaled to cover 64x64, and cropped." in text


def test_a_picture_at_any_time_is_held_for_the_frames_of_a_latent(pipeline, models, seen):
    first, last = (moving(2)[index].float() / 255 for index in (0, 1))
    pipeline.denoise("A bell.", image=first, pictures={"end": last}, **SHORT)
    mask = seen[-1]["video_mask"][0, 0].flatten(1)
    assert mask.amax(1).tolist() == [CLEAN, 1, 1, CLEAN]
    latent = denormalize_video(seen[-1]["video_latent"])
    vae = load_video_vae(models["video_vae"])
    assert torch.allclose(latent[:, :, :1], vae.encode(first[None]), atol=1e-5)
    still = vae.encode(last[None].expand(17, -1, -1, -1))
    assert torch.allclose(latent[:, :, 3:], still[:, :, -1:], atol=1e-4)
    assert not torch.allclose(latent[:, :, 3:], vae.encode(last[None]), atol=1e-2)
    pipeline.denoise("A bell.", pictures={0.25: last}, shown="matched noise", **SHORT)
    assert seen[-1]["video_mask"][0, 0].flatten(1).amax(1).tolist() == [1, 1, NOISED, 1]  # frame 6 is in latent 2


# --- finished clips ----------------------------------------------------------------------------------------------


def test_a_retake_keeps_all_frames_and_samples_outside_of_its_span(pipeline, source):
    before = pipeline.decode(source)
    made = pipeline.retake(source, "A drum.", Retake(0.2, 0.3), steps=2, seed=9)
    after = pipeline.decode(made)
    levels = [(clip.frames * 255).round() for clip in (before, after)]
    same = [bool(torch.equal(*pair)) for pair in zip(*levels, strict=True)]
    assert same == [True, *[False] * 8, *[True] * 4]  # frames 4 to 7 are in the latents 1 and 2
    rate = before.sample_rate
    assert torch.equal(after.waveform[:, : rate // 5], before.waveform[:, : rate // 5])
    assert torch.equal(after.waveform[:, round(0.32 * rate) :], before.waveform[:, round(0.32 * rate) :])
    assert not torch.equal(
        after.waveform[:, rate // 5 : round(0.32 * rate)], before.waveform[:, rate // 5 : round(0.32 * rate)]
    )
    assert torch.equal(made.video[:, :, [0, 3]], source.video[:, :, [0, 3]])
    assert torch.equal(made.audio[:, :, :5], source.audio[:, :, :5])
    assert made.settings["retake"]["start"] == 0.2


def test_a_retake_of_the_same_prompt_and_seed_is_said(pipeline, source):
    settings, span = source.settings, Retake(0.0, 0.2, "sound")
    same = pipeline.retake(source, settings["prompt"], span, seed=settings["seed"], steps=1)
    other = pipeline.retake(source, settings["prompt"], span, seed=settings["seed"] + 1, steps=1)
    assert "may come out much the same" in " ".join(same.warnings)
    assert "much the same" not in " ".join(other.warnings)


def test_a_retake_of_a_part_or_a_region_leaves_the_rest(pipeline, source, seen):
    pipeline.denoise("A drum.", source=source, retake=Retake(0.2, 0.3, "sound"), steps=2)
    assert seen[-1]["video_mask"].amax() == 0
    assert seen[-1]["audio_mask"][0, :, 0].tolist() == [*[0] * 5, 1, 1, 1, *[0] * 6]
    pipeline.denoise("A drum.", source=source, retake=Retake(0.2, 0.5, "picture", (0, 17, 20, 15)), steps=2)
    assert seen[-1]["audio_mask"].amax() == 0
    mask = seen[-1]["video_mask"][0, 0]
    assert mask[0].amax() == 0
    assert mask[1].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    shown = pipeline.denoise("A drum.", source=source, retake=Retake(0.2, 0.3), shown="matched noise", steps=2)
    assert seen[-1]["video_mask"][0, 0, :, 0, 0].tolist() == [CLEAN, 1, 1, NOISED]
    assert shown.duration == source.duration


def test_a_region_leaves_every_other_pixel_as_it_was(pipeline, source):
    before = to_levels(pipeline.decode(source).frames)
    made = pipeline.retake(source, "A drum.", Retake(0.2, 0.5, "picture", (0, 16, 32, 16)), steps=2, seed=5)
    after = to_levels(pipeline.decode(made).frames)
    region = torch.zeros(before.shape[:3], dtype=torch.bool)
    region[:, 16:32, :32] = True
    assert torch.equal(after[~region], before[~region])
    changed = (after != before).flatten(1).any(dim=1)
    assert changed.tolist() == [frame > 0 for frame in range(len(before))]


def test_only_what_is_made_is_guided(pipeline, source, sound, monkeypatch):
    passes = []
    planned = Components.prepare
    monkeypatch.setattr(
        Components, "prepare", lambda self, *a, **k: (passes.append(k["together"]), planned(self, *a, **k))[1]
    )
    voiced = Guidance(alignment=False, video_text=1.0, audio_text=3.0)
    pipeline.denoise("A bell.", sound=sound, guidance=voiced, **SHORT)
    pipeline.denoise("A bell.", guidance=voiced, **SHORT)
    assert passes == [1, 2]


def test_a_second_pass_starts_from_the_clip_and_keeps_its_sound(pipeline, source, seen):
    made = pipeline.refine(source, "A drum.", denoise=0.5, steps=2)
    assert torch.equal(seen[-1]["sigmas"], flow_sigmas(2, denoise=0.5))
    assert torch.equal(seen[-1]["video_latent"], normalize_video(source.video))
    assert seen[-1]["video_mask"].amin() == 1
    assert seen[-1]["audio_mask"].amax() == 0
    assert torch.equal(made.audio, source.audio)
    larger = pipeline.refine(source, "A drum.", denoise=0.5, size=(96, 64), steps=2)
    assert larger.video.shape == (1, 48, LATENTS, 4, 6)
    assert torch.equal(larger.audio, source.audio)


def test_a_video_file_is_a_source_too_and_keeps_its_own_sound(pipeline, video, sound, seen):
    size = {"width": 64, "height": 64, "size_from_image": False}
    made = pipeline.retake(video, "A drum.", Retake(0.0, 0.2, "picture"), steps=2, **size)
    file, rate = read_audio(video)
    clip = pipeline.decode(made)
    assert rate == clip.sample_rate == RATE
    length = min(file.shape[1], clip.waveform.shape[1])
    assert torch.equal(clip.waveform[:, :length], file[:, :length])
    assert torch.equal((clip.frames[9:] * 255).round().to(torch.uint8), read_video(video).frames[9:])
    pipeline.denoise("A drum.", frames=video, denoise=0.5, **{**SHORT, "seconds": None})
    assert seen[-1]["audio_mask"].amax() == 0


def test_a_video_of_ten_seconds_keeps_its_last_frame_too(pipeline, tmp_path):
    frames = torch.linspace(0, 1, 241)[:, None, None, None].expand(-1, 32, 32, 3)
    mux(tmp_path / "ten.mp4", frames)
    source = pipeline.encode(tmp_path / "ten.mp4", width=32, height=32, size_from_image=False)
    assert source.video.shape[2] == 61
    assert source.warnings == ()


def test_a_video_with_next_to_no_sound_is_a_silent_one(pipeline, monkeypatch):
    frames = (moving(9) * 255).to(torch.uint8)
    for samples, has_sound in ((4000, False), (5000, True)):
        file = VideoFile(frames, Fraction(24), torch.ones(1, samples), 48000, (64, 64))
        monkeypatch.setattr(given, "read_video", lambda *_, file=file: file)
        found = given.read_frames("a.mp4", 10)
        assert (found.sound is not None) == has_sound
        assert ("The sound track of a.mp4 is shorter than 0.1 s: it counts as none." in found.notes) != has_sound


# --- memory, progress, interruption ------------------------------------------------------------------------------


def test_what_is_encoded_is_planned_for_and_said(pipeline, video, sound, monkeypatch):
    said, planned = [], []
    prepare = Components.prepare
    monkeypatch.setattr(pipeline.components, "say", said.append)
    monkeypatch.setattr(Components, "prepare", lambda self, *a, **k: (planned.append(k), prepare(self, *a, **k))[1])
    pipeline.denoise("A bell.", sound=sound, image=moving(1)[0].float() / 255, **SHORT)
    assert (planned[-1]["frames"], planned[-1]["sound_steps"]) == (1, STEPS)
    assert "Encoding the first frame." in said
    assert "Encoding the sound." in said
    pipeline.denoise("A bell.", frames=video, **{**SHORT, "seconds": None})
    assert (planned[-1]["frames"], planned[-1]["sound_steps"]) == (FRAMES, 0)
    assert "Encoding 13 frames." in said
    one, many = (pipeline.components.frames_bytes((count, 64, 64, 3)) for count in (1, 49))
    assert many > one + 48 * 64 * 64 * 3 * 4


def test_an_interruption_is_asked_for_before_each_stage(pipeline, sound, monkeypatch):
    said = []
    monkeypatch.setattr(pipeline.components, "say", said.append)
    wanted = {"sound": sound, "pictures": {"end": moving(1)[0].float() / 255}}
    for word in ("Encoding the prompt.", "frames.", "Encoding the sound."):
        said.clear()
        with pytest.raises(Interrupted):
            pipeline.denoise("A bell.", should_stop=lambda w=word: any(s.endswith(w) for s in said), **wanted, **SHORT)
        assert said[-1].endswith(word)


# --- what does not go together -----------------------------------------------------------------------------------

STILL = torch.zeros(64, 64, 3)
TONE = (torch.ones(1, 8000) / 2, 8000)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"mode": "audio", "frames": torch.zeros(5, 64, 64, 3)}, "A video was given for a clip of sound alone"),
        ({"mode": "audio", "pictures": {"end": STILL}}, "Pictures were given for a clip of sound alone"),
        ({"mode": "video", "sound": TONE}, "A sound was given for a clip of picture alone"),
        ({"frames": torch.zeros(5, 64, 64, 3), "image": STILL}, "Give a video or single pictures, and not both"),
        ({"image": STILL, "pictures": {0.0: STILL}}, "Two pictures were given for the first frame"),
        ({"shown": "grey"}, "Given parts are shown clean or matched noise; got 'grey'"),
        ({"sound": TONE, "sound_rest": "noise"}, "rest of a given sound is silence or generated; got 'noise'"),
        ({"sound": TONE, "sound_start": 2.0}, "cannot start 2.00 s into itself"),
        ({"sound": TONE, "sound_at": 2.0}, "no sound can begin at 2.00 s"),
        ({"sound": (torch.zeros(1, 8000), 8000)}, "digital silence"),
        ({"sound": TONE, "frames": torch.zeros(13, 64, 64, 3)}, "All of this clip is given"),
        ({"mode": "audio", "sound": TONE}, "All of this clip is given"),
        ({"pictures": {3.0: STILL}}, "a picture at 3 s is not in it"),
        ({"pictures": {-1.0: STILL}}, "a picture at -1 s is not in it"),
        ({"retake": Retake(0, 1)}, "A retake needs the clip that it is of"),
        ({"denoise": 0.5}, "A denoise below 1 starts from a finished clip"),
        ({"denoise": 0.0}, "above 0 and up to 1; got 0"),
        ({"denoise": 0.5, "frames": torch.zeros(13, 64, 64, 3)}, "A second pass keeps the sound, but there is none"),
        (
            {"denoise": 0.5, "frames": torch.zeros(13, 64, 64, 3), "sound": TONE, "sound_at": 0.3,
             "sound_rest": "generated"},
            "it has to be given whole",
        ),
        ({"denoise": 0.5, "frames": torch.zeros(5, 64, 64, 3), "sound": TONE}, "a second pass over a clip of 13 needs"),
        ({"frames": torch.zeros(64, 64, 3)}, "Frames are (frames, height, width, 3)"),
        ({"frames": torch.zeros(2, 64, 64, 3, dtype=torch.int64)}, "floats in 0..1 or of 8 bits"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence_before_anything_is_loaded(pipeline, loaded, request_, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        pipeline.denoise("A bell.", **{**SHORT, **request_})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert loaded == []


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({}, "say what of it is made again (retake), or give a denoise below 1"),
        ({"retake": Retake(0.2, 3)}, "The clip ends at 0.54 s: a retake from 0.2 to 3 s is not in it."),
        ({"retake": Retake(1, 2)}, "is not in it"),
        ({"retake": Retake(0, 0.3, "both", (0, 0, 65, 16))}, "reaches beyond the picture of 64x64"),
        ({"retake": Retake(0, 0.3), "frames": torch.zeros(5, 64, 64, 3)}, "A retake keeps the picture of its source"),
    ],
)
def test_what_does_not_suit_a_source_is_one_sentence(pipeline, source, loaded, request_, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        pipeline.denoise("A bell.", source=source, steps=2, **request_)
    assert sentence in str(caught.value)
    assert loaded == []


def test_a_source_without_a_part_has_none_to_make_again(pipeline, source):
    silent = ClipLatents(source.video, None, source.duration)
    with pytest.raises(ValueError, match="The clip has no sound that could be made again"):
        pipeline.denoise("A bell.", source=silent, retake=Retake(0, 0.2, "sound"), steps=2)
    blind = ClipLatents(None, source.audio, source.audio.shape[2] / 25)
    with pytest.raises(ValueError, match="The clip has no picture that could be made again"):
        pipeline.denoise("A bell.", source=blind, retake=Retake(0, 0.2, "picture"), steps=2)
    with pytest.raises(ValueError, match="no picture that a second pass could be made over"):
        pipeline.refine(blind, "A bell.", denoise=0.5)
    longer = ClipLatents(source.video, source.audio[:, :, :10], source.duration)
    with pytest.raises(ValueError, match="has 10 latents where a clip of its length has 14"):
        pipeline.denoise("A bell.", source=longer, retake=Retake(0, 0.2), steps=2)


@pytest.mark.parametrize(
    ("span", "sentence"),
    [
        ((1, 1), "from one second to a later one; got 1 to 1"),
        ((-1, 1), "got -1 to 1"),
        ((0, float("nan")), "to a later one"),
        ((0, 1, "words"), "A retake is of both, picture, sound; got 'words'"),
        ((0, 1, "sound", (0, 0, 16, 16)), "A retake of the sound has no region"),
        ((0, 1, "both", (0, 0, 0, 16)), "A region is x, y, width and height"),
    ],
)
def test_a_retake_is_of_a_span_and_a_region(span, sentence):
    with pytest.raises(ValueError, match=r".") as caught:
        Retake(*span)
    assert sentence in str(caught.value)


def test_a_file_that_is_no_video_or_no_sound_is_a_sentence(pipeline, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\1\2" * 4000)
    for request, word in (
        ({"sound": text}, "as sound"),
        ({"frames": text}, "as video"),
        ({"frames": tmp_path / "tone.wav"}, "no picture"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r".") as caught:
            pipeline.denoise("A bell.", **request, **SHORT)
        assert word in str(caught.value)
    with pytest.raises(FileNotFoundError):
        pipeline.denoise("A bell.", sound=tmp_path / "gone.wav", **SHORT)


def test_decoding_puts_given_parts_in_while_frames_are_streamed(pipeline, source, monkeypatch):
    made = pipeline.denoise("A bell.", frames=moving(5), **SHORT)
    largest = []
    stream = decode.stream_video
    monkeypatch.setattr(decode, "stream_video", lambda *a: (largest.append(len(part)) or part for part in stream(*a)))
    frames = torch.cat(list(pipeline.stream(made)))
    assert max(largest) < FRAMES
    assert torch.equal((frames[:5] * 255).round().to(torch.uint8), moving(5))
