"""The dimensions of a NAVA backbone, and how they are read off its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

HEAD_DIM = 128  # of every released backbone; the tensors themselves do not tell it
AUDIO_MLP_MULTIPLE = 256


@dataclass(frozen=True)
class BackboneConfig:
    """Dimensions of the transformer; the defaults are those of the released 6.3 B model.

    ``text_len`` and ``num_heads`` leave no trace in the tensors: they come from a file's ``config``
    metadata, else from these rules (512 tokens; heads of 128).
    """

    dim: int = 3072
    ffn_dim: int = 14336
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    num_heads: int = 24
    num_double_layers: int = 10
    num_single_layers: int = 20
    vid_in_dim: int = 48
    vid_out_dim: int = 48
    audio_in_dim: int = 128
    audio_out_dim: int = 128
    speaker_dim: int = 192
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"A backbone of width {self.dim} cannot have {self.num_heads} heads: "
                "the width of a head must be a whole, even number."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def audio_mlp_dim(self) -> int:
        """Hidden width of the audio patch embedding's gated convolution."""
        hidden = int(2 * 4 * self.dim / 3)
        return AUDIO_MLP_MULTIPLE * -(-hidden // AUDIO_MLP_MULTIPLE)

    def to_dict(self) -> dict:
        """The configuration as it is stored in a file's ``config`` metadata."""
        return {**asdict(self), "num_layers": self.num_double_layers + self.num_single_layers}

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping | None = None) -> BackboneConfig:
        """Configuration from tensor shapes (names without prefix) and an optional ``config`` mapping.

        Raises KeyError with the missing tensor's name where ``shapes`` is not a NAVA backbone's.
        """
        dim = shapes["patch_embedding.weight"][0]
        given = {f.name: metadata[f.name] for f in fields(cls) if f.name in (metadata or {})}
        read = {
            "dim": dim,
            "ffn_dim": shapes["single_blocks.0.ffn.0.weight"][0],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "num_double_layers": _count_blocks(shapes, "double_blocks."),
            "num_single_layers": _count_blocks(shapes, "single_blocks."),
            "vid_in_dim": shapes["patch_embedding.weight"][1],
            "vid_out_dim": shapes["head.head.weight"][0] // 4,
            "audio_in_dim": shapes["patch_embedding_audio.0.weight"][1],
            "audio_out_dim": shapes["head_audio.head.weight"][0],
            "speaker_dim": shapes["speaker_embedding.net.0.weight"][0],
        }
        num_heads = given.get("num_heads") or max(1, dim // HEAD_DIM)
        return cls(**{**given, **read, "num_heads": num_heads})


def _count_blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name[len(prefix) :].split(".", 1)[0] for name in shapes if name.startswith(prefix)})
