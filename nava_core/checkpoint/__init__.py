"""Model files: recognised by content, described from their header, read safely, loaded tensor by tensor."""

from .headers import FileInfo, TensorInfo, describe_file, format_bytes, format_count
from .kinds import BACKBONES, CLIP_LATENTS, VOICE_TENSOR, FileKind, WrongFileError, explain_wrong_file
from .loading import (
    PlannedTensor,
    WeightChange,
    assign_tensor,
    backbone_config,
    backbone_problem,
    block_linears,
    estimate_memory,
    load_backbone,
    main_dtype,
    plan_tensors,
    readable_backbone,
    stream_tensors,
    weight_shapes,
)
from .source import TensorSource, open_checkpoint

__all__ = [
    "BACKBONES",
    "CLIP_LATENTS",
    "VOICE_TENSOR",
    "FileInfo",
    "FileKind",
    "PlannedTensor",
    "TensorInfo",
    "TensorSource",
    "WeightChange",
    "WrongFileError",
    "assign_tensor",
    "backbone_config",
    "backbone_problem",
    "block_linears",
    "describe_file",
    "estimate_memory",
    "explain_wrong_file",
    "format_bytes",
    "format_count",
    "load_backbone",
    "main_dtype",
    "open_checkpoint",
    "plan_tensors",
    "readable_backbone",
    "stream_tensors",
    "weight_shapes",
]
