"""The denoising loop: what the network is asked, what is kept of given parts, and how a run ends."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nava_core.sampling import FlowUniPC, Guidance, Interrupted, denoise, find_preset, flow_sigmas

GOLDEN = Path(__file__).parents[1] / "golden" / "backbone_tiny.safetensors"
PLAIN = Guidance(alignment=False, video_text=1.0, audio_text=1.0, audio_timbre=0.0)


def noise(seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 48, 3, 4, 5, generator=generator)
    audio = torch.randn(batch, 7, 128, generator=generator)
    return video, audio


def text(seed=1, length=6, width=40):
    return torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """Stands in for a backbone: a simple velocity, the same for every frame and step, and a memory."""

    def __init__(self):
        self.calls = []

    def __call__(self, video, audio, timestep, context, **conditions):
        self.calls.append({"video": video, "audio": audio, "timestep": timestep, "context": context, **conditions})
        return tuple(None if x is None else 0.1 * x + context.mean().to(x) for x in (video, audio))


def timestep_of(call):
    return call["timestep"].tolist() if torch.is_tensor(call["timestep"]) else call["timestep"]


def test_equals_the_solver_on_the_velocity():
    sigmas, (video, audio) = flow_sigmas(4), noise()
    backbone = Recorder()
    result = denoise(backbone, video, audio, text(), sigmas=sigmas, guidance=PLAIN)
    for start, got in zip((video, audio), result, strict=True):
        solver, sample = FlowUniPC(sigmas), start * sigmas[0]
        for _ in solver.timesteps:
            sample = solver.step(0.1 * sample + text().mean(), sample)
        torch.testing.assert_close(got, sample, atol=1e-5, rtol=1e-5)
    assert [timestep_of(call) for call in backbone.calls] == [[999.0], [937.0], [833.0], [624.0]]


@pytest.mark.parametrize("absent", [None, "video", "audio"])
def test_the_distilled_preset_is_four_euler_steps_on_one_prediction(absent):
    """What the makers do with a student, with a voice and without a modality too."""
    preset = find_preset("distilled")
    parts = {"video": noise()[0], "audio": noise()[1], absent: None}
    voice = {"timbre": torch.ones(1, 1, 192), "timbre_positions": torch.tensor([[2]])}
    backbone = Recorder()
    settings = {"sigmas": preset.sigmas(), "guidance": preset.guidance, "sampler": preset.solver, **voice}
    result = denoise(backbone, parts["video"], parts["audio"], text(), negative=text(4), **settings)
    for sample, got in zip((parts["video"], parts["audio"]), result, strict=True):
        if sample is None:
            assert got is None
            continue
        for sigma, target in ((1, 0.9375), (0.9375, 5 / 6), (5 / 6, 0.625), (0.625, 0)):
            sample = sample + (target - sigma) * (0.1 * sample + text().mean())
        torch.testing.assert_close(got, sample, atol=1e-5, rtol=1e-5)
    times = [timestep_of(call)[0] for call in backbone.calls]
    assert times == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert all(call["cross_modal"] and call["timbre"] is not None for call in backbone.calls)


def test_starts_from_scaled_noise_and_the_latent_it_is_given():
    sigmas, (video, audio), (clip, _) = flow_sigmas(10)[4:], noise(), noise(seed=5)
    backbone = Recorder()
    denoise(backbone, video, audio, text(), sigmas=sigmas, guidance=PLAIN, video_latent=clip)
    torch.testing.assert_close(backbone.calls[0]["video"], sigmas[0] * video + (1 - sigmas[0]) * clip)
    torch.testing.assert_close(backbone.calls[0]["audio"], sigmas[0] * audio)


def test_each_prediction_has_its_own_conditions():
    voices, positions = torch.ones(1, 2, 192), torch.tensor([[1, 4]])
    backbone, context = Recorder(), text()
    denoise(
        backbone,
        *noise(),
        context,
        sigmas=flow_sigmas(1),
        timbre=voices,
        timbre_positions=positions,
    )
    c, u, m, n = backbone.calls
    assert torch.equal(c["context"], context)
    assert torch.equal(c["timbre"], voices)
    assert torch.equal(c["timbre_positions"], positions)
    assert c["cross_modal"]
    assert not u["context"].any()
    assert u["context"].shape[-1] == context.shape[-1]
    for null in (u, m, n):
        assert null["timbre"] is None
        assert null["timbre_positions"] is None
    assert torch.equal(m["context"], context)
    assert torch.equal(n["context"], context)
    assert (u["cross_modal"], m["cross_modal"], n["cross_modal"]) == (True, False, True)


def test_negative_text_is_the_text_null():
    backbone, negative = Recorder(), text(seed=3, length=2)
    denoise(backbone, *noise(), text(), sigmas=flow_sigmas(1), negative=negative)
    assert torch.equal(backbone.calls[1]["context"], negative)


@pytest.mark.parametrize("absent", ["video", "audio"])
def test_one_modality_alone(absent):
    video, audio = noise()
    video, audio = (None, audio) if absent == "video" else (video, None)
    backbone = Recorder()
    got = denoise(backbone, video, audio, text(), sigmas=flow_sigmas(2))
    assert (got[0] is None) == (absent == "video")
    assert (got[1] is None) == (absent == "audio")
    assert [call["cross_modal"] for call in backbone.calls] == [True] * 4  # c and u, twice


def test_first_frame_stays_clean():
    video, audio = noise(batch=2)
    frame = torch.randn(1, 48, 1, 4, 5)
    backbone, seen = Recorder(), []
    got, _ = denoise(
        backbone,
        video,
        audio,
        text(),
        sigmas=flow_sigmas(3),
        first_frame=frame,
        callback=lambda step, steps, x0, _: seen.append((step, steps, x0)),
    )
    for call in backbone.calls:
        assert torch.equal(call["video"][:, :, :1], frame.expand(2, -1, -1, -1, -1))
        frames, steps = call["timestep"]
        assert frames.shape == (2, 3)
        assert (frames[:, 0] == 0).all()
        assert (frames[:, 1:] == steps[0]).all()
    assert torch.equal(got[:, :, :1], frame.expand(2, -1, -1, -1, -1))
    assert [(step, steps) for step, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(x0[:, :, :1], frame.expand(2, -1, -1, -1, -1)) for _, _, x0 in seen)
    without, _ = denoise(Recorder(), video, audio, text(), sigmas=flow_sigmas(3))
    torch.testing.assert_close(got[:, :, 1:], without[:, :, 1:])  # this network sees each frame alone


def test_given_sound_and_part_of_a_frame_come_out_unchanged():
    (video, audio), (clip, sound) = noise(), noise(seed=5)
    video_mask = torch.ones(1, 1, 3, 4, 5)
    video_mask[:, :, 1, :2] = 0
    audio_mask = torch.ones(1, 7, 1)
    audio_mask[:, 4:] = 0
    backbone = Recorder()
    got = denoise(
        backbone,
        video,
        audio,
        text(),
        sigmas=flow_sigmas(2),
        video_latent=clip,
        video_mask=video_mask,
        audio_latent=sound,
        audio_mask=audio_mask,
    )
    assert torch.equal(got[0][:, :, 1, :2], clip[:, :, 1, :2])
    assert not torch.isclose(got[0][:, :, 1, 2:], clip[:, :, 1, 2:]).any()
    assert torch.equal(got[1][:, 4:], sound[:, 4:])
    frames, steps = backbone.calls[0]["timestep"]
    assert frames.tolist() == [[999.0] * 3]  # no frame is given in full
    assert steps.tolist() == [[999.0] * 4 + [0.0] * 3]


def test_first_frame_with_picture_only():
    backbone, frame = Recorder(), torch.zeros(1, 48, 1, 4, 5)
    got, _ = denoise(backbone, noise()[0], None, text(), sigmas=flow_sigmas(1), first_frame=frame)
    assert torch.equal(got[:, :, :1], frame)
    assert backbone.calls[0]["timestep"][0].tolist() == [[0.0, 999.0, 999.0]]


def test_an_interrupt_ends_the_run_between_passes():
    backbone = Recorder()
    with pytest.raises(Interrupted):
        denoise(
            backbone,
            *noise(),
            text(),
            sigmas=flow_sigmas(5),
            should_stop=lambda: len(backbone.calls) == 4,
        )
    assert len(backbone.calls) == 4


def test_nan_from_the_network_is_reported_with_its_step():
    def broken(video, audio, timestep, context, **_):
        return video * float("nan") if timestep[0] < 900 else video, audio

    with pytest.raises(FloatingPointError, match=r"network returned NaN .* step 3 of 4"):
        denoise(broken, *noise(), text(), sigmas=flow_sigmas(4), guidance=PLAIN)


def test_the_network_runs_in_the_dtype_of_the_context():
    backbone = Recorder()
    got = denoise(backbone, *noise(), text().bfloat16(), sigmas=flow_sigmas(1), guidance=PLAIN)
    assert backbone.calls[0]["video"].dtype == backbone.calls[0]["audio"].dtype == torch.bfloat16
    assert got[0].dtype == got[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"first_frame": torch.zeros(1, 48, 1, 4, 4)}, "first frame's latent must be"),
        ({"video_mask": torch.ones(1, 1, 3, 4, 5)}, "give video_latent"),
        ({"audio_latent": torch.zeros(1, 8, 128)}, "audio latent of shape"),
        ({"timbre": torch.zeros(1, 1, 192)}, "given together"),
        ({"negative": torch.zeros(3, 1, 40)}, "batch of 3"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        denoise(Recorder(), *noise(), text(), sigmas=flow_sigmas(1), **change)


def test_a_first_frame_needs_video():
    with pytest.raises(ValueError, match="needs a clip with video"):
        denoise(
            Recorder(),
            None,
            noise()[1],
            text(),
            sigmas=flow_sigmas(1),
            first_frame=torch.zeros(1, 48, 1, 4, 5),
        )
    with pytest.raises(ValueError, match="nothing to denoise"):
        denoise(Recorder(), None, None, text(), sigmas=flow_sigmas(1))


@pytest.fixture(scope="module")
def tiny():
    from nava_core.backbone import BackboneConfig, NavaBackbone

    with safe_open(GOLDEN, "pt") as file:
        weights = {name.removeprefix("backbone."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    backbone = NavaBackbone(BackboneConfig.from_shapes(shapes, config))
    backbone.load_state_dict(weights)
    return backbone.eval()


VOICE = {
    "timbre": torch.randn(1, 1, 192, generator=torch.Generator().manual_seed(6)),
    "timbre_positions": torch.tensor([[2]]),
}


@pytest.mark.parametrize("first_frame", [None, torch.zeros(1, 48, 1, 4, 5)])
def test_batched_predictions_equal_separate_ones(tiny, first_frame):
    separate, batched = (
        denoise(
            tiny,
            *noise(batch=2),
            text(),
            sigmas=flow_sigmas(3),
            negative=text(seed=4, length=9),
            first_frame=first_frame,
            batch_predictions=together,
            **VOICE,
        )
        for together in (False, True)
    )
    for one, other in zip(separate, batched, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


def test_voice_reaches_the_sound_and_through_it_the_picture(tiny):
    with_voice = denoise(tiny, *noise(), text(), sigmas=flow_sigmas(2), **VOICE)
    other = {**VOICE, "timbre": -VOICE["timbre"]}
    with_other = denoise(tiny, *noise(), text(), sigmas=flow_sigmas(2), **other)
    for one, two in zip(with_voice, with_other, strict=True):
        assert one.isfinite().all()
        assert (one - two).abs().max() > 1e-4


def test_zero_context_and_short_zero_context_are_the_same(tiny):
    short, full = (
        denoise(tiny, *noise(), text(), sigmas=flow_sigmas(2), negative=negative)
        for negative in (None, torch.zeros(1, 24, 40))
    )
    assert torch.equal(short[0], full[0])
    assert torch.equal(short[1], full[1])


# ---------------------------------------------------------------- out of memory


class Short(Recorder):
    """Runs out of memory at the calls of the numbers ``at``, counted from 1."""

    def __init__(self, *at, error=None):
        super().__init__()
        self.at, self.error = at, error or torch.OutOfMemoryError("CUDA out of memory.")

    def __call__(self, *args, **conditions):
        result = super().__call__(*args, **conditions)
        if len(self.calls) in self.at:
            raise self.error
        return result


@pytest.mark.parametrize("at", [1, 2, 5, 6, 12])
def test_a_step_that_runs_out_of_memory_is_made_once_more(at):
    """Three predictions a step, which are three passes."""
    inputs = (*noise(), text())
    settings = {"sigmas": flow_sigmas(4), "negative": text(2)}
    expected = denoise(Recorder(), *inputs, **settings)
    asked, backbone = [], Short(at)
    result = denoise(backbone, *inputs, on_out_of_memory=lambda: asked.append(len(backbone.calls)) or True, **settings)
    assert all(map(torch.equal, result, expected))
    assert asked == [at]
    assert len(backbone.calls) == 12 + (at - 1) % 3 + 1


def test_predictions_stay_apart_once_memory_ran_out():
    inputs = (*noise(), text())
    settings = {"sigmas": flow_sigmas(3), "negative": text(2), "batch_predictions": True}
    backbone = Short(3)  # two passes a step: c and u together, and m
    steps = []
    denoise(backbone, *inputs, on_out_of_memory=lambda: False, callback=lambda *s: steps.append(s[0]), **settings)
    assert [len(call["context"]) for call in backbone.calls] == [2, 1, 2, 1, 1, 1, 1, 1, 1]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(("freed", "at"), [(True, (4, 5)), (False, (4,))])
def test_memory_that_stays_short_ends_the_run(freed, at):
    settings = {"sigmas": flow_sigmas(4), "negative": text(2)}
    with pytest.raises(torch.OutOfMemoryError):
        denoise(Short(*at), *noise(), text(), on_out_of_memory=lambda: freed, **settings)
    with pytest.raises(torch.OutOfMemoryError):
        denoise(Short(4), *noise(), text(), **settings)
    with pytest.raises(RuntimeError, match="shapes"):
        denoise(Short(4, error=RuntimeError("shapes")), *noise(), text(), on_out_of_memory=lambda: True, **settings)


def test_the_failed_passs_tensors_are_gone_when_memory_is_freed():
    held = []

    class Holding(Recorder):
        def __call__(self, video, audio, timestep, context, **conditions):
            if not self.calls:
                tensor = torch.ones(3)
                held.append(weakref.ref(tensor))
                self.calls.append(None)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__call__(video, audio, timestep, context, **conditions)

    gone = []
    denoise(
        Holding(), *noise(), text(), sigmas=flow_sigmas(1), guidance=PLAIN,
        on_out_of_memory=lambda: gone.append(held[0]() is None) or True,
    )  # fmt: skip
    assert gone == [True]
