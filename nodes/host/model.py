"""NAVA as a ComfyUI MODEL: the core's backbone under the host's operations, patcher and sampling.

Run on ComfyUI 0.18.1 and 0.33.0. What newer hosts do themselves (handing callbacks the nested latent) is seen from
what they do, and then left to them.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import asdict
from typing import ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F

from ...nava_core.backbone import BackboneConfig, NavaBackbone, activation_bytes
from ...nava_core.backbone.quantized import FP8
from ...nava_core.checkpoint import (
    FileKind,
    WrongFileError,
    backbone_config,
    backbone_problem,
    describe_file,
    explain_wrong_file,
    main_dtype,
    open_checkpoint,
    plan_tensors,
    stream_tensors,
)
from ...nava_core.explain import TooLittleMemoryError
from ...nava_core.geometry import (
    AUDIO_LATENTS_PER_SECOND,
    FPS,
    PIXELS_PER_LATENT,
    audio_latent_to_tokens,
    audio_tokens_to_latent,
    frames_of_latents,
)
from ...nava_core.given import clean_steps, is_given
from ...nava_core.sampling.denoise import NOTHING_TO_MAKE
from . import out_of_memory
from .compiled import compiled_blocks
from .kernels import HOST_KERNELS
from .latents import absent_parts, audio_steps_of, check_shapes, map_video, shapes_of
from .memory import ALLOCATOR_SLACK, PLANNED_RUN, RunSize, attention_workspace, run_bytes, weight_copy_sizes
from .prefetch import PREFETCH, fetch_next, prefetch_queue
from .preview import host_unpacks, video_first
from .raw_parameters import patch_raw_parameters
from .resident import Elsewhere, Itinerary, PartlyResident

# Conditioning keys of this pack; stock guiders carry them to the model like any other.
TIMBRE = "nava_timbre"  # (1, S, 192)
TIMBRE_POSITIONS = "nava_timbre_positions"  # (1, S)
CROSS_MODAL = "nava_cross_modal"  # bool
# In transformer options: the network is given whole timesteps, as the makers' solver gives them.
WHOLE_TIMESTEPS = "nava_whole_timesteps"

# From this many tokens on one prediction alone fills a GPU: two at once would only double the memory.
BATCH_TOKENS = 8192
WRAPPER_KEY = "nava"
ITINERARY = "nava_itinerary"  # of a pass, among the host's options
BLOCKS_ELSEWHERE = "nava_blocks"  # additional models of a patcher that hold some of its blocks; see offload.py


def host_attention(q, k, v, heads, options):
    """The attention the host chose, with its overrides; see nava_core.backbone.layers.AttentionFunction."""
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads, transformer_options=options or {})


class HostBackbone(NavaBackbone):
    """The backbone as the host's samplers call it: a list of latents in, a list of velocities out."""

    blocks_elsewhere = False  # whether some of its blocks are Elsewhere

    def __init__(self, *, dtype=None, device=None, operations=None, **config):
        super().__init__(
            BackboneConfig(**config),
            dtype=dtype,
            device=device,
            operations=operations,
            attention=host_attention,
            kernels=HOST_KERNELS,
        )

    @torch.compiler.disable  # compiled as a whole, it would be compiled anew for each size: the blocks are, see below
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)

    def to(self, *args, memory_format=None, **kwargs):
        """As of every module, less ``memory_format``: the server's --force-channels-last is for 2-d convolutions, of
        which there are none here, and cannot be carried out on 3-d ones."""
        return super().to(*args, **kwargs)

    def forward(self, x, timestep, context, control=None, transformer_options=None, **conditions):
        """x: [video (B, 48, T, H, W), audio (B, 8, L, 16)] or video alone; velocities of the same form."""
        options = {} if transformer_options is None else transformer_options
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._predict,
            self,
            comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options),
        ).execute(x, timestep, context, options, **conditions)

    def _predict(
        self,
        x,
        timestep,
        context,
        transformer_options,
        timbre=None,
        timbre_positions=None,
        cross_modal=True,
        **_,
    ):
        parts = [x] if torch.is_tensor(x) else list(x)
        gone = absent_parts([part.shape for part in parts])
        video = None if gone[0] else parts[0]
        audio = None if len(parts) < 2 or gone[1] else audio_latent_to_tokens(parts[1])
        if transformer_options.get(WHOLE_TIMESTEPS):
            timestep = timestep.floor() if torch.is_tensor(timestep) else tuple(each.floor() for each in timestep)
        transformer_options["total_blocks"] = len(self.double_blocks) + len(self.single_blocks)
        velocities = self.run_pass(
            video,
            audio,
            timestep,
            context,
            timbre=timbre,
            timbre_positions=timbre_positions,
            cross_modal=cross_modal,
            audio_start=_anchor_frames(transformer_options),
            options=transformer_options,
        )
        out = [torch.zeros_like(part) if missing else None for part, missing in zip(parts, gone, strict=True)]
        if video is not None:
            out[0] = velocities[0]
        if audio is not None:
            out[1] = audio_tokens_to_latent(velocities[1])
        return out[0] if torch.is_tensor(x) else out

    def run_pass(self, *latents, **conditions):
        """One pass of the core's backbone; see :meth:`NavaBackbone.forward`."""
        return super().forward(*latents, **conditions)

    def _run_blocks(self, tokens, state):
        home, options = tokens.device, state.options
        here = [block for block in (*self.double_blocks, *self.single_blocks) if not isinstance(block, Elsewhere)]
        options[PREFETCH] = queue = prefetch_queue(here, tokens, options)
        options[ITINERARY] = None
        tokens = super()._run_blocks(tokens, state).to(home)
        fetch_next(queue, home, None)
        return tokens

    def run_block(self, kind, index, block, tokens, state):
        """One block, or what a node has put in its place (``patches_replace``)."""
        options = state.options
        options["block_type"], options["block_index"] = kind, index
        if not isinstance(block, Elsewhere):
            fetch_next(options.get(PREFETCH), state.table.device, block)
        if self.blocks_elsewhere:
            if options[ITINERARY] is None:
                options[ITINERARY] = Itinerary(state.table.device, state)
            return options[ITINERARY].run(block, tokens, state, functools.partial(self._run_here, kind, index))
        return self._run_here(kind, index, block, tokens, state)

    def _run_here(self, kind, index, block, tokens, state):
        options = state.options
        replacement = options.get("patches_replace", {}).get("dit", {}).get((f"{kind}_block", index))
        run = super().run_block
        if replacement is None:
            return run(kind, index, block, tokens, state)
        arguments = {
            "img": tokens,
            "txt": state.context,
            "vec": state.vectors,
            "pe": state.table,
            "transformer_options": options,
        }
        original = {"original_block": lambda args: {"img": run(kind, index, block, args["img"], state)}}
        return replacement(arguments, original)["img"]


class NavaModel(comfy.model_base.BaseModel):
    """The host's model: flow sampling, conditions, latent spaces and memory figures of NAVA."""

    network = HostBackbone
    origin = (None, "auto")  # the file and the weight type that it was loaded as

    def __init__(self, model_config, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=self.network)
        # Set by outer_sample below. Newer hosts set it too, to the same, but only after they have asked how much memory
        # the run will need.
        self.latent_shapes = None
        self._run = None  # RunSize of the run under way, set by outer_sample too
        self._one_by_one = False  # memory ran out in this run: predictions are no longer batched
        self._cache_named = False  # the warning of a step cache was given
        self._clean = None  # packed mask of the clean frames and steps of the run under way
        self.made = (True, True)  # whether anything of picture and sound is made in the run under way

    # ------------------------------------------------------------ conditions

    def extra_conds(self, **kwargs):
        config = self.diffusion_model.config
        context = kwargs.get("cross_attn")
        if context is None:
            context = torch.zeros(1, 1, config.text_dim)
        _check_context(context, config)
        # The host pads contexts of unequal length by repeating them; this model's padding is zeros. All conditions go
        # to one device, or the host would not batch them.
        device = kwargs["device"]
        context = F.pad(context, (0, 0, 0, config.text_len - context.shape[1])).to(device)
        out = {
            "c_crossattn": comfy.conds.CONDRegular(context),
            "cross_modal": comfy.conds.CONDConstant(kwargs.get(CROSS_MODAL, True)),
        }
        if kwargs.get(TIMBRE) is not None:
            out["timbre"] = comfy.conds.CONDRegular(kwargs[TIMBRE].to(device))
            out["timbre_positions"] = comfy.conds.CONDRegular(kwargs[TIMBRE_POSITIONS].to(device))
        shapes = shapes_of(kwargs.get("latent_shapes"), kwargs["noise"])
        if len(shapes) > 1:
            out["latent_shapes"] = comfy.conds.CONDConstant(shapes)
        if kwargs.get("denoise_mask") is not None:
            shown = kwargs["denoise_mask"] if self._clean is None else (~self._clean).float()
            masks = comfy.utils.unpack_latents(shown, shapes)
            for name, mask in zip(("video_steps", "audio_steps"), masks, strict=False):
                out[name] = comfy.conds.CONDRegular((~clean_steps(mask, 2)).float().to(device))
        if self._tokens(kwargs["noise"].shape) > BATCH_TOKENS or self.diffusion_model.compiled is not None:
            out["prediction"] = comfy.conds.CONDConstant(kwargs.get("prompt_type"))
        return out

    def process_timestep(self, timestep, x=None, latent_shapes=None, video_steps=None, audio_steps=None, **kwargs):
        """Timesteps, 0 where a frame or an audio step is given, so a pair (video, audio) then."""
        if latent_shapes is not None and x.shape[2] != sum(math.prod(shape[1:]) for shape in latent_shapes):
            raise ValueError(
                "The context windows of this ComfyUI do not know picture and sound apart: update ComfyUI, or take the "
                "context windows node off the MODEL."
            )
        if video_steps is None and audio_steps is None:
            return timestep
        return tuple(
            timestep if steps is None else timestep[:, None] * steps.float() for steps in (video_steps, audio_steps)
        )

    # Context windows: hosts that know several modalities ask the model what belongs together.

    def map_context_window_to_modalities(self, primary_indices, latent_shapes, dim):
        """Indices of each modality for a window of latent frames: the sound of the window's own time."""
        return [primary_indices, audio_steps_of(primary_indices, latent_shapes[0][dim], latent_shapes[1][dim])]

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        """What a condition is inside a window; the text and the voices are whole in each."""
        if cond_key == "audio_steps" and getattr(window, "modality_windows", None):
            return cond_value._copy_with(window.modality_windows[1].get_tensor(cond_value.cond, device, dim=1))
        if cond_key == "video_steps" and cond_value.cond.shape[1] == x_in.shape[window.dim]:
            return cond_value._copy_with(window.get_tensor(cond_value.cond, device, dim=1))
        ours = ("c_crossattn", "timbre", "timbre_positions", "video_steps", "audio_steps")
        return cond_value if cond_key in ours else None

    def scale_latent_inpaint(self, sigma, noise, latent_image, **kwargs):
        """The given part as the network sees it: clean frames and steps as they are, all else noised."""
        noised = super().scale_latent_inpaint(sigma=sigma, noise=noise, latent_image=latent_image, **kwargs)
        return noised if self._clean is None else torch.where(self._clean.to(noised.device), latent_image, noised)

    # ------------------------------------------------------------ the pass, and what is done when memory runs out

    def apply_model(self, x, t, *args, **kwargs):
        """As of every model; where memory runs out, once more in a smaller form. A pass changes nothing but its own
        tensors, so that the solver above it does not notice."""
        apply, patcher = super().apply_model, self.current_patcher
        if patcher is None or self._run is None:  # a clone on another GPU: its run is begun again, see outer_sample
            return apply(x, t, *args, **kwargs)

        def again():
            self._leave_less_on_gpu(patcher, x.shape)
            return _one_by_one(apply, x, t, *args, **kwargs)

        return out_of_memory.twice(lambda: apply(x, t, *args, **kwargs), again, self._too_little_memory)

    def _leave_less_on_gpu(self, patcher, shape) -> None:
        out_of_memory.warn(
            "in a pass: other models leave the GPU, more of this one's weights are streamed, and predictions are "
            "computed one by one."
        )
        parts = parts_of(patcher)
        out_of_memory.make_room(parts)
        out_of_memory.keep_less(parts, self.memory_required(shape))
        self._one_by_one = True

    def _too_little_memory(self) -> str:
        """The sentence for a clip that does not fit."""
        shapes = self.latent_shapes
        device = self.device if self.current_patcher is None else self.current_patcher.load_device
        needed = self.memory_required([1, 1, sum(math.prod(shape[1:]) for shape in shapes)]) / 2**30
        fp8 = "" if self.model_config.custom_operations is not None else "set weight_dtype to fp8 in its loader, "
        return (
            f"There is too little free memory on {device} to sample this clip ({_what_clip(shapes)}): one prediction "
            f"takes about {needed:.1f} GB beside the weights, {out_of_memory.free_gigabytes(device):.1f} GB are free. "
            f"Make the clip smaller or shorter, {fp8}or close other programs that use this GPU."
        )

    # ------------------------------------------------------------ latent spaces

    def process_latent_in(self, latent):
        return map_video(latent, self.latent_format.process_in, self.latent_shapes)

    def process_latent_out(self, latent):
        return map_video(latent, self.latent_format.process_out, self.latent_shapes)

    def state_dict_for_saving(self, unet_state_dict, **others):
        if self.diffusion_model.blocks_elsewhere:
            raise ValueError("A MODEL with blocks on several devices is not saved whole: save it before NAVA Offload.")
        if self.model_config.custom_operations is not None:
            from .quantized import quantised_for_saving

            unet_state_dict = quantised_for_saving(self.diffusion_model, unet_state_dict, "diffusion_model.")
        return super().state_dict_for_saving(unet_state_dict, **others)

    # ------------------------------------------------------------ memory

    def _tokens(self, shape) -> int:
        """Tokens of one sample, from a latent's shape: its own, or packed (B, 1, values)."""
        return sum(self._token_counts(shape))

    def _token_counts(self, shape) -> tuple[int, int]:
        """Of picture and sound."""
        shapes = [shape]
        if len(shape) == 3:
            known = self.latent_shapes is not None and shape[2] == sum(math.prod(s[1:]) for s in self.latent_shapes)
            if not known:
                return math.ceil(shape[2] / (4 * self.diffusion_model.config.vid_in_dim)), 0
            shapes = self.latent_shapes
        gone = absent_parts(shapes)
        frames, height, width = shapes[0][2:]
        video = 0 if gone[0] else frames * -(-height // 2) * -(-width // 2)
        return video, 0 if len(shapes) < 2 or gone[1] else shapes[1][2]

    def extra_conds_shapes(self, **kwargs):
        """Only tells :meth:`memory_required` that the host plans a run, not a batch within one."""
        return {PLANNED_RUN: [1]}

    def clip_bytes(self, video_tokens: int, audio_tokens: int) -> float:
        """Bytes that one prediction of such a clip takes beside the weights."""
        return self._pass_bytes(1, video_tokens, audio_tokens) * ALLOCATOR_SLACK

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes needed beside the weights, for a batch of ``input_shape[0]``: of one pass, and where the host plans a
        run also of what the run keeps."""
        batch, run = input_shape[0], self._run
        if self._one_by_one and run is not None and batch > run.shapes[0][0]:
            return math.inf
        live = self._pass_bytes(batch, *self._token_counts(input_shape))
        if run is not None and PLANNED_RUN in (cond_shapes or {}):
            live += run_bytes(run, batch, self.diffusion_model.config, self._dtype_size())
        return live * ALLOCATOR_SLACK

    def _pass_bytes(self, batch: int, video: int, audio: int) -> float:
        """Of live tensors, for so many tokens of picture and sound."""
        run = self._run
        masked = run is not None and run.masked
        return activation_bytes(
            self.diffusion_model.config,
            batch,
            video + audio,
            self._dtype_size(),
            audio_tokens=audio,
            timesteps=batch * (2 if masked else 1),
            timestep_groups=run.shapes[0][2] + audio if masked else 2,
            attention_workspace=attention_workspace(),
            compiled=self.diffusion_model.compiled is not None,
            **weight_copy_sizes(self),
        )

    def _dtype_size(self) -> int:
        return comfy.model_management.dtype_size(self.get_dtype_inference())


class NavaConfig(comfy.supported_models_base.BASE):
    """What the host asks of a model family."""

    unet_extra_config: ClassVar = {}
    sampling_settings: ClassVar = {"shift": 5.0}
    latent_format = comfy.latent_formats.Wan22
    supported_inference_dtypes: ClassVar = [torch.bfloat16, torch.float32]

    def get_model(self, state_dict, prefix="", device=None):
        return NavaModel(self, device=device)


def _check_context(context, config) -> None:
    if context.shape[-1] != config.text_dim or context.shape[1] > config.text_len:
        raise ValueError(
            f"This conditioning is {tuple(context.shape)}; NAVA takes at most {config.text_len} tokens of width "
            f"{config.text_dim} from its own umt5 text encoder: make it with the NAVA Encode Prompt node."
        )


def _anchor_frames(transformer_options) -> int:
    """Frames before a context window that the host gives the picture, but not the sound, to go on from."""
    anchor = getattr(transformer_options.get("context_window"), "causal_anchor_index", None)
    return 0 if anchor is None or anchor < 0 else 1


def _warn_of_step_cache(model, transformer_options) -> None:
    cache = transformer_options.get("easycache")  # where the stock EasyCache and LazyCache keep their state
    if cache is not None and not model._cache_named:
        model._cache_named = True
        logging.warning(
            "NAVA: %s decides by picture and sound together, which is almost all picture, and is known to halve the "
            "loudness of the sound: make the final clip without it.",
            getattr(cache, "name", "a step cache"),
        )


def parts_of(patcher) -> list:
    """The model of ``patcher``, and those that hold blocks of it on other devices."""
    return [patcher, *patcher.get_additional_models_with_key(BLOCKS_ELSEWHERE)]


def _one_by_one(apply, x, t, *args, transformer_options=None, **conditions):
    """A batch of the host's predictions, each by itself."""
    transformer_options = transformer_options or {}
    count = len(transformer_options.get("cond_or_uncond", ())) or 1
    if x.shape[0] % count:
        count = 1
    results = []
    for index in range(count):

        def one(value, index=index):
            whole = not torch.is_tensor(value) or value.shape[:1] != x.shape[:1]
            return value if whole else value.chunk(count)[index]

        options = {
            name: value[index : index + 1] if name in ("cond_or_uncond", "uuids") else value
            for name, value in transformer_options.items()
        }
        part = {name: one(value) for name, value in conditions.items()}
        results.append(apply(one(x), one(t), *map(one, args), transformer_options=options, **part))
    return torch.cat(results)


def _what_clip(shapes) -> str:
    video, audio = (*absent_parts(shapes), True)[:2]
    if video:
        return f"{shapes[1][2] / AUDIO_LATENTS_PER_SECOND:.1f} s of sound"
    size = f"{shapes[0][4] * PIXELS_PER_LATENT}x{shapes[0][3] * PIXELS_PER_LATENT}"
    batch = f", {shapes[0][0]} at once" if shapes[0][0] > 1 else ""
    return f"{size}, {frames_of_latents(shapes[0][2]) / FPS:.1f} s{'' if audio else ' with sound'}{batch}"


def outer_sample(
    executor,
    noise,
    latent_image,
    sampler,
    sigmas,
    denoise_mask=None,
    callback=None,
    disable_pbar=False,
    seed=None,
    latent_shapes=None,
):
    """Around every run of the model, whatever guider or sampler drives it: record the latent's shapes, show the
    preview its video part (where the host does not), and put given parts back exactly as they were."""
    model = executor.class_obj.model_patcher.model
    shapes = shapes_of(latent_shapes, latent_image)
    check_shapes(shapes, model.diffusion_model.config)
    if len(shapes) > 1 and not any(absent_parts(shapes)):
        _warn_of_step_cache(model, executor.class_obj.model_options.get("transformer_options", {}))
    model.latent_shapes = shapes
    predictions = sum(len(each) for each in getattr(executor.class_obj, "conds", {}).values())
    model._run = RunSize(tuple(shapes), max(1, predictions), denoise_mask is not None)
    given = _given_values(shapes, latent_image, denoise_mask)
    # Parts that are marked to be shown noised stay so in the mask: a thousandth of a sample that the host writes anew
    # before each pass, and of a result that is put back below.
    model._clean = _clean_values(shapes, denoise_mask)
    model.made = _made_parts(shapes, denoise_mask)
    if not any(model.made):
        raise ValueError(NOTHING_TO_MAKE)
    if callback is not None and len(shapes) > 1 and not host_unpacks():
        callback = video_first(callback, shapes)
    model.diffusion_model.compiled = compiled_blocks(executor.class_obj.model_options)
    settings = (noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
    try:
        output = _run_twice(executor, model, lambda: executor(*settings, latent_shapes=latent_shapes))
    finally:
        model._clean = model._run = model.diffusion_model.compiled = None
        model.made = (True, True)
        model._one_by_one = False
    return output if given is None else torch.where(given.to(output.device), latent_image.to(output), output)


def _run_twice(executor, model, run):
    """``run``, again from its start where memory ran out outside the network's passes, which look after themselves."""
    guider = executor.class_obj
    conds = {name: [cond.copy() for cond in each] for name, each in getattr(guider, "conds", {}).items()}

    def again():
        out_of_memory.warn("beside the network: other models leave the GPU, and the run begins again.")
        out_of_memory.make_room(parts_of(guider.model_patcher))
        guider.conds = conds
        return run()

    try:
        return out_of_memory.twice(run, again, model._too_little_memory)
    except TooLittleMemoryError:
        comfy.model_management.unload_all_models()  # as the host does after its own error, so that the next prompt runs
        raise


def _given_values(shapes, latent_image, denoise_mask):
    """Where the result is to be the latent that was given, in its (packed) shape; None for nowhere."""
    gone = absent_parts(shapes)
    if denoise_mask is None and not any(gone):
        return None
    given = torch.zeros_like(latent_image, dtype=torch.bool) if denoise_mask is None else is_given(denoise_mask)
    parts = comfy.utils.unpack_latents(given.cpu(), shapes)
    parts = [torch.ones_like(part) if missing else part for part, missing in zip(parts, gone, strict=True)]
    return comfy.utils.pack_latents(parts)[0] if len(parts) > 1 else parts[0]


def _made_parts(shapes, denoise_mask):
    """Of picture and sound, whether anything of them is made."""
    gone = (*absent_parts(shapes), True)[:2]
    if denoise_mask is None:
        return tuple(not absent for absent in gone)
    masks = [*comfy.utils.unpack_latents(denoise_mask, shapes), None][:2]
    return tuple(not absent and not bool(is_given(mask).all()) for absent, mask in zip(gone, masks, strict=True))


def _clean_values(shapes, denoise_mask):
    """Where whole frames and audio steps are given clean, in the (packed) shape; None without a mask."""
    if denoise_mask is None:
        return None
    parts = []
    for mask in comfy.utils.unpack_latents(denoise_mask, shapes):
        steps = clean_steps(mask, 2)
        steps = steps.reshape(steps.shape[0], 1, -1, *[1] * (mask.ndim - 3))
        parts.append(steps.expand_as(mask))
    return comfy.utils.pack_latents(parts)[0] if len(parts) > 1 else parts[0]


# ---------------------------------------------------------------- loading


WEIGHT_DTYPES = {
    "auto": None,
    "auto fast": None,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8": FP8,
    "fp8 fast": FP8,
}


def load_backbone(path: str, weight_dtype: str = "auto", *, disable_dynamic: bool = False):
    """A NAVA checkpoint as the host's model patcher (MODEL).

    ``weight_dtype``: "auto" (the host's choice by its flags, the GPU and the file; quantised weights stay as they are)
    or one of ``WEIGHT_DTYPES``: "fp8" keeps the blocks' weights in fp8 and computes as if they were bf16; "fp8 fast"
    and "auto fast" also multiply on the GPU's units for the weights' own type where it has them. Weights are converted
    tensor by tensor, or left mapped from the file where the host moves them itself (dynamic VRAM). Raises
    WrongFileError, in a sentence, for a file that is something else, damaged or incomplete, ValueError where fp8 is
    asked for of a file in another quantised format, and RuntimeError where the device or the host cannot keep what is.
    """
    info = describe_file(path)
    if not info.is_backbone:
        raise WrongFileError(explain_wrong_file(info, FileKind.NAVA_BACKBONE))
    problem = backbone_problem(info)
    if problem:
        raise WrongFileError(problem)
    config = NavaConfig(asdict(backbone_config(info)))
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    init = (load_backbone, (path, weight_dtype))
    weight_dtype = _with_server_flags(info, weight_dtype, load_device)
    stays_quantised = _stays_quantised(info, weight_dtype, load_device)
    if stays_quantised:
        config.set_inference_dtype(torch.bfloat16, _quantised_compute_dtype(load_device))
        config.custom_operations = _quantised_operations(info, weight_dtype, load_device)
    else:
        config.set_inference_dtype(*_choose_dtypes(info, WEIGHT_DTYPES[weight_dtype], load_device))

    model = config.get_model(None)
    dynamic = comfy.model_patcher.CoreModelPatcher is not comfy.model_patcher.ModelPatcher and not disable_dynamic
    patcher_class = comfy.model_patcher.CoreModelPatcher if dynamic else PartlyResident
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    if stays_quantised or patcher.is_dynamic():
        dtype = WEIGHT_DTYPES[weight_dtype] if stays_quantised else model.diffusion_model.dtype
        mapped = patcher.is_dynamic() and info.format == "safetensors" and _same_quantised_weights(info, dtype)
        weights = _mapped_weights(info) if mapped else _read_weights(info, dtype, offload_device)
        model.load_model_weights(weights, "", assign=True)
    else:
        _stream_weights(info, model.diffusion_model)
    model.origin = init[1]
    patcher.cached_patcher_init = init
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, outer_sample)
    patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_LOAD, WRAPPER_KEY, patch_raw_parameters)
    return patcher


def _with_server_flags(info, weight_dtype, load_device) -> str:
    """ "auto" where the server was started with a flag for the weights' type (``--fp8_e4m3fn-unet`` and its like)."""
    if weight_dtype != "auto" or info.layers:  # smaller weights are not rounded once more
        return weight_dtype
    dtype = comfy.model_management.unet_dtype(load_device, supported_dtypes=NavaConfig.supported_inference_dtypes)
    if dtype.itemsize == 1:  # only a flag gives such a type here
        if dtype is not FP8:
            logging.warning("NAVA: %s has too few digits for these weights; they are kept in %s.", dtype, FP8)
        return "fp8"
    return weight_dtype


def _choose_dtypes(info, wanted, load_device):
    """(weight dtype, compute dtype or None where they are the same), as the host chooses them for its own models."""
    supported = NavaConfig.supported_inference_dtypes
    dtype = wanted
    if dtype is None:
        parameters = sum(tensor.numel for tensor in info.model_tensors.values())
        dtype = comfy.model_management.unet_dtype(
            device=load_device, model_params=parameters, supported_dtypes=supported, weight_dtype=main_dtype(info)
        )
    cast = comfy.model_management.unet_manual_cast(dtype, load_device, supported)
    if (cast or dtype) is torch.float16:  # only the server's --fp16-unet and --force-fp16 ask for it
        logging.warning(
            "NAVA was trained in bfloat16; float16, which this server's flag asks for, ends at 65504: if the picture "
            "turns black, set weight_dtype to bf16 in NAVA Load Backbone."
        )
    return dtype, cast


def _stream_weights(info, backbone) -> None:
    """Fill the backbone's parameters from the file, one tensor in memory at a time."""
    with open_checkpoint(info) as source, torch.no_grad():
        for name, tensor in stream_tensors(source, backbone.dtype):
            backbone.get_parameter(name).copy_(tensor)


def _read_weights(info, dtype, device) -> dict:
    """The file's tensors in the type wanted (as ``stream_tensors`` takes it), to become the parameters themselves."""
    with open_checkpoint(info) as source:
        weights = {name: tensor.to(device) for name, tensor in stream_tensors(source, dtype)}
    return weights | (_marks(info) if dtype is None else {})


def _mapped_weights(info) -> dict:
    weights = comfy.utils.load_torch_file(str(info.path))
    return comfy.utils.state_dict_prefix_replace(weights, {info.prefix: ""}, filter_keys=True) | _marks(info)


def _marks(info) -> dict:
    """What the host's Linear reads beside a quantised weight; a file can have it in its metadata instead."""
    marks = {f"{name}.comfy_quant": layer.comfy_quant for name, layer in info.layers.items()}
    return {name: torch.tensor(list(text), dtype=torch.uint8) for name, text in marks.items()}


# ---------------------------------------------------------------- quantised weights


def _stays_quantised(info, weight_dtype, load_device) -> bool:
    """Whether the model is to hold quantised weights. "auto" gives way where that cannot be, an explicit choice
    raises."""
    dtype = WEIGHT_DTYPES[weight_dtype]
    if dtype not in (None, FP8) or not _quantised_names(info, dtype):
        return False
    problem = _quantised_problem(info, load_device)
    if problem is None:
        return True
    if weight_dtype == "auto":
        logging.warning("NAVA: %s; the file's quantised weights are widened to bf16.", problem)
        return False
    raise RuntimeError(f"{problem[0].upper()}{problem[1:]}. Set weight_dtype to bf16.")


def _quantised_problem(info, load_device) -> str | None:
    try:
        from .quantized import host_problem, storage_problem
    except ImportError as error:
        return f"this ComfyUI has no quantised tensors to keep such weights in ({error}); update comfy-kitchen"
    formats = {layer.format.name: layer.format for layer in info.layers.values()}
    found = [host_problem(format, load_device) for format in formats.values()] or [storage_problem(load_device)]
    return next((problem for problem in found if problem), None)


def _quantised_compute_dtype(load_device) -> torch.dtype:
    """What quantised weights are dequantised to: always named, so that the host counts memory for it."""
    supported = NavaConfig.supported_inference_dtypes
    return comfy.model_management.unet_manual_cast(None, load_device, supported)


def _quantised_operations(info, weight_dtype, load_device):
    from .quantized import matmul_problem, multiplies, quantised_operations

    fast = weight_dtype in ("fp8 fast", "auto fast")
    if fast and info.layers:
        slow = {x.format.name for x in info.layers.values() if not multiplies(x.format.algorithm, load_device, True)}
        problem = f"{load_device} has no units for {' and '.join(sorted(slow))}" if slow else None
    else:
        problem = matmul_problem(load_device) if fast else None
    if problem:
        logging.warning("NAVA: %s; weights are dequantised instead, as without fast.", problem)
    return quantised_operations(torch.bfloat16, load_device, fast=fast)


def _quantised_names(info, dtype) -> set:
    """Weights that are quantised when the file is read as ``dtype``."""
    return {tensor.name for tensor in plan_tensors(info, dtype) if tensor.layer is not None}


def _same_quantised_weights(info, dtype) -> bool:
    """Whether the file can be mapped as it is: nothing to quantise or dequantise on the way in."""
    own = {name for name, tensor in info.model_tensors.items() if tensor.torch_dtype is FP8}
    packed = {f"{name}.weight" for name in info.layers}
    scales = {name for name in own if name.rpartition(".")[0] in info.layers}
    return _quantised_names(info, dtype) == (own - scales) | packed
