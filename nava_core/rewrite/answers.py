"""From what a chat model says to the paragraph it was asked for: thinking, fences, preambles and remarks go."""

from __future__ import annotations

import html
import re
import unicodedata

LONGEST = 8000  # characters that are looked at, several times those that fit the text encoder

_THOUGHT = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_CHANNEL = re.compile(r"^.*<\|channel\|>\s*final\s*<\|message\|>", re.DOTALL)
_CONTROL = re.compile(r"<\|[^<>|]{1,40}\|>|<(?:start|end)_of_turn>|</?s>\s*$")
_FENCED = re.compile(r"```[\w-]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_MARK = re.compile(r"[<＜]([^<>＜＞]{1,24})[>＞]")
_UNSEEN = re.compile(  # terminal sequences, control signs but line ends and tabs, signs that turn the line round
    r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)
_NAMED = r"(?:prompt|version|rewrite|rewritten|paragraph|description|caption|text|result|answer|draft)"
_LABEL = re.compile(
    r"^[\s>#*_\d.)•\-–]*(?:"
    r"(?:(?:sure|certainly|of course|okay|ok|absolutely|great)\b[^\n:]{0,40}[,.!]\s*)?"
    rf"(?:here(?:'s|’s| is| are)\b[^\n:]{{0,60}}?\b{_NAMED}\b[^\n:]{{0,40}}|here (?:it is|you (?:go|are))|(?:the\s+)?"
    r"(?:rewritten|final|finished|revised|enhanced|expanded|dense|improved)\s+(?:prompt|version|paragraph)|"
    r"(?:video\s+)?prompt|output|answer)"
    r"|(?:好的[，,。！!]?)?\s*(?:以下|下面|这)是?[^\n：:]{0,30}(?:提示词|版本|描述|结果|内容|段落)[^\n：:]{0,10}"
    r"|(?:改写|完整|最终|润色)后?的?提示词|提示词"
    r")[*_]*\s*[:：][*_]*\s*",
    re.IGNORECASE,
)
_ONLY_POLITE = re.compile(r"^(?:sure|certainly|of course|okay|absolutely|好的|当然)[!,.。！，]*\s*\n+", re.IGNORECASE)
_HEADING = re.compile(
    r"^(?:global )?(?:visual(?:s| description)?|picture|temporal dynamics|dynamics|action|camera(?: (?:and|&) "
    r"composition)?|composition|audio(?: description)?|sound(?:track)?|speech|画面(?:整体)?|整体画面|动态|时间动态|"
    r"镜头(?:与构图)?|声音|音频)\s*[:：]\s*",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"^[*_(\[（]*(?:note\b|notes\b|let me know|i hope|feel free|this (?:prompt|version|rewrite)|word count|"
    r"explanation|changes\b|注[：:]|说明[：:]|希望|如需|如果需要|（?字数|以上)",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^\s*(?:#{1,6}\s+|>\s?|[*•\-–]\s+|\d{1,2}[.)]\s+)")
_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("'", "'"), ("‘", "’"), ("`", "`"))


def clean_answer(text: str) -> str:
    """The paragraph in an answer, on one line, speech marks in their own spelling; "" where there is none."""
    text = _without_thinking(_readable(text.replace("\r\n", "\n"))).strip()[:LONGEST]
    fenced = max(_FENCED.findall(text), key=len, default="")
    text = fenced if fenced.strip() else text.replace("```", "")
    text = _MARK.sub(_as_mark, text)
    text = _ONLY_POLITE.sub("", text.strip())
    text = _LABEL.sub("", text, count=1)
    lines = [_plain(line) for line in _paragraphs(text)]
    return _unquoted(" ".join(" ".join(lines).split()))


def _readable(text: str) -> str:
    """As the text encoder will read it, HTML entities resolved, so that no speech mark hides; without what could not be
    shown or encoded."""
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # halves of signs, sent apart
    return _UNSEEN.sub("", html.unescape(html.unescape(text)))


def _as_mark(found: re.Match) -> str:
    """A speech mark or reserved token in its own spelling, also where it was written with full-width signs."""
    inside = "".join(unicodedata.normalize("NFKC", found[1]).split()).casefold()
    if inside in ("s", "e", "/s", "/e"):
        return "<S>" if inside == "s" else "<E>"
    return f"<{inside}>" if re.fullmatch(r"extra_id_\d+", inside) else found[0]


def _without_thinking(text: str) -> str:
    said, since, thinks = [], 0, False
    for mark in _THOUGHT.finditer(text):
        if mark[1]:
            if not thinks:  # the opening mark was part of the template
                said.clear()
            since, thinks = mark.end(), False
        elif not thinks:
            said.append(text[since : mark.start()])
            thinks = True
    if not thinks:  # else it never came to an end
        said.append(text[since:])
    return _CONTROL.sub("", _CHANNEL.sub("", "".join(said)))


def _paragraphs(text: str) -> list[str]:
    """The lines before a closing remark; the first line is never one."""
    lines: list[str] = []
    for line in text.split("\n"):
        if lines and _REMARK.match(line.strip()):
            break
        if line.strip() and not re.fullmatch(r"\s*[-*_=]{3,}\s*", line):
            lines.append(line)
    return lines


def _plain(line: str) -> str:
    """A line without bullet, emphasis and the heading of a part."""
    line = _BULLET.sub("", line)
    line = re.sub(r"\*\*|__", "", line)
    return _HEADING.sub("", line.strip())


def _unquoted(text: str) -> str:
    for start, end in _QUOTES:
        inner = text[1:-1]
        if len(text) > 2 and text[0] == start and text[-1] == end and start not in inner and end not in inner:
            return inner.strip()
    return text
