"""Rewriting in ComfyUI: a CLIP that can generate, the configured chat server, and what a workflow must not choose."""

import contextlib
import importlib.util
import json
import struct
import sys
import time
import types

import comfy_host
import pytest
import torch

comfy_host.import_comfyui()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.text_encoders.z_image  # noqa: E402

rewrite = comfy_host.pack_module("nodes.host.rewrite")
canvas = comfy_host.pack_module("nodes.host.canvas")
core = comfy_host.pack_module("nava_core.rewrite")
text_encoder = comfy_host.pack_module("nodes.host.text_encoder")

spec = importlib.util.spec_from_file_location("_chat_server", comfy_host.ROOT / "tests" / "core" / "_chat_server.py")
stand_ins = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_ins)
ChatStandIn = stand_ins.ChatStandIn

DRAFT = "A man at a door says <S>Come in, please!<E>"
GOOD = (
    "In a narrow hallway lit by a warm lamp a man in a grey cardigan opens a wooden door. In a low, friendly voice he "
    "says: <S>Come in, please!<E> The camera stays at chest height. Rain patters outside and the hinge creaks."
)
SEEN = "A grey cat sits on a low brick wall in flat evening light, seen from its own height, the street behind it soft."


class FakeClip:
    """A CLIP as the host's Generate Text takes it; ``sees``: its tokenizer takes pictures in."""

    def __init__(self, *answers, sees=False):
        self.answers, self.sees, self.texts, self.settings, self.pictures = list(answers), sees, [], [], []

    def tokenize(self, text, image=None, **form):
        self.texts.append(text)
        self.pictures.append(image)
        held = [({"type": "image", "data": image}, 1.0)] if image is not None and self.sees else []
        return {"some": [[(1, 1.0), *held]]}

    def generate(self, tokens, do_sample, max_length, temperature, top_k, top_p, min_p, repetition_penalty, seed):
        self.settings.append((do_sample, max_length, temperature, seed))
        answer = self.answers[min(len(self.texts), len(self.answers)) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return list(answer)

    def decode(self, ids):
        return "".join(ids)


def draft(text=DRAFT, **settings):
    return core.Draft(text, "en", **settings)


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch, tmp_path):
    for name in ("URL", "MODEL", "KEY", "TIMEOUT"):
        monkeypatch.delenv(f"NAVA_REWRITE_{name}", raising=False)
    monkeypatch.setattr("folder_paths.get_user_directory", lambda: str(tmp_path))


# ---------------------------------------------------------------- the host's text generation


def test_a_clip_writes_the_prompt():
    clip = FakeClip(f"Sure, here it is:\n\n{GOOD}")
    result = rewrite.rewrite_prompt(draft(seed=2**63 + 1, temperature=0.4, max_tokens=600), "auto", clip)
    assert result.prompt == GOOD
    assert clip.settings == [(True, 600, 0.4, 2**63 + 1)]
    assert DRAFT in clip.texts[0]
    assert "letter by letter" in clip.texts[0]
    assert "the connected CLIP" in result.report()
    rewrite.rewrite_prompt(draft(temperature=0.0), "host", clip)
    assert clip.settings[-1][0] is False


def test_a_clip_that_drops_speech_is_asked_again_and_then_not_used():
    dropped = GOOD.replace("<S>Come in, please!<E>", "something.")
    clip = FakeClip(dropped, GOOD)
    assert rewrite.rewrite_prompt(draft(), "host", clip).prompt == GOOD
    assert "left out" in clip.texts[1]
    assert dropped in clip.texts[1]
    result = rewrite.rewrite_prompt(draft(), "host", FakeClip(dropped))
    assert result.prompt == DRAFT
    assert "left out" in result.warning


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such layer"), "failed to generate: no such layer"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little free memory"),
    ],
)
def test_a_clip_that_fails_costs_only_the_rewriting(error, words):
    result = rewrite.rewrite_prompt(draft(), "auto", FakeClip(error))
    assert result.prompt == DRAFT
    assert words in result.warning


def test_an_interruption_of_a_clip_goes_through():
    stop = comfy.model_management.InterruptProcessingException
    with pytest.raises(stop):
        rewrite.rewrite_prompt(draft(), "auto", FakeClip(stop()))


def test_a_picture_goes_to_a_clip_that_sees_and_is_missed_by_one_that_does_not():
    image = torch.rand(2, 8, 12, 4)
    clip = FakeClip(GOOD, sees=True)
    result = rewrite.rewrite_prompt(draft(), "host", clip, image)
    assert torch.equal(clip.pictures[0], image[:1, ..., :3])
    assert "first frame" in clip.texts[0]
    assert "not looked at" not in result.report()
    assert "not looked at" in rewrite.rewrite_prompt(draft(), "host", FakeClip(GOOD), image).report()
    settings = {"language": "en", "seed": 1, "temperature": 0.5, "max_tokens": 99}
    assert rewrite.caption_image(image, "auto", FakeClip(SEEN, sees=True), **settings) == SEEN
    with pytest.raises(RuntimeError, match="takes no pictures"):
        rewrite.caption_image(image, "auto", FakeClip(SEEN), **settings)


@pytest.fixture(scope="module")
def tiny_clip():
    """The host's own Qwen text encoder of one small layer, with random weights."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    options = {"qwen3_4b_model_config": {**size, "num_key_value_heads": 1}}
    network = comfy.text_encoders.z_image.te(torch.float32)
    torch.manual_seed(0)
    shapes = network(device="meta", dtype=torch.float32, model_options=options).state_dict()
    prefix = "qwen3_4b.transformer."
    names = {name.removeprefix(prefix): tensor.shape for name, tensor in shapes.items() if name.startswith(prefix)}
    state = {name: 0.1 * torch.randn(shape) for name, shape in names.items()}
    target = types.SimpleNamespace(clip=network, tokenizer=comfy.text_encoders.z_image.ZImageTokenizer, params={})
    return comfy.sd.CLIP(
        target, parameters=sum(tensor.numel() for tensor in state.values()), state_dict=[state], model_options=options
    )


def test_the_hosts_own_generation_is_called_as_it_wants_to_be(tiny_clip):
    assert rewrite.can_generate(tiny_clip)
    with torch.inference_mode():
        said = [rewrite.rewrite_prompt(draft(max_tokens=12, seed=seed), "host", tiny_clip) for seed in (1, 1, 2)]
    assert all(result.prompt == DRAFT and result.asked == 2 for result in said), [each.warning for each in said]
    assert not any(result.unavailable for result in said), said[0].warning
    with torch.inference_mode():
        backend = rewrite.HostChat(tiny_clip)
        texts = [backend.ask(core.Question("Write.", ("A cat.",), seed=seed, max_tokens=12)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_umt5_cannot_generate(small_models):
    clip = text_encoder.load_text_encoder(small_models["text_encoder"])
    assert not rewrite.can_generate(clip)
    result = rewrite.rewrite_prompt(draft(), "auto", clip)
    assert result.prompt == DRAFT
    assert "cannot generate text" in result.warning
    counted = rewrite.rewrite_prompt(draft(), "host", FakeClip(GOOD), text_encoder=clip)
    assert counted.length.exact
    assert counted.length.tokens == text_encoder.prompt_tokenizer(clip)(GOOD).total_tokens
    assert not rewrite.can_generate(object())


def test_an_older_host_without_generation_is_not_asked():
    clip = types.SimpleNamespace(tokenize=lambda text: [], cond_stage_model=torch.nn.Linear(1, 1))
    result = rewrite.rewrite_prompt(draft(), "host", clip)
    assert "cannot generate text" in result.warning


# ---------------------------------------------------------------- who is asked


def test_auto_takes_the_clip_then_the_server_and_says_what_is_missing(monkeypatch, small_models):
    umt5 = text_encoder.load_text_encoder(small_models["text_encoder"])
    assert "There is nobody to ask" in rewrite.rewrite_prompt(draft(), "auto").warning
    assert "No chat server is configured" in rewrite.rewrite_prompt(draft(), "server", FakeClip(GOOD)).warning
    assert "No CLIP is connected" in rewrite.rewrite_prompt(draft(), "host").warning
    with ChatStandIn(GOOD) as stand_in:
        monkeypatch.setenv("NAVA_REWRITE_URL", stand_in.url)
        rewrite.rewrite_prompt(draft(), "auto", FakeClip(GOOD))
        assert not stand_in.requests
        assert rewrite.rewrite_prompt(draft(), "auto", umt5).prompt == GOOD
        assert len(stand_in.requests) == 1


def test_the_same_input_is_asked_once_and_a_failure_again(monkeypatch):
    def failing(handler, request):
        stand_in.send_json(handler, {"error": "busy"}, 503)

    with ChatStandIn(failing, GOOD) as stand_in:
        monkeypatch.setenv("NAVA_REWRITE_URL", stand_in.url)
        results = [rewrite.rewrite_prompt(draft(seed=11), "server") for _ in range(3)]
        assert [result.changed for result in results] == [False, True, True]
        assert len(stand_in.requests) == 2
        rewrite.rewrite_prompt(draft(seed=12), "server")
        assert len(stand_in.requests) == 3


def test_the_host_runs_a_node_anew_after_a_failure_or_another_configuration(monkeypatch):
    own, other = ("draft", "en", "auto", 5), ("draft", "en", "auto", 6)
    before, beside = rewrite.state_of(*own), rewrite.state_of(*other)
    assert rewrite.state_of(*own) == before
    rewrite.note_failure(*own)
    assert rewrite.state_of(*own) != before
    assert rewrite.state_of(*other) == beside
    for link in range(4):
        linked = tuple(None if at == link else value for at, value in enumerate(own))
        state = rewrite.state_of(*linked)
        rewrite.note_failure(*own)
        assert rewrite.state_of(*linked) != state, "any setting may come over a link"
    assert rewrite.state_of() == rewrite.state_of()
    caption = rewrite.state_of()
    rewrite.note_failure(*own)
    assert rewrite.state_of() == caption
    monkeypatch.setenv("NAVA_REWRITE_URL", "http://127.0.0.1:9")
    assert rewrite.state_of(*other) != beside
    assert "127" not in rewrite.state_of(*other)


def read_by_a_canvas(message, prompt_id_first):
    """(node, text) as a canvas of either kind reads them."""
    at = 0
    if prompt_id_first:
        (length,) = struct.unpack_from(">I", message, at)
        at += 4 + length
    (length,) = struct.unpack_from(">I", message, at)
    return message[at + 4 : at + 4 + length].decode(), message[at + 4 + length :].decode(errors="replace")


def test_text_on_a_node_is_read_by_old_and_new_canvases_and_has_no_marks_that_they_read(monkeypatch):
    sent = []
    fake = types.SimpleNamespace(send_sync=lambda kind, message: sent.append((kind, message)))
    fake.send_progress_text = lambda text, node: fake.send_sync(
        3, struct.pack(">I", len(node)) + node.encode() + text.encode()
    )
    module = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=fake))
    monkeypatch.setitem(sys.modules, "server", module)
    monkeypatch.setitem(sys.modules, "protocol", types.SimpleNamespace(BinaryEventTypes=types.SimpleNamespace(TEXT=3)))
    shown = canvas.show_text("7:12", "he says <S>Hi<E> <img src=x onerror=alert(1)>")
    plain = "he says ‹S›Hi‹E› ‹img src=x onerror=alert(1)›"
    assert shown.as_dict()["text"][0] == plain
    assert [kind for kind, _ in sent] == [3, 3]
    for prompt_id_first in (False, True):
        read = [read_by_a_canvas(message, prompt_id_first) for _, message in sent]
        assert [each for each in read if each[0] and each[1]] == [("7:12", plain)]
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace())
    monkeypatch.delattr(canvas.ui, "PreviewText")
    assert canvas.show_text("7", "text") is None
    assert len(sent) == 2


# ---------------------------------------------------------------- on a server


@pytest.fixture
def configured(comfy):
    """Writes the configuration file of the running server."""
    file = comfy.base / "user" / "nava_rewrite.json"
    yield lambda **values: file.write_text(json.dumps(values))
    file.unlink(missing_ok=True)


def node(**changed):
    inputs = {"draft": DRAFT, "language": "en", "backend": "auto", "seed": 3, "temperature": 0.7, "max_tokens": 512}
    return {"1": {"class_type": "NavaRewritePrompt", "inputs": {**inputs, **changed}}}


def test_a_draft_is_rewritten_on_the_canvas(comfy, configured):
    with ChatStandIn(GOOD) as stand_in:
        configured(url=stand_in.url, model="mine")
        graph = node()
        graph["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
        run = comfy.ok(graph)
        assert run.text("2") == GOOD
        assert "‹S›Come in, please!‹E›" in run.text("1")
        assert "Rewritten by" in run.text("1")
        assert "Draft:" in run.text("1")
        assert any(name == "1" and most == 512 for name, _, most in run.progress)
        assert stand_in.requests[0]["model"] == "mine"
        comfy.ok(graph)
        assert len(stand_in.requests) == 1, "the same input is asked about once"


def test_a_server_that_is_gone_leaves_the_draft(comfy, configured):
    configured(url="http://127.0.0.1:9/v1")
    graph = node(seed=4)
    graph["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    run = comfy.ok(graph)
    assert run.text("2") == DRAFT
    assert "No chat server answers at 127.0.0.1:9" in run.text("1")


def test_rewriting_can_be_interrupted(comfy, configured):
    with ChatStandIn("word " * 4000, pause=0.05) as stand_in:
        configured(url=stand_in.url)
        start = time.monotonic()
        run = comfy.run(node(seed=5), on_progress=lambda run: comfy.interrupt())
        assert run.status == "interrupted"
        assert time.monotonic() - start < 10
        assert stand_in.gone.wait(5)
    assert "1" not in run.outputs


def test_a_workflow_cannot_choose_an_address(comfy, configured):
    from server import RefusedError

    with ChatStandIn(GOOD) as ours, ChatStandIn(GOOD) as theirs:
        configured(url=ours.url)
        address = dict.fromkeys(("url", "server", "address", "base_url", "NAVA_REWRITE_URL", "settings"), theirs.url)
        comfy.ok(node(seed=6, **address), NAVA_REWRITE_URL=theirs.url)
        comfy.ok(node(seed=7, draft=f"{DRAFT} {theirs.url}/chat/completions"))
        with pytest.raises(RefusedError):
            comfy.run(node(seed=8, backend=theirs.url))
        inputs = comfy.get("/object_info/NavaRewritePrompt")["NavaRewritePrompt"]["input"]
        assert not {*inputs["required"], *inputs["optional"]} & {*address}
        assert len(ours.requests) == 2
        assert not theirs.requests
        assert not theirs.paths


def test_the_canvas_cannot_write_the_configuration(comfy, configured):
    """The user folder's own files are above those that the canvas may store."""
    import urllib.error
    import urllib.request

    for name in ("nava_rewrite.json", "..%2Fnava_rewrite.json", "..%2F..%2Fuser%2Fnava_rewrite.json"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{comfy.port}/userdata/{name}", b'{"url": "http://127.0.0.1:9"}', method="POST"
        )
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=30).close()
    assert not (comfy.base / "user" / "nava_rewrite.json").exists()


def test_a_draft_that_is_wrong_is_an_error_as_anywhere(comfy):
    name, message = comfy.fails(node(draft="He says <S>Hi"))
    assert name == "NavaRewritePrompt"
    assert "never closed" in message


def test_a_first_frame_is_described(comfy, configured):
    with ChatStandIn(SEEN) as stand_in:
        configured(url=stand_in.url)
        inputs = {"language": "en", "backend": "auto", "seed": 1, "temperature": 0.7, "max_tokens": 512}
        graph = {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 0}},
            "2": {"class_type": "NavaCaptionImage", "inputs": {"image": ["1", 0], **inputs}},
        }
        assert comfy.ok(graph).text("2") == SEEN
        content = stand_in.requests[0]["messages"][1]["content"]
        assert content[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    configured(url="http://127.0.0.1:9")
    graph["2"]["inputs"]["seed"] = 2
    assert comfy.fails(graph)[1].startswith("No chat server answers")
