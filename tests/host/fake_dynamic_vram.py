"""Dynamic VRAM without a GPU: stand-ins for what comfy_aimdo does there, under the host's own code around it.

A vbar gives out places in GPU memory; a weight whose place lies below the watermark stays there once it was fetched,
any other is fetched anew at each use. Weights come from their module's parameters, as from a mapped file.
"""

import comfy.cli_args
import comfy.memory_management
import comfy.model_management as manager
import comfy.model_patcher
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch

FILE = torch.device("meta")  # where weights seem to be


class VBar:
    """comfy_aimdo's ModelVBAR; ``room`` bytes are all that the GPU has for it."""

    room = 2**60

    def __init__(self, size, device):
        self.offset, self.watermark, self.memory, self.watermarks = 0, 2**60, {}, []

    def prioritize(self, *_):
        self.watermark = 2**60

    def alloc(self, size):
        self.offset = (self.offset + 511) & ~511
        self.offset += size
        return self, self.offset - size, size

    def set_watermark(self, size):
        self.watermarks.append(size)
        self.watermark = size
        self._drop()

    def free_memory(self, size):
        freed = 0
        for offset in sorted(self.memory, reverse=True):
            if freed >= size:
                break
            freed += len(self.memory[offset])
            self.watermark = offset
        self._drop()
        return freed

    def _drop(self):
        self.memory = {offset: each for offset, each in self.memory.items() if offset + len(each) <= self.watermark}

    def loaded_size(self):
        return sum(map(len, self.memory.values()))

    def fault(self, offset, size):
        if offset + size > min(self.watermark, type(self).room):
            return None
        self.memory.setdefault(offset, torch.zeros(size, dtype=torch.uint8))
        return self.memory[offset].data_ptr()


class OnFile(torch.nn.Parameter):
    """A parameter that seems to be on no device that computes."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self):
        return FILE

    def detach(self):
        return self


class HostBuffer:
    def __init__(self, *_):
        self.size = 0


def install(patch, gpus):
    """Under ``patch``, on the ``gpus`` of fake_gpu."""
    vbar = comfy_aimdo.model_vbar
    patch.setattr(vbar, "ModelVBAR", VBar)
    patch.setattr(vbar, "vbar_fault", lambda place: place[0].fault(*place[1:]))
    patch.setattr(vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    patch.setattr(vbar, "vbar_unpin", lambda place: None)
    patch.setattr(vbar, "vbars_analyze", lambda *_: 0)
    patch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda place, device: place[0].memory[place[1]])
    patch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    patch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    patch.setattr(manager, "is_device_cpu", lambda device: False)
    patch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    patch.setattr(comfy.model_patcher.ModelPatcherDynamic, "unpin_all_weights", lambda self: None)
    patch.setattr(comfy.model_patcher.ModelPatcherDynamic, "partially_unload_ram", lambda self, *_, **__: 0)
    return gpus


def as_mapped(patcher):
    """``patcher`` with the weights that the host casts taken for ones in a file."""
    for module in patcher.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            for name, weight in module._parameters.items():
                if weight is not None and type(weight.data) is torch.Tensor:
                    module._parameters[name] = OnFile(weight.data, requires_grad=False)
    return patcher


def vbar_of(patcher):
    return patcher.model.dynamic_vbars[patcher.load_device]
