"""Given parts on the real server, through stock samplers and stock latent nodes: what was given stays as it is, and how
it is shown goes where the mask goes."""

import wave

import comfy_host
import numpy
import pytest
import torch
from graphs import SCALES, Graph
from media_checks import read_media
from PIL import Image
from safetensors.torch import load_file

comfy_host.require_comfyui()

RATE, SECONDS, FRAMES = 44100, 1.0, 25
SAMPLES = 45938  # of 25 frames
CLEAN, NOISED = "clean", "matched noise"


@pytest.fixture(scope="module")
def recording(comfy):
    """(file name, 16-bit samples) of three seconds of a swelling tone."""
    time = numpy.arange(3 * RATE) / RATE
    tone = numpy.sin(2 * numpy.pi * 180 * time) + 0.5 * numpy.sin(2 * numpy.pi * 410 * time + 1)
    samples = (6000 * tone * (0.6 + 0.4 * numpy.sin(5 * time))).astype("<i2")
    with wave.open(str(comfy.base / "input" / "given.wav"), "wb") as file:
        file.setparams((1, 2, RATE, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())
    return "given.wav", samples


@pytest.fixture(scope="module")
def picture(comfy):
    rows, columns = numpy.mgrid[0:64, 0:96] / 64
    waves = [(numpy.sin(7 * rows * (k + 1) + 5 * columns * (3 - k)) + 1) / 2 for k in range(3)]
    Image.fromarray((numpy.stack(waves, -1) * 255).astype("uint8")).save(comfy.base / "input" / "given.png")
    return "given.png"


class Clip:
    """A graph with the models, and what these tests do in each."""

    def __init__(self, comfy):
        self.comfy, self.graph = comfy, Graph()
        names = comfy.names
        self.model, self.positive = self.graph.model(names), self.graph.prompt(self.graph.clip(names))
        self.vae, self.audio_vae = self.graph.video_vae(names), self.graph.audio_vae(names)

    def add(self, *inputs, **named):
        return self.graph.add(*inputs, **named)

    def latent(self, **settings):
        return self.graph.latent(**{"seconds": SECONDS, **settings})

    def given_sound(self, latent, file, shown=CLEAN, rest="silence", position=0.0, duration=0.0):
        return self.add(
            "NavaGivenAudio", latent=latent, audio=self.add("LoadAudio", audio=file), audio_vae=self.audio_vae,
            start=0.0, position=position, duration=duration, rest=rest, shown=shown,
        )  # fmt: skip

    def given_frames(self, latent, images, place="from seconds", seconds=0.0, use="keep", shown=CLEAN):
        return self.add(
            "NavaGivenFrames", latent=latent, images=images, vae=self.vae, place=place, seconds=seconds, fps=24.0,
            use=use, shown=shown,
        )  # fmt: skip

    def nava_sampler(self, latent, **settings):
        return self.graph.sampler(self.model, self.positive, latent, steps=2, **settings)

    def stock_sampler(self, latent, **settings):
        guider = self.add("NavaGuider", model=self.model, positive=self.positive, **SCALES)
        return self.graph.custom_sampler(guider, latent, steps=2, **settings)

    def stock_split(self, latent):
        parts = self.add("LTXVSeparateAVLatent", av_latent=latent)
        return parts, self.graph.of(parts, 1)

    def stock_join(self, video, audio):
        return self.add("LTXVConcatAVLatent", video_latent=video, audio_latent=audio)

    def save_sound(self, latent, prefix):
        self.add("SaveAudio", audio=self.graph.sound(latent, self.audio_vae), filename_prefix=prefix)

    def save_frames(self, images, prefix):
        self.add("SaveImage", images=images, filename_prefix=prefix)

    def run(self):
        """Sounds, frames and latents by the prefixes that they were saved under."""
        found = {}
        for path in self.comfy.ok(self.graph).files:
            prefix = path.name.rsplit("_00", 1)[0]
            if path.suffix == ".latent":
                found[prefix] = load_file(path)["latent_tensor"]
            elif path.suffix == ".png":
                found.setdefault(prefix, []).append(numpy.asarray(Image.open(path).convert("RGB")))
            elif path.suffix == ".flac":
                found.setdefault(prefix, []).append(read_media(path))
        return found


def same_sound(media, samples):
    assert media.sample_rate == RATE
    assert media.samples.shape[1] == SAMPLES
    return (media.samples * 32768 == samples[:SAMPLES]).all()


def test_given_sound_stays_sample_for_sample_on_every_way_through_stock_nodes(comfy, recording):
    file, samples = recording
    clip = Clip(comfy)
    given = clip.given_sound(clip.latent(width=64, height=32), file)
    split = clip.stock_join(*clip.stock_split(given))
    ways = {
        "one_node": clip.nava_sampler(given),
        "stock": clip.stock_sampler(given),
        "split_before": clip.stock_sampler(split),
    }
    ways["split_after"] = clip.stock_join(*clip.stock_split(ways["stock"]))
    ways["sound_alone"] = clip.stock_split(ways["one_node"])[1]
    for name, latent in ways.items():
        clip.save_sound(latent, f"given_{name}")
    clip.add("SaveAudio", audio=clip.graph.of(given, 1), filename_prefix="given_output")
    for name in ("one_node", "stock", "split_before"):
        clip.graph.save_latents(ways[name], f"way_{name}")
    found = clip.run()
    for name in [*ways, "output"]:
        (media,) = found[f"given_{name}"]
        assert same_sound(media, samples), name
    for part in ("video", "audio"):
        for name in ("stock", "split_before"):
            assert torch.equal(found[f"way_one_node_{part}"], found[f"way_{name}_{part}"]), (name, part)


def test_how_a_part_is_shown_goes_through_stock_nodes(comfy, recording, picture):
    """As the mask's mark: the same latents as without the detour, and others than with the other mark."""
    clip = Clip(comfy)
    latent = clip.latent(width=64, height=32)
    image = clip.add("LoadImage", image=picture)
    for shown in (CLEAN, NOISED):
        given = clip.given_sound(clip.given_frames(latent, image, "at the end", shown=shown), recording[0], shown)
        video, audio = clip.stock_split(given)
        there_and_back = clip.stock_join(video, audio)
        twice = clip.stock_join(
            clip.add("RepeatLatentBatch", samples=video, amount=2),
            clip.add("RepeatLatentBatch", samples=audio, amount=2),
        )
        name = shown.split(" ")[0]
        clip.graph.save_latents(clip.nava_sampler(given), f"{name}_direct")
        clip.graph.save_latents(clip.nava_sampler(there_and_back), f"{name}_detour")
        clip.graph.save_latents(clip.nava_sampler(twice), f"{name}_twice")
        clip.graph.save_latents(given, f"{name}_given")
    found = clip.run()
    for shown in ("clean", "matched"):
        assert torch.equal(found[f"{shown}_direct_video"], found[f"{shown}_detour_video"])
        assert len(found[f"{shown}_twice_video"]) == 2
        for name in ("direct_video", "twice_video"):
            assert (found[f"{shown}_{name}"][:, :, 6] == found[f"{shown}_given_video"][:, :, 6]).all()
        assert (found[f"{shown}_twice_audio"] == found[f"{shown}_given_audio"]).all()
    for name in ("direct", "twice"):
        assert (found[f"clean_{name}_video"] - found[f"matched_{name}_video"]).abs().max() > 1e-2, name
    # The sound's noise, which only a noised sound needs, is another in a batch.
    assert (found["clean_twice_video"][:1] - found["clean_direct_video"]).abs().max() < 1e-3


def test_stock_nodes_on_parts_of_a_clip_with_given_parts(comfy, recording, picture):
    """SetLatentNoiseMask on the picture leaves the given sound; cut and joined latents are sampled, and pictures that
    moved in time are not put back where they were."""
    clip = Clip(comfy)
    image = clip.add("LoadImage", image=picture)
    four = clip.add("RepeatImageBatch", image=image, amount=4)
    given = clip.given_sound(clip.given_frames(clip.latent(width=64, height=32), four, "at the end"), recording[0])
    made = clip.nava_sampler(given)
    video, audio = clip.stock_split(made)
    black = clip.add("SolidMask", value=0.0, width=64, height=32)
    white = clip.add("SolidMask", value=1.0, width=32, height=32)
    half = clip.add("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")
    region = clip.stock_join(clip.add("SetLatentNoiseMask", samples=video, mask=half), audio)
    again = clip.nava_sampler(region, seed=8)
    clip.graph.save_latents(made, "before")
    clip.graph.save_latents(again, "after")
    clip.save_sound(again, "masked")
    cut = clip.add("LatentCut", samples=video, dim="t", index=3, amount=4)
    swapped = clip.add("LatentConcat", samples1=cut, dim="t",
                       samples2=clip.add("LatentCut", samples=video, dim="t", index=0, amount=3))  # fmt: skip
    clip.save_frames(clip.graph.frames(made, clip.vae), "whole")
    clip.save_frames(clip.graph.frames(swapped, clip.vae), "swapped")
    found = clip.run()
    before, after = found["before_video"], found["after_video"]
    assert torch.equal(before[..., 2:], after[..., 2:])
    assert (before[..., :2] != after[..., :2]).any(dim=1).all()
    assert same_sound(found["masked"][0], recording[1])
    assert len(found["swapped"]) == len(found["whole"]) == FRAMES
    assert not any((found["swapped"][frame] == found["whole"][24]).all() for frame in range(FRAMES))


def test_a_second_pass_by_splitting_the_schedule(comfy, picture):
    """What stands in the latent is the start, and a given last frame is kept."""
    clip = Clip(comfy)
    image = clip.add("LoadImage", image=picture)
    still = clip.add("RepeatImageBatch", image=image, amount=FRAMES)
    start = clip.given_frames(clip.latent(width=96, height=64), still, use="start from them")
    given = clip.given_frames(start, clip.add("RepeatImageBatch", image=image, amount=4), "at the end")
    low = clip.add("SplitSigmasDenoise", sigmas=clip.add("NavaSigmas", steps=4, shift=5.0), denoise=0.25)
    late = clip.stock_sampler(given, sigmas=clip.graph.of(low, 1))
    clip.graph.save_latents(given, "start")
    clip.graph.save_latents(late, "late")
    clip.graph.save_latents(clip.stock_sampler(given), "full")
    clip.save_frames(clip.graph.frames(late, clip.vae), "late")
    clip.save_frames(image, "still")
    found = clip.run()
    start, late, full = (found[f"{name}_video"] for name in ("start", "late", "full"))
    assert torch.equal(start[:, :, 6], late[:, :, 6])
    assert 0 < (start - late).abs().mean() < (start - full).abs().mean()
    assert (found["late"][24] == found["still"][0]).all()
    assert (found["late"][12] != found["still"][0]).any()


@pytest.mark.parametrize("sampler", ["nava_sampler", "stock_sampler"])
def test_a_retake_keeps_latents_frames_and_samples(comfy, recording, sampler):
    clip = Clip(comfy)
    latent = clip.given_sound(clip.latent(width=64, height=32), recording[0], rest="generated", duration=0.3)
    made = clip.nava_sampler(latent)
    frames, sound = clip.graph.frames(made, clip.vae), clip.graph.sound(made, clip.audio_vae)
    opened = clip.add("NavaRetake", latent=made, start=0.4, end=0.6, part="picture and sound", shown=CLEAN,
                      frames=frames, audio=sound)  # fmt: skip
    again = getattr(clip, sampler)(opened, seed=9)
    clip.graph.save_latents(made, "before")
    clip.graph.save_latents(again, "after")
    clip.save_frames(frames, "before")
    clip.save_frames(clip.graph.frames(again, clip.vae), "after")
    clip.add("SaveAudio", audio=sound, filename_prefix="heard_before")
    clip.save_sound(again, "heard_after")
    found = clip.run()
    for part, made_again in (("video", slice(3, 5)), ("audio", slice(10, 15))):
        same = (found[f"before_{part}"] == found[f"after_{part}"]).transpose(1, 2).flatten(2).all(-1)[0]
        assert [step for step, kept in enumerate(same) if not kept] == list(range(made_again.start, made_again.stop))
    same = [(a == b).all() for a, b in zip(found["before"], found["after"], strict=True)]
    assert [frame for frame, kept in enumerate(same) if not kept] == list(range(9, 17))
    before, after = (found[f"heard_{name}"][0].samples for name in ("before", "after"))
    same = (before == after).all(axis=0)
    assert same[: round(0.4 * RATE)].all()
    assert same[round(0.6 * RATE) :].all()
    assert not same[round(0.45 * RATE) : round(0.55 * RATE)].all()


def test_two_segments_become_one_clip_with_its_soundtrack(comfy, recording):
    clip = Clip(comfy)
    size = {"width": 64, "height": 32}
    first = clip.nava_sampler(clip.given_sound(clip.latent(**size), recording[0]))
    frames = clip.graph.frames(first, clip.vae)
    track = clip.add("LoadAudio", audio=recording[0])
    following = clip.add(
        "NavaContinue", frames=frames, latent=clip.latent(**size), vae=clip.vae, hold="colour", soundtrack=track,
        audio_vae=clip.audio_vae,
    )  # fmt: skip
    second = clip.nava_sampler(following, seed=8)
    joined = clip.add(
        "NavaJoin", frames=frames, next_frames=clip.graph.frames(second, clip.vae),
        audio=clip.graph.sound(first, clip.audio_vae), next_audio=clip.graph.sound(second, clip.audio_vae),
        soundtrack=track,
    )  # fmt: skip
    clip.graph.save_clip(joined, clip.graph.of(joined, 1), prefix="joined")
    clip.add("SaveAudio", audio=clip.graph.of(joined, 1), filename_prefix="joined")
    show = clip.add("PreviewAny", source=clip.graph.of(joined, 2))
    run = comfy.ok(clip.graph)
    video, sound = read_media(run.file(".mp4")), read_media(run.file(".flac"))
    assert len(video.frames) == 49
    assert video.audio_seconds == pytest.approx(49 / 24, abs=1e-3)
    assert sound.samples.shape[1] == round(49 / 24 * RATE)
    assert (sound.samples * 32768 == recording[1][: sound.samples.shape[1]]).all()
    assert run.text(show[0]).startswith("49 frames, 2.04 s. Across the seam colour off by ")


def test_a_silent_video_has_no_sound_to_give(comfy, recording, picture):
    clip = Clip(comfy)
    silent = clip.add("CreateVideo", images=clip.add("LoadImage", image=picture), fps=24.0)
    parts = clip.add("GetVideoComponents", video=silent)
    given = clip.add(
        "NavaGivenAudio", latent=clip.latent(), audio=clip.graph.of(parts, 1), audio_vae=clip.audio_vae, start=0.0,
        position=0.0, duration=0.0, rest="silence", shown=CLEAN,
    )  # fmt: skip
    clip.graph.save_latents(given, "never")
    node, message = comfy.fails(clip.graph)
    assert node == "NavaGivenAudio"
    assert "There is no given sound" in message
    assert "\n" not in message
