"""Given parts in process, on the host's real classes: what is given, what is made, what comes out as it was given."""

import math

import comfy_host
import pytest
import torch

comfy_host.import_comfyui()

import comfy.nested_tensor  # noqa: E402

nodes = comfy_host.pack_module("nodes.given")
latent_nodes = comfy_host.pack_module("nodes.latents")
sampling_nodes = comfy_host.pack_module("nodes.sampling")
decode_nodes = comfy_host.pack_module("nodes.decode")
host_model = comfy_host.pack_module("nodes.host.model")
host_video = comfy_host.pack_module("nodes.host.video_vae")
host_audio = comfy_host.pack_module("nodes.host.audio_vae")
given = comfy_host.pack_module("nava_core.given")

WIDTH, HEIGHT, FRAMES, RATE = 64, 32, 25, 44100  # one second: 7 latent frames, 27 audio steps
SAMPLES = round(FRAMES / 24 * RATE)
SCALES = {
    "alignment": True, "video_text": 2.0, "video_align": 2.0, "audio_text": 2.0, "audio_align": 2.0,
    "audio_timbre": 2.0,
    **{f"{term}_{end}": value for term in ("text", "align", "timbre") for end, value in (("start", 0.0), ("end", 1.0))},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(small_models):
    class Models:
        backbone = host_model.load_backbone(str(small_models["backbone"]))
        vae = host_video.load_video_vae(small_models["video_vae"])
        audio_vae = host_audio.load_audio_vae(small_models["audio_vae"])

    text_dim = Models.backbone.model.diffusion_model.config.text_dim
    Models.positive = [[torch.randn(1, 9, text_dim, generator=torch.Generator().manual_seed(3)), {}]]
    return Models


def empty(mode="video and audio", seconds=1.0, batch=1):
    return latent_nodes.NavaEmptyLatent.execute(seconds, "custom", WIDTH, HEIGHT, mode, batch).args[0]


def moving(frames=FRAMES, width=WIDTH, height=HEIGHT, seed=5):
    """Smooth moving pictures whose values are no levels of 8 bits."""
    picture = torch.rand(frames, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(picture, size=(height, width), mode="bilinear").movedim(1, -1)


def humming(seconds=3.0, rate=RATE, channels=1, seed=6):
    time = torch.arange(round(seconds * rate)) / rate
    hum = sum(torch.sin(2 * math.pi * 150 * k * time + seed) / k for k in range(1, 6)) * (
        0.6 + 0.4 * torch.sin(7 * time)
    )
    return {"waveform": (0.1 * hum).expand(1, channels, -1).clone(), "sample_rate": rate}


def give_sound(latent, models, audio=None, shown="clean", rest="silence", **part):
    part = {"start": 0.0, "position": 0.0, "duration": 0.0, **part}
    audio = humming() if audio is None else audio
    return nodes.NavaGivenAudio.execute(latent, audio, models.audio_vae, **part, rest=rest, shown=shown).args


def give_frames(latent, models, images, place="from seconds", seconds=0.0, fps=24.0, use="keep", shown="clean"):
    return nodes.NavaGivenFrames.execute(latent, images, models.vae, place, seconds, fps, use, shown).args


def retake(latent, start=0.4, end=0.6, part="picture and sound", shown="clean", **others):
    return nodes.NavaRetake.execute(latent, start, end, part, shown, **others).args


def first_frame(latent, models, image):
    return latent_nodes.NavaFirstFrame.execute(latent, image, models.vae, "the latent's own").args[0]


def sample(models, latent, seed=1, steps=2, **settings):
    positive = models.positive
    return sampling_nodes.NavaSampler.execute(
        models.backbone, positive, latent, seed, steps, 5.0, **{**SCALES, **settings}
    ).args[0]


def frames_of(latent, models):
    return decode_nodes.NavaDecodeVideo.execute(latent, models.vae, "auto", 64, 32).args[0]


def sound_of(latent, models):
    return decode_nodes.NavaDecodeAudio.execute(latent, models.audio_vae, "as decoded").args[0]


def parts(latent):
    return latent["samples"].unbind()


def masks(latent):
    return latent["noise_mask"].unbind()


def given_frames(latent):
    """Which latent frames are given whole."""
    return (masks(latent)[0] <= 2**-9).all(dim=1).flatten(2).all(-1)[0].nonzero().flatten().tolist()


def given_steps(latent):
    return (masks(latent)[1] <= 2**-9).flatten(3).all(-1)[0, 0].nonzero().flatten().tolist()


@pytest.fixture
def no_vae(monkeypatch):
    """Decoding is not to be run at all."""

    def refuse(*_, **__):
        raise AssertionError("a VAE decodes what is given whole")

    monkeypatch.setattr(host_video, "decode_video", refuse)
    monkeypatch.setattr(host_audio, "decode_audio", refuse)


# ---------------------------------------------------------------- sound


def test_given_sound_comes_out_sample_for_sample_and_drives_the_picture(models, no_vae):
    latent, sound, report = give_sound(empty(), models, start=0.5)
    assert given_steps(latent) == list(range(27))
    assert given_frames(latent) == []
    original = humming()["waveform"][..., 22050 : 22050 + SAMPLES]
    assert torch.equal(sound["waveform"], original)
    assert "All 1.04 s" in report
    assert "past the clip's end" in report
    done = sample(models, latent)
    assert torch.equal(parts(done)[1], parts(latent)[1])
    assert torch.equal(sound_of(done, models)[0]["waveform"], original)
    assert sound_of(done, models)[0]["sample_rate"] == RATE
    other = sample(models, give_sound(empty(), models, humming(seed=1))[0])
    assert (parts(done)[0] - parts(other)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("shown", "mark"), [("clean", 0.0), ("matched noise", 2**-10)])
def test_a_part_of_the_sound(models, shown, mark):
    audio = humming(seconds=0.4, rate=48000, channels=2)
    latent, sound, report = give_sound(empty(), models, audio, shown, "generated", position=0.2)
    assert given_steps(latent) == list(range(5, 15))
    assert masks(latent)[1][0, 0, 5:15].unique().tolist() == [mark]
    assert "from 0.20 to 0.60 s" in report
    done = sample(models, latent)
    heard = sound_of(done, models)[0]
    assert heard["sample_rate"] == 48000
    assert heard["waveform"].shape[-1] == 50000
    inside = slice(9600, 28800)
    assert torch.equal(heard["waveform"][0, :, inside], audio["waveform"][0])
    assert heard["waveform"][0, :, 40000:].abs().max() > 0
    assert torch.equal(sound["waveform"][..., inside], audio["waveform"])


def test_a_rate_that_aac_has_not_and_an_odd_length_are_said(models):
    _, sound, report = give_sound(empty(), models, humming(seconds=0.5, rate=20000))
    assert sound["sample_rate"] == 48000
    assert sound["waveform"].shape == (1, 1, 50000)
    assert "20000 Hz" in report
    assert "0.54 s before the clip does; what follows is silence" in report


def test_two_recordings_in_one_clip(models):
    first, second = humming(seconds=0.3), humming(seconds=0.3, seed=2)
    once, _, _ = give_sound(empty(), models, first, rest="generated")
    latent, _, _ = give_sound(once, models, second, rest="generated", position=0.6)
    done = sample(models, latent)
    heard = sound_of(done, models)[0]["waveform"][0]
    assert torch.equal(heard[:, :13230], first["waveform"][0].expand(heard.shape[0], -1))
    assert torch.equal(heard[:, 26460:39690], second["waveform"][0].expand(heard.shape[0], -1))


@pytest.mark.parametrize(
    ("mode", "audio", "part", "words"),
    [
        ("video only", humming(), {}, "no sound"),
        ("video and audio", {"waveform": torch.zeros(1, 1, 44100), "sample_rate": RATE}, {}, "silence"),
        ("video and audio", humming(), {"start": 3.5}, "earlier start"),
        ("video and audio", humming(), {"position": 1.5}, "earlier position"),
        ("video and audio", {"waveform": torch.rand(2, 1, 44100), "sample_rate": RATE}, {}, "batch of 2"),
    ],
)
def test_sound_that_cannot_be_given(models, mode, audio, part, words):
    with pytest.raises(ValueError, match=words) as error:
        give_sound(empty(mode), models, audio, **part)
    assert "\n" not in str(error.value)


def test_no_sound_at_all_is_refused(models):
    with pytest.raises(ValueError, match="no given sound"):
        nodes.NavaGivenAudio.execute(empty(), None, models.audio_vae, 0.0, 0.0, 0.0, "silence", "clean")


# ---------------------------------------------------------------- pictures


def test_sound_for_a_silent_video(models, no_vae):
    images = moving()
    latent, fitted, report = give_frames(empty(), models, images)
    assert given_frames(latent) == list(range(7))
    assert given_steps(latent) == []
    assert torch.equal(fitted, images)
    assert report == "All 25 frames are given. The pictures have the clip's size, 64x32."
    assert torch.equal(parts(latent)[0], host_video.encode_video(models.vae, images))
    done = sample(models, latent)
    assert torch.equal(parts(done)[0], parts(latent)[0])
    assert torch.equal(frames_of(done, models)[0], images)
    other = sample(models, give_frames(empty(), models, moving(seed=8))[0])
    assert (parts(done)[1] - parts(other)[1]).abs().max() > 1e-2


def test_pictures_of_another_size_and_rate(models):
    latent, fitted, report = give_frames(empty(), models, moving(12, 100, 30), fps=12.0)
    assert fitted.shape == (21, HEIGHT, WIDTH, 3)  # of 24
    assert given_frames(latent) == list(range(6))
    assert "12 pictures at 12 frames a second are 24 at 24." in report
    assert "scaled from 100x30 to 107x32 and cropped: the clip is 64x32" in report
    assert "3 pictures are left out" in report


@pytest.mark.parametrize(
    ("place", "seconds", "latents", "frames"),
    [
        ("at the end", 0.0, [6], range(21, 25)),
        ("from seconds", 0.5, [3], range(9, 13)),
        ("from seconds", 0.0, [0], [0]),
    ],
)
def test_one_picture_at_a_time(models, place, seconds, latents, frames):
    """Kept as a first frame is: its latent, which the VAE decodes with the others."""
    image = moving(1)
    latent, fitted, report = give_frames(empty(), models, image, place, seconds, shown="matched noise")
    assert given_frames(latent) == latents
    assert masks(latent)[0].unique().tolist() == [0.0 if frames == [0] else 2**-10, 1.0]
    assert len(fitted) == len(frames)
    assert ("Held for the frames" in report) == (frames != [0])
    done = sample(models, latent)
    assert torch.equal(parts(done)[0][:, :, latents], parts(latent)[0][:, :, latents])
    assert torch.equal(frames_of(done, models)[0], host_video.decode_video(models.vae, parts(done)[0]))
    if frames != [0]:
        alone = host_video.encode_video(models.vae, image)
        assert (parts(latent)[0][:, :, latents] - alone).abs().max() > 1e-3  # no first-frame latent elsewhere


def test_a_later_stretch_is_encoded_more_like_the_whole_clip_than_by_itself(models):
    frame, row, column = torch.meshgrid(torch.arange(49.0), torch.arange(32.0), torch.arange(64.0), indexing="ij")
    waves = [torch.sin(column / 10 + row * (k + 1) / 8 + frame * (1 + 0.3 * k) / 8) for k in range(3)]
    images = 0.5 + 0.4 * torch.stack(waves, -1)
    latent, fitted, _ = give_frames(empty(seconds=2.0), models, images[17:33], seconds=17 / 24)
    assert given_frames(latent) == [5, 6, 7, 8]
    assert torch.equal(fitted, images[17:33])
    whole = host_video.encode_video(models.vae, images)[:, :, 5:9]
    alone = host_video.encode_video(models.vae, images[17:30])
    apart = [float((each - whole).pow(2).mean().sqrt()) for each in (parts(latent)[0][:, :, 5:9], alone)]
    assert apart[0] < 0.8 * apart[1]


def test_more_pictures_than_frames_are_cut(models):
    images = moving(31)
    _, fitted, report = give_frames(empty(), models, images)
    assert torch.equal(fitted, images[:25])
    assert "6 pictures are cut" in report
    _, fitted, report = give_frames(empty(), models, images, "at the end")
    assert torch.equal(fitted, images[6:])
    assert "the last ones are taken" in report


def test_start_from_pictures_gives_nothing(models):
    latent, _, report = give_frames(empty(), models, moving(), use="start from them")
    assert "noise_mask" not in latent
    assert "what the clip starts from" in report
    near = sample(models, latent, denoise=0.3, steps=1)
    far = sample(models, latent, denoise=1.0, steps=1)
    distance = [float((parts(each)[0] - parts(latent)[0]).abs().mean()) for each in (near, far)]
    assert 0 < distance[0] < distance[1]
    assert not torch.equal(frames_of(near, models)[0], moving())


def test_pictures_that_cannot_be_given(models):
    with pytest.raises(ValueError, match="no picture"):
        give_frames(empty("audio only"), models, moving(1))
    with pytest.raises(ValueError, match="within it"):
        give_frames(empty(), models, moving(1), seconds=2.0)


# ---------------------------------------------------------------- several given parts


def test_the_order_of_given_parts_does_not_matter(models):
    last, middle = moving(4), moving(4, seed=9)

    def frames(latent):
        return give_frames(give_frames(latent, models, last, "at the end")[0], models, middle, seconds=9 / 24)[0]

    one = give_sound(frames(first_frame(empty(), models, last[:1])), models)[0]
    other = first_frame(frames(give_sound(empty(), models)[0]), models, last[:1])
    assert given_frames(one) == given_frames(other) == [0, 3, 6]
    assert given_steps(one) == given_steps(other) == list(range(27))
    for ours, theirs in zip([*parts(one), *masks(one)], [*parts(other), *masks(other)], strict=True):
        assert torch.equal(ours, theirs)
    done = sample(models, other)
    out = frames_of(done, models)[0]
    assert torch.equal(out[21:], last)
    assert torch.equal(out[9:13], middle)
    assert not torch.equal(out[0], last[0])  # a first frame comes through the VAE
    assert torch.equal(sound_of(done, models)[0]["waveform"], humming()["waveform"][..., :SAMPLES])


def test_all_given_is_said_and_refused_by_the_sampler(models):
    latent, _, report = give_sound(give_frames(empty(), models, moving())[0], models)
    assert "or there is nothing to make" in report
    with pytest.raises(ValueError, match="nothing to make"):
        sample(models, latent)


def test_a_batch_gets_the_same_given_parts(models):
    latent = give_sound(give_frames(empty(batch=2), models, moving(4), "at the end")[0], models)[0]
    done = sample(models, latent)
    assert not torch.equal(*parts(done)[0].unbind())
    frames, sounds = frames_of(done, models), sound_of(done, models)
    assert len(frames) == len(sounds) == 2
    for clip, sound in zip(frames, sounds, strict=True):
        assert torch.equal(clip[21:], moving(4))
        assert torch.equal(sound["waveform"], humming()["waveform"][..., :SAMPLES])


def test_originals_are_not_put_where_the_latent_is_another(models):
    """A second pass makes everything anew, and another clip's latents under the same dict are another clip."""
    latent = give_sound(give_frames(empty(), models, moving())[0], models)[0]
    again = sample(models, {**latent, "noise_mask": None}, denoise=0.5, steps=1)
    assert not torch.equal(frames_of(again, models)[0], moving())
    assert sound_of(again, models)[0]["sample_rate"] == 48000
    shorter = {**latent, "samples": comfy.nested_tensor.NestedTensor([part[:, :, :5] for part in parts(latent)])}
    assert len(frames_of(shorter, models)[0]) == 17


def test_given_parts_of_clips_of_one_modality(models):
    """Sound that goes on after a recording; a picture-only clip, also as the video latent alone."""
    latent, _, _ = give_sound(empty("audio only"), models, humming(0.4), rest="generated")
    heard = sound_of(sample(models, latent), models)[0]["waveform"][0]
    assert torch.equal(heard[:, :17640], humming(0.4)["waveform"][0].expand(len(heard), -1))
    assert heard[:, 20000:].abs().max() > 0
    for latent in (empty("video only"), {"samples": parts(empty("video only"))[0]}):
        given_last, _, _ = give_frames(latent, models, moving(4), "at the end")
        out = frames_of(sample(models, given_last), models)[0]
        assert torch.equal(out[21:], moving(4))
        assert not torch.equal(out[:4], moving(4))


# ---------------------------------------------------------------- retakes


@pytest.fixture(scope="module")
def finished(models):
    """A finished clip's LATENT, frames and AUDIO."""
    latent = sample(models, empty())
    return latent, frames_of(latent, models)[0], sound_of(latent, models)[0]


def test_a_retake_keeps_everything_else_exactly(models, finished):
    latent, frames, audio = finished
    opened, report = retake(latent, frames=frames, audio=audio)
    assert given_frames(opened) == [0, 1, 2, 5, 6]
    assert given_steps(opened) == [*range(10), *range(15, 27)]
    assert report == ("Frames 9 to 16, 0.38 to 0.71 s, are made again. The sound from 0.40 to 0.60 s is made again.")
    done = sample(models, opened, seed=2)
    for before, after, mask in zip(parts(latent), parts(done), masks(opened), strict=True):
        kept = (mask <= 2**-9).expand_as(before)
        assert torch.equal(before[kept], after[kept])
        assert not torch.equal(before[~kept], after[~kept])
    out, heard = frames_of(done, models)[0], sound_of(done, models)[0]
    assert [torch.equal(a, b) for a, b in zip(frames, out, strict=True)] == [not 9 <= n <= 16 for n in range(FRAMES)]
    assert heard["waveform"].shape == audio["waveform"].shape
    same = (heard["waveform"] == audio["waveform"]).all(dim=1)[0]
    assert bool(same[:19200].all())
    assert bool(same[28800:].all())
    assert not bool(same[20000:28000].any())


@pytest.mark.parametrize(("part", "others"), [("picture", "sound"), ("sound", "picture")])
def test_a_retake_of_one_part(models, finished, no_vae, part, others):
    latent, frames, audio = finished
    opened, _ = retake(latent, part=part, frames=frames, audio=audio, shown="matched noise")
    done = sample(models, opened, seed=2, steps=1)
    if others == "sound":
        assert given_steps(opened) == list(range(27))
        assert torch.equal(sound_of(done, models)[0]["waveform"], audio["waveform"])
    else:
        assert given_frames(opened) == list(range(7))
        assert torch.equal(frames_of(done, models)[0], frames)
    assert masks(opened)[0][:, :, 0].unique().tolist() == [0.0]  # a first frame is clean, as in training
    marks = torch.cat([masks(opened)[0][:, :, 1:].flatten(), masks(opened)[1].flatten()])
    assert marks.unique().tolist() == [2**-10, 1.0]


def test_a_retake_of_a_region(models, finished):
    latent, frames, _ = finished
    region = torch.zeros(1, HEIGHT * 2, WIDTH * 2)
    region[:, :, :WIDTH] = 1  # the left half, painted at another size
    opened, report = retake(latent, part="picture", mask=region, frames=frames)
    assert "in 50% of the picture" in report
    done = sample(models, opened, seed=2, steps=1)
    before, after = parts(latent)[0], parts(done)[0]
    assert torch.equal(before[..., 2:], after[..., 2:])
    assert not (before[:, :, 3:5, :, :2] == after[:, :, 3:5, :, :2]).all(dim=1).any()
    decoded = frames_of(done, models)[0]
    assert torch.equal(decoded[:, :, 32:], frames[:, :, 32:])
    assert not torch.equal(decoded[9:17, :, :24], frames[9:17, :, :24])
    assert torch.equal(decoded[:9], frames[:9])
    with pytest.raises(ValueError, match="black"):
        retake(latent, mask=torch.zeros(1, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="3 masks"):
        retake(latent, mask=torch.ones(3, HEIGHT, WIDTH))


def test_masks_of_each_frame(models, finished):
    region = torch.zeros(FRAMES, HEIGHT, WIDTH)
    region[11, 20, 3] = 1  # in latent frame 3
    opened, _ = retake(finished[0], part="picture", mask=region)
    assert (masks(opened)[0] == 1).nonzero().tolist() == [[0, 0, 3, 1, 0]]


def test_a_retake_keeps_a_given_soundtrack(models):
    latent = sample(models, give_sound(empty(), models)[0], steps=1)
    original = humming()["waveform"][..., :SAMPLES]
    picture = sample(models, retake(latent, part="picture")[0], seed=3, steps=1)
    assert torch.equal(sound_of(picture, models)[0]["waveform"], original)
    both = sound_of(sample(models, retake(latent)[0], seed=3, steps=1), models)[0]
    same = (both["waveform"] == original).all(dim=1)[0]
    assert bool(same[: round(0.4 * RATE)].all())
    assert bool(same[round(0.6 * RATE) :].all())
    assert not bool(same[round(0.45 * RATE) : round(0.55 * RATE)].all())


def test_a_span_of_a_video_from_a_file(models):
    """Frames and sound given, a span opened: no network made the rest."""
    latent = give_sound(give_frames(empty(), models, moving())[0], models)[0]
    done = sample(models, retake(latent)[0], steps=1)
    out = frames_of(done, models)[0]
    assert [torch.equal(a, b) for a, b in zip(moving(), out, strict=True)] == [not 9 <= n <= 16 for n in range(FRAMES)]


def test_an_empty_sound_is_made_whole_with_the_span(models):
    latent = give_frames(empty(), models, moving())[0]
    opened, report = retake(latent, part="picture")
    assert given_steps(opened) == []
    assert "The clip's sound is empty and is made from beginning to end." in report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start": 0.6, "end": 0.6}, "is empty"),
        ({"start": 5.0, "end": 6.0}, "past its end"),
        ({"frames": torch.zeros(9, HEIGHT, WIDTH, 3)}, "9 frames of 64x32"),
        ({"audio": humming()}, "3.00 s long"),
    ],
)
def test_retakes_that_cannot_be(models, finished, change, words):
    with pytest.raises(ValueError, match=words):
        retake(finished[0], **change)


def test_other_latents_that_cannot_be_retaken(models, finished):
    with pytest.raises(ValueError, match="latent is empty"):
        retake(empty())
    with pytest.raises(ValueError, match="no sound"):
        retake(sample(models, empty("video only"), steps=1), part="sound")
    twice = {"samples": comfy.nested_tensor.NestedTensor([torch.cat([part, part]) for part in parts(finished[0])])}
    with pytest.raises(ValueError, match="one clip of the batch"):
        retake(twice, frames=finished[1])


# ---------------------------------------------------------------- segments


def continued(models, frames, latent=None, hold="nothing", **sound):
    latent = empty(seconds=2.0) if latent is None else latent
    return nodes.NavaContinue.execute(frames, latent, models.vae, hold, **sound).args


def test_three_segments_with_a_soundtrack(models):
    soundtrack = humming(8.0)
    frames = sound = None
    for length in (49, 97, 145):
        if frames is None:
            latent = give_sound(empty(seconds=2.0), models, soundtrack, start=0.25)[0]
        else:
            latent, first, report = continued(
                models, frames, soundtrack=soundtrack, soundtrack_start=0.25, audio_vae=models.audio_vae
            )
            assert (first - frames[-1:]).abs().max() <= 0.5001 / 255
            assert f"frame {length - 49} of the clip so far" in report
            assert given_frames(latent) == [0]
            assert given_steps(latent) == list(range(52))
        done = sample(models, latent, seed=length, steps=1)
        following, heard = frames_of(done, models)[0], sound_of(done, models)[0]
        if frames is None:
            frames, sound = following, heard
        else:
            begun = round((length - 49) / 24 * RATE) + RATE // 4
            assert torch.equal(heard["waveform"], soundtrack["waveform"][..., begun : begun + 90038])
            before = frames
            alone = nodes.NavaJoin.execute(frames, following, sound, heard).args[1]
            frames, sound, report = nodes.NavaJoin.execute(
                frames, following, sound, heard, soundtrack=soundtrack, soundtrack_start=0.25
            ).args
            assert torch.equal(frames[: len(before)], before)
            assert torch.equal(frames[len(before) :], following[1:])
            assert "Across the seam colour off by" in report
            assert (alone["waveform"] - sound["waveform"]).abs().max() < 1e-6
        samples = round(length / 24 * RATE)
        assert len(frames) == length
        assert torch.equal(sound["waveform"], soundtrack["waveform"][..., RATE // 4 : RATE // 4 + samples])


def test_made_sound_is_joined_exactly_as_long_and_without_a_click(models):
    frames = moving(49)
    tone = humming(49 / 24, 48000, 2)
    following = {**tone, "waveform": 0.5 * tone["waveform"]}
    joined, sound, report = nodes.NavaJoin.execute(frames, frames, tone, following).args
    assert len(joined) == 97
    assert sound["waveform"].shape == (1, 2, round(97 / 24 * 48000))
    steps = sound["waveform"].diff(dim=-1).abs().max()
    assert steps < 1.5 * tone["waveform"].diff(dim=-1).abs().max()
    assert report.startswith("97 frames, 4.04 s.")
    silent, none, _ = nodes.NavaJoin.execute(frames, frames).args
    assert none is None
    assert torch.equal(silent, joined)


def test_a_soundtrack_that_ends_within_the_clip(models):
    frames, tone, short = moving(49), humming(49 / 24, 48000, 2, seed=1), humming(3.0, 48000, 2)
    _, sound, _ = nodes.NavaJoin.execute(frames, frames, tone, tone, soundtrack=short).args
    assert torch.equal(sound["waveform"][..., :144000], short["waveform"])
    assert sound["waveform"][..., 150000:].abs().max() > 0.01
    _, alone, report = nodes.NavaJoin.execute(frames, frames, soundtrack=short).args
    assert not alone["waveform"][..., 144000:].any()
    assert "what follows is silence" in report


def test_a_soundtrack_with_a_pause_as_long_as_a_segment(models):
    track = humming(4.0)
    track["waveform"][..., RATE:] = 0
    begun, _, _ = continued(models, moving(49), soundtrack=track, audio_vae=models.audio_vae)
    assert given_steps(begun) == list(range(52))
    _, heard, _ = nodes.NavaJoin.execute(moving(9), moving(9), soundtrack=track, soundtrack_start=2.0).args
    assert not heard["waveform"].any()


def test_held_colours_go_back_to_the_first_frame(models):
    frames = moving(9)
    frames = torch.cat([frames[:8], (frames[8:] * 0.5 + 0.3)])
    _, as_is, _ = continued(models, frames)
    _, held, _ = continued(models, frames, hold="colour")
    mean = frames[0].mean((0, 1))
    assert (held[0].mean((0, 1)) - mean).abs().max() < 0.01 < (as_is[0].mean((0, 1)) - mean).abs().max()


def test_a_segment_with_other_given_parts(models):
    latent = give_sound(give_frames(empty(), models, moving(1), "at the end")[0], models)[0]
    begun = continued(models, moving(), latent)[0]
    assert given_frames(begun) == [0, 6]
    assert given_steps(begun) == list(range(27))


def test_segments_that_cannot_begin(models, finished):
    frames = moving()
    with pytest.raises(ValueError, match="has content: a segment begins with the last frame"):
        continued(models, frames, finished[0])
    with pytest.raises(ValueError, match="begins with a picture already"):
        continued(models, frames, first_frame(empty(), models, moving(1)))
    with pytest.raises(ValueError, match="no picture"):
        continued(models, frames, empty("audio only"))
    with pytest.raises(ValueError, match="needs the audio VAE"):
        continued(models, frames, soundtrack=humming())
    with pytest.raises(ValueError, match="before this segment begins"):
        continued(models, frames, soundtrack=humming(0.5), audio_vae=models.audio_vae)
    latent, _, report = continued(models, frames, soundtrack=humming(0.5), audio_vae=models.audio_vae, rest="generated")
    assert given_frames(latent) == [0]
    assert "the segment's sound is made" in report


def test_clips_that_cannot_be_joined():
    with pytest.raises(ValueError, match="in the clip's size"):
        nodes.NavaJoin.execute(moving(), moving(width=32))
    with pytest.raises(ValueError, match="single frame"):
        nodes.NavaJoin.execute(moving(), moving(1))
    with pytest.raises(ValueError, match="none of the next segment"):
        nodes.NavaJoin.execute(moving(), moving(), humming())
