"""Two rings in one memory: which slot a token takes when a router sends some tokens to the long slots.

A token with route > 0 takes the next turn of the long slots, every other token the next of the ring, and each ring
counts its own tokens. So a slot is still overwritten by one token and touched by no other, but a long slot lasts until
as many more tokens are routed as there are long slots. Which token goes where is a hard choice, for which the gradient
of route is a straight-through estimate: what the loss would change if the token moved a little from the slot it took to
the one it would have taken in the other ring, times the slope of a sigmoid.

Shape legend: spec.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .documents import document_of, remembered
from .spec import GSASpec


class Turns(NamedTuple):
    """turn, other [B,T,H] int32: the slot on turn, and that of the other ring; chosen [B,T,H] bool: routed to the long
    slots; routed [N,H] int64: SlotState.routed after the tokens."""

    turn: Tensor
    other: Tensor
    chosen: Tensor
    routed: Tensor


def turns(
    route: Tensor, positions: Tensor, before: Tensor, cu_seqlens: Tensor | None, spec: GSASpec, slots: int
) -> Turns:
    """Turns of tokens at `positions` [B,T] with route [B,T,H], after `before` [N,H] that were routed already.

    Padding takes no turn, and the first spec.sinks tokens of a document become sinks whatever their route is.
    """
    chosen = (route > 0) & (positions >= spec.sinks)[..., None]
    count = chosen.cumsum(1)  # with the token itself
    if cu_seqlens is None:
        earlier, total = before[:, None], before + count[:, -1]
    else:
        count = torch.nn.functional.pad(count[0], (0, 0, 1, 0))  # [T+1,H]: of the tokens before each
        document = remembered(document_of, cu_seqlens, route.shape[1])
        earlier, total = (before - count[cu_seqlens[:-1]])[document][None], before + count[cu_seqlens].diff(dim=0)
        count = count[1:][None]
    routed = earlier + count - chosen.long()
    ring = spec.turn((positions[..., None] - routed).clamp(min=0))
    long = spec.ring + routed % (slots - spec.ring)
    turn, other = torch.where(chosen, long, ring), torch.where(chosen, ring, long)
    return Turns(turn.int(), other.int(), chosen, total)


class StraightThrough(torch.autograd.Function):
    """The gate logits as they are, with a gradient for `route` (see above; spec.gate "linear", as if write - keep were
    1). gate [B,T,H,M], route, turn, other, chosen [B,T,H], positions [B,T]; damping and sinks of the spec."""

    @staticmethod
    def forward(ctx, gate, route, turn, other, chosen, positions, damping: float, sinks: int):
        ctx.save_for_backward(route, turn, other, chosen, positions)
        ctx.damping, ctx.sinks = damping, sinks
        return gate.view_as(gate)

    @staticmethod
    def backward(ctx, grad):
        route, turn, other, chosen, positions = ctx.saved_tensors
        at = torch.stack([turn, other], dim=-1).long()
        taken, left = grad.gather(-1, at).to(torch.promote_types(grad.dtype, torch.float32)).unbind(-1)
        soft = torch.sigmoid(route.to(taken.dtype))
        towards_long = torch.where(chosen, taken - left, left - taken)
        free = (positions >= ctx.sinks)[..., None]
        d_route = torch.where(free, ctx.damping * towards_long * soft * (1 - soft), 0.0)
        return grad, d_route.to(route.dtype), *(6 * [None])
