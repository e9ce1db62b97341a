"""What smaller weights cost a network that has learnt: whole clips in every format, measured against bf16.

    python -m benchmarks.quantised --network learned.safetensors --world world.safetensors --json FILE

For each format: errors of the guided combination on a probe; then whole clips of the same noise, their latents' cosine
to bf16's, and what can be read back of the world (see ``learned.py``). All is computed in float32, so that nothing but
the weights (and, where it says so, quantised inputs) differs. On a CPU, about three minutes a row on two cores.
``--ranks`` instead compares the estimate of which layers matter with the exact measure, layer by layer.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nava_core import ClipGeometry, Guidance, load_backbone
from nava_core.backbone.quant_linear import QuantLinear
from nava_core.checkpoint import backbone_config, describe_file
from nava_core.convert import convert
from nava_core.quality import Conditions, compare_files, measure_sensitivity, most_sensitive

from .learned import World

CLIP = ClipGeometry(2.04, 96, 64)  # the world's
SHARES = (0.1, 0.25)


@dataclass(frozen=True)
class Row:
    """A line of the table: a format, the share of weights it protects, and whether inputs are quantised too."""

    format: str
    share: float = 0.0
    units: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        more = [f"{100 * self.share:.0f} % protected"] if self.share else []
        more += ["on int8 units"] if self.units else []
        more += ["another noise"] if self.seed else []
        return ", ".join([self.format, *more])


ROWS = (
    Row("bf16"),
    Row("bf16", seed=1),
    Row("bf16 arithmetic"),
    Row("int8"),
    Row("int8", units=True),
    Row("w6a8"),
    Row("w6a8", units=True),
    Row("fp8"),
    Row("mxfp8"),
    *(Row("w4a8", share) for share in (0.0, *SHARES)),
    Row("w4a8", units=True),
    *(Row("nvfp4", share) for share in (0.0, *SHARES)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", type=Path, required=True, help="a backbone that has learnt the world")
    parser.add_argument("--world", type=Path, required=True, help="its vectors and scenes")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--ranks", action="store_true", help="check the estimate of which layers matter")
    args = parser.parse_args()
    if args.ranks:
        print(json.dumps(ranks(args.network, scene_conditions(World.read(args.world))), indent=1))
        return
    rows = []
    for row in measured(args):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
            about |= {"scenes": args.scenes, "steps": args.steps, "rows": rows}
            args.json.write_text(json.dumps(about, indent=1) + "\n")
    print(table(rows))


def measured(args: argparse.Namespace) -> Iterator[dict]:
    world = World.read(args.world, args.scenes)
    conditions = scene_conditions(world)
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for row in ROWS:
            start = time.monotonic()
            path = made(row, args.network, Path(folder), conditions)
            clip = world.sample(network(row, path), Guidance(), args.steps, row.seed)
            reference = reference or clip
            found = {"row": row.name, "bytes_in_blocks": blocks_bytes(path)}
            if row.format not in ("bf16", "bf16 arithmetic") and not row.units:
                guided = compare_files(args.network, path, conditions=conditions, clip=CLIP).guided
                for part in ("video", "audio"):
                    errors = [getattr(each, f"{part}_error") for each in guided]
                    found[f"guided_{part}_error"] = round(sum(errors) / len(errors), 4)
            for part, mine, wanted in zip(("video", "audio"), clip, reference, strict=True):
                found[f"{part}_cosine"] = round(
                    F.cosine_similarity(mine.flatten(1), wanted.flatten(1)).mean().item(), 4
                )
            yield {**found, **world.measures(*clip), "seconds": round(time.monotonic() - start)}


def scene_conditions(world: World) -> Conditions:
    """The texts of the first scene with a voice; the world's null is a text of zeros."""
    scene = int((world["timbre_positions"][:, 0] >= 0).nonzero()[0, 0])
    context, timbre, positions = (world[name][scene : scene + 1] for name in ("context", "timbre", "timbre_positions"))
    return Conditions(context, torch.zeros_like(context), timbre, positions)


def made(row: Row, source: Path, folder: Path, conditions: Conditions) -> Path:
    if row.format.startswith("bf16"):
        return source
    target = folder / f"{row.format}_{row.share}.safetensors"
    if not target.exists():
        protected = []
        if row.share:
            found = measure_sensitivity(source, row.format, conditions=conditions, clip=CLIP)
            protected = most_sensitive(found, row.share)
        convert(source, target, dtype=row.format, protected=protected)
    return target


def network(row: Row, path: Path):
    if row.format == "bf16 arithmetic":
        return InBf16(load_backbone(path, dtype=torch.bfloat16))
    if not row.units:
        return load_backbone(path, dtype=torch.float32)
    model = load_backbone(path)
    for parameter in model.parameters():
        if parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.on_units = True
    model.dtype = torch.float32
    return model


class InBf16(torch.nn.Module):
    """A bf16 network that takes and gives float32, as the sampling loop works."""

    dtype = torch.float32

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, video, audio, timestep, context, *, timbre=None, **more):
        narrow = (None if x is None else x.bfloat16() for x in (video, audio, context, timbre))
        video, audio, context, timbre = narrow
        out = self.model(video, audio, timestep, context, timbre=timbre, **more)
        return tuple(None if x is None else x.float() for x in out)


def blocks_bytes(path: Path) -> int:
    """Bytes of the quantised Linears' weights and scales."""
    info = describe_file(path)
    names = ("_blocks.", ".weight")
    linear = (".self_attn.", ".cross_attn.", ".ffn.")
    assert backbone_config(info)
    return sum(
        tensor.nbytes
        for name, tensor in info.tensors.items()
        if all(part in name for part in names) and any(part in name for part in linear) and ".norm_" not in name
    )


def ranks(source: Path, conditions: Conditions) -> dict[str, dict]:
    """Rank correlation of the layers' estimated and exact sensitivity, with a real text and without."""
    found: dict[str, dict] = {}
    for format in ("nvfp4", "w4a8"):
        exact = measure_sensitivity(source, format, conditions=conditions, clip=CLIP, exact=True)
        for name, given in (("text", conditions), ("no text", None)):
            estimate = measure_sensitivity(source, format, conditions=given, clip=CLIP)
            pairs = {
                "picture": [[each.errors[layer][0] for layer in exact.errors] for each in (exact, estimate)],
                "sound": [[each.errors[layer][1] for layer in exact.errors] for each in (exact, estimate)],
                "score": [list(each.scores().values()) for each in (exact, estimate)],
            }
            found[f"{format}, {name}"] = {key: round(rank_correlation(*pair), 3) for key, pair in pairs.items()}
    return found


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def table(rows: list[dict]) -> str:
    """Markdown."""
    heads = ["weights", "bytes", "guided error, picture / sound", "latents' cosine, picture / sound"]
    lines = [[*heads, "sync, ms", "lips", "voice"], ["---"] * 7]
    for row in rows:
        size = f"{100 * row['bytes_in_blocks'] / rows[0]['bytes_in_blocks']:.0f} %"
        errors = [row.get(f"guided_{part}_error") for part in ("video", "audio")]
        guided = "" if None in errors else " / ".join(f"{100 * error:.1f} %" for error in errors)
        cosine = f"{row['video_cosine']:.4f} / {row['audio_cosine']:.4f}"
        shown = [f"{row['sync_ms']:.0f}", f"{row['lips']:.3f}", f"{row['voice']:.3f}"]
        lines.append([row["row"], size, guided, cosine, *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
