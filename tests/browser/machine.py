"""The browser of this machine, and a picture and voices for it to work with."""

import math
import os
import shutil
import struct
import wave
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """CHROMIUM_PATH, or a Chromium on the path."""
    given = os.environ.get("CHROMIUM_PATH")
    return given or next(filter(None, map(shutil.which, BROWSERS)), None)


def make_inputs(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").resize((120, 80)).convert("RGB").save(folder / "first_frame.png")
    for name, pitch in (("voice", 140), ("voice_first", 210), ("voice_second", 110), ("speech", 180)):
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            tones = (sum(math.sin(math.tau * pitch * k * i / 16000) / k for k in (1, 2, 3)) for i in range(16000))
            file.writeframes(b"".join(struct.pack("<h", int(9000 * tone)) for tone in tones))
