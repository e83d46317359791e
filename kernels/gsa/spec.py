"""What a Gated Slot Attention layer computes, as data: the gate form, the clock, the read, and the recurrent state.

Shapes here and in the sibling files:
    B batch   T time   N documents (= B unless packed)   H kv heads   G query heads per kv head
    D head dim of q and k   E head dim of v   M slots   C chunk
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

GateForm = Literal["sigmoid", "linear", "log_alpha"]
FeatureMap = Literal["identity", "silu"]

# A slot whose occupancy is below this holds nothing worth dividing by: it counts as empty. 2^-100 leaves room for the
# products of the read in float32 and lies far under any write that a gate makes on purpose.
EMPTY = 2.0**-100


@dataclass(frozen=True)
class GSASpec:
    """The fixed choices of one GSA layer.

    gate: how the logits x = W h become the decay alpha and the write weight s of each slot. `bias` is `write` for the
        slot whose turn it is and `keep` for the others (zero without a clock):
            sigmoid    alpha = sigmoid(x + bias) ^ (1 / damping), s = 1 - alpha       (paper eq. 8)
            linear     s = clamp(x / damping + bias, 0, 1),       alpha = 1 - s
            log_alpha  alpha = exp(x), s = 1 - alpha or given                         (any gate made elsewhere)
        `linear` reaches 0 and 1 exactly and has slope 1 / damping up to and including both ends, so a layer can start
        as an exact ring buffer (write 1, keep 0) and still learn.
    ring: number of slots on the clock, sinks included; 0 switches the clock off. Slots from `ring` on are never on
        turn: only their gates write to them.
    sinks: the first `sinks` slots take one token each and are never on turn again.
    occupancy: carry z_t = alpha z_{t-1} + s and read each slot as what it holds, K/z and V/z with weight z. An empty
        slot is then absent from the softmax instead of taking mass with a zero key.
    feature_map: applied to q, k and v on entry.
    """

    gate: GateForm = "sigmoid"
    damping: float = 8.0
    ring: int = 0
    sinks: int = 0
    occupancy: bool = False
    feature_map: FeatureMap = "identity"

    def __post_init__(self):
        if self.ring and not 0 <= self.sinks < self.ring:
            raise ValueError(f"sinks must be in [0, ring), got sinks={self.sinks}, ring={self.ring}")
        if self.sinks and not self.ring:
            raise ValueError("sinks need a clock: set ring > sinks")
        if self.damping <= 0:
            raise ValueError(f"damping must be positive, got {self.damping}")

    def turn(self, position: Tensor) -> Tensor:
        """Slot on turn for the token that `position` others of its document came before in the ring (any integer shape,
        position >= 0; needs a clock)."""
        lap = self.ring - self.sinks
        return torch.where(position < self.ring, position, self.sinks + (position - self.ring) % lap)


class SlotState(NamedTuple):
    """Everything a layer remembers: constant in the length of the text. Float32 (float64 for float64 inputs).

    keys [N,H,M,D], values [N,H,M,E], occupancy [N,H,M], position [N] int64: tokens of each document read so far.
    Where tokens are evicted by score (evict.py), else [N,H,0]: rank [N,H,M] float32 of the token that each slot was
    given to, -inf if none was; stamp [N,H,M] int32: its position.
    """

    keys: Tensor
    values: Tensor
    occupancy: Tensor
    position: Tensor
    rank: Tensor
    stamp: Tensor

    @classmethod
    def empty(
        cls, n: int, heads: int, slots: int, dim: int, value_dim: int, device, dtype=torch.float32, ranked: bool = False
    ) -> "SlotState":
        """No token yet. ranked: tokens are evicted by score."""
        ranks = n, heads, slots if ranked else 0
        return cls(
            torch.zeros(n, heads, slots, dim, device=device, dtype=dtype),
            torch.zeros(n, heads, slots, value_dim, device=device, dtype=dtype),
            torch.zeros(n, heads, slots, device=device, dtype=dtype),
            torch.zeros(n, device=device, dtype=torch.int64),
            torch.full(ranks, -torch.inf, device=device),
            torch.zeros(ranks, device=device, dtype=torch.int32),
        )


def gates(
    x: Tensor,
    positions: Tensor,
    spec: GSASpec,
    write: Tensor | None,
    keep: Tensor | None,
    s: Tensor | None,
    turn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gate logits x [B,T,H,M] -> (forget, write weight), both [B,T,H,M] in float32 (float64 for float64 inputs).

    turn [B,T,H]: the slot on turn (evict.py); None: by position.
    forget = 1 - alpha is what is kept everywhere in place of alpha: it has full precision where memory is long
    (1 - 1e-8 is 1.0 in float32, so a slow slot would never forget), and 0 means kept exactly.
    A token at position -1 is padding: it neither forgets nor writes.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if spec.ring:
        slots = torch.arange(x.shape[-1], device=x.device)
        on_turn = (spec.turn(positions)[:, :, None] if turn is None else turn)[..., None] == slots
        x_bias = torch.where(on_turn, write.to(x.dtype), keep.to(x.dtype))
    else:
        x_bias = 0.0
    if spec.gate == "sigmoid":
        forget = -torch.expm1(torch.nn.functional.logsigmoid(x + x_bias) / spec.damping)
    elif spec.gate == "linear":
        forget = torch.clamp(x / spec.damping + x_bias, 0.0, 1.0)
    else:
        forget = -torch.expm1(x)
    real = (positions >= 0)[:, :, None, None]
    forget = torch.where(real, forget, 0.0)
    return forget, (forget if s is None else torch.where(real, s.to(x.dtype), 0.0))


def read_weights(logits: Tensor, occupancy: Tensor | None) -> Tensor:
    """Softmax over slots. logits [...,M]: scale * q.K; occupancy [...,M] or None -> weights on the slot values V.

    With occupancy the read is p_m = softmax(q.K_m / z_m + log z_m) on V_m / z_m; empty slots have weight and gradient
    zero, and so has the whole row where all are empty.
    """
    if occupancy is None:
        return torch.softmax(logits, dim=-1)
    present = occupancy > EMPTY
    z = torch.where(present, occupancy, 1.0)
    logits = torch.where(present, logits / z + torch.log(z), torch.finfo(logits.dtype).min)
    return torch.where(present, torch.softmax(logits, dim=-1) / z, 0.0)
