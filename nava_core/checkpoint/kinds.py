"""What a model file is, told from its tensors' names and shapes, and the sentence for a file in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class FileKind(str, Enum):
    """What a file holds, or why it holds no model."""

    NAVA_BACKBONE = "nava_backbone"
    NAVA_BACKBONE_FP8 = "nava_backbone_fp8"
    NAVA_BACKBONE_QUANTISED = "nava_backbone_quantised"
    LORA = "lora"
    WAN = "wan"
    LTX_AV = "ltx_av"
    LTX = "ltx"
    FLUX_FAMILY = "flux_family"
    WAN22_VAE = "wan22_vae"
    WAN21_VAE = "wan21_vae"
    WAN_VAE_DIFFUSERS = "wan_vae_diffusers"
    LTX_AUDIO_VAE = "ltx_audio_vae"
    LTX_VIDEO_VAE = "ltx_video_vae"
    UMT5 = "umt5"
    UMT5_ORIGINAL = "umt5_original"
    T5 = "t5"
    REDIMNET = "redimnet"
    TAE = "tae"
    NAVA_LATENTS = "nava_latents"
    NAVA_VOICE = "nava_voice"
    COMFYUI_LATENT = "comfyui_latent"
    EMPTY = "empty"
    HTML = "html"
    TEXT = "text"
    LFS_POINTER = "lfs_pointer"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSAFE = "unsafe"
    GGUF = "gguf"
    UNKNOWN = "unknown"


SHOWN_NAMES, SHOWN_LENGTH = 3, 80  # of tensors in a sentence
CLIP_LATENTS = ("nava_latents.video", "nava_latents.audio")  # the tensors of a clip's latents in a file
VOICE_TENSOR = "nava_voice.timbre"  # the tensor of a saved voice
BACKBONES = frozenset({FileKind.NAVA_BACKBONE, FileKind.NAVA_BACKBONE_FP8, FileKind.NAVA_BACKBONE_QUANTISED})

NOUNS = {
    FileKind.NAVA_BACKBONE: "a NAVA backbone",
    FileKind.NAVA_BACKBONE_FP8: "a NAVA backbone in fp8",
    FileKind.NAVA_BACKBONE_QUANTISED: "a quantised NAVA backbone",
    FileKind.LORA: "a LoRA",
    FileKind.WAN: "a Wan video model",
    FileKind.LTX_AV: "an LTX video-and-audio model",
    FileKind.LTX: "an LTX video model",
    FileKind.FLUX_FAMILY: "an image or video model of the FLUX or Hunyuan family",
    FileKind.WAN22_VAE: "the Wan2.2 video VAE",
    FileKind.WAN21_VAE: "the Wan2.1 video VAE",
    FileKind.WAN_VAE_DIFFUSERS: "a Wan video VAE in diffusers' layout",
    FileKind.LTX_AUDIO_VAE: "the LTX audio VAE with its vocoder",
    FileKind.LTX_VIDEO_VAE: "an LTX video VAE",
    FileKind.UMT5: "a umt5 text encoder",
    FileKind.UMT5_ORIGINAL: "a umt5 text encoder in its makers' layout",
    FileKind.T5: "a T5 text encoder that is not umt5",
    FileKind.REDIMNET: "a ReDimNet speaker encoder",
    FileKind.TAE: "a small preview decoder (TAE)",
    FileKind.NAVA_LATENTS: "the latents of a clip",
    FileKind.NAVA_VOICE: "a saved voice",
    FileKind.COMFYUI_LATENT: "a latent that ComfyUI saved",
    FileKind.EMPTY: "an empty file",
    FileKind.HTML: "a web page, not a model",
    FileKind.TEXT: "a short text, not a model",
    FileKind.LFS_POINTER: "a git-lfs pointer, not the model it stands for",
    FileKind.TRUNCATED: "an incomplete download",
    FileKind.CORRUPT: "a damaged model file",
    FileKind.UNSAFE: "a pickle that holds more than tensors and was not opened, because it could run code",
    FileKind.GGUF: "a GGUF file of a model that is not read here",
    FileKind.UNKNOWN: "a file of an unknown kind",
}

CHOICES = {
    FileKind.NAVA_BACKBONE: "NAVA.safetensors or NAVA_fp8.safetensors",
    FileKind.NAVA_BACKBONE_FP8: "NAVA_fp8.safetensors",
    FileKind.WAN22_VAE: "wan2.2_vae.safetensors or Wan2.2_VAE.pth",
    FileKind.LTX_AUDIO_VAE: "ltx-2.3-22b-dev_audio_vae.safetensors",
    FileKind.UMT5: "umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    FileKind.UMT5_ORIGINAL: "models_t5_umt5-xxl-enc-bf16.pth",
    FileKind.REDIMNET: "M-vb2+vox2+cnc-ft_mix.pt",
    FileKind.TAE: "lighttaew2_2 or taew2_2",
    FileKind.NAVA_VOICE: "a file that NAVA Save Timbre or `nava voice` wrote",
}

REMEDIES = {
    FileKind.LORA: "apply it to a loaded model with a LoRA loader",
    FileKind.NAVA_LATENTS: "`nava decode` makes a clip of it",
    FileKind.NAVA_VOICE: "it is used by NAVA Load Timbre and `nava generate --voice`",
    FileKind.COMFYUI_LATENT: "`nava decode` makes a clip of it",
    FileKind.HTML: "the address it came from answered with a page, perhaps for a login or a licence; download it again",
    FileKind.TEXT: "the address it came from answered with a message; download it again",
    FileKind.LFS_POINTER: "run `git lfs pull` where it came from, or download the file itself",
    FileKind.EMPTY: "download it again",
    FileKind.TRUNCATED: "download it again",
    FileKind.CORRUPT: "download it again",
    FileKind.UNSAFE: "get the same model as .safetensors",
    FileKind.GGUF: "get the same model as .safetensors",
}


class WrongFileError(ValueError):
    """A file is not what is needed where it was given; the message is the sentence to show."""


def explain_wrong_file(info, expected: FileKind | str) -> str:
    """One sentence: what the file is, what is needed instead, and what to do.

    ``info`` is what ``describe_file`` returned; ``expected`` a ``FileKind`` (or its value), or a phrase
    of one's own such as "a VAE".
    """
    kind = FileKind(expected) if expected in set(FileKind) else None
    wanted = NOUNS[kind] if kind else str(expected)
    advice = REMEDIES.get(info.kind, "")
    if kind in CHOICES and (not advice or info.kind is FileKind.LORA):
        advice = f"{advice}, and choose {CHOICES[kind]} here" if advice else f"choose {CHOICES[kind]}"
    advice = advice or "choose another file"
    return f"{info.path.name} is {info.what}, but {wanted} is needed here: {advice}."


@dataclass(frozen=True)
class Recognised:
    """What the names and shapes of a file's tensors say: its kind, the prefix of its names, and details."""

    kind: FileKind
    prefix: str = ""
    detail: str = ""
    parts: frozenset[FileKind] = frozenset()


def recognise(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> Recognised:
    """Kind of model that tensors belong to. ``shapes`` and ``dtypes`` are by the names in the file."""
    found: dict[str, FileKind] = {}  # by prefix; of two rules that fit one model, the first is the closer
    for rule in _RULES:
        prefix = _prefix_of(shapes, rule.anchors)
        if prefix is not None and (rule.check is None or rule.check(shapes, prefix)):
            found.setdefault(prefix, rule.kind)
    parts = frozenset(found.values())
    if not found:
        return _recognise_by_markers(shapes)
    prefix, kind = next(iter(found.items()))
    if kind is FileKind.NAVA_BACKBONE and _has_scaled_weights(dtypes, prefix):
        kind = FileKind.NAVA_BACKBONE_FP8
    return Recognised(kind, prefix, _detail(kind, shapes, prefix), parts | {kind})


@dataclass(frozen=True)
class _Rule:
    """A kind, the tensors that every file of it has (below one common prefix), and a closer look at them."""

    kind: FileKind
    anchors: tuple[str, ...]
    check: Callable[[Mapping[str, tuple[int, ...]], str], bool] | None = None


def _is_umt5(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    # umt5 has a relative position bias in every layer, T5 in the first alone; one layer by itself does not tell.
    second = f"{prefix}encoder.block.1.layer.0.SelfAttention"
    return f"{second}.relative_attention_bias.weight" in shapes or f"{second}.q.weight" not in shapes


def _has_audio_vae_and_vocoder(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    return all(any(name.startswith(part) for name in shapes) for part in ("audio_vae.", "vocoder."))


def _has_clip_latents(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> bool:
    return any(name in shapes for name in CLIP_LATENTS)


_BLOCK = "encoder.block.0.layer.0.SelfAttention"
_RULES = (
    _Rule(
        FileKind.NAVA_BACKBONE,
        (
            "double_blocks.0.self_attn.q_audio.weight",
            "single_blocks.0.self_attn.q.weight",
            "patch_embedding_audio.0.weight",
        ),
    ),
    _Rule(FileKind.WAN, ("blocks.0.self_attn.q.weight", "patch_embedding.weight", "head.modulation")),
    _Rule(FileKind.WAN, ("blocks.0.attn1.to_q.weight", "condition_embedder.time_embedder.linear_1.weight")),
    _Rule(FileKind.LTX_AV, ("adaln_single.emb.timestep_embedder.linear_1.bias", "audio_adaln_single.linear.weight")),
    _Rule(FileKind.LTX, ("adaln_single.emb.timestep_embedder.linear_1.bias", "scale_shift_table")),
    _Rule(FileKind.LTX, ("time_embed.emb.timestep_embedder.linear_1.bias", "scale_shift_table")),
    _Rule(FileKind.FLUX_FAMILY, ("double_blocks.0.img_attn.qkv.weight",)),
    _Rule(FileKind.FLUX_FAMILY, ("double_blocks.0.img_attn_qkv.weight",)),
    _Rule(
        FileKind.WAN22_VAE, ("decoder.middle.0.residual.0.gamma", "decoder.upsamples.0.upsamples.0.residual.2.weight")
    ),
    _Rule(FileKind.WAN21_VAE, ("decoder.middle.0.residual.0.gamma",)),
    _Rule(FileKind.WAN_VAE_DIFFUSERS, ("decoder.mid_block.resnets.0.norm1.gamma", "post_quant_conv.weight")),
    _Rule(FileKind.LTX_AUDIO_VAE, (), _has_audio_vae_and_vocoder),
    _Rule(FileKind.LTX_VIDEO_VAE, ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",)),
    _Rule(FileKind.UMT5, (f"{_BLOCK}.q.weight",), _is_umt5),
    _Rule(FileKind.UMT5_ORIGINAL, ("blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.gate.0.weight")),
    _Rule(FileKind.T5, (f"{_BLOCK}.q.weight",)),
    _Rule(FileKind.REDIMNET, ("backbone.stage0.0.w", "backbone.stage0.2.weight", "linear.weight")),
    _Rule(FileKind.TAE, ("decoder.1.weight", "decoder.22.bias")),
    _Rule(FileKind.NAVA_LATENTS, (), _has_clip_latents),
    _Rule(FileKind.NAVA_VOICE, (VOICE_TENSOR,)),
    _Rule(FileKind.COMFYUI_LATENT, ("latent_tensor",)),
)

_LORA_MARKS = (
    ".lora_A.",
    ".lora_B.",
    ".lora_up.",
    ".lora_down.",
    ".lora.up.",
    ".lora.down.",
    ".hada_w1_a",
    ".lokr_w1",
    ".diff_b",
)


def _prefix_of(names: Iterable[str], anchors: tuple[str, ...]) -> str | None:
    """The shortest prefix (empty, or ending in a dot) under which all the anchors are found."""
    if not anchors:
        return ""
    first = anchors[0]
    prefixes = {name[: -len(first)] for name in names if name.endswith(first)}
    for prefix in sorted(prefixes, key=len):
        whole = not prefix or prefix.endswith(".")
        if whole and all(f"{prefix}{anchor}" in names for anchor in anchors):
            return prefix
    return None


def _recognise_by_markers(shapes: Mapping[str, tuple[int, ...]]) -> Recognised:
    marked = [name for name in shapes if any(mark in f"{name}." for mark in _LORA_MARKS)]
    if marked:
        for_nava = any("double_blocks" in name and "_audio" in name for name in marked)
        return Recognised(FileKind.LORA, detail="for NAVA" if for_nava else "", parts=frozenset({FileKind.LORA}))
    first = ", ".join(_shown(name) for name in list(shapes)[:SHOWN_NAMES])
    detail = f"{len(shapes)} tensors, the first named {first}" if shapes else "no tensors in it"
    return Recognised(FileKind.UNKNOWN, detail=f"({detail})")


def _shown(name: str) -> str:
    """A name that nobody vouches for, as it can stand in a sentence."""
    clean = "".join(c if c.isprintable() else "?" for c in name)
    return clean if len(clean) <= SHOWN_LENGTH else f"{clean[: SHOWN_LENGTH - 3]}..."


def _has_scaled_weights(dtypes: Mapping[str, str], prefix: str) -> bool:
    return any(
        dtype == "float8_e4m3fn" and f"{name}_scale" in dtypes
        for name, dtype in dtypes.items()
        if name.startswith(prefix)
    )


def _detail(kind: FileKind, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> str:
    """Channels, where they are what tells two files of a kind apart."""
    if kind is FileKind.TAE:
        shape = shapes[f"{prefix}decoder.1.weight"]
        return f"for {shape[1]} latent channels" if len(shape) > 1 else ""
    if kind in (FileKind.WAN22_VAE, FileKind.WAN21_VAE):
        shape = shapes.get(f"{prefix}decoder.conv1.weight", ())
        return f"({shape[1]} latent channels)" if len(shape) > 1 else ""
    return ""
