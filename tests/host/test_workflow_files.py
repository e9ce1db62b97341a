"""The bundled workflows as files: canvas and API format agree, fit the server's nodes, and are drawn to be read."""

import itertools
import json
import re
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = [
    "audio_only",
    "first_frame_and_voice",
    "first_frame_to_clip",
    "long_clip",
    "low_memory",
    "retake",
    "sampler_parts",
    "sound_for_video",
    "text_to_clip",
    "two_gpus",
    "two_speakers",
    "voice_drives_picture",
]
NOTES = {"MarkdownNote", "Note"}
WIDGET_TYPES = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own
MODELS = "https://huggingface.co/"
FILE_WIDGETS = {"file", "image", "audio"}  # their options are whatever lies in a folder
TITLE_HEIGHT = 30
MISSING = object()
FOLDERS = {
    "NavaLoadBackbone": "diffusion_models",
    "NavaLoadTextEncoder": "text_encoders",
    "NavaLoadVideoVAE": "vae",
    "NavaLoadAudioVAE": "vae",
    "NavaLoadSpeakerEncoder": "audio_encoders",
}


@pytest.fixture(scope="module")
def object_info(comfy):
    return comfy.get("/object_info")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def canvas(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def api(name):
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def nodes_of(canvas: dict) -> dict[int, dict]:
    """The nodes that run, by id."""
    return {node["id"]: node for node in canvas["nodes"] if node["type"] not in NOTES}


def specs_of(info: dict) -> dict[str, list]:
    """Inputs of a node class by name, in the order the canvas lists their widgets."""
    order = info["input_order"]
    return {
        name: info["input"][kind][name] for kind in ("required", "optional") if kind in order for name in order[kind]
    }


def is_widget(spec: list) -> bool:
    return isinstance(spec[0], list) or spec[0] in WIDGET_TYPES or spec[0] == DYNAMIC_COMBO


def options(spec: list) -> dict:
    return spec[1] if len(spec) > 1 else {}


def choices(spec: list) -> list | None:
    """What a combo offers, None for other widgets."""
    if spec[0] == DYNAMIC_COMBO:
        return [option["key"] for option in options(spec)["options"]]
    return spec[0] if isinstance(spec[0], list) else options(spec).get("options")


def input_type(specs: dict[str, list], name: str) -> str:
    """Type of an input; ``voices.voice0`` is one of a growing list."""
    head, _, member = name.partition(".")
    spec = specs[head]
    if not member:
        return "COMBO" if isinstance(spec[0], list) or spec[0] == DYNAMIC_COMBO else spec[0]
    template = options(spec)["template"]
    number = member.removeprefix(template["prefix"])
    assert number.isdigit(), f"{name} is not one of {template['prefix']}0, {template['prefix']}1, ..."
    assert int(number) < template["max"]
    ((inner,),) = [kind.values() for kind in template["input"].values() if kind]
    return inner[0]


def widget_values(node: dict, specs: dict[str, list]) -> dict[str, object]:
    """A canvas node's widget values by name. Widgets that only the browser has may follow a file's (its upload
    button and player) or stand alone (a preview's); a seed brings the choice of the next one."""
    stored = iter(node.get("widgets_values", []))
    values = {}
    for name, spec in specs.items():
        if not is_widget(spec):
            continue
        value = next(stored, MISSING)
        if value is MISSING:  # an optional input, newer than the file, which keeps its meaning without
            continue
        values[name] = value
        if options(spec).get("control_after_generate"):
            assert next(stored) in {"fixed", "increment", "decrement", "randomize"}
    left = list(stored)
    uploads = {"image_upload", "audio_upload", "video_upload"}
    browser_only = any(spec[1:] and uploads & set(spec[1]) for spec in specs.values())
    assert not left or browser_only or node["type"] == "PreviewAny", (
        f"{node['type']} has widget values too many: {left}"
    )
    return values


def as_prompt(canvas: dict, object_info: dict) -> dict:
    """What the canvas sends to the server, worked out from the file alone."""
    links = {link[0]: link for link in canvas["links"]}
    prompt = {}
    for number, node in nodes_of(canvas).items():
        inputs = widget_values(node, specs_of(object_info[node["type"]]))
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                _, origin, slot, *_ = links[socket["link"]]
                inputs[socket["name"]] = [str(origin), slot]
        prompt[str(number)] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def box(node: dict) -> tuple[float, float, float, float]:
    """Left, top, right, bottom with the title bar; a collapsed node is its title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y if node["flags"].get("collapsed") else y + height


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ------------------------------------------------------------------ both formats


def test_there_is_a_file_of_each_format_for_every_job():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == NAMES


def test_the_api_file_is_what_the_canvas_sends(canvas, api, object_info):
    sent = {
        number: {key: node[key] for key in ("class_type", "inputs")}
        for number, node in api.items()
    }  # fmt: skip
    assert sent == as_prompt(canvas, object_info)


def test_nothing_in_the_files_is_of_one_machine(name):
    for path in (WORKFLOWS / f"{name}.json", WORKFLOWS / "api" / f"{name}.json"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(re.escape(f'"url":"{MODELS}') + r"[^\"]*", "", text)  # where the canvas offers a model from
        for pattern in (r"/home/", r"/root", r"/tmp", r"[A-Za-z]:\\\\", r"https?://", r"\b[0-9a-f]{12,}\b", r"127\.0"):
            assert not re.search(pattern, text), f"{pattern} in {path.name}"


# ------------------------------------------------------------------ against the server


def test_every_node_exists(canvas, object_info):
    unknown = [node["type"] for node in nodes_of(canvas).values() if node["type"] not in object_info]
    assert not unknown


def test_missing_files_and_nodes_are_known_to_the_canvas(canvas):
    """A loader says where its file is from and goes, a node which pack it is of."""
    version = re.search(r'^version = "(.*)"$', (WORKFLOWS.parent / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for node in nodes_of(canvas).values():
        known = node["properties"]
        if not node["type"].startswith("Nava"):
            assert known["cnr_id"] == "comfy-core"
            continue
        assert (known["cnr_id"], known["ver"]) == ("nava-nodes", version)
        if node["type"] in FOLDERS and node["type"] != "NavaLoadSpeakerEncoder":  # its release is a .pt elsewhere
            (model,) = known["models"]
            assert (model["name"], model["directory"]) == (node["widgets_values"][0], FOLDERS[node["type"]])
            assert model["url"].startswith(MODELS)
            assert model["url"].endswith(f"/{model['name']}")


def test_links_join_equal_types(canvas, object_info):
    nodes = nodes_of(canvas)
    for number, origin, slot, target, place, kind in canvas["links"]:
        given = object_info[nodes[origin]["type"]]["output"][slot]
        socket = nodes[target]["inputs"][place]
        taken = input_type(specs_of(object_info[nodes[target]["type"]]), socket["name"])
        assert socket["link"] == number
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert taken in (given, "*"), f"{nodes[origin]['type']} {given} -> {nodes[target]['type']}.{socket['name']}"
        assert kind in (given, taken)


def test_every_needed_input_is_given(api, object_info):
    for node in api.values():
        specs = object_info[node["class_type"]]["input"].get("required", {})
        growing = {key for key, spec in specs.items() if spec[0] == "COMFY_AUTOGROW_V3"}
        assert set(specs) - growing <= set(node["inputs"]), node["class_type"]


def test_widget_values_are_ones_that_the_server_takes(api, object_info):
    for node in api.values():
        specs = specs_of(object_info[node["class_type"]])
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                continue
            spec, where = specs[key], f"{node['class_type']}.{key} = {value!r}"
            kind = input_type(specs, key)
            if kind == "COMBO":
                assert isinstance(value, str), where
                assert key in FILE_WIDGETS or value in choices(spec), where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            elif kind in ("INT", "FLOAT"):
                assert isinstance(value, int if kind == "INT" else (int, float)), where
                assert not isinstance(value, bool), where
                assert options(spec)["min"] <= value <= options(spec)["max"], where
            else:
                assert isinstance(value, str), where


# ------------------------------------------------------------------ what each is for


def test_every_workflow_has_an_encoded_negative(api):
    samplers = [node["inputs"] for node in api.values() if node["class_type"] in ("NavaSampler", "NavaGuider")]
    sound_alone = not nodes_named(api, "NavaLoadVideoVAE")
    assert samplers
    for sampler in samplers:
        negative = api[sampler["negative"][0]]
        assert negative["class_type"] == "NavaEncodePrompt"
        assert negative["inputs"]["prompt"] == ""
        terms = "sound, Chinese" if sound_alone else "picture and sound, Chinese"
        assert negative["inputs"]["negative_terms"] == terms
        assert negative["inputs"]["clip"] == api[sampler["positive"][0]]["inputs"]["clip"]


def nodes_named(api: dict, class_type: str) -> list[dict]:
    return [node["inputs"] for node in api.values() if node["class_type"] == class_type]


def test_speech_is_marked_as_the_model_reads_it(api):
    from nava_core import parse_spans

    for inputs in nodes_named(api, "NavaEncodePrompt"):
        if isinstance(inputs["prompt"], str) and inputs["prompt"]:
            voices = [key for key in inputs if key.startswith("voices.")]
            assert len(inputs["prompt"]) > 100
            assert len(parse_spans(inputs["prompt"])) >= len(voices)


def load(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_picture_and_voice_together_use_gentler_guidance():
    (sampler,) = nodes_named(load("first_frame_and_voice"), "NavaSampler")
    assert (sampler["video_text"], sampler["audio_timbre"]) == (2, 2)
    (sampler,) = nodes_named(load("text_to_clip"), "NavaSampler")
    assert (sampler["video_text"], sampler["audio_timbre"], sampler["steps"], sampler["shift"]) == (3, 3, 50, 5)


def test_audio_only_makes_no_picture_and_runs_without_alignment():
    graph = load("audio_only")
    assert nodes_named(graph, "NavaEmptyLatent")[0]["mode"] == "audio only"
    assert nodes_named(graph, "NavaSampler")[0]["alignment"] is False
    assert not nodes_named(graph, "NavaLoadVideoVAE")
    assert nodes_named(graph, "SaveAudio")


def test_two_speakers_have_a_voice_each():
    spans = nodes_named(load("two_speakers"), "NavaSpeechSpan")
    assert len(spans) == 2
    assert len({tuple(span["timbre"]) for span in spans}) == 2
    assert len({inputs["audio"] for inputs in nodes_named(load("two_speakers"), "LoadAudio")}) == 2


def test_low_memory_is_what_it_says():
    graph = load("low_memory")
    assert "fp8" in nodes_named(graph, "NavaLoadBackbone")[0]["file"]
    (encoder,) = nodes_named(graph, "NavaLoadTextEncoder")
    assert "fp8" in encoder["file"]
    assert encoder["device"] == "cpu"
    assert nodes_named(graph, "NavaDecodeVideo")[0]["decoding"] == "tiled"


def test_sampler_parts_use_the_stock_sampler():
    classes = {node["class_type"] for node in load("sampler_parts").values()}
    assert {"SamplerCustomAdvanced", "RandomNoise", "NavaGuider", "NavaSigmas", "NavaUniPC"} <= classes
    assert "NavaSampler" not in classes


def sources(api: dict, class_type: str, name: str) -> list[str]:
    """Class and output that this input of each node of a class comes from, such as "NavaContinue 0"."""
    links = [inputs[name] for inputs in nodes_named(api, class_type)]
    return [f"{api[origin]['class_type']} {slot}" for origin, slot in links]


def test_the_recording_drives_the_picture_and_is_what_is_heard():
    graph = load("voice_drives_picture")
    assert sources(graph, "NavaGivenAudio", "audio") == ["LoadAudio 0"]
    assert sources(graph, "NavaGivenAudio", "latent") == ["NavaFirstFrame 0"]
    assert sources(graph, "NavaSampler", "latent") == ["NavaGivenAudio 0"]
    assert sources(graph, "NavaMux", "audio") == ["NavaDecodeAudio 0"]
    assert not nodes_named(graph, "NavaEncodeTimbre")  # the voice is the recording's own


def test_the_video_gets_sound_and_stays_as_it_was_given():
    graph = load("sound_for_video")
    assert sources(graph, "NavaGivenFrames", "images") == ["GetVideoComponents 0"]
    assert sources(graph, "NavaGivenFrames", "fps") == ["GetVideoComponents 2"]
    assert nodes_named(graph, "NavaGivenFrames")[0]["place"] == "from seconds"
    assert nodes_named(graph, "NavaGivenFrames")[0]["use"] == "keep"
    assert sources(graph, "NavaMux", "frames") == ["NavaGivenFrames 1"]
    assert not nodes_named(graph, "NavaDecodeVideo")


def test_each_segment_of_a_long_clip_begins_where_the_clip_so_far_ends():
    graph = load("long_clip")
    assert sorted(sources(graph, "NavaSampler", "latent")) == ["NavaContinue 0", "NavaContinue 0", "NavaEmptyLatent 0"]
    assert sources(graph, "NavaContinue", "frames") == ["NavaDecodeVideo 0", "NavaJoin 0"]
    assert sources(graph, "NavaJoin", "frames") == ["NavaDecodeVideo 0", "NavaJoin 0"]
    prompts = [graph[sampler["positive"][0]]["inputs"] for sampler in nodes_named(graph, "NavaSampler")]
    assert len({each["prompt"] for each in prompts}) == 3
    assert len({tuple(each["voices.voice0"]) for each in prompts}) == 1  # one voice


def test_a_retake_keeps_the_first_take_as_it_was_decoded():
    graph = load("retake")
    assert sources(graph, "NavaRetake", "latent") == ["NavaSampler 0"]
    assert sources(graph, "NavaRetake", "frames") == ["NavaDecodeVideo 0"]
    assert sources(graph, "NavaRetake", "audio") == ["NavaDecodeAudio 0"]
    first, second = nodes_named(graph, "NavaSampler")
    assert graph[second["latent"][0]]["class_type"] == "NavaRetake"
    assert first["model"] == second["model"]
    assert first["positive"] != second["positive"]


# ------------------------------------------------------------------ drawn to be read


def test_a_note_says_where_each_file_goes(canvas):
    notes = "\n".join(node["widgets_values"][0] for node in canvas["nodes"] if node["type"] in NOTES)
    for node in nodes_of(canvas).values():
        if node["type"] in FOLDERS:
            line = next((line for line in notes.splitlines() if node["widgets_values"][0] in line), "")
            assert f"in *{FOLDERS[node['type']]}*" in line, f"no note on {node['widgets_values'][0]}"
            assert re.search(r"licence|Apache-2\.0", line)


def test_every_node_lies_in_one_titled_group(canvas):
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in canvas["groups"])]
    titles = {group["title"].partition(":")[0] for group in canvas["groups"]}
    assert {"Models", "Clip", "Sampling", "Decode & save"} <= titles
    assert not any(overlap(a, b) for a, b in itertools.combinations(groups, 2))
    for node in canvas["nodes"]:
        left, top, right, bottom = box(node)
        right = left if node["flags"].get("collapsed") else right  # its drawn width is the title's
        inside = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(inside) == 1, f"{node['type']} lies in {len(inside)} groups"


def test_no_node_lies_on_another(canvas):
    for a, b in itertools.combinations(canvas["nodes"], 2):
        assert not overlap(box(a), box(b)), f"{a['type']} {a['id']} and {b['type']} {b['id']}"


def test_links_run_from_left_to_right(canvas):
    nodes = nodes_of(canvas)
    for _, origin, _, target, *_ in canvas["links"]:
        assert nodes[origin]["pos"][0] + 100 < nodes[target]["pos"][0], (
            f"{nodes[origin]['type']} stands right of {nodes[target]['type']}"
        )
