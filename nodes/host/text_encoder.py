"""The text encoder in ComfyUI: umt5 of any size as a real CLIP, tokenised by the core, run on token ids."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.utils
import torch
from safetensors import safe_open

from ...nava_core.checkpoint import FileKind, WrongFileError, describe_file, explain_wrong_file
from ...nava_core.prompt import PromptTokenizer
from ...nava_core.prompt.umt5 import UMT5Config, from_makers_names, has_makers_names
from . import out_of_memory
from .component_memory import text_encode_bytes
from .devices import CPU, moved_clip

NAME = "umt5xxl"  # ComfyUI's name of the only model in this CLIP
SPIECE = "spiece_model"  # the tensor that holds the tokenizer in ComfyUI's files
_in_use: weakref.WeakSet[PromptTokenizer] = weakref.WeakSet()  # of text encoders that are loaded


def load_text_encoder(
    path: str | Path, device: str = "default", tokenizer_folder: str | Path | None = None
) -> comfy.sd.CLIP:
    """Load a umt5 encoder: ComfyUI's files (fp16, scaled fp8; tokenizer inside) or the makers' ``.pth``.

    ``device``: "default" (the host's choice) or "cpu". ``tokenizer_folder`` is needed where the file has no
    tokenizer inside and none lies beside it: ``spiece.model`` or ``tokenizer.json`` in the file's folder, in
    ``google/umt5-xxl`` there (the makers' download), or in a folder there with umt5 in its name. The dimensions
    are the tensors', so a small umt5 loads too.

    Raises ValueError with one sentence for a file that is something else or incomplete, FileNotFoundError
    where the tokenizer is nowhere. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    clip = _load(str(path), device, None if tokenizer_folder is None else str(tokenizer_folder))
    clip.patcher.cached_patcher_init = (_load_patcher, (str(path), device, tokenizer_folder))
    return clip


def prompt_tokenizer(clip) -> PromptTokenizer:
    """The core's tokenizer for a CLIP of :func:`load_text_encoder` or of the stock loader (type "wan").

    Raises ValueError for a CLIP that is not umt5. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    inner = getattr(clip.tokenizer, f"clip_{NAME}", None)
    if isinstance(inner, NavaTokenizer):
        return inner.prompt_tokenizer
    if inner is None or not hasattr(clip.cond_stage_model, NAME):
        raise ValueError(
            "This CLIP is not a umt5 text encoder, which NAVA needs: load umt5_xxl with NavaLoadTextEncoder."
        )
    return PromptTokenizer(clip.tokenizer.state_dict()[SPIECE])


def any_tokenizer(paths: Iterable[str]) -> PromptTokenizer | None:
    """A umt5 tokenizer without loading a text encoder: one in use, else that of the first file in ``paths`` that has
    one inside or beside it; None where there is none. Run on ComfyUI 0.18.1 and 0.33.0."""
    for tokenizer in _in_use:
        return tokenizer
    found = (_tokenizer_of(path, Path(path).stat().st_mtime_ns) for path in paths if Path(path).is_file())
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


@lru_cache(maxsize=32)
def _tokenizer_of(path: str, changed: int) -> PromptTokenizer | None:
    """The tokenizer of one file as it was when it was last changed; None for a file that is no umt5 encoder."""
    try:
        if describe_file(path).kind not in (FileKind.UMT5, FileKind.UMT5_ORIGINAL):
            return None
        return _find_tokenizer(Path(path), _spiece_inside(path), None)[0]
    except (OSError, ValueError, RuntimeError):  # broken, or a package is missing: its loader node says so
        return None


def _spiece_inside(path: str) -> torch.Tensor | None:
    """The tokenizer in a safetensors file, read without its weights."""
    if not path.endswith(".safetensors"):
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor(SPIECE) if SPIECE in file.keys() else None  # noqa: SIM118 - it is no mapping


def encode_ids(clip, ids: Sequence[int]) -> torch.Tensor:
    """Token ids (end token included) -> their context (1, n, d_model) fp32 on the host's intermediate device.

    No padding: the backbone pads the raw context with zeros to its text length. That is what the reference
    does too, which runs the encoder on padded ids under a mask and keeps the first n states. Run on 0.18.1 and 0.33.0.
    """
    return _on_cpu_at_need(with_its_network(clip), lambda each: each.encode_from_tokens(host_tokens(ids)))


def encode_conditioning(clip, ids: Sequence[int], extras: dict | None = None) -> list:
    """Token ids -> CONDITIONING ``[[context, {**extras}]]`` as stock nodes make it: hooks and their schedules on the
    CLIP (a LoRA that changes over the steps) are respected. Run on ComfyUI 0.18.1 and 0.33.0."""
    return _on_cpu_at_need(
        with_its_network(clip),
        lambda each: each.encode_from_tokens_scheduled(host_tokens(ids), add_dict=dict(extras or {})),
    )


def with_its_network(clip):
    """The CLIP, encoding with the network that its patcher loads: newer hosts' Select CLIP Device exchanges the patcher
    alone, and the network it had would go on encoding from RAM, without the patcher's LoRAs. Run on 0.33.0."""
    if clip.cond_stage_model is not clip.patcher.model:
        clip = clip.clone()
        clip.cond_stage_model = clip.patcher.model
    return clip


def _on_cpu_at_need(clip, encode: Callable):
    """``encode(clip)``; on the CPU where the text encoder's device runs out of memory. Raises TooLittleMemoryError."""
    device = clip.patcher.load_device

    def on_cpu():
        out_of_memory.warn(f"on {device} for the text encoder: this prompt is encoded on the CPU, which takes longer.")
        out_of_memory.release_buffers()
        return encode(moved_clip(clip, CPU))

    def sentence() -> str:
        return (
            "There is too little free memory to encode the prompt, on the GPU and on the CPU: close other programs, or "
            "take umt5_xxl_fp8_e4m3fn_scaled in NAVA Load Text Encoder."
        )

    return out_of_memory.twice(lambda: encode(clip), on_cpu, sentence)


def host_tokens(ids: Sequence[int]) -> dict[str, list]:
    """Token ids in the form that a CLIP's encode methods take: one section, every weight 1."""
    return {NAME: [[(int(token), 1.0) for token in ids]]}


class NavaTokenizer:
    """The core's tokenizer under the interface of the host's ``SDTokenizer``, so that stock nodes can encode.

    Prompts are not weighted ("(x:1.2)" is text), sentinels are put in at speech spans, and nothing is padded.
    Run on ComfyUI 0.18.1 and 0.33.0.
    """

    def __init__(self, embedding_directory=None, tokenizer_data: dict | None = None):
        self.prompt_tokenizer: PromptTokenizer = tokenizer_data["nava_prompt_tokenizer"]
        self.spiece = tokenizer_data.get(SPIECE)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options) -> list:
        ids = self.prompt_tokenizer(text).ids
        # Word id 0 is the host's for what is no word; it tells no words apart here, so tokens are their own.
        numbered = [(token, 1.0, i) for i, token in enumerate(ids[:-1], start=1)] + [(ids[-1], 1.0, 0)]
        return [numbered if return_word_ids else [entry[:2] for entry in numbered]]

    def state_dict(self) -> dict:
        """What the host saves with the weights."""
        return {} if self.spiece is None else {SPIECE: self.spiece}


def _load_patcher(path: str, device: str, tokenizer_folder, disable_dynamic: bool = False):
    """What the host calls to load the same model again for another device."""
    return _load(path, device, tokenizer_folder, disable_dynamic).patcher


def _load(path: str, device: str, tokenizer_folder, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    info = describe_file(path)
    if info.kind not in (FileKind.UMT5, FileKind.UMT5_ORIGINAL):
        raise WrongFileError(explain_wrong_file(info, FileKind.UMT5))
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    spiece = tensors.pop(SPIECE, None)
    tensors = _with_host_names({name.removeprefix(info.prefix): tensor for name, tensor in tensors.items()})
    tensors, metadata = comfy.utils.convert_old_quants(tensors, model_prefix="", metadata=metadata)
    try:
        config = UMT5Config.from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from None
    tokenizer, spiece = _find_tokenizer(Path(path), spiece, tokenizer_folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens but {Path(path).name} knows {config.vocab_size}: "
            "they belong to different models; give the tokenizer folder that came with this text encoder."
        )
    _in_use.add(tokenizer)
    return _clip(tensors, config, {SPIECE: spiece, "nava_prompt_tokenizer": tokenizer}, device, disable_dynamic)


def _clip(tensors: dict, config: UMT5Config, tokenizer_data: dict, device: str, disable_dynamic: bool) -> comfy.sd.CLIP:
    """The host's own CLIP around its own umt5, with this file's dimensions and the core's tokenizer.

    Both go in through the host's options: ``<model>_model_config`` overrides the built-in xxl configuration,
    ``<model>_tokenizer_class`` the tokenizer. Run on ComfyUI 0.18.1 and 0.33.0.
    """

    class Target:
        clip = comfy.text_encoders.wan.te(**comfy.text_encoders.sd3_clip.t5_xxl_detect(tensors))
        tokenizer = comfy.text_encoders.wan.WanT5Tokenizer
        params: dict = {}  # noqa: RUF012 - the host copies it

    dimensions = {key: getattr(config, key) for key in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")}
    options = {f"{NAME}_model_config": {**dimensions, "vocab_size": config.vocab_size}}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip = comfy.sd.CLIP(
        Target,
        tokenizer_data={**tokenizer_data, f"clip_{NAME}_tokenizer_class": NavaTokenizer},
        parameters=comfy.utils.calculate_parameters(tensors),
        state_dict=[tensors],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )
    dtype = getattr(clip.cond_stage_model, NAME).transformer.dtype

    def needed(tokens, device=None) -> float:  # the host asks for it by this name
        sections = tokens.get(NAME, [])
        return text_encode_bytes(config, max(map(len, sections), default=0), len(sections), dtype)

    clip.cond_stage_model.memory_estimation_function = needed
    return clip


def _with_host_names(tensors: dict) -> dict:
    if has_makers_names(tensors):
        return from_makers_names(tensors)
    if "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors["shared.weight"] = tensors["encoder.embed_tokens.weight"]  # transformers saves one of the two
    tensors.pop("encoder.embed_tokens.weight", None)
    return tensors


def _find_tokenizer(path: Path, spiece, tokenizer_folder) -> tuple[PromptTokenizer, torch.Tensor | None]:
    """The tokenizer: the folder asked for, else the one inside the file, else one beside it; and its bytes."""
    if tokenizer_folder is None and spiece is not None:
        return PromptTokenizer(spiece), spiece
    beside = [path.parent, *sorted(folder for folder in path.parent.glob("*umt5*") if folder.is_dir())]
    for folder in beside if tokenizer_folder is None else [Path(tokenizer_folder)]:
        try:
            return PromptTokenizer.from_folder(folder), _spiece_of(folder)
        except FileNotFoundError:
            continue
    where = f"there is none in {tokenizer_folder}" if tokenizer_folder else "it has none inside and none lies beside it"
    raise FileNotFoundError(
        f"{path.name} needs a tokenizer, and {where}: give the folder google/umt5-xxl that came with it, "
        "or use ComfyUI's umt5_xxl_fp16.safetensors, which has it inside."
    )


def _spiece_of(folder: Path) -> torch.Tensor | None:
    for candidate in (folder / "google" / "umt5-xxl" / "spiece.model", folder / "spiece.model"):
        if candidate.is_file():
            return torch.frombuffer(bytearray(candidate.read_bytes()), dtype=torch.uint8)
    return None
