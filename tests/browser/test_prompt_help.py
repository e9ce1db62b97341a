"""The help under prompts and the pack's blueprints in the real canvas, drawn both ways; and all of it once more with
the pack's JavaScript removed, less the help. Needs what test_canvas.py needs; NAVA_CANVAS_PICTURES=folder keeps
pictures.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from machine import find_browser, make_inputs
from media_checks import read_media
from server import PACK_FOLDER, Comfy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLIP = {"seconds": 0.5, "preset": "custom", "width": 96, "height": 64}
DRAWINGS = ("canvas", "elements")
MINUTES = 6
LONG = " ".join(["word"] * 30)
PROMPTS = {
    "unclosed": "A woman says <S>Hello there",
    "fits": "A woman says <S>Hello there.<E> A man says <S>你好，很高兴见到你。<E>",
    "too much": f"A man says <S>{LONG}<E>",
    "three": "One <S>Yes.<E> two <S>No.<E> three <S>Perhaps.<E>",
}
BLUEPRINTS = ("NAVA text to clip", "NAVA speaking portrait")
ONE_EACH = {drawing: [name] for drawing, name in zip(DRAWINGS, BLUEPRINTS, strict=True)}


@pytest.fixture(scope="module")
def server(playwright, tmp_path_factory):
    """A running ComfyUI with small models and the pack as a folder of links, so that js/ can be taken out of it."""
    from nava_core.demo import make_small_models, place_in_comfyui

    base = tmp_path_factory.mktemp("help")
    models = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    names = {role: path.name for role, path in place_in_comfyui(models, base / "models").items()}
    make_inputs(base / "input")
    pack = base / "custom_nodes" / PACK_FOLDER
    pack.mkdir(parents=True)
    for each in ("__init__.py", "js", "locales", "nava_core", "nodes", "pyproject.toml", "subgraphs", "workflows"):
        (pack / each).symlink_to(ROOT / each)
    with Comfy(base) as comfy:
        comfy.names, comfy.pack = names, pack
        comfy.post("/settings", {"Comfy.TutorialCompleted": True})
        yield comfy


def blueprint_values(names: dict[str, str]) -> dict:
    files = {role: names[role] for role in ("backbone", "text_encoder", "video_vae", "audio_vae")}
    inner = {"NavaEmptyLatent": {key: value for key, value in CLIP.items() if key != "seconds"}}
    own = {"seconds": CLIP["seconds"], "steps": 2, **files}
    portrait = {
        "widgets": {**own, "size": "the latent's own", "speaker_encoder": names["speaker_encoder"]},
        "sockets": {"image": ["LoadImage", "image", "first_frame.png"], "voice": ["LoadAudio", "audio", "voice.wav"]},
    }
    text = {"widgets": {**own, "size": "custom"}, "sockets": {}}
    return {name: {**given, "small": inner} for name, given in zip(BLUEPRINTS, (text, portrait), strict=True)}


def look(playwright: str, server, job_file: Path, *, with_help: bool) -> dict:
    pictures = os.environ.get("NAVA_CANVAS_PICTURES") if with_help else None
    job = {
        "playwright": playwright,
        "chromium": find_browser(),
        "url": f"http://127.0.0.1:{server.port}/",
        "drawings": dict.fromkeys(DRAWINGS, BLUEPRINTS) if with_help else ONE_EACH,
        "help": with_help,
        "prompts": PROMPTS if with_help else {"three": PROMPTS["three"]},
        "blueprints": blueprint_values(server.names),
        "pictures": pictures,
    }
    job_file.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        ["node", str(HERE / "prompt_help.mjs"), str(job_file)], capture_output=True, text=True, timeout=60 * MINUTES
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{server.said()[-1500:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def helped(playwright, server, tmp_path_factory):
    return look(playwright, server, tmp_path_factory.mktemp("job") / "job.json", with_help=True)


@pytest.fixture(scope="module")
def bare(playwright, server, helped, tmp_path_factory):
    """The same, after js/ was taken out of the pack."""
    (server.pack / "js").unlink()
    return look(playwright, server, tmp_path_factory.mktemp("job") / "job.json", with_help=False)


@pytest.fixture(params=DRAWINGS)
def seen(request, helped):
    return helped[request.param]


@pytest.fixture(params=[(help_, drawing) for help_ in ("with js", "without js") for drawing in DRAWINGS], ids=str)
def either(request):
    """What was seen with the JavaScript and without."""
    with_js, drawing = request.param
    return request.getfixturevalue("helped" if with_js == "with js" else "bare")[drawing]


def codes(said: dict) -> list[str]:
    return [code for code, _ in said["problems"]]


def test_an_unclosed_span_shows_its_error(seen):
    for said in seen["prompts"]["unclosed"].values():
        if "problems" in said:
            assert codes(said) == ["unclosed"]
            assert "Hello there" in said["problems"][0][1]
            assert "<E>" in said["problems"][0][1]
            assert said["seen"]
    assert codes(seen["prompts"]["fits"]["later"]) == []


def test_spans_are_listed_with_their_words(seen):
    spans = seen["prompts"]["fits"]["later"]["spans"]
    assert len(spans) == 2
    assert "Hello there." in spans[0]
    assert "你好" in spans[1]


def test_the_meter_agrees_with_the_tokenizer(seen, server):
    from safetensors import safe_open

    from nava_core import PromptTokenizer

    with safe_open(server.base / "models" / "text_encoders" / server.names["text_encoder"], "pt") as file:
        tokenizer = PromptTokenizer(file.get_tensor("spiece_model"))
    for name in ("fits", "too much", "three"):
        said = seen["prompts"][name]
        assert said["later"]["exact"] == "true"
        assert said["later"]["tokens"] == tokenizer(PROMPTS[name]).total_tokens


def test_too_much_speech_is_said_before_the_run(seen):
    for when in ("atOnce", "later"):
        said = seen["prompts"]["too much"][when]
        assert codes(said) == ["too_much_speech"]
        assert "6 s" in said["problems"][0][1]


def test_each_span_shows_its_voice(seen):
    assert seen["voices"]["help"]["voices"] == ["1", "2", "3"]


def test_speech_marks_in_a_field_of_plain_words_are_an_error(seen):
    fields = seen["fields"]
    assert codes(fields["wrong"]) == ["marks"]
    assert codes(fields["right"]) == []
    assert "speech about 2.0 s" in fields["right"]["text"]
    assert codes(fields["structured"]) == ["marks"]


def test_the_help_speaks_the_canvases_language(seen):
    assert "token" in seen["chinese"]
    assert "没有结束" in seen["chinese"]


def test_a_third_voice_grows_the_inputs(either):
    assert either["voices"]["grown"] == [1, 2, 3, 4]


def test_what_is_written_is_what_is_sent_and_kept(either):
    for name, seen in either["prompts"].items():
        value = seen["value"]
        assert value["sent"]["prompt"] == PROMPTS[name]
        assert value["kept"] == [PROMPTS[name], "none", 0]
        assert set(value["sent"]) == {"prompt", "negative_terms", "seconds"}


def test_blueprints_drop_and_run(either, server):
    for name, blueprint in either["blueprints"].items():
        assert blueprint["shown"]["title"] == name
        assert blueprint["shown"]["missing"] == []
        assert blueprint["shown"]["start"]["seconds"] == 6
        assert "<S>" in blueprint["shown"]["start"]["prompt"]
        assert blueprint["run"]["status"]["status_str"] == "success", blueprint["run"]["status"]
        (item,) = [
            item
            for output in blueprint["run"]["outputs"].values()
            for some in output.values()
            if isinstance(some, list)
            for item in some
            if isinstance(item, dict) and item.get("type") == "output"
        ]
        media = read_media(server.base / "output" / item["subfolder"] / item["filename"])
        assert (media.video_codec, media.size, media.sample_rate) == ("h264", (96, 64), 48000)


def test_without_the_javascript_there_is_no_help(helped, bare):
    assert [helped[drawing]["helps"] for drawing in DRAWINGS] == [1, 1]
    assert [bare[drawing]["helps"] for drawing in DRAWINGS] == [0, 0]


def test_the_canvas_says_no_errors(either):
    ours = [line for line in either["errors"] if line.startswith("page:") or "nava" in line.lower()]
    assert [line for line in ours if "https://huggingface.co/" not in line] == []
