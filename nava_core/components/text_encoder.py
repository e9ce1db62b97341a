"""The umt5 text encoder through transformers: weights stay in the file's type, the arithmetic is fp32.

Takes ComfyUI's files (fp16, scaled fp8; the tokenizer inside) and the makers' ``.pth`` with a tokenizer folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint import FileInfo, FileKind, TensorSource, WrongFileError, open_checkpoint
from ..prompt import PromptTokenizer
from ..prompt.umt5 import UMT5Config, from_makers_names, has_makers_names
from .weights import fill, need, recognised, shapes_of

SPIECE = "spiece_model"  # the tensor that holds the tokenizer in ComfyUI's files
SCALES = (".scale_weight", ".weight_scale")  # of scaled fp8, one fp32 number a matrix
EMBEDDING = "shared.weight"
BLOCK = "encoder.block."  # what the names of a block's tensors begin with, before its number


class TextEncoder(nn.Module):
    """Token ids to the context that the backbone attends to."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def encode(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids with the end token -> their context (1, n, d_model), fp32 on the CPU.

        Unpadded: the backbone pads the raw context with zeros. Raises ValueError for ids that the model does not have.
        """
        shared = self.network.shared
        if not ids or not 0 <= min(ids) <= max(ids) < shared.num_embeddings:
            raise ValueError(f"Token ids must lie within 0..{shared.num_embeddings - 1}; the tokenizer does not fit.")
        rows = shared(torch.tensor([list(ids)], device=shared.weight.device))
        encoder = self.network.encoder
        rows = rows.to(encoder.final_layer_norm.weight.device)
        return encoder(inputs_embeds=rows).last_hidden_state.float().cpu()

    def encode_bytes(self, tokens: int) -> int:
        """An estimate of the memory that encoding ``tokens`` takes beside the weights."""
        config = self.network.config
        dimensions = (config.d_model, config.d_kv, config.d_ff, config.num_layers, config.num_heads, config.vocab_size)
        return encode_bytes(UMT5Config(*dimensions), tokens)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its layers, in their order."""
        return list(self.network.encoder.block)

    @property
    def embedding(self) -> nn.Module:
        """What stays on the CPU wherever the rest works: of its 2 GB a few rows are used."""
        return self.network.shared


class StoredLinear(nn.Module):
    """A Linear without bias that keeps its weight in the file's type and computes in the input's.

    Its weight is not called ``weight``: the encoder would cast what flows through it to that one's type.
    """

    weight = None

    def __init__(self, shape: tuple[int, ...], scaled: bool) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        self.scale = nn.Parameter(torch.empty((), device="meta"), requires_grad=False) if scaled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.stored.to(x.dtype)
        return F.linear(x, weight if self.scale is None else weight * self.scale.to(x.dtype))


class StoredEmbedding(nn.Embedding):
    """An embedding kept in the file's type whose rows come out in fp32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


def load_tokenizer(path: str | os.PathLike | FileInfo, folder: str | os.PathLike | None = None) -> PromptTokenizer:
    """The tokenizer of a text encoder's file, without its weights.

    ``folder``, else the one inside the file, else one beside it: ``spiece.model`` or ``tokenizer.json`` in the file's
    folder, in ``google/umt5-xxl`` there, or in a folder there with umt5 in its name. Raises FileNotFoundError where
    there is none, WrongFileError for a file that is no umt5.
    """
    info = recognised(path, FileKind.UMT5, FileKind.UMT5_ORIGINAL)
    if folder is not None:
        return PromptTokenizer.from_folder(folder)
    if SPIECE in info.model_tensors:
        with open_checkpoint(info) as source:
            return PromptTokenizer(source.read(SPIECE))
    beside = [info.path.parent, *sorted(each for each in info.path.parent.glob("*umt5*") if each.is_dir())]
    for candidate in beside:
        try:
            return PromptTokenizer.from_folder(candidate)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"{info.path.name} needs a tokenizer, and it has none inside and none lies beside it: give the folder "
        "google/umt5-xxl that came with it, or use ComfyUI's umt5_xxl_fp16.safetensors, which has it inside."
    )


def load_text_encoder(
    path: str | os.PathLike | FileInfo,
    *,
    device: torch.device | str = "cpu",
    in_ram: Collection[int] = (),
    mapped: bool = False,
) -> TextEncoder:
    """A umt5 encoder of any size, its weights moved to ``device`` one by one in the file's own type.

    The embedding, of which a few rows are used, and the blocks of the numbers ``in_ram`` stay on the CPU. ``mapped``:
    what is on the CPU stays in the file's pages, which are the system's cache, and takes no memory of the process.

    Raises FileNotFoundError, WrongFileError for another file or an incomplete one, RuntimeError where transformers is
    not installed.
    """
    info = recognised(path, FileKind.UMT5, FileKind.UMT5_ORIGINAL)
    config, names = text_encoder_config(info), _names(info)
    scales = {old: scale for old in names if (scale := _scale_of(old, info))}
    network = _network(config, {names[old] for old in scales})
    stay = (EMBEDDING, *(f"{BLOCK}{index}." for index in in_ram))

    def home(name: str) -> torch.device:
        return torch.device("cpu" if name.startswith(stay) else device)

    with open_checkpoint(info) as source:
        fill(network, _tensors(source, names, scales, home, mapped), info.path.name)
    _tie(network)
    return TextEncoder(network).eval().requires_grad_(False)


def text_encoder_config(info: FileInfo) -> UMT5Config:
    """The dimensions of a umt5 file, read off its header; raises WrongFileError for an incomplete one."""
    shapes = shapes_of(info)
    try:
        return UMT5Config.from_shapes({new: shapes[old] for old, new in _names(info).items()})
    except ValueError as error:
        raise WrongFileError(f"{info.path.name}: {error}") from None


def text_encoder_weights(info: FileInfo) -> tuple[int, tuple[int, ...]]:
    """Bytes of a umt5 file's weights in memory, without the embedding's: beside the blocks, and of each block."""
    blocks = [0] * text_encoder_config(info).num_layers
    rest = 0
    for old, new in _names(info).items():
        tensor = info.model_tensors[old]
        size = tensor.numel * torch.float32.itemsize if _is_small(new) else tensor.nbytes
        if new.startswith(BLOCK):
            blocks[int(new.removeprefix(BLOCK).partition(".")[0])] += size
        elif new != EMBEDDING:
            rest += size
    return rest, tuple(blocks)


def encode_bytes(config: UMT5Config, tokens: int) -> int:
    """An estimate of the memory that encoding ``tokens`` takes beside the weights: the fp32 form of the largest one,
    twice where it is scaled, the scores of the attention, and the hidden layer of the feed-forward."""
    largest = 2 * config.d_model * config.d_ff
    scores = 4 * config.num_heads * tokens**2
    return (largest + scores + 4 * tokens * config.d_ff) * torch.float32.itemsize


def _names(info: FileInfo) -> dict[str, str]:
    """The encoder's tensors: name in the file -> transformers' name."""
    tensors = info.model_tensors
    if has_makers_names(tensors):
        return {old: new for new, old in from_makers_names({name: name for name in tensors}).items()}
    names = {name: name for name in tensors if name == EMBEDDING or name.startswith("encoder.")}
    names = {name: name for name in names if name.endswith(".weight")}
    tied = names.pop("encoder.embed_tokens.weight", None)  # transformers saves one of the two, or both
    if tied and EMBEDDING not in names:
        names[tied] = EMBEDDING
    return names


def _scale_of(name: str, info: FileInfo) -> str | None:
    candidates = (name.removesuffix(".weight") + suffix for suffix in SCALES)
    return next((each for each in candidates if each in info.model_tensors), None)


def _network(config: UMT5Config, scaled: set[str]) -> nn.Module:
    """transformers' encoder without memory, its Linears and its embedding exchanged for those above."""
    transformers = need("transformers", "The text encoder")
    dimensions = {
        key: getattr(config, key) for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    }
    with torch.device("meta"):
        network = transformers.UMT5EncoderModel(transformers.UMT5Config(**dimensions))
        network.set_input_embeddings(StoredEmbedding(config.vocab_size, config.d_model))
    network.encoder.embed_tokens = nn.Identity()  # `shared` again; put back once its weight is there
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            linear = StoredLinear(tuple(module.weight.shape), f"{name}.weight" in scaled)
            setattr(network.get_submodule(parent), child, linear)
    return network


def _tie(network: nn.Module) -> None:
    network.encoder.embed_tokens = network.shared


def _tensors(
    source: TensorSource,
    names: dict[str, str],
    scales: dict[str, str],
    home: Callable[[str], torch.device],
    mapped: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    for old in source:
        if old not in names:
            continue
        new = names[old]
        layer, device = new.removesuffix(".weight"), home(new)
        tensor = source.map(old) if mapped and device.type == "cpu" else source.read(old)
        if new == EMBEDDING:
            yield new, tensor.to(device)
        elif _is_small(new):
            yield new, tensor.to(device, torch.float32)  # what the encoder reads its types from
        else:
            yield f"{layer}.stored", tensor.to(device)
            if old in scales:
                yield f"{layer}.scale", source.read(scales[old]).to(device, torch.float32).reshape(())


def _is_small(name: str) -> bool:
    """Whether a tensor, by transformers' name, is kept in fp32: norms and relative positions."""
    layer = name.removesuffix(".weight")
    return "norm" in layer.rsplit(".", 1)[-1] or layer.endswith("relative_attention_bias")
