"""Triton decode: one token of every sequence in one launch, the memory read and written once.

A program is one sequence and kv head: its query heads share the memory's one trip through the chip. Float32 throughout.

Shape legend: spec.py; N sequences.
"""

import triton
import triton.language as tl

from .functions import expm1
from .gates import load_gates, ring_turn
from .tile import inverse_and_log, read
from .turns import least


@triton.jit
def step_kernel(
    q, q_sink, k, v, gate, s, write, keep, bonus, recent, positions, keys, values, occupancy, position, ranks, stamps,
    o, H, scale, rate, q_b, q_h, k_b, k_h, v_b, v_h,
    FORM: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr, SILU: tl.constexpr,
    HAS_S: tl.constexpr, HAS_SINK: tl.constexpr, HAS_BONUS: tl.constexpr, TOGETHER: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """keys [N,H,M,D], values [N,H,M,E], occupancy [N,H,M] (bfloat16 or float32), position [N], and with bonus [N,H] and
    recent [H] (evict.py) ranks and stamps [N,H,M], become those after the token; o [N,1,H*G,E].
    positions [N]: the token's; -1 is padding, which changes nothing and reads 0. TOGETHER: the heads' logits and reads
    are products of tiles and not sums of each head's own, for each of which all warps would have to meet; they are
    made by BLOCK features at a time, so that tiles take little of a block's shared memory."""
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    m, d, e = tl.arange(0, M), tl.arange(0, BD), tl.arange(0, BE)
    slots = (n * H + h) * M + m
    key_at, in_keys = places(slots, d, D)
    value_at, in_values = places(slots, e, E)
    # what is read is asked for before anything waits: one trip to memory, not one after the other. Of values that would
    # not fit into the registers beside the keys other programs hide the way.
    EARLY: tl.constexpr = M * BE <= 4096
    here = tl.load(positions + n).to(tl.int64)
    g, b = tl.arange(0, 16), tl.arange(0, BLOCK)
    if TOGETHER:
        parts = ()
        for i in tl.static_range(BD // BLOCK):
            at, inside = places(slots, i * BLOCK + b, D)
            parts += (tl.load(keys + at, mask=inside, other=0.0).to(tl.float32),)
    else:
        K = tl.load(keys + key_at, mask=in_keys, other=0.0).to(tl.float32)
        if EARLY:
            V = tl.load(values + value_at, mask=in_values, other=0.0).to(tl.float32)
        new_key = tl.load(k + n * k_b + h * k_h + d, mask=d < D, other=0.0).to(tl.float32)
        new_value = tl.load(v + n * v_b + h * v_h + e, mask=e < E, other=0.0).to(tl.float32)
        queries, far = (), ()
        for i in tl.static_range(G):
            head = (h * G + i) * q_h + n * q_b + d
            queries += (tl.load(q + head, mask=d < D, other=0.0).to(tl.float32),)
            if HAS_SINK:
                far += (tl.load(q_sink + head, mask=d < D, other=0.0).to(tl.float32),)
    if OCCUPANCY:
        z = tl.load(occupancy + slots).to(tl.float32)
    turn = here.to(tl.int32)
    if HAS_BONUS:
        rank, stamp = tl.load(ranks + slots), tl.load(stamps + slots)
        slot = least(rank, stamp, turn, tl.load(recent + h), m, RING, SINKS)
        taken = (m == slot) & (turn >= 0)
        tl.store(ranks + slots, tl.where(taken, turn.to(tl.float32) + tl.load(bonus + n * H + h).to(tl.float32), rank))
        tl.store(stamps + slots, tl.where(taken, turn, stamp))
        turn = slot
    elif RING:
        turn = ring_turn(turn, RING, SINKS)
    if h == 0:
        tl.store(position + n, tl.maximum(tl.load(position + n), here + 1))
    log_alpha, weight, _x = load_gates(
        gate, s, write, keep, (tl.zeros([1], tl.int64) + here).to(tl.int32), tl.zeros([1], tl.int32) + turn, n, 1, h,
        H, rate, m, FORM, RING, HAS_S, 1, M,
    )  # fmt: skip
    forget = tl.reshape(-expm1(log_alpha), [M])
    weight = tl.reshape(weight, [M])

    if OCCUPANCY:
        z += weight - forget * z
        tl.store(occupancy + slots, z.to(occupancy.dtype.element_ty))
        inverse, log_z = inverse_and_log(z)
    else:
        inverse, log_z = 1.0, 0.0
    if TOGETHER:
        logits, far_logits = tl.zeros([M, 16], tl.float32), tl.zeros([M, 16], tl.float32)
        for i in tl.static_range(BD // BLOCK):
            f = i * BLOCK + b
            new = tl.load(k + n * k_b + h * k_h + f, mask=f < D, other=0.0).to(tl.float32)
            K = moved(parts[i], activated(new, SILU), weight, forget)
            at, inside = places(slots, f, D)
            tl.store(keys + at, K.to(keys.dtype.element_ty), mask=inside)
            head, in_heads = n * q_b + (h * G + g)[None, :] * q_h + f[:, None], (g < G)[None, :] & (f < D)[:, None]
            queries = tl.load(q + head, mask=in_heads, other=0.0).to(tl.float32)
            logits = tl.dot(K, activated(queries, SILU), logits, input_precision="tf32x3")
            if HAS_SINK:
                far = tl.load(q_sink + head, mask=in_heads, other=0.0).to(tl.float32)
                far_logits = tl.dot(K, activated(far, SILU), far_logits, input_precision="tf32x3")
        if HAS_SINK:
            logits = tl.where((m < SINKS)[:, None], far_logits, logits)
        weights = read(tl.trans(logits), inverse, log_z, scale) * inverse  # [16,M]
        for i in tl.static_range(BE // BLOCK):
            f = i * BLOCK + b
            at, inside = places(slots, f, E)
            new = tl.load(v + n * v_b + h * v_h + f, mask=f < E, other=0.0).to(tl.float32)
            V = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
            V = moved(V, activated(new, SILU), weight, forget)
            tl.store(values + at, V.to(values.dtype.element_ty), mask=inside)
            y = tl.where(here >= 0, tl.dot(weights, V, input_precision="tf32x3"), 0.0)
            at, inside = ((n * H + h) * G + g)[:, None] * E + f[None, :], (g < G)[:, None] & (f < E)[None, :]
            tl.store(o + at, y.to(o.dtype.element_ty), mask=inside)
    else:
        K = moved(K, activated(new_key, SILU), weight, forget)
        tl.store(keys + key_at, K.to(keys.dtype.element_ty), mask=in_keys)
        weights = ()
        for i in tl.static_range(G):
            logits = tl.sum(K * activated(queries[i], SILU)[None, :], axis=1)
            if HAS_SINK:
                logits = tl.where(m < SINKS, tl.sum(K * activated(far[i], SILU)[None, :], axis=1), logits)
            weights += (read(logits, inverse, log_z, scale) * inverse,)
        if not EARLY:
            V = tl.load(values + value_at, mask=in_values, other=0.0).to(tl.float32)
        V = moved(V, activated(new_value, SILU), weight, forget)
        tl.store(values + value_at, V.to(values.dtype.element_ty), mask=in_values)
        for i in tl.static_range(G):
            y = tl.where(here >= 0, tl.sum(V * weights[i][:, None], axis=0), 0.0)
            tl.store(o + ((n * H + h) * G + i) * E + e, y.to(o.dtype.element_ty), mask=e < E)


@triton.jit
def places(rows, features, SIZE: tl.constexpr):
    """Where features [F] of rows [R] of SIZE numbers lie, [R,F], and which of them there are, [1,F]."""
    return rows[:, None] * SIZE + features[None, :], (features < SIZE)[None, :]


@triton.jit
def moved(S, x, weight, forget):
    """Memory [M,BD] after a token has written x [BD]."""
    return S + weight[:, None] * x[None, :] - forget[:, None] * S


@triton.jit
def activated(x, SILU: tl.constexpr):
    """The feature map of spec.py."""
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    return x
