"""Gated Slot Attention as the paper writes it: one token after the other (arXiv 2409.07146, eq. 7-9).

The specification that every other implementation is tested against, in any float dtype, and the decode step of the
PyTorch path. Shape legend: spec.py.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .spec import GSASpec, SlotState, read_weights


def step(
    state: SlotState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    write: Tensor,
    spec: GSASpec,
    scale: float,
    q_sink: Tensor | None = None,
) -> tuple[Tensor, SlotState]:
    """One token. q [N,H,G,D], k [N,H,D], v [N,H,E], forget and write [N,H,M] -> o [N,H,G,E], the state after it.

        K_t = alpha_t K_{t-1} + s_t k_t      V_t = alpha_t V_{t-1} + s_t v_t      z_t = alpha_t z_{t-1} + s_t
        o_t = V_t^T softmax(scale K_t q_t)   (read as K/z, V/z with weight z when spec.occupancy)
    """  # fmt: skip
    K, V, z = state[:3]
    # alpha K + s k with alpha = 1 - forget, grouped so that a slow decay is not lost in rounding alpha to 1
    K = K + (write[..., None] * k[..., None, :] - forget[..., None] * K)
    V = V + (write[..., None] * v[..., None, :] - forget[..., None] * V)
    z = z + (write - forget * z)
    logits = scale * torch.einsum("nhgd,nhmd->nhgm", q, K)
    if q_sink is not None:
        sink_logits = scale * torch.einsum("nhgd,nhmd->nhgm", q_sink, K[:, :, : spec.sinks])
        logits = torch.cat([sink_logits, logits[..., spec.sinks :]], dim=-1)
    p = read_weights(logits, z[:, :, None] if spec.occupancy else None)
    return torch.einsum("nhgm,nhme->nhge", p, V), state._replace(keys=K, values=V, occupancy=z)


def recurrence(
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
    """`step` over time. q [B,T,H,G,D], k [B,T,H,D], v [B,T,H,E], forget and write [B,T,H,M], positions [B,T]; state of
    N = B rows, or of the N documents of cu_seqlens [N+1] with B = 1.

    Returns o [B,T,H,G,E], zero at padding, and the final state (its counts are left to the caller).
    """  # fmt: skip
    if cu_seqlens is not None:
        bounds, outputs, states = cu_seqlens.tolist(), [], []
        for n, (begin, end) in enumerate(pairwise(bounds)):
            document = [None if x is None else x[:, begin:end] for x in (q, k, v, forget, write, positions, q_sink)]
            one = SlotState(*(x[n : n + 1] for x in state))
            o, one = recurrence(*document[:6], one, spec, scale, document[6])
            outputs.append(o)
            states.append(one)
        return torch.cat(outputs, dim=1), SlotState(*(torch.cat(x) for x in zip(*states, strict=True)))
    outputs = [q.new_zeros(*q.shape[:1], 0, *q.shape[2:4], v.shape[-1])]
    for t in range(q.shape[1]):
        sink = None if q_sink is None else q_sink[:, t]
        o, state = step(state, q[:, t], k[:, t], v[:, t], forget[:, t], write[:, t], spec, scale, sink)
        outputs.append((o * (positions[:, t] >= 0)[:, None, None, None])[:, None])
    return torch.cat(outputs, dim=1), state
