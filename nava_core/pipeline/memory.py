"""Who is loaded where: the device, the components on it, and room for what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..checkpoint import FileKind, describe_file, estimate_memory, load_backbone
from ..components import audio_vae_part, load_audio_vae, load_text_encoder, load_video_vae, memory_bytes
from ..lora_merge import LoraMerge
from ..parallel import Parallel
from .files import NAMES, ModelFiles

WORKSPACE = 2**30  # bytes of GPU memory that a component is given beside what it is known to need


def choose_device(name: torch.device | str | None = None) -> torch.device:
    """Where the models work: "cpu", "cuda", "cuda:1", "mps" or "xpu"; None for a GPU of CUDA, or else the CPU.

    Raises ValueError, in a sentence, for a device that is not there, or that the models do not run on.
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if hasattr(torch, "xpu") and torch.xpu.is_available() else 0,
    }
    if name is None:
        return torch.device("cuda" if counts["cuda"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        there = [f"{kind}:0 to {kind}:{count - 1}" if count > 1 else kind for kind, count in counts.items() if count]
        raise ValueError(
            f"There is no device {name} here that the models could work on: use {' or '.join(there)}, or a torch build "
            "that knows your GPU."
        )
    return device


class Components:
    """The models of ``files``, each read when its turn comes and on the device only while it works.

    ``device``, ``dtype``, ``say``, ``keep_loaded``, ``parallel``, ``vae_dtype`` and ``compile`` as
    :meth:`NavaPipeline.from_files` takes them; ``loras`` are merged into the backbone.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype | None,
        say: Callable[[str], None],
        keep_loaded: bool,
        parallel: Parallel | None = None,
        vae_dtype: torch.dtype | None = None,
        loras: LoraMerge | None = None,
        compile: bool = False,
    ) -> None:
        self.parallel = parallel
        self.compile = compile
        self.files = files
        self.device = device
        self.dtype = dtype
        self.wanted_vae_dtype = vae_dtype
        self.say = say
        self.keep_loaded = keep_loaded
        self.loras = loras or LoraMerge((), files.backbone)
        self._kept: dict[str, torch.nn.Module] = {}

    def unload(self) -> None:
        """Give back all memory; what is asked for next is read again."""
        self._kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def loaded(self, role: str) -> Iterator[torch.nn.Module]:
        """A component on the device for the time of the block."""
        component = self._kept.pop(role, None)
        if component is None:
            path = getattr(self.files, role)
            loras = self.loras.names if role == "backbone" else ()
            self.say(f"Loading the {NAMES[role]}, {', with '.join([path.name, *loras])}.")
            self.make_room(self.weight_bytes(role) + WORKSPACE)
            component = self._load(role, path)
        else:
            self.make_room(sum(p.nbytes for p in component.parameters()) + WORKSPACE)
            component = component.to(self.device)
        try:
            yield component
        finally:
            if role == "backbone" and (self.device.type != "cpu" or self.parallel):
                self._kept[role] = component
            elif self.keep_loaded:
                self._kept[role] = component.to("cpu")
            del component

    def _load(self, role: str, path: Path) -> torch.nn.Module:
        if role == "text_encoder":
            return load_text_encoder(path, device=self.device)
        if role == "video_vae":
            return load_video_vae(path, device=self.device, dtype=self.vae_dtype)
        if role == "audio_vae":
            return load_audio_vae(path, device=self.device)
        if self.parallel is not None:
            return self.parallel.backbone(
                path,
                self.device.type,
                self.backbone_dtype,
                self.say,
                changes=self.loras.changes,
                compile=self.compile,
            )
        with self.loras.changes() as changes:
            backbone = load_backbone(path, device=self.device, dtype=self.backbone_dtype, changes=changes)
        return backbone.compile_blocks() if self.compile else backbone

    @property
    def vae_dtype(self) -> torch.dtype:
        if self.wanted_vae_dtype is not None:
            return self.wanted_vae_dtype
        if self.dtype is not None and self.dtype.itemsize > 1:
            return self.dtype
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def backbone_dtype(self) -> torch.dtype | None:
        quantised = describe_file(self.files.backbone).kind is not FileKind.NAVA_BACKBONE
        return self.dtype or (None if quantised or self.device.type == "cpu" else torch.bfloat16)

    def weight_bytes(self, role: str) -> int:
        if role == "backbone" and self.parallel is not None:
            return 0  # the workers have them
        info = describe_file(getattr(self.files, role))
        if role == "audio_vae":
            return memory_bytes(audio_vae_part(info))
        return estimate_memory(info, {"backbone": self.backbone_dtype, "video_vae": self.vae_dtype}.get(role))

    def make_room(self, needed: int) -> bool:
        """Whether ``needed`` bytes are free on a GPU, once the backbone has left it if need be; True on the CPU."""
        if self.device.type != "cuda" or _free_bytes(self.device) >= needed:
            return True
        backbone = self._kept.pop("backbone", None)
        if backbone is not None and self.keep_loaded:
            self._kept["backbone"] = backbone.to("cpu")
        del backbone
        return _free_bytes(self.device) >= needed


def _free_bytes(device: torch.device) -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
