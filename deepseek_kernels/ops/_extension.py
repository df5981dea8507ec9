"""`deepseek_kernels._C` behind one door: loaded on first use, with a helpful error when it is absent.

The extension knows no torch. It takes raw addresses, sizes, strides in elements and a stream.
"""

import functools
import importlib.util
import os

import torch

from ..plan.backend import LIBRARY_MATMULS, Environment

_generation = 0
_substitute = None


@functools.cache
def _load():
    """(module or None, why not)."""
    try:
        from deepseek_kernels import _C
    except ImportError as error:
        if importlib.util.find_spec("deepseek_kernels._C") is None:
            return None, (
                "this installation has no compiled kernels (deepseek_kernels._C); "
                "reinstall with DEEPSEEK_KERNELS_CUDA=system or wheel to build them"
            )
        return None, f"deepseek_kernels._C cannot be loaded: {error}"
    if not _C.ops:
        return _C, "deepseek_kernels._C was built without CUDA; reinstall with DEEPSEEK_KERNELS_CUDA=system or wheel"
    return _C, ""


def module():
    """The extension. Raises RuntimeError with the remedy where there is none."""
    if _substitute is not None:
        return _substitute
    extension, error = _load()
    if extension is None:
        raise RuntimeError(error)
    return extension


def cpu():
    """The submodule of CPU kernels. They take `threads` in place of a stream: pass `torch.get_num_threads()`."""
    extension, error = _load()
    if extension is None:
        raise RuntimeError(error)
    return extension.cpu


def substitute(extension) -> None:
    """Use `extension` (a software model that takes CPU addresses) in place of the compiled module; None ends it."""
    global _substitute, _generation
    _substitute = extension
    _generation += 1
    environment.cache_clear()


def generation() -> int:
    """Changes whenever the environment does; part of every cache key that depends on it."""
    return _generation


def _arch(name: str) -> int:
    return int(name.rstrip("af"))


@functools.cache
def environment() -> Environment:
    triton = importlib.util.find_spec("triton") is not None
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    extension, error = (_substitute, "") if _substitute is not None else _load()
    ops = frozenset(extension.ops) if extension else frozenset()
    archs = frozenset(map(_arch, extension.architectures)) if extension else frozenset()
    functions = frozenset(f for f in LIBRARY_MATMULS if hasattr(torch.nn.functional, f))
    compiled, _ = _load()
    cpu_ops = frozenset(compiled.cpu.ops) if compiled else frozenset()
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")))
    return Environment(
        triton=triton,
        interpret=interpret,
        extension_ops=ops,
        extension_archs=archs,
        on_model=_substitute is not None,
        extension_error=error,
        torch_functions=functions,
        cuda=cuda,
        cpu_ops=cpu_ops,
    )


def stream(tensor: torch.Tensor) -> int:
    """The raw handle of the current stream of the tensor's device; 0 for CPU tensors."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_CODES = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}


def dtype_code(dtype: torch.dtype) -> int:
    """What the extension calls `dtype`."""
    return getattr(module(), _CODES[dtype])
