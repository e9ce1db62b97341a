"""The options on how pictures are decoded, which several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from .options import whole_number


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--decoding",
        default="auto",
        choices=["auto", "whole", "tiled"],
        help="whole frames, or tiles, which need less memory and leave faint seams; auto: whole where there is memory "
        "for it (default: auto)",
    )
    group.add_argument(
        "--tile-size",
        type=whole_number(64, 4096),
        default=256,
        metavar="PIXELS",
        help="side of a tile, of which 64 pixels overlap (default: 256)",
    )


def decoding_of(args: argparse.Namespace) -> Any:
    """``Decoding`` of the options."""
    from ..decoding import OVERLAP, Decoding

    return Decoding(args.decoding, args.tile_size, min(OVERLAP, args.tile_size // 2))
