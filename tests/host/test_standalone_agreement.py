"""The library without a host against the nodes in ComfyUI: each component on the same file, and clips' latents."""

import math
import wave

import comfy_host
import pytest
import torch
from graphs import PROMPT, Graph
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()
pytest.importorskip("diffusers", reason="the standalone components need diffusers")
pytest.importorskip("transformers", reason="the standalone text encoder needs transformers")

from nava_core.components import (  # noqa: E402
    denormalize_video,
    load_audio_vae,
    load_text_encoder,
    load_tokenizer,
    load_video_vae,
    normalize_video,
)
from nava_core.components.video_vae import diffusers_name, video_vae_config  # noqa: E402
from nava_core.geometry import audio_latents_of_frames  # noqa: E402
from nava_core.pipeline import ClipLatents, ModelFiles, NavaPipeline  # noqa: E402
from nava_core.pipeline.given import Retake  # noqa: E402
from nava_core.pipeline.stages import read_picture  # noqa: E402
from nava_core.prompt import negative_text  # noqa: E402

host_text = comfy_host.pack_module("nodes.host.text_encoder")
host_video = comfy_host.pack_module("nodes.host.video_vae")
host_audio = comfy_host.pack_module("nodes.host.audio_vae")
conditions = comfy_host.pack_module("nodes.host.conditioning")
prompt_nodes = comfy_host.pack_module("nodes.prompt")

COMPONENT, LATENTS = 1e-4, 1e-3  # max abs differences
TERMS = "picture and sound, Chinese"  # of a negative for a clip with a picture
SETTINGS = {"seconds": 1, "width": 96, "height": 64, "seed": 11, "steps": 4}


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


# --- components --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["text_encoder", "text_encoder_fp8", "text_encoder_pth"])
def test_text_contexts_agree(small_models, role):
    folder = small_models["tokenizer"] if role.endswith("pth") else None
    with torch.inference_mode():
        clip = host_text.load_text_encoder(small_models[role], tokenizer_folder=folder)
        ids = host_text.prompt_tokenizer(clip)(PROMPT).ids
        theirs = host_text.encode_ids(clip, ids)
    assert load_tokenizer(small_models[role], folder)(PROMPT).ids == ids
    assert difference(load_text_encoder(small_models[role]).encode(ids), theirs) < COMPONENT


def test_video_vaes_agree(small_models):
    frames = torch.rand(9, 64, 96, 3, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        host = host_video.load_video_vae(small_models["video_vae"])
        latent = host_video.encode_video(host, frames)
        decoded = host_video.decode_video(host, latent)
        first = host_video.encode_video(host, frames[:1])
    ours = load_video_vae(small_models["video_vae"])
    assert difference(ours.encode(frames), latent) < COMPONENT
    assert difference(ours.encode(frames[:1]), first) < COMPONENT
    assert difference(ours.decode(latent.clone()), decoded) < COMPONENT


def test_the_released_video_vae_has_a_place_for_every_tensor():
    """At the released width, laid out without memory: the host's names and shapes against diffusers'."""
    import comfy.ldm.wan.vae2_2
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        host = comfy.ldm.wan.vae2_2.WanVAE(
            dim=160, dec_dim=256, z_dim=48, num_res_blocks=2, temperal_downsample=[False, True, True]
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in host.state_dict().items()}
        ours = AutoencoderKLWan(**video_vae_config(shapes, "wan2.2_vae.safetensors")).state_dict()
    assert {diffusers_name(name): shape for name, shape in shapes.items()} == {
        name: tuple(tensor.shape) for name, tensor in ours.items()
    }


def test_latent_spaces_agree():
    import comfy.latent_formats

    host, latent = comfy.latent_formats.Wan22(), noise(1, 48, 2, 3, 4)
    assert torch.equal(normalize_video(latent), host.process_in(latent))
    assert torch.equal(denormalize_video(latent), host.process_out(latent))


def test_audio_vaes_agree(small_models):
    latent = noise(1, 8, 26, 16)
    with torch.inference_mode():
        theirs = host_audio.decode_audio(host_audio.load_audio_vae(small_models["audio_vae"]), latent)
    ours = load_audio_vae(small_models["audio_vae"])
    assert ours.sample_rate == theirs["sample_rate"]
    assert difference(ours.decode(latent), theirs["waveform"]) < COMPONENT


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 2), (48_000, 2), (44_100, 1), (24_000, 6), (22_050, 2)])
def test_audio_vaes_hear_the_same(small_models, rate, channels):
    """A clip of 25 frames, with pauses; the host gives a step more for some lengths, which a clip has no place for."""
    sound = 0.2 * noise(channels, round(25 / 24 * rate))
    sound[:, rate // 4 : rate // 2] = 0
    sound[:, rate // 2 : 3 * rate // 4] *= 0.01
    steps = audio_latents_of_frames(25)
    with torch.inference_mode():
        host = host_audio.load_audio_vae(small_models["audio_vae"])
        theirs = host_audio.encode_audio(host, {"waveform": sound[None], "sample_rate": rate})[:, :, :steps]
    ours = load_audio_vae(small_models["audio_vae"])
    latent = ours.encode(sound, rate, steps)
    assert latent.shape == (1, 8, steps, 16)
    assert difference(latent, theirs) < (COMPONENT if rate == 16_000 else 10 * COMPONENT)
    assert float((latent - ours.encode(0 * sound, rate, steps)).abs().max()) > 0.1
    assert difference(ours.encode(sound, rate, steps - 5), theirs[:, :, :-5]) < 10 * COMPONENT


# --- whole clips -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(comfy, small_models):
    """A calmer small backbone, in the server's folder. With the demo's own, whose attention is steep, rounding errors
    grow a thousandfold in four steps, and two right computations differ by more than the tolerance."""
    with safe_open(small_models["backbone"], "pt") as file:
        metadata = file.metadata()
    weights = load_file(small_models["backbone"])
    for name, weight in weights.items():
        if "modulation" in name:
            weight /= 4
        elif "norm_q" in name or "norm_k" in name:
            weight.copy_(1 + (weight - weight.mean()) / 4)
    path = comfy.base / "models" / "diffusion_models" / "NAVA_calm.safetensors"
    save_file(weights, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def pipeline(small_models, backbone):
    roles = ("text_encoder", "video_vae", "audio_vae", "speaker_encoder")
    files = ModelFiles(backbone=backbone, **{role: small_models[role] for role in roles})
    return NavaPipeline.from_files(files, device="cpu")


@pytest.fixture(scope="module")
def picture(comfy):
    """A photo-like picture whose proportions are not the clip's."""
    path = comfy.base / "input" / "agreement.png"
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 150), torch.linspace(0, 1, 170), indexing="ij")
    waves = [(torch.sin(9 * rows * (k + 1) + 7 * columns * (3 - k)) + 1) / 2 for k in range(3)]
    Image.fromarray((torch.stack(waves, -1) * 255).to(torch.uint8).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def recording(comfy):
    """Two seconds of a humming voice, stereo at 44.1 kHz."""
    path = comfy.base / "input" / "agreement.wav"
    time = torch.arange(88200) / 44100
    hum = sum(torch.sin(2 * math.pi * 140 * k * time) / k for k in range(1, 9)) * (0.6 + 0.4 * torch.sin(9 * time))
    samples = (torch.stack([hum, 0.7 * hum], -1) * 6000).to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(samples.numpy().tobytes())
    return path


def voice_of(graph, comfy, recording):
    encoder = graph.add("NavaLoadSpeakerEncoder", file=comfy.names["speaker_encoder"])
    audio = graph.add("LoadAudio", audio=recording.name)
    return graph.add("NavaEncodeTimbre", speaker_encoder=encoder, audio=audio, start=0.0, duration=0.0)


def with_picture(graph, comfy, latent, picture):
    image = graph.add("LoadImage", image=picture.name)
    vae = graph.video_vae(comfy.names)
    return graph.add("NavaFirstFrame", latent=latent, image=image, vae=vae, size="the latent's own")


def host_latents(
    comfy,
    prefix,
    *,
    mode="video and audio",
    picture=None,
    recording=None,
    negative="",
    terms=TERMS,
    given=None,
    retake=None,
    **scales,
):
    """(video, audio) latents of a run on the server; by default with the negative that its workflows have. ``given``
    puts given parts into the empty latent, ``retake`` opens a span of what was sampled for a second run."""
    graph = Graph()
    clip = graph.clip(comfy.names)
    model = graph.model({"backbone": "NAVA_calm.safetensors"})
    voices = {} if recording is None else {"voices.voice0": voice_of(graph, comfy, recording)}
    latent = graph.latent(mode=mode)
    if picture is not None:
        latent = with_picture(graph, comfy, latent, picture)
    if given is not None:
        latent = given(graph, latent)
    if negative is not None:
        scales["negative"] = graph.prompt(clip, negative, negative_terms=terms)
    positive = graph.prompt(clip, **voices)
    sampled = graph.sampler(model, positive, latent, seed=11, steps=4, **scales)
    if retake is not None:
        again = graph.add("NavaRetake", latent=sampled, shown="clean", **retake)
        sampled = graph.sampler(model, positive, again, seed=12, steps=4, **scales)
    graph.save_latents(sampled, prefix)
    files = comfy.ok(graph).files
    paths = [next(p for p in files if p.name.startswith(f"{prefix}_{part}")) for part in ("video", "audio")]
    return [load_file(path)["latent_tensor"] for path in paths]


def assert_agree(clip, parts):
    assert difference(clip.video_latent, parts[0]) < LATENTS
    assert difference(clip.audio_latent, parts[1]) < LATENTS


def assert_far(clip, other):
    """What the two differ in shows by far more than the tolerance."""
    for name in ("video_latent", "audio_latent"):
        if getattr(clip, name) is not None:
            assert (getattr(clip, name) - getattr(other, name)).abs().max() > 10 * LATENTS


def test_text_to_clip_agrees(comfy, pipeline):
    negative = "noise, a blurred picture"
    clip = pipeline(PROMPT, negative=negative, **SETTINGS)
    assert_agree(clip, host_latents(comfy, "agree_text", negative=negative, terms="none"))
    assert_far(clip, pipeline(PROMPT, **SETTINGS))
    assert_far(clip, pipeline(PROMPT, negative=negative, **{**SETTINGS, "seed": 12}))


def test_the_default_negative_and_the_zero_one_agree(comfy, pipeline):
    """The library's default is a node with no text of its own and Chinese terms; its "zero" is an input left open."""
    by_default, zero = pipeline(PROMPT, **SETTINGS), pipeline(PROMPT, negative="zero", **SETTINGS)
    assert_agree(by_default, host_latents(comfy, "agree_default"))
    assert_agree(zero, host_latents(comfy, "agree_zero", negative=None))
    assert_agree(zero, host_latents(comfy, "agree_empty", negative="", terms="none"))
    assert_far(by_default, zero)


@pytest.mark.parametrize(("terms", "mode"), [(TERMS, "video+audio"), (TERMS, "video"), ("sound, Chinese", "audio")])
def test_a_node_with_terms_alone_encodes_exactly_the_librarys_default(small_models, terms, mode):
    text = negative_text(None, mode)
    with torch.inference_mode():
        clip = host_text.load_text_encoder(small_models["text_encoder"])
        conditioning, report = prompt_nodes.NavaEncodePrompt.execute(clip, "", negative_terms=terms).args
        written, *_ = conditions.encode_prompt(clip, text)
    assert torch.equal(conditioning[0][0], written[0][0])
    ids = load_tokenizer(small_models["text_encoder"])(text).ids
    assert report.startswith(f"{len(ids)} of 512 tokens used.")
    assert difference(load_text_encoder(small_models["text_encoder"]).encode(ids), conditioning[0][0]) < COMPONENT


def test_a_clip_with_a_first_frame_agrees(comfy, pipeline, picture):
    clip = pipeline(PROMPT, image=picture, size_from_image=False, **SETTINGS)
    video, audio = host_latents(comfy, "agree_frame", picture=picture)
    assert difference(clip.video_latent[:, :, :1], video[:, :, :1]) < COMPONENT
    assert_agree(clip, (video, audio))
    assert_far(clip, pipeline(PROMPT, **SETTINGS))


def test_a_clip_with_a_first_frame_and_a_voice_agrees_at_the_makers_scales(comfy, pipeline, picture, recording):
    clip = pipeline(PROMPT, image=picture, size_from_image=False, voices=[recording], **SETTINGS)
    scales = {"video_text": 2.0, "audio_timbre": 2.0}
    assert_agree(clip, host_latents(comfy, "agree_both", picture=picture, recording=recording, **scales))
    assert_far(clip, pipeline(PROMPT, image=picture, size_from_image=False, **SETTINGS))


@pytest.mark.parametrize("mode", ["audio", "video"])
def test_clips_of_one_modality_agree(comfy, pipeline, recording, mode):
    voices = [recording] if mode == "audio" else []
    clip = pipeline(PROMPT, mode=mode, voices=voices, **SETTINGS)
    terms = "sound, Chinese" if mode == "audio" else TERMS
    recording = voices[0] if voices else None
    parts = host_latents(comfy, f"agree_{mode}", mode=f"{mode} only", recording=recording, terms=terms)
    ours = [clip.video_latent, clip.audio_latent]
    present = 0 if mode == "video" else 1
    assert ours[1 - present] is None
    assert difference(ours[present], parts[present]) < LATENTS
    if voices:
        assert_far(clip, pipeline(PROMPT, mode=mode, **SETTINGS))


# --- clips with given parts --------------------------------------------------------------------------------------


def sound_node(graph, comfy, latent, recording, **part):
    settings = {"start": 0.0, "position": 0.0, "duration": 0.0, "rest": "silence", "shown": "clean", **part}
    audio = graph.add("LoadAudio", audio=recording.name)
    return graph.add("NavaGivenAudio", latent=latent, audio=audio, audio_vae=graph.audio_vae(comfy.names), **settings)


def frames_node(graph, comfy, latent, images, **part):
    settings = {"place": "from seconds", "seconds": 0.0, "fps": 24.0, "use": "keep", "shown": "clean", **part}
    return graph.add("NavaGivenFrames", latent=latent, images=images, vae=graph.video_vae(comfy.names), **settings)


def video_node(graph, picture):
    """A silent video that changes once: the picture, then its negative."""
    image = graph.add("LoadImage", image=picture.name)
    negative = graph.add("ImageInvert", image=image)
    halves = [graph.add("RepeatImageBatch", image=each, amount=n) for each, n in ((image, 10), (negative, 15))]
    return graph.add("ImageBatch", image1=halves[0], image2=halves[1])


def video_of(picture):
    frame = read_picture(picture)
    return torch.stack([frame] * 10 + [1.0 - frame] * 15)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"sound_start": 0.3}, {"start": 0.3}),
        (
            {"sound_at": 0.4, "sound_rest": "generated", "shown": "matched noise"},
            {"position": 0.4, "rest": "generated", "shown": "matched noise"},
        ),
    ],
    ids=["whole", "from 0.4 s at the level of the rest"],
)
def test_clips_with_given_sound_agree(comfy, pipeline, recording, ours, theirs):
    clip = pipeline.denoise(PROMPT, sound=recording, **ours, **SETTINGS)
    parts = host_latents(
        comfy, "agree_sound", given=lambda graph, latent: sound_node(graph, comfy, latent, recording, **theirs)
    )
    assert_latents_agree(clip, parts)  # the sound's to the resamplers' difference, as of the components
    other = pipeline.denoise(PROMPT, sound=recording, **{**ours, "sound_start": 0.7}, **SETTINGS)
    assert difference(clip.video, other.video) > 10 * LATENTS


def test_clips_with_a_given_video_agree(comfy, pipeline, picture):
    clip = pipeline.denoise(PROMPT, frames=video_of(picture), size_from_image=False, **SETTINGS)

    def given(graph, latent):
        return frames_node(graph, comfy, latent, video_node(graph, picture))

    parts = host_latents(comfy, "agree_video", given=given)
    assert difference(clip.video, parts[0]) < COMPONENT
    assert_latents_agree(clip, parts)


def test_clips_with_pictures_at_other_times_agree(comfy, pipeline, picture):
    clip = pipeline.denoise(PROMPT, pictures={"end": picture, 0.5: picture}, size_from_image=False, **SETTINGS)

    def given(graph, latent):
        image = graph.add("LoadImage", image=picture.name)
        last = frames_node(graph, comfy, latent, image, place="at the end")
        return frames_node(graph, comfy, last, image, seconds=0.5)

    parts = host_latents(comfy, "agree_pictures", given=given)
    assert difference(clip.video[:, :, [3, 6]], parts[0][:, :, [3, 6]]) < COMPONENT
    assert_latents_agree(clip, parts)


def test_second_passes_agree(comfy, pipeline, picture, recording):
    both = {"frames": video_of(picture), "sound": recording}
    clip = pipeline.denoise(PROMPT, **both, denoise=0.5, size_from_image=False, **SETTINGS)

    def given(graph, latent):
        started = frames_node(graph, comfy, latent, video_node(graph, picture), use="start from them")
        return sound_node(graph, comfy, started, recording)

    assert_latents_agree(clip, host_latents(comfy, "agree_second", given=given, denoise=0.5))


def test_retakes_agree(comfy, pipeline):
    first = pipeline.denoise(PROMPT, **SETTINGS)
    settings = {name: value for name, value in SETTINGS.items() if name not in ("seconds", "width", "height", "seed")}
    again = pipeline.denoise(PROMPT, source=first, retake=Retake(0.4, 0.6), seed=12, **settings)
    span = {"start": 0.4, "end": 0.6, "part": "picture and sound"}
    assert_latents_agree(again, host_latents(comfy, "agree_retake", retake=span))
    assert difference(first.video[:, :, 3:5], again.video[:, :, 3:5]) > 10 * LATENTS


@pytest.mark.parametrize("hold", ["nothing", "colour"])
def test_the_second_of_two_segments_agrees(comfy, pipeline, recording, tmp_path, hold):
    """With a soundtrack through both, which has to be the file's to the sample."""
    settings = {**SETTINGS, "seconds": 2, "segment": 1, "hold": hold}
    pipeline.make_long(tmp_path / "long.mp4", [PROMPT], sound=recording, state=tmp_path / "state", **settings)
    ours = ClipLatents.load(tmp_path / "state" / "001.latents.safetensors")

    graph = Graph()
    clip, vae, audio_vae = graph.clip(comfy.names), graph.video_vae(comfy.names), graph.audio_vae(comfy.names)
    model, positive = graph.model({"backbone": "NAVA_calm.safetensors"}), graph.prompt(clip)
    negative = {"negative": graph.prompt(clip, "", negative_terms=TERMS)}
    track = graph.add("LoadAudio", audio=recording.name)
    begun = sound_node(graph, comfy, graph.latent(), recording)
    first = graph.sampler(model, positive, begun, seed=11, steps=4, **negative)
    following = graph.add(
        "NavaContinue", frames=graph.frames(first, vae), latent=graph.latent(), vae=vae, hold=hold, soundtrack=track,
        audio_vae=audio_vae,
    )  # fmt: skip
    graph.save_latents(graph.sampler(model, positive, following, seed=12, steps=4, **negative), f"agree_{hold}")
    files = comfy.ok(graph).files
    paths = [next(p for p in files if p.name.startswith(f"agree_{hold}_{part}")) for part in ("video", "audio")]
    parts = [load_file(path)["latent_tensor"] for path in paths]
    # A level of 8 bits of the frame that was handed over may be rounded the other way.
    assert float((ours.video - parts[0]).abs().mean()) < LATENTS
    assert difference(ours.video, parts[0]) < 10 * LATENTS
    assert difference(ours.audio, parts[1]) < LATENTS


def assert_latents_agree(clip, parts):
    assert difference(clip.video, parts[0]) < LATENTS
    assert difference(clip.audio, parts[1]) < LATENTS
