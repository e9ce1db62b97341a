"""Who is loaded where: the devices, the components on them, and room for what they do."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

from ..backbone import activation_bytes
from ..checkpoint import (
    FileInfo,
    FileKind,
    backbone_config,
    describe_file,
    format_bytes,
    load_backbone,
    main_dtype,
    plan_tensors,
)
from ..components import (
    VideoVAE,
    audio_vae_part,
    empty_video_vae,
    encode_bytes,
    load_audio_vae,
    load_text_encoder,
    load_video_vae,
    memory_bytes,
    text_encoder_config,
    text_encoder_weights,
)
from ..components.video_vae import ENCODING_HALF
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
    check_amount,
    least_budget,
    memory_limit,
    move,
    place,
    place_backbone,
    reserved_bytes,
    smaller,
    total_bytes,
)
from ..offload import free_bytes as _free_bytes
from ..parallel import Parallel
from .files import NAMES, ModelFiles

WORKSPACE = 2**30  # bytes of GPU memory that a component is given beside what it is known to need
# Of the clip's latents in fp32: the samples, given parts, predictions and the solver's state during a pass, counted
LATENT_COPIES = 16
COMPILED_SHARE = 4 / 3  # of the activations of blocks as they are, those of compiled ones
MOST_TOKENS = 512  # of a prompt
BLOCK_LISTS = ("double_blocks", "single_blocks")
DEVICE_OPTIONS = {"text_encoder": "--encoder-device", "video_vae": "--vae-device", "audio_vae": "--vae-device"}
WORK = {"text_encoder": "encoding the text", "video_vae": "encoding the first frame", "backbone": "denoising"}

Result = TypeVar("Result")


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


def check_memory(wanted: int | str | None, device: torch.device, parallel: Parallel | None = None) -> None:
    """Raise ValueError, in a sentence, for an amount of memory that makes no sense, on this device or at all."""
    if wanted is None:
        return
    check_amount(wanted)
    if parallel is not None:
        raise ValueError("A limit of memory is for one GPU, not for parallel workers: leave out one of the two.")
    if device.type != "cuda":
        raise ValueError(
            f"A limit of memory is for a CUDA GPU, and the models work on {device}, where nothing would hold to it: "
            "leave it out, or choose a GPU."
        )
    amount_of_memory(wanted, total_bytes(device))


class Clock:
    """Seconds of a clip by what they went into, and until its first step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - begin

    def first_step(self, since: float) -> str:
        """Notes that the first step, begun at ``since``, is done; a sentence on it."""
        now = time.monotonic()
        self.seconds["step"], self.seconds["first_step"] = now - since, now - self.began
        parts = [f"{self.seconds[what]:.1f} s {what}" for what in ("loading", "encoding") if what in self.seconds]
        parts.append(f"{now - since:.1f} s for the step itself")
        return f"First step after {now - self.began:.1f} s: {', '.join(parts)}."


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
        self.chosen = {role: device if _is_same(wanted, device) else wanted for role, wanted in chosen.items()}
        self.clock = Clock()
        self.plan = self._unplanned()
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
            self.say(f"Out of memory while {WORK[role]}: once more with the {NAMES[role]} {form}.")
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
            return False
        self._release()
        self._remember("backbone", used, form)
        self.say(f"Out of memory while denoising: this step once more with the backbone {form}.")
        return True

    def _advice(self, role: str, used: Placement) -> str:
        """The sentence on a stage that memory was too little for."""
        if role == "backbone":
            even = ", even with all blocks streamed" if used.blocks and len(used.streamed) == used.blocks else ""
            change = "make the clip smaller or shorter, allow more (--memory)"
        else:
            even, change = "", f"let the {NAMES[role]} work on the CPU ({DEVICE_OPTIONS[role]} cpu)"
        return (
            f"There is too little free memory on {used.device} for {WORK[role]}{even}: {change}, or free the memory "
            "other programs hold."
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
        names = _block_names(self._info(role))
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
        self, geometry: ClipGeometry, *, together: int = 1, has_text: bool = True, has_first_frame: bool = False
    ) -> MemoryPlan:
        """Plan where the components work for a clip, before any is loaded; says so where memory is bounded or short.

        ``together``: predictions that a pass makes at most. Raises ValueError, with the least that works, where the
        clip cannot be made within the memory that was allowed.
        """
        self.plan = self._unplanned()
        budget = self._budget("backbone")
        if budget is not None and self.parallel is None:
            backbone, batched = self._place_backbone(geometry, together, budget)
            self.plan = replace(self.plan, budget=budget, backbone=backbone, batched=batched)
        text, picture = None, None
        if has_text:
            text = self.find_place(
                "text_encoder", encode_bytes(text_encoder_config(self._info("text_encoder")), MOST_TOKENS)
            )
        if has_first_frame:
            picture = self.find_place(
                "video_vae", self.empty_video_vae().encode_bytes((1, geometry.height, geometry.width, 3))
            )
        self.plan = replace(self.plan, text_encoder=text, first_frame=picture)
        if self.plan.budget is not None and (self.limit is not None or self.plan.is_tight):
            self.say(str(self.plan))
        return self.plan

    def placement(self, role: str) -> Placement:
        """Where a component works."""
        planned = getattr(self.plan, role, None)
        return Placement(self.home(role)) if planned is None else planned

    def _unplanned(self) -> MemoryPlan:
        return MemoryPlan(None, Placement(self.device), self.device.type != "cpu")

    def home(self, role: str) -> torch.device:
        """Where a component works while there is memory enough."""
        return self.chosen.get(role) or self.device

    def _budget(self, role: str) -> int | None:
        """Bytes that a component's device has for this process, what it holds there included; None for no limit."""
        device = self.home(role)
        if device.type != "cuda":
            return None
        there = _free_bytes(device) + reserved_bytes(device)
        limit = self.limit if device == self.device else None
        budget = there - WORKSPACE if limit is None else min(limit, there)
        return max(0, min(budget, self._ceilings.get(role, budget)))

    def _place_backbone(self, geometry: ClipGeometry, together: int, budget: int) -> tuple[Placement, bool]:
        demand = self._backbone_demand(geometry, together)
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
        self.plan = replace(self.plan, **{"first_frame" if role == "video_vae" else role: form})

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
        free = _free_bytes(device)
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
        as_it_is = self.device.type == "cpu" or describe_file(self.files.backbone).kind is FileKind.NAVA_BACKBONE_FP8
        return self.dtype or (None if as_it_is else torch.bfloat16)

    def weight_bytes(self, role: str) -> int:
        """Bytes of a component's weights; 0 where workers have them."""
        return self.weights(role).total

    def weights(self, role: str) -> Weights:
        """Bytes of a component's weights on its device, those of its blocks by themselves."""
        info = self._info(role)
        if role == "backbone":
            return Weights(0) if self.parallel else _backbone_weights(info, self.backbone_dtype)
        if role == "text_encoder":
            return Weights(*text_encoder_weights(info))
        if role == "audio_vae":
            return Weights(memory_bytes(audio_vae_part(info)))
        size = self.vae_dtype.itemsize
        return Weights(
            sum(t.numel * (4 if n.startswith(ENCODING_HALF) else size) for n, t in info.model_tensors.items())
        )

    def _bytes_at(self, role: str, where: Placement) -> int:
        """Bytes that a component's weights take on the GPU that it works on."""
        return 0 if where.device.type == "cpu" else self.weights(role).on_device(where.streamed)

    def empty_video_vae(self) -> VideoVAE:
        """The video VAE without weights, to be asked what its work takes."""
        return empty_video_vae(self._info("video_vae"), self.vae_dtype)

    def _backbone_demand(self, geometry: ClipGeometry, together: int) -> Demand:
        info = self._info("backbone")
        config, size = backbone_config(info), main_dtype(info, self.backbone_dtype).itemsize
        values = sum(_count(shape) for shape in (geometry.latent_shape, geometry.audio_shape) if shape)
        beside = LATENT_COPIES * 4 * values + _unpacked_bytes(info, self.backbone_dtype)
        share = COMPILED_SHARE if self.compile else 1
        works = [
            beside + int(share * activation_bytes(config, count, geometry.tokens, size)) for count in (1, together)
        ]
        return Demand(self.weights("backbone"), works[0], works[1] if together > 1 else None)

    def _info(self, role: str) -> FileInfo:
        path = getattr(self.files, role)
        return _described(path, path.stat().st_mtime_ns)


def _is_same(one: torch.device | None, other: torch.device) -> bool:
    """Whether two names are of one device: "cuda" is the first GPU."""
    return one is not None and (one.type, one.index or 0) == (other.type, other.index or 0)


@lru_cache(maxsize=8)
def _described(path: Path, _: int) -> FileInfo:
    return describe_file(path)


def _block_names(info: FileInfo) -> list[str]:
    """The names of a backbone's blocks, in the order they run."""
    config = backbone_config(info)
    counts = (config.num_double_layers, config.num_single_layers)
    return [f"{kind}.{index}" for kind, count in zip(BLOCK_LISTS, counts, strict=True) for index in range(count)]


def _backbone_weights(info: FileInfo, dtype: torch.dtype | None) -> Weights:
    blocks = dict.fromkeys(_block_names(info), 0)
    rest = 0
    for tensor in plan_tensors(info, dtype):
        name = ".".join(tensor.name.split(".")[:2])
        if name in blocks:
            blocks[name] += tensor.nbytes
        else:
            rest += tensor.nbytes
    return Weights(rest, tuple(blocks.values()))


def _unpacked_bytes(info: FileInfo, dtype: torch.dtype | None) -> int:
    """Bytes of the largest quantised weight in the type that it is multiplied in, at most two values a byte."""
    sizes = [
        t.nbytes * (2 if t.dtype.is_floating_point else 4) for t in plan_tensors(info, dtype) if t.dtype.itemsize == 1
    ]
    return max(sizes, default=0)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
