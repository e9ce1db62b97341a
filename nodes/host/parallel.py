"""A MODEL whose network is elsewhere: the host samples as always, workers under Ray compute the predictions.

Run on ComfyUI 0.18.1 and 0.33.0.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial

import comfy.conds
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import nn

from ...nava_core.backbone import BackboneConfig
from ...nava_core.backbone.quantized import FP8
from ...nava_core.checkpoint import describe_file
from ...nava_core.parallel import Parallel
from .model import BLOCKS_ELSEWHERE, CROSS_MODAL, HostBackbone, NavaModel

PREFIX = "diffusion_model."
WRAPPER_KEY = "nava_workers"


class DistantBackbone(HostBackbone):
    """The host's network without a parameter; :attr:`workers` does its passes."""

    def __init__(self, *, dtype=None, device=None, operations=None, **config):
        nn.Module.__init__(self)
        self.config = BackboneConfig(**config)
        self.dtype = dtype
        self.double_blocks = self.single_blocks = ()
        self.workers = self.compiled = None

    def run_pass(self, video, audio, timestep, context, *, cross_modal, options, **conditions):
        """All predictions of the host's batch, handed to the workers together."""
        count = max(1, len(options.get("cond_or_uncond", ())))
        batch = {"video": video, "audio": audio, "timestep": timestep, "context": context, **conditions}
        passes = [{} for _ in range(count)]
        for name, value in batch.items():
            for one, part in zip(passes, _chunks(value, count), strict=True):
                one[name] = part
        for one, flags in zip(passes, _chunks(cross_modal, count), strict=True):
            one["cross_modal"] = bool(flags.all()) if torch.is_tensor(flags) else flags
        check = comfy.model_management.throw_exception_if_processing_interrupted
        pairs = self.workers.run_together(passes, check)
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*pairs, strict=True))


def _chunks(value, count):
    if torch.is_tensor(value):
        return value.chunk(count)
    if isinstance(value, tuple):
        return list(zip(*(_chunks(each, count) for each in value), strict=True))
    return [value] * count


class DistantModel(NavaModel):
    """NavaModel over a distant network: all predictions of a step in one batch, which takes no memory here."""

    network = DistantBackbone

    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        out.pop("prediction", None)
        # As a tensor, so that the host batches predictions with and without it.
        flag = torch.tensor([[kwargs.get(CROSS_MODAL, True)]], dtype=torch.int64, device=kwargs["device"])
        out["cross_modal"] = comfy.conds.CONDRegular(flag)
        return out

    def memory_required(self, input_shape, cond_shapes=None):
        return 4 * 4 * torch.Size(input_shape).numel()  # the latents themselves


def over_workers(patcher, workers: int, layout: str, weights: str):
    """The MODEL computed by ``workers`` workers (see ``nava_core.parallel.Parallel``), with its LoRAs.

    Workers start with the first pass and end with the MODEL, with an interrupted run, or when another MODEL needs them.
    Raises ValueError and RuntimeError, in a sentence, for a MODEL of another kind, for what workers cannot do, and as
    ``Parallel.check``.
    """
    source = patcher.model
    if not isinstance(source, NavaModel):
        raise ValueError(
            f"This MODEL is a {type(source).__name__}, not NAVA: connect the one from the NAVA Load Backbone node."
        )
    if isinstance(source, DistantModel):
        raise ValueError("This MODEL has been through NAVA Parallel already: use one such node.")
    if patcher.get_additional_models_with_key(BLOCKS_ELSEWHERE):
        raise ValueError(
            "The blocks of this MODEL are on several devices (NAVA Offload); NAVA Parallel's workers hold them all: "
            "leave blocks empty there."
        )
    _refuse_what_stays_here(patcher)
    path, weight_dtype = source.origin
    device = patcher.load_device.type
    parallel = Parallel(workers, layout, weights)
    parallel.check(path, device)

    if weight_dtype in ("fp8 fast", "auto fast"):
        logging.warning("NAVA Parallel: workers multiply as without fast.")
    compute_dtype = source.get_dtype_inference()
    dtype = compute_dtype
    if source.model_config.custom_operations is not None:
        dtype = None if describe_file(path).layers else FP8
    model = DistantModel(source.model_config)
    model.diffusion_model.dtype = compute_dtype
    distant = comfy.model_patcher.ModelPatcher(model, patcher.load_device, patcher.offload_device)
    _take_over(patcher, distant)
    changes = partial(nullcontext, _weight_changes(patcher.patches))
    model.diffusion_model.workers = parallel.backbone(
        path, device, dtype, _say, changes=changes, compute_dtype=compute_dtype
    )
    distant.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, end_if_interrupted)
    return distant


def _refuse_what_stays_here(patcher) -> None:
    options = patcher.model_options.get("transformer_options", {})
    if any(options.get("patches_replace", {}).values()) or any(
        key.startswith(PREFIX) for key in patcher.object_patches
    ):
        raise ValueError(
            "Nodes before NAVA Parallel change the network's own code (block replacement, compilation), which does not "
            "reach workers: take them off."
        )


def _take_over(patcher, distant) -> None:
    """Whatever else hangs on a MODEL: options, sampling objects, wrappers and callbacks."""
    clone = patcher.clone()
    for name in ("model_options", "object_patches", "wrappers", "callbacks", "attachments"):
        setattr(distant, name, getattr(clone, name))


def _weight_changes(patches):
    """What the host's ``patches`` (LoRAs) do to the backbone's weights, by the weights' names."""

    def change(key, weight):
        return comfy.lora.calculate_weight(patches[key], weight.clone(), key)

    patches = {key: list(each) for key, each in patches.items() if key.startswith(PREFIX)}
    return {key.removeprefix(PREFIX): partial(change, key) for key in patches}


def end_if_interrupted(executor, *args, **kwargs):
    """Around a run: an interruption between two passes, too, ends the workers."""
    try:
        return executor(*args, **kwargs)
    except comfy.model_management.InterruptProcessingException:
        executor.class_obj.model_patcher.model.diffusion_model.workers.close()
        raise


def _say(sentence: str) -> None:
    logging.info("NAVA Parallel: %s", sentence)
