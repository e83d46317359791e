"""Packed documents: which token belongs to which chunk, lane and position of its document.

Documents are given by their bounds [N+1] in one row of tokens: document n has tokens cu_seqlens[n] to cu_seqlens[n+1].

Shape legend: spec.py.
"""

import weakref
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

_known: dict[str, tuple] = {}


def remembered(make: Callable, cu_seqlens: Tensor, *args: int):
    """make(cu_seqlens, *args), worked out once for all layers that are given the same tensor."""
    if torch.compiler.is_compiling() or cu_seqlens.is_inference() or torch.is_inference_mode_enabled():
        return make(cu_seqlens, *args)  # inference tensors count no versions, and training could not reuse the result
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return make(cu_seqlens, *args)  # a CUDA graph is replayed with other contents, and runs nothing of this
    known, key, result = _known.get(make.__name__, (lambda: None, None, None))
    if known() is not cu_seqlens or key != (cu_seqlens._version, *args):
        result = make(cu_seqlens, *args)
        _known[make.__name__] = weakref.ref(cu_seqlens), (cu_seqlens._version, *args), result
    return result


def document_count(B: int, cu_seqlens: Tensor | None) -> int:
    return B if cu_seqlens is None else cu_seqlens.shape[0] - 1


def document_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """Document [total] of each token."""
    index = torch.arange(total, device=cu_seqlens.device)
    # not in cu_seqlens[1:]: compiled by torch 2.11 for a GPU, searchsorted takes that view for the whole tensor
    return torch.searchsorted(cu_seqlens, index, right=True) - 1


def count_positions(first: Tensor, B: int, T: int, cu_seqlens: Tensor | None) -> Tensor:
    """Positions [B,T] of tokens that continue N documents at positions `first` [N]."""
    index = torch.arange(T, device=first.device)
    if cu_seqlens is None:
        return first[:, None] + index
    document = document_of(cu_seqlens, T)
    return (index - cu_seqlens[document] + first[document])[None]


def end_positions(first: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Position [N] after the last real token of each document."""
    ends = positions.to(first.dtype) + 1
    if cu_seqlens is None:
        return torch.maximum(first, ends.amax(dim=1))
    return first.scatter_reduce(0, document_of(cu_seqlens, positions.shape[1]), ends[0], reduce="amax")


def chunk_table(cu_seqlens: Tensor, total: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Chunks of packed documents [N+1] without a host read: table [n,2] (first token, tokens; 0 tokens where a row is
    not used, as n counts for the worst case) and bounds [N+1], the first chunk of each document."""
    lengths = cu_seqlens.diff()
    bounds = torch.cat([lengths.new_zeros(1), (lengths + chunk - 1).div(chunk, rounding_mode="floor").cumsum(0)])
    index = torch.arange(total // chunk + lengths.shape[0], device=cu_seqlens.device)
    document = (torch.searchsorted(bounds, index, right=True) - 1).clamp(max=lengths.shape[0] - 1)
    begin = cu_seqlens[document] + (index - bounds[document]) * chunk
    count = (cu_seqlens[document + 1] - begin).clamp(max=chunk)
    used = index < bounds[-1]
    table = torch.stack([torch.where(used, begin, 0), torch.where(used, count, 0)], dim=1)
    return table.to(torch.int64).contiguous(), bounds.to(torch.int64)


def deal_documents(cu_seqlens: Tensor, size: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deal documents [N+1] to lanes of about `room` tokens, so that short ones are read side by side and not one after
    the other. A document starts a new chunk of `size` tokens; the longest go first, each to the first lane with room.

    Returns place [T]: where each token goes in the flattened lanes; starts [lanes,n] on the CPU: the document that
    begins with a chunk, or -1; ends [N]: the flattened index of each document's last chunk, -1 if it is empty.
    """
    bounds = cu_seqlens.tolist()
    chunks = [-(-(end - begin) // size) for begin, end in pairwise(bounds)]
    capacity = max(max(chunks), room // size)
    filled: list[int] = []
    where: dict[int, tuple[int, int]] = {}
    for n in sorted(range(len(chunks)), key=lambda n: -chunks[n]):
        if chunks[n]:
            lane = next((i for i, used in enumerate(filled) if used + chunks[n] <= capacity), len(filled))
            if lane == len(filled):
                filled.append(0)
            where[n] = lane, filled[lane]
            filled[lane] += chunks[n]
    per_lane = max(filled)
    starts = torch.full((len(filled), per_lane), -1)
    ends = torch.full((len(chunks),), -1)
    place = torch.empty(bounds[-1], dtype=torch.long)
    for n, (lane, chunk) in where.items():
        first = lane * per_lane + chunk
        starts[lane, chunk] = n
        ends[n] = first + chunks[n] - 1
        place[bounds[n] : bounds[n + 1]] = torch.arange(bounds[n + 1] - bounds[n]) + first * size
    return place.to(cu_seqlens.device), starts, ends.to(cu_seqlens.device)
