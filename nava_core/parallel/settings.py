"""What a user says about workers; importing it imports neither Ray nor torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .workers import ParallelBackbone


@dataclass(frozen=True)
class Parallel:
    """``workers`` processes for one clip. ``layout``: "auto", or predictions side by side x workers for each ("2x4");
    ``weights``: "replicated" or "sharded"."""

    workers: int
    layout: str = "auto"
    weights: str = "replicated"

    def check(self, path: Path, device: str) -> None:
        """Raise, in a sentence, where the backbone file, the device ("cpu", "cuda") or this machine does not allow it.

        Reads the file's header only: ValueError for what does not fit, RuntimeError for what is missing.
        """
        from ..checkpoint import backbone_config, describe_file
        from .layout import Layout
        from .workers import check_parallel

        config = backbone_config(describe_file(path))
        check_parallel(config, self.workers, Layout.parse(self.layout), self.weights, device)

    def backbone(
        self, path: Path, device: str, dtype: torch.dtype | None, say: Callable[[str], None] | None, **more
    ) -> ParallelBackbone:
        """A backbone that the workers compute, ``more`` as :class:`ParallelBackbone` takes it; they start with its
        first pass."""
        from .layout import Layout
        from .workers import ParallelBackbone

        return ParallelBackbone(
            path,
            workers=self.workers,
            device=device,
            dtype=dtype,
            layout=Layout.parse(self.layout),
            weights=self.weights,
            say=say,
            **more,
        )
