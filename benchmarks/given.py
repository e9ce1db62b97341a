"""What given parts of a clip do, measured with a small network that has learnt a synthetic world.

    python -m benchmarks.given tests/golden/learned_small.safetensors tests/golden/learned_world.safetensors --docs

Sound is given and the picture made, and the other way round; spans and regions of clips are made again; clips go on
segment by segment; given parts are shown clean and at the noise level of the rest; second passes. Everything goes
through the pack's own ``denoise`` with its masks. Picture is judged by the picture and sound by the sound (see
``learned.py``); each figure is a mean over clips with its standard error. Figures go to
``benchmarks/results/given.json``, with ``--docs`` their tables into ``docs/given_parts.md``. A CPU and a few minutes
are enough.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nava_core import Guidance, flow_sigmas, load_backbone
from nava_core.given import CLEAN, SHOWN, frames_touching, steps_touching, steps_within

from .learned import FRAME_RATE, FRAMES, SIZE, STEPS, Apart, Span, World

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results/given.json", ROOT / "docs/given_parts.md"
PLAIN = Guidance(alignment=False, video_text=1, audio_text=1, audio_timbre=0)
ALIGNED = Guidance(video_text=0, video_align=1, audio_text=0, audio_align=1, audio_timbre=0)
MAKERS = Guidance()
RETAKEN = (0.6, 1.4)  # seconds of the clip
FRAMES_ON, STEPS_ON = FRAMES - 1, 50  # what a segment adds: its frame 0 is there already
SEGMENTS = 5
DENOISE = (0.3, 0.5, 0.7, 0.8, 0.9)
PLACES = {
    "first frame": [0],
    "last frame": [12],
    "first and last frame": [0, 12],
    "a frame amid": [6],
    "three first frames": [0, 1, 2],
    "three frames amid": [5, 6, 7],
    "three last frames": [10, 11, 12],
}

Pair = tuple[Tensor, Tensor]
Shown = dict[str, Tensor]  # a measure of every clip, by its name


@dataclass(frozen=True)
class Column:
    heading: str
    digits: int = 2

    def text(self, value: list[float] | None) -> str:
        return "" if value is None else f"{value[0]:.{self.digits}f} ± {value[1]:.{self.digits}f}"


COLUMNS = {
    "sync_ms": Column("bounces apart from the given part, ms", 0),
    "span_ms": Column("within the given span, ms", 0),
    "rest_ms": Column("outside it, ms", 0),
    "phase_ms": Column("made picture out of time, ms", 0),
    "either_ms": Column("with time forwards or backwards, ms", 0),
    "heard_ms": Column("made sound out of time, ms", 0),
    "lips": Column("lips"),
    "syllables": Column("syllables"),
    "material": Column("material right"),
    "rain": Column("rain right"),
    "colour": Column("colour right"),
    "place": Column("ball misplaced, columns"),
    "jump": Column("step at the joints, 1 is true"),
    "sound_jump": Column("step of the sound"),
    "sharpness": Column("sharpness, 1 is true"),
    "brightness": Column("brightness, 1 is true"),
    "grain": Column("grain", 3),
}


@dataclass(frozen=True)
class Lab:
    """A network, its world's scenes, and how clips are made."""

    network: torch.nn.Module
    world: World
    steps: int = 12
    guidance: Guidance = PLAIN
    seed: int = 1

    @property
    def truth(self) -> Pair:
        return self.world["video"], self.world["audio"]

    def with_(self, **changes) -> Lab:
        return replace(self, **changes)

    def free(self) -> Pair:
        return self.world.sample(self.network, self.guidance, self.steps, self.seed)

    def with_given(
        self, frames: Span = (), steps: Span = (), shown: str = "clean", source: Pair | None = None, **more
    ) -> Pair:
        """Clips of which latent frames and audio steps of ``source``, else of the truth, are given."""
        masks = torch.ones(1, 1, FRAMES, *SIZE), torch.ones(1, STEPS, 1)
        masks[0][:, :, _span(frames)] = SHOWN[shown]
        masks[1][:, _span(steps)] = SHOWN[shown]
        return self.with_masks(*masks, source, **more)

    def with_masks(self, video_mask: Tensor, audio_mask: Tensor, source: Pair | None = None, **more) -> Pair:
        """Clips made where the masks are 1. Raises RuntimeError where a given part is not kept bit by bit."""
        source = self.truth if source is None else source
        # nothing of what is to be made is told
        given = (torch.where(m < 1, x, 0.0) for m, x in zip((video_mask, audio_mask), source, strict=True))
        parts = dict(zip(("video_latent", "audio_latent"), given, strict=True))
        parts |= {"video_mask": video_mask, "audio_mask": audio_mask}
        clip = self.world.sample(self.network, self.guidance, self.steps, self.seed, **parts, **more)
        for mask, made, wanted in zip((video_mask, audio_mask), clip, source, strict=True):
            where = (mask < 1).expand_as(made)
            if not torch.equal(made[where], wanted[where]):
                raise RuntimeError("A given part has not been kept as it was.")
        return clip

    def again(self, denoise: float, source: Pair, audio_mask: Tensor | None) -> Pair:
        """Second pass over ``source`` from part of the way, its sound given or not."""
        sigmas = flow_sigmas(max(1, round(self.steps * denoise)), 5.0, denoise)
        parts = dict(zip(("video_latent", "audio_latent"), source, strict=True))
        return self.world.sample(
            self.network, self.guidance, seed=self.seed, sigmas=sigmas, audio_mask=audio_mask, **parts
        )

    # --- measures ---

    def out_of_time(self, video: Tensor, frames: Span = slice(None)) -> Tensor:
        """Time between the bounces seen and the true ones, ms."""
        return self.world.apart_ms(self.world.seen_phase(video, frames), self.world["scene/phase"])

    def out_of_time_either_way(self, video: Tensor, frames: Span, given: int) -> Tensor:
        """The same where the lone frame ``given`` is known, which tells the ball's height and not whether it rises."""
        world = self.world
        cycles = given / FRAME_RATE / world["periods"][world["scene/period"]]
        seen, phase = world.seen_phase(video, frames), world["scene/phase"]
        return torch.minimum(world.apart_ms(seen, phase), world.apart_ms(seen, -2 * cycles - phase))

    def heard_out_of_time(self, audio: Tensor, steps: Span = slice(None)) -> Tensor:
        return self.world.apart_ms(self.world.heard_phase(audio, steps), self.world["scene/phase"])

    def misplaced(self, video: Tensor, frames: Span = slice(None)) -> Tensor:
        """How far the ball is from its true column, in latents."""
        return (self.world.place(video, frames) - self.world["scene/x"]).abs()

    def looks(self, video: Tensor, frames: Span = slice(None)) -> Shown:
        names = ("brightness", "sharpness", "grain")
        return {name: getattr(self.world, name)(video, frames) for name in names}


def _span(span: Span) -> Span:
    return span if isinstance(span, slice) else list(span)


# ---------------------------------------------------------------- what is measured


def given_sound(lab: Lab) -> Iterator[tuple[str, Shown]]:
    world = lab.world
    all_of_it = slice(None)

    def shown(clip: Pair) -> Shown:
        video = clip[0]
        return {
            "sync_ms": lab.out_of_time(video),
            "lips": world.lips(video, world["audio"]),
            "syllables": world.syllables_truth(video),
            "colour": world.colour_right(video),
        }

    aligned = lab.with_(guidance=ALIGNED)
    yield "truth", shown(lab.truth)
    yield "clean", shown(lab.with_given(steps=all_of_it))
    yield "matched noise", shown(lab.with_given(steps=all_of_it, shown="matched noise"))
    yield "clean, alignment 1", shown(aligned.with_given(steps=all_of_it))
    yield (
        "matched noise, alignment 1",
        shown(aligned.with_given(steps=all_of_it, shown="matched noise")),
    )
    yield "clean, makers' guidance", shown(lab.with_(guidance=MAKERS).with_given(steps=all_of_it))
    yield "clean, interaction off", shown(lab.with_(network=Apart(lab.network)).with_given(steps=all_of_it))
    yield "not given", shown(lab.free())


def given_span_of_sound(lab: Lab) -> Iterator[tuple[str, Shown]]:
    """The first second given, the rest made."""
    world = lab.world
    steps = steps_within(0.0, 1.0, STEPS)
    inside, outside = slice(0, 7), slice(7, FRAMES)

    def shown(clip: Pair) -> Shown:
        video, audio = clip
        return {
            "span_ms": lab.out_of_time(video, inside),
            "rest_ms": lab.out_of_time(video, outside),
            "heard_ms": lab.heard_out_of_time(audio, slice(steps.stop, STEPS)),
            "lips": world.lips(video, audio),
            "sound_jump": world.jump(audio, world["audio"], [steps.stop]),
        }

    yield "truth", shown(lab.truth)
    for name in SHOWN:
        yield name, shown(lab.with_given(steps=steps, shown=name))
    yield "clean, alignment 1", shown(lab.with_(guidance=ALIGNED).with_given(steps=steps))
    yield "not given", shown(lab.free())


def given_picture(lab: Lab) -> Iterator[tuple[str, Shown]]:
    world = lab.world

    def shown(clip: Pair) -> Shown:
        audio = clip[1]
        return {
            "sync_ms": lab.heard_out_of_time(audio),
            "lips": world.lips(world["video"], audio),
            "material": world.material_right(audio),
            "rain": world.rain_right(audio),
        }

    every = slice(None)
    yield "truth", shown(lab.truth)
    yield "clean", shown(lab.with_given(every))
    yield "matched noise", shown(lab.with_given(every, shown="matched noise"))
    yield "clean, alignment 1", shown(lab.with_(guidance=ALIGNED).with_given(every))
    yield "matched noise, alignment 1", shown(lab.with_(guidance=ALIGNED).with_given(every, shown="matched noise"))
    yield "clean, interaction off", shown(lab.with_(network=Apart(lab.network)).with_given(every))


def retake(lab: Lab) -> Iterator[tuple[str, Shown]]:
    """A span of true clips is made again; last the same of the network's own clips, measured against their own time."""
    world = lab.world
    frames, steps = frames_touching(*RETAKEN, FRAMES), steps_touching(*RETAKEN, STEPS)
    joints, sound_joints = [frames.start, frames.stop], [steps.start, steps.stop]
    kept_frames, kept_steps = others(frames, FRAMES), others(steps, STEPS)

    def shown(clip: Pair, picture: bool, sound: bool) -> Shown:
        video, audio = clip
        found = {}
        if picture:
            found |= {"phase_ms": lab.out_of_time(video, frames), "jump": world.jump(video, world["video"], joints)}
            found |= {"place": lab.misplaced(video, frames), "grain": world.grain(video, frames)}
        if sound:
            found["heard_ms"] = lab.heard_out_of_time(audio, steps)
            found["sound_jump"] = world.jump(audio, world["audio"], sound_joints)
        return found

    yield "truth", shown(lab.truth, True, True)
    for name in SHOWN:
        for part, picture, sound in (("both", 1, 1), ("picture", 1, 0), ("sound", 0, 1)):
            kept = kept_frames if picture else slice(None), kept_steps if sound else slice(None)
            yield f"{part}, {name}", shown(lab.with_given(*kept, shown=name), picture, sound)
    free = lab.free()
    spliced = [x.clone() for x in lab.truth]
    spliced[0][:, :, frames], spliced[1][:, steps] = free[0][:, :, frames], free[1][:, steps]
    yield "put in from a clip of its own", shown(tuple(spliced), True, True)


def retake_of_its_own(lab: Lab) -> Iterator[tuple[str, Shown]]:
    """The network's own clips: the retaken span's time against the kept parts'."""
    world = lab.world
    frames, steps = frames_touching(*RETAKEN, FRAMES), steps_touching(*RETAKEN, STEPS)
    kept_frames, kept_steps = others(frames, FRAMES), others(steps, STEPS)
    source, other = lab.with_(seed=lab.seed + 1).free(), lab.free()
    seen, heard = world.seen_phase(source[0], kept_frames), world.heard_phase(source[1], kept_steps)

    def shown(clip: Pair) -> Shown:
        return {
            "phase_ms": world.apart_ms(world.seen_phase(clip[0], frames), seen),
            "heard_ms": world.apart_ms(world.heard_phase(clip[1], steps), heard),
            "jump": world.jump(clip[0], world["video"], [frames.start, frames.stop]),
            "place": (world.place(clip[0], frames) - world.place(source[0], kept_frames)).abs(),
        }

    yield "as it was made at once", shown(source)
    for name in SHOWN:
        yield f"both, {name}", shown(lab.with_given(kept_frames, kept_steps, name, source))
    spliced = [x.clone() for x in source]
    spliced[0][:, :, frames], spliced[1][:, steps] = other[0][:, :, frames], other[1][:, steps]
    yield "put in from another clip", shown(tuple(spliced))


def region(lab: Lab) -> Iterator[tuple[str, Shown]]:
    """A region of all frames is made again, its surroundings and the sound are kept."""
    world = lab.world
    right = world["scene/x"] > 2.5

    def shown(video: Tensor) -> Shown:
        on_the_right = torch.where(right, lab.out_of_time(video), torch.nan)
        lips, syllables = world.lips(video, world["audio"]), world.syllables_truth(video)
        return {"phase_ms": on_the_right, "lips": lips, "syllables": syllables, "grain": world.grain(video)}

    def made(rows: slice, columns: slice, steps: slice = slice(None), made_by: Lab = lab) -> Tensor:
        masks = torch.zeros(1, 1, FRAMES, *SIZE), torch.ones(1, STEPS, 1)
        masks[0][..., rows, columns] = 1
        masks[1][:, steps] = CLEAN
        return made_by.with_masks(*masks)[0]

    mouth, half = (slice(0, 1), slice(0, 1)), (slice(None), slice(3, SIZE[1]))
    yield "truth", shown(world["video"])
    yield "mouth", shown(made(*mouth))
    yield "mouth, interaction off", shown(made(*mouth, made_by=lab.with_(network=Apart(lab.network))))
    yield "right half", shown(made(*half))
    yield "right half, sound made too", shown(made(*half, steps=slice(0, 0)))
    yield "nothing kept but the sound", shown(lab.with_given(steps=slice(None))[0])


def others(span: slice, count: int) -> list[int]:
    return [k for k in range(count) if not span.start <= k < span.stop]


def segments(
    lab: Lab, track: Tensor | None = None, steps_on: int = STEPS_ON, shown: str = "clean", count: int = SEGMENTS
) -> Pair:
    """Clips of ``count`` segments: each begins with the last frame of the one before, given as ``shown``, with a seed
    of its own. ``track`` (scenes, steps, 128) is given to all of them, every segment ``steps_on`` further in."""
    videos, audios = [], []
    for k in range(count):
        masks = torch.ones(1, 1, FRAMES, *SIZE), torch.ones(1, STEPS, 1)
        video, audio = (torch.zeros_like(x) for x in lab.truth)
        video[:, :, :1] = videos[-1][:, :, -1:] if videos else lab.world["video"][:, :, :1]
        masks[0][:, :, 0] = SHOWN[shown]
        if track is not None:
            audio, masks[1][:] = track[:, k * steps_on : k * steps_on + STEPS], CLEAN
        video, audio = lab.with_(seed=lab.seed + k).with_masks(*masks, (video, audio))
        videos.append(video if k == 0 else video[:, :, 1:])
        audios.append(audio)
    return torch.cat(videos, 2), torch.stack(audios, 1)


def continuation(lab: Lab) -> Iterator[tuple[str, Shown]]:
    """Five segments from a true first frame, each measured for itself; ``sync`` against the whole true track."""
    steps_on = {"advancing 50 steps": STEPS_ON, "advancing 52 steps": STEPS}
    frames = FRAMES_ON * SEGMENTS + 1
    track = lab.world.rendered(frames, STEPS * SEGMENTS)[1]
    for name, step in steps_on.items():
        yield from _each_segment(lab, f"given sound, {name}", segments(lab, track, step)[0], True)
    for shown in SHOWN:
        yield from _each_segment(lab, f"sound made, {shown}", segments(lab, shown=shown)[0], False)


def _each_segment(lab: Lab, name: str, video: Tensor, in_time: bool) -> Iterator[tuple[str, Shown]]:
    world = lab.world
    wanted = world.rendered(video.shape[2])[0]
    for k in range(SEGMENTS):
        own = slice(k * FRAMES_ON + 1, (k + 1) * FRAMES_ON + 1)
        found = {}
        if in_time:
            found = {"sync_ms": lab.out_of_time(video, own), "lips": world.lips_truth(video, own)}
        found |= {"colour": world.colour_right(video, own), "place": lab.misplaced(video, own)}
        found["jump"] = world.jump(video, wanted, [own.start])
        yield f"{name}, segment {k + 1}", found | lab.looks(video, own)


def shown(lab: Lab, places: Iterable[str] = tuple(PLACES)) -> Iterator[tuple[str, Shown]]:
    """Given frames clean and in matched noise; the fit of what is made around them."""
    for place in places:
        frames = PLACES[place]
        for name in SHOWN:
            yield f"{place}, {name}", _fit(lab, frames, lab.with_given(frames, shown=name)[0])
    yield "none", _fit(lab, [6], lab.free()[0])


def shown_with_guidance(lab: Lab) -> Iterator[tuple[str, Shown]]:
    yield from shown(lab.with_(guidance=MAKERS), ("first frame", "last frame", "a frame amid", "three first frames"))


def shown_without_text(lab: Lab) -> Iterator[tuple[str, Shown]]:
    """The given frames alone say the ball's colour."""
    lab = lab.with_(world=lab.world.without_text())
    for place, frames in (*PLACES.items(), ("none", [])):
        made = others_of(frames)
        for name in SHOWN if frames else ("clean",):
            video = lab.with_given(frames, shown=name)[0]
            label = f"{place}, {name}" if frames else place
            yield label, {"colour": lab.world.colour_right(video, made), "place": lab.misplaced(video, made)}


def _fit(lab: Lab, frames: list[int], video: Tensor) -> Shown:
    made = others_of(frames)
    joints = [b for a, b in pairwise(range(FRAMES)) if (a in frames) != (b in frames)]
    found = {"phase_ms": lab.out_of_time(video, made), "place": lab.misplaced(video, made)}
    if len(frames) == 1:
        found["either_ms"] = lab.out_of_time_either_way(video, made, *frames)
    return found | {"jump": lab.world.jump(video, lab.world["video"], joints)} | lab.looks(video, made)


def others_of(frames: list[int]) -> list[int]:
    return [k for k in range(FRAMES) if k not in frames]


def second_pass(lab: Lab) -> Iterator[tuple[str, Shown]]:
    """True clips are noised part of the way and made from there."""
    world = lab.world
    source = lab.truth
    keeps = {
        "sound given": torch.full((1, STEPS, 1), CLEAN),
        "sound made too": None,
    }

    def shown(video: Tensor) -> Shown:
        cosine = torch.nn.functional.cosine_similarity(video.flatten(1), source[0].flatten(1))
        found = {"phase_ms": lab.out_of_time(video), "place": lab.misplaced(video), "cosine": cosine}
        return found | {"colour": world.colour_right(video), "lips": world.lips_truth(video)} | lab.looks(video)

    for denoise in DENOISE:
        for name, mask in keeps.items():
            yield f"denoise {denoise:g}, {name}", shown(lab.again(denoise, source, mask)[0])
    yield "denoise 1, sound given", shown(lab.with_given(steps=slice(None))[0])


COLUMNS["cosine"] = Column("picture's cosine to the first")

SECTIONS = {
    "sound": given_sound,
    "span of sound": given_span_of_sound,
    "picture": given_picture,
    "retake": retake,
    "retake of its own": retake_of_its_own,
    "region": region,
    "continuation": continuation,
    "shown": shown,
    "shown, makers' guidance": shown_with_guidance,
    "shown, no text": shown_without_text,
    "second pass": second_pass,
}
TWICE = ("shown", "retake", "retake of its own")  # two clips of each scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="a backbone that has learnt the world")
    parser.add_argument("world", type=Path, help="its vectors and scenes")
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="measure these again and leave the others")
    parser.add_argument("--docs", action="store_true", help=f"put the tables into {DOCS.relative_to(ROOT)}")
    args = parser.parse_args()
    lab = Lab(load_backbone(args.weights, dtype=torch.float32), World.read(args.world, args.scenes), args.steps)
    about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    about |= {"scenes": args.scenes, "steps": args.steps}
    for name in SECTIONS if args.only is None else args.only:
        started = time.monotonic()
        rows = measured(name, lab)
        keep(name, about | {"seconds": round(time.monotonic() - started), "rows": rows})
        print(f"\n{name}\n{table(rows)}", flush=True)
    if args.docs:
        DOCS.write_text(with_tables(DOCS.read_text(), json.loads(RESULTS.read_text())))


def keep(name: str, section: dict) -> None:
    """Put a section's figures into the results, beside the others'."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found[name] = section
    ordered = {each: found[each] for each in SECTIONS if each in found}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def measured(name: str, lab: Lab) -> list[dict]:
    """Rows of a section: mean and standard error of each measure over the clips."""
    if name in TWICE:
        lab = lab.with_(world=lab.world.repeated(2))
    rows, clips = [], {}
    for row, measures in SECTIONS[name](lab):
        clips[row] = measures
        rows.append({"row": row} | {key: estimate(values) for key, values in measures.items()})
    for row, measures in clips.items():
        clean = row.replace("matched noise", "clean")
        if row != clean and clean in clips and name.startswith(("shown", "retake")):
            pairs = {key: estimate(values - clips[clean][key]) for key, values in measures.items()}
            rows.append({"row": f"{row}, less clean"} | pairs)
    return rows


def estimate(values: Tensor) -> list[float]:
    """Mean and its standard error, of the clips that have a value."""
    values = values[values.isfinite()].double()
    return [round(values.mean().item(), 4), round((values.std() / len(values) ** 0.5).item(), 4)]


def table(rows: list[dict]) -> str:
    """Markdown."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [["", *(COLUMNS[key].heading for key in keys)], ["---"] * (len(keys) + 1)]
    lines += [[row["row"], *(COLUMNS[key].text(row.get(key)) for key in keys)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_tables(text: str, sections: dict[str, dict]) -> str:
    """The page with each section's table between its marks ``<!-- NAME -->`` and ``<!-- end -->``."""
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        parts = re.split(pattern, text, flags=re.DOTALL)
        count = len(parts) - 1
        text = (begin + table(section["rows"]) + end).join(parts)
        if count != 1:
            raise ValueError(f"The page has {count} places for the table '{name}'; there must be one.")
    return text


if __name__ == "__main__":
    main()
