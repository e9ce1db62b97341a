"""What is said of a prompt before it is encoded: spans, faults, tokens, speech time, voices; and the canvas's own copy
of the quick part of it."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from nava_core.prompt import (
    PRESETS,
    BindingError,
    PromptTokenizer,
    SpanSpec,
    StructuredPrompt,
    check_prompt,
    parse_spans,
    scan_spans,
    speech_seconds,
)
from nava_core.prompt import check as check_module
from nava_core.prompt import speech_time as time_module
from nava_core.prompt.check import estimate_tokens
from nava_core.prompt.presets import preset_text, with_preset
from nava_core.prompt.speech_time import HURRY, least_speech_seconds
from nava_core.prompt.voices import bind_voices

spec = importlib.util.spec_from_file_location("_sentencepiece", Path(__file__).with_name("_sentencepiece.py"))
_sentencepiece = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_sentencepiece)
JS = Path(__file__).parents[2] / "js"
PROMPTS = [
    "",
    "A quiet street at night.",
    "A woman says <S>Hello there, my friend.<E> and waits.",
    "一位女士说：<S>你好，很高兴见到你。<E> 镜头缓慢推进。",
    "He says <S>It's 3 o'clock, mother-in-law; 再见<E> — fine…",
    "never closed <S>words",
    "<S>one <S>two<E> three<E> <S> <E> <extra_id_2>",
    "closed oddly <S>Bonjour à tous</S> café ½ naïve",
    "<S>" + "word " * 40 + "<E>",
    "long " * 500,
    "他说：＜S＞你好。＜E＞ then <s>hello</s> <S>yes<E>",
    "<S>" * 30,
    "emoji 🎬 then <S>Grüße 🎤 aus Köln<E>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer(_sentencepiece.train(400))


# --- speech time


def test_english_is_counted_in_words_and_chinese_in_characters():
    assert speech_seconds("one two three four five") == pytest.approx(2.0)
    assert speech_seconds("一二三四五六七八九十一二三四五六七八九十一二三四五") == pytest.approx(6.0)
    assert speech_seconds("hello 你好") == pytest.approx(1 / 2.5 + 2 * 6 / 25)
    assert speech_seconds("don't — stop!") == speech_seconds("do stop")
    assert speech_seconds("… ?! ") == 0
    assert speech_seconds("1987") == pytest.approx(4 * 6 / 25)


def test_a_hurry_has_its_limit():
    assert least_speech_seconds("word " * 15) == pytest.approx(6 / HURRY)


@pytest.mark.parametrize(
    ("words", "codes"), [(15, []), (16, ["hurried_speech"]), (20, ["hurried_speech"]), (22, ["too_much_speech"])]
)
def test_speech_against_the_clip(words, codes):
    said = check_prompt(f"<S>{'word ' * words}<E>", clip_seconds=6)
    assert [problem.code for problem in said.problems] == codes
    assert bool(said.speech_warnings()) == ("too_much_speech" in codes)


def test_a_longer_clip_has_room():
    prompt = f"<S>{'word ' * 22}<E>"
    assert check_prompt(prompt, clip_seconds=10).problems == []
    unknown = check_prompt(prompt)
    assert (unknown.clip_seconds, unknown.clip_assumed) == (6, True)
    assert "usual 6 s" in unknown.speech_line()
    assert check_prompt("<S>word<E>", clip_seconds=5).speech_line() == "Speech: about 0.4 s of 5 s."
    assert check_prompt("no speech", clip_seconds=5).speech_line() == ""


# --- spans and faults


def test_all_faults_are_told_and_the_first_is_what_parsing_raises():
    prompt = "<S>one <S>two<E> three<E> <S> <E> <extra_id_2> <S>open"
    spans, faults = scan_spans(prompt)
    assert [span.words for span in spans] == ["two"]
    assert [fault.kind for fault in faults] == ["nested", "unopened", "empty", "reserved", "unclosed"]
    with pytest.raises(ValueError, match="inside the one opened") as error:
        parse_spans(prompt)
    assert str(error.value) == str(faults[0])
    problems = check_prompt(prompt, voices=3).problems
    assert [problem.code for problem in problems] == ["nested", "unopened", "empty", "reserved", "unclosed"]
    assert [prompt[problem.position] for problem in problems] == list("<<<<<")
    assert all(problem.severity == "error" for problem in problems)


@pytest.mark.parametrize("mark", ["＜S＞", "<s>", "＜Ｅ＞", "< E >", "</s>", "<／S>"])
def test_marks_that_are_none_are_told_of(mark):
    said = check_prompt(f"She says {mark}hello")
    assert [(problem.code, problem.position) for problem in said.problems] == [("misspelt", 9)]
    assert mark in said.mark_warnings()[0]
    assert not check_prompt("She <so> says <S>yes</S> and <S>no<E>").problems


def test_of_many_faults_the_first_are_told():
    assert len(check_prompt("<S>" * 20_000).problems) == 20 + 1, "and that it is too long"


@pytest.mark.parametrize(
    ("prompt", "voices", "code", "bound"),
    [
        ("<S>a<E> <S>b<E>", 0, None, [None, None]),
        ("<S>a<E> <S>b<E>", 1, None, [1, 1]),
        ("<S>a<E> <S>b<E>", 2, None, [1, 2]),
        ("<S>a<E> <S>b<E>", 3, "too_many_voices", [None, None]),
        ("<S>a<E> <S>b<E> <S>c<E>", 2, "too_few_voices", [None, None, None]),
        ("silence", 1, "no_span", []),
    ],
)
def test_voices_are_bound_as_they_will_be(prompt, voices, code, bound):
    said = check_prompt(prompt, voices=voices)
    assert [span.voice for span in said.spans] == bound
    assert [problem.code for problem in said.problems] == ([code] if code else [])
    if code:
        with pytest.raises(BindingError) as error:
            bind_voices(parse_spans(prompt), range(voices))
        assert (error.value.kind, str(error.value)) == (code, said.problems[0].message)


def test_an_assignment_binds_outright():
    said = check_prompt("<S>a<E> <S>b<E>", voices=1, assignment=[None, 0])
    assert [span.voice for span in said.spans] == [None, 1]
    assert check_prompt("<S>a<E>", voices=1, assignment=[3]).problems[0].code == "assignment"


# --- tokens


@pytest.mark.parametrize("prompt", [p for p in PROMPTS if "<extra" not in p])
def test_tokens_are_the_tokenizers(tokenizer, prompt):
    said = check_prompt(prompt, tokenizer=tokenizer)
    assert said.exact
    if prompt and not any(problem.severity == "error" for problem in said.problems):
        assert said.tokens == tokenizer(prompt).total_tokens


def test_tokens_are_counted_in_a_faulty_prompt_too(tokenizer):
    whole, open_ = (check_prompt(f"She says <S>hello{end}", tokenizer=tokenizer).tokens for end in ("<E>", ""))
    assert 0 < open_ < whole


def test_what_is_cut_is_told_of(tokenizer):
    small = PromptTokenizer(_sentencepiece.train(400), max_length=16)
    said = check_prompt("A <S>first<E> and " + "very " * 40 + "<S>last<E>", tokenizer=small)
    assert [problem.code for problem in said.problems] == ["too_long", "span_lost"]
    assert said.spans[1].fate == "lost"
    assert check_prompt("long " * 500).problems[0].code == "too_long"


def test_an_estimate_is_near_for_ordinary_text():
    """umt5 itself is not here: between one and two tokens a word, and none for nothing."""
    assert 100 <= estimate_tokens("A woman walks slowly down the street. " * 14 + "She stops.") <= 200
    assert estimate_tokens(" ") == 0


def test_it_is_plain_data(tokenizer):
    data = json.loads(json.dumps(check_prompt("<S>a<E> 你好 <S>", tokenizer=tokenizer, voices=1).as_dict()))
    assert data["spans"][0]["words"] == "a"
    assert data["problems"][0]["code"] == "unclosed"


# --- presets


def test_presets_are_said_in_the_prompts_language():
    span = SpanSpec("Hello", emotion="amused", pace_preset="slow", place_preset="left", emotion_preset="calm")
    text = StructuredPrompt(
        "A woman", camera="85 mm", spans=[span], shot="close-up", movement="follow", sound_field="open air"
    ).render()
    for said in (
        "calm, amused tone",
        "slowly",
        "from the left",
        "close-up of the face",
        "follows",
        "85 mm",
        "open-air",
    ):
        assert said in text
    chinese = StructuredPrompt(
        "一位女士", spans=[span], shot="close-up", sound_field="large hall", language="zh"
    ).render()
    for said in ("平静，amused", "缓慢", "左侧", "面部近景", "大厅"):
        assert said in chinese


def test_no_preset_changes_nothing():
    plain = StructuredPrompt("A woman", camera="still", spans=[SpanSpec("Hi", pace="slowly")]).render()
    span = SpanSpec("Hi", pace="slowly", pace_preset="none", emotion_preset="", place_preset="none")
    assert StructuredPrompt("A woman", camera="still", spans=[span], shot="none", movement="").render() == plain


@pytest.mark.parametrize("kind", sorted(PRESETS))
def test_every_preset_has_both_languages_and_reads_well(kind):
    for name, (english, chinese) in PRESETS[kind].items():
        assert english.isascii()
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese)
        assert with_preset(kind, name, "x", False) == f"{english}, x"
        field = {"emotion": "emotion_preset", "pace": "pace_preset", "place": "place_preset"}.get(kind)
        if field:
            text = StructuredPrompt("A man", spans=[SpanSpec("Hi", **{field: name})]).render()
            assert english in text
            assert "from from" not in text
            assert not any(f"{article} {english} pace" in text for article in ("a", "an")), text


def test_an_unknown_preset_is_one_sentence():
    with pytest.raises(ValueError, match="No shot preset “sideways”: choose one of none, extreme close-up"):
        preset_text("shot", "sideways", False)


# --- the canvas's copy


def by_the_canvas(script):
    """What a script prints that has the canvas's own check as ``js``."""
    if not shutil.which("node"):
        pytest.skip("no node: install Node.js to run the canvas's own check")
    script = f"const js = await import({json.dumps((JS / 'prompt_check.js').as_uri())});{script}"
    done = subprocess.run(
        ["node", "--no-warnings", "--experimental-default-type=module", "--input-type=module", "-e", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_canvas_is_not_held_up_by_nonsense():
    took = "const begun = Date.now(); js.checkPrompt('<S>'.repeat(20000)); console.log(Date.now() - begun);"
    assert by_the_canvas(took) < 1500


def test_the_canvas_has_the_same_rates_and_rules():
    names = [
        *((check_module, name) for name in ("MAX_TOKENS", "USUAL_CLIP_SECONDS", "MAX_FAULTS")),
        *((check_module, f"TOKENS_A_{name}") for name in ("WORD", "CHARACTER", "SIGN", "SPAN")),
        *((time_module, name) for name in ("WORDS_A_SECOND", "CHARACTERS_A_SECOND", "HURRY")),
    ]
    cases = [[prompt, voices, seconds] for prompt in PROMPTS for voices, seconds in ((0, 0), (2, 6), (1, 4.5))]
    script = f"""
        const cases = {json.dumps(cases)};
        const said = cases.map(([prompt, voices, seconds]) => js.checkPrompt(prompt, {{ voices, seconds }}));
        console.log(JSON.stringify([{json.dumps([name for _, name in names])}.map((name) => js[name]), said]));
    """
    rates, said = by_the_canvas(script)
    assert rates == [getattr(module, name) for module, name in names]
    for (prompt, voices, seconds), copy in zip(cases, said, strict=True):
        real = check_prompt(prompt, voices=voices, clip_seconds=seconds or None).as_dict()
        assert [p["code"] for p in copy["problems"]] == [p["code"] for p in real["problems"]], prompt
        assert [(s["words"], s["voice"]) for s in copy["spans"]] == [(s["words"], s["voice"]) for s in real["spans"]]
        assert copy["tokens"] == real["tokens"], prompt
        assert copy["speech_seconds"] == pytest.approx(real["speech_seconds"]), prompt
        assert (copy["clip_seconds"], copy["clip_assumed"]) == (real["clip_seconds"], real["clip_assumed"])


def test_both_languages_have_words_for_every_problem():
    texts = (JS / "prompt_texts.js").read_text(encoding="utf-8")
    codes = ["nested", "unopened", "empty", "reserved", "unclosed", "no_span", "too_many_voices", "too_few_voices"]
    codes += ["misspelt", "too_long", "span_lost", "span_part", "too_much_speech", "hurried_speech", "marks"]
    assert [code for code in codes if texts.count(f"\n    {code}: ") != 2] == []
