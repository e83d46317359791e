"""The Triton kernels behind torch operators: t2r::gsa_forward and t2r::gsa_backward with autograd between them, and
t2r::gsa_step for decoding, which writes the memory in place.

Being operators, they go through torch.compile(fullgraph=True) and activation checkpointing as one node each.

Shape legend: spec.py, tile.py.
"""

import torch
from torch import Tensor

from . import backward, decode, forward, gates
from .documents import document_count
from .launch import REVERSE, Launch
from .spec import GSASpec, SlotState
from .tiles import block_memory, cdiv, find_tile, padded, shared_memory, step_form

HEAD_DIMS = (64, 80, 96, 128, 256)
SLOTS = (16, 32, 64, 128, 256)
GROUPS = range(1, 9)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, occupancy: bool, s: Tensor | None) -> str | None:
    """Why the kernels cannot take these inputs, or None if they can."""
    D, E, M, G = k.shape[-1], v.shape[-1], gate.shape[-1], q.shape[2] // k.shape[2]
    if D not in HEAD_DIMS or E not in HEAD_DIMS:
        return f"head dims {D} and {E} (kernels have {', '.join(map(str, HEAD_DIMS))})"
    if M not in SLOTS:
        return f"{M} slots (kernels have {', '.join(map(str, SLOTS))})"
    if G not in GROUPS:
        return f"{G} query heads per kv head (kernels have 1 to 8)"
    if not {q.dtype, k.dtype, v.dtype} <= set(DTYPES):
        return f"inputs of {q.dtype}"
    if occupancy and s is not None:
        return "occupancy with write weights apart from the decay"
    if find_tile(max(D, E), M, G, q.dtype, block_memory(q.device)) is None:
        return f"heads of {max(D, E)} with {M} slots in {q.dtype}, more than a block of this GPU's threads can hold"
    return None


def prepare(q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, gate: Tensor, s: Tensor | None, silu: bool) -> list:
    """Inputs as the kernels read them: after the feature map (inside, each consumer of a tile would compute it anew),
    channels contiguous, q and q_sink with the same strides, gates contiguous."""
    rows = [torch.nn.functional.silu(x) if silu and x is not None else x for x in (q, k, v, q_sink)]
    if k.dtype != v.dtype:  # one kernel reads either
        rows[1:3] = (x.to(torch.promote_types(k.dtype, v.dtype)) for x in rows[1:3])
    rows = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in rows]
    if q_sink is not None and rows[3].stride() != rows[0].stride():
        rows[0], rows[3] = rows[0].contiguous(), rows[3].contiguous()
    return [*rows, gate.contiguous(), s if s is None else s.contiguous()]


@torch.library.custom_op("t2r::gsa_forward", mutates_args=())
def gsa_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, turns: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None,
    keys: Tensor | None, values: Tensor | None, occupancy: Tensor | None,
    form: str, damping: float, ring: int, sinks: int, normalised: bool, silu: bool, scale: float, final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o and the final memory (empty tensors unless `final`). Arguments as gsa(), the spec spelled out."""
    launch = Launch(
        *prepare(q, k, v, q_sink, gate, s, silu), write, keep, turns, positions, cu_seqlens, form, damping, ring,
        sinks, normalised, scale,
    )  # fmt: skip
    end = launch.state() if final else None
    o = torch.empty(*q.shape[:3], v.shape[-1], device=q.device, dtype=v.dtype)
    launch.add({"o": o})
    launch.sides(None if keys is None else (keys, values, occupancy), end)
    launch.begin(*launch.parts)
    launch.write()
    tiles = cdiv(q.shape[2] // k.shape[2], launch.tile.heads)
    launch.run(forward.output_kernel, launch.tile.warps, tiles)
    return o, *(end or [q.new_empty(0, dtype=torch.float32) for _ in range(3)])


@gsa_forward.register_fake
def _(q, k, v, gate, s, write, keep, q_sink, turns, positions, cu_seqlens, keys, values, occupancy, form, damping, ring,
      sinks, normalised, silu, scale, final):  # fmt: skip
    o = torch.empty(*q.shape[:3], v.shape[-1], device=q.device, dtype=v.dtype)
    shape = (document_count(q.shape[0], cu_seqlens), k.shape[2], gate.shape[-1])
    shapes = ((*shape, k.shape[-1]), (*shape, v.shape[-1]), shape) if final else 3 * ((0,),)
    return o, *(torch.empty(x, device=q.device, dtype=torch.float32) for x in shapes)


@torch.library.custom_op("t2r::gsa_backward", mutates_args=())
def gsa_backward(
    do: Tensor, d_keys: Tensor | None, d_values: Tensor | None, d_occupancy: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, turns: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None,
    keys: Tensor | None, values: Tensor | None, occupancy: Tensor | None,
    form: str, damping: float, ring: int, sinks: int, normalised: bool, silu: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, gate, s, write, keep, q_sink, keys, values, occupancy; empty where there was no input."""
    launch = Launch(
        *prepare(q, k, v, q_sink, gate, s, silu), write, keep, turns, positions, cu_seqlens, form, damping, ring,
        sinks, normalised, scale, backward=True,
    )  # fmt: skip

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, device=x.device, dtype=x.dtype)

    names = ("q", "k", "v", "gate", "s", "write", "keep", "q_sink")
    grads = {f"d{name}": like(x) for name, x in zip(names, (q, k, v, gate, s, None, None, q_sink), strict=True)}
    launch.add_backward(do=do.contiguous(), **grads)
    launch.sides(None if keys is None else (keys, values, occupancy), None)
    d_begin = None if keys is None else launch.state()
    d_end = None if d_keys is None else tuple(x.contiguous() for x in (d_keys, d_values, d_occupancy))
    launch.sides(d_end, d_begin, "reverse_")
    for part in launch.parts:
        launch.begin(part)
        launch.write()
        if normalised:
            launch.run(gates.occupancy_kernel, 2, slots=launch.constants["BLOCKS"])
        launch.run(backward.inner_kernel, launch.tile.warps)
        launch.scan(REVERSE)
        launch.run(backward.outer_kernel, launch.tile.warps)
        launch.run(gates.logits_kernel, 2, slots=launch.constants["BLOCKS"])
    if ring:
        d_bias = launch.tensors["d_bias"].sum(0)
        for i, (name, x) in enumerate((("dwrite", write), ("dkeep", keep))):
            grads[name] = d_bias[:, i].to(x.dtype, copy=True)
    if silu:
        for name, x in (("dq", q), ("dk", k), ("dv", v), ("dq_sink", q_sink)):
            if x is not None:
                grads[name] = torch.ops.aten.silu_backward(grads[name], x)
    return [q.new_empty(0) if x is None else x for x in (*grads.values(), *(d_begin or 3 * (None,)))]


@gsa_backward.register_fake
def _(do, d_keys, d_values, d_occupancy, q, k, v, gate, s, write, keep, q_sink, turns, positions, cu_seqlens, keys,
      values, occupancy, *rest):  # fmt: skip
    like = (q, k, v, gate, s, write, keep, q_sink, keys, values, occupancy)
    return [torch.empty(0 if x is None else x.shape, device=q.device, dtype=q.dtype if x is None else x.dtype)
            for x in like]  # fmt: skip


INPUTS = (
    "q", "k", "v", "gate", "s", "write", "keep", "q_sink", "turns", "positions", "cu_seqlens", "keys", "values",
    "occupancy",
)  # fmt: skip
# in the order in which gsa_backward returns their gradients
DIFFERENTIABLE = [name for name in INPUTS if name not in ("turns", "positions", "cu_seqlens")]


def setup_context(ctx, inputs, output) -> None:
    *ctx.spec, ctx.final = inputs[len(INPUTS) :]
    ctx.save_for_backward(*inputs[: len(INPUTS)])
    ctx.set_materialize_grads(False)


def gradient(ctx, do, d_keys, d_values, d_occupancy):
    given = dict(zip(INPUTS, ctx.saved_tensors, strict=True))
    q, k, v = (given[name] for name in "qkv")
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    state = (None, None, None)
    if ctx.final:
        shape = (document_count(q.shape[0], given["cu_seqlens"]), k.shape[2], given["gate"].shape[-1])
        shapes = ((*shape, k.shape[-1]), (*shape, v.shape[-1]), shape)
        state = [
            q.new_zeros(x, dtype=torch.float32) if d is None else d
            for x, d in zip(shapes, (d_keys, d_values, d_occupancy), strict=True)
        ]
    grads = torch.ops.t2r.gsa_backward(do, *state, *given.values(), *ctx.spec)
    grads = dict(zip(DIFFERENTIABLE, grads, strict=True))
    return *(None if x is None else grads.get(name) for name, x in given.items()), *(len(ctx.spec) + 1) * [None]


gsa_forward.register_autograd(gradient, setup_context=setup_context)


class Direct(torch.autograd.Function):
    """gsa_forward with its gradient, where torch.compile does not look: torch itself goes through an operator's whole
    schema for every argument, which takes longer than the launches."""

    forward = staticmethod(lambda *args: gsa_forward(*args))
    setup_context = staticmethod(setup_context)
    backward = staticmethod(gradient)


@torch.library.custom_op("t2r::gsa_step", mutates_args=("keys", "values", "occupancy", "position", "rank", "stamp"))
def gsa_step(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, bonus: Tensor | None, recent: Tensor | None, positions: Tensor,
    keys: Tensor, values: Tensor, occupancy: Tensor, position: Tensor, rank: Tensor, stamp: Tensor,
    form: str, damping: float, ring: int, sinks: int, normalised: bool, silu: bool, scale: float,
) -> Tensor:  # fmt: skip
    """o [N,1,H*G,E] of one token a sequence; the memory from keys to stamp becomes that after it."""
    q, k, v, q_sink, gate, s = prepare(q, k, v, q_sink, gate, s, silu=False)
    N, _, HQ, D = q.shape
    H, M, E = k.shape[2], gate.shape[-1], v.shape[-1]
    o = torch.empty(N, 1, HQ, E, device=q.device, dtype=v.dtype)
    together, warps = step_form(max(D, E), M, HQ // H, shared_memory(q.device))
    decode.step_kernel[(N * H,)](
        q, q_sink, k, v, gate, s, write, keep, bonus, recent, positions, keys, values, occupancy, position, rank, stamp,
        o, H, scale, 1.0 / damping, q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
        FORM=form, RING=ring, SINKS=sinks, OCCUPANCY=normalised, SILU=silu, HAS_S=s is not None,
        HAS_SINK=q_sink is not None, HAS_BONUS=bonus is not None, TOGETHER=together, D=D, BD=padded(D), E=E,
        BE=padded(E), M=M, G=HQ // H, BLOCK=min(32, padded(D), padded(E)), num_warps=warps,
        # so that two programs fit on a multiprocessor: one reads, one computes
        maxnreg=128 if warps <= 8 and not together else None,
    )  # fmt: skip
    return o


@gsa_step.register_fake
def _(q, k, v, *rest):
    return torch.empty(*q.shape[:3], v.shape[-1], device=q.device, dtype=v.dtype)


def spelled(spec: GSASpec, scale: float) -> tuple:
    """The spec as the operators take it."""
    silu = spec.feature_map == "silu"
    return spec.gate, float(spec.damping), spec.ring, spec.sinks, spec.occupancy, silu, float(scale)


def fused(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, turns: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None,
    state: SlotState | None, spec: GSASpec, scale: float, final: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:  # fmt: skip
    """gsa() by the kernels: o and, if asked, the final (keys, values, occupancy)."""
    memory = (None, None, None) if state is None else tuple(x.float().contiguous() for x in state[:3])
    run = Direct.apply if torch.is_grad_enabled() and not torch.compiler.is_compiling() else gsa_forward
    o, *end = run(
        q, k, v, gate, s, write, keep, q_sink, turns, positions, cu_seqlens, *memory, *spelled(spec, scale), final
    )
    return o, tuple(end) if final else None


def fused_step(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, bonus: Tensor | None, recent: Tensor | None, positions: Tensor | None, state: SlotState,
    spec: GSASpec, scale: float, in_place: bool,
) -> tuple[Tensor, SlotState]:  # fmt: skip
    """One token of every sequence: o and the memory after it, in the state's own tensors if in_place."""
    positions = state.position.clone() if positions is None else positions.contiguous()
    memory = state if in_place else SlotState(*(x.clone() for x in state))
    bonus = bonus if bonus is None else bonus.contiguous()
    given = (q, k, v, gate, s, write, keep, q_sink, bonus, recent, positions)
    return gsa_step(*given, *memory, *spelled(spec, scale)), memory
