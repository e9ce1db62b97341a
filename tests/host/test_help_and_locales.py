"""Help pages and translations on a real server: each node has its page, and all of them say what the nodes are now."""

import ast
import json
import re
import struct
import urllib.error
import urllib.request

import pytest
from comfy_host import ROOT
from server import PACK_FOLDER

LANGUAGES = ("en", "zh")
AUTOGROW = "COMFY_AUTOGROW_V3"
HAN = re.compile(r"[\u4e00-\u9fff]")
CODE = re.compile(r"`[^`]*`")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
PNG_START = b"\x89PNG\r\n\x1a\n"
ALL_PICTURES_BYTES = 250_000
QUOTED_ERROR = re.compile(r"\*[\"“](.+?)[\"”]\*")


@pytest.fixture(scope="module")
def nodes(comfy):
    """The pack's nodes by id, as the server describes them."""
    info = comfy.get("/object_info")
    return {name: node for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK_FOLDER}"}


@pytest.fixture(scope="module")
def page(comfy):
    """A help page by node id and language, from the address where ComfyUI's canvas looks for it."""
    read = {}

    def get(node: str, language: str) -> str:
        path = f"{node}.md" if language == "en" else f"{node}/{language}.md"
        if path not in read:
            address = f"http://127.0.0.1:{comfy.port}/extensions/{PACK_FOLDER}/docs/{path}"
            try:
                with urllib.request.urlopen(address, timeout=60) as answer:
                    assert answer.headers.get_content_type() != "text/html", f"{path}: the canvas takes this for none"
                    read[path] = answer.read().decode()
            except urllib.error.HTTPError as error:
                pytest.fail(f"{path}: {error}")
        return read[path]

    return get


@pytest.fixture(scope="module")
def picture(comfy):
    """(content type, bytes) of a help page's picture: the canvas takes links from the English pages' folder, always."""

    def get(link: str) -> tuple[str, bytes]:
        address = f"http://127.0.0.1:{comfy.port}/extensions/{PACK_FOLDER}/docs/{link}"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                return answer.headers.get_content_type(), answer.read()
        except urllib.error.HTTPError as error:
            pytest.fail(f"{link}: {error}")

    return get


@pytest.fixture(scope="module")
def messages():
    """Every text in the pack's code; what is filled in at run time is a gap."""
    texts = []
    for file in [*ROOT.glob("nodes/**/*.py"), *ROOT.glob("nava_core/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\0".join(texts)


def locale(language: str, file: str = "nodeDefs") -> dict:
    return json.loads((ROOT / "locales" / language / f"{file}.json").read_text(encoding="utf-8"))


def inputs(node: dict) -> dict:
    """Type and options of each input by its name; what the host hands a node unasked is none."""
    return {
        name: (spec[0], spec[1] if len(spec) > 1 else {})
        for kind, part in node["input"].items()
        for name, spec in part.items()
        if kind != "hidden"
    }


def slots(node: dict) -> dict:
    """Tooltips of the slots that grow as they are connected, by the names that the canvas translates them under."""
    found = {}
    for name, (kind, options) in inputs(node).items():
        if kind == AUTOGROW:
            template = options["template"]
            (spec,) = [spec for part in template["input"].values() for spec in part.values()]
            for number in range(template["max"]):
                found[f"{name}_{template['prefix']}{number}"] = spec[1].get("tooltip")
    return found


def named_outputs(node: dict) -> dict:
    """(name, tooltip) by number of the outputs that have a name of their own; ComfyUI translates the others itself."""
    outputs = zip(node["output"], node["output_name"], node["output_tooltips"], strict=True)
    return {str(n): (name, tooltip) for n, (kind, name, tooltip) in enumerate(outputs) if name != kind}


# ---------------------------------------------------------------- help pages


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_node_has_a_help_page_with_all_its_required_inputs(nodes, page, language):
    assert len(nodes) >= 18
    for name, node in nodes.items():
        text = page(name, language)
        missing = [f"`{each}`" for each in node["input"].get("required", {}) if f"`{each}`" not in text]
        assert not missing, f"{name} ({language}) does not mention {missing}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_explain_every_choice(nodes, page, language):
    explained = 0
    for name, node in nodes.items():
        for each, (kind, options) in inputs(node).items():
            if kind == "COMBO" and each not in ("file", "preset"):
                missing = [choice for choice in options["options"] if f"**{choice}**" not in page(name, language)]
                assert not missing, f"{name} ({language}) does not explain {missing} of {each}"
                explained += 1
    assert explained >= 6


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_page_shows_the_picture_of_its_node(nodes, page, picture, language):
    for name, node in nodes.items():
        label = node["display_name"] if language == "en" else locale(language)[name]["display_name"]
        assert PICTURE.findall(page(name, language)) == [(label, f"{name}/node.png")], f"{name} ({language})"
        kind, data = picture(f"{name}/node.png")
        assert (kind, data[:8]) == ("image/png", PNG_START), name
        width, height = struct.unpack(">II", data[16:24])
        assert width <= 440, f"{name}: {width} x {height} is wider than the panel that shows it"


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_quote_errors_that_exist(nodes, page, messages, language):
    quoted = 0
    for name in nodes:
        for quote in QUOTED_ERROR.findall(page(name, language)):
            for part in filter(None, (part.strip(" ,") for part in quote.split("..."))):
                assert part in messages, f"{name} ({language}) quotes “{part}”, which no error says"
                quoted += 1
    assert quoted > 30


def test_pages_have_no_html_by_accident(nodes, page):
    for name in nodes:
        for language in LANGUAGES:
            assert "<" not in CODE.sub("", page(name, language)), f"{name} ({language}): a < outside of `code`"


def test_chinese_pages_use_the_labels_on_the_canvas(nodes, page):
    translated = locale("zh")
    for name, node in nodes.items():
        text = page(name, "zh")
        for each in node["input"].get("required", {}):
            label = translated[name]["inputs"][each]["name"]
            assert f"{label} `{each}`" in text, f"{name}: “{label} `{each}`” is not on the Chinese page"


def test_there_is_no_page_of_a_node_that_is_gone(nodes):
    docs = ROOT / "js" / "docs"
    assert {path.stem for path in docs.glob("*.md")} == set(nodes)
    assert {path.parent.name for path in docs.glob("*/*.md")} == set(nodes)
    assert {path.name for path in docs.glob("*/*.md")} == {f"{each}.md" for each in LANGUAGES if each != "en"}
    pictures = [path for path in docs.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert sorted(path.relative_to(docs).as_posix() for path in pictures) == sorted(
        f"{name}/node.png" for name in nodes
    )
    assert sum(path.stat().st_size for path in pictures) < ALL_PICTURES_BYTES


# ---------------------------------------------------------------- tooltips and translations


def test_each_node_and_input_says_what_it_is_for(nodes):
    for name, node in nodes.items():
        assert node["description"], name
        silent = [each for each, (_, options) in inputs(node).items() if not options.get("tooltip")]
        silent += [slot for slot, tooltip in slots(node).items() if not tooltip]
        assert not silent, f"{name} has no tooltip on {silent}"


def test_chinese_covers_the_nodes_exactly(nodes):
    translated = locale("zh")
    assert set(translated) == set(nodes)
    for name, node in nodes.items():
        entry = translated[name]
        assert set(entry) <= {"display_name", "description", "inputs", "outputs"}, name
        assert entry["display_name"].startswith("NAVA "), name
        assert HAN.search(entry["description"]), name
        given = entry.get("inputs", {})
        assert set(given) == {*inputs(node), *slots(node)}, name
        for each, texts in given.items():
            assert set(texts) == ({"tooltip"} if each in slots(node) else {"name", "tooltip"}), f"{name} {each}"
            assert texts.get("name", each), f"{name} {each}"
            assert HAN.search(texts["tooltip"]), f"{name} {each}"
        outputs = entry.get("outputs", {})
        assert set(outputs) == set(named_outputs(node)), name
        for number, (_, tooltip) in named_outputs(node).items():
            assert HAN.search(outputs[number]["name"]), f"{name} output {number}"
            assert bool(outputs[number].get("tooltip")) == bool(tooltip), f"{name} output {number}"


def test_english_gives_growing_slots_the_tooltips_of_the_schema(nodes):
    """ComfyUI finds the tooltip of such a slot in the translations only."""
    expected = {
        name: {"inputs": {slot: {"tooltip": tooltip} for slot, tooltip in slots(node).items()}}
        for name, node in nodes.items()
        if slots(node)
    }
    assert expected
    assert locale("en") == expected


def test_chinese_names_the_categories_of_our_own(nodes):
    ours = {family for node in nodes.values() for family in node["category"].split("/")[1:]}
    named = locale("zh", "main")["nodeCategories"]
    assert set(named) == ours - {"loaders", "latent", "sampling"}  # the host's own
    assert all(HAN.search(name) for name in named.values())


def test_the_server_hands_out_the_translations(comfy):
    served = comfy.get("/i18n")
    assert set(served) == set(LANGUAGES)
    for language in LANGUAGES:
        assert served[language]["nodeDefs"] == locale(language)
    assert served["zh"]["nodeCategories"] == locale("zh", "main")["nodeCategories"]


def test_translations_have_no_signs_that_the_canvas_reads_as_commands():
    for file in (ROOT / "locales").glob("*/*.json"):
        for text in re.findall(r'"((?:[^"\\]|\\.)*)"', file.read_text(encoding="utf-8")):
            assert not set(text) & set("{}@|$"), f"{file.parent.name}/{file.name}: {text}"
