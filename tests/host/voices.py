"""Voices, pictures, a video for the host tests: espeak-ng and scikit-image's photographs where they are, else made."""

import shutil
import subprocess
import wave
from pathlib import Path

import numpy
from PIL import Image

WORDS = "The storm has passed, and the harbour is quiet again. We can go out with the boats tomorrow morning."


def write_voice(path: Path, kind: str) -> Path:
    """A few seconds of speech: "low" or "high". Without espeak-ng a buzz with vowel-like formants."""
    if shutil.which("espeak-ng"):
        options = {"low": ["-v", "en-gb", "-p", "15", "-s", "140"], "high": ["-v", "en-us+f3", "-p", "85", "-s", "175"]}
        subprocess.run(["espeak-ng", *options[kind], "-w", str(path), WORDS], check=True)
        return path
    rate, pitch, formants = {"low": (22050, 95, (500, 1100)), "high": (22050, 210, (750, 1900))}[kind]
    time = numpy.arange(4 * rate) / rate
    glide = pitch * (1 + 0.1 * numpy.sin(2 * numpy.pi * 0.7 * time))
    sound = sum(
        numpy.sin(2 * numpy.pi * n * numpy.cumsum(glide) / rate)
        * sum(numpy.exp(-(((n * pitch - formant) / 150) ** 2)) for formant in formants)
        for n in range(1, 20)
    )
    sound *= 0.5 + 0.5 * numpy.sin(2 * numpy.pi * 3 * time)
    data = (sound / numpy.abs(sound).max() * 0.5 * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, len(data), "NONE", ""))
        file.writeframes(data.tobytes())
    return path


def write_photo(path: Path) -> Path:
    """A photograph of a person."""
    from skimage import data

    Image.fromarray(data.astronaut()).save(path)
    return path


def write_video(path: Path, frames: int, size: tuple[int, int]) -> Path:
    """A silent video, 24 frames a second: a bright disc goes across from left to right."""
    import av

    width, height = size
    across, down = numpy.meshgrid(numpy.arange(width), numpy.arange(height))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in range(frames):
            far = numpy.hypot(across - width * frame / frames, down - height / 2) / (height / 4)
            picture = numpy.stack([60 + 180 * (far < 1), 80 + across, 120 + down], axis=-1).clip(0, 255)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype("uint8"), format="rgb24")))
        container.mux(stream.encode())
    return path
