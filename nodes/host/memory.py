"""What sampling takes on this host beside the weights: the network's pass, and what the host's samplers keep of a run.

Run on ComfyUI 0.18.1 and 0.33.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
from comfy.quant_ops import QuantizedTensor

from ...nava_core.backbone import no_workspace
from .resident import block_of

ALLOCATOR_SLACK = 1.1  # what PyTorch's allocator holds beside live tensors
PLANNED_RUN = "nava_run"  # among the shapes of conditions that the host plans a run with

# Packed latents in fp32 that are alive while the network works. Of the run: noise, its scaled form, the latent, the
# solver's x and its last one, two steps' results. For each prediction: result, count and weight.
KEPT_OF_A_RUN, KEPT_OF_A_PREDICTION = 7, 3
# With given parts: the mask as given, packed, and its opposite; the latent in the model's space; x with the given
# parts; and where all is given.
KEPT_OF_A_MASK = 5.25


@dataclass(frozen=True)
class RunSize:
    """A run as it begins: shapes of the latent's parts, predictions of a step at most, whether parts are given."""

    shapes: tuple[tuple[int, ...], ...]
    predictions: int
    masked: bool

    @property
    def values(self) -> int:
        """Of one sample's packed latent."""
        return sum(math.prod(shape[1:]) for shape in self.shapes)


def run_bytes(run: RunSize, batch: int, config, dtype_size: int) -> float:
    """Bytes a run holds on the device beside the network's own, while ``batch`` samples are in the network."""
    samples = run.shapes[0][0]
    copies = KEPT_OF_A_RUN + KEPT_OF_A_PREDICTION * run.predictions + KEPT_OF_A_MASK * run.masked
    kept = samples * copies * run.values * 4
    context = config.text_len * config.text_dim
    read = 4 + (dtype_size if dtype_size != 4 else 0)  # in fp32, and in the network's type
    contexts = run.predictions * context * 4 * (samples + (samples > 1))  # one, and for several samples repeated
    return kept + contexts + batch * (run.values + context) * read


def weight_copy_sizes(model) -> dict[str, int]:
    """Which weights are made anew as they are used, as ``activation_bytes`` takes it: dequantised, or cast."""
    network, dtype = model.diffusion_model, model.get_dtype_inference()
    layers = {
        "weight_copy_size": block_of((network.single_blocks or network.double_blocks)[0]).ffn[0],
        "embedding_copy_size": network.patch_embedding_audio["2"].w1,
    }
    size = comfy.model_management.dtype_size(dtype)
    return {name: size if _is_copied(layer.weight, dtype) else 0 for name, layer in layers.items()}


def _is_copied(weight, dtype) -> bool:
    return isinstance(weight, QuantizedTensor) or weight.dtype != dtype


# ---------------------------------------------------------------- attention


def attention_workspace():
    """What the host's attention function holds beside q, k, v and its output, where it is one that shows; see
    nava_core.backbone.memory.AttentionBytes. Two of them fit their work to the free memory: they count with what they
    do in what the host always keeps free."""
    return {
        host_attention.attention_sub_quad: _sub_quadratic,
        host_attention.attention_split: _split,
        host_attention.attention_basic: _basic,
    }.get(host_attention.optimized_attention, no_workspace)


def _sub_quadratic(batch, queries, keys, heads, width, size) -> int:
    """Of several samples copies of q, k and v; the output a second time, or one piece's scores, before and after
    softmax."""
    copies = (queries + 2 * keys) * heads * width if batch > 1 else 0
    fitting = comfy.model_management.minimum_inference_memory() / (4 * batch * heads * size * keys)
    piece = next((each for each in (4096, 2048, 1024, 512) if each <= fitting), 256)
    scores = 2 * min(queries, piece) * keys * heads
    return batch * size * (copies + max(queries * heads * width, scores))


def _split(batch, queries, keys, heads, width, size) -> int:
    """Copies of q, k and v, and one piece's scores, before and after softmax; it halves the queries only where they
    are even."""
    copies = (queries + 2 * keys) * heads * width
    scores = queries * keys * heads
    times = 3 * batch * size * scores / comfy.model_management.minimum_inference_memory()
    pieces = 2 ** min(6, math.ceil(math.log2(max(1.0, times))))
    return batch * size * (copies + 2 * scores // (pieces if queries % pieces == 0 else 1))


def _basic(batch, queries, keys, heads, width, size) -> int:
    """Copies of q, k and v, and all scores, before and after softmax."""
    return batch * size * ((queries + 2 * keys) * heads * width + 2 * queries * keys * heads)
