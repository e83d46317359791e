"""Which slot a token takes where a memory evicts by score: that of the token which counts as the oldest.

A token counts as `bonus` tokens younger than it is, so its rank is position + bonus, made once and for all when it is
written. A new token takes an empty slot if there is one, else that of the least rank among the tokens with `recent` or
more tokens after them; sinks stay. So a head keeps its last `recent` tokens in any case, and what it holds beyond them
are those with the best marks, where an older token needs a better one. With a bonus of 0 everywhere this is the clock.

Which slot makes room is a choice without a gradient. It depends on bonus and positions only, so it is worked out ahead
of the attention, and both kernels take it as they take the clock's turns.

Shape legend: spec.py.
"""

import numpy as np
import torch
from torch import Tensor


@torch.library.custom_op("t2r::gsa_evict", mutates_args=())
def evict(
    bonus: Tensor, recent: Tensor, positions: Tensor, cu_seqlens: Tensor | None, rank: Tensor, stamp: Tensor,
    ring: int, sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Slot [B,T,H] int32 that each token takes, and SlotState.rank and .stamp [N,H,M] after the last.

    bonus [B,T,H], in tokens; recent [H], a whole number from 1 to ring - sinks; positions [B,T], -1 is padding: it
    takes no slot (what is returned for it is one of them). cu_seqlens [N+1]: packed documents, then B = 1.
    """
    rank, stamp = rank.clone(), stamp.clone()
    if bonus.is_cuda:
        from .turns import launch

        return launch(bonus, recent, positions, cu_seqlens, rank, stamp, ring, sinks), rank, stamp
    return one_by_one(bonus, recent, positions, cu_seqlens, rank, stamp, ring, sinks), rank, stamp


@evict.register_fake
def _(bonus, recent, positions, cu_seqlens, rank, stamp, ring, sinks):
    turn = torch.empty(bonus.shape, device=bonus.device, dtype=torch.int32)
    return turn, torch.empty_like(rank), torch.empty_like(stamp)


def one_by_one(
    bonus: Tensor, recent: Tensor, positions: Tensor, cu_seqlens: Tensor | None, rank: Tensor, stamp: Tensor,
    ring: int, sinks: int,
) -> Tensor:  # fmt: skip
    """`evict` on the CPU, where numpy's small operations cost a fraction of torch's: token after token, all documents
    and heads at once. rank and stamp change in place."""
    B, T, H = bonus.shape
    turn = torch.zeros(B * T, H, dtype=torch.int32)
    begin = np.arange(B) * T if cu_seqlens is None else cu_seqlens[:-1].numpy()
    count = np.full(B, T) if cu_seqlens is None else cu_seqlens.diff().numpy()
    marks, where, turns = bonus.float().numpy().reshape(-1, H), positions.numpy().reshape(-1), turn.numpy()
    ranks, stamps, least = rank.numpy(), stamp.numpy(), recent.float().numpy()[:, None]
    for t in range(count.max(initial=0)):
        n = np.flatnonzero((t < count) & (where[np.minimum(begin + t, B * T - 1)] >= 0))  # documents with a token here
        at = begin[n] + t
        position = where[at].astype(np.int32)
        held, age = ranks[n], position[:, None, None] - stamps[n]
        held = np.where((age >= least) | np.isneginf(held), held, np.inf)
        held[..., :sinks] = held[..., ring:] = np.inf
        slot = np.where((position < sinks)[:, None], position[:, None], held.argmin(-1))
        turns[at] = slot
        here = n[:, None], np.arange(H), slot
        ranks[here] = position[:, None].astype(np.float32) + marks[at]
        stamps[here] = position[:, None]
    return turn.view(B, T, H)
