"""The live DeviceSpec of a torch device; the only place that asks torch what the hardware is."""

import functools

import torch

from ..device import CPU, DeviceSpec, gpu_spec


def of(args) -> torch.device:
    """The device of the first tensor among `args`."""
    for a in args:
        if isinstance(a, torch.Tensor):
            return a.device
    raise TypeError("no tensor among the arguments")


@functools.lru_cache(maxsize=64)
def spec(device: torch.device) -> DeviceSpec:
    if device.type != "cuda":
        return CPU
    p = torch.cuda.get_device_properties(device)
    shared = p.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return gpu_spec(p.name, p.major * 10 + p.minor, p.multi_processor_count, shared, p.L2_cache_size)
