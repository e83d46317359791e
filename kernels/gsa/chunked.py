"""Gated Slot Attention by chunks of 64 tokens, in plain PyTorch: the CPU training path and the fallback without Triton.

Between chunks the state is a scan of elementwise updates; inside a chunk a token reads what every earlier token of the
chunk wrote, decayed on the way:

    K_i = prefix_i K_0 + sum_{j <= i} (alpha_{j+1} ... alpha_i) s_j k_j          (and V, z alike)

The usual way factors the decay as e^{G_i} e^{-G_j}, which overflows as soon as gates are hard. Here pairs are split by
halves instead: for blocks of 2h tokens (h = 1, 2, 4 ... 32), rows in the second half meet columns in the first, and

    alpha_{j+1} ... alpha_i = (alpha_{j+1} ... alpha_mid) (alpha_{mid+1} ... alpha_i) = col_j row_i

Every pair j < i meets in exactly one block, every factor is in [0, 1], so no gate value overflows and alpha = 0 is as
exact as alpha = 1; and everything is a matrix product. Gradients are autograd's; a segment is recomputed in backward.

Shape legend: spec.py; n = chunks, F = D + E + 1 (keys, values and occupancy of a slot side by side).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from .documents import deal_documents, remembered
from .spec import GSASpec, SlotState, read_weights

CHUNK = 64
# Tokens per row that are in flight at once: bounds memory in inference and is the unit of recomputation in training.
SEGMENT = 2048


class Decay(NamedTuple):
    """Products of alpha inside one chunk, [...,C,M]. levels: for h = 1, 2, 4 ... C/2 (row, col) as in the module text,
    each [..., C/2h, h, M]; prefix: from the chunk's start up to and with a token; suffix: after a token to the end."""

    levels: list[tuple[Tensor, Tensor]]
    prefix: Tensor
    suffix: Tensor


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """[..., C, M] -> first and second halves of its blocks of 2h tokens, each a view [..., C/2h, h, M]."""
    blocks = x.unflatten(-2, (-1, 2, h))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def decays(forget: Tensor) -> Decay:
    """forget = 1 - alpha [...,C,M] -> Decay. Slow gates multiply as sums of logs, so that 1 - 1e-9 keeps its meaning;
    fast ones (alpha <= 1/2) as plain products, so that alpha = 0 needs no log."""
    slow = forget < 0.5
    log_prefix = torch.log1p(-torch.where(slow, forget, 0.0))
    prefix = torch.where(slow, 1.0, 1.0 - forget)
    log_suffix, suffix = torch.zeros_like(log_prefix), torch.ones_like(prefix)
    levels, h = [], 1
    while h < forget.shape[-2]:
        (gp1, gp2), (p1, p2) = halves(log_prefix, h), halves(prefix, h)
        (gs1, gs2), (s1, s2) = halves(log_suffix, h), halves(suffix, h)
        levels.append((gp2.exp() * p2, gs1.exp() * s1))
        log_prefix = torch.stack([gp1, gp2 + gp1[..., -1:, :]], dim=-3).flatten(-4, -2)
        prefix = torch.stack([p1, p2 * p1[..., -1:, :]], dim=-3).flatten(-4, -2)
        log_suffix = torch.stack([gs1 + gp2[..., -1:, :], gs2], dim=-3).flatten(-4, -2)
        suffix = torch.stack([s1 * p2[..., -1:, :], s2], dim=-3).flatten(-4, -2)
        h *= 2
    return Decay(levels, log_prefix.exp() * prefix, log_suffix.exp() * suffix)


def second_half(x: Tensor, h: int) -> Tensor:
    """[..., C, G, X] -> the second halves of its blocks of 2h tokens, a view [..., C/2h, h, G, X]."""
    return x.unflatten(-3, (-1, 2, h))[..., 1, :, :, :]


def read_keys(q: Tensor, k: Tensor, s: Tensor, decay: Decay, K0: Tensor) -> Tensor:
    """q.K_i of every token with every slot: q [...,C,G,D], k [...,C,D], s [...,C,M], K0 [...,M,D] -> [...,C,G,M]."""
    G = q.shape[-2]
    logits = (q.flatten(-3, -2) @ K0.mT).unflatten(-2, (-1, G)) * decay.prefix[..., None, :]
    logits = logits + (q @ k[..., None]) * s[..., None, :]
    for level, (row, col) in enumerate(decay.levels):
        h = 2**level
        k1, s1 = halves(k, h)[0], halves(s, h)[0]
        block = (second_half(q, h).flatten(-3, -2) @ k1.mT) @ (col * s1)
        second_half(logits, h).add_(block.unflatten(-2, (h, G)) * row[..., None, :])
    return logits


def read_values(p: Tensor, v: Tensor, s: Tensor, decay: Decay, V0: Tensor) -> Tensor:
    """V_i^T p of every token: p [...,C,G,M], v [...,C,E], s [...,C,M], V0 [...,M,E] -> [...,C,G,E]."""
    G = p.shape[-2]
    o = ((p * decay.prefix[..., None, :]).flatten(-3, -2) @ V0).unflatten(-2, (-1, G))
    o = o + (p @ s[..., None]) * v[..., None, :]
    for level, (row, col) in enumerate(decay.levels):
        h = 2**level
        v1, s1 = halves(v, h)[0], halves(s, h)[0]
        weights = (second_half(p, h) * row[..., None, :]).flatten(-3, -2) @ (col * s1).mT
        second_half(o, h).add_((weights @ v1).unflatten(-2, (h, G)))
    return o


def occupancy(s: Tensor, decay: Decay, z0: Tensor) -> Tensor:
    """z_i of every token: s [...,C,M], z0 [...,M] -> [...,C,M]."""
    z = decay.prefix * z0[..., None, :] + s
    for level, (row, col) in enumerate(decay.levels):
        h = 2**level
        first = (col * halves(s, h)[0]).sum(-2, keepdim=True)
        halves(z, h)[1].add_(row * first)
    return z


def segment(
    carry: Tensor,
    initial: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    write: Tensor,
    q_sink: Tensor | None,
    starts: Tensor | None,
    spec: GSASpec,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Some whole chunks of all rows. carry [B,H,M,F]: memory before them; initial [N,H,M,F]; starts [B,n] on the CPU:
    the document that begins with a chunk, or -1; None if none does. Other shapes as `chunked`.

    Returns o [B,T,H,G,E] and the memory after each chunk [B,n,H,M,F].
    """
    q, k, v, forget, write, q_sink = (
        None if x is None else x.unflatten(1, (-1, CHUNK)).transpose(2, 3) for x in (q, k, v, forget, write, q_sink)
    )
    decay = decays(forget)
    written = torch.cat([k, v, torch.ones_like(k[..., :1])], dim=-1)
    gained = (decay.suffix * write).mT @ written
    kept = decay.prefix[..., -1, :, None]
    before, after = [], []
    for n in range(kept.shape[1]):
        if starts is not None and (starts[:, n] >= 0).any():
            document = starts[:, n].to(carry.device)
            carry = torch.where(document[:, None, None, None] >= 0, initial[document.clamp(min=0)], carry)
        before.append(carry)
        carry = kept[:, n] * carry + gained[:, n]
        after.append(carry)
    K0, V0, z0 = torch.stack(before, dim=1).split([k.shape[-1], v.shape[-1], 1], dim=-1)

    logits = read_keys(q, k, write, decay, K0)
    if q_sink is not None:
        S = spec.sinks
        sinks = Decay([(r[..., :S], c[..., :S]) for r, c in decay.levels], decay.prefix[..., :S], decay.suffix)
        logits = torch.cat([read_keys(q_sink, k, write[..., :S], sinks, K0[..., :S, :]), logits[..., S:]], dim=-1)
    z = occupancy(write, decay, z0[..., 0])[..., None, :] if spec.occupancy else None
    o = read_values(read_weights(scale * logits, z), v, write, decay, V0)
    return o.transpose(2, 3).flatten(1, 2), torch.stack(after, dim=1)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    write: Tensor,
    positions: Tensor,
    state: SlotState,
    spec: GSASpec,
    scale: float,
    q_sink: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, SlotState]:
    """The same function as `reference.recurrence`. q [B,T,H,G,D], k [B,T,H,D], v [B,T,H,E], forget and write
    [B,T,H,M], positions [B,T]; state of N = B rows, or of the N documents of cu_seqlens [N+1] with B = 1.

    Returns o [B,T,H,G,E], zero at padding, and the final state (its counts are left to the caller).
    """  # fmt: skip
    T, D, E = q.shape[1], k.shape[-1], v.shape[-1]
    tensors = (q, k, v, forget, write, q_sink)
    initial = torch.cat([state.keys, state.values, state.occupancy[..., None]], dim=-1)
    if cu_seqlens is None:
        place, starts, carry = None, None, initial
        tensors = [None if x is None else pad(x, (0, 0) * (x.dim() - 2) + (0, -T % CHUNK)) for x in tensors]
    else:
        place, starts, ends = remembered(deal_documents, cu_seqlens, CHUNK, SEGMENT)
        lanes, length = starts.shape[0], starts.shape[1] * CHUNK
        carry = torch.zeros_like(initial[:1]).expand(lanes, -1, -1, -1)
        tensors = [
            None
            if x is None
            else x.new_zeros(lanes * length, *x.shape[2:]).index_copy(0, place, x[0]).unflatten(0, (lanes, length))
            for x in tensors
        ]
    outputs, memories = [], []
    per_segment = SEGMENT // CHUNK
    for c in range(0, tensors[0].shape[1] // CHUNK, per_segment):
        part = [None if x is None else x[:, c * CHUNK : (c + per_segment) * CHUNK] for x in tensors]
        args = (carry, initial, *part, None if starts is None else starts[:, c : c + per_segment], spec, scale)
        o, after = checkpoint(segment, *args, use_reentrant=False) if torch.is_grad_enabled() else segment(*args)
        carry = after[:, -1]
        outputs.append(o)
        memories.append(after if place is not None else after[:, -1:])
    o = torch.cat(outputs, dim=1)
    if place is None:
        o, final = o[:, :T], carry
    else:
        o = o.flatten(0, 1)[place][None]
        # a document of no tokens ends as it began
        after = torch.cat(memories, dim=1).flatten(0, 1)
        final = torch.where(ends[:, None, None, None] >= 0, after[ends.clamp(min=0)], initial)
    K, V, z = final.split([D, E, 1], dim=-1)
    return o * (positions >= 0)[:, :, None, None, None], state._replace(keys=K, values=V, occupancy=z[..., 0])
