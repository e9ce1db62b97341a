"""Files whose bytes are wrong anywhere: always described in one sentence, whatever is in them."""

import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from nava_core.checkpoint import FileInfo, FileKind, describe_file
from nava_core.checkpoint.kinds import _RULES
from nava_core.components import load_problem


def whole_file(form: str) -> bytes:
    tensors = {"x.weight": torch.zeros(3, 4), "y": torch.zeros(5).bfloat16()}
    if form == "safetensors":
        return save(tensors, {"config": "{}"})
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors, "step": 7}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


WHOLE = {form: whole_file(form) for form in ("safetensors", "zip", "legacy")}
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6))


def described(content: bytes) -> FileInfo:
    """What is said of a file with that content; checks that it is a sentence that can be shown."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(content)
        info = describe_file(path)
        for sentence in (info.summary, load_problem(info) or "it would load"):
            assert sentence.isprintable()
        return info


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(list(WHOLE)), st.sampled_from([0.0, 0.7]), st.lists(EDIT, min_size=1, max_size=8))
@settings(max_examples=300)
def test_changed_bytes(form, start, edits):
    """Anywhere, and more often in the last third, where a zip archive has its directory."""
    content = bytearray(WHOLE[form])
    for place, removed, inserted in edits:
        at = round((start + (1 - start) * place) * len(content))
        content[at : at + removed] = inserted
    described(bytes(content))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WHOLE)
def test_missing_ends(form):
    for end in range(0, len(WHOLE[form]), 11):
        described(WHOLE[form][:end])


@pytest.mark.parametrize(("place", "wrong"), [(46, b"\xff\xfe"), (6, b"\xff\xff")])
def test_a_zip_directory_with_impossible_entries(place, wrong):
    """A name that is not UTF-8 though it says so, and a version of zip that there never was."""
    content = bytearray(WHOLE["zip"])
    entry = content.find(b"PK\x01\x02")
    content[entry + 8 : entry + 10] = b"\x00\x08"
    content[entry + place : entry + place + 2] = wrong
    info = described(bytes(content))
    assert info.kind is FileKind.CORRUPT
    assert "the directory of its zip archive cannot be read" in info.summary


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=5) | JSON,
        "data_offsets": st.lists(st.integers(-1, 200), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=30), ENTRY, max_size=4) | JSON)
@settings(max_examples=200)
def test_any_safetensors_header(header):
    text = json.dumps(header).encode()
    described(len(text).to_bytes(8, "little") + text + bytes(100))


def test_a_name_that_cannot_be_shown():
    text = b'{"a\\ud800\\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    assert "named a??)" in described(len(text).to_bytes(8, "little") + text + bytes(4)).summary


@given(st.sampled_from([rule for rule in _RULES if rule.anchors]), st.lists(st.integers(0, 3), max_size=5))
@settings(max_examples=150)
def test_models_of_wrong_shapes(rule, shape):
    described(save({name: torch.zeros(shape) for name in rule.anchors}))
