"""umt5 encoders as files: their dimensions read off the tensors, and the makers' names beside transformers' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RELATIVE_BUCKETS = 32

_TOP = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


@dataclass(frozen=True)
class UMT5Config:
    """Dimensions of a umt5 encoder; the defaults are those of umt5-xxl."""

    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    vocab_size: int = 256384

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> UMT5Config:
        """Dimensions from tensor shapes under transformers' names.

        Raises ValueError where a tensor of a umt5 encoder is missing, has another shape than the rest
        implies, or is left out in one layer (a truncated or foreign file).
        """
        first = "encoder.block.0.layer.0.SelfAttention."
        try:
            vocab_size, d_model = shapes["shared.weight"]
            buckets, num_heads = shapes[first + "relative_attention_bias.weight"]
            inner = shapes[first + "q.weight"][0]
            d_ff = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
        except KeyError as missing:
            raise ValueError(f"This is not a umt5 text encoder: it has no tensor {missing}.") from None
        if buckets != RELATIVE_BUCKETS:
            raise ValueError(f"This text encoder has {buckets} relative positions; umt5 has {RELATIVE_BUCKETS}.")
        layers = {name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}
        config = cls(d_model, inner // num_heads, d_ff, len(layers), num_heads, vocab_size)
        for name, shape in config.tensor_shapes().items():
            if tuple(shapes.get(name, ())) != shape:
                found = f"has shape {tuple(shapes[name])}" if name in shapes else "is missing"
                raise ValueError(f"This umt5 text encoder is incomplete: {name} {found}, expected {shape}.")
        return config

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of such an encoder under transformers' names, with its shape."""
        inner = self.num_heads * self.d_kv
        block = {
            "layer_norm.weight": (self.d_model,),
            "o.weight": (self.d_model, inner),
            "relative_attention_bias.weight": (RELATIVE_BUCKETS, self.num_heads),
            "wo.weight": (self.d_model, self.d_ff),
            **{f"{name}.weight": (inner, self.d_model) for name in "qkv"},
            **{f"wi_{i}.weight": (self.d_ff, self.d_model) for i in range(2)},
        }
        shapes: dict[str, tuple[int, ...]] = {"shared.weight": (self.vocab_size, self.d_model)}
        for i in range(self.num_layers):
            for name in _BLOCK.values():
                shapes[f"encoder.block.{i}.{name}"] = block[".".join(name.split(".")[-2:])]
        shapes["encoder.final_layer_norm.weight"] = (self.d_model,)
        return shapes


def has_makers_names(names: Iterable[str]) -> bool:
    """Whether tensor names are those of the makers' ``models_t5_umt5-xxl-enc-bf16.pth``."""
    return {"token_embedding.weight", "blocks.0.attn.q.weight"} <= set(names)


def from_makers_names(tensors: Mapping) -> dict:
    """The same tensors under transformers' names. Raises ValueError at a name that has no counterpart."""
    return {_renamed(name, "blocks.", "encoder.block.", _TOP, _BLOCK): t for name, t in tensors.items()}


def to_makers_names(tensors: Mapping) -> dict:
    """The reverse of :func:`from_makers_names`."""
    top, block = ({new: old for old, new in names.items()} for names in (_TOP, _BLOCK))
    return {_renamed(name, "encoder.block.", "blocks.", top, block): t for name, t in tensors.items()}


def _renamed(name: str, prefix: str, new_prefix: str, top: dict, block: dict) -> str:
    if name in top:
        return top[name]
    index, _, rest = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or rest not in block:
        raise ValueError(f"This is not a umt5 text encoder: it has an unknown tensor {name!r}.")
    return f"{new_prefix}{index}.{block[rest]}"
