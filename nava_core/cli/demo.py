"""`nava demo`: small models made on the spot and a short clip from them, to see that everything works here."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from .options import Command, pipeline_opener, writable_folder
from .progress import Progress

PROMPT = "Waves break on a grey shore under a low sky, and a woman says: <S>The storm has passed.<E>"
SECONDS, SIZE, STEPS = 1.0, (160, 96), 8
MODELS = "models"

DESCRIPTION = """Makes small random models (a few MB, in the formats of the real files) in FOLDER/models and a clip of
one second from them. The clip is coloured noise with noise for sound: it shows that the whole job runs here."""

EXAMPLES = """examples:
  nava demo
  nava demo --out /tmp/nava-demo --device cpu"""

NEXT = """The models are random, so this is noise; with the real files in one folder ({link}):
  {command} inspect FOLDER
  {command} generate "A lighthouse at dusk, waves, gulls." --models FOLDER --out lighthouse.mp4"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("nava-demo"), metavar="FOLDER", help="where to (default: nava-demo)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    parser.set_defaults(dtype="auto", vae_dtype="auto", lora=[], compile=False)


def run(args: argparse.Namespace) -> int:
    from ..jobs import Defaults, make_job
    from ..pipeline import find_model_files

    folder = writable_folder(args.out)
    progress = Progress()
    small_models(folder / MODELS, progress)
    pipeline = pipeline_opener(args, find_model_files(folder / MODELS), None)()
    job = make_job(PROMPT, defaults=Defaults(seconds=SECONDS, size=SIZE, steps=STEPS))
    progress.begin("Denoising")
    try:
        latents = pipeline.denoise(**job.request(), callback=progress.step)
    finally:
        progress.end()
    target = folder / "clip.mp4"
    pipeline.save(latents, target)
    print(target)
    progress.say(next_steps())
    return 0


def small_models(folder: Path, progress: Progress) -> None:
    """One small model of every kind the job needs in ``folder``, made if they are not there."""
    from ..demo import FILES, make_small_models

    done = folder / ".complete"  # written last: a run that was cut off starts over
    roles = [role for role in FILES if role not in ("tae", "text_encoder_fp8", "text_encoder_pth", "tokenizer")]
    if done.is_file() and all((folder / FILES[role]).exists() for role in roles):
        return
    progress.say(f"Making small models in {folder}")
    made = make_small_models(folder, preview_decoder=False)
    for role in ("text_encoder_fp8", "text_encoder_pth"):  # other forms of the same model, which would be ambiguous
        made[role].unlink()
    done.touch()


def next_steps() -> str:
    command = "nava" if Path(sys.argv[0]).name == "nava" else f"{shlex.quote(sys.executable)} -m nava_core"
    return NEXT.format(command=command, link="README.md has the table of files")


COMMANDS = [Command("demo", "see that it runs here", DESCRIPTION, EXAMPLES, add_options, run)]
