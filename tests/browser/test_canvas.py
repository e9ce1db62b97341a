"""Every bundled workflow in the real canvas: it loads whole, is drawn tidily before and after its run, sends what its
API file holds, and Run makes the file it promises; the template browser shows and opens it. Needs ComfyUI, Node.js with
npm, and Chromium; is skipped, with the reason, without. NAVA_CANVAS_PICTURES=folder keeps pictures of every canvas."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from machine import find_browser, make_inputs
from media_checks import read_media
from server import Comfy
from voices import write_video

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
SECONDS = 0.5
CLIP = {"seconds": SECONDS, "preset": "custom", "width": 96, "height": 64}
STEPS = {"steps": 2}
SPAN = {"start": 0.2, "end": 0.3}  # of a retake
MINUTES = 20
# Three samplers that share the models, prompts and VAEs have no drawing without crossings: long_clip's trunk lines run
# level, and other lines cross them upright. So many pairs of links meet there, a trunk counting once for each link.
CROSSINGS = {"long_clip": 90}


@pytest.fixture(scope="session")
def server(playwright, tmp_path_factory):
    """A running ComfyUI with small models, a picture, a silent video and recordings."""
    from nava_core.demo import make_small_models, place_in_comfyui

    base = tmp_path_factory.mktemp("canvas")
    models = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    names = {role: path.name for role, path in place_in_comfyui(models, base / "models").items()}
    make_inputs(base / "input")
    write_video(base / "input" / "silent.mp4", round(24 * SECONDS) + 1, (CLIP["width"], CLIP["height"]))
    with Comfy(base) as comfy:
        comfy.names = names
        comfy.post("/settings", {"Comfy.TutorialCompleted": True})  # else a first visit opens the templates
        yield comfy


def small_values(names: dict[str, str]) -> dict:
    """Widget values with which a workflow runs in seconds on a CPU, by node class."""
    return {
        "NavaLoadBackbone": {"file": names["backbone"]},
        "NavaLoadTextEncoder": {"file": names["text_encoder"]},
        "NavaLoadVideoVAE": {"file": names["video_vae"]},
        "NavaLoadAudioVAE": {"file": names["audio_vae"]},
        "NavaLoadSpeakerEncoder": {"file": names["speaker_encoder"]},
        "NavaEmptyLatent": CLIP,
        "NavaFirstFrame": {"size": "the latent's own"},
        "NavaRetake": SPAN,
        "NavaSampler": STEPS,
        "NavaSigmas": STEPS,
    }


def as_elements(name: str) -> str:
    """A workflow's name where its nodes are drawn as DOM elements, which are taller than the canvas's own."""
    return f"{name} as elements"


@pytest.fixture(scope="session")
def seen(playwright, server, tmp_path_factory) -> dict:
    """What the canvas said of each workflow."""
    job = {
        "playwright": playwright,
        "chromium": find_browser(),
        "url": f"http://127.0.0.1:{server.port}/",
        "workflows": [
            *({"name": name, "graph": read(name), "run": True} for name in NAMES),
            *({"name": as_elements(name), "graph": read(name), "run": True, "vue": True} for name in NAMES),
        ],
        "small": small_values(server.names),
        "files": {
            name: {"NavaLoadTextEncoder": {"file": server.names["text_encoder_fp8"]}}
            for name in ("low_memory", as_elements("low_memory"))
        },
        "templates": NAMES,
        "pictures": os.environ.get("NAVA_CANVAS_PICTURES"),
    }
    path = tmp_path_factory.mktemp("job") / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        ["node", str(HERE / "canvas.mjs"), str(path)], capture_output=True, text=True, timeout=60 * MINUTES
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{server.said()[-1500:]}"
    return json.loads(done.stdout)


def read(name: str, folder: str = "") -> dict:
    return json.loads((ROOT / "workflows" / folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_whole(seen, name):
    assert seen[name]["missing"] == []
    assert seen[name]["dialogs"] == []
    assert seen[name]["count"] == len(read(name)["nodes"])


@pytest.mark.parametrize("name", NAMES)
def test_the_canvas_says_no_errors_of_ours(seen, name):
    """That the server's policy kept the canvas from asking for a missing file's size is no error of ours."""
    ours = [line for line in seen[name]["said"] if line.startswith("page:") or "nava" in line.lower()]
    assert [line for line in ours if "https://huggingface.co/" not in line] == []


@pytest.mark.parametrize("drawn", [str, as_elements])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_drawn_tidily_before_and_after_a_run(seen, name, drawn):
    canvas = seen[drawn(name)]
    assert canvas["missing"] == []
    assert canvas["run"]["status"]["status_str"] == "success"
    for when in (canvas, canvas["after"]):
        assert when["overlaps"] == []
        assert len(when["crossings"]) <= CROSSINGS.get(name, 0), when["crossings"]
        assert when["outside"] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_sends_what_the_api_file_holds(seen, name):
    sent, file = seen[name]["prompt"], read(name, "api")
    assert sorted(sent) == sorted(file)
    for number, node in file.items():
        assert sent[number]["class_type"] == node["class_type"]
        assert {key: sent[number]["inputs"].get(key) for key in node["inputs"]} == node["inputs"]


@pytest.mark.parametrize("name", NAMES)
def test_run_makes_the_file_it_promises(seen, server, name):
    run = seen[name]["run"]
    assert run["status"]["status_str"] == "success", run["status"]
    items = [
        item
        for output in run["outputs"].values()
        for some in output.values()
        if isinstance(some, list)
        for item in some
        if isinstance(item, dict) and item.get("type") == "output"
    ]
    (item,) = items
    media = read_media(server.base / "output" / item["subfolder"] / item["filename"])
    assert item["filename"].startswith(name)
    own = name == "voice_drives_picture"  # the sound is the recording's
    assert (media.channels, media.sample_rate) == (2, 16000 if own else 48000)
    if name == "audio_only":
        assert media.audio_codec == "flac"
        assert media.frames is None
    else:
        assert (media.video_codec, media.size) == ("h264", (96, 64))
        assert len(media.frames) == 24 * SECONDS * (3 if name == "long_clip" else 1) + 1


def test_the_template_browser_shows_each_with_its_picture_and_opens_it(seen):
    templates = seen["templates"]
    assert sorted(templates["shown"]) == NAMES
    assert all(picture == {"width": 640, "height": 360, "status": 200} for picture in templates["shown"].values())
    assert templates["opened"] == sorted(node["type"] for node in read(NAMES[0])["nodes"])
