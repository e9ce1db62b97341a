"""First frames, audio-only and picture-only clips, tiled decoding and the full-size video VAE, on the real server."""

import comfy_host
import numpy
import pytest
import torch
from graphs import Graph
from media_checks import assert_alive, read_media
from PIL import Image
from safetensors.torch import save_file
from voices import write_photo, write_voice

comfy_host.require_comfyui()

OWN, BUCKET = "the latent's own", "nearest bucket to the picture"


@pytest.fixture(scope="module")
def photo(comfy):
    return write_photo(comfy.base / "input" / "astronaut.png").name


@pytest.fixture(scope="module")
def recording(comfy):
    return write_voice(comfy.base / "input" / "speaker.wav", "low").name


def pixels(path):
    return numpy.asarray(Image.open(path).convert("RGB")).astype(int)


def saved(run, prefix):
    return next(path for path in run.files if path.name.startswith(prefix))


def first_frame(graph, comfy, photo, latent, size=OWN):
    image = graph.add("LoadImage", image=photo)
    return graph.add("NavaFirstFrame", latent=latent, image=image, vae=graph.video_vae(comfy.names), size=size)


def test_frame_0_is_the_vaes_round_trip_of_the_picture(comfy, photo):
    graph = Graph()
    given = first_frame(graph, comfy, photo, graph.latent())
    vae = graph.video_vae(comfy.names)
    latent = graph.sampler(graph.model(comfy.names), graph.prompt(graph.clip(comfy.names)), given, steps=2)
    frames = graph.frames(latent, vae)
    one = graph.add("ImageFromBatch", image=frames, batch_index=0, length=1)
    graph.add("SaveImage", images=one, filename_prefix="first_of_clip")
    later = graph.add("ImageFromBatch", image=frames, batch_index=12, length=1)
    graph.add("SaveImage", images=later, filename_prefix="later")
    fitted = graph.of(given, 1)
    graph.add("SaveImage", images=fitted, filename_prefix="fitted")
    trip = graph.add("VAEDecode", samples=graph.add("VAEEncode", pixels=fitted, vae=vae), vae=vae)
    graph.add("SaveImage", images=trip, filename_prefix="round_trip")
    graph.add("PreviewAny", source=graph.of(given, 2))
    run = comfy.ok(graph)
    clip, trip = pixels(saved(run, "first_of_clip")), pixels(saved(run, "round_trip"))
    assert trip.std() > 4
    assert numpy.abs(clip - trip).max() <= 1
    assert numpy.abs(pixels(saved(run, "later")) - trip).max() > 8
    assert pixels(saved(run, "fitted")).shape == (64, 96, 3)
    report = next(output["text"][0] for output in run.outputs.values() if "text" in output)
    assert report == "512x512 scaled to 96x96 (0.19x), cropped by 32 px of height: the clip is 96x64."


@pytest.mark.parametrize(
    ("width", "height", "bucket", "clip"),
    [
        (512, 512, BUCKET, (960, 960)),
        (300, 512, "nearest bucket of scale 640", (480, 832)),
        (512, 300, "nearest bucket of scale 512", (672, 384)),
    ],
)
def test_bucket_gives_the_clip_the_pictures_proportions(comfy, photo, width, height, bucket, clip):
    graph = Graph()
    image = graph.add("ImageScale", image=graph.add("LoadImage", image=photo), upscale_method="area",
                      width=width, height=height, crop="disabled")  # fmt: skip
    given = graph.add(
        "NavaFirstFrame", latent=graph.latent(seconds=0.5), image=image, vae=graph.video_vae(comfy.names), size=bucket
    )
    graph.save_latents(given, "bucket")
    graph.add("SaveImage", images=graph.of(given, 1), filename_prefix="bucket_fitted")
    run = comfy.ok(graph)
    assert pixels(saved(run, "bucket_fitted")).shape[:2] == (clip[1], clip[0])
    from safetensors.torch import load_file

    video = load_file(saved(run, "bucket_video"))["latent_tensor"]
    assert video.shape == (1, 48, 4, clip[1] // 16, clip[0] // 16)
    assert video[:, :, 0].any()
    assert not video[:, :, 1:].any()


def test_first_frame_of_an_audio_only_clip_is_refused(comfy, photo):
    graph = Graph()
    given = first_frame(graph, comfy, photo, graph.latent(mode="audio only"))
    graph.save_latents(given, "never")
    node, message = comfy.fails(graph)
    assert node == "NavaFirstFrame"
    assert "no picture" in message


def voices(graph, comfy, recording):
    encoder = graph.add("NavaLoadSpeakerEncoder", file=comfy.names["speaker_encoder"])
    sound = graph.add("LoadAudio", audio=recording)
    timbre = graph.add("NavaEncodeTimbre", speaker_encoder=encoder, audio=sound, start=0.0, duration=0.0)
    return {"voices.voice0": timbre}


@pytest.mark.parametrize("voiced", [False, True])
@pytest.mark.parametrize("mode", ["audio only", "video only"])
def test_one_modality_alone(comfy, recording, mode, voiced):
    graph = Graph()
    spoken = voices(graph, comfy, recording) if voiced else {}
    positive = graph.prompt(graph.clip(comfy.names), **spoken)
    latent = graph.sampler(graph.model(comfy.names), positive, graph.latent(mode=mode), steps=2)
    if mode == "audio only":
        graph.add("SaveAudio", audio=graph.sound(latent, graph.audio_vae(comfy.names)), filename_prefix="alone")
        media = read_media(comfy.ok(graph).file(".flac"))
        assert media.frames is None
        assert (media.channels, media.sample_rate) == (2, 48000)
    else:
        graph.save_clip(graph.frames(latent, graph.video_vae(comfy.names)), prefix="alone")
        media = read_media(comfy.ok(graph).file(".mp4"))
        assert media.samples is None
        assert len(media.frames) == 25
    assert_alive(media)


def test_tiled_decoding(comfy):
    """One tile over all is the whole picture; with small ones the picture has its size and no seams of black."""

    def run(decoding, **tiles):
        graph = Graph()
        latent = graph.add("LTXVConcatAVLatent", video_latent=parts(graph), audio_latent=graph.of(parts(graph), 1))
        frames = graph.frames(latent, graph.video_vae(comfy.names), decoding, **tiles)
        graph.save_clip(frames, prefix="tiles")
        return read_media(comfy.ok(graph).file(".mp4")).frames.astype(int)

    def parts(graph):
        model, positive = graph.model(comfy.names), graph.prompt(graph.clip(comfy.names))
        latent = graph.sampler(model, positive, graph.latent(width=96, height=128, seconds=0.5), steps=1)
        return graph.add("LTXVSeparateAVLatent", av_latent=latent)

    whole, one_tile, tiled = run("whole"), run("tiled", tile_size=256), run("tiled", tile_size=64)
    assert whole.shape == tiled.shape == (13, 128, 96, 3)
    assert (whole == one_tile).all()
    assert 0 < numpy.abs(whole - tiled).mean() < 20  # of 255 levels, with random weights
    assert tiled.std(axis=(1, 2, 3)).min() > 4


def test_voice_warnings_reach_the_canvas(comfy):
    """A fifth of a second of silence: encoded all the same, with sentences on what is wrong."""
    graph = Graph()
    sound = graph.add("EmptyAudio", duration=0.2, sample_rate=8000, channels=2)
    encoder = graph.add("NavaLoadSpeakerEncoder", file=comfy.names["speaker_encoder"])
    timbre = graph.add("NavaEncodeTimbre", speaker_encoder=encoder, audio=sound, start=0.0, duration=0.0)
    show = graph.add("PreviewAny", source=graph.of(timbre, 1))
    text = comfy.ok(graph).text(show[0])
    for word in ("silent", "0.20 s", "8000 Hz"):
        assert word in text, text


def test_full_size_video_vae(comfy, tmp_path):
    """The released Wan2.2 VAE's dimensions, with random weights."""
    comfy_host.import_comfyui()
    from comfy.ldm.wan.vae2_2 import WanVAE

    with torch.device("meta"):
        shapes = WanVAE(
            dim=160, dec_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
            temperal_downsample=[False, True, True],
        ).state_dict()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in shapes.items():
        scale = 1.0 if name.endswith("gamma") else (0.5 / max(1, value[0].numel())) ** 0.5
        weights[name] = (torch.randn(value.shape, generator=generator) * scale).half()
        if name.endswith("gamma"):
            weights[name] = torch.ones(value.shape, dtype=torch.float16)
    assert sum(w.numel() for w in weights.values()) == pytest.approx(704.7e6, rel=0.01)
    target = comfy.base / "models" / "vae" / "full_size_vae.safetensors"
    save_file(weights, target)
    del weights
    try:
        graph = Graph()
        vae = graph.add("NavaLoadVideoVAE", file=target.name, device="default")
        latent = graph.sampler(
            graph.model(comfy.names), graph.prompt(graph.clip(comfy.names)), graph.latent(seconds=1 / 3), steps=1
        )
        graph.save_clip(graph.frames(latent, vae), prefix="full_size")
        clip = read_media(comfy.ok(graph).file(".mp4"))
    finally:
        target.unlink()
    assert clip.frames.shape == (9, 64, 96, 3)
    assert clip.frames.std() > 0
