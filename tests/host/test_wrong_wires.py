"""Wrong files and wires on the real server: one sentence from the node that received them."""

import comfy_host
import pytest
import torch
from graphs import Graph
from safetensors import safe_open
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()

import comfy.ldm.lightricks.model  # noqa: E402
import comfy.ldm.wan.model  # noqa: E402
import comfy.ops  # noqa: E402

HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in</body></html>"


def random_state(model) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.02
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }


def wan_state() -> dict:
    model = comfy.ldm.wan.model.WanModel(
        dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=4096, operations=comfy.ops.manual_cast
    )
    return random_state(model)


def ltx_state() -> dict:
    model = comfy.ldm.lightricks.model.LTXVModel(
        num_attention_heads=1, attention_head_dim=64, cross_attention_dim=64, caption_channels=64, num_layers=1,
        operations=comfy.ops.manual_cast,
    )  # fmt: skip
    return random_state(model)


def lora_state() -> dict:
    name = "diffusion_model.double_blocks.0.self_attn.q"
    return {f"{name}.lora_down.weight": torch.zeros(4, 64), f"{name}.lora_up.weight": torch.zeros(64, 4)}


@pytest.fixture(scope="module")
def wrong_files(comfy, small_models):
    """Files that are no NAVA backbone, in the folder where one belongs."""
    folder = comfy.base / "models" / "diffusion_models"
    names = {kind: f"wrong_{kind}.safetensors" for kind in ("wan", "ltx", "lora", "cut", "page", "empty")}
    save_file(wan_state(), folder / names["wan"])
    save_file(ltx_state(), folder / names["ltx"])
    save_file(lora_state(), folder / names["lora"])
    whole = small_models["backbone"].read_bytes()
    (folder / names["cut"]).write_bytes(whole[: len(whole) // 2])
    (folder / names["page"]).write_bytes(HTML)
    (folder / names["empty"]).write_bytes(b"")
    return names


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and "Traceback" not in message and len(message) < 400


def loader_failure(comfy, node, **inputs):
    graph = Graph()
    graph.add("PreviewAny", source=graph.add(node, **inputs))
    received, message = comfy.fails(graph)
    assert received == node
    message = message.removeprefix("ValueError: ")
    assert is_one_sentence(message), message
    return message


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wan", ["Wan", "NAVA"]),
        ("ltx", ["LTX", "NAVA"]),
        ("lora", ["LoRA"]),
        ("cut", ["download it again"]),
        ("page", ["web page"]),
        ("empty", ["empty"]),
    ],
)
def test_wrong_file_as_backbone(comfy, wrong_files, kind, words):
    message = loader_failure(comfy, "NavaLoadBackbone", file=wrong_files[kind], weight_dtype="auto")
    for word in [wrong_files[kind], *words]:
        assert word in message, message


def test_audio_vae_as_video_vae(comfy):
    message = loader_failure(comfy, "NavaLoadVideoVAE", file=comfy.names["audio_vae"], device="default")
    assert "audio VAE" in message
    assert "video VAE" in message


def test_video_vae_as_audio_vae(comfy):
    message = loader_failure(comfy, "NavaLoadAudioVAE", file=comfy.names["video_vae"], device="default")
    assert "Wan2.2" in message


def test_backbone_as_text_encoder(comfy, small_models):
    target = comfy.base / "models" / "text_encoders" / "not_a_text_encoder.safetensors"
    target.write_bytes(small_models["backbone"].read_bytes())
    message = loader_failure(comfy, "NavaLoadTextEncoder", file=target.name, device="default")
    assert "NAVA backbone" in message
    assert "umt5" in message


def test_backbone_as_speaker_encoder(comfy, small_models):
    target = comfy.base / "models" / "audio_encoders" / "not_a_speaker_encoder.safetensors"
    target.write_bytes(small_models["backbone"].read_bytes())
    assert "ReDimNet" in loader_failure(comfy, "NavaLoadSpeakerEncoder", file=target.name)


def failure(comfy, node, graph, link):
    graph.save_latents(link, "never") if node.endswith("Sampler") else graph.add("PreviewAny", source=link)
    received, message = comfy.fails(graph)
    assert received == node, message
    assert is_one_sentence(message), message
    return message


@pytest.mark.parametrize("node", ["NavaSampler", "NavaGuider"])
def test_wan_model_as_nava(comfy, wrong_files, node):
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=wrong_files["wan"], weight_dtype="default")
    positive = graph.prompt(graph.clip(comfy.names))
    if node == "NavaSampler":
        message = failure(comfy, node, graph, graph.sampler(model, positive, graph.latent()))
    else:
        from graphs import SCALES

        guider = graph.add("NavaGuider", model=model, positive=positive, **SCALES)
        message = failure(comfy, node, graph, guider)
    assert "WAN" in message
    assert "NAVA Load Backbone" in message


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 5, "batch_size": 1}),
        ("EmptyLatentAudio", {"seconds": 1.0, "batch_size": 1}),
    ],
)
def test_latent_of_another_model(comfy, node, inputs):
    graph = Graph()
    latent = graph.sampler(graph.model(comfy.names), graph.prompt(graph.clip(comfy.names)), graph.add(node, **inputs))
    graph.add("SaveLatent", samples=latent, filename_prefix="never")
    received, message = comfy.fails(graph)
    assert received == "NavaSampler"
    assert "another model" in message
    assert "NAVA Empty Latent" in message
    assert is_one_sentence(message)


def voice(graph, comfy):
    """A reference voice of noise."""
    sound = graph.add("EmptyAudio", duration=2.0, sample_rate=16000, channels=1)
    encoder = graph.add("NavaLoadSpeakerEncoder", file=comfy.names["speaker_encoder"])
    return graph.add("NavaEncodeTimbre", speaker_encoder=encoder, audio=sound, start=0.0, duration=0.0)


def test_more_voices_than_spans(comfy):
    graph = Graph()
    voices = {f"voices.voice{i}": voice(graph, comfy) for i in range(2)}
    message = failure(comfy, "NavaEncodePrompt", graph, graph.prompt(graph.clip(comfy.names), **voices))
    assert "2 voices given but the prompt has 1 speech span" in message


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("He says <S>hello", "never"), ("He says <S><E> and leaves.", "empty"), ("A <S>b<S>c<E>d<E>", "inside")],
)
def test_broken_spans_are_refused_with_their_place(comfy, prompt, words):
    graph = Graph()
    message = failure(comfy, "NavaEncodePrompt", graph, graph.prompt(graph.clip(comfy.names), prompt))
    assert "character" in message or "position" in message, message


def test_wrong_clip(comfy, tmp_path):
    """A MODEL of ours with the conditioning of another text encoder is told what to connect."""
    graph = Graph()
    positive = graph.add("ConditioningZeroOut", conditioning=graph.prompt(graph.clip(comfy.names)))
    guider = graph.add("BasicGuider", model=graph.model(comfy.names), conditioning=positive)
    latent = graph.custom_sampler(guider, graph.latent())
    graph.save_latents(latent, "zeroed")
    assert comfy.ok(graph).files  # a zeroed conditioning of ours is fine


@pytest.mark.parametrize(("mode", "node"), [("audio only", "NavaDecodeVideo"), ("video only", "NavaDecodeAudio")])
def test_decoding_what_a_clip_does_not_have(comfy, mode, node):
    graph = Graph()
    latent = graph.latent(mode=mode)
    if node == "NavaDecodeVideo":
        link = graph.frames(latent, graph.video_vae(comfy.names))
    else:
        link = graph.sound(latent, graph.audio_vae(comfy.names))
    message = failure(comfy, node, graph, link)
    assert ("no picture" if node == "NavaDecodeVideo" else "no sound") in message


def test_swapped_vaes_at_the_decoders(comfy):
    graph = Graph()
    latent = graph.latent()
    message = failure(comfy, "NavaDecodeVideo", graph, graph.frames(latent, graph.audio_vae(comfy.names)))
    assert "LTX audio VAE" in message


def test_damaged_weights_are_named_before_the_encoder(comfy, small_models):
    """NaN from the network: found before the file is written, with the stage that made it."""
    weights = load_file(small_models["video_vae"])
    for name in weights:
        if name.endswith("decoder.conv1.bias") or name == "decoder.conv1.bias":
            weights[name] = torch.full_like(weights[name], float("nan"))
    target = comfy.base / "models" / "vae" / "broken_vae.safetensors"
    save_file(weights, target)
    graph = Graph()
    vae = graph.add("NavaLoadVideoVAE", file=target.name, device="default")
    graph.save_clip(graph.frames(graph.latent(), vae), prefix="broken")
    received, message = comfy.fails(graph)
    assert received == "NavaMux"
    assert "video VAE" in message
    assert "NaN" in message
    assert not list((comfy.base / "output").glob("broken*"))


def with_nan(path, target, names):
    weights = load_file(path)
    for name in names:
        weights[name] = torch.full_like(weights[name], float("nan"))
    with safe_open(path, "pt") as file:
        save_file(weights, target, metadata=file.metadata())
    return target.name


def test_damaged_backbone_is_named_by_the_sampler(comfy, small_models):
    target = comfy.base / "models" / "diffusion_models" / "broken_backbone.safetensors"
    name = with_nan(small_models["backbone"], target, ["backbone.head_audio.head.bias"])
    graph = Graph()
    model = graph.add("NavaLoadBackbone", file=name, weight_dtype="auto")
    message = failure(
        comfy, "NavaSampler", graph, graph.sampler(model, graph.prompt(graph.clip(comfy.names)), graph.latent())
    )
    assert "backbone" in message
    assert "NaN" in message


def test_damaged_audio_vae_is_named_by_the_decoder(comfy, small_models):
    weights = load_file(small_models["audio_vae"])
    bias = next(name for name in weights if name.startswith("vocoder.") and name.endswith("bias"))
    name = with_nan(small_models["audio_vae"], comfy.base / "models" / "vae" / "broken_audio.safetensors", [bias])
    graph = Graph()
    vae = graph.add("NavaLoadAudioVAE", file=name, device="default")
    message = failure(comfy, "NavaDecodeAudio", graph, graph.sound(graph.latent(), vae))
    assert "audio VAE" in message
    assert "NaN" in message


def spans_of(graph, comfy, words):
    span = graph.add(
        "NavaSpeechSpan", words=words, speaker="A man", voice="", emotion="", pace="", position="",
        timbre=voice(graph, comfy),
    )  # fmt: skip
    empty = dict.fromkeys(("visual", "dynamics", "camera", "audio"), "")
    return graph.add("NavaStructuredPrompt", **empty, language="en", **{"spans.span0": span})


def test_spans_of_another_prompt_are_refused(comfy):
    graph = Graph()
    spans = graph.of(spans_of(graph, comfy, "original words"), 1)
    link = graph.prompt(graph.clip(comfy.names), "He says <S>edited words<E>", spans=spans)
    message = failure(comfy, "NavaEncodePrompt", graph, link)
    assert "“edited words”" in message
    assert "“original words”" in message


def test_structured_prompt_and_its_spans_go_together(comfy):
    graph = Graph()
    structured = spans_of(graph, comfy, "It's late,   friend.")
    link = graph.prompt(graph.clip(comfy.names), structured, spans=graph.of(structured, 1))
    show = graph.add("PreviewAny", source=graph.of(link, 1))
    assert "voice 1" in comfy.ok(graph).text(show[0])


@pytest.mark.parametrize(("text", "terms", "tokens"), [("", "none", None), ("", "sound, English", 20)])
def test_negative_terms(comfy, text, terms, tokens):
    graph = Graph()
    link = graph.prompt(graph.clip(comfy.names), text, negative_terms=terms)
    show = graph.add("PreviewAny", source=graph.of(link, 1))
    report = comfy.ok(graph).text(show[0])
    if tokens is None:
        assert report.startswith("Empty")
    else:
        assert int(report.split(" ")[0]) > tokens
