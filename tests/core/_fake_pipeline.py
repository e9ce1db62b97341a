"""A pipeline that makes a small file of what it was asked for, at once or as slowly as a test wants."""

import json
import os
import sys
import time
from pathlib import Path
from typing import ClassVar

DELAY = float(os.environ.get("FAKE_SECONDS_A_CLIP", "0"))


class FakeClip:
    report = "a fake clip"

    def __init__(self, request):
        self.request = request
        self.warnings = ("the voice is quiet",) if request["voices"] else ()
        if "CUT" in request["prompt"]:
            self.warnings = (self.report,)

    def save(self, path):
        text = json.dumps(self.request, default=str, sort_keys=True)
        with Path(path).open("w") as file:
            for part in (text[:10], text[10:]):
                file.write(part)
                file.flush()
                time.sleep(DELAY / 2)


class FakePipeline:
    """Fails for prompts with BOOM, is interrupted by INTERRUPT; remembers what it was asked for.

    ``faults``: errors by a word of the prompt that brings them about.
    """

    faults: ClassVar[dict[str, Exception]] = {}

    def __init__(self, *opened, **options):
        self.options = options
        self.requests = []

    def __call__(self, prompt, *, callback, **request):
        self.requests.append({"prompt": prompt, **request})
        for word, error in self.faults.items():
            if word in prompt:
                raise error
        if "CUT" in prompt:
            self.options["say"](FakeClip.report)
        if "BOOM" in prompt:
            raise RuntimeError("The network returned NaN\nat step 3.")
        if "INTERRUPT" in prompt:
            raise KeyboardInterrupt
        if "DISK" in prompt:
            raise OSError(28, "No space left on device", "clip.mp4")
        for step in range(1, request["steps"] + 1):
            callback(step, request["steps"], None, None)
        return FakeClip({"prompt": prompt, **request})


class TellingPipeline(FakePipeline):
    """Clips that hold which process of which Ray node made them, and the words of the voices it was given."""

    def __call__(self, prompt, *, callback, **request):
        import ray

        clip = super().__call__(prompt, callback=callback, **request)
        node = ray.get_runtime_context().get_node_id()
        voices = [Path(voice).read_bytes().decode() for voice in request["voices"]]
        clip.request = {"prompt": prompt, "pid": os.getpid(), "node": node, "voices": voices}
        return clip


if __name__ == "__main__":
    from nava_core.cli import main

    sys.exit(main(sys.argv[1:], open_pipeline=TellingPipeline if os.environ.get("FAKE_TELLS") else FakePipeline))
