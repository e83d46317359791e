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


@triton.jit
def ordered(x):
    """float32 -> int32 in the same order (back: `restored`): a warp finds the least int32 in one instruction."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # 0 and -0 are one number
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def restored(key):
    """The float32 of which `key` is the order."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pick(x, here):
    """The one element of x that `here` marks, as an int32 sum: one instruction again."""
    return tl.sum(tl.where(here, x, 0), axis=0)


@triton.jit
def load_tokens(bonus, positions, t, end, h, H):
    """Position and order of the rank of the tokens t before `end`; position -1 after it."""
    position = tl.load(positions + t, mask=t < end, other=-1).to(tl.int32)
    mark = tl.load(bonus + t * H + h, mask=t < end, other=0.0).to(tl.float32)
    return position, ordered(position.to(tl.float32) + mark)


@triton.jit(do_not_specialize=["T"])
def turns_kernel(
    bonus, recent, positions, cu_seqlens, ranks, stamps, turns, T, H,
    RING: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """bonus [B,T,H] -> turns [B,T,H]; ranks, stamps [N,H,M] become those after the last token.

    One warp goes from token to token, so what counts is how long a token keeps the next one waiting: BLOCK tokens are
    loaded while those before them are worked on, nothing is stored between them, and a token's slot takes two
    reductions of integers: the least rank, and the first slot that has it."""
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    m, i = tl.arange(0, BM), tl.arange(0, BLOCK)
    if PACKED:
        begin, end = tl.load(cu_seqlens + n).to(tl.int64), tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        begin, end = n * T, n * T + T
    memory = (n * H + h) * M + m
    rank = tl.load(ranks + memory, mask=m < M, other=0.0)
    stamp = tl.load(stamps + memory, mask=m < M, other=0)
    kept = tl.ceil(tl.load(recent + h).to(tl.float32)).to(tl.int32)
    # position from which on the slot's token may go: an empty slot at once, a sink and a slot off the ring never
    due = tl.where(rank == float("-inf"), -0x80000000, stamp + kept)
    evicted = (m >= SINKS) & (m < RING)
    due = tl.where(evicted, due, 0x7FFFFFFF)
    key = ordered(rank)
    position, made = load_tokens(bonus, positions, begin + i, end, h, H)
    for t in range(begin, end, BLOCK):
        following = load_tokens(bonus, positions, t + BLOCK + i, end, h, H)
        taken = tl.zeros([BLOCK], tl.int32)
        here, new = pick(position, i == 0), pick(made, i == 0)
        for j in range(BLOCK):
            next_here, next_new = pick(position, i == j + 1), pick(made, i == j + 1)
            free = tl.where(here >= due, key, 0x7F800000)  # the order of infinity
            slot = tl.min(tl.where(free == tl.min(free, axis=0), m, BM), axis=0)
            slot = tl.where(here < SINKS, here, slot)  # -1 for padding: no slot
            key = tl.where(m == slot, new, key)
            due = tl.where((m == slot) & evicted, here + kept, due)
            stamp = tl.where(m == slot, here, stamp)
            taken = tl.where(i == j, slot, taken)
            here, new = next_here, next_new
        tl.store(turns + (t + i) * H + h, tl.maximum(taken, 0), mask=t + i < end)
        position, made = following
    tl.store(ranks + memory, restored(key), mask=m < M)
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
        BM=max(32, triton.next_power_of_2(rank.shape[-1])), BLOCK=32, num_warps=1, num_stages=1,
    )  # fmt: skip
    return turns
