"""Triton kernel of evict.py: the slot that each token takes, token after token, a program for each document and head.

Shape legend: spec.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .documents import document_count


@triton.jit
def least(rank, stamp, position, recent, m, RING: tl.constexpr, SINKS: tl.constexpr):
    """The slot that the token at `position` takes: rank, stamp [M] of the tokens held, recent of this head."""
    free = (m >= SINKS) & (m < RING) & ((position - stamp >= recent) | (rank == float("-inf")))
    slot = tl.argmin(tl.where(free, rank, float("inf")), axis=0)
    return tl.where(position < SINKS, position, slot)


@triton.jit(do_not_specialize=["T"])
def turns_kernel(
    bonus, recent, positions, cu_seqlens, ranks, stamps, turns, T, H,
    RING: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """bonus [B,T,H] -> turns [B,T,H]; ranks, stamps [N,H,M] become those after the last token."""
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    m = tl.arange(0, BM)
    if PACKED:
        begin, end = tl.load(cu_seqlens + n).to(tl.int64), tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        begin, end = n * T, n * T + T
    memory = (n * H + h) * M + m
    rank = tl.load(ranks + memory, mask=m < M, other=float("inf"))
    stamp = tl.load(stamps + memory, mask=m < M, other=0)
    kept = tl.load(recent + h)
    for t in range(begin, end):
        position = tl.load(positions + t).to(tl.int32)
        slot = least(rank, stamp, position, kept, m, RING, SINKS)
        here = (m == slot) & (position >= 0)
        rank = tl.where(here, position.to(tl.float32) + tl.load(bonus + t * H + h).to(tl.float32), rank)
        stamp = tl.where(here, position, stamp)
        tl.store(turns + t * H + h, tl.maximum(slot, 0))
    tl.store(ranks + memory, rank, mask=m < M)
    tl.store(stamps + memory, stamp, mask=m < M)


def launch(
    bonus: Tensor, recent: Tensor, positions: Tensor, cu_seqlens: Tensor | None, rank: Tensor, stamp: Tensor,
    ring: int, sinks: int,
) -> Tensor:  # fmt: skip
    """evict.one_by_one on a GPU."""
    B, T, H = bonus.shape
    turns = torch.empty(B, T, H, device=bonus.device, dtype=torch.int32)
    turns_kernel[(document_count(B, cu_seqlens) * H,)](
        bonus.contiguous(), recent, positions.contiguous(), cu_seqlens, rank, stamp, turns, T, H,
        RING=ring, SINKS=sinks, PACKED=cu_seqlens is not None, M=rank.shape[-1],
        BM=triton.next_power_of_2(rank.shape[-1]), num_warps=1,
    )  # fmt: skip
    return turns
