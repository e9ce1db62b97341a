"""The server route that the canvas asks about a prompt, the blueprints, and what the prompt nodes say of themselves."""

import json
import urllib.error
import urllib.request

import pytest
from comfy_host import ROOT
from safetensors import safe_open
from server import PACK_FOLDER, RefusedError

from nava_core import PromptTokenizer
from nava_core.prompt import check_prompt

ROUTE = "/nava/prompt_check"
BLUEPRINTS = ["NAVA speaking portrait", "NAVA text to clip"]
PROMPT = "A man says <S>Hello there.<E> A woman says <S>你好。<E> &amp; rain falls."


@pytest.fixture(scope="module")
def tokenizer(comfy):
    with safe_open(comfy.base / "models" / "text_encoders" / comfy.names["text_encoder"], "pt") as file:
        return PromptTokenizer(file.get_tensor("spiece_model"))


def test_the_answer_is_the_cores_with_the_files_own_tokenizer(comfy, tokenizer):
    answer = comfy.post(ROUTE, {"prompt": PROMPT, "voices": 2, "seconds": 4})
    assert answer == check_prompt(PROMPT, tokenizer=tokenizer, voices=2, clip_seconds=4).as_dict()
    assert answer["exact"] is True
    assert answer["tokens"] == tokenizer(PROMPT).total_tokens
    assert [span["voice"] for span in answer["spans"]] == [1, 2]


def test_faults_are_answers(comfy):
    answer = comfy.post(ROUTE, {"prompt": "She says <S>Hello"})
    assert [problem["code"] for problem in answer["problems"]] == ["unclosed"]
    assert comfy.post(ROUTE, {"prompt": "", "voices": 1})["problems"][0]["code"] == "no_span"


@pytest.mark.parametrize(
    "asked",
    [
        [],
        {},
        {"prompt": 3},
        {"prompt": "a", "voices": -1},
        {"prompt": "a", "voices": 10**9},
        {"prompt": "a", "voices": True},
        {"prompt": "a", "seconds": "6"},
        {"prompt": "a", "seconds": -1},
        {"prompt": "a" * 70_000},
    ],
)
def test_anything_else_is_refused_in_a_sentence(comfy, asked):
    with pytest.raises(RefusedError) as refused:
        comfy.post(ROUTE, asked)
    assert json.loads(str(refused.value))["error"].endswith(".")


def test_what_is_no_json_is_refused(comfy):
    for body in (b"\xff\xfe", b"[" * 60_000, b"NaN NaN"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{comfy.port}{ROUTE}", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 400


def test_a_file_name_in_the_request_opens_nothing(comfy):
    plain = comfy.post(ROUTE, {"prompt": PROMPT})
    assert comfy.post(ROUTE, {"prompt": PROMPT, "text_encoder": "../../secret", "file": "/etc/passwd"}) == plain


def test_the_server_offers_the_blueprints(comfy):
    found = {
        entry["name"]: key
        for key, entry in comfy.get("/global_subgraphs").items()
        if entry["info"]["node_pack"] == f"custom_nodes.{PACK_FOLDER}"
    }
    assert sorted(found) == BLUEPRINTS
    for name, key in found.items():
        given = json.loads(comfy.get(f"/global_subgraphs/{key}")["data"])
        assert given == json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_one_node_of_nodes_that_there_are(comfy, name):
    info = comfy.get("/object_info")
    blueprint = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    (node,), (inside,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert (node["type"], node["title"], inside["name"]) == (inside["id"], name, name)
    assert [each["name"] for each in node["inputs"]] == [each["name"] for each in inside["inputs"]]
    nodes = {each["id"]: each for each in inside["nodes"]}
    assert {each["type"] for each in nodes.values()} <= set(info)
    for link in inside["links"]:
        if link["origin_id"] in nodes:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
            assert info[nodes[link["origin_id"]]["type"]]["output"][link["origin_slot"]] == link["type"]
        if link["target_id"] in nodes:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
    for slot, each in enumerate(inside["inputs"]):
        assert each["linkIds"] == [
            k["id"] for k in inside["links"] if (k["origin_id"], k["origin_slot"]) == (-10, slot)
        ]
        assert each["linkIds"]


def graph(comfy, seconds: float, **presets) -> dict:
    text_encoder = {"file": comfy.names["text_encoder"], "device": "default"}
    span = {"words": "Hello " * 30, "speaker": "", "voice": "", "emotion": "", "pace": "", "position": "", **presets}
    parts = {"visual": "A man", "dynamics": "", "camera": "", "audio": "", "language": "en"}
    encode = {"clip": ["1", 0], "prompt": ["3", 0], "spans": ["3", 1], "seconds": seconds}
    return {
        "1": {"class_type": "NavaLoadTextEncoder", "inputs": text_encoder},
        "2": {"class_type": "NavaSpeechSpan", "inputs": span},
        "3": {"class_type": "NavaStructuredPrompt", "inputs": {**parts, "shot": "close-up", "spans.span0": ["2", 0]}},
        "4": {"class_type": "NavaEncodePrompt", "inputs": encode},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}},
    }


def test_the_report_says_whether_the_speech_fits_and_the_prompt_is_shown(comfy):
    run = comfy.ok(graph(comfy, 6.0, emotion_preset="calm", place_preset="left"))
    assert "Too much speech: about 12.0 s" in run.text("5")
    shown = run.text("3")
    for words in ("close-up of the face", "calm tone", "from the left"):
        assert words in shown
    check = json.loads(run.outputs["4"]["nava_prompt_check"][0])
    assert check["exact"] is True
    assert [problem["code"] for problem in check["problems"]] == ["too_much_speech"]
    assert "Speech: about 12.0 s of 20 s." in comfy.ok(graph(comfy, 20.0)).text("5")
