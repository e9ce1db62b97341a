"""Time, peak memory and error of every form of decoding, against whole frames as the network runs them.

python -m benchmarks.decode                                          random weights at a middle width, on the CPU
python -m benchmarks.decode --device cuda --json results.json       the released width at 1280x704, 6 s
python -m benchmarks.decode --device cuda --vae wan2.2_vae.safetensors --audio-vae ltx-2.3-22b-dev_audio_vae.safetensors

With random weights times and memory are those of the real ones, and the error of the forms of whole frames shows their
rounding. Seams of tiles depend on what the weights have learnt: they mean something with the real files only.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.live_memory import LiveMemory
from nava_core.components.audio_vae import AudioVAE, load_audio_vae, vae_config
from nava_core.components.video_vae import VideoVAE, load_video_vae
from nava_core.decoding import (
    BY_FRAME,
    BY_FRAME_IN_RAM,
    IN_PIECES,
    ONE_PIECE,
    WHOLE,
    DecodeForm,
    SoundForm,
    collect,
    stream_frames,
)
from nava_core.demo import AUDIO_CONFIG
from nava_core.geometry import PIXELS_PER_LATENT, VIDEO_CHANNELS, frames_of_latents

FORMS = (
    WHOLE,
    BY_FRAME,
    BY_FRAME_IN_RAM,
    DecodeForm(512, 64),
    DecodeForm(256, 64),
    DecodeForm(256, 128),
    DecodeForm(128, 64),
)
WIDTHS = {"small": (8, 16), "middle": (40, 64), "released": (160, 256)}  # of encoder and decoder
SIZES = {"cpu": (512, 384, 3), "720p": (1280, 704, 37)}  # width, height, latent frames
SOUND_STEPS = {"cpu": 110, "720p": 152}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GB = 1e9


@dataclass(frozen=True)
class Job:
    """What is run. ``vae`` and ``audio_vae``: files of real weights, None for random ones."""

    device: str
    dtype: torch.dtype
    width: str
    size: tuple[int, int, int]
    sound_steps: int
    vae: Path | None = None
    audio_vae: Path | None = None


# ---------------------------------------------------------------- what is run


def random_video_vae(width: str, dtype: torch.dtype, device: str) -> VideoVAE:
    """The Wan2.2 VAE of a width, with random weights that keep activations near one."""
    from diffusers import AutoencoderKLWan

    encoder, decoder = WIDTHS[width]
    with torch.device("meta"):
        network = AutoencoderKLWan(
            base_dim=encoder,
            decoder_base_dim=decoder,
            z_dim=VIDEO_CHANNELS,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            temperal_downsample=[False, True, True],
            in_channels=12,
            out_channels=12,
            is_residual=True,
            patch_size=2,
            scale_factor_spatial=PIXELS_PER_LATENT,
        )
    network.to_empty(device=device)
    _draw(network, device)
    network.decoder.to(dtype)
    network.post_quant_conv.to(dtype)
    return VideoVAE(network).eval().requires_grad_(False)


def random_audio_vae(width: str, device: str) -> AudioVAE:
    """The LTX-2.3 audio VAE and vocoder, at the released width or at an eighth of it, with random weights."""
    from diffusers import AutoencoderKLLTX2Audio
    from diffusers.pipelines.ltx2 import LTX2VocoderWithBWE

    released = width == "released"
    params = AUDIO_CONFIG["audio_vae"]["model"]["params"]
    network = {**params["ddconfig"], "ch": 128 if released else 16}
    config = {**AUDIO_CONFIG["audio_vae"], "model": {"params": {**params, "ddconfig": network}}}
    narrow = {} if released else {"hidden_channels": 192, "bwe_hidden_channels": 64}
    decoder = AutoencoderKLLTX2Audio(**vae_config(config)).decoder
    vocoder = LTX2VocoderWithBWE(**narrow)
    for part in (decoder, vocoder):
        part.to(device)
        _draw(part, device)
    mean, std = torch.zeros(8, 1, 16, device=device), torch.ones(8, 1, 16, device=device)
    return AudioVAE(decoder, vocoder, mean, std).eval().requires_grad_(False)


def _draw(network: torch.nn.Module, device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        values = torch.empty_like(parameter, requires_grad=False)
        if parameter.ndim > 1 and "gamma" not in name:
            parameter.data = values.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.data = values.fill_(0.0 if "bias" in name else 1.0)


def picture_latent(vae: VideoVAE, size: tuple[int, int, int]) -> tuple[torch.Tensor, str]:
    """The latent of a view that moves over a photograph, or where there is none over waves; and what it is of."""
    width, height, latents = size
    count = frames_of_latents(latents)
    picture, what = _photograph(width + count, height)
    frames = torch.stack([picture[:, shift : shift + width] for shift in range(count)])
    return vae.encode(frames), what


def _photograph(width: int, height: int) -> tuple[torch.Tensor, str]:
    try:
        from skimage import data

        image = torch.from_numpy(data.coffee()).float() / 255  # 400 x 600
        what = "a photograph (scikit-image's coffee)"
    except ImportError:
        rows, columns = torch.meshgrid(torch.linspace(0, 1, 400), torch.linspace(0, 1, 600), indexing="ij")
        image = torch.stack([(torch.sin(9 * rows * k + 7 * columns * (4 - k)) + 1) / 2 for k in (1, 2, 3)], -1)
        what = "waves (scikit-image is not installed)"
    scale = max(width / image.shape[1], height / image.shape[0])
    size = [math.ceil(image.shape[0] * scale), math.ceil(image.shape[1] * scale)]
    resized = torch.nn.functional.interpolate(image.movedim(-1, 0)[None], size, mode="bicubic", antialias=True)
    return resized[0].clamp(0, 1).movedim(0, -1)[:height, :width], what


# ---------------------------------------------------------------- what is measured


def measured(work: Callable[[], torch.Tensor], device: str, ignore: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """What ``work`` gives, its seconds, and its peak bytes on the device beside ``ignore``.

    On a GPU wall clock and allocated memory; on the CPU the time its cores spent and live tensors, in a run of their
    own, since counting costs time.
    """
    gc.collect()
    if device == "cuda":
        work()  # kernels are chosen, libraries take their workspaces
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        return result, {
            "seconds": time.perf_counter() - start,
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    with LiveMemory() as memory:
        memory.ignore(*ignore)
        work()
    return result, {"seconds": seconds, "peak_bytes": memory.peak}


def apart(frames: torch.Tensor, whole: torch.Tensor, form: DecodeForm | SoundForm) -> dict:
    """The error of a form, relative to how much the whole varies, and in levels of 255 where it is a picture."""
    error = (frames - whole).double()
    found = {
        "relative_rms": float(error.square().mean().sqrt() / whole.double().std()),
        "largest": float(error.abs().max()),
        "equal": bool(torch.equal(frames, whole)),
    }
    if isinstance(form, DecodeForm):
        found |= {"mean_levels": float(error.abs().mean() * 255), "largest_levels": found["largest"] * 255}
    return found


def decode_video(vae: VideoVAE, latent: torch.Tensor, form: DecodeForm, keep: bool) -> torch.Tensor:
    """The frames; where they are not to be kept, none of them, so that the memory counted is the stream's own."""
    from nava_core.components.video_vae import _Decoder

    parts = stream_frames(_Decoder(vae.network), latent, form)
    if keep:
        return collect(parts, frames_of_latents(latent.shape[2]))
    for part in parts:
        del part
    return torch.empty(0)


def measure(job: Job) -> dict:
    """Every form of picture and sound, and what it ran on."""
    gpu = job.device == "cuda"
    picture, forms = measure_video(job)
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "dtype": str(job.dtype).removeprefix("torch."),
        "width": "the file's" if job.vae else job.width,
        "weights": "real" if job.vae else "random",
        "size": dict(zip(("width", "height", "latent_frames"), job.size, strict=True)),
        "picture": picture,
        "time": "wall clock" if gpu else "processor time",
        "memory": "torch.cuda.max_memory_allocated" if gpu else "live tensors",
        "video": forms,
        "sound": measure_sound(job),
    }


def measure_video(job: Job) -> tuple[str, list[dict]]:
    """What is decoded, and the figures of every form that is one here."""
    vae = load_video_vae(job.vae, device=job.device, dtype=job.dtype) if job.vae else None
    vae = vae or random_video_vae(job.width, job.dtype, job.device)
    latent, what = picture_latent(vae, job.size)
    weights = [*vae.parameters(), *vae.buffers(), latent]
    whole, found = decode_video(vae, latent, WHOLE, keep=True), []
    for form in FORMS:
        if form.tile >= PIXELS_PER_LATENT * max(latent.shape[-2:]) or (form.in_ram and job.device == "cpu"):
            continue
        print(f"{form}, {form.overlap} shared ..." if form.tile else f"{form} ...", flush=True)
        _, cost = measured(lambda form=form: decode_video(vae, latent, form, keep=False), job.device, weights)
        error = apart(decode_video(vae, latent, form, keep=True), whole, form)
        estimate = vae.decode_bytes(latent.shape, form)
        entry = {"form": str(form), "tile": form.tile, "overlap": form.overlap, "estimated_bytes": estimate}
        found.append({**entry, **cost, **error})
    return what, found


def measure_sound(job: Job) -> dict:
    """The figures of sound in one piece and in several."""
    vae = load_audio_vae(job.audio_vae, device=job.device) if job.audio_vae else None
    vae = vae or random_audio_vae(job.width, job.device)
    latent = torch.randn(1, 8, job.sound_steps, 16, generator=torch.Generator().manual_seed(0))
    weights = [*vae.parameters(), *vae.buffers(), latent]
    whole, forms = vae.decode(latent), []
    for form in (ONE_PIECE, IN_PIECES):
        print(f"sound in {form} ...", flush=True)
        waveform, cost = measured(lambda form=form: vae.decode(latent, form), job.device, weights)
        estimate = vae.decode_bytes(latent.shape, form)
        forms.append({"form": str(form), "estimated_bytes": estimate, **cost, **apart(waveform, whole, form)})
    return {"weights": "real" if job.audio_vae else "random", "steps": job.sound_steps, "forms": forms}


# ---------------------------------------------------------------- the command


def table(report: dict) -> str:
    """The report to read, in Markdown."""
    size = report["size"]
    lines = [
        f"{report['device']}; torch {report['torch']}; {report['weights']} weights of width {report['width']}, "
        f"{report['dtype']}; {size['width']}x{size['height']}, {size['latent_frames']} latent frames of "
        f"{report['picture']}; time: {report['time']}; memory beside weights and frames: {report['memory']}.",
        "",
        "| form | s | GB | estimated GB | relative RMS error | mean, largest levels of 255 |",
        "|---|---|---|---|---|---|",
    ]
    for form in report["video"]:
        name = form["form"] + (f", {form['overlap']} shared" if form["tile"] else "")
        levels = "equal" if form["equal"] else f"{form['mean_levels']:.2g}, {form['largest_levels']:.2g}"
        lines.append(
            f"| {name} | {form['seconds']:.2f} | {form['peak_bytes'] / GB:.3f} | {form['estimated_bytes'] / GB:.3f} "
            f"| {form['relative_rms']:.1e} | {levels} |"
        )
    sound = report["sound"]
    lines += ["", f"Sound, {sound['steps']} steps, {sound['weights']} weights:"]
    for form in sound["forms"]:
        lines.append(
            f"{form['form']}: {form['seconds']:.2f} s, {form['peak_bytes'] / GB:.3f} GB (estimated "
            f"{form['estimated_bytes'] / GB:.3f}), relative RMS error {form['relative_rms']:.1e}"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> tuple[Job, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", help=f"{', '.join(SIZES)} or WIDTHxHEIGHTxLATENT_FRAMES; by default the device's")
    parser.add_argument(
        "--width", choices=WIDTHS, help="of random weights; by default middle on the CPU, else released"
    )
    parser.add_argument("--vae", type=Path, help="the Wan2.2 VAE's file, for real weights")
    parser.add_argument("--audio-vae", type=Path, help="the LTX audio VAE's file, for real weights")
    parser.add_argument("--dtype", choices=DTYPES, help="by default float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device.")
    for name in ("vae", "audio_vae"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name.replace('_', '-')}: there is no file {path}.")
    size = options.size or ("720p" if gpu else "cpu")
    try:
        sizes = SIZES[size] if size in SIZES else tuple(map(int, size.split("x")))
        width, height, latents = sizes
        if width % PIXELS_PER_LATENT or height % PIXELS_PER_LATENT or min(sizes) < 1:
            raise ValueError(f"sides are multiples of {PIXELS_PER_LATENT}")
    except ValueError as error:
        parser.error(f"--size {size}: give {', '.join(SIZES)} or WIDTHxHEIGHTxLATENT_FRAMES ({error}).")
    job = Job(
        device=options.device,
        dtype=DTYPES[options.dtype or ("bfloat16" if gpu else "float32")],
        width=options.width or ("released" if gpu else "middle"),
        size=(width, height, latents),
        sound_steps=SOUND_STEPS["720p" if gpu else "cpu"],
        vae=options.vae,
        audio_vae=options.audio_vae,
    )
    return job, options.json


def main(arguments: list[str] | None = None) -> None:
    job, path = parse(arguments)
    report = measure(job)
    print(table(report))
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
