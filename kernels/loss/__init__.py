"""Cross-entropy and KL to a teacher, token by token, from logits as the head returns them, with their gradient:
PyTorch's form (reference.py) and a Triton kernel (fused.py), which have the same two functions."""

from types import ModuleType

from torch import Tensor

from . import reference
from .reference import Mix, wide

__all__ = ["Mix", "implementation", "reference", "wide"]


def implementation(x: Tensor) -> ModuleType:
    """`fused` or `reference`: what to work out the losses with, where logits have the device and precision of x."""
    if not x.is_cuda:
        return reference
    try:
        from . import fused
    except ImportError:  # there is no triton for Windows
        return reference
    return fused if x.dtype in fused.DTYPES else reference
