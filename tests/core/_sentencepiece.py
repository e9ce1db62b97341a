"""A small sentencepiece model with umt5's settings, and the Hugging Face `tokenizer.json` of the same model."""

import base64
import io
import json

import sentencepiece

ENGLISH = [
    "The quick brown fox jumps over the lazy dog.",
    "A woman speaks in a warm voice while rain falls on the window.",
    "He whispers: I will be back soon, stay close & don't move!",
    "The camera slowly pushes in (x:1.2); neon light flickers behind her.",
    "<S>Hello there, my friend.<E> Footsteps echo in the hall.",
]
CHINESE = [
    "一位女士在雨中说话，声音温柔。",
    "镜头缓慢推进，霓虹灯闪烁！",
    "他低声说道：<S>我很快就回来。<E>",
    "画面里有一只狐狸和一只懒狗。",
]


def train(vocab_size: int = 600, byte_fallback: bool = True, corpus: list[str] | None = None) -> bytes:
    """Serialised unigram model: pad 0, end 1, start 2, unknown 3, NFKC, 256 byte pieces where asked for."""
    lines = corpus or [*(ENGLISH + CHINESE) * 20, *(f"clip {i} has {i * 7} tokens" for i in range(100))]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def tokenizer_json(model: bytes, sentinels: int = 300) -> str:
    """The fast tokenizer's file for `model`, set as umt5's is: unigram without byte fallback, the model's own
    character map, the word mark in front of every segment, sentinels and control tokens added without
    stripping or normalising, the end token by template."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = sp.get_piece_size()
    names = [sp.id_to_piece(i) for i in range(4)] + [f"<extra_id_{sentinels - 1 - n}>" for n in range(sentinels)]
    ids = [*range(4), *range(size, size + sentinels)]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for i, name in zip(ids, names, strict=True)],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap(model)).decode()},
                    {"type": "Strip", "strip_left": False, "strip_right": True},
                    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
                ],
            },
            "pre_tokenizer": space,
            "decoder": space,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [first, end],
                "pair": [first, end, second, end],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
            },
            "model": {
                "type": "Unigram",
                "unk_id": 3,
                "byte_fallback": False,
                "vocab": [[sp.id_to_piece(i), sp.get_score(i)] for i in range(size)]
                + [[name, 0.0] for name in names[4:]],
            },
        }
    )


def charsmap(model: bytes) -> bytes:
    """`normalizer_spec.precompiled_charsmap` of a serialised model: field 2 of the message in field 3."""
    return _field(_field(model, 3), 2)


def _field(message: bytes, wanted: int) -> bytes:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            length, at = _varint(message, at)
            if number == wanted:
                return message[at : at + length]
            at += length
    raise ValueError(f"field {wanted} is not in the message")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
