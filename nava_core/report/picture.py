"""A report as a picture: thumbnails, waveform, onsets and accents above each other, drawn with Pillow."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import torch

WIDTH, MARGIN = 1200, 20
WAVE_HEIGHT, CURVE_HEIGHT, LABEL, LINE = 120, 90, 20, 18
TEXT_COLUMNS, MAX_LINES = 170, 30
INK, LABELS, PAPER, FAINT = (225, 228, 232), (150, 156, 165), (24, 26, 30), (70, 75, 82)
WAVE, ONSET, ACCENT, SPEECH = (110, 170, 240), (250, 190, 90), (120, 210, 140), (60, 85, 120)
SILENT, FROZEN, FAULT = (110, 60, 60), (70, 110, 150), (255, 110, 100)


def draw_report(report: Any) -> torch.Tensor:
    """The picture of a :class:`ClipReport`: (H, 1200, 3) uint8."""
    import numpy
    from PIL import Image, ImageDraw

    lines, parts = _lines(report), (_thumbnails, _wave, _curves)
    height = 2 * MARGIN + sum(part(None, None, report, 0) for part in parts) + LINE * len(lines)
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen, font = ImageDraw.Draw(image), _font()
    top = MARGIN
    for part in parts:
        top += part(image, pen, report, top)
    for line in lines:
        pen.text((MARGIN, top), line, fill=FAULT if "FAULT" in line else INK, font=font)
        top += LINE
    return torch.from_numpy(numpy.array(image))


def _font():
    """Pillow's own, which every machine has."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(13)
    except (TypeError, ImportError):  # before Pillow 10.1, or without FreeType
        return ImageFont.load_default()


def _lines(report: Any) -> list[str]:
    """The report's text, broken to the width; signs that the font has not become question marks."""
    lines = [
        piece
        for line in report.text.splitlines()
        for piece in textwrap.wrap(line, TEXT_COLUMNS, subsequent_indent="    ", drop_whitespace=False)
    ]
    return [line.encode("latin-1", "replace").decode("latin-1") for line in lines[:MAX_LINES]]


# Each part draws itself below ``top`` and returns its height; without an image it only tells the height, 0 for nothing.


def _thumbnails(image, pen, report: Any, top: int) -> int:
    from PIL import Image

    curves = report.drawing.curves
    if curves is None:
        return 0
    pictures = curves.thumbnails
    width = (WIDTH - 2 * MARGIN) // len(pictures)
    width = min(width, pictures.shape[2])
    height = max(1, round(width * pictures.shape[1] / pictures.shape[2]))
    if image is not None:
        gap = (WIDTH - 2 * MARGIN - width) / max(1, len(pictures) - 1)
        for index, picture in enumerate(pictures.numpy()):
            place = (MARGIN + round(index * gap), top)
            image.paste(Image.fromarray(picture).resize((width, height)), place)
    return height + LABEL


def _wave(image, pen, report: Any, top: int) -> int:
    drawing = report.drawing
    if drawing.envelope is None:
        return 0
    if image is not None:
        _label(pen, "waveform; dark blue: speech by its energy, red: silent", top)
        middle = top + LABEL + WAVE_HEIGHT // 2
        for spans, colour in ((drawing.speech, SPEECH), (drawing.silent, SILENT)):
            _mark(pen, report, spans, colour, top + LABEL, WAVE_HEIGHT)
        half = WAVE_HEIGHT / 2 - 1
        for column, (low, high) in enumerate(drawing.envelope.clamp(-1, 1).T.tolist()):
            x = MARGIN + column
            pen.line((x, middle - high * half, x, middle - low * half), fill=WAVE)
    return WAVE_HEIGHT + LABEL + LINE // 2


def _curves(image, pen, report: Any, top: int) -> int:
    drawing = report.drawing
    if drawing.curves is None and drawing.onsets is None:
        return 0
    if image is not None:
        _label(pen, "orange, down: onsets of sounds; green, up: starts, stops and turns in the picture; "
                    "blue: frozen; red: flicker", top)  # fmt: skip
        top, middle = top + LABEL, top + LABEL + CURVE_HEIGHT // 2
        _mark(pen, report, drawing.frozen, FROZEN, top, CURVE_HEIGHT)
        pen.line((MARGIN, middle, WIDTH - MARGIN, middle), fill=FAINT)
        if drawing.curves is not None:
            _stems(pen, report, drawing.curves.accents, report.fps, middle, -1, ACCENT)
        if drawing.onsets is not None:
            _stems(pen, report, drawing.onsets, 100, middle, 1, ONSET)
        for time in drawing.flickers:
            x = _place(report, time)
            pen.line((x, top, x, top + CURVE_HEIGHT), fill=FAULT)
    return CURVE_HEIGHT + LABEL + LINE // 2


def _label(pen, text: str, top: int) -> None:
    pen.text((MARGIN, top), text, fill=LABELS, font=_font())


def _place(report: Any, seconds: float) -> int:
    return MARGIN + round(seconds / max(report.seconds, 1e-6) * (WIDTH - 2 * MARGIN))


def _mark(pen, report: Any, spans: Sequence[tuple[float, float]], colour, top: int, height: int) -> None:
    for begin, end in spans:
        pen.rectangle((_place(report, begin), top, _place(report, end), top + height), fill=colour)


def _stems(pen, report: Any, curve: torch.Tensor, rate: float, middle: int, down: int, colour) -> None:
    highest = float(curve.max()) if len(curve) else 0.0
    if highest <= 0:
        return
    for index, value in enumerate((curve / highest).tolist()):
        if value > 0.02:
            x = _place(report, index / rate)
            pen.line((x, middle, x, middle + down * value * (CURVE_HEIGHT / 2 - 2)), fill=colour)
