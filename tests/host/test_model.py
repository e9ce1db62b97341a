"""The MODEL inside ComfyUI: equal to the core's loop, right memory figures, batching, masks, hooks for other nodes."""

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()

import comfy.cli_args  # noqa: E402
import comfy.conds  # noqa: E402
import comfy.ldm.modules.attention  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

host_model = pack_module("nodes.host.model")
guiders = pack_module("nodes.host.guider")
host_latents = pack_module("nodes.host.latents")
sampling = pack_module("nava_core.sampling")
checkpoint = pack_module("nava_core.checkpoint")
geometry = pack_module("nava_core.geometry")
given = pack_module("nava_core.given")

STEPS = 4
SEED = 11


@pytest.fixture(scope="module", autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def small_backbone(small_models, tmp_path_factory):
    """The small backbone with a tenth of its velocities: the full ones are wild enough to blow a rounding error of
    1e-6 up a hundredfold a step, which would hide what is tested here."""
    with checkpoint.open_checkpoint(small_models["backbone"]) as source:
        weights = {f"backbone.{name}": source.read(name) for name in source}
        metadata = source.info.metadata
    for name in ("head", "head_audio"):
        weights[f"backbone.{name}.head.weight"] *= 0.1
    path = tmp_path_factory.mktemp("backbone") / "small.safetensors"
    save_file(weights, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def patcher(small_backbone):
    return host_model.load_backbone(str(small_backbone))


@pytest.fixture(scope="module")
def core(small_backbone):
    return checkpoint.load_backbone(small_backbone)


@pytest.fixture(scope="module")
def context(core):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 20, core.config.text_dim, generator=generator)


@pytest.fixture(scope="module")
def voice():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 2, 192, generator=generator), torch.tensor([[3, 9]])


def latent(mode="video+audio", seconds=0.5, width=96, height=80):
    return host_latents.empty_latent(geometry.ClipGeometry(seconds, width, height, mode))


def conditioning(context, voice=None):
    extras = {} if voice is None else {host_model.TIMBRE: voice[0], host_model.TIMBRE_POSITIONS: voice[1]}
    return [[context, extras]]


def host_run(patcher, positive, latent, guidance, negative=None):
    guider = guiders.make_guider(patcher, positive, negative, guidance)
    sigmas = sampling.flow_sigmas(STEPS)
    out = guiders.sample(guider, latent, SEED, guiders.unipc_sampler(), sigmas)["samples"]
    return out.unbind()


def core_run(core, patcher, context, latent, guidance, voice=None, negative=None, **settings):
    """The core's loop from the host's noise, in the host's latent spaces."""
    noise = comfy.sample.prepare_noise(latent["samples"], SEED).unbind()
    video, audio = latent["samples"].unbind()
    gone = host_latents.absent_parts([video.shape, audio.shape])
    given = {}
    if latent.get("noise_mask") is not None:
        masks = latent["noise_mask"].unbind()
        process_in = patcher.model.latent_format.process_in
        given = {
            "video_latent": process_in(video),
            "video_mask": masks[0],
            "audio_latent": geometry.audio_latent_to_tokens(audio),
            "audio_mask": geometry.audio_latent_to_tokens(masks[1].expand_as(audio)),
        }
    out = sampling.denoise(
        core,
        None if gone[0] else noise[0],
        None if gone[1] else geometry.audio_latent_to_tokens(noise[1]),
        context,
        **{"sigmas": sampling.flow_sigmas(STEPS), **settings},
        guidance=guidance,
        negative=negative,
        timbre=None if voice is None else voice[0],
        timbre_positions=None if voice is None else voice[1],
        **given,
    )
    video = None if out[0] is None else patcher.model.latent_format.process_out(out[0])
    return video, None if out[1] is None else geometry.audio_tokens_to_latent(out[1])


def assert_close(host, core, tolerance=1e-4):
    for ours, theirs in zip(host, core, strict=True):
        if theirs is not None:
            assert (ours - theirs).abs().max() < tolerance


CASES = {
    "text": {},
    "voice": {"voiced": True, "guidance": {"audio_text": 1.0, "audio_align": 1.0, "audio_timbre": 1.5}},
    "alignment off": {"guidance": {"alignment": False}},
    "intervals": {"guidance": {"intervals": {"video_align": (0.95, 0.5), "audio_timbre": (1.0, 0.9)}}, "voiced": True},
    "one prediction": {"guidance": dict.fromkeys(["video_text", "video_align", "audio_text", "audio_align"], 0.0)},
    "audio only": {"mode": "audio", "voiced": True},
    "video only": {"mode": "video"},
}


@pytest.mark.parametrize("name", CASES)
def test_hosts_loop_is_the_cores_loop(patcher, core, context, voice, monkeypatch, name):
    # A prediction at a time and the core's attention: the host's kernel rounds otherwise, and is tested by itself.
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 0)
    monkeypatch.setattr(patcher.model.diffusion_model, "attention", core.attention)
    case = CASES[name]
    guidance = sampling.Guidance(**case.get("guidance", {}))
    voice = voice if case.get("voiced") else None
    clip = latent(case.get("mode", "video+audio"))
    host = host_run(patcher, conditioning(context, voice), clip, guidance)
    assert_close(host, core_run(core, patcher, context, clip, guidance, voice))


def test_a_pass_under_the_host_is_the_cores_pass(patcher, core, context, voice):
    """One pass with the host's operations and attention, voices and own timesteps included."""
    generator = torch.Generator().manual_seed(9)
    video = torch.randn(1, 48, 4, 5, 6, generator=generator)
    audio = torch.randn(1, 8, 14, 16, generator=generator)
    times = (torch.tensor([[0.0, 700, 700, 700]]), torch.tensor([700.0]))
    voices = {"timbre": voice[0], "timbre_positions": voice[1]}
    host = patcher.model.diffusion_model([video, audio], times, context, **voices)
    ours = core(video, geometry.audio_latent_to_tokens(audio), times, context, **voices)
    assert_close(host, (ours[0], geometry.audio_tokens_to_latent(ours[1])), 1e-4)


def masked_latent(shown=0.0):
    generator = torch.Generator().manual_seed(6)
    clip = latent()
    video, audio = (torch.randn(part.shape, generator=generator) for part in clip["samples"].unbind())
    video_mask, audio_mask = torch.ones(video.shape), torch.ones(audio.shape)
    video_mask[:, :, 0] = shown  # a whole frame
    video_mask[:, :, 2, :2] = shown  # a part of another
    audio_mask[:, :, 3:6] = shown
    nest = comfy.nested_tensor.NestedTensor
    return {"samples": nest([video, audio]), "noise_mask": nest([video_mask, audio_mask])}


@pytest.mark.parametrize("shown", given.SHOWN.values(), ids=given.SHOWN)
def test_given_parts_in_both_loops(patcher, core, context, shown):
    clip = masked_latent(shown)
    guidance = sampling.Guidance()
    host = host_run(patcher, conditioning(context), clip, guidance)
    assert_close(host, core_run(core, patcher, context, clip, guidance))
    for part, latents, mask in zip(host, clip["samples"].unbind(), clip["noise_mask"].unbind(), strict=True):
        assert torch.equal(part[mask == shown], latents[mask == shown])


@pytest.mark.parametrize("shown", given.SHOWN.values(), ids=given.SHOWN)
def test_each_given_frame_and_step_is_shown_as_its_mask_says(patcher, context, monkeypatch, shown):
    """Token by token, what the network gets: timesteps and samples."""
    seen, run_pass = [], host_model.HostBackbone.run_pass

    def record(self, video, audio, timestep, *args, **kwargs):
        seen.append((video.clone(), audio.clone(), timestep))
        return run_pass(self, video, audio, timestep, *args, **kwargs)

    monkeypatch.setattr(host_model.HostBackbone, "run_pass", record)
    clip = masked_latent(shown)
    host_run(patcher, conditioning(context), clip, sampling.CONDITIONAL)
    latents = patcher.model.process_latent_in(clip["samples"]).unbind()
    noise = comfy.sample.prepare_noise(clip["samples"], SEED).unbind()
    assert len(seen) == STEPS
    for (video, audio, (frames, steps)), sigma in zip(seen, sampling.flow_sigmas(STEPS).tolist(), strict=False):
        at = float(int(1000 * sigma))
        given_at, level = (0.0, 0.0) if shown == given.CLEAN else (at, sigma)
        assert frames[0].tolist() == [given_at, *[at] * (frames.shape[1] - 1)]
        assert steps[0].tolist() == [given_at if 3 <= step < 6 else at for step in range(steps.shape[1])]
        wanted = level * noise[0] + (1 - level) * latents[0]
        torch.testing.assert_close(video[:, :, 0], wanted[:, :, 0], atol=1e-5, rtol=1e-5)
        partly = sigma * noise[0] + (1 - sigma) * latents[0]  # at the level of the rest always
        torch.testing.assert_close(video[:, :, 2, :2], partly[:, :, 2, :2], atol=1e-5, rtol=1e-5)
        wanted = geometry.audio_latent_to_tokens(level * noise[1] + (1 - level) * latents[1])
        torch.testing.assert_close(audio[:, 3:6], wanted[:, 3:6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("made", ["video", "audio"])
def test_only_what_is_made_is_guided(patcher, core, context, voice, monkeypatch, made):
    """With one modality given whole, as in the core's loop, and without the predictions that only it would use."""
    asked, needed = [], sampling.Guidance.needed

    def record(self, *args, **kwargs):
        asked.append(needed(self, *args, **kwargs))
        return asked[-1]

    clip = masked_latent()
    for name, mask in zip(("video", "audio"), clip["noise_mask"].unbind(), strict=True):
        mask[:] = 1.0 if name == made else 0.0
    scales = {"video_text": 3.0, "video_align": 0.0, "audio_text": 2.0, "audio_align": 0.0}
    guidance = sampling.Guidance(**scales)
    monkeypatch.setattr(sampling.Guidance, "needed", record)
    host = host_run(patcher, conditioning(context, voice), clip, guidance)
    assert set(asked) == {("c", "u") if made == "video" else ("c", "u", "n")}
    assert_close(host, core_run(core, patcher, context, clip, guidance, voice))
    assert patcher.model.made == (True, True)  # of the next run nothing is known


def test_a_clip_that_is_given_whole_is_refused(patcher, context):
    clip = masked_latent()
    for mask, shown in zip(clip["noise_mask"].unbind(), given.SHOWN.values(), strict=True):
        mask[:] = shown
    with pytest.raises(ValueError, match="nothing to make"):
        host_run(patcher, conditioning(context), clip, sampling.Guidance())
    host_run(patcher, conditioning(context), masked_latent(), sampling.CONDITIONAL)  # and the next one runs


def test_a_second_pass_in_both_loops(patcher, core, context, monkeypatch):
    """NAVA Sampler's denoise: the clip in the latent, noised part of the way, made anew from there."""
    nodes = pack_module("nodes.sampling")
    clip = masked_latent()
    scales = {"alignment": True, "video_text": 3.0, "video_align": 3.0, "audio_text": 2.0, "audio_align": 2.0}
    ends = {f"{term}_{end}": float(end == "end") for term in ("text", "align", "timbre") for end in ("start", "end")}
    (out,) = nodes.NavaSampler.execute(
        patcher, conditioning(context), clip, SEED, STEPS, 5.0, audio_timbre=0.0, denoise=0.4, **scales, **ends
    ).args
    sigmas = sampling.flow_sigmas(STEPS, 5.0, 0.4)
    assert_close(out["samples"].unbind(), core_run(core, patcher, context, clip, sampling.Guidance(), sigmas=sigmas))
    (stock,) = nodes.NavaSigmas.execute(STEPS, 5.0, denoise=0.4).args
    assert torch.equal(stock, sigmas)


def test_absent_modality_comes_out_as_it_went_in(patcher, context):
    video, audio = host_run(patcher, conditioning(context), latent("audio"), sampling.Guidance())
    assert torch.equal(video, torch.zeros(1, 48, 1, 1, 1))
    assert audio.std() > 0.1


def test_empty_negative_is_the_zero_context(patcher, context):
    zeros = [[torch.zeros(1, 1, context.shape[2]), {}]]
    clip = latent()
    without = host_run(patcher, conditioning(context), clip, sampling.Guidance())
    assert_close(host_run(patcher, conditioning(context), clip, sampling.Guidance(), zeros), without, 1e-6)


def test_contexts_are_padded_with_zeros_not_repeated(patcher, context):
    out = patcher.model.extra_conds(cross_attn=context, noise=torch.zeros(1, 48, 3, 4, 6), device="cpu")
    padded = out["c_crossattn"].cond
    assert padded.shape == (1, 512, context.shape[2])
    assert torch.equal(padded[:, :20], context)
    assert not padded[:, 20:].any()


@pytest.fixture
def told(patcher, monkeypatch):
    """What the network is told of the noise level, a list of one for each pass; its answer is nothing."""
    seen = []

    def forward(self, video, audio, timestep, *_, **__):
        seen.append(timestep)
        return torch.zeros_like(video), torch.zeros_like(audio)

    monkeypatch.setattr(pack_module("nava_core.backbone").NavaBackbone, "forward", forward)
    return seen


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_timesteps_are_the_solvers(patcher, context, told, steps):
    """floor(1000 sigma) from UniPC, from the host's own chain; 1000 sigma as it is from stock samplers."""
    for sampler, expected in (
        (guiders.unipc_sampler(), sampling.FlowUniPC),
        (guiders.euler_sampler(), sampling.FlowEuler),
    ):
        sigmas = sampling.flow_sigmas(steps)
        guider = guiders.make_guider(patcher, conditioning(context), None, sampling.CONDITIONAL)
        guiders.sample(guider, latent(), SEED, sampler, sigmas)
        torch.testing.assert_close(torch.cat(told), expected(sigmas).timesteps.float(), atol=1e-4, rtol=0)
        told.clear()


@pytest.mark.parametrize("clip", ["voiced", "audio only", "given parts"])
def test_the_distilled_preset_is_the_cores(patcher, core, context, voice, monkeypatch, clip):
    """Four Euler steps on one prediction: the host's own Euler over our noise levels, given parts kept."""
    monkeypatch.setattr(patcher.model.diffusion_model, "attention", core.attention)
    preset = sampling.find_preset("distilled")
    voice = voice if clip == "voiced" else None
    start = masked_latent() if clip == "given parts" else latent("audio" if clip == "audio only" else "video+audio")
    guider = guiders.make_guider(patcher, conditioning(context, voice), None, preset.guidance)
    host = guiders.sample(guider, start, SEED, guiders.euler_sampler(), preset.sigmas())["samples"].unbind()
    settings = {"sigmas": preset.sigmas(), "sampler": preset.solver}
    assert_close(host, core_run(core, patcher, context, start, preset.guidance, voice, **settings))


def packed_size(shapes):
    return [1, 1, sum(torch.Size(shape[1:]).numel() for shape in shapes)]


def test_memory_figure_follows_the_tokens(patcher, monkeypatch):
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    model = patcher.model
    config = model.diffusion_model.config
    shapes = [(1, 48, 37, 44, 80), (1, 8, 152, 16)]
    tokens = 37 * 22 * 40 + 152
    model.latent_shapes = shapes
    expected = host_model.activation_bytes(config, 1, tokens, 4, audio_tokens=152) * host_model.ALLOCATOR_SLACK
    assert model.memory_required(packed_size(shapes)) == pytest.approx(expected)
    assert model.memory_required([2, *packed_size(shapes)[1:]]) == pytest.approx(2 * expected, rel=0.05)
    model.latent_shapes = None  # before the first run the host asks with nothing but the packed size
    assert model.memory_required(packed_size(shapes)) == pytest.approx(expected, rel=0.01)
    assert model.memory_required(list(shapes[0])) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("tokens", "passes"), [(10**9, 2), (0, 4)])
def test_predictions_are_batched_only_where_it_pays(patcher, context, voice, monkeypatch, tokens, passes):
    """Short clips: c, u and n in one pass, m by itself. Long ones: each by itself."""
    monkeypatch.setattr(host_model, "BATCH_TOKENS", tokens)
    seen = []
    original = host_model.HostBackbone._predict

    def counting(self, x, *args, **kwargs):
        seen.append(x[0].shape[0])
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(host_model.HostBackbone, "_predict", counting)
    positive = conditioning(context, (voice[0], voice[1]))
    guider = guiders.make_guider(patcher, positive, None, sampling.Guidance())
    guiders.sample(guider, latent(), SEED, guiders.unipc_sampler(), sampling.flow_sigmas(1))
    assert len(seen) == passes
    assert sum(seen) == 4


def test_batched_predictions_equal_separate_ones(patcher, context, voice, monkeypatch):
    positive, clip = conditioning(context, voice), latent()
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 0)
    apart = host_run(patcher, positive, clip, sampling.Guidance())
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 10**9)
    # A batch's matrix products round otherwise than each by itself, four steps long.
    assert_close(host_run(patcher, positive, clip, sampling.Guidance()), apart, 5e-4)


def test_diffusion_model_wrappers_and_block_replacement_run(patcher, context):
    clone = patcher.clone()
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(type(args[0]).__name__)
        return executor(*args, **kwargs)

    def replacement(args, extra):
        calls.append(tuple(args["img"].shape))
        return extra["original_block"](args)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    clone.set_model_patch_replace(replacement, "dit", "single_block", 1)
    guidance = sampling.Guidance(alignment=False, video_text=1, audio_text=1)
    clip = latent()
    with_hooks = host_run(clone, conditioning(context), clip, guidance)
    assert calls.count("list") == STEPS
    assert (1, 4 * 3 * 3 + 14, 64) in calls
    assert_close(host_run(patcher, conditioning(context), clip, guidance), with_hooks, 1e-6)


def test_attention_calls_get_the_hosts_options(patcher, context):
    clone = patcher.clone()
    seen = []

    def override(function, *args, **kwargs):
        seen.append(kwargs["transformer_options"]["block_index"])
        return function(*args, **kwargs)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    guidance = sampling.Guidance(alignment=False, video_text=1, audio_text=1)
    host_run(clone, conditioning(context), latent(), guidance)
    # self- and cross-attention, the latter for each modality in the two alignment blocks
    assert len(seen) == STEPS * (2 * 3 + 2 * 2)


def test_clone_and_reload_recipe(patcher):
    load, arguments = patcher.clone().cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    weights = again.model.diffusion_model.state_dict()
    for name, weight in patcher.model.diffusion_model.state_dict().items():
        assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("form", ["ckpt", "bare", "bf16"])
def test_other_forms_of_the_file(patcher, small_backbone, tmp_path, form):
    weights = load_file(small_backbone)
    with checkpoint.open_checkpoint(small_backbone) as source:
        metadata = source.info.metadata
    path = tmp_path / ("a.ckpt" if form == "ckpt" else "a.safetensors")
    if form == "ckpt":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    elif form == "bare":
        save_file({k.removeprefix("backbone."): v for k, v in weights.items()}, path, metadata=metadata)
    else:
        save_file({k: v.bfloat16() for k, v in weights.items()}, path, metadata=metadata)
    other = host_model.load_backbone(str(path))
    expected = patcher.model.diffusion_model.state_dict()
    for name, weight in other.model.diffusion_model.state_dict().items():
        wanted = expected[name].bfloat16() if form == "bf16" else expected[name]
        assert torch.equal(weight.float(), wanted.float())


@pytest.mark.parametrize(
    ("flag", "dtype", "apart"),
    [
        ("fp32_unet", torch.float32, 0),
        ("fp64_unet", torch.float64, 1e-4),
        ("bf16_unet", torch.bfloat16, 0.1),
        ("fp16_unet", torch.float16, 0.01),
        ("force_channels_last", torch.float32, 0),
    ],
)
def test_server_flags(patcher, small_backbone, monkeypatch, caplog, flag, dtype, apart):
    def velocities(model):
        generator = torch.Generator().manual_seed(6)
        shapes = ((1, 48, 2, 3, 4), (1, 8, 5, 16), (1, 9, model.diffusion_model.config.text_dim))
        drawn = (torch.randn(shape, generator=generator).to(model.get_dtype_inference()) for shape in shapes)
        video, audio, context = drawn
        parts = model.diffusion_model([video, audio], torch.tensor([500.0]), context, transformer_options={})
        return torch.cat([part.flatten() for part in parts]).double()

    monkeypatch.setattr(comfy.cli_args.args, flag, True)
    model = host_model.load_backbone(str(small_backbone)).model
    assert model.get_dtype() is dtype
    wanted = velocities(patcher.model)
    assert (velocities(model) - wanted).norm() <= apart * wanted.norm()
    assert "NAVA" not in caplog.text
    if flag == "fp16_unet":
        monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: None)  # as a GPU computes in it
        host_model.load_backbone(str(small_backbone))
        assert "float16" in caplog.text


# ---------------------------------------------------------------- callbacks and latents of every host


class Previewed:
    """A host's callback as its nodes make it: looks into the video for a preview, keeps the whole for an output."""

    def __init__(self):
        self.videos, self.kept = [], []

    def __call__(self, step, x0, x, steps):
        self.kept.append(x0)
        self.videos.append(x0.unbind()[0] if host_latents.is_nested(x0) else x0)

    def last(self, shapes):
        """What the nodes make of the kept one: (video, audio)."""
        latent = self.kept[-1].cpu()
        return latent.unbind() if host_latents.is_nested(latent) else comfy.utils.unpack_latents(latent, shapes)


@pytest.mark.parametrize("guider_class", ["ours", "stock"])
@pytest.mark.parametrize("attribute", ["as the host has it", "absent"])
def test_callbacks_get_the_video_and_keep_the_whole(patcher, context, monkeypatch, guider_class, attribute):
    """Whatever the host hands a callback, and whether or not it tells the model the shapes (some do only one)."""
    if attribute == "absent":
        monkeypatch.delattr(patcher.model, "latent_shapes", raising=False)
    if guider_class == "ours":
        guider = guiders.make_guider(patcher, conditioning(context), None, sampling.Guidance())
    else:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds([[context, {}]], [[context * 0, {}]])
    clip, seen = latent(), Previewed()
    noise = comfy.sample.prepare_noise(clip["samples"], SEED)
    settings = {"callback": seen, "seed": SEED}
    result = guider.sample(
        noise, clip["samples"], guiders.unipc_sampler(), sampling.flow_sigmas(STEPS), **settings
    ).unbind()
    shapes = [part.shape for part in result]
    assert [video.shape for video in seen.videos] == [shapes[0]] * STEPS
    video, audio = seen.last(shapes)
    # The last step goes to sigma 0, so the last estimate is the result.
    assert_close(result, (patcher.model.latent_format.process_out(video), audio))


def test_the_hosts_way_with_callbacks_is_seen_from_what_it_does(monkeypatch):
    """Both ways, on every host: the one that it has not is played by a guider that has."""
    preview = pack_module("nodes.host.preview")
    for nested in (False, True):

        class Guider(comfy.samplers.CFGGuider):
            def sample(self, noise, latent_image, sampler, sigmas, callback=None, nested=nested, **settings):
                packed, shapes = comfy.utils.pack_latents(latent_image.unbind())
                nest = comfy.nested_tensor.NestedTensor

                def unpacked(step, x0, x, steps):
                    callback(step, nest(comfy.utils.unpack_latents(x0, shapes)), x, steps)

                self.outer_sample(packed, packed, sampler, sigmas, callback=unpacked if nested else callback)

        monkeypatch.setattr(comfy.samplers, "CFGGuider", Guider)
        assert preview.host_unpacks.__wrapped__() is nested


def test_nested_latents_are_processed_as_packed_ones(patcher):
    """Newer hosts hand ``process_latent_out`` the nested denoised latent."""
    generator = torch.Generator().manual_seed(8)
    video, audio = torch.randn(1, 48, 2, 3, 4, generator=generator), torch.randn(1, 8, 5, 16, generator=generator)
    expected = patcher.model.latent_format.process_out(video)
    nested = patcher.model.process_latent_out(comfy.nested_tensor.NestedTensor([video, audio]))
    assert torch.equal(nested.unbind()[0], expected)
    assert torch.equal(nested.unbind()[1], audio)
    packed, shapes = comfy.utils.pack_latents([video, audio])
    patcher.model.latent_shapes = shapes
    assert torch.equal(comfy.utils.unpack_latents(patcher.model.process_latent_out(packed), shapes)[0], expected)
    assert torch.equal(patcher.model.process_latent_out(video), expected)
    with pytest.raises(ValueError, match="shapes of its parts"):
        patcher.model.process_latent_out(packed[:, :, :-1])


# ---------------------------------------------------------------- stock nodes that change a run

WINDOWS = pack_module("nodes.host.latents").audio_steps_of


def test_audio_steps_of_frames_are_those_of_their_time():
    shape = geometry.ClipGeometry(6, 96, 80)
    frames, steps = shape.latent_shape[1], shape.audio_shape[1]
    assert WINDOWS(range(frames), frames, steps) == list(range(steps))
    for start in (0, 6, 12, 30):  # whole seconds
        window = WINDOWS(range(start, start + 6), frames, steps)
        assert window == list(range(start * 25 // 6, start * 25 // 6 + 25))
    assert WINDOWS([3, 4], frames, 1) == [0]  # a picture without sound
    assert WINDOWS([36, 0], 37, 152) == [150, 151, 0, 1, 2, 3]
    assert WINDOWS([36], 37, 200) == list(range(150, 200))


@pytest.mark.parametrize("masked", [False, True])
def test_context_windows_get_the_sound_of_their_time(patcher, context, voice, monkeypatch, masked):
    """Or a sentence, on hosts whose windows know one modality only."""
    import comfy.context_windows as windows

    seen = []
    original = pack_module("nava_core.backbone").NavaBackbone.forward

    def forward(self, video, audio, timestep, *args, **kwargs):
        seen.append((video, audio, kwargs["audio_start"], timestep))
        return original(self, video, audio, timestep, *args, **kwargs)

    clone = patcher.clone()
    clone.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"),
        windows.get_matching_fuse_method("pyramid"),
        context_length=4, context_overlap=1, dim=2,
    )  # fmt: skip
    windows.create_prepare_sampling_wrapper(clone)
    monkeypatch.setattr(pack_module("nava_core.backbone").NavaBackbone, "forward", forward)
    clip = latent(seconds=1)
    if masked:
        video, audio = (torch.ones(part.shape) for part in clip["samples"].unbind())
        video[:, :, 0] = 0
        audio[:, :, 20:] = 0
        clip["noise_mask"] = comfy.nested_tensor.NestedTensor([video, audio])
    guider = guiders.make_guider(clone, conditioning(context, voice), None, sampling.CONDITIONAL)
    settings = (guider, clip, SEED, guiders.euler_sampler(), sampling.distilled_sigmas()[:2])
    if not hasattr(windows, "WindowingState"):
        with pytest.raises(ValueError, match="do not know picture and sound apart"):
            guiders.sample(*settings)
        return
    for part in guiders.sample(*settings)["samples"].unbind():
        assert part.isfinite().all()
    noise = [part.expand(1, *part.shape[1:]) for part in comfy.sample.prepare_noise(clip["samples"], SEED).unbind()]
    video, audio = noise[0], geometry.audio_latent_to_tokens(noise[1])
    # 7 frames in windows of 4; from the second on, the host lets the picture go on from the frame before.
    (first, second) = seen
    assert torch.equal(second[0][:, :, 1:], video[:, :, 3:])
    assert torch.equal(second[0][:, :, :1], video[:, :, 2:3])
    assert (first[2], second[2]) == (0, 1)
    if masked:
        assert [each.tolist() for each in first[3]] == [[[0, 1000, 1000, 1000]], [[1000] * 17]]
        assert [each.tolist() for each in second[3]] == [[[1000] * 5], [[1000] * 8 + [0] * 7]]
    else:
        assert torch.equal(first[0], video[:, :, :4])
        assert torch.equal(first[1], audio[:, :17])
        assert torch.equal(second[1], audio[:, 12:])


def test_sound_that_begins_later_is_turned_by_that_much(core):
    """``audio_start`` 6 is one second, 25 steps: the same as the end of a sound that begins with the picture."""
    table = pack_module("nava_core.backbone.layers").rotary_table
    whole, later = table(128, (2, 1, 1), 30), table(128, (2, 1, 1), 5, 6.0)
    torch.testing.assert_close(later[2:], whole[2 + 25 :])
    generator = torch.Generator().manual_seed(2)
    video, audio = torch.randn(1, 48, 2, 2, 2, generator=generator), torch.randn(1, 5, 128, generator=generator)
    context = torch.randn(1, 3, core.config.text_dim, generator=generator)
    settings = (video, audio, torch.tensor([500.0]), context)
    assert (core(*settings)[0] - core(*settings, audio_start=6.0)[0]).abs().max() > 1e-6


def overridden(patcher, cfg, low=0.0, high=1.0):
    """The patcher with what the stock CFG Override node puts on it."""

    def wrapper(executor, *args, **kwargs):
        guider, sigma = executor.class_obj, float(args[1].flatten()[0])
        saved = guider.cfg
        if low <= sigma <= high:
            guider.cfg = cfg
        try:
            return executor(*args, **kwargs)
        finally:
            guider.cfg = saved

    clone = patcher.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "test", wrapper)
    return clone


@pytest.mark.parametrize("mode", ["video+audio", "audio"])
@pytest.mark.parametrize("alignment", [True, False])
@pytest.mark.parametrize("voiced", [True, False])
def test_cfg_override_sets_the_text_terms(patcher, context, voice, mode, alignment, voiced):
    """cfg 2.5 weighs c - u with 1.5, and 1 leaves it out, in each line of the guidance table."""
    positive, clip = conditioning(context, voice if voiced else None), latent(mode)
    aligned = alignment and mode == "video+audio"
    start, voice_start = (0.0, 0.0) if aligned else (1.0, 0.0 if voiced else 1.0)
    for cfg in (2.5, 1.0):
        scales = {"video_text": cfg - 1 + start, "audio_text": cfg - 1 + voice_start}
        wanted = host_run(patcher, positive, clip, sampling.Guidance(alignment=alignment, **scales))
        given = sampling.Guidance(alignment=alignment, intervals={"audio_text": (0.0, 0.0)})
        got = host_run(overridden(patcher, cfg), positive, clip, given)
        assert_close(got, wanted, 1e-6)
    apart = host_run(overridden(patcher, 1.0, high=0.0), positive, clip, sampling.Guidance(alignment=alignment))
    assert_close(apart, host_run(patcher, positive, clip, sampling.Guidance(alignment=alignment)), 1e-6)


# ---------------------------------------------------------------- wrong wires


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.zeros(1, 16, 3, 8, 8), "another model"),
        ([torch.zeros(1, 128, 3, 8, 8), torch.zeros(1, 8, 5, 16)], "another model"),
        ([torch.zeros(1, 48, 3, 8, 8), torch.zeros(1, 8, 5, 64)], "sound part"),
        ([torch.zeros(1, 48, 1, 1, 1), torch.zeros(1, 8, 1, 16)], "neither picture nor sound"),
    ],
)
def test_latents_of_other_models_are_refused(patcher, context, samples, words):
    if isinstance(samples, list):
        samples = comfy.nested_tensor.NestedTensor(samples)
    guider = guiders.make_guider(patcher, conditioning(context), None, sampling.Guidance())
    with pytest.raises(ValueError, match=words):
        guiders.sample(guider, {"samples": samples}, SEED, guiders.unipc_sampler(), sampling.flow_sigmas(1))


def test_another_models_conditioning_is_refused(patcher):
    guider = guiders.make_guider(patcher, conditioning(torch.zeros(1, 77, 768)), None, sampling.Guidance())
    with pytest.raises(ValueError, match="umt5 text encoder"):
        guiders.sample(guider, latent(), SEED, guiders.unipc_sampler(), sampling.flow_sigmas(1))


def test_another_model_is_refused(context):
    class Other:
        class model:  # noqa: N801
            pass

    with pytest.raises(ValueError, match="not NAVA"):
        guiders.make_guider(Other(), conditioning(context), None, sampling.Guidance())


# ---------------------------------------------------------------- intervals, previews, patches


@pytest.mark.parametrize("shift", [1.0, 5.0, 10.0])
def test_half_of_the_run_is_half_of_the_steps(patcher, context, monkeypatch, shift):
    """NavaSampler's starts and ends count along its own schedule."""
    nodes = pack_module("nodes.sampling")
    seen = []
    original = sampling.Guidance.needed

    def needed(self, sigma, *args, **kwargs):
        names = original(self, sigma, *args, **kwargs)
        seen.append("m" in names)
        return names

    monkeypatch.setattr(sampling.Guidance, "needed", needed)
    settings = {"alignment": True, **dict.fromkeys(["video_text", "video_align", "audio_text", "audio_align"], 1.0)}
    ends = {f"{term}_{end}": float(end == "end") for term in ("text", "align", "timbre") for end in ("start", "end")}
    nodes.NavaSampler.execute(
        patcher, conditioning(context), latent(), SEED, 10, shift, audio_timbre=0.0, **settings,
        **{**ends, "align_end": 0.55},
    )  # fmt: skip
    assert seen == [True] * 6 + [False] * 4


def test_any_previewer_sees_video_and_the_host_gets_the_packed_latent():
    preview = pack_module("nodes.host.preview")
    video, audio = torch.randn(1, 48, 3, 4, 6), torch.randn(1, 8, 5, 16)
    packed, shapes = comfy.utils.pack_latents([video, audio])
    kept = {}
    preview.video_first(lambda step, x0, x, steps: kept.update(x0=x0), shapes)(0, packed, packed, 1)
    x0 = kept["x0"]
    assert (x0.ndim, tuple(x0.shape)) == (5, tuple(video.shape))
    frames = x0.movedim(2, 1).reshape((-1, *x0.shape[-3:]))
    assert torch.equal(frames, video.movedim(2, 1).reshape((-1, *video.shape[-3:])))
    assert torch.equal(x0[0, :, 0], video[0, :, 0])
    assert type(x0[0]) is torch.Tensor
    assert torch.equal(x0.cpu(), packed)


def test_patches_without_a_place_in_our_guidance_are_named_once(patcher, context, caplog):
    clone = patcher.clone()
    clone.set_model_sampler_cfg_function(lambda args: args["cond"])
    host_run(clone, conditioning(context), latent(), sampling.Guidance(alignment=False, video_text=1, audio_text=1))
    assert [record.message for record in caplog.records].count(
        "NAVA's guidance does not use sampler_cfg_function of this MODEL: use a stock guider."
    ) == 1
