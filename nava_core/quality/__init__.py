"""What smaller weights cost: errors of a file against another, and which layers matter, measured on a small clip."""

from .compare import Comparison, compare_files
from .probes import PROBE_CLIP, Conditions, encode_conditions, null_conditions
from .sensitivity import Sensitivity, measure_sensitivity, most_sensitive, sensitivity_bytes
from .streamed import streamed_bytes

__all__ = [
    "PROBE_CLIP",
    "Comparison",
    "Conditions",
    "Sensitivity",
    "compare_files",
    "encode_conditions",
    "measure_sensitivity",
    "most_sensitive",
    "null_conditions",
    "sensitivity_bytes",
    "streamed_bytes",
]
