"""Speech spans, the structured prompt, voices bound to spans, default negatives."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nava_core.prompt import (
    SpanError,
    SpanSpec,
    SpeechSpan,
    StructuredPrompt,
    TokenizedPrompt,
    bind_voices,
    clean_text,
    default_negative,
    insert_sentinels,
    negative_text,
    parse_spans,
    span_voices,
    timbre_inputs,
)

# --- spans


def test_spans_in_order_with_positions():
    prompt = "He says: <S>Hello there.<E> She: <S> 你好 <E>"
    spans = parse_spans(prompt)
    assert [s.words for s in spans] == ["Hello there.", "你好"]
    assert [s.index for s in spans] == [0, 1]
    assert prompt[spans[0].start : spans[0].end] == "<S>Hello there.<E>"
    assert prompt[spans[1].start : spans[1].end] == "<S> 你好 <E>"


def test_no_spans():
    assert parse_spans("") == []
    assert parse_spans("a <s> lower case <e>, < S >, and <E without end") == []


@pytest.mark.parametrize(
    ("prompt", "position", "message"),
    [
        ("He says <S>hello", 8, "never closed"),
        ("<S>a<E> and <S>b", 12, "never closed"),
        ("hello<E>", 5, "never opened"),
        ("<S>a<E>b<E>", 8, "never opened"),
        ("<S>one <S>two<E>", 7, "inside the one opened at character 0"),
        ("ab<S><E>", 2, "no words"),
        ("ab<S> \n\t　<E>", 2, "no words"),
        ("<S><extra_id_2>hello<E>", 3, "reserved token"),
        ("a <extra_id_17>", 2, "reserved token"),
    ],
)
def test_wrong_marks_say_where(prompt, position, message):
    with pytest.raises(SpanError, match=message) as caught:
        parse_spans(prompt)
    assert caught.value.position == position
    assert str(position) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


WORDS = st.text(max_size=20).filter(lambda t: t.strip() and not re.search("<S>|<E>|<extra_id", t))
GAPS = st.text(max_size=20).filter(lambda t: not re.search("<S>|<E>|<extra_id", t))


@settings(deadline=None)
@given(st.lists(st.tuples(GAPS, WORDS), max_size=5), GAPS)
def test_spans_are_found_as_written(parts, ending):
    prompt = "".join(f"{gap}|<S>{words}<E>|" for gap, words in parts) + ending
    spans = parse_spans(prompt)
    assert [s.words for s in spans] == [words.strip() for _, words in parts]
    assert all(prompt[s.start : s.end].startswith("<S>") and prompt[s.start : s.end].endswith("<E>") for s in spans)
    assert insert_sentinels(prompt).count("<S><extra_id_2>") == len(parts)


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from(list("<SE>_ab ")), max_size=30))
def test_parsing_never_fails_otherwise(prompt):
    position, spans = 0, []
    try:
        spans = parse_spans(prompt)
    except SpanError as error:
        position = error.position
    else:
        assert len(spans) == prompt.count("<S>") == prompt.count("<E>")
    assert 0 <= position <= max(0, len(prompt) - 1)


def test_sentinel_goes_behind_each_mark():
    assert insert_sentinels("a<S>b<E><S>c<E>") == "a<S><extra_id_2>b<E><S><extra_id_2>c<E>"


def test_the_makers_other_closing_mark_is_the_same():
    (first, second) = parse_spans("a <S>one</S> b <S>two<E>")
    assert (first.words, second.words, first.end) == ("one", "two", 12)
    assert insert_sentinels("a <S>one</S>") == insert_sentinels("a <S>one<E>")
    for wrong in ("one</S>", "<S>one</S><E>", "<S></S>"):
        with pytest.raises(SpanError):
            parse_spans(wrong)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \n\t b　c  ", "a b c"),
        ("rock &amp;amp; roll", "rock & roll"),
        ("<S>a &amp;amp; b<E>", "<S>a & b<E>"),
        ("<S>it&#39;s &lt;3<E>", "<S>it's <3<E>"),
        ("sch\u00c3\u00b6n", "schön"),
        ("“quoted” ＡＢＣ，", '"quoted" ABC,'),
        ("", ""),
    ],
)
def test_cleaning(raw, clean):
    assert clean_text(raw) == clean


def test_missing_ftfy_is_a_sentence():
    code = (
        "import sys; sys.modules['ftfy'] = None\n"
        "from nava_core.prompt import clean_text\n"
        "try: clean_text('a')\n"
        "except RuntimeError as e: print(e)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert "pip install ftfy" in done.stdout


# --- voices


def spans_of(n):
    return [SpeechSpan(f"line {i}", 0, 1, i) for i in range(n)]


@pytest.mark.parametrize(
    ("spans", "voices", "assignment", "binding"),
    [
        (0, 0, None, []),
        (3, 0, None, [None, None, None]),
        (1, 1, None, [0]),
        (4, 1, None, [0, 0, 0, 0]),
        (5, 5, None, [0, 1, 2, 3, 4]),
        (3, 2, [1, None, 0], [1, None, 0]),
        (3, 1, [None, 0, None], [None, 0, None]),
        (2, 3, [2, 2], [2, 2]),
        (2, 0, [None, None], [None, None]),
    ],
)
def test_binding(spans, voices, assignment, binding):
    assert bind_voices(spans_of(spans), ["v"] * voices, assignment) == binding


@pytest.mark.parametrize(
    ("spans", "voices", "assignment", "message"),
    [
        (0, 1, None, "1 voice given but the prompt has no speech span"),
        (1, 2, None, "2 voices given but the prompt has 1 speech span"),
        (3, 2, None, "2 voices given for 3 speech spans"),
        (2, 1, [0], "1 entries"),
        (2, 1, [0, 1], "Span 2 is assigned voice number 2"),
        (1, 1, [-1], "Span 1 is assigned"),
        (1, 0, [0], "0 voices given"),
    ],
)
def test_binding_refuses(spans, voices, assignment, message):
    with pytest.raises(ValueError, match=message):
        bind_voices(spans_of(spans), ["v"] * voices, assignment)


def tokenized(positions):
    spans = spans_of(len(positions))
    return TokenizedPrompt([5, 6, 1], positions, spans, 3, "", 512, ["whole"] * len(spans))


def test_timbre_inputs():
    first, second = torch.full((1, 192), 2.0), torch.full((192,), 3.0, dtype=torch.bfloat16)
    timbre, positions = timbre_inputs(tokenized([4, 9, -1]), [first, second], [1, None, 0])
    assert timbre.shape == (1, 3, 192)
    assert timbre.dtype == torch.float32
    assert timbre[0, :, 0].tolist() == [3.0, 0.0, 2.0]
    assert timbre[0, 1].abs().sum() == 0
    assert positions.tolist() == [[4, 9, -1]]
    assert positions.dtype == torch.int64


def test_one_voice_serves_all_and_none_gives_none():
    timbre, positions = timbre_inputs(tokenized([1, 2]), [torch.ones(1, 192)])
    assert torch.equal(timbre, torch.ones(1, 2, 192))
    assert positions.tolist() == [[1, 2]]
    assert timbre_inputs(tokenized([1, 2]), []) == (None, None)
    assert timbre_inputs(tokenized([]), []) == (None, None)


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        (torch.zeros(2, 192), r"shape \(2, 192\)"),
        (torch.zeros(1, 256), "expected a"),
        (torch.full((1, 192), float("nan")), "NaN"),
    ],
)
def test_bad_voice(voice, message):
    with pytest.raises(ValueError, match=message):
        timbre_inputs(tokenized([1]), [voice])


def test_voices_bound_by_span_object():
    a, b = torch.ones(1, 192), torch.zeros(1, 192)
    voices, assignment = span_voices(
        [SpanSpec("1", timbre=a), SpanSpec("2"), SpanSpec("3", timbre=b), SpanSpec("4", timbre=a)]
    )
    assert len(voices) == 2
    assert voices[0] is a
    assert voices[1] is b
    assert assignment == [0, None, 1, 0]
    assert bind_voices(spans_of(4), voices, assignment) == assignment


# --- the structured prompt

MAN = SpanSpec(
    "Hello there,\n my friend.",
    "The man in the grey coat.",
    "deep, raspy male",
    "restrained",
    "slow",
    "the left, close by",
)


def full(language="auto"):
    return StructuredPrompt(
        visual="a rainy street at night,\nneon light;",
        dynamics="The man turns slowly. He frowns!",
        camera="static medium shot",
        audio="rain on asphalt; no music.",
        spans=[MAN, SpanSpec("Go!", "The girl", pace="quickly")],
        language=language,
    )


def test_english_paragraph():
    assert full().render() == (
        "A rainy street at night, neon light. "
        "As the clip plays: The man turns slowly. He frowns! "
        "The man in the grey coat speaks in a deep, raspy male voice, with a restrained tone, at a slow pace, "
        "heard from the left, close by, saying: <S>Hello there, my friend.<E> "
        "Then the girl speaks quickly, saying: <S>Go!<E> "
        "Camera and framing: static medium shot. "
        "On the soundtrack: rain on asphalt; no music."
    )


def test_chinese_paragraph():
    prompt = StructuredPrompt(
        visual="雨夜的街道，霓虹闪烁，",
        dynamics="男子缓缓转身。",
        camera="固定中景",
        audio="雨声",
        spans=[
            SpanSpec("We have to go.", "灰衣男子", "低沉沙哑的", "压抑的愤怒", "缓慢", "画面左侧"),
            SpanSpec("好的。", "女孩", voice="清亮的女声", pace="语速很快"),
        ],
    )
    assert prompt.render() == (
        "雨夜的街道，霓虹闪烁。动作随时间展开：男子缓缓转身。"
        "灰衣男子用低沉沙哑的嗓音，语气透着压抑的愤怒，语速缓慢，声音来自画面左侧，开口说道：<S>We have to go.<E> "
        "接着，女孩用清亮的女声，语速很快，开口说道：<S>好的。<E> "
        "镜头与构图：固定中景。声音部分：雨声。"
    )


@pytest.mark.parametrize(
    ("prompt", "chinese"),
    [
        (StructuredPrompt("雨夜的街道", spans=[SpanSpec("We have to move fast and take them all down.")]), True),
        (StructuredPrompt("a street", spans=[SpanSpec("我们必须马上离开这里，快一点。")]), False),
        (StructuredPrompt(spans=[SpanSpec("我们走吧。")]), True),
        (StructuredPrompt(spans=[SpanSpec("Let us go.")]), False),
        (StructuredPrompt("雨夜的街道", camera="close up", language="en"), False),
        (StructuredPrompt("a street", camera="close up", language="zh"), True),
    ],
)
def test_language_of_the_connecting_words(prompt, chinese):
    text = prompt.render()
    assert (("说道" in text) or ("镜头" in text)) is chinese


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("missing", ["visual", "dynamics", "camera", "audio", "spans"])
def test_missing_parts_leave_no_trace(language, missing):
    parts = {"visual": "red fox", "dynamics": "it runs", "camera": "wide", "audio": "wind", "spans": [SpanSpec("Hi")]}
    text = StructuredPrompt(**{**parts, missing: [] if missing == "spans" else "  "}, language=language).render()
    others = [k for k in parts if k not in (missing, "spans")]
    assert all(parts[k].lower() in text.lower() for k in others)
    assert not re.search(r"[:：][.。]|\s\s|[.。][.。]|[:：]\s*$", text)
    assert len(parse_spans(text)) == (missing != "spans")


def test_empty_prompt_renders_to_nothing():
    assert StructuredPrompt().render() == ""


def test_spans_stay_in_order():
    words = [f"Line {i}." for i in range(6)]
    prompt = StructuredPrompt("x", spans=[SpanSpec(w) for w in words])
    assert [s.words for s in parse_spans(prompt.render())] == words
    assert [s.words for s in prompt.spans] == words


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_span_without_words_is_named(empty):
    with pytest.raises(ValueError, match="Speech span 2 has no words"):
        StructuredPrompt(spans=[SpanSpec("a"), SpanSpec(empty)]).render()


@pytest.mark.parametrize("mark", ["<S>", "<E>", "<extra_id_2>", "<extra_id_299>", "&lt;E&gt;", "＜E＞"])
@pytest.mark.parametrize("where", ["visual", "audio", "words", "speaker", "position"])
def test_marks_inside_a_part_are_refused(mark, where):
    text = f"some {mark} text"
    prompt = (
        StructuredPrompt(**{where: text})
        if where in ("visual", "audio")
        else StructuredPrompt(spans=[SpanSpec(**{"words": "a", where: text})])
    )
    with pytest.raises(ValueError, match=where):
        prompt.render()


def test_unknown_language():
    with pytest.raises(ValueError, match="fr"):
        StructuredPrompt("x", language="fr").render()


TEXT = st.text(alphabet=st.sampled_from(list("abc Tz.,!。，：;的声\n“）")), max_size=20)


@settings(deadline=None)
@given(
    TEXT,
    TEXT,
    TEXT,
    TEXT,
    st.lists(st.builds(SpanSpec, TEXT.filter(str.strip), TEXT, TEXT, TEXT, TEXT, TEXT), max_size=3),
)
def test_any_parts_make_one_paragraph(visual, dynamics, camera, audio, spans):
    for language in ("en", "zh", "auto"):
        text = StructuredPrompt(visual, dynamics, camera, audio, spans, language).render()
        assert "\n" not in text
        assert text == text.strip()
        assert [s.words for s in parse_spans(text)] == [" ".join(s.words.split()) for s in spans]


# --- default negatives


def test_default_negatives():
    texts = [default_negative(kind, language) for kind in ("video", "audio") for language in ("en", "zh")]
    assert len(set(texts)) == 4
    assert all(len(t) > 30 and not parse_spans(t) for t in texts)
    assert all(re.search(r"[\u4e00-\u9fff]", t) for t in texts[1::2])
    assert "picture" in default_negative("video", "en")
    assert "picture" not in default_negative("audio", "en")
    with pytest.raises(ValueError, match="video, audio"):
        default_negative("image")
    with pytest.raises(ValueError, match="en, zh"):
        default_negative("video", "fr")


def test_a_clips_negative_is_the_chinese_one_of_its_mode_unless_chosen():
    video, audio = default_negative("video", "zh"), default_negative("audio", "zh")
    for mode, text in (("video+audio", video), ("video", video), ("audio", audio)):
        assert negative_text(None, mode) == negative_text("default", mode) == text
        assert negative_text("zero", mode) == negative_text(" ", mode) == ""
        assert negative_text(" blurred\n", mode) == "blurred"
    for fault in ("画面", "口型", "底噪", "吐字含混"):  # of picture and of sound together
        assert fault in video
    assert "画面" not in audio
    assert all(term.strip() for text in (video, audio) for term in text.split("，"))


def test_no_speech_is_said_and_excludes_spans():
    from nava_core.prompt import SpanSpec, StructuredPrompt

    plain, silent = (StructuredPrompt("A harbour at dawn.", no_speech=on).render() for on in (False, True))
    assert silent.startswith(plain)
    assert "Nobody speaks" in silent.removeprefix(plain)
    assert "无人开口" in StructuredPrompt("清晨的港口。", no_speech=True).render()
    with pytest.raises(ValueError, match="no_speech off"):
        StructuredPrompt("A harbour.", spans=[SpanSpec("Hello.")], no_speech=True).render()


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_default_negative_follows_the_text(kind):
    from nava_core.prompt import default_negative, with_default_negative

    terms = default_negative(kind, "en")
    assert with_default_negative("  ", kind, "en") == terms
    assert with_default_negative("rain, ", kind, "en") == f"rain, {terms}"
    assert with_default_negative("下雨。", kind, "zh") == f"下雨，{default_negative(kind, 'zh')}"
