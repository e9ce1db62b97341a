"""The structured prompt: what is seen, what happens, how it is filmed, how it sounds, who says what; rendered
as the one dense paragraph the model was trained on, in English or Chinese."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from .presets import with_preset
from .spans import SPAN_END, SPAN_START, contains_marks

_HAN = re.compile(r"[\u3400-\u9fff]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]）」』]*$")
_TRAILING = ",;:-–—，；：、 "
_LANGUAGES = ("auto", "en", "zh")


@dataclass(frozen=True)
class SpanSpec:
    """One spoken passage with what is known of its delivery; all but `words` may be empty.

    `speaker`: who speaks ("the woman at the window"); `voice`: timbre in words ("warm, slightly husky");
    `emotion`; `pace`: speaking rate; `position`: where in the sound field; `timbre`: a reference voice's
    embedding (1, 192), or None. `emotion_preset`, `pace_preset`, `place_preset`: names in `presets.PRESETS`, whose
    words come before `emotion`, `pace` and `position` in the prompt's language; "" or "none" for none.
    """

    words: str
    speaker: str = ""
    voice: str = ""
    emotion: str = ""
    pace: str = ""
    position: str = ""
    timbre: Any = field(default=None, compare=False, repr=False)
    emotion_preset: str = ""
    pace_preset: str = ""
    place_preset: str = ""

    def in_words(self, chinese: bool) -> SpanSpec:
        """The same with its presets written out. Raises ValueError for a preset that there is not."""
        return replace(
            self,
            emotion=with_preset("emotion", self.emotion_preset, self.emotion, chinese),
            pace=with_preset("pace", self.pace_preset, self.pace, chinese),
            position=with_preset("place", self.place_preset, self.position, chinese),
        )


@dataclass(frozen=True)
class StructuredPrompt:
    """The parts of a prompt, in the order of the paper's caption format.

    `visual`: subjects, setting, light, style; `dynamics`: what happens over time; `camera`: camera and
    composition; `audio`: ambience, effects, music, room; `spans`: what is said, in order. Any part may be empty.
    `language`: of the connecting words, "en", "zh" or "auto" (by the text given). `no_speech` says that nobody
    speaks. `shot`, `movement` (before `camera`) and `sound_field` (before `audio`): names in `presets.PRESETS`, said in
    the prompt's language; "" or "none" for none.
    """

    visual: str = ""
    dynamics: str = ""
    camera: str = ""
    audio: str = ""
    spans: list[SpanSpec] = field(default_factory=list)
    language: str = "auto"
    no_speech: bool = False
    shot: str = ""
    movement: str = ""
    sound_field: str = ""

    def render(self) -> str:
        """One paragraph: picture, events, speech as `<S>words<E>`, camera, sound. "" if every part is empty.

        Raises `ValueError` for a span without words, spans together with `no_speech`, for speech marks or reserved
        tokens inside a part, for an unknown language and for a preset that there is not.
        """
        if self.language not in _LANGUAGES:
            raise ValueError(f"Unknown prompt language “{self.language}”: choose one of {', '.join(_LANGUAGES)}.")
        self._check()
        chinese = self._is_chinese()
        style = _Chinese if chinese else _English
        moved = with_preset("movement", self.movement, self.camera, chinese)
        sentences = [
            style.sentence(self.visual),
            style.labelled(style.dynamics, self.dynamics),
            *(style.speech(span.in_words(chinese), i) for i, span in enumerate(self.spans)),
            style.labelled(style.camera, with_preset("shot", self.shot, moved, chinese)),
            style.labelled(style.audio, with_preset("sound_field", self.sound_field, self.audio, chinese)),
            style.no_speech if self.no_speech else "",
        ]
        return style.join([s for s in sentences if s])

    def _parts(self) -> dict[str, str]:
        return {"visual": self.visual, "dynamics": self.dynamics, "camera": self.camera, "audio": self.audio}

    def _check(self) -> None:
        for name, text in self._parts().items():
            _refuse_marks(text, f"The {name} description")
        if self.no_speech and self.spans:
            raise ValueError("Nobody is to speak, but there are speech spans: remove them, or turn no_speech off.")
        for i, span in enumerate(self.spans):
            if not span.words.strip():
                raise ValueError(f"Speech span {i + 1} has no words: write what is said, or remove the span.")
            for name in ("words", "speaker", "voice", "emotion", "pace", "position"):
                _refuse_marks(getattr(span, name), f"The {name} of speech span {i + 1}")

    def _is_chinese(self) -> bool:
        if self.language != "auto":
            return self.language == "zh"
        described = [*self._parts().values()]
        for span in self.spans:
            described += [span.speaker, span.voice, span.emotion, span.pace, span.position]
        text = " ".join(described)
        # The words alone decide only where nothing else is written: English lines are common in Chinese prompts.
        text = text if text.strip() else " ".join(span.words for span in self.spans)
        return len(_HAN.findall(text)) > len(_LATIN_WORD.findall(text))


def _refuse_marks(text: str, where: str) -> None:
    if contains_marks(text):
        raise ValueError(
            f"{where} contains {SPAN_START}, {SPAN_END} or <extra_id_n>: speech marks are put in automatically, "
            "give spoken words as a speech span."
        )


def _flat(text: str) -> str:
    return " ".join(text.split())


def _phrase(text: str) -> str:
    """A fragment for use inside a sentence: one line, without closing punctuation."""
    return _flat(text).rstrip(_TRAILING + ".。")


def _mentions(text: str, words: tuple[str, ...]) -> bool:
    return any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in words)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


class _English:
    dynamics = "As the clip plays"
    camera = "Camera and framing"
    audio = "On the soundtrack"
    no_speech = "Nobody speaks in this clip, and no narrator is heard."

    @staticmethod
    def sentence(text: str) -> str:
        text = _flat(text)
        if not text or _SENTENCE_END.search(text):
            return _capital(text)
        return _capital(text.rstrip(_TRAILING)) + "."

    @classmethod
    def labelled(cls, label: str, text: str) -> str:
        text = _flat(text)
        return cls.sentence(f"{label}: {text}") if text else ""

    @classmethod
    def speech(cls, span: SpanSpec, index: int) -> str:
        speaker = _phrase(span.speaker) or "a voice"
        if index:
            speaker = re.sub(r"^(The|An|A)\b", lambda m: m.group().lower(), speaker)
            speaker = f"then {speaker}"
        manner = [m for m in (cls._voice(span), cls._emotion(span), cls._pace(span), cls._place(span)) if m]
        opening = f"{speaker} speaks {', '.join(manner)}, saying" if manner else f"{speaker} says"
        return f"{_capital(opening)}: {SPAN_START}{_flat(span.words)}{SPAN_END}"

    @staticmethod
    def _with_article(text: str) -> str:
        if re.match(r"(an?|the|his|her|their|its)\b", text, re.IGNORECASE):
            return text
        return f"{'an' if text[0].lower() in 'aeiou' else 'a'} {text}"

    @classmethod
    def _voice(cls, span: SpanSpec) -> str:
        text = _phrase(span.voice)
        if not text:
            return ""
        text = text if _mentions(text, ("voice", "timbre", "tone")) else f"{text} voice"
        return f"in {cls._with_article(text)}"

    @classmethod
    def _emotion(cls, span: SpanSpec) -> str:
        text = _phrase(span.emotion)
        if not text:
            return ""
        text = text if _mentions(text, ("tone", "mood", "emotion", "feeling")) else f"{text} tone"
        return f"with {cls._with_article(text)}"

    @classmethod
    def _pace(cls, span: SpanSpec) -> str:
        text = _phrase(span.pace)
        if not text or re.search(r"^\w+ly\b|(ly|fast)$", text, re.IGNORECASE):
            return text
        text = text if _mentions(text, ("pace", "rate", "speed", "tempo")) else f"{text} pace"
        return f"at {cls._with_article(text)}"

    @staticmethod
    def _place(span: SpanSpec) -> str:
        text = _phrase(span.position)
        if not text:
            return ""
        placed = re.match(r"(from|at|on|in|near|behind|beside|above|below|to|off|across)\b", text, re.IGNORECASE)
        return f"heard {text}" if placed else f"heard from {text}"

    @staticmethod
    def join(sentences: list[str]) -> str:
        return " ".join(sentences)


class _Chinese:
    dynamics = "动作随时间展开"
    camera = "镜头与构图"
    audio = "声音部分"
    no_speech = "片中无人开口，也没有解说。"

    @staticmethod
    def sentence(text: str) -> str:
        text = _flat(text)
        if not text or _SENTENCE_END.search(text):
            return text
        return text.rstrip(_TRAILING) + "。"

    @classmethod
    def labelled(cls, label: str, text: str) -> str:
        text = _flat(text)
        return cls.sentence(f"{label}：{text}") if text else ""

    @classmethod
    def speech(cls, span: SpanSpec, index: int) -> str:
        speaker = ("接着，" if index else "") + (_phrase(span.speaker) or "一个声音")
        voice = cls._trait(span.voice, "{}的嗓音", ("声", "嗓", "音色"))
        manner = [
            cls._trait(span.emotion, "语气透着{}", ("语气", "情绪", "口吻")),
            cls._trait(span.pace, "语速{}", ("语速", "节奏")),
            cls._trait(span.position, "声音来自{}", ("声", "来自", "从")),
        ]
        opening = "，".join([speaker + (f"用{voice}" if voice else ""), *(m for m in manner if m)])
        verb = "，开口说道" if any(manner) else "说道"
        return f"{opening}{verb}：{SPAN_START}{_flat(span.words)}{SPAN_END}"

    @staticmethod
    def _trait(text: str, frame: str, named: tuple[str, ...]) -> str:
        """`text` framed by what it describes, unless it says so itself."""
        text = _phrase(text)
        if not text or any(name in text for name in named):
            return text
        return frame.format(text.removesuffix("的"))

    @staticmethod
    def join(sentences: list[str]) -> str:
        # A space sets the spoken words off from what follows; Chinese sentences need none between them.
        out = ""
        for sentence in sentences:
            out += (" " if out.endswith(SPAN_END) else "") + sentence
        return out
