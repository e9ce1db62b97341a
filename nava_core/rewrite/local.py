"""A chat model from a folder on this machine, over transformers: safetensors only, and no code from the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .backends import Answer, BackendMissingError, Question, RewriteError, Step
from .server import small_picture

CODE_KEYS = ("auto_map", "custom_pipelines")  # of a configuration that names code in its folder


class LocalChat:
    """A chat model's folder as a backend; the model is loaded for the first question and kept until ``close``.

    ``device``: "auto" (a GPU where there is one), "cpu", "cuda:1" and so on. Raises BackendMissingError, in a sentence,
    for a folder without a chat model in safetensors files, and for a model that needs code of its own.
    """

    def __init__(self, folder: str | Path, device: str = "auto"):
        self.folder = Path(folder)
        self.device = device
        self.name = f"the model {self.folder.resolve().name}"
        self._config = _checked_config(self.folder)
        self._model = self._reader = None

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return "vision_config" in self._config

    def ask(self, question: Question, step: Step | None = None) -> Answer:
        """The model's answer. Raises RewriteError, and BackendMissingError for a model that cannot be loaded."""
        import torch

        self._load()
        inputs = self._inputs(question)
        before = inputs["input_ids"].shape[1]
        options: dict[str, Any] = {"max_new_tokens": question.max_tokens, "do_sample": question.temperature > 0}
        if question.temperature > 0:
            options |= {"temperature": question.temperature, "top_p": 0.95}
        if step is not None:
            options["stopping_criteria"] = [_Looks(step, before, question.max_tokens)]
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(question.seed % 2**63)
            ids = self._generated(inputs, options)[0, before:]
        text = self._reader.decode(ids, skip_special_tokens=True)
        if not text.strip():
            raise RewriteError(f"{self.name[:1].upper()}{self.name[1:]} answered nothing.")
        return Answer(text, len(ids) >= question.max_tokens, self.sees)

    def _generated(self, inputs: Any, options: dict[str, Any]) -> Any:
        """Raises RewriteError for what goes wrong in the model, which must not cost the draft."""
        looks = options.get("stopping_criteria", [None])[0]
        try:
            return self._model.generate(**inputs, **options)
        except Exception as error:
            if looks is not None and looks.raised is error:
                raise
            raise RewriteError(f"{self.name[:1].upper()}{self.name[1:]} failed: {_line(error)}.") from error

    def close(self) -> None:
        """Lets the model's memory go; the next question loads it again."""
        import gc

        self._model = self._reader = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _inputs(self, question: Question) -> Any:
        messages = _messages(question, self.sees)
        pictures = [small_picture(question.image)] if self.sees and question.image is not None else None
        settings = {"add_generation_prompt": True, "tokenize": False}
        if "enable_thinking" in str(getattr(self._reader, "chat_template", "")):
            settings["enable_thinking"] = False
        try:
            text = self._reader.apply_chat_template(messages, **settings)
        except Exception as error:  # the template is the model's own, and some take no system turn
            system, first, *later = messages
            merged = [{**first, "content": _joined(system["content"], first["content"])}, *later]
            try:
                text = self._reader.apply_chat_template(merged, **settings)
            except Exception:
                raise BackendMissingError(
                    f"{self.folder.name} has no chat template that can be used: give the folder of a chat model "
                    f"({_line(error)})."
                ) from error
        given = {"images": pictures} if pictures else {}
        inputs = self._reader(text=[text], return_tensors="pt", **({} if self.sees else _NO_SPECIAL), **given)
        return inputs.to(self._model.device)

    def _load(self) -> None:
        if self._model is not None:
            return
        try:
            import torch
            import transformers
        except ImportError as error:
            raise BackendMissingError(
                "A chat model from a folder needs the package transformers: run `pip install .[standalone]` in the "
                "pack's folder."
            ) from error
        source = {"local_files_only": True, "trust_remote_code": False}
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        kind = transformers.AutoModelForImageTextToText if self.sees else transformers.AutoModelForCausalLM
        reader = transformers.AutoProcessor if self.sees else transformers.AutoTokenizer
        try:
            self._reader = reader.from_pretrained(str(self.folder), **source)
            model = kind.from_pretrained(str(self.folder), use_safetensors=True, torch_dtype="auto", **source)
            self._model = model.eval().to(device)
        except Exception as error:  # of as many types as there are libraries below
            self._model = None
            raise BackendMissingError(
                f"{self.folder} is no chat model that transformers can load: {_line(error)}."
            ) from error


_NO_SPECIAL = {"add_special_tokens": False}  # the template has put them in


def _checked_config(folder: Path) -> dict[str, Any]:
    """A model folder's configuration, once it is sure that no file in it brings code or pickles."""
    if not (folder / "config.json").is_file():
        raise BackendMissingError(
            f"{folder} is no chat model's folder: give one with config.json, tokenizer and safetensors files."
        )
    for path in sorted(folder.glob("*config.json")):
        if any(key in _json(path) for key in CODE_KEYS):
            raise BackendMissingError(
                f"{folder} wants to run Python code of its own ({path.name}), which is never done: take a model that "
                "transformers knows by itself."
            )
    if not any(folder.glob("*.safetensors")):
        raise BackendMissingError(f"{folder} has no .safetensors file, and other weights are not read: convert them.")
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendMissingError(f"{path} can't be read as JSON: {_line(error)}.") from None
    if not isinstance(value, dict):
        raise BackendMissingError(f"{path} is no configuration: it holds no JSON object.")
    return value


def _messages(question: Question, parts: bool) -> list[dict[str, Any]]:
    """The conversation as chat templates take it; ``parts``: contents as lists, which vision models want."""

    def content(text: str, image: bool = False) -> Any:
        return [{"type": "image"}] * image + [{"type": "text", "text": text}] if parts else text

    messages = [{"role": "system", "content": content(question.system)}]
    for i, turn in enumerate(question.turns):
        picture = i == 0 and question.image is not None
        messages.append({"role": "assistant" if i % 2 else "user", "content": content(turn, picture)})
    return messages


def _joined(system: Any, user: Any) -> Any:
    return [*system, *user] if isinstance(system, list) else f"{system}\n\n{user}"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:199]}…").rstrip(".")


class _Looks:
    """Shows how far the model is after each token; what the step raises ends the generation."""

    def __init__(self, step: Callable[[int, int], None], before: int, most: int):
        self.step, self.before, self.most = step, before, most
        self.raised: Exception | None = None

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        try:
            self.step(input_ids.shape[1] - self.before, self.most)
        except Exception as error:
            self.raised = error
            raise
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
