"""Reference voices: a recording of a speaker -> the (1, 192) timbre embedding of one speech span."""

from .encoder import check_voice, encode_timbre, used_seconds
from .loading import load_redimnet

__all__ = ["check_voice", "encode_timbre", "load_redimnet", "used_seconds"]
