"""GPUs that are not there: the CPU under other names, with as much free memory as a test says.

To the host they are GPUs: it loads, leaves in RAM, unloads and counts as it does for those. A tensor on one of them is
on the CPU all the same.
"""

import contextlib

import comfy.model_management as manager
import torch
from comfy_host import pack_module

GPUS = [torch.device("cpu", index) for index in (1, 2, 3)]
CPU = torch.device("cpu")


class FakeGPUs:
    """``count`` GPUs of ``total`` bytes each (a mapping gives each its own): set ``total`` to change it."""

    def __init__(self, patch, count=1, total=2**50):
        self.devices, self.total = GPUS[:count], dict.fromkeys(GPUS[:count], total)
        devices = pack_module("nodes.host.devices")
        patch.setattr(manager, "vram_state", manager.VRAMState.NORMAL_VRAM)
        patch.setattr(manager, "lowvram_available", True)
        patch.setattr(manager, "is_device_cpu", lambda device: device == CPU)
        patch.setattr(manager, "get_torch_device", lambda: self.devices[0])
        patch.setattr(manager, "text_encoder_device", lambda: self.devices[0])  # it asks for fp16, as GPUs have it
        patch.setattr(manager, "get_free_memory", self.free)
        if hasattr(manager, "get_all_torch_devices"):
            patch.setattr(
                manager, "get_all_torch_devices", lambda exclude_current=False: self.devices[int(exclude_current) :]
            )
        else:
            patch.setattr(devices, "all_gpus", lambda: self.devices)

    def loaded(self, device):
        """Bytes of weights on ``device``, as the host counts them."""
        return sum(
            each.model.loaded_size()
            for each in manager.current_loaded_models
            if each.model is not None and each.device == device
        )

    def models(self, device):
        """Names of the models on ``device``."""
        return {
            type(each.model.model).__name__
            for each in manager.current_loaded_models
            if each.model is not None and each.device == device and each.model.loaded_size()
        }

    def free(self, device=None, torch_free_too=False):
        device = self.devices[0] if device is None else device
        free = self.total[device] - self.loaded(device) if device in self.total else 2**40
        return (free, 0) if torch_free_too else free

    def set_total(self, total):
        self.total = dict.fromkeys(self.devices, total)


@contextlib.contextmanager
def nothing_loaded():
    """Before and after: no model is loaded anywhere."""
    _unload()
    try:
        yield
    finally:
        _unload()


def _unload():
    for device in [CPU, *GPUS]:
        manager.free_memory(1e30, device)
    manager.cleanup_models()
