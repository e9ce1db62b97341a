"""A pipeline that makes a small file of what it was asked for, at once or as slowly as a test wants."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch

from nava_core.pipeline import ClipLatents, LongClip

DELAY = float(os.environ.get("FAKE_SECONDS_A_CLIP", "0"))


REPORT = "a fake clip"


def fake_latents(request):
    """Latents of one frame or step that say what was asked for."""
    warnings = ("the voice is quiet",) if request["voices"] else ()
    if "CUT" in request["prompt"]:
        warnings = (REPORT,)
    video = None if request["mode"] == "audio" else torch.zeros(1, 48, 1, 2, 2)
    audio = torch.zeros(1, 8, 2, 16) if request["mode"] == "audio" else None
    if "pictures" in request:
        request = {**request, "pictures": {str(time): path for time, path in request["pictures"].items()}}
    settings = json.loads(json.dumps(request, default=str, sort_keys=True))
    return ClipLatents(video, audio, 1 / 24 if audio is None else 0.08, REPORT, warnings, settings)


class FakePipeline:
    """Fails for prompts with BOOM, is interrupted by INTERRUPT; remembers what it was asked for.

    ``faults``: errors by a word of the prompt that brings them about, in ``denoise``, or where the word begins with
    DECODE in ``save``. ``saved``: the latents that clips were made of.
    """

    faults: ClassVar[dict[str, Exception]] = {}

    def __init__(self, *opened, **options):
        self.options = options
        self.requests = []
        self.saved = []

    def save(self, latents, path, *, callback=None):
        self.saved.append(latents)
        for word, error in self.faults.items():
            if word.startswith("DECODE") and word in latents.settings.get("prompt", ""):
                raise error
        text = json.dumps(latents.settings, sort_keys=True)
        with Path(path).open("w") as file:
            for part in (text[:10], text[10:]):
                file.write(part)
                file.flush()
                time.sleep(DELAY / 2)
        if callback is not None:
            callback(1, 1)
        return path

    def make_long(self, path, prompts, *, state, anew, callback, **request):
        """One stage a prompt, each of them a file of the state; BOOM of a prompt ends it there."""
        state = path.with_name(f".{path.stem}.segments") if state is None else Path(state)
        state.mkdir(parents=True, exist_ok=True)
        self.requests.append({"prompts": list(prompts), "state": state, "anew": anew, **request})
        self.made = []
        for number, prompt in enumerate(prompts):
            if not (state / f"{number}.txt").exists():
                if "BOOM" in prompt:
                    raise RuntimeError("The network returned NaN.")
                callback(1, 1, None, None)
                self.made.append(number)
                (state / f"{number}.txt").write_text(prompt)
        path.write_text(" | ".join((state / f"{number}.txt").read_text() for number in range(len(prompts))))
        return LongClip(path, request["seconds"], len(prompts), warnings=("the segments differ",), report=REPORT)

    def extend(self, path, source, prompts, *, state, anew, callback, **request):
        return self.make_long(path, prompts, state=state, anew=anew, callback=callback, source=source, **request)

    def retake(self, source, prompt, span, *, callback, **request):
        return self.denoise(prompt, callback=callback, mode="video+audio", source=source, retake=span, **request)

    def refine(self, source, prompt, *, denoise, size, callback, **request):
        more = {"source": source, "denoise": denoise, "size": size, **request}
        return self.denoise(prompt, callback=callback, mode="video+audio", **more)

    def denoise(self, prompt, *, callback, **request):
        self.requests.append({"prompt": prompt, **request})
        for word, error in self.faults.items():
            if word in prompt and not word.startswith("DECODE"):
                raise error
        if "CUT" in prompt:
            self.options["say"](REPORT)
        if "BOOM" in prompt:
            raise RuntimeError("The network returned NaN\nat step 3.")
        if "INTERRUPT" in prompt:
            raise KeyboardInterrupt
        if "DISK" in prompt:
            raise OSError(28, "No space left on device", "clip.mp4")
        for step in range(1, request["steps"] + 1):
            callback(step, request["steps"], None, None)
        return fake_latents({"prompt": prompt, **request})


class TellingPipeline(FakePipeline):
    """Clips that hold which process of which Ray node made them, and the words of the voices it was given."""

    def denoise(self, prompt, *, callback, **request):
        import ray

        latents = super().denoise(prompt, callback=callback, **request)
        node = ray.get_runtime_context().get_node_id()
        voices = [Path(voice).read_bytes().decode() for voice in request["voices"]]
        return replace(latents, settings={"prompt": prompt, "pid": os.getpid(), "node": node, "voices": voices})


if __name__ == "__main__":
    from nava_core.cli import main

    sys.exit(main(sys.argv[1:], open_pipeline=TellingPipeline if os.environ.get("FAKE_TELLS") else FakePipeline))
