"""The one door to Gated Slot Attention: arguments checked, positions and documents worked out, implementation chosen.

Shape legend: spec.py.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from .chunked import chunked
from .documents import count_positions, document_count, end_positions
from .evict import evict
from .reference import recurrence
from .spec import GSASpec, SlotState, gates

Backend = Literal["auto", "triton", "torch", "reference"]


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    spec: GSASpec,
    scale: float,
    write: Tensor | None = None,
    keep: Tensor | None = None,
    s: Tensor | None = None,
    q_sink: Tensor | None = None,
    bonus: Tensor | None = None,
    recent: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: SlotState | None = None,
    output_final_state: bool = False,
    overwrite_state: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, SlotState | None]:
    """Gated Slot Attention (arXiv 2409.07146, eq. 7-9), differentiable in every float argument.

    q [B,T,H*G,D], k [B,T,H,D], v [B,T,H,E]; query head h*G + g reads kv head h. The memory exists per kv head only.
    gate [B,T,H,M]: raw logits W x in any float dtype, or float32 log alpha (spec.gate "log_alpha").
    write, keep [H,M]: the clock's gate biases (spec.gate tells how they enter), required with spec.ring. They are added
        here in float32: adding them to bfloat16 logits beforehand would round W x away.
    s [B,T,H,M]: write weights of their own instead of 1 - alpha.
    q_sink like q: the query that reads the spec.sinks first slots (far sinks), default q.
    bonus [B,T,H], recent [H]: evict by score (evict.py) in place of the oldest: each token counts as `bonus` tokens
        younger than it is, and the last `recent` tokens stay. Neither has a gradient. Needs a clock.
    positions [B,T] int: position of each token in its document; -1 is padding: it neither writes nor forgets, the clock
        stands and its output is 0. Default: counted from the state's position.
    cu_seqlens [N+1] int: B = 1 and row 0 holds N documents, tokens cu_seqlens[n] to cu_seqlens[n+1], each with a memory
        of its own. Otherwise N = B.
    initial_state, and the returned state if output_final_state: SlotState of N documents. The occupancy moves only with
        spec.occupancy. With overwrite_state a single token may write the new state into initial_state's own tensors
        (without gradients only).
    backend: "triton" the fused kernels, ValueError where they do not take the input; "torch" the chunked form;
        "reference" the recurrence; "auto" the kernels for CUDA tensors that they take, else torch.

    Returns o [B,T,H*G,E] in v's dtype and the final state or None. Computed in float32 (float64 for float64 inputs).
    Raises ValueError when shapes or options do not fit together.
    """
    check(q, k, v, gate, spec, write, keep, s, q_sink, bonus, recent, positions, cu_seqlens, initial_state)
    (B, T, HQ, D), (H, M), E = q.shape, gate.shape[2:], v.shape[-1]
    backend = choose_backend(backend, q, k, v, gate, spec, s)
    dtype = torch.promote_types(q.dtype, torch.float32)
    N = document_count(B, cu_seqlens)
    state = initial_state
    step = backend == "triton" and T == 1 and cu_seqlens is None and output_final_state and not torch.is_grad_enabled()
    counted = backend != "triton" or spec.ring or output_final_state
    if state is None and counted:
        state = SlotState.empty(N, H, M, D, E, q.device, dtype, ranked=bonus is not None)
    if positions is None and counted and not step:
        positions = count_positions(state.position, B, T, cu_seqlens)
    if step:
        from .fused import fused_step

        in_place = overwrite_state and initial_state is not None
        return fused_step(q, k, v, gate, s, write, keep, q_sink, bonus, recent, positions, state, spec, scale, in_place)
    final_position = end_positions(state.position, positions, cu_seqlens) if output_final_state else None
    turn, ranks = None, () if state is None else state[4:]
    if bonus is not None:
        turn, *ranks = evict(bonus.detach(), recent.detach(), positions, cu_seqlens, *ranks, spec.ring, spec.sinks)
    if backend == "triton":
        from .fused import fused

        positions = None if positions is None else positions.contiguous()
        args = (q, k, v, gate, s, write, keep, q_sink, turn, positions, cu_seqlens, initial_state)
        o, final = fused(*args, spec, scale, output_final_state)
        final = final if final is None else SlotState(*final, final_position, *ranks)
    else:
        forget, write_weight = gates(
            gate.to(dtype) if dtype == torch.float64 else gate, positions, spec, write, keep, s, turn
        )
        activation = silu if spec.feature_map == "silu" else lambda x: x
        queries = [None if x is None else activation(x.to(dtype)).unflatten(2, (H, HQ // H)) for x in (q, q_sink)]
        k_in, v_in = (activation(x.to(dtype)) for x in (k, v))
        run = recurrence if backend == "reference" or (T == 1 and cu_seqlens is None) else chunked
        o, final = run(
            queries[0],
            k_in,
            v_in,
            forget,
            write_weight,
            positions,
            state,
            spec,
            scale,
            queries[1],
            cu_seqlens=cu_seqlens,
        )
        o, final = o.flatten(2, 3).to(v.dtype), SlotState(*final[:3], final_position, *ranks)
    if output_final_state and not spec.occupancy:
        final = final._replace(occupancy=state.occupancy)
    return o, final if output_final_state else None


def choose_backend(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, spec: GSASpec, s: Tensor | None
) -> str:
    """The implementation that runs. Raises ValueError if the kernels were asked for and do not take the input."""
    if backend in ("torch", "reference"):
        return backend
    if backend == "auto" and not q.is_cuda:
        return "torch"
    try:
        from .fused import refusal
    except ImportError:
        reason = "anything: the triton package is not installed"
    else:
        reason = refusal(q, k, v, gate, spec.occupancy, s)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "torch"
    raise ValueError(f"the Triton kernels do not take {reason}; backend='torch' does")


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    backend: Backend = "auto",
    **kwargs,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """`gsa` behind the signature of flash-linear-attention 0.6.0's `chunk_gsa`, for code written against it.

    q [B,T,HQ,D], k [B,T,H,D], v [B,T,H,E], write weights s [B,T,H,M], log decay g [B,T,H,M]; g = None is ABC (paper
    section 2.2): s are logits, written with exp(s_t) / sum_{i<=t} exp(s_i). scale defaults to D ** -0.5. States are
    (keys [N,H,D,M], values [N,H,M,E]) float32 per kv head, as the peer's; either of the initial ones may be None.
    checkpoint_level, cu_seqlens_cpu and chunk_size are accepted and change no result: memory use is fixed by the
    implementation. backend as in `gsa`.

    Returns o [B,T,HQ,E] and (keys, values), or (None, None) without output_final_state.
    """
    unknown = set(kwargs) - {"chunk_size"}
    if unknown:
        raise TypeError(f"chunk_gsa got unknown arguments {sorted(unknown)}")
    if g is None:
        g, s = abc_gates(s, cu_seqlens)
    state = None
    if initial_state is not None:
        N = document_count(q.shape[0], cu_seqlens)
        dtype = torch.promote_types(q.dtype, torch.float32)
        state = SlotState.empty(N, k.shape[2], s.shape[-1], k.shape[-1], v.shape[-1], q.device, dtype)
        keys, values = initial_state
        state = state._replace(
            keys=state.keys if keys is None else keys.to(dtype).mT,
            values=state.values if values is None else values.to(dtype),
        )
    o, final = gsa(
        q,
        k,
        v,
        g,
        s=s,
        spec=GSASpec(gate="log_alpha"),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        cu_seqlens=cu_seqlens,
        initial_state=state,
        output_final_state=output_final_state,
        backend=backend,
    )
    return o, (None, None) if final is None else (final.keys.mT.contiguous(), final.values)


def abc_gates(s: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """ABC's write logits s [B,T,H,M] -> (log decay, write weight): a softmax over the tokens read so far."""
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    bounds = [0, s.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    log_decay, weight = [], []
    for begin, end in pairwise(bounds):
        part = s[:, begin:end]
        total = torch.logcumsumexp(part, dim=1)
        log_decay.append(torch.cat([total[:, :1], total[:, :-1]], dim=1) - total)
        weight.append(torch.exp(part - total))
    return torch.cat(log_decay, dim=1), torch.cat(weight, dim=1)


def check(q, k, v, gate, spec, write, keep, s, q_sink, bonus, recent, positions, cu_seqlens, state) -> None:
    """Raise ValueError with the offending argument unless everything fits together."""

    def expect(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")

    B, T, HQ, D = q.shape
    H, M, E = k.shape[2], gate.shape[-1], v.shape[-1]
    if HQ % H:
        raise ValueError(f"{HQ} query heads cannot share {H} kv heads evenly")
    N = document_count(B, cu_seqlens)
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens needs one packed row (B = 1), got B = {B}")
    if T == 0:
        raise ValueError("q holds no token (T = 0)")
    expect("k", k, (B, T, H, D))
    expect("v", v, (B, T, H, E))
    expect("gate", gate, (B, T, H, M))
    expect("s", s, (B, T, H, M))
    expect("q_sink", q_sink, (B, T, HQ, D))
    expect("bonus", bonus, (B, T, H))
    expect("recent", recent, (H,))
    expect("positions", positions, (B, T))
    expect("write", write, (H, M))
    expect("keep", keep, (H, M))
    if state is not None:
        expect("initial_state.keys", state.keys, (N, H, M, D))
        expect("initial_state.values", state.values, (N, H, M, E))
        expect("initial_state.occupancy", state.occupancy, (N, H, M))
        expect("initial_state.position", state.position, (N,))
        ranked = (N, H, 0 if bonus is None else M)
        expect("initial_state.rank", state.rank, ranked)
        expect("initial_state.stamp", state.stamp, ranked)
    if spec.ring > M:
        raise ValueError(f"a ring of {spec.ring} slots does not fit into {M}")
    clocked = {True} if spec.ring else {False}  # a branch: torch.compile may trace the ring as a symbol
    if {write is not None, keep is not None} != clocked:
        raise ValueError("write and keep belong to the clock: give both with spec.ring > 0 and neither without")
    if spec.ring and spec.gate == "log_alpha":
        raise ValueError("log_alpha gates come ready made: the clock (spec.ring) needs the sigmoid or linear form")
    if (bonus is None) != (recent is None):
        raise ValueError("bonus and recent belong together: they say which token makes room")
    if bonus is not None and not spec.ring:
        raise ValueError(f"bonus takes the place of the clock's turns: it needs a clock, got {spec}")
    if q_sink is not None and not spec.sinks:
        raise ValueError("q_sink is read by sink slots only, and spec.sinks is 0")
