"""Small models made on the spot: every component NAVA needs, narrow and random, in the file formats of the real ones.

They make noise, not clips, but they run the whole job in seconds: for tests, for a first run on a fresh machine, and
for a workflow that is to be tried before 40 GB are fetched. Nothing here is trained and nothing is downloaded.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .prompt.umt5 import UMT5Config, to_makers_names

Shapes = dict[str, tuple[int, ...]]

FILES = {
    "backbone": "NAVA_tiny.safetensors",
    "video_vae": "wan2.2_vae_tiny.safetensors",
    "audio_vae": "ltx-2.3_audio_vae_tiny.safetensors",
    "text_encoder": "umt5_tiny_fp16.safetensors",
    "text_encoder_fp8": "umt5_tiny_fp8_e4m3fn_scaled.safetensors",
    "text_encoder_pth": "models_t5_umt5-tiny-enc-bf16.pth",
    "tokenizer": "umt5-tiny",
    "speaker_encoder": "redimnet_tiny.pt",
    "tae": "lighttaew2_2_tiny.safetensors",
}
COMFY_FOLDERS = {
    "backbone": "diffusion_models",
    "video_vae": "vae",
    "audio_vae": "vae",
    "text_encoder": "text_encoders",
    "text_encoder_fp8": "text_encoders",
    "text_encoder_pth": "text_encoders",
    "tokenizer": "text_encoders",
    "speaker_encoder": "audio_encoders",
    "tae": "vae_approx",
}

SENTINELS = 300
TEXT_DIM = 64
LATENT_CHANNELS, MEL_BINS = 48, 64


def make_small_models(
    folder: str | Path, *, seed: int = 0, preview_decoder: bool = True, say: Callable[[str], None] | None = None
) -> dict[str, Path]:
    """Write one small model of every kind into ``folder`` (made if missing) and return their paths by role.

    Roles: backbone, video_vae, audio_vae, text_encoder (fp16), text_encoder_fp8 (scaled), text_encoder_pth (the
    makers' layout) with tokenizer (a folder), speaker_encoder, and tae, the preview decoder, which has only one size
    (22 MB) and can be left out. The same seed gives the same weights. ``say`` is told each path as it is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {role: folder / name for role, name in FILES.items()}
    if not preview_decoder:
        del paths["tae"]
    writers = {
        "backbone": _write_backbone,
        "video_vae": _write_video_vae,
        "audio_vae": _write_audio_vae,
        "text_encoder": lambda _path, seed: _write_text_encoders(paths, seed),
        "speaker_encoder": _write_speaker_encoder,
        "tae": _write_preview_decoder,
    }
    for role, write in writers.items():
        if role in paths:
            write(paths[role], seed)
            if say:
                say(str(paths[role]))
    return paths


def place_in_comfyui(models: Mapping[str, Path], models_folder: str | Path) -> dict[str, Path]:
    """Put the models under ComfyUI's ``models`` folder, each where its loader looks; hard links where possible.

    Returns the new paths by role. Files of the same name are replaced.
    """
    placed = {}
    for role, source in models.items():
        target = Path(models_folder) / COMFY_FOLDERS[role] / Path(source).name
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)
        placed[role] = target
    return placed


# --- random weights ----------------------------------------------------------------------------------------------


def _draw(shapes: Shapes, seed: int, gain: Callable[[str], float] = lambda name: 1.0) -> dict[str, Tensor]:
    """Random tensors that keep activations near the size of the inputs: matrices by fan-in times ``gain(name)``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("gamma", "norm.weight")):
            drawn[name] = 1 + 0.1 * noise
        elif len(shape) < 2:
            drawn[name] = 0.05 * noise
        else:
            drawn[name] = noise * gain(name) / math.sqrt(math.prod(shape[1:]))
    return drawn


def _conv(name: str, inputs: int, outputs: int, *kernel: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), **({f"{name}.bias": (outputs,)} if bias else {})}


# --- backbone ----------------------------------------------------------------------------------------------------


def _write_backbone(path: Path, seed: int) -> None:
    from .backbone import BackboneConfig, NavaBackbone

    config = BackboneConfig(
        dim=64, ffn_dim=128, freq_dim=32, text_dim=TEXT_DIM, num_heads=2, num_double_layers=2, num_single_layers=2
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in NavaBackbone(config).state_dict().items()}
    weights = _draw(shapes, seed)
    for name, weight in weights.items():
        if "modulation" in name:
            weight.mul_(4)
        elif "norm_q" in name or "norm_k" in name:
            weight.mul_(0.2 / 0.05).add_(3 if "cross_attn" in name else 1)  # selective: one token can matter
        elif name.endswith(("norm3.weight", "net.0.weight")):
            weight.add_(1)
    prefixed = {f"backbone.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(prefixed, str(path), metadata={"config": json.dumps(config.to_dict())})


# --- Wan2.2 video VAE --------------------------------------------------------------------------------------------

VIDEO_WIDTH = 8
VIDEO_MULTIPLIERS = (1, 2, 4, 4)
VIDEO_TIME_SCALING = (False, True, True)


def _write_video_vae(path: Path, seed: int) -> None:
    shapes = {
        **_video_encoder(),
        **_conv("conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1),
        **_conv("conv2", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1),
        **_video_decoder(),
    }
    save_file({name: weight.half() for name, weight in _draw(shapes, seed + 1, _video_gain).items()}, str(path))


def _video_gain(name: str) -> float:
    return {"decoder.head.2.weight": 0.8, "encoder.head.2.weight": 1.4}.get(name, 1.0)


def _video_encoder() -> Shapes:
    widths = [VIDEO_WIDTH * m for m in (1, *VIDEO_MULTIPLIERS)]
    shapes = _conv("encoder.conv1", 12, widths[0], 3, 3, 3)
    last = len(VIDEO_MULTIPLIERS) - 1
    for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        stage = f"encoder.downsamples.{level}.downsamples"
        for block in range(2):
            shapes |= _video_residual(f"{stage}.{block}", inputs if block == 0 else outputs, outputs)
        if level < last:
            shapes |= _conv(f"{stage}.2.resample.1", outputs, outputs, 3, 3)
            if VIDEO_TIME_SCALING[level]:
                shapes |= _conv(f"{stage}.2.time_conv", outputs, outputs, 3, 1, 1)
    return shapes | _video_middle("encoder", widths[-1]) | _video_head("encoder", widths[-1], 2 * LATENT_CHANNELS)


def _video_decoder() -> Shapes:
    widths = [VIDEO_WIDTH * m for m in (VIDEO_MULTIPLIERS[-1], *reversed(VIDEO_MULTIPLIERS))]
    shapes = _conv("decoder.conv1", LATENT_CHANNELS, widths[0], 3, 3, 3) | _video_middle("decoder", widths[0])
    last = len(VIDEO_MULTIPLIERS) - 1
    for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        stage = f"decoder.upsamples.{level}.upsamples"
        for block in range(3):
            shapes |= _video_residual(f"{stage}.{block}", inputs if block == 0 else outputs, outputs)
        if level < last:
            shapes |= _conv(f"{stage}.3.resample.1", outputs, outputs, 3, 3)
            if VIDEO_TIME_SCALING[-1 - level]:
                shapes |= _conv(f"{stage}.3.time_conv", outputs, 2 * outputs, 3, 1, 1)
    return shapes | _video_head("decoder", widths[-1], 12)


def _video_residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = {
        f"{name}.residual.0.gamma": (inputs, 1, 1, 1),
        **_conv(f"{name}.residual.2", inputs, outputs, 3, 3, 3),
        f"{name}.residual.3.gamma": (outputs, 1, 1, 1),
        **_conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3),
    }
    return shapes | (_conv(f"{name}.shortcut", inputs, outputs, 1, 1, 1) if inputs != outputs else {})


def _video_middle(side: str, width: int) -> Shapes:
    return {
        **_video_residual(f"{side}.middle.0", width, width),
        f"{side}.middle.1.norm.gamma": (width, 1, 1),
        **_conv(f"{side}.middle.1.to_qkv", width, 3 * width, 1, 1),
        **_conv(f"{side}.middle.1.proj", width, width, 1, 1),
        **_video_residual(f"{side}.middle.2", width, width),
    }


def _video_head(side: str, width: int, outputs: int) -> Shapes:
    return {f"{side}.head.0.gamma": (width, 1, 1, 1), **_conv(f"{side}.head.2", width, outputs, 3, 3, 3)}


# --- preview decoder (its width is fixed in every reader) --------------------------------------------------------


def _write_preview_decoder(path: Path, seed: int) -> None:
    shapes = _conv("encoder.0", 12, 64, 3, 3)
    for index, frames in ((2, 2), (7, 2), (12, 1)):
        shapes |= _conv(f"encoder.{index}.conv", 64 * frames, 64, 1, 1, bias=False)
        shapes |= _conv(f"encoder.{index + 1}", 64, 64, 3, 3, bias=False)
        for block in range(3):
            shapes |= _memory_block(f"encoder.{index + 2 + block}", 64)
    shapes |= _conv("encoder.17", 64, LATENT_CHANNELS, 3, 3) | _conv("decoder.1", LATENT_CHANNELS, 256, 3, 3)
    widths = (256, 128, 64, 64)
    for stage, frames in enumerate((1, 2, 2)):
        index, width = 3 + 6 * stage, widths[stage]
        for block in range(3):
            shapes |= _memory_block(f"decoder.{index + block}", width)
        shapes |= _conv(f"decoder.{index + 4}.conv", width, width * frames, 1, 1, bias=False)
        shapes |= _conv(f"decoder.{index + 5}", width, widths[stage + 1], 3, 3, bias=False)
    shapes |= _conv("decoder.22", 64, 12, 3, 3)
    weights = _draw(shapes, seed + 5, lambda name: 0.5 if name.endswith("conv.4.weight") else 1.4)
    weights["decoder.22.bias"] += 0.5  # mid grey
    save_file({name: weight.half() for name, weight in weights.items()}, str(path))


def _memory_block(name: str, width: int) -> Shapes:
    return {
        **_conv(f"{name}.conv.0", 2 * width, width, 3, 3),
        **_conv(f"{name}.conv.2", width, width, 3, 3),
        **_conv(f"{name}.conv.4", width, width, 3, 3),
    }


# --- LTX-2.3 audio VAE and vocoder -------------------------------------------------------------------------------

AUDIO_WIDTH = 16
AUDIO_MULTIPLIERS = (1, 2, 4)
AUDIO_BLOCKS = 2
_AMP = {
    "resblock": "AMP1",
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "stereo": True,
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
AUDIO_CONFIG = {
    "audio_vae": {
        "model": {
            "params": {
                "sampling_rate": 16000,
                "ddconfig": {
                    "double_z": True,
                    "mel_bins": MEL_BINS,
                    "z_channels": 8,
                    "resolution": 256,
                    "downsample_time": False,
                    "in_channels": 2,
                    "out_ch": 2,
                    "ch": AUDIO_WIDTH,
                    "ch_mult": list(AUDIO_MULTIPLIERS),
                    "num_res_blocks": AUDIO_BLOCKS,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                    "mid_block_add_attention": False,
                    "norm_type": "pixel",
                    "causality_axis": "height",
                },
            }
        },
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": MEL_BINS, "mel_fmin": 0, "mel_fmax": 8000},
        },
    },
    "vocoder": {
        "vocoder": {
            **_AMP,
            "upsample_initial_channel": 128,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        },
        "bwe": {
            **_AMP,
            "upsample_initial_channel": 64,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "apply_final_activation": False,
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "hop_length": 80,
            "n_fft": 512,
            "win_size": 512,
            "num_mels": MEL_BINS,
        },
    },
}


def _write_audio_vae(path: Path, seed: int) -> None:
    autoencoder = _draw(_audio_autoencoder(), seed + 2)
    generator = torch.Generator().manual_seed(seed + 2)
    autoencoder["per_channel_statistics.mean-of-means"] = 0.3 * torch.randn(128, generator=generator)
    autoencoder["per_channel_statistics.std-of-means"] = 1 + 0.2 * torch.rand(128, generator=generator)
    vocoder = {
        **_generator("vocoder", AUDIO_CONFIG["vocoder"]["vocoder"], seed + 3, loudness=0.25),
        **_generator("bwe_generator", AUDIO_CONFIG["vocoder"]["bwe"], seed + 4, loudness=0.02),
        **_mel_stft(AUDIO_CONFIG["vocoder"]["bwe"]),
    }
    tensors = {f"audio_vae.{name}": t for name, t in autoencoder.items()}
    tensors |= {f"vocoder.{name}": t for name, t in vocoder.items()}
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halved, str(path), metadata={"config": json.dumps(AUDIO_CONFIG)})


def _audio_autoencoder() -> Shapes:
    widths = [AUDIO_WIDTH * m for m in AUDIO_MULTIPLIERS]
    top = len(widths) - 1
    shapes = _conv("encoder.conv_in.conv", 2, widths[0], 3, 3)
    for level, width in enumerate(widths):
        for block in range(AUDIO_BLOCKS):
            inputs = widths[max(level - 1, 0)] if block == 0 else width
            shapes |= _audio_residual(f"encoder.down.{level}.block.{block}", inputs, width)
        if level < top:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    shapes |= _audio_middle("encoder", widths[-1]) | _conv("encoder.conv_out.conv", widths[-1], 16, 3, 3)

    shapes |= _conv("decoder.conv_in.conv", 8, widths[-1], 3, 3) | _audio_middle("decoder", widths[-1])
    for level, width in enumerate(widths):
        for block in range(AUDIO_BLOCKS + 1):
            inputs = widths[min(level + 1, top)] if block == 0 else width
            shapes |= _audio_residual(f"decoder.up.{level}.block.{block}", inputs, width)
        if level > 0:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv.conv", width, width, 3, 3)
    return shapes | _conv("decoder.conv_out.conv", widths[0], 2, 3, 3)


def _audio_residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _conv(f"{name}.conv1.conv", inputs, outputs, 3, 3) | _conv(f"{name}.conv2.conv", outputs, outputs, 3, 3)
    return shapes | (_conv(f"{name}.nin_shortcut.conv", inputs, outputs, 1, 1) if inputs != outputs else {})


def _audio_middle(side: str, width: int) -> Shapes:
    return _audio_residual(f"{side}.mid.block_1", width, width) | _audio_residual(f"{side}.mid.block_2", width, width)


def _generator(name: str, config: dict, seed: int, loudness: float) -> dict[str, Tensor]:
    """One BigVGAN generator (128 mel bands in, stereo out) whose output has an amplitude near ``loudness``."""
    width = config["upsample_initial_channel"]
    shapes = _conv(f"{name}.conv_pre", 2 * MEL_BINS, width, 7)
    activations = []
    for stage, kernel in enumerate(config["upsample_kernel_sizes"]):
        shapes |= {f"{name}.ups.{stage}.weight": (width, width // 2, kernel), f"{name}.ups.{stage}.bias": (width // 2,)}
        width //= 2
        for block, block_kernel in enumerate(config["resblock_kernel_sizes"]):
            prefix = f"{name}.resblocks.{len(config['resblock_kernel_sizes']) * stage + block}"
            for i in range(3):
                for half in (1, 2):
                    shapes |= _conv(f"{prefix}.convs{half}.{i}", width, width, block_kernel)
                    activations.append((f"{prefix}.acts{half}.{i}", width))
    activations.append((f"{name}.act_post", width))
    shapes |= _conv(f"{name}.conv_post", width, 2, 7, bias=False)
    for activation, channels in activations:
        shapes |= {f"{activation}.act.alpha": (channels,), f"{activation}.act.beta": (channels,)}

    weights = _draw(shapes, seed, lambda key: 0.3 if ".convs" in key else 1.0)
    for stage, (kernel, rate) in enumerate(zip(config["upsample_kernel_sizes"], config["upsample_rates"], strict=True)):
        ups = weights[f"{name}.ups.{stage}.weight"]  # (in, out, kernel): kernel / rate taps reach each output
        ups.mul_(math.sqrt(ups[0].numel() * rate / (ups.shape[0] * kernel)))
    post = weights[f"{name}.conv_post.weight"]
    post.sub_(post.mean(dim=-1, keepdim=True))  # no constant offset in the sound
    post.mul_(loudness / post.square().sum(dim=(1, 2), keepdim=True).sqrt())
    for activation, _ in activations:
        weights[f"{activation}.upsample.filter"] = _half_band_filter()
        weights[f"{activation}.downsample.lowpass.filter"] = _half_band_filter()
    return weights


def _half_band_filter(taps: int = 12) -> Tensor:
    """Kaiser-windowed sinc of cutoff 1/4, (1, 1, taps), as the generators' anti-aliased activations store it."""
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 1.2 + 7.95
    window = torch.kaiser_window(taps, beta=0.1102 * (attenuation - 8.7), periodic=False)
    sinc = torch.sinc((torch.arange(taps) - taps / 2 + 0.5) / 2) * window
    return (sinc / sinc.sum()).view(1, 1, taps)


def _mel_stft(config: dict) -> dict[str, Tensor]:
    """The log-mel front end of the bandwidth extension: Fourier rows times a Hann window, and a mel filter bank."""
    n_fft, bins = config["n_fft"], config["n_fft"] // 2 + 1
    angles = 2 * math.pi * torch.outer(torch.arange(bins), torch.arange(n_fft)).double() / n_fft
    window = torch.hann_window(n_fft, dtype=torch.float64)
    rows = torch.cat([torch.cos(angles), -torch.sin(angles)]) * window
    basis = rows.float().unsqueeze(1).contiguous()
    return {
        "mel_stft.stft_fn.forward_basis": basis,
        "mel_stft.stft_fn.inverse_basis": basis / n_fft,
        "mel_stft.mel_basis": _mel_filters(config["num_mels"], bins, config["input_sampling_rate"] / 2),
    }


def _mel_filters(mels: int, bins: int, top: float) -> Tensor:
    """Triangular filters, equally spaced in mels from 0 to ``top`` Hz: (mels, bins)."""
    edges = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + top / 700), mels + 2) / 2595) - 1)
    frequencies = torch.linspace(0, top, bins)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0).contiguous()


# --- umt5 and its tokenizer --------------------------------------------------------------------------------------

FP8_MAX = 448.0


def _write_text_encoders(paths: Mapping[str, Path], seed: int) -> None:
    model, pieces = _train_sentencepiece()
    rows = -(-(pieces + SENTINELS) // 128) * 128
    config = UMT5Config(d_model=TEXT_DIM, d_kv=16, d_ff=2 * TEXT_DIM, num_layers=2, num_heads=4, vocab_size=rows)
    weights = _draw(config.tensor_shapes(), seed + 6)
    weights["shared.weight"] *= math.sqrt(TEXT_DIM)
    for name, weight in weights.items():
        if name.endswith("SelfAttention.q.weight"):
            weight /= math.sqrt(config.d_kv)  # umt5 does not scale its attention
    weights = {name: weight.half() for name, weight in weights.items()}

    spiece = {"spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}
    save_file({**weights, **spiece}, str(paths["text_encoder"]))
    save_file({**_fp8_scaled(weights), **spiece}, str(paths["text_encoder_fp8"]))
    torch.save({k: w.bfloat16() for k, w in to_makers_names(weights).items()}, paths["text_encoder_pth"])
    _write_tokenizer(paths["tokenizer"], model, pieces)


def _fp8_scaled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's scaled fp8 form: one fp32 scale a matrix, and an empty ``scaled_fp8`` as the mark."""
    scaled = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if weight.ndim == 2 and layer != "shared" and not layer.endswith("relative_attention_bias"):
            scale = weight.float().abs().max() / FP8_MAX
            scaled[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            scaled[f"{layer}.scale_weight"] = scale
        else:
            scaled[name] = weight
    return scaled


def _write_tokenizer(folder: Path, model: bytes, pieces: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model)
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": sentinels}
    texts = dict(enumerate(("<pad>", "</s>", "<unk>")))
    texts |= {pieces + SENTINELS - 1 - i: text for i, text in enumerate(sentinels)}
    added = {str(i): {"content": text, "special": True} for i, text in sorted(texts.items())}
    config = {**named, "added_tokens_decoder": added, "extra_ids": SENTINELS, "tokenizer_class": "T5Tokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _train_sentencepiece() -> tuple[bytes, int]:
    """A unigram model with byte fallback over :data:`CORPUS` in umt5's layout: (model bytes, number of pieces)."""
    try:
        import sentencepiece
    except ImportError:
        raise RuntimeError(
            "Making small models needs the package sentencepiece: run `pip install sentencepiece`."
        ) from None
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="unigram",
        vocab_size=800,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return model.getvalue(), pieces


CORPUS = (
    "A woman in a red coat walks slowly along the harbour while gulls cry overhead.",
    "The camera moves closer, then stops; behind her, a fishing boat rocks on grey water.",
    "She turns to the lens and says: <S>The storm has passed, we can go home now.<E>",
    "A man in his fifties with a deep, calm voice answers: <S>Not before I have seen the light.<E>",
    "Waves break on stone, a rope creaks, and distant thunder rolls under a soft piano.",
    "Two friends sit in a kitchen; steam rises from a cup, and a spoon rings against the glass.",
    "Wide shot of a market in the early morning, voices murmur, wheels rattle over cobbles.",
    "The speaker is close to the microphone, the room is small, and the words are quick and bright.",
    "A dog barks twice, a door opens, footsteps come nearer on a wooden floor.",
    "Close-up of hands tuning a guitar, each string plucked once, then a slow chord.",
    "The sun sets behind the hills; the light is warm and the shadows are long.",
    "A child laughs and shouts, running through shallow water with her arms held out.",
    "Static camera, medium shot, shallow depth of field, natural light from a window on the left.",
    "Rain falls on a tin roof, the sound is dense and even, with a drip near the listener.",
    "An old clock ticks in a quiet hall while a whisper comes from the right.",
    "A train passes at speed, its horn falling in pitch, and leaves of paper fly up.",
    "这段视频呈现了一位年轻女子在清晨的海边慢慢行走的画面，海风吹动她的长发。",
    "镜头从远处缓缓推近，最后停在她的脸上，背景是灰蓝色的大海和一艘渔船。",
    "她面对镜头，用清晰温柔的声音说：<S>暴风雨已经过去了，我们可以回家了。<E>",
    "一位中年男子用低沉平稳的语气回答：<S>再等一等，我想看看灯塔的光。<E>",
    "音频中可以听到海浪拍打岩石的声音，远处有雷声，还有轻柔的钢琴曲。",
    "两位朋友坐在厨房里聊天，杯子里冒出热气，勺子轻轻敲打玻璃杯。",
    "清晨的市场里人来人往，叫卖声、脚步声和车轮声混在一起。",
    "说话的人离麦克风很近，房间很小，语速较快，情绪开心而明亮。",
    "一只狗叫了两声，门被推开，木地板上传来越来越近的脚步声。",
    "特写镜头拍摄一双手正在调吉他，每根弦拨动一次，然后是一个缓慢的和弦。",
    "太阳落到山后，光线温暖，影子很长，画面安静而美丽。",
    "孩子张开双臂在浅水里奔跑，一边大笑一边喊叫。",
    "固定镜头，中景，浅景深，自然光从左边的窗户照进来。",
    "雨落在铁皮屋顶上，声音密集而均匀，近处有水滴声。",
    "空荡的大厅里，老式时钟滴答作响，右边传来低声细语。",
    "一列火车高速驶过，汽笛声由高变低，纸张随风飞起。",
)


# --- ReDimNet ----------------------------------------------------------------------------------------------------

SPEAKER_CONFIG = {
    "F": 24,
    "C": 4,
    "stages_setup": [[1, 1, 1, [[3, 3]], 4], [2, 1, 1, [[3, 3]], 4], [1, 1, 1, [[3, 3]], None], [2, 1, 1, [[3, 3]], 2]],
    "group_divisor": 2,
    "out_channels": None,
    "embed_dim": 192,
    "hop_length": 160,
    "pooling_func": "ASTP",
    "feat_type": "pt",
    "global_context_att": False,
    "emb_bn": False,
}


def _write_speaker_encoder(path: Path, seed: int) -> None:
    from .timbre.config import ReDimNetConfig
    from .timbre.redimnet import ReDimNet

    initial = ReDimNet(ReDimNetConfig.from_published(SPEAKER_CONFIG)).state_dict()
    learned = {n: tuple(t.shape) for n, t in initial.items() if t.is_floating_point() and not n.startswith("spec.")}
    weights = _draw(learned, seed + 7)
    for name, weight in weights.items():
        if name.endswith("running_var"):
            weights[name] = 1 + weight.abs()
        elif weight.ndim == 1 and name.endswith(".weight") and not name.endswith("norm.weight"):
            weights[name] = 1 + weight
    torch.save({"model_config": SPEAKER_CONFIG, "state_dict": {**initial, **weights}}, path)
