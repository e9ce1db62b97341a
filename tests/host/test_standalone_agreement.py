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
from nava_core.pipeline import ModelFiles, NavaPipeline  # noqa: E402
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
    comfy, prefix, *, mode="video and audio", picture=None, recording=None, negative="", terms=TERMS, **scales
):
    """(video, audio) latents of a run on the server; by default with the negative that its workflows have."""
    graph = Graph()
    clip = graph.clip(comfy.names)
    model = graph.model({"backbone": "NAVA_calm.safetensors"})
    voices = {} if recording is None else {"voices.voice0": voice_of(graph, comfy, recording)}
    latent = graph.latent(mode=mode)
    if picture is not None:
        latent = with_picture(graph, comfy, latent, picture)
    if negative is not None:
        scales["negative"] = graph.prompt(clip, negative, negative_terms=terms)
    sampled = graph.sampler(model, graph.prompt(clip, **voices), latent, seed=11, steps=4, **scales)
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
