"""The host's fused kernels (comfy_kitchen's) where it has them for the device and they compute what our code does.

Seen by presence: anything else than that library's plain reference must serve such tensors, and must give our own
code's numbers on a few tokens, once for each device and type. Else, and under the compiler, our own code runs.
Run on ComfyUI 0.18.1 and 0.33.0 with that library's reference code, on the CPU.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import comfy.ldm.flux.math
import comfy.ops
import comfy.quant_ops
import torch
from torch import nn

from ...nava_core.backbone import Kernels
from ...nava_core.backbone.layers import modulated_norm, rotary_table, rotated


def rotate(x, table, heads):
    """See nava_core.backbone.layers.Kernels."""
    return (fused_rotation if _fused(_rotation_agrees, x, heads) else rotated)(x, table, heads)


def norm_and_modulate(norm, tokens, stretches):
    """See nava_core.backbone.layers.Kernels."""
    return (fused_norm if _fused(_norm_agrees, tokens) else modulated_norm)(norm, tokens, stretches)


def norm_weights(norm, like):
    """See nava_core.backbone.layers.Kernels."""
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, like, offloadable=True)
    made = tuple(None if part is None else part.clone() for part in (weight, bias))
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return made


HOST_KERNELS = Kernels(rotate, norm_and_modulate, norm_weights)


def fused_rotation(x, table, heads):
    """``rotated`` by the host's function, in x's type; each pair's 2 x 2 matrix is made for this piece alone."""
    cos, sin = table.unbind(-1)
    matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, :, None]
    return comfy.ldm.flux.math.apply_rope1(x.unflatten(-1, (heads, -1)), matrices).flatten(2)


def fused_norm(norm, tokens, stretches):
    """``modulated_norm`` by the host's function, which adds 1 to the scale itself."""
    pieces = []
    for part, (shift, scale) in stretches:
        piece = tokens[:, part].unflatten(1, (shift.shape[1], -1))
        pieces.append(comfy.quant_ops.ck.adaln(piece, scale - 1, shift, norm.eps).flatten(1, 2))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


# ---------------------------------------------------------------- whether they are used


def _fused(agrees, x, *details) -> bool:
    return not torch.compiler.is_compiling() and agrees(x.device, x.dtype, x.shape[-1], *details)


@lru_cache
def _rotation_agrees(device, dtype, width, heads) -> bool:
    def run():
        table = rotary_table(width // heads, (1, 2, 2), 2).to(device)
        x = _sample(device, dtype, 2, len(table), width)
        return fused_rotation(x, table, heads), rotated(x, table, heads)

    x = torch.empty(1, 1, heads, width // heads, device=device, dtype=dtype)
    return _agrees("apply_rope1", {"x": x, "freqs_cis": x.new_empty(1, 1, 1, width // heads // 2, 2, 2).float()}, run)


@lru_cache
def _norm_agrees(device, dtype, width) -> bool:
    def run():
        norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        x = _sample(device, dtype, 2, 7, width)
        groups = [_sample(device, dtype, 2, 2, count, 1, width) for count in (2, 3)]  # of (shift, scale) and (B, G)
        parts = (slice(0, 4), slice(4, 7))
        fused = fused_norm(norm, x, list(zip(parts, groups, strict=True)))
        return fused, modulated_norm(norm, x.float(), list(zip(parts, [each.float() for each in groups], strict=True)))

    x = torch.empty(1, width, device=device, dtype=dtype)
    return _agrees("adaln", {"x": x, "scale": x, "shift": x, "eps": 1e-6}, run)


def _agrees(name, arguments, run) -> bool:
    """Whether the host has more than the plain reference for ``arguments``, and ``run`` gives (its result, our own
    code's in fp32) within one rounding."""
    kitchen = getattr(comfy.quant_ops, "ck", None)
    choose = getattr(getattr(kitchen, "registry", None), "get_capable_backend", None)
    if choose is None or not hasattr(kitchen, name):
        return False
    try:
        if choose(name, arguments) == "eager":
            return False
    except Exception:  # it says so of tensors that nothing serves
        return False
    try:
        fused, own = run()
        error = (fused.float() - own).abs().max() / own.abs().max()
        same = bool(error <= max(1e-6, torch.finfo(fused.dtype).eps))
        problem = f"it is off by {error:.1g}"
    except Exception as failure:  # whatever a kernel does on a device it was not made for
        same, problem = False, failure
    if not same:
        logging.warning("NAVA: the host's kernel %s is not used, our own code is: %s.", name, problem)
    return same


def _sample(device, dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
