"""One clip over several GPUs or machines, and many clips at once."""

from .settings import Parallel

__all__ = ["Parallel"]
