"""A report in lines for people."""

from __future__ import annotations

from typing import Any


def report_text(report: Any) -> str:
    """The faults of a :class:`ClipReport`, then its figures, then its notes, a line each."""
    values = report.values
    lines = [f"{report.name}: {_head(report)}"]
    lines += [f"  FAULT ({fault.measure}) {fault.text}" for fault in report.faults] or ["  No fault found."]
    for name, line in (("sound", _sound), ("sync", _sync), ("frozen", _frozen), ("flicker", _flicker)):
        if values.get(name) is not None:
            lines.append(f"  {line(values[name])}")
    if "speech" in values:
        lines += [f"  {line}" for line in _speech(values["speech"])]
    if "rate" in values.get("words", {}):
        lines.append(f"  {_words(values['words'])}")
    lines += [f"  Note: {note}" for note in report.notes]
    return "\n".join(lines)


def _head(report: Any) -> str:
    parts = [f"{report.seconds:.2f} s"]
    if "picture" in report.values:
        picture = report.values["picture"]
        width, height = picture["size"]
        parts.append(f"{picture['frames']} frames of {width}x{height} at {report.fps:g} a second")
    if "sound" in report.values:
        sound = report.values["sound"]
        parts.append(f"{sound['channels']} channel(s) of sound at {sound['sample_rate']} Hz")
    else:
        parts.append("no sound")
    return ", ".join(parts)


def _sound(values: dict) -> str:
    loudness, peak = values["loudness_lufs"], values["true_peak_dbtp"]
    return (
        f"Loudness: {'none' if loudness is None else f'{loudness:.1f} LUFS'}, "
        f"true peak {'none' if peak is None else f'{peak:.1f} dBTP'}, "
        f"{100 * values['clipped_share']:.2f} % clipped, {100 * values['silent_share']:.0f} % silent"
    )


def _sync(values: dict) -> str:
    lag = values["lag_ms"]
    when = "in time" if abs(lag) < 0.5 else f"{abs(lag):.0f} ms {'late' if lag > 0 else 'early'}"
    return (
        f"Sound on motion: fits best {when}, correlation {values['correlation']:.2f} (by chance "
        f"{values['chance_correlation']:.2f}, reached by {100 * values['chance']:.1f} % of shuffled sounds)"
    )


def _frozen(values: dict) -> str:
    return f"Frozen: {100 * values['share']:.0f} % of the picture"


def _flicker(values: dict) -> str:
    return f"Flicker: {values['count']} jump(s) of brightness, the largest {100 * values['largest']:.1f} %"


def _speech(values: dict) -> list[str]:
    lines = [f"Speech: {values['seconds']:.1f} s in {len(values['segments'])} passage(s), by its energy"]
    for number, span in enumerate(values.get("spans", []), start=1):
        if span is None:
            lines.append(f"Span {number}: not found")
            continue
        own = "" if span["voice"] is None else f"similarity {span['similarity']:.2f} with voice {span['voice']}, "
        lines.append(f"Span {number}: {span['begin']:.2f} to {span['end']:.2f} s, {own}most like {span['resembles']}")
    return lines


def _words(values: dict) -> str:
    return (
        f"Words: {values['unit']} error rate {100 * values['rate']:.0f} % ({values['wrong']} wrong, "
        f"{values['missing']} missing, {values['added']} added of {values['expected']})"
    )
