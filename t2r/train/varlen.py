"""Softmax attention of packed documents by torch's flash attention for texts of varying length: a teacher, and a
student's layers that stay softmax, read them without a mask of T x T entries and do no work across their bounds.

Shape legend: B batch, T time, HQ query heads, H kv heads, D head dim, N documents.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2r.families import head_dim
from t2r.modeling.models import BY_BOUNDS

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

WORDS = inspect.signature(varlen_attn).parameters if varlen_attn else {}
GROUPED = {"enable_gqa": True} if "enable_gqa" in WORDS else {}  # grouped heads passed before there was the word


def can_attend(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has such kernels here: an NVIDIA GPU, 16 bits, torch 2.11 (windows came after documents)."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and torch.version.cuda is not None and half and "window_size" in WORDS


def read_by_bounds(model, device: torch.device, dtype: torch.dtype) -> None:
    """Let the model's softmax layers attend so where it will be on `device` in `dtype`, if torch can there."""
    D = head_dim(model.config)
    if can_attend(device, dtype) and D % 8 == 0 and D <= 256:
        model.set_attn_implementation(BY_BOUNDS)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    cu_seq_lens_q: Tensor, max_length_q: int, scaling: float | None = None, sliding_window: int | None = None,
    **unused,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers: query [B,HQ,T,D], key and value [B,H,T,D] -> output [B,T,HQ,D].

    cu_seq_lens_q [N+1]: bounds of the documents over the flattened [B*T] tokens, none longer than max_length_q; a model
    that does not hand them on fails.
    """
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    bounds, window = cu_seq_lens_q.int(), (sliding_window - 1 if sliding_window else -1, 0)
    o = varlen_attn(
        q, k, v, bounds, bounds, max_length_q, max_length_q, scale=scaling, window_size=window, **GROUPED
    )  # fmt: skip
    return o.view(query.shape[0], query.shape[2], *o.shape[1:]), None


ALL_ATTENTION_FUNCTIONS.register(BY_BOUNDS, attend)
