"""Text to clip on a real ComfyUI server: our sampler and stock ones, guiders, previews, masks, LoRA, interruption."""

import io

import numpy
import pytest
import torch
from comfy_host import import_comfyui
from graphs import SCALES, Graph, text_to_latent
from media_checks import assert_alive, read_media
from PIL import Image
from safetensors.torch import load_file, save_file

FRAMES = 25  # of one second
STEPS = 3


def latents(run, prefix):
    """The latents a graph saved: (video, audio)."""
    out = []
    for part in ("video", "audio"):
        path = next(p for p in run.files if p.name.startswith(f"{prefix}_{part}"))
        out.append(load_file(path)["latent_tensor"])
    return tuple(out)


def sampled(comfy, prefix, graph, latent, **extra):
    graph.save_latents(latent, prefix)
    return latents(comfy.ok(graph, **extra), prefix)


def assert_same(first, second, tolerance=0.0):
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max() <= tolerance


def difference(first, second):
    return min(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def test_text_to_clip(comfy):
    graph, latent = text_to_latent(comfy.names)
    graph.save_clip(
        graph.frames(latent, graph.video_vae(comfy.names)), graph.sound(latent, graph.audio_vae(comfy.names))
    )
    run = comfy.ok(graph)
    clip = read_media(run.file(".mp4"))
    assert (clip.video_codec, clip.audio_codec, clip.channels) == ("h264", "aac", 2)
    assert (clip.size, clip.rate, len(clip.frames)) == ((96, 64), 24, FRAMES)
    assert clip.sample_rate == 48000
    assert clip.video_seconds == pytest.approx(FRAMES / 24, abs=1e-3)
    assert clip.audio_seconds == pytest.approx(clip.video_seconds, abs=1e-3)
    assert_alive(clip)
    node = next(name for name, each in graph.items() if each["class_type"] == "NavaSampler")
    steps = [(value, of) for name, value, of in run.progress if name == node]
    assert steps == sorted(steps)  # the server may leave some out
    assert steps[-1] == (3, 3)


def test_same_seed_same_latents_another_seed_others(comfy):
    first = sampled(comfy, "seed_a", *text_to_latent(comfy.names))
    assert_same(first, sampled(comfy, "seed_b", *text_to_latent(comfy.names)))
    assert difference(first, sampled(comfy, "seed_c", *text_to_latent(comfy.names, seed=8))) > 0.1


def test_stock_sampler_with_our_parts_is_our_sampler(comfy):
    ours = sampled(comfy, "one_node", *text_to_latent(comfy.names, steps=STEPS))
    graph = Graph()
    guider = graph.add(
        "NavaGuider", model=graph.model(comfy.names), positive=graph.prompt(graph.clip(comfy.names)), **SCALES
    )
    parts = graph.custom_sampler(guider, graph.latent(), steps=STEPS)
    assert_same(ours, sampled(comfy, "parts", graph, parts))


def test_denoised_output_of_the_stock_sampler_is_whole_with_previews_on(comfy):
    graph = Graph()
    guider = graph.add(
        "NavaGuider", model=graph.model(comfy.names), positive=graph.prompt(graph.clip(comfy.names)), **SCALES
    )
    output = graph.custom_sampler(guider, graph.latent(), steps=STEPS)
    graph.save_latents(graph.of(output, 1), "denoised")
    graph.save_latents(output, "final")
    run = comfy.ok(graph, preview_method="latent2rgb")
    # The last step goes to sigma 0, so the last denoised estimate is the result.
    assert_same(latents(run, "denoised"), latents(run, "final"), 1e-4)


@pytest.mark.parametrize("kind", ["BasicGuider", "CFGGuider"])
def test_stock_guiders_and_sampler(comfy, kind):
    def run(prefix, text):
        graph = Graph()
        model, clip = graph.model(comfy.names), graph.clip(comfy.names)
        positive = graph.prompt(clip, text)
        if kind == "BasicGuider":
            guider = graph.add("BasicGuider", model=model, conditioning=positive)
        else:
            guider = graph.add("CFGGuider", model=model, positive=positive, negative=graph.prompt(clip, ""), cfg=3.0)
        sampler = graph.add("KSamplerSelect", sampler_name="euler")
        sigmas = graph.add("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)
        return sampled(comfy, prefix, graph, graph.custom_sampler(guider, graph.latent(), sampler, sigmas))

    video, audio = run(f"{kind}_a", "A dog runs over a wet street.")
    assert video.isfinite().all()
    assert audio.isfinite().all()
    assert difference((video, audio), run(f"{kind}_b", "A quiet mountain lake at dawn.")) > 1e-3


def test_stock_cfg_is_our_guidance_without_alignment(comfy):
    """CFGGuider's u + s (c - u) is the guidance table's alignment-off line with equal scales."""

    def graph_with(make_guider):
        graph = Graph()
        model, clip = graph.model(comfy.names), graph.clip(comfy.names)
        guider = make_guider(graph, model, graph.prompt(clip), graph.prompt(clip, "blurred, noisy"))
        return graph, graph.custom_sampler(guider, graph.latent(), steps=STEPS)

    off = {**SCALES, "alignment": False, "video_text": 2.5, "audio_text": 2.5}
    ours = sampled(
        comfy,
        "cfg_ours",
        *graph_with(lambda g, m, p, n: g.add("NavaGuider", model=m, positive=p, negative=n, **off)),
    )
    stock = sampled(
        comfy,
        "cfg_stock",
        *graph_with(lambda g, m, p, n: g.add("CFGGuider", model=m, positive=p, negative=n, cfg=2.5)),
    )
    assert_same(ours, stock, 1e-3)  # the same sum in another order, over three steps of a network


@pytest.mark.parametrize("method", ["latent2rgb", "taesd"])
def test_previews_show_the_picture(comfy, method):
    plain, latent = text_to_latent(comfy.names, steps=STEPS)
    expected = sampled(comfy, f"no_preview_{method}", plain, latent)
    graph, latent = text_to_latent(comfy.names, steps=STEPS)
    graph.save_latents(latent, f"preview_{method}")
    said_before = len(comfy.said())
    run = comfy.ok(graph, preview_method=method)
    assert_same(expected, latents(run, f"preview_{method}"))
    assert len(run.previews) >= STEPS
    pictures = [Image.open(io.BytesIO(data)) for data in run.previews]
    for picture in pictures:
        assert picture.width / picture.height == pytest.approx(96 / 64, rel=0.1)
        assert max(high - low for low, high in picture.getextrema()) > 8
    assert "Traceback" not in comfy.said()[said_before:]
    if method == "latent2rgb":
        # The last step's estimate is the result, so the last preview is its first frame.
        import_comfyui()
        from comfy.latent_formats import Wan22

        form = Wan22()
        frames = form.process_in(expected[0])[0].movedim(0, -1)
        rgb = frames @ torch.tensor(form.latent_rgb_factors) + torch.tensor(form.latent_rgb_factors_bias)
        luma = torch.tensor([0.299, 0.587, 0.114])  # JPEG halves the colours' resolution
        grey = (((rgb + 1) / 2).clamp(0, 1) @ luma).flatten(1)
        shown = torch.tensor(numpy.asarray(pictures[-1].convert("L").resize((6, 4)))).float().reshape(1, -1)
        likeness = torch.corrcoef(torch.cat([shown, grey]))[0, 1:]
        assert likeness[0] > 0.8
        assert likeness[1:].max() < likeness[0] - 0.2


def test_sound_alone_has_progress_and_no_preview_of_its_one_pixel(comfy):
    graph = Graph()
    latent = graph.latent(mode="audio only")
    latent = graph.sampler(graph.model(comfy.names), graph.prompt(graph.clip(comfy.names)), latent, steps=STEPS)
    graph.save_latents(latent, "sound_alone")
    run = comfy.ok(graph, preview_method="latent2rgb")
    assert run.previews == []
    assert (latent[0], STEPS, STEPS) in run.progress


def given_frames_and_steps(comfy, prefix, start):
    """A graph that keeps the first latent frames and audio steps of ``start``'s result; (run's graph, latent)."""
    graph, first = text_to_latent(comfy.names, seed=start)
    parts = graph.add("LTXVSeparateAVLatent", av_latent=first)
    black, white = (
        graph.add("MaskToImage", mask=graph.add("SolidMask", value=value, width=6, height=4)) for value in (0.0, 1.0)
    )
    frames = graph.add(
        "ImageBatch",
        image1=graph.add("RepeatImageBatch", image=black, amount=2),
        image2=graph.add("RepeatImageBatch", image=white, amount=5),
    )
    video = graph.add("SetLatentNoiseMask", samples=parts, mask=graph.add("ImageToMask", image=frames, channel="red"))
    steps = graph.add(
        "MaskComposite",
        destination=graph.add("SolidMask", value=1.0, width=16, height=27),
        source=graph.add("SolidMask", value=0.0, width=16, height=10),
        x=0, y=0, operation="multiply",
    )  # fmt: skip
    audio = graph.add("SetLatentNoiseMask", samples=graph.of(parts, 1), mask=steps)
    graph.save_latents(first, f"{prefix}_given")
    return graph, graph.add("LTXVConcatAVLatent", video_latent=video, audio_latent=audio)


@pytest.mark.parametrize("driver", ["ours", "stock"])
def test_given_frame_and_audio_steps_come_out_unchanged(comfy, driver):
    graph, latent = given_frames_and_steps(comfy, driver, start=3)
    model = graph.model(comfy.names)
    positive = graph.prompt(graph.clip(comfy.names), "A dog runs over a wet street.")
    if driver == "ours":
        result = graph.sampler(model, positive, latent, seed=5)
    else:
        guider = graph.add("BasicGuider", model=model, conditioning=positive)
        sampler = graph.add("KSamplerSelect", sampler_name="euler")
        result = graph.custom_sampler(guider, latent, sampler, seed=5)
    graph.save_latents(result, f"{driver}_kept")
    run = comfy.ok(graph)
    given, kept = latents(run, f"{driver}_given"), latents(run, f"{driver}_kept")
    assert torch.equal(given[0][:, :, :2], kept[0][:, :, :2])
    assert torch.equal(given[1][:, :, :10], kept[1][:, :, :10])
    assert (given[0][:, :, 2:] - kept[0][:, :, 2:]).abs().max() > 0.1
    assert (given[1][:, :, 10:] - kept[1][:, :, 10:]).abs().max() > 0.1


def write_lora(path, blocks, prefix):
    """A LoRA of rank 4 on a projection of each block, strong enough to be seen."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for block in blocks:
        name = f"{block}.self_attn.o"
        key = prefix + (name.replace(".", "_") if prefix.startswith("lora_unet_") else name)
        weights[f"{key}.lora_down.weight"] = torch.randn(4, 64, generator=generator)
        weights[f"{key}.lora_up.weight"] = torch.randn(64, 4, generator=generator) * 0.1
        weights[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(weights, path)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("block", ["double_blocks.1", "single_blocks.0"])
def test_lora_through_the_stock_loader(comfy, block, prefix):
    name = f"{block}-{prefix.rstrip('._')}.safetensors"
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    write_lora(folder / name, [block], prefix)

    def run(tag, strength=None):
        graph = Graph()
        model = graph.model(comfy.names)
        if strength is not None:
            model = graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)
        latent = graph.sampler(model, graph.prompt(graph.clip(comfy.names)), graph.latent(), steps=2)
        return sampled(comfy, f"lora_{tag}", graph, latent)

    before = run("before")
    assert difference(before, run("on", 1.0)) > 1e-3
    assert_same(before, run("zero", 0.0))
    assert_same(before, run("after"))
    assert "lora key not loaded" not in comfy.said()


def test_lora_leaves_the_same_model_clean(comfy):
    """With and without the LoRA in one graph, over one loaded model."""
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    write_lora(folder / "both.safetensors", ["double_blocks.0", "single_blocks.1"], "diffusion_model.")
    expected = sampled(comfy, "clean_alone", *text_to_latent(comfy.names))
    graph = Graph()
    model, positive, latent = graph.model(comfy.names), graph.prompt(graph.clip(comfy.names)), graph.latent()
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name="both.safetensors", strength_model=1.0)
    graph.save_latents(graph.sampler(lora, positive, latent), "clean_with")
    graph.save_latents(graph.sampler(model, positive, latent), "clean_without")
    run = comfy.ok(graph)
    assert_same(expected, latents(run, "clean_without"))
    assert difference(expected, latents(run, "clean_with")) > 1e-3


def test_interrupt_then_another_prompt(comfy):
    expected = sampled(comfy, "calm", *text_to_latent(comfy.names))
    graph, latent = text_to_latent(comfy.names, steps=200)
    graph.save_latents(latent, "interrupted")

    def stop(run):
        if len(run.progress) == 2:
            comfy.interrupt()

    run = comfy.run(graph, on_progress=stop)
    assert run.status == "interrupted"
    assert len(run.progress) < 100
    assert not list((comfy.base / "output").glob("interrupted*"))
    assert_same(expected, sampled(comfy, "after_interrupt", *text_to_latent(comfy.names)))


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_stock_cache_nodes_run(comfy, node):
    graph = Graph()
    cached = graph.add(
        node, model=graph.model(comfy.names), reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=True
    )
    latent = graph.sampler(cached, graph.prompt(graph.clip(comfy.names)), graph.latent(), steps=8)
    said_before = len(comfy.said())
    video, audio = sampled(comfy, node, graph, latent)
    assert comfy.said()[said_before:].count(f"NAVA: {node} decides by picture and sound together") == 1
    assert video.isfinite().all()
    assert audio.isfinite().all()
    assert difference((video, audio), sampled(comfy, f"no_{node}", *text_to_latent(comfy.names, steps=8))) > 0


def test_batch_of_two_clips(comfy):
    graph = Graph()
    latent = graph.sampler(
        graph.model(comfy.names), graph.prompt(graph.clip(comfy.names)), graph.latent(batch=2, seconds=0.5)
    )
    graph.save_clip(
        graph.frames(latent, graph.video_vae(comfy.names)),
        graph.sound(latent, graph.audio_vae(comfy.names)),
        prefix="batch",
    )
    run = comfy.ok(graph)
    clips = [read_media(path) for path in run.files if path.suffix == ".mp4"]
    assert [len(clip.frames) for clip in clips] == [13, 13]
    assert (clips[0].frames.astype(int) - clips[1].frames).std() > 4


# ---------------------------------------------------------------- few-step checkpoints

DISTILLED = "4 steps (distilled)"


def with_lora(comfy, graph, name="students.safetensors"):
    """The small model with a LoRA, the form that distilled students come in."""
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    write_lora(folder / name, ["double_blocks.0", "single_blocks.1"], "diffusion_model.")
    return graph.add("LoraLoaderModelOnly", model=graph.model(comfy.names), lora_name=name, strength_model=1.0)


@pytest.mark.parametrize("lora", [False, True], ids=["checkpoint", "LoRA"])
def test_the_distilled_preset_is_its_parts_under_stock_nodes(comfy, lora):
    """One node; our parts with the stock Euler; and the stock guider with one prediction: all the same."""

    def run(prefix, make):
        graph = Graph()
        model = with_lora(comfy, graph) if lora else graph.model(comfy.names)
        return sampled(comfy, f"{prefix}_{lora}", graph, make(graph, model, graph.prompt(graph.clip(comfy.names))))

    def parts(graph, guider):
        sampler = graph.add("KSamplerSelect", sampler_name="euler")
        sigmas = graph.add("NavaSigmas", steps=50, shift=5.0, preset=DISTILLED)
        return graph.custom_sampler(guider, graph.latent(), sampler, sigmas)

    node = run("preset", lambda g, m, p: g.sampler(m, p, g.latent(), steps=50, preset=DISTILLED))
    ours = run("ours", lambda g, m, p: parts(g, g.add("NavaGuider", model=m, positive=p, **SCALES, preset=DISTILLED)))
    stock = run("stock", lambda g, m, p: parts(g, g.add("BasicGuider", model=m, conditioning=p)))
    assert_same(node, ours)
    assert_same(node, stock)
    assert difference(node, run("guided", lambda g, m, p: g.sampler(m, p, g.latent(), steps=4))) > 1e-3
    if lora:
        plain = run("plain", lambda g, m, p: g.sampler(g.model(comfy.names), p, g.latent(), preset=DISTILLED))
        assert difference(node, plain) > 1e-3


def test_the_hosts_cfg_override_reaches_our_guidance(comfy):
    """Hosts that have the node: cfg 1 over the whole run leaves the text terms out."""
    if "CFGOverride" not in comfy.get("/object_info"):
        pytest.skip("this ComfyUI has no CFG Override node")

    def run(prefix, override=False, **scales):
        graph = Graph()
        model = graph.model(comfy.names)
        if override:
            model = graph.add("CFGOverride", model=model, cfg=1.0, start_percent=0.0, end_percent=1.0)
        latent = graph.sampler(model, graph.prompt(graph.clip(comfy.names)), graph.latent(), **scales)
        return sampled(comfy, prefix, graph, latent)

    assert_same(run("overridden", override=True), run("no_text", video_text=0.0, audio_text=0.0))
    assert difference(run("overridden_not"), run("no_text_again", video_text=0.0, audio_text=0.0)) > 1e-3
