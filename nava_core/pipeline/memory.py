"""Who is loaded where: the components on their devices, within the memory that there is."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

from ..checkpoint import FileInfo, FileKind, describe_file, format_bytes, load_backbone
from ..components import (
    AudioVAE,
    VideoVAE,
    empty_video_vae,
    encode_bytes,
    load_audio_vae,
    load_text_encoder,
    load_video_vae,
    text_encoder_config,
)
from ..explain import TooLittleMemoryError, is_out_of_memory
from ..geometry import ClipGeometry
from ..lora_merge import LoraMerge
from ..offload import (
    SLACK,
    Demand,
    MemoryPlan,
    Placement,
    Streaming,
    Weights,
    amount_of_memory,
    free_bytes,
    least_budget,
    memory_limit,
    move,
    place,
    place_backbone,
    reserved_bytes,
    smaller,
    total_bytes,
)
from ..parallel import Parallel
from .clock import Clock
from .devices import is_same_device
from .files import NAMES, ModelFiles
from .sizes import backbone_demand, block_names, component_weights

WORKSPACE = 2**30  # bytes of GPU memory that a component is given beside what it is known to need
MOST_TOKENS = 512  # of a prompt
PIXEL_COPIES = 2  # of frames in fp32, while the video VAE takes them in patches
DEVICE_OPTIONS = {"text_encoder": "--encoder-device", "video_vae": "--vae-device", "audio_vae": "--vae-device"}
WORK = {
    "text_encoder": "encoding the text",
    "video_vae": "encoding the first frame",
    "audio_vae": "encoding the sound",
    "backbone": "denoising",
}
PLANNED = {"video_vae": "first_frame", "audio_vae": "sound"}  # what the plan calls the encoding by a VAE

Result = TypeVar("Result")


class Components:
    """The models of ``files``, each read when its turn comes and on its device only while it works.

    ``device``, ``dtype``, ``say``, ``keep_loaded``, ``parallel``, ``vae_dtype``, ``compile``, ``memory``,
    ``encoder_device`` and ``vae_device`` as :meth:`NavaPipeline.from_files` takes them; ``loras`` are merged into the
    backbone. ``clock`` has the seconds of the clip under way.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype | None,
        say: Callable[[str], None],
        keep_loaded: bool,
        *,
        parallel: Parallel | None = None,
        vae_dtype: torch.dtype | None = None,
        loras: LoraMerge | None = None,
        compile: bool = False,
        memory: int | str | None = None,
        encoder_device: torch.device | None = None,
        vae_device: torch.device | None = None,
    ) -> None:
        self.parallel = parallel
        self.compile = compile
        self.files = files
        self.device = device
        self.dtype = dtype
        self.wanted_vae_dtype = vae_dtype
        self.say = say
        self.keep_loaded = keep_loaded
        self.loras = loras or (None if files.backbone is None else LoraMerge((), files.backbone))
        self.limit = None if memory is None else amount_of_memory(memory, total_bytes(device))
        chosen = {"text_encoder": encoder_device, "video_vae": vae_device, "audio_vae": vae_device}
        self.chosen = {role: device if is_same_device(wanted, device) else wanted for role, wanted in chosen.items()}
        self.clock = Clock()
        self.plan, self.most_frames = self._unplanned(), 0
        self._kept: dict[str, torch.nn.Module] = {}
        self._streams: dict[str, Streaming] = {}
        self._ceilings: dict[str, int] = {}  # what a component's stage may take, where more turned out to be too much
        self.at = device  # where the component at work is

    # ------------------------------------------------------------ components

    def unload(self) -> None:
        """Give back all memory; what is asked for next is read again."""
        for role in list(self._streams):
            self._unstream(role)
        self._kept.clear()
        self._ceilings.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def loaded(self, role: str, where: Placement | None = None) -> Iterator[torch.nn.Module]:
        """A component where it works, by default as planned, for the time of the block."""
        where = where or self.placement(role)
        before, self.at = self.at, where.device
        try:
            with memory_limit(where.device, self.limit if where.device == self.device else None):
                component = self._fetch(role, where)
                try:
                    yield component
                except BaseException:
                    self._unstream(role)  # a pass that was cut short leaves blocks where they do not belong
                    raise
                finally:
                    self._put_back(role, component)
                    del component
        finally:
            self.at = before

    def attempt(self, work: Callable[[torch.nn.Module], Result], role: str, where: Placement | None = None) -> Result:
        """``work`` with a loaded component; where memory runs out, once more in a smaller form.

        A failed ``work`` must leave what it works on as it was. The backbone's passes are not made again here: see
        ``shrink``. Raises TooLittleMemoryError, with what to change.
        """
        for is_last in (False, True):
            used, is_loaded = where or self.placement(role), False
            try:
                with self.loaded(role, used) as component:
                    is_loaded = True
                    return work(component)
            except TooLittleMemoryError as error:
                sentence = str(error)
            except RuntimeError as error:
                if not is_out_of_memory(error) or used.device.type == "cpu":
                    raise
                sentence = self._advice(role, used)
            may_leave = role != "backbone" and self.chosen[role] is None
            form = None if is_last or (role == "backbone" and is_loaded) else smaller(used, may_leave=may_leave)
            if form is None:
                break
            # Only here are the tensors of the failed work gone.
            self._release()
            self._evict(used.device)
            self._remember(role, used, form)
            self.say(f"Out of memory while {self._doing(role)}: once more with the {NAMES[role]} {form}.")
            where = form
        raise TooLittleMemoryError(sentence)

    def shrink(self, component: torch.nn.Module) -> bool:
        """Take some of the backbone at work off its device, after a pass that ran out of memory, and what else can be;
        False where there is nothing more."""
        used = self.plan.backbone
        form = None if self.parallel else smaller(used, may_leave=False)
        self._release()
        if form is not None:
            try:
                self._settle("backbone", component, form)
            except RuntimeError as error:
                if not isinstance(error.__cause__, ImportError):  # of what streaming needs
                    raise
                form = None
        if form is None:
            if "backbone" in self._streams:
                self._streams["backbone"].recall()
            return False
        self._release()
        self._remember("backbone", used, form)
        self.say(f"Out of memory while denoising: this step once more with the backbone {form}.")
        return True

    def _doing(self, role: str) -> str:
        """What a component is at, for sentences."""
        many = role == "video_vae" and self.most_frames > 1
        return f"encoding {self.most_frames} frames" if many else WORK[role]

    def _advice(self, role: str, used: Placement) -> str:
        """The sentence on a stage that memory was too little for."""
        if role == "backbone":
            even = ", even with all blocks streamed" if used.blocks and len(used.streamed) == used.blocks else ""
            change = "make the clip smaller or shorter, allow more (--memory)"
        else:
            even, change = "", f"let the {NAMES[role]} work on the CPU ({DEVICE_OPTIONS[role]} cpu)"
        return (
            f"There is too little free memory on {used.device} for {self._doing(role)}{even}: {change}, or free the "
            "memory other programs hold."
        )

    def _fetch(self, role: str, where: Placement) -> torch.nn.Module:
        component = self._kept.pop(role, None)
        with self.clock.measure("loading"):
            if component is None:
                path = getattr(self.files, role)
                loras = self.loras.names if role == "backbone" else ()
                self.say(f"Loading the {NAMES[role]}, {', with '.join([path.name, *loras])}.")
                self.make_room(self._bytes_at(role, where) + self._allowance)
                component = self._load(role, path, where)
            elif role not in self._streams:
                self.make_room(self._bytes_at(role, where) + self._allowance)
            self._settle(role, component, where)
        return component

    def _put_back(self, role: str, component: torch.nn.Module) -> None:
        if role == "backbone" and (self.device.type != "cpu" or self.parallel):
            self._kept[role] = component
            return
        self._unstream(role)
        if self.keep_loaded:
            self._kept[role] = component.to("cpu")

    def _load(self, role: str, path: Path, where: Placement) -> torch.nn.Module:
        device = where.device
        if role == "text_encoder":
            return load_text_encoder(path, device=device, in_ram=where.streamed, mapped=True)
        if role == "video_vae":
            return load_video_vae(path, device=device, dtype=self.vae_dtype)
        if role == "audio_vae":
            return load_audio_vae(path, device=device)
        if self.parallel is not None:
            return self.parallel.backbone(
                path,
                self.device.type,
                self.backbone_dtype,
                self.say,
                changes=self.loras.changes,
                compile=self.compile,
            )
        names = block_names(self._info(role))
        in_ram = [f"{names[index]}." for index in where.streamed]
        with self.loras.changes() as changes:
            backbone = load_backbone(
                path, device=device, dtype=self.backbone_dtype, changes=changes, in_ram=in_ram, mapped=True
            )
        return backbone.compile_blocks() if self.compile else backbone

    def _settle(self, role: str, component: torch.nn.Module, where: Placement) -> None:
        """Bring a component to where it works, with its streamed blocks in RAM."""
        stream = self._streams.get(role)
        if stream is not None and (stream.device, stream.streamed) == (where.device, where.streamed):
            return
        self._unstream(role)
        stay = [component.embedding] if role == "text_encoder" else []
        if not where.streamed:
            move(component, where.device, but=stay)
            return
        blocks = component.blocks if role == "text_encoder" else [*component.double_blocks, *component.single_blocks]
        # Page-locking copies once what it then speeds up in every pass: the backbone has hundreds, the encoder two.
        self._streams[role] = Streaming(
            component, blocks, where.streamed, where.device, stay=stay, lock=role == "backbone", say=self.say
        )

    def _unstream(self, role: str) -> None:
        stream = self._streams.pop(role, None)
        if stream is not None:
            stream.close()

    # ------------------------------------------------------------ the plan

    def prepare(
        self,
        geometry: ClipGeometry,
        *,
        together: int = 1,
        has_text: bool = True,
        frames: int = 0,
        sound_steps: int = 0,
    ) -> MemoryPlan:
        """Plan where the components work for a clip, before any is loaded; says so where memory is bounded or short.

        ``together``: predictions that a pass makes at most. ``frames``, ``sound_steps``: of what is given, the most
        frames that are encoded at a time, and audio latents. Raises ValueError, with the least that works, where the
        clip cannot be made within the memory that was allowed.
        """
        self.plan, self.most_frames = self._unplanned(), frames
        budget = self._budget("backbone")
        if budget is not None and self.parallel is None:
            backbone, batched = self._place_backbone(geometry, together, budget)
            self.plan = replace(self.plan, budget=budget, backbone=backbone, batched=batched)
        text, picture, sound = None, None, None
        if has_text:
            text = self.find_place(
                "text_encoder", encode_bytes(text_encoder_config(self._info("text_encoder")), MOST_TOKENS)
            )
        if frames:
            picture = self.find_place("video_vae", self.frames_bytes((frames, geometry.height, geometry.width, 3)))
        if sound_steps:
            sound = self.find_place("audio_vae", AudioVAE.encode_bytes(sound_steps))
        self.plan = replace(self.plan, text_encoder=text, first_frame=picture, sound=sound)
        if self.plan.budget is not None and (self.limit is not None or self.plan.is_tight):
            self.say(str(self.plan))
        return self.plan

    def placement(self, role: str) -> Placement:
        """Where a component works."""
        planned = getattr(self.plan, role, None)
        return Placement(self.home(role)) if planned is None else planned

    def _unplanned(self) -> MemoryPlan:
        return MemoryPlan(None, Placement(self.device), self.device.type != "cpu" and not self.compile)

    def home(self, role: str) -> torch.device:
        """Where a component works while there is memory enough."""
        return self.chosen.get(role) or self.device

    def _budget(self, role: str) -> int | None:
        """Bytes that a component's device has for this process, what it holds there included; None for no limit."""
        device = self.home(role)
        if device.type != "cuda":
            return None
        there = free_bytes(device) + reserved_bytes(device)
        limit = self.limit if device == self.device else None
        budget = there - WORKSPACE if limit is None else min(limit, there)
        return max(0, min(budget, self._ceilings.get(role, budget)))

    def _place_backbone(self, geometry: ClipGeometry, together: int, budget: int) -> tuple[Placement, bool]:
        demand = self.backbone_demand(geometry, together)
        found = place_backbone(self.device, budget, demand)
        if found is not None:
            return found
        least = least_budget(demand)
        if self.limit is not None and self.limit < least:
            raise ValueError(
                f"{format_bytes(self.limit)} cannot be kept to: denoising {geometry.tokens:,} tokens takes "
                f"{format_bytes(least)} with all blocks streamed. Allow that much (--memory), or make the clip smaller "
                "or shorter."
            )
        # By the estimate it does not fit; estimates have room in them, so that it is tried.
        return Placement(self.device, demand.weights.all_streamed(), len(demand.weights.blocks)), False

    def find_place(self, role: str, work: int) -> Placement:
        """Where a component other than the backbone works, which takes ``work`` bytes beside its weights: beside a kept
        backbone if it can."""
        device, budget = self.home(role), self._budget(role)
        demand = Demand(self.weights(role), work)
        where = place(device, budget, demand)
        if "backbone" in self._kept and device == self.device and budget is not None:
            beside = place(device, budget - reserved_bytes(device), demand)
            where = where if beside.device.type == "cpu" else beside
        if where.device != device and self.chosen.get(role) is not None:
            return Placement(device, demand.weights.all_streamed(), len(demand.weights.blocks))
        return where

    def _remember(self, role: str, used: Placement, form: Placement) -> None:
        """Keep to a smaller form than the one used, in this clip; and in those to come to less than that one takes."""
        budget = self._budget(role)
        if budget is not None:
            self._ceilings[role] = min(budget, self._bytes_at(role, used) + SLACK)
        self.plan = replace(self.plan, **{PLANNED.get(role, role): form})

    # ------------------------------------------------------------ bytes

    def make_room(self, needed: int) -> bool:
        """Whether ``needed`` bytes are free where the component at work is, once the backbone has left it if need be;
        True on the CPU."""
        device = self.at
        if device.type != "cuda" or self._free(device) >= needed:
            return True
        self._evict(device)
        return self._free(device) >= needed

    def _evict(self, device: torch.device) -> None:
        """Take a backbone that waits for the next clip off its device: into RAM, or to be read again."""
        backbone = self._kept.pop("backbone", None) if device == self.device else None
        if backbone is not None:
            self._unstream("backbone")
            if self.keep_loaded:
                self._kept["backbone"] = backbone.to("cpu")

    @property
    def _allowance(self) -> int:
        """Bytes that a component is given beside its weights before its work is known."""
        return WORKSPACE if self.limit is None else SLACK

    def _free(self, device: torch.device) -> int:
        """Bytes of a GPU that may still be taken."""
        free = free_bytes(device)
        if self.limit is None or device != self.device:
            return free
        return min(free, self.limit - reserved_bytes(device))

    def _release(self) -> None:
        """Give back what is only cached, and what a failed pass left in circles."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def vae_dtype(self) -> torch.dtype:
        if self.wanted_vae_dtype is not None:
            return self.wanted_vae_dtype
        if self.dtype is not None and self.dtype.itemsize > 1:
            return self.dtype
        return torch.float32 if self.home("video_vae").type == "cpu" else torch.bfloat16

    @property
    def backbone_dtype(self) -> torch.dtype | None:
        quantised = describe_file(self.files.backbone).kind is not FileKind.NAVA_BACKBONE
        return self.dtype or (None if quantised or self.device.type == "cpu" else torch.bfloat16)

    def weight_bytes(self, role: str) -> int:
        """Bytes of a component's weights; 0 where workers have them."""
        return self.weights(role).total

    def weights(self, role: str) -> Weights:
        """Bytes of a component's weights on its device, those of its blocks by themselves."""
        if role == "backbone" and self.parallel:
            return Weights(0)
        dtype = self.backbone_dtype if role == "backbone" else self.vae_dtype
        return component_weights(role, self._info(role), dtype)

    def backbone_demand(self, geometry: ClipGeometry, together: int = 1) -> Demand:
        """What denoising a clip takes on the backbone's device, ``together`` predictions in a pass at most."""
        return backbone_demand(
            self._info("backbone"), self.backbone_dtype, geometry, together=together, compiled=self.compile
        )

    def _bytes_at(self, role: str, where: Placement) -> int:
        """Bytes that a component's weights take on the GPU that it works on."""
        return 0 if where.device.type == "cpu" else self.weights(role).on_device(where.streamed)

    def empty_video_vae(self) -> VideoVAE:
        """The video VAE without weights, to be asked what its work takes."""
        return empty_video_vae(self._info("video_vae"), self.vae_dtype)

    def frames_bytes(self, shape: tuple[int, ...]) -> int:
        """What encoding frames of ``shape`` (F, H, W, 3) takes beside the video VAE's weights, the pixels included
        where there are many."""
        pixels = 0 if shape[0] == 1 else PIXEL_COPIES * math.prod(shape) * torch.float32.itemsize
        return self.empty_video_vae().encode_bytes(shape) + pixels

    def _info(self, role: str) -> FileInfo:
        path = getattr(self.files, role)
        return _described(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _described(path: Path, _: int) -> FileInfo:
    return describe_file(path)
