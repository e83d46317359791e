"""Triton forward: what each chunk adds to the memory, the scan over chunks, the output of each chunk.

    written_kernel   the gates of a chunk, what it adds to the memory, its total decay      one program a chunk and head
    scan_kernel      memory before every chunk, in place of the gains; final memory         elementwise over chunks
    output_kernel    logits, softmax over slots, output                                     one program a chunk and tile

The memory of a chunk is a [D+E,M] matrix in the inputs' type (float32 for float16): features in rows, so that every
product takes a loaded tile transposed and never a computed one. The gates of a chunk are L (cumulative log decay), its
class labels and the write weights w, chunk by chunk as the other kernels read them.

Shape legend: spec.py, tile.py; n = chunks.
"""

import triton
import triton.language as tl

from .tile import (
    add_state,
    add_tile,
    chunk_span,
    classify,
    expm1,
    inverse_and_log,
    load_gates,
    load_positions,
    load_rows,
    load_state,
    load_tile,
    meet,
    read,
    real_rows,
    row_mask,
    slot_occupancy,
    spread,
    store_rows,
    time_sum,
    to_rows,
)


@triton.jit
def written_kernel(
    k, v, gate, s, write, keep, positions, table, states, decay, occupancy, L, label, anchors, w, last,
    T, chunks_per_row, H, rate, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, FORM: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    HAS_S: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: states [n,H,D+E,M] = sum_j e^{L_end - L_j} w_j [k_j, v_j], decay [n,H,M] = L_end,
    occupancy [n,H,M] likewise if asked; the tiles L (float32), label (int8) and w [n,H,C,M], L at the first token of
    every class (anchors [n,H,C,M], by label) and the last label [n,H]."""
    pid = tl.program_id(0)
    chunk, h = pid // H, pid % H
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = row * T + begin
    columns = row_mask(count, 1, C, 1)
    position = load_positions(positions, row0, count, C, HAS_POSITIONS)
    log_alpha, weight, _ = load_gates(
        gate, s, write, keep, position, row0, count, h, H, rate, FORM, RING, SINKS, HAS_S, C, M
    )
    total, labels = tl.cumsum(log_alpha, axis=0), classify(log_alpha, FORM)
    add_tile(L, total, pid, False, C, M)
    add_tile(label, labels, pid, False, C, M)
    add_tile(w, weight, pid, False, C, M)
    classes = tl.max(tl.max(labels, axis=1), axis=0)
    tl.store(last + pid, classes)
    m = tl.arange(0, M)
    for c in range(0, classes + 1):
        anchor = tl.max(tl.where(labels == c, total, float("-inf")), axis=0)
        anchor = tl.where(anchor == float("-inf"), 0.0, anchor)  # no member: any finite number will do
        tl.store(anchors + (pid.to(tl.int64) * C + c) * M + m, anchor)
    at = pid.to(tl.int64) * M
    end = tl.sum(log_alpha, axis=0)
    tl.store(decay + at + m, end)
    if OCCUPANCY:
        tl.store(occupancy + at + m, -expm1(end))
    DTYPE = states.dtype.element_ty
    left = (tl.exp(time_sum(log_alpha, True, False, DTYPE, C)) * weight).to(DTYPE)
    first = pid.to(tl.int64) * ((D + E) * M)
    x = load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD)
    gain = tl.dot(tl.trans(x.to(DTYPE)), left, input_precision=PRECISION)
    add_state(states, gain, first, 0, False, D, BD, M)
    x = load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE)
    gain = tl.dot(tl.trans(x.to(DTYPE)), left, input_precision=PRECISION)
    add_state(states, gain, first, D, False, E, BE, M)


@triton.jit
def scan_kernel(
    states, decay, occupancy, begin_keys, begin_values, begin_occupancy, end_keys, end_values, end_occupancy, bounds,
    chunks_per_row, H,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, OCCUPANCY: tl.constexpr, HAS_BEGIN: tl.constexpr,
    HAS_END: tl.constexpr, D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Over a document's chunks in order (REVERSE: from the last to the first), carry = e^decay carry + gain, starting
    from `begin` [N,H,M,D|E] and ending in `end`; each gain [chunk,h,D+E,M] is replaced by the carry before it.

    One program holds BF of the D+E features of all slots of one document and head; the first also does the occupancy.
    """
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    if PACKED:
        first = tl.load(bounds + n)
        chunks = (tl.load(bounds + n + 1) - first).to(tl.int32)
    else:
        first, chunks = n * chunks_per_row, chunks_per_row
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    m = tl.arange(0, M)
    inside = (f < D + E)[:, None] & (m >= 0)[None, :]
    is_key = (f < D)[:, None] & inside
    is_value = (f >= D)[:, None] & inside
    counted = m < tl.where(tl.program_id(1) == 0, M, 0)
    key_at = (n * H + h) * M * D + m[None, :] * D + f[:, None]
    value_at = (n * H + h) * M * E + m[None, :] * E + (f - D)[:, None]
    carry = tl.zeros([BF, M], tl.float32)
    z = tl.zeros([M], tl.float32)
    if HAS_BEGIN:
        carry += tl.load(begin_keys + key_at, mask=is_key, other=0.0).to(tl.float32)
        carry += tl.load(begin_values + value_at, mask=is_value, other=0.0).to(tl.float32)
        if OCCUPANCY:
            z += tl.load(begin_occupancy + (n * H + h) * M + m, mask=counted, other=0.0).to(tl.float32)
    for i in tl.range(0, chunks, num_stages=4):
        chunk = first + (chunks - 1 - i if REVERSE else i)
        at = chunk * H + h
        kept = tl.exp(tl.load(decay + at * M + m))
        here = states + at * ((D + E) * M) + f[:, None] * M + m[None, :]
        gain = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        tl.store(here, carry.to(states.dtype.element_ty), mask=inside)
        carry = kept[None, :] * carry + gain
        if OCCUPANCY:
            gained = tl.load(occupancy + at * M + m, mask=counted, other=0.0)
            tl.store(occupancy + at * M + m, z, mask=counted)
            z = kept * z + gained
    if HAS_END:
        tl.store(end_keys + key_at, carry, mask=is_key)
        tl.store(end_values + value_at, carry, mask=is_value)
        if OCCUPANCY:
            tl.store(end_occupancy + (n * H + h) * M + m, z, mask=counted)


@triton.jit
def output_kernel(
    q, q_sink, k, v, positions, table, states, occupancy, L, label, anchors, w, last, o,
    T, chunks_per_row, H, G, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    GB: tl.constexpr,
):  # fmt: skip
    """o [B,T,H*G,E] of one chunk, kv head and tile of GB query heads."""
    tiles = tl.cdiv(G, GB)
    pid, g0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * GB
    chunk, h = pid // H, pid % H
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = row * T + begin
    rows, columns = row_mask(count, G - g0, C, GB), row_mask(count, 1, C, 1)
    DTYPE = states.dtype.element_ty
    Lc, labels, weight = load_tile(L, pid, C, M), load_tile(label, pid, C, M), load_tile(w, pid, C, M)
    classes = tl.load(last + pid)
    first = pid.to(tl.int64) * ((D + E) * M)
    xk = load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD).to(DTYPE)
    K0 = load_state(states, first, 0, D, BD, M)
    q_first = row * q_b + begin * q_t + (h * G + g0) * q_h
    x = load_rows(q, q_first, q_t, q_h, rows, C, GB, D, BD).to(DTYPE)
    if HAS_SINK:
        sink = (tl.arange(0, M) < SINKS)[None, :]
        _p, own, before, within = meet(
            x,
            xk,
            tl.where(sink, 0.0, K0),
            tl.where(sink, 0.0, weight),
            Lc,
            labels,
            anchors,
            pid,
            classes,
            C,
            GB,
            M,
            PRECISION,
        )
        logits = before + within + own[:, None] * to_rows(tl.where(sink, 0.0, weight), C, GB, M)
        x = load_rows(q_sink, q_first, q_t, q_h, rows, C, GB, D, BD).to(DTYPE)
        _p, own, before, within = meet(
            x,
            xk,
            tl.where(sink, K0, 0.0),
            tl.where(sink, weight, 0.0),
            Lc,
            labels,
            anchors,
            pid,
            classes,
            C,
            GB,
            M,
            PRECISION,
        )
        logits += before + within + own[:, None] * to_rows(tl.where(sink, weight, 0.0), C, GB, M)
    else:
        _p, own, before, within = meet(x, xk, K0, weight, Lc, labels, anchors, pid, classes, C, GB, M, PRECISION)
        logits = before + within + own[:, None] * to_rows(weight, C, GB, M)
    if OCCUPANCY:
        inverse, log_z = inverse_and_log(slot_occupancy(occupancy, pid, Lc, C, M))
        inverse = to_rows(inverse, C, GB, M)
        p = read(logits, inverse, to_rows(log_z, C, GB, M), scale) * inverse
    else:
        p = read(logits, 1.0, 0.0, scale)
    own = tl.sum(p * to_rows(weight, C, GB, M), axis=1)
    A = spread(p, own, weight, Lc, labels, anchors, pid, classes, DTYPE, C, GB, M, PRECISION).to(DTYPE)
    left = (p * to_rows(tl.exp(Lc), C, GB, M)).to(DTYPE)
    y = tl.dot(left, tl.trans(load_state(states, first, D, E, BE, M)), input_precision=PRECISION)
    xv = load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE).to(DTYPE)
    y = tl.dot(A, xv, y, input_precision=PRECISION)
    if HAS_POSITIONS:
        y = tl.where(real_rows(positions, row0, count, G - g0, C, GB, HAS_POSITIONS)[:, None], y, 0.0)
    store_rows(o, y, (row0 * H + h) * G * E + g0 * E, H * G * E, E, rows, C, GB, E, BE)
