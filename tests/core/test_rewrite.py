"""Rewriting against a stand-in chat server that answers well, badly, slowly, with speech changed, and not at all."""

import importlib.util
import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from nava_core.batch import Watcher, run_batch
from nava_core.cli import main
from nava_core.jobs import Defaults, make_job
from nava_core.prompt import PromptTokenizer, SpanError, parse_spans
from nava_core.rewrite import (
    Answer,
    BackendMissingError,
    ChatServer,
    Draft,
    LocalChat,
    Question,
    RewriteError,
    ServerSettings,
    caption,
    clean_answer,
    measure,
    rewrite,
    server_settings,
)
from nava_core.rewrite.batch import BatchRewriter
from nava_core.rewrite.checks import mark_quoted_speech, restored, shortened, speech_faults
from nava_core.rewrite.instructions import caption_instruction, rewrite_instruction
from nava_core.video_files import write_picture


def helper(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ChatStandIn = helper("_chat_server").ChatStandIn
FakePipeline = helper("_fake_pipeline").FakePipeline

DRAFT = "A man at a door says <S>Come in, please!<E> and a woman says <S>Thank you.<E>"
GOOD = (
    "In a narrow hallway lit by a warm lamp a man in a grey cardigan opens a wooden door. In a low, friendly voice, "
    "close to us, he says: <S>Come in, please!<E> A woman in a wet red coat steps over the threshold and answers "
    "softly, from the right: <S>Thank you.<E> The camera stays at chest height and does not move. Rain patters "
    "outside, the hinge creaks, and the small room gives both voices a short echo."
)
QUIET = (
    "A grey cat walks along a low brick wall at dusk, its tail high, the last light on its back. It stops, looks into "
    "the camera and walks on. The camera follows at the height of the wall. Soft steps and far traffic; nobody speaks."
)
CHINESE = (
    "傍晚，一只灰猫沿着低矮的砖墙走来，尾巴高高竖起，背上落着最后一点光。它停下看向镜头，又继续走。"
    "镜头与墙同高，平稳跟随。轻轻的脚步声和远处的车声，没有人说话。"
)


class Scripted:
    """A backend that says what it is told to, and remembers what it was asked."""

    name = "a script"

    def __init__(self, *answers):
        self.answers, self.questions = list(answers), []

    def ask(self, question, step=None):
        self.questions.append(question)
        answer = self.answers[min(len(self.questions), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Answer) else Answer(answer)


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch):
    for name in ("URL", "MODEL", "KEY", "TIMEOUT"):
        monkeypatch.delenv(f"NAVA_REWRITE_{name}", raising=False)


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer(helper("_sentencepiece").train())


def english(text=DRAFT, **settings):
    return Draft(text, "en", **settings)


def server(stand_in, **settings):
    return ChatServer(ServerSettings(stand_in.url, **settings))


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("speech", [True, False])
@pytest.mark.parametrize("image", [True, False])
def test_the_instruction_has_the_four_parts_and_what_the_draft_needs(language, speech, image):
    text = rewrite_instruction(language, speech=speech, image=image)
    parts = {
        "en": ("- The picture", "- What happens", "- The camera", "- The sound"),
        "zh": ("- 画面整体", "- 时间中的变化", "- 镜头与构图", "- 声音"),
    }
    places = [text.index(part) for part in parts[language]]
    assert places == sorted(places)
    assert ("<S>" in text) == speech
    assert (("Nobody speaks" if language == "en" else "没有人说话") in text) != speech
    assert (("first frame" if language == "en" else "第一帧") in text) == image
    assert bool(re.search(r"[\u4e00-\u9fff]", text)) == (language == "zh")


def test_the_instruction_follows_the_mode():
    sound = rewrite_instruction("en", speech=False, image=False, mode="audio")
    picture = rewrite_instruction("en", speech=False, image=False, mode="video")
    assert "- The camera" not in sound
    assert "only what is heard" in sound
    assert "- The camera" in picture
    assert "- The sound" not in picture
    assert "Nobody speaks" not in picture
    assert "- The sound" not in caption_instruction("en")
    for wrong in ("fr", ""):
        with pytest.raises(ValueError, match="zh or en"):
            rewrite_instruction(wrong, speech=True, image=False)


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("```\nA man walks.\n```", "A man walks."),
        ("```text\nA man walks.", "A man walks."),
        ("<think>Let me see.\nA dog?</think>\n\nA man walks.", "A man walks."),
        ("so I write it</think>A man walks.", "A man walks."),
        ("<think>and on and on", ""),
        ("Sure! Here is the rewritten prompt:\n\nA man walks.", "A man walks."),
        ("Sure, here it is:\n\nA man walks.", "A man walks."),
        ("Here is a man: he walks.", "Here is a man: he walks."),
        ("Certainly.\n\nA man walks.\n\nLet me know if you want changes!", "A man walks."),
        ("**Prompt:** A man walks.\n\n---\n*Note: I kept it short.*", "A man walks."),
        ("**Global visual description:** A man walks.\n**Audio description:** Steps.", "A man walks. Steps."),
        ("1. A man walks.\n2. Steps.", "A man walks. Steps."),
        ("“A man walks.”", "A man walks."),
        ("好的，以下是改写后的提示词：\n一个人在走。\n\n（字数：6）", "一个人在走。"),
        ("He says < s >Hi</S> twice.", "He says <S>Hi<E> twice."),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>A man walks.<|return|>", "A man walks."),
        ("Sure-footed goats climb: one falls.", "Sure-footed goats climb: one falls."),
        ("A woman: tall, in red. Her sign says: stop.", "A woman: tall, in red. Her sign says: stop."),
        ("他说：＜S＞你好。＜／Ｓ＞", "他说：<S>你好。<E>"),
        ("He says &lt;S&gt;Hi&amp;lt;/S&amp;gt; twice.", "He says <S>Hi<E> twice."),
        ("A ＜extra_id_2＞ man.", "A <extra_id_2> man."),
        ("A \x1b[31mred\x07 man\u202e walks.", "A red man walks."),
        ("A man \ud83d\ude00 \ud83d.", "A man \U0001f600 \ufffd."),
    ],
)
def test_only_the_paragraph_is_kept(said, kept):
    assert clean_answer(said) == kept


@pytest.mark.parametrize(
    "piece", ["<think>", "a<think></think>", "```", 'says "', "说", "Sure ", "- \t", "<S>a<E>", "He goes. "]
)
def test_an_answer_without_an_end_is_judged_at_once(piece):
    begun = time.monotonic()
    prompt = clean_answer(piece * (4_000_000 // len(piece)))
    speech_faults(prompt, ["a"])
    mark_quoted_speech(prompt.replace("<", " "))
    shortened(prompt, [])
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("draft", "marked"),
    [
        ('A girl says "hello there" to us.', "A girl says <S>hello there<E> to us."),
        ("He asked her, “Ready?”, she replied “No.”", "He asked her, <S>Ready?<E>, she replied <S>No.<E>"),
        ("女人说道：“你好。”", "女人说道：<S>你好。<E>"),
        ('A sign reads "OPEN".', 'A sign reads "OPEN".'),
        ('He says <S>Hi<E> by a sign "OPEN".', 'He says <S>Hi<E> by a sign "OPEN".'),
        ('A shop called "Sunrise".', 'A shop called "Sunrise".'),
        ('A sign says "OPEN".', 'A sign says "OPEN".'),
        ('She calls "Help!"', "She calls <S>Help!<E>"),
        ("街道上挂着“欢迎光临”的横幅。", "街道上挂着“欢迎光临”的横幅。"),
        ("一家叫“晨光”的咖啡馆，小说封面写着“夜色”。", "一家叫“晨光”的咖啡馆，小说封面写着“夜色”。"),
        ("他回答得很轻：“好。”", "他回答得很轻：<S>好。<E>"),
        ("她轻声说“晚安”，孩子问了一句，“走吗？”", "她轻声说<S>晚安<E>，孩子问了一句，<S>走吗？<E>"),
    ],
)
def test_what_is_said_in_quotation_marks_is_speech(draft, marked):
    assert mark_quoted_speech(draft) == marked


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<S>One two<E> <S>three<E>", None),
        ("<S>one, TWO.<E> <S>“Three”<E>", None),
        ("<S>three<E> <S>one two<E>", "another order"),
        ("<S>One two<E>", "left out"),
        ("<S>One too<E> <S>three<E>", "became"),
        ("<S>One two<E> <S>three<E> <S>four<E>", "not in the draft"),
        ("<S>One two<E> <S>three<E> <S>three<E>", "once"),
        ("<S>One two <S>three<E>", "do not pair up"),
        ("One two three", "left out"),
    ],
)
def test_speech_must_be_the_same_words_in_the_same_order(prompt, words):
    faults = speech_faults(prompt, ["One two", "three"])
    assert faults == [] if words is None else words in " ".join(faults)


def test_case_and_punctuation_come_back_as_in_the_draft():
    assert restored("a <S>one, TWO.<E> b <S> Three <E>", ["One two", "“three”!"]) == "a <S>One two<E> b <S>“three”!<E>"


# ---------------------------------------------------------------- the whole way


def test_a_good_answer_is_taken(tokenizer):
    with ChatStandIn(GOOD) as stand_in:
        steps = []
        result = rewrite(
            server(stand_in, key="secret"),
            english(seed=5, temperature=0.3, max_tokens=700),
            tokenizer=tokenizer,
            step=lambda *at: steps.append(at),
        )
    assert result.prompt == GOOD
    assert result.changed
    assert result.asked == 1
    assert result.length.exact
    assert result.length.tokens == tokenizer(GOOD).total_tokens
    assert "2 speech spans word for word" in result.report()
    assert "the chat server's model stand-in" in result.report()
    assert not result.warning
    (request,) = stand_in.requests
    assert (request["seed"], request["temperature"], request["max_tokens"]) == (5, 0.3, 700)
    assert request["model"] == "stand-in"
    assert request["stream"] is True
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert DRAFT in request["messages"][1]["content"]
    assert stand_in.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(server(stand_in, key="secret").settings)
    assert stand_in.paths == ["/v1/models", "/v1/chat/completions"]
    assert steps[-1][0] > 3
    assert all(most == 700 for _, most in steps)


def test_a_server_that_does_not_stream_will_do():
    with ChatStandIn(GOOD, stream=False) as stand_in:
        assert rewrite(server(stand_in, model="own"), english()).prompt == GOOD
    assert stand_in.requests[0]["model"] == "own"
    assert stand_in.paths == ["/v1/chat/completions"]


def test_wrapping_is_taken_off():
    wrapped = f"<think>Speech first?</think>Sure, here's the prompt:\n\n```\n{GOOD.lower().replace('<s>', '<S>')}\n```"
    with ChatStandIn(wrapped) as stand_in:
        result = rewrite(server(stand_in), english())
    assert [span.words for span in parse_spans(result.prompt)] == ["Come in, please!", "Thank you."]
    assert result.asked == 1
    assert "think" not in result.prompt


DROPPED = GOOD.replace(" and answers softly, from the right: <S>Thank you.<E>", ".")
REORDERED = GOOD.replace("Come in, please!", "X").replace("Thank you.", "Come in, please!").replace("X", "Thank you.")
REWORDED = GOOD.replace("Thank you.", "Thanks a lot.")
UNCLOSED = GOOD.replace("Thank you.<E>", "Thank you.")
ADDED = f"{GOOD} He adds: <S>Sit down.<E>"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (DROPPED, "left out"),
        (REORDERED, "another order"),
        (REWORDED, "became"),
        (UNCLOSED, "do not pair up"),
        (ADDED, "not in the draft"),
        ("I'm sorry, but I can't help with that.", "left out"),
    ],
)
def test_spoilt_speech_is_asked_for_again_and_then_given_up(bad, why):
    with ChatStandIn(bad, GOOD) as stand_in:
        result = rewrite(server(stand_in), english())
    assert result.prompt == GOOD
    assert result.asked == 2
    assert "second attempt" in result.report()
    again = stand_in.requests[1]["messages"]
    assert [message["role"] for message in again] == ["system", "user", "assistant", "user"]
    assert again[2]["content"] == bad
    assert why in again[3]["content"]
    with ChatStandIn(bad) as stand_in:
        result = rewrite(server(stand_in), english())
    assert len(stand_in.requests) == 2
    assert result.prompt == DRAFT
    assert not result.changed
    assert not result.unavailable
    assert why in result.warning
    assert result.report().startswith("The draft is used as it is.")


@pytest.mark.parametrize(
    ("draft", "language", "bad", "good", "why"),
    [
        ("A cat.", "en", "<S>Miaow<E> A cat on a wall looks at the camera.", QUIET, "no speech"),
        ("A cat.", "en", CHINESE, QUIET, "not in English"),
        ("A cat.", "zh", QUIET, CHINESE, "not in Chinese"),
        (QUIET, "en", "A cat.", QUIET + " A bell.", "shorter than the draft"),
        ("A cat.", "en", "Sorry, I can't do that.", QUIET, "refusal"),
        ("A cat.", "en", "A cat walks and walks. " * 40, QUIET, "again and again"),
        ("A cat.", "en", "```\n```", QUIET, "no prompt"),
    ],
)
def test_other_faults_are_told_too(draft, language, bad, good, why):
    backend = Scripted(bad, good)
    result = rewrite(backend, Draft(draft, language))
    assert result.prompt == good
    assert result.asked == 2
    told = backend.questions[1]
    assert why in told.turns[-1]
    assert told.seed == backend.questions[0].seed + 1
    assert rewrite(Scripted(bad), Draft(draft, language)).prompt == draft


def test_the_language_follows_the_draft_where_asked():
    backend = Scripted(CHINESE)
    assert rewrite(backend, Draft("一只猫在走。", "auto")).prompt == CHINESE
    assert "中文" in backend.questions[0].system
    backend = Scripted(QUIET)
    assert rewrite(backend, Draft("A cat walks.", "auto")).prompt == QUIET
    assert "in English" in backend.questions[0].system


def test_quoted_speech_is_kept_as_a_span_but_the_draft_as_typed():
    draft = 'A man says "Come in, please!" and a woman says "Thank you."'
    assert rewrite(Scripted(GOOD), english(draft)).prompt == GOOD
    assert rewrite(Scripted(DROPPED), english(draft)).prompt == draft


def test_speech_in_quotation_marks_is_not_added():
    chatty = GOOD.replace("Rain patters", "A boy behind her says: “Wait for me!” Rain patters")
    backend = Scripted(chatty)
    result = rewrite(backend, english())
    assert result.prompt == DRAFT
    assert "Wait for me" in result.warning
    assert "Wait for me" in backend.questions[1].turns[-1]
    assert rewrite(Scripted(GOOD.replace("a wooden door", "a door of the inn called “Rest”")), english()).changed


def test_what_is_too_long_is_asked_for_again_and_then_cut(tokenizer):
    colours = ("red", "blue", "amber", "white", "teal", "pink", "ochre", "black")
    more = " ".join(f"Lamp {i} of {i * 37 % 91} glows {colours[i % 8]} for {i * 13 % 29} beats." for i in range(90))
    backend = Scripted(f"{GOOD} {more}", GOOD)
    assert rewrite(backend, english(), tokenizer=tokenizer).prompt == GOOD
    assert "too long" in backend.questions[1].turns[-1]
    result = rewrite(Scripted(f"{GOOD} {more}"), english(), tokenizer=tokenizer)
    assert result.changed
    assert result.prompt.startswith(GOOD)
    assert 400 < result.length.tokens <= 512
    assert "left out" in result.report()
    late = rewrite(Scripted(f"{more} {GOOD}"), english(), tokenizer=tokenizer)
    assert late.prompt == DRAFT, "what is cut must not have the speech in it"
    assert not measure(f"{GOOD} {more}").fits
    assert measure(GOOD).fits
    assert not measure(GOOD).exact


def test_an_answer_that_broke_off_ends_with_a_sentence():
    broken = f"{GOOD} And then the"
    result = rewrite(Scripted(Answer(broken, truncated=True)), english())
    assert result.prompt == GOOD
    assert result.asked == 2
    early = rewrite(Scripted(Answer(GOOD[: GOOD.index("Thank you")], truncated=True)), english())
    assert early.prompt == DRAFT
    assert not early.changed
    assert shortened("One. She says <S>Hi. There<E> Then it rains. And", ["Hi. There"]).endswith("rains.")
    assert shortened("One. She says <S>Hi. There", ["Hi. There"]) is None


def test_a_draft_must_be_one():
    with pytest.raises(ValueError, match="empty"):
        rewrite(Scripted(GOOD), Draft("  "))
    with pytest.raises(SpanError, match="never closed"):
        rewrite(Scripted(GOOD), Draft("He says <S>Hi"))
    with pytest.raises(ValueError, match="zh or en"):
        rewrite(Scripted(GOOD), Draft("A cat.", "fr"))


# ---------------------------------------------------------------- servers that do not answer as they should


def failing(handler, request):
    ChatStandIn.send_json(handler, {"error": {"message": "CUDA exploded"}}, 500)


def refusing(handler, request):
    ChatStandIn.send_json(handler, {"error": "no such key"}, 401)


def unknown(handler, request):
    ChatStandIn.send_json(handler, {"error": {"message": "model not found"}}, 404)


def elsewhere(handler, request):
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:9/")
    handler.end_headers()


def web_page(handler, request):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.end_headers()
    handler.wfile.write(b"<html>hello</html>")


def garbage(handler, request):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    handler.wfile.write(b"\xff\x00{{{")


def hung_up(handler, request):
    handler.connection.close()


def half(handler, request):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    ChatStandIn.piece(handler, {"delta": {"content": "A cat"}})


def empty(handler, request):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    ChatStandIn.piece(handler, {"delta": {"reasoning_content": "hm"}, "finish_reason": "length"})


def failing_later(handler, request):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    handler.wfile.write(b'data: {"error": {"message": "out of pages"}}\n\n')


def no_text(handler, request):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    ChatStandIn.piece(handler, {"delta": {"content": True}})
    ChatStandIn.piece(handler, {"delta": {"content": 5}})


def shouting(handler, request):
    ChatStandIn.send_json(handler, {"error": "\x1b[2J\x07busy\ud800"}, 503)


@pytest.mark.parametrize(
    ("answer", "words", "missing"),
    [
        (no_text, "cannot be read.*no text", False),
        (shouting, r"It says: \[2Jbusy$|It says: \[2Jbusy\.", False),
        (failing, "HTTP 500.*CUDA exploded", False),
        (refusing, "refuses the key.*NAVA_REWRITE_KEY", True),
        (unknown, "HTTP 404.*NAVA_REWRITE_MODEL", True),
        (elsewhere, "sends elsewhere", True),
        (web_page, "no chat server.*text/html", False),
        (garbage, "no JSON", False),
        (hung_up, "broke", False),
        (half, "broke off", False),
        (empty, "answered nothing.*thinking", False),
        (failing_later, "out of pages", False),
    ],
)
def test_every_failure_is_a_sentence_and_costs_nothing_but_the_rewriting(answer, words, missing):
    with ChatStandIn(answer) as stand_in:
        result = rewrite(server(stand_in), english())
    assert result.prompt == DRAFT
    assert result.unavailable
    assert result.missing == missing
    assert re.search(words, result.warning)
    assert len(result.warning) < 400
    assert result.warning.endswith((".", "?"))


def test_nobody_there():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    result = rewrite(ChatServer(ServerSettings(f"http://127.0.0.1:{port}")), english())
    assert result.prompt == DRAFT
    assert result.missing
    assert "No chat server answers" in result.warning


def test_an_answer_in_parts_is_read():
    def parts(handler, request):
        content = [{"type": "text", "text": GOOD[:40]}, {"type": "text", "text": GOOD[40:]}]
        ChatStandIn.send_json(handler, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})

    with ChatStandIn(parts) as stand_in:
        assert rewrite(server(stand_in), english()).prompt == GOOD


def test_a_servers_name_for_its_model_is_shown_short_and_plain():
    with ChatStandIn(GOOD, models=["m\x1b[2J" + "x" * 5000]) as stand_in:
        result = rewrite(server(stand_in), english())
    assert result.changed
    assert "\x1b" not in result.report()
    assert len(result.report()) < 500


def test_a_server_without_a_model():
    with ChatStandIn(GOOD, models=()) as stand_in:
        assert "has no model" in rewrite(server(stand_in), english()).warning


def test_a_slow_server_is_given_up():
    def silent(handler, request):
        time.sleep(1.5)

    with ChatStandIn(silent) as stand_in:
        start = time.monotonic()
        result = rewrite(server(stand_in, timeout=0.3), english())
    assert time.monotonic() - start < 1.3
    assert "too slow" in result.warning
    assert result.unavailable
    assert result.prompt == DRAFT


def test_a_server_that_dribbles_is_given_up():
    with ChatStandIn("x" * 40_000, pause=0.05) as stand_in:
        start = time.monotonic()
        result = rewrite(server(stand_in, timeout=0.2), english())
        assert time.monotonic() - start < 2.5
        assert "too slow" in result.warning


def test_a_server_that_does_not_stop_is_stopped():
    with ChatStandIn("word " * 20_000, pause=0.001) as stand_in:
        answer = rewrite(server(stand_in), english(max_tokens=64))
        assert stand_in.gone.wait(3)
    assert answer.prompt == DRAFT
    assert not answer.unavailable


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", [Stop, ZeroDivisionError, KeyboardInterrupt])
def test_an_interruption_goes_through_at_once_and_hangs_up(kind):
    with ChatStandIn("word " * 2000, pause=0.05) as stand_in:
        start = time.monotonic()

        def step(tokens, most):
            if time.monotonic() - start > 0.3:
                raise kind

        with pytest.raises(kind):
            rewrite(server(stand_in), english(), step=step)
        assert time.monotonic() - start < 1
        assert stand_in.gone.wait(3), "the server goes on writing for nobody"
    assert not [thread for thread in threading.enumerate() if thread.name == "nava-chat-server" and thread.is_alive()]


# ---------------------------------------------------------------- configuration


def test_the_address_comes_from_the_environment_then_from_the_file(tmp_path):
    file = tmp_path / "nava_rewrite.json"
    assert server_settings({}, file) is None
    file.write_text(json.dumps({"url": "http://host:1/v1", "model": "a", "extra": {"top_k": 20}}))
    assert server_settings({}, file) == ServerSettings("http://host:1/v1", "a", extra={"top_k": 20})
    environment = {"NAVA_REWRITE_URL": "http://other:2", "NAVA_REWRITE_TIMEOUT": "7.5"}
    assert server_settings(environment, file) == ServerSettings("http://other:2", "a", timeout=7.5, extra={"top_k": 20})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ('{"url": 5}', "'url'"),
        ('{"address": "http://a"}', "'address'"),
        ('{"url": "file:///etc/passwd"}', "http://HOST:PORT"),
        ('{"url": "http://"}', "http://HOST:PORT"),
        ('{"url": "http://a:99999"}', "http://HOST:PORT"),
        ('{"url": "http://me:secret@a"}', "password"),
        ('{"url": "http://a", "timeout": -1}', "timeout"),
        ('{"url": "http://a", "key": "a\\r\\nb"}', "key"),
    ],
)
def test_a_wrong_configuration_is_a_sentence(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        server_settings({}, tmp_path / "x.json")
    assert str(tmp_path) not in str(error.value)
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="NAVA_REWRITE_TIMEOUT"):
        server_settings({"NAVA_REWRITE_URL": "http://a", "NAVA_REWRITE_TIMEOUT": "soon"})


def test_fields_of_a_certain_server_are_sent_along():
    with ChatStandIn(GOOD) as stand_in:
        rewrite(server(stand_in, extra={"chat_template_kwargs": {"enable_thinking": False}}), english())
    assert stand_in.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}


# ---------------------------------------------------------------- pictures


def test_a_picture_goes_with_the_draft_and_may_be_described_alone():
    picture = torch.rand(40, 2000, 3)
    with ChatStandIn(GOOD, QUIET) as stand_in:
        assert rewrite(server(stand_in), english(image=picture)).prompt == GOOD
        assert caption(server(stand_in), picture, language="en", seed=3) == QUIET
    first, second = (request["messages"] for request in stand_in.requests)
    for messages in (first, second):
        image, text = messages[1]["content"]
        assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert text["type"] == "text"
        assert len(image["image_url"]["url"]) < 150_000
    assert "first frame" in first[0]["content"]
    assert stand_in.requests[1]["seed"] == 3


def test_a_caption_that_will_not_do_is_an_error():
    with pytest.raises(RewriteError, match="takes no pictures"):
        caption(Scripted(Answer(QUIET, saw_image=False)), torch.zeros(4, 4, 3), language="en")
    with pytest.raises(RewriteError, match="not in English"):
        caption(Scripted(CHINESE), torch.zeros(4, 4, 3), language="en")
    assert caption(Scripted(QUIET, CHINESE), torch.zeros(4, 4, 3)) == CHINESE
    note = rewrite(Scripted(Answer(GOOD, saw_image=False)), english(image=torch.zeros(4, 4, 3)))
    assert "not looked at" in note.report()


# ---------------------------------------------------------------- a model from a folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A tiny chat model with random weights."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("chat")
    words = ["<pad>", "<end>", "<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]", GOOD)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_from_a_folder_answers(chat_folder):
    backend = LocalChat(chat_folder, "cpu")
    steps = []
    state = torch.get_rng_state()
    for seed in (1, 2):
        result = rewrite(backend, english(seed=seed, max_tokens=20), step=lambda *at: steps.append(at))
        assert result.prompt == DRAFT, "random words are no prompt"
        assert result.asked == 2
    texts = [backend.ask(Question("Write.", ("A cat.",), seed=seed, max_tokens=20)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert 1 <= max(tokens for tokens, _ in steps) <= 20
    assert {most for _, most in steps} == {20}

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        rewrite(backend, english(), step=stop)
    backend.close()


def test_a_model_that_fails_costs_only_the_rewriting(chat_folder, monkeypatch):
    backend = LocalChat(chat_folder, "cpu")
    backend.ask(Question("Write.", ("A cat.",), max_tokens=2))

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backend._model, "generate", fail)
    result = rewrite(backend, english())
    assert result.prompt == DRAFT
    assert "failed: out of memory." in result.warning
    assert result.unavailable


def test_a_folder_may_bring_no_code_and_no_pickles(chat_folder, tmp_path):
    import shutil

    folder = shutil.copytree(chat_folder, tmp_path / "chat")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "x.Model"}}))
    (folder / "x.py").write_text("raise SystemExit('run')")
    with pytest.raises(BackendMissingError, match="Python code of its own"):
        LocalChat(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BackendMissingError, match=r"no \.safetensors file"):
        LocalChat(folder)
    with pytest.raises(BackendMissingError, match="no chat model's folder"):
        LocalChat(tmp_path)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    result = rewrite(LocalChat(folder, "cpu"), english())
    assert result.missing
    assert "transformers can load" in result.warning
    assert result.prompt == DRAFT


# ---------------------------------------------------------------- nava rewrite


def test_the_command(capsys, monkeypatch):
    with ChatStandIn(GOOD, GOOD, DROPPED) as stand_in:
        speech = ("--speech", "Come in, please!", "--speech", "Thank you.")
        options = ("--language", "en", "--seed", "9", "--server", stand_in.url, "--server-model", "m")
        assert main(["rewrite", "A man and a woman at a door.", *speech, *options]) == 0
        out, err = capsys.readouterr()
        assert out == f"{GOOD}\n"
        assert "Rewritten by" in err
        assert stand_in.requests[0]["seed"] == 9
        assert stand_in.requests[0]["model"] == "m"
        assert "<S>Come in, please!<E> <S>Thank you.<E>" in stand_in.requests[0]["messages"][1]["content"]
        monkeypatch.setenv("NAVA_REWRITE_URL", stand_in.url)
        assert main(["rewrite", DRAFT, "--language", "en", "--server"]) == 0
        capsys.readouterr()
        assert main(["rewrite", DRAFT, "--language", "en"]) == 1
        out, err = capsys.readouterr()
        assert out == f"{DRAFT}\n"
        assert "used as it is" in err


def test_the_environments_key_goes_to_the_commands_server(capsys, monkeypatch):
    monkeypatch.delenv("NAVA_REWRITE_URL", raising=False)
    monkeypatch.setenv("NAVA_REWRITE_KEY", "secret")
    monkeypatch.setenv("NAVA_REWRITE_MODEL", "large")
    with ChatStandIn(GOOD) as stand_in:
        assert main(["rewrite", DRAFT, "--language", "en", "--server", stand_in.url]) == 0
    assert stand_in.headers[0]["Authorization"] == "Bearer secret"
    assert stand_in.requests[0]["model"] == "large"


def test_the_command_describes_a_picture(capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "her.png")
    with ChatStandIn(QUIET) as stand_in:
        arguments = ("--server", stand_in.url, "--language", "en", "--image", str(tmp_path / "her.png"))
        assert main(["rewrite", *arguments]) == 0
    assert capsys.readouterr().out == f"{QUIET}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("A cat.",), "No chat model to ask"),
        (("A cat.", "--server", "ftp://x"), "http://HOST:PORT"),
        (("A cat.", "--server", "http://a", "--model", "b"), "not both"),
        (("A cat.", "--model", "gone"), "no chat model's folder"),
        (("--server", "http://a"), "Give a draft"),
        (("He says <S>Hi", "--server", "http://a"), "never closed"),
        (("A cat.", "--speech", "<S>Hi<E>", "--server", "http://a"), "words alone"),
        (("A cat.", "--image", "gone.png", "--server", "http://a"), "no image"),
        (("A cat.", "--temperature", "hot", "--server", "http://a"), "no number"),
        (("A cat.", "--temperature", "2.5", "--server", "http://a"), "0 to 2"),
    ],
)
def test_a_wrong_command_is_one_sentence(capsys, arguments, words):
    assert main(["rewrite", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert not out
    assert len(err.strip().splitlines()) == 1


# ---------------------------------------------------------------- nava batch --rewrite


def batch(tmp_path, stand_in, pipeline, *lines, **options):
    source = tmp_path / "clips.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    rewriter = BatchRewriter(server(stand_in), language="en") if stand_in is not None else None
    return run_batch(source, tmp_path / "out", lambda: pipeline, Defaults(steps=2), rewriter=rewriter, **options)


def report(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]


def test_a_batch_is_rewritten_before_it_is_made_and_only_once(tmp_path):
    def answer(handler, request):
        draft = request["messages"][1]["content"]
        stand_in.say(handler, GOOD if "Come in" in draft else QUIET)

    lines = ({"id": "door", "prompt": DRAFT, "gen_turn": 2}, {"id": "cat", "prompt": "A cat."})
    with ChatStandIn(answer) as stand_in:
        pipeline = FakePipeline()
        result = batch(tmp_path, stand_in, pipeline, *lines)
        assert [request["prompt"] for request in pipeline.requests] == [GOOD, GOOD, QUIET]
        assert len(stand_in.requests) == 2, "takes share a prompt"
        made = [record for record in report(tmp_path) if record.get("status") == "made"]
        assert [(record["draft"], record["prompt"]) for record in made] == [(DRAFT, GOOD)] * 2 + [("A cat.", QUIET)]
        keys = [outcome.key for outcome in result.outcomes]

        again = batch(tmp_path, stand_in, pipeline, *lines)
        assert [outcome.status for outcome in again.outcomes] == ["skipped"] * 3
        assert [outcome.key for outcome in again.outcomes] == keys
        assert len(stand_in.requests) == 2
        assert len(pipeline.requests) == 3

        batch(tmp_path, stand_in, pipeline, *lines, {"id": "third", "prompt": "A grey cat."})
        assert len(stand_in.requests) == 3
        assert pipeline.requests[-1]["prompt"] == QUIET
    plain = batch(tmp_path / "..", None, FakePipeline(), {"id": "x", "prompt": QUIET}, remake=True)
    assert plain.outcomes[0].key == keys[2], "the key is that of the prompt the clip was made of"


def test_each_prompt_of_a_long_clip_is_rewritten(tmp_path):
    """And the first frame is that of the first."""
    picture = tmp_path / "her.png"
    write_picture(picture, torch.full((16, 16, 3), 0.5))

    def answer(handler, request):
        asked = request["messages"][1]["content"]
        stand_in.say(handler, GOOD if "Come in" in str(asked) else QUIET)

    with ChatStandIn(answer) as stand_in:
        job = make_job(DRAFT, defaults=Defaults(), seconds=25.0, then=("A cat.", "A dog."), image=picture)
        rewriter = BatchRewriter(server(stand_in), language="en")
        rewriter.prepare(tmp_path, [(1, job)], Watcher())
        made = rewriter(job)
        assert (made.prompt, made.then, made.draft) == (GOOD, (QUIET, QUIET), DRAFT)
        assert ["image" in str(each["messages"][1]["content"]) for each in stand_in.requests] == [True, False, False]


def test_a_batch_takes_the_draft_where_the_answer_will_not_do(tmp_path):
    with ChatStandIn(DROPPED, DROPPED, failing) as stand_in:
        pipeline = FakePipeline()
        batch(tmp_path, stand_in, pipeline, {"id": "a", "prompt": DRAFT}, {"id": "b", "prompt": "A cat."})
        assert [request["prompt"] for request in pipeline.requests] == [DRAFT, "A cat."]
        made = [record for record in report(tmp_path) if record.get("status") == "made"]
        assert all("used as it is" in record["warnings"][0] and "prompt" not in record for record in made)
        asked = len(stand_in.requests)
        stand_in.answers = [QUIET]
        batch(tmp_path, stand_in, pipeline, {"id": "a", "prompt": DRAFT}, {"id": "b", "prompt": "A cat."})
    assert len(stand_in.requests) == asked + 1, "judged twice is judged; unanswered is asked again"
    assert pipeline.requests[-1]["prompt"] == QUIET
    assert len(pipeline.requests) == 3


def test_a_line_whose_picture_cannot_be_read_stops_no_other(tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = ({"id": "a", "prompt": "A cat.", "image_path": "broken.png"}, {"id": "b", "prompt": "A dog."})
    with ChatStandIn(QUIET) as stand_in:
        pipeline = FakePipeline()
        batch(tmp_path, stand_in, pipeline, *lines)
        assert len(stand_in.requests) == 1
        assert pipeline.requests[-1]["prompt"] == QUIET

        def unreadable(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("nava_core.rewrite.batch.file_digest", unreadable)
        lines = (lines[0], {"id": "c", "prompt": "A bird."})
        batch(tmp_path, stand_in, pipeline, *lines)
    assert len(stand_in.requests) == 2


def test_a_batch_stops_before_it_begins_where_nobody_answers(tmp_path):
    with ChatStandIn(QUIET, refusing) as stand_in:
        pipeline = FakePipeline()
        lines = ({"id": "a", "prompt": "A cat."}, {"id": "b", "prompt": "A dog."})
        with pytest.raises(BackendMissingError, match="Line 2 cannot be rewritten"):
            batch(tmp_path, stand_in, pipeline, *lines)
        assert not pipeline.requests
        stand_in.answers = [QUIET]
        asked = len(stand_in.requests)
        batch(tmp_path, stand_in, pipeline, *lines)
    assert len(stand_in.requests) == asked + 1
    assert [each["prompt"] for each in pipeline.requests] == [QUIET]


def test_a_cut_off_line_of_the_memory_is_taken_away(tmp_path):
    with ChatStandIn(QUIET) as stand_in:
        batch(tmp_path, stand_in, FakePipeline(), {"id": "a", "prompt": "A cat."})
        memory = tmp_path / "out" / "rewrites.jsonl"
        whole = memory.read_bytes()
        memory.write_bytes(whole + whole[: len(whole) // 2])
        batch(tmp_path, stand_in, FakePipeline(), {"id": "a", "prompt": "A cat."}, {"id": "b", "prompt": "A dog."})
        assert len(stand_in.requests) == 2
    drafts = [json.loads(line)["draft"] for line in memory.read_text().splitlines()]
    assert drafts == ["A cat.", "A dog."]
    assert memory.read_bytes().startswith(whole)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from nava_core.demo import make_small_models

    made = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    for role in ("text_encoder_fp8", "text_encoder_pth"):
        made[role].unlink()
    return str(made["backbone"].parent)


def test_the_batch_command_rewrites(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("b.jsonl").write_text(json.dumps({"id": "door", "prompt": DRAFT}) + "\n")
    command = ["batch", "b.jsonl", "--out", "clips", "--models", models, "--language", "en"]
    opened = []

    def open_pipeline(files, **options):
        opened.append(FakePipeline(files))
        return opened[-1]

    with ChatStandIn(GOOD) as stand_in:
        rewriting = ["--rewrite", "--server", stand_in.url]
        assert main([*command, *rewriting], open_pipeline=open_pipeline) == 0
        assert main([*command, *rewriting], open_pipeline=open_pipeline) == 0
        assert len(stand_in.requests) == 1
    assert [request["prompt"] for pipeline in opened for request in pipeline.requests] == [GOOD]
    summary = json.loads(Path("clips/summary.json").read_text())["clips"]
    assert [(clip["status"], clip["draft"], clip["prompt"]) for clip in summary] == [("skipped", DRAFT, GOOD)]
    capsys.readouterr()
    assert main([*command, "--server", "http://a"], open_pipeline=open_pipeline) == 2
    assert "for --rewrite" in capsys.readouterr().err
    Path("b.jsonl").write_text(json.dumps({"prompt": "A cat."}) + "\n")
    assert main([*command, "--rewrite", "--server", "http://127.0.0.1:9"], open_pipeline=open_pipeline) == 1
    assert "Line 1 cannot be rewritten. No chat server answers" in capsys.readouterr().err
    assert len(opened) == 1
