"""Prompt tokens: equal to the Hugging Face fast tokenizer of the same model, and nothing lost in silence."""

import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nava_core.prompt import PromptTokenizer, SpanError, clean_text, insert_sentinels

spec = importlib.util.spec_from_file_location("_sentencepiece", Path(__file__).with_name("_sentencepiece.py"))
_sentencepiece = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_sentencepiece)

MODEL = _sentencepiece.train()
JSON = _sentencepiece.tokenizer_json(MODEL)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The fast tokenizer through transformers, shown to be one that reads text."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.json").write_text(JSON, encoding="utf-8")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    sample = fast("The quick brown fox").input_ids
    assert len(sample) > 4
    assert sample[-1] == 1
    assert fast.decode(sample, skip_special_tokens=True).split() == ["The", "quick", "brown", "fox"]
    assert fast.convert_tokens_to_ids("<extra_id_2>") == len(json.loads(JSON)["model"]["vocab"]) - 1 - 2
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer(MODEL)


@pytest.fixture(scope="module")
def without_bytes():
    """The same for a model that has no `<S>`, no emoji and no byte pieces."""
    corpus = [re.sub("<[SE]>", "", line) for line in _sentencepiece.ENGLISH + _sentencepiece.CHINESE] * 20
    return _sentencepiece.train(300, byte_fallback=False, corpus=corpus)


def expected(fast, prompt, max_length=512):
    text = clean_text(insert_sentinels(prompt))
    return fast(text, truncation=True, max_length=max_length).input_ids


PROMPTS = [
    "",
    " ",
    "The quick brown fox",
    "  The   quick\n\nbrown\tfox  ",
    "A woman (speaks:1.2) in ((rain)) [warm].",
    "<S>Hello there<E>",
    "<S> Hello there <E>",
    "He says:<S>Hello<E>now",
    "He says: <S>Hello there.<E> Then she: <S>I will be back<E><S>Go!<E> rain",
    "一位女士说道：<S>我很快就回来。<E> 镜头缓慢推进，霓虹灯闪烁！",
    "中英 mixed 一只fox：<S>Hello，朋友<E>",
    "🦙🦙 a fox 🦊 and <S>wow 🎉🎉<E>👩‍🚀",
    "ｆｕｌｌ　ｗｉｄｔｈ，ligature ﬁne, café, cafe\u0301, ½",
    "rock &amp; roll &amp;lt;b&amp;gt; &quot;quoted&quot; &#20320;&#22909; &lt;S&gt;not a span&lt;E&gt;",
    "“curly” ‘quotes’ — dash… â€œmojibakeâ€",
    "zzzz qqqq ЖЖЖ ωωω ひらがな",
    "a <s> b </s> c <pad> d <unk>e",
    "<S>one<E>" * 9,
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_the_fast_tokenizer(tokenizer, reference, prompt):
    assert tokenizer(prompt).ids == expected(reference, prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_without_byte_pieces(without_bytes, prompt, tmp_path):
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(_sentencepiece.tokenizer_json(without_bytes))
    ids = fast.encode(clean_text(insert_sentinels(prompt))).ids
    assert PromptTokenizer(without_bytes)(prompt).ids == ids


@pytest.mark.parametrize("length", [1, 2, 24, 512])
@pytest.mark.parametrize("text", ["The quick brown fox jumps. ", "镜头缓慢推进，", "<S>Hello there<E> rain ", "🦙 "])
def test_cut_equals_the_fast_tokenizer(reference, length, text):
    tokenized = PromptTokenizer(MODEL, max_length=length)(text * 400)
    assert tokenized.ids == expected(reference, text * 400, length)
    assert len(tokenized.ids) == length
    assert tokenized.ids[-1] == 1
    assert tokenized.is_cut


TEXTS = st.text(
    alphabet=st.sampled_from(list("abcdeTH zqé.,:;!?'\"()&<>/0123 \n\t，。！一位女士镜头龘ж🦙🎉½ﬁＡ")), max_size=60
)


@settings(max_examples=250, deadline=None)
@given(TEXTS)
def test_any_plain_text_equals(text):
    fast, tokenizer = _fast(), _ours()
    assert tokenizer(text).ids == fast.encode(clean_text(text)).ids


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(lambda t: t.strip())), min_size=1, max_size=4), TEXTS)
def test_any_prompt_with_spans_equals(parts, ending):
    prompt = "".join(f"{before}<S>{words}<E>" for before, words in parts) + ending
    tokenized = _ours()(prompt)
    assert tokenized.ids == _fast().encode(clean_text(insert_sentinels(prompt))).ids
    assert [tokenized.ids[i] for i in tokenized.timbre_positions] == [_ours().sentinel_id] * len(parts)
    assert [s.words for s in tokenized.spans] == [words.strip() for _, words in parts]


@lru_cache(maxsize=1)
def _fast():
    from tokenizers import Tokenizer

    return Tokenizer.from_str(JSON)


@lru_cache(maxsize=1)
def _ours():
    return PromptTokenizer(MODEL)


def test_sentinel_id_is_counted_behind_the_pieces(tokenizer):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=MODEL).get_piece_size()
    assert tokenizer.sentinel_id == pieces + 300 - 1 - 2
    assert tokenizer.vocab_size == pieces + 300
    assert tokenizer.encode("<extra_id_2>Hello") == [tokenizer.sentinel_id, *tokenizer.encode("Hello")]


def test_model_that_holds_the_sentinels_keeps_their_ids():
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentencepiece.ENGLISH * 5),
        model_writer=out,
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"],
        num_threads=1,
        minloglevel=2,
    )
    own = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    tokenizer = PromptTokenizer(out.getvalue())
    assert tokenizer.sentinel_id == own.piece_to_id("<extra_id_2>") == 6
    assert tokenizer.vocab_size == own.get_piece_size()


def _folder(tmp_path, *names, shift=0):
    files = {
        "spiece.model": MODEL,
        "tokenizer.json": JSON.encode(),
        "added_tokens.json": json.dumps({"<extra_id_2>": 5000 + shift}).encode(),
        "tokenizer_config.json": json.dumps(
            {"added_tokens_decoder": {str(6000 + shift): {"content": "<extra_id_2>"}}}
        ).encode(),
    }
    for name in names:
        (tmp_path / name).write_bytes(files[name])
    return tmp_path


@pytest.mark.parametrize("names", [["spiece.model"], ["tokenizer.json"], ["spiece.model", "tokenizer.json"]])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_folder_gives_the_same_ids(tmp_path, tokenizer, names, prompt):
    loaded = PromptTokenizer.from_folder(_folder(tmp_path, *names))
    ours, theirs = tokenizer(prompt), loaded(prompt)
    assert theirs.ids == ours.ids
    assert theirs.timbre_positions == ours.timbre_positions
    assert theirs.span_fate == ours.span_fate
    assert (loaded.sentinel_id, loaded.end_id) == (tokenizer.sentinel_id, tokenizer.end_id)


def test_folder_lists_the_sentinel(tmp_path):
    folder = _folder(tmp_path, "spiece.model", "added_tokens.json")
    assert PromptTokenizer.from_folder(folder).sentinel_id == 5000
    _folder(tmp_path, "tokenizer_config.json")
    assert PromptTokenizer.from_folder(folder).sentinel_id == 6000
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert PromptTokenizer.from_folder(folder).sentinel_id == 5000


def test_folder_above_the_makers_layout(tmp_path, tokenizer):
    inner = tmp_path / "google" / "umt5-xxl"
    inner.mkdir(parents=True)
    _folder(inner, "spiece.model")
    assert PromptTokenizer.from_folder(tmp_path)("The fox").ids == tokenizer("The fox").ids


def test_uint8_tensor_as_comfyui_holds_it(tokenizer):
    tensor = torch.frombuffer(bytearray(MODEL), dtype=torch.uint8)
    assert PromptTokenizer(tensor)(PROMPTS[8]).ids == tokenizer(PROMPTS[8]).ids


def test_empty_prompt_is_the_end_token(tokenizer):
    tokenized = tokenizer("")
    assert tokenized.ids == [1]
    assert tokenized.total_tokens == 1
    assert not tokenized.is_cut


def test_weights_are_text(tokenizer):
    assert tokenizer("(neon:1.2)").ids != tokenizer("neon").ids
    assert "1.2" in "".join(text for _, text in tokenizer._backend.pieces("(neon:1.2)"))


def test_what_is_cut_is_reported():
    head = "The quick brown fox jumps over the lazy dog. "
    prompt = f"<S>Hello there<E> {head}<S>I will be back soon, stay close<E> {head}<S>Go!<E>"
    whole = PromptTokenizer(MODEL)(prompt)
    assert whole.cut_text == ""
    assert whole.span_fate == ["whole"] * 3
    assert whole.lost_spans == []
    assert "used" in whole.report()
    assert "CUT" not in whole.report()

    limit = whole.timbre_positions[1] + 4
    cut = PromptTokenizer(MODEL, max_length=limit)(prompt)
    assert cut.span_fate == ["whole", "part", "lost"]
    assert cut.timbre_positions == [*whole.timbre_positions[:2], -1]
    assert cut.total_tokens == whole.total_tokens
    assert [s.words for s in cut.lost_spans] == ["I will be back soon, stay close", "Go!"]
    assert cut.cut_text.endswith("<S>Go!<E>")
    assert "extra_id" not in cut.cut_text
    ours = PromptTokenizer(MODEL)
    kept = ours._text(ours._backend.pieces(clean_text(insert_sentinels(prompt)))[: limit - 1])
    assert (kept + cut.cut_text).replace(" ", "") == prompt.replace(" ", "")
    report = cut.report([0, None, 1])
    lines = report.splitlines()
    assert f"{whole.total_tokens} tokens, {limit} fit" in lines[0]
    assert f"last {whole.total_tokens - limit} were cut" in lines[0]
    assert "voice 1" in lines[1]
    assert "end was CUT OFF" in lines[2]
    assert "no voice given" in lines[2]
    assert "CUT OFF, it will not be spoken" in lines[3]
    assert "voice 2" in lines[3]


@pytest.mark.parametrize("extra", [-1, 0, 1, 2])
def test_fate_at_the_edge_of_the_limit(tokenizer, extra):
    """The sentinel's own place is the border: kept at the last place before the end token, lost after it."""
    prompt = "The quick brown fox <S>Hello there<E>"
    at = tokenizer(prompt).timbre_positions[0]
    cut = PromptTokenizer(MODEL, max_length=at + 1 + extra)(prompt)
    assert cut.timbre_positions == ([at] if extra >= 1 else [-1])
    assert cut.span_fate == (["part"] if extra >= 1 else ["lost"])
    assert cut.ids[-1] == 1
    assert len(cut.ids) == at + 1 + extra


def test_end_mark_decides_whole_or_part(tokenizer):
    prompt = "fox <S>Hello there<E>"
    total = tokenizer(prompt).total_tokens
    assert PromptTokenizer(MODEL, total)(prompt).span_fate == ["whole"]
    assert PromptTokenizer(MODEL, total - 1)(prompt).span_fate == ["part"]


def test_reserved_tokens_are_refused(tokenizer):
    with pytest.raises(SpanError, match="reserved"):
        tokenizer("a <extra_id_2> b")
    with pytest.raises(ValueError, match="HTML"):
        tokenizer("a &lt;extra_id_2&gt; b")


@pytest.mark.parametrize("bad", [b"", b"<html>not found</html>" * 40, MODEL[:1000], "text", None])
def test_not_a_sentencepiece_model(bad):
    with pytest.raises(ValueError, match="expected"):
        PromptTokenizer(bad)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spiece\.model or tokenizer\.json"):
        PromptTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        PromptTokenizer.from_folder(tmp_path)
    other = json.loads(JSON)
    other["added_tokens"] = other["added_tokens"][:4]
    other["model"]["vocab"] = [p for p in other["model"]["vocab"] if "extra_id" not in p[0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="expected umt5"):
        PromptTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="max_length"):
        PromptTokenizer(MODEL, max_length=0)
