"""Triton backward: everything but the inputs is recomputed; logits, weights and their gradients stay on the chip.

    values_kernel  from dO and the memory before a chunk: what stays inside the chunk of dV and, by way of the values, of
                   dw and d log alpha; the chunk's gain of the value memory's adjoint
    keys_kernel    the same for keys, and dQ
    scan_kernel    (forward.py, in reverse) adjoint of the memory after every chunk
    outer_kernel   adds what flows through the memory after the chunk; gradients of the gates' inputs

Keys and values have a kernel each because the accumulators of both together do not fit the registers of one.

d log alpha_t sums p dp over all pairs (i, j) with j < t <= i. Between soft gates that is a cumulative sum of row sums
minus column sums. Where a gate is hard the two cancel to nothing, so that in the linear form, whose gradient is
d log alpha / alpha, breaks are summed over classes: rows of later classes with columns of earlier ones all lie across.

Shape legend: spec.py, tile.py; n = chunks.
"""

import triton
import triton.language as tl

from .tile import (
    EMPTY,
    begins_class,
    chunk_span,
    factors,
    feature,
    feature_slope,
    load_gates,
    load_positions,
    load_rows,
    load_state,
    load_tile,
    meet,
    on_turn,
    over_heads,
    read,
    sigmoid,
    slot_occupancy,
    store_rows,
    store_state,
    store_tile,
    to_rows,
    triangle,
    with_own,
)


@triton.jit
def read_backward(p, dp, logits, z, scale, OCCUPANCY: tl.constexpr):
    """Backward of `read`: weights p on the slot values and their gradient dp [R,M] -> (d logits, d z)."""
    if OCCUPANCY:
        present = z > EMPTY
        z = tl.where(present, z, 1.0)
        dy = p * (dp - tl.sum(p * dp, axis=1)[:, None] * z)
        dz = (dy * (1.0 - scale * logits / z) - p * dp) / z
        return tl.where(present, dy * scale / z, 0.0), tl.where(present, dz, 0.0)
    else:
        return scale * p * (dp - tl.sum(p * dp, axis=1)[:, None]), dp


@triton.jit
def load_output_gradient(do, positions, row0, h, H, G, g0, count, HAS_POSITIONS: tl.constexpr, C: tl.constexpr,
                         GB: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """[R,BE] rows of dO, zero at padding: with them everything that padding could receive is zero."""
    x = load_rows(do, (row0 * H + h) * G * E + g0 * E, H * G * E, E, count, G - g0, C, GB, E, BE)
    if HAS_POSITIONS:
        t = tl.arange(0, C * GB) // GB
        x = tl.where(tl.load(positions + row0 + t, mask=t < count, other=-1)[:, None] >= 0, x, 0.0)
    return x


@triton.jit
def values_kernel(
    q, q_sink, k, v, positions, table, states, occupancy, L, label, w, last, do, dv, dw, dlog, adjoint,
    T, chunks_per_row, H, G, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr, SILU: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    GB: tl.constexpr,
):  # fmt: skip
    """One chunk and kv head, GB query heads at a time: dv [B,T,H,E] inside the chunk, before the feature map's slope;
    tiles dw and dlog [n,H,C,M] float32, dlog not yet summed over time; value rows of adjoint [n,H,D+E,M]."""
    pid = tl.program_id(0)
    chunk, h = pid // H, pid % H
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = row * T + begin
    DTYPE = states.dtype.element_ty
    classes = tl.load(last + pid)
    first = pid.to(tl.int64) * ((D + E) * M)
    grad = tl.zeros([C, BE], tl.float32)
    gain = tl.zeros([BE, M], tl.float32)
    grad_w = tl.zeros([C, M], tl.float32)
    cols = tl.zeros([C, M], tl.float32)
    for g0 in range(0, G, GB):
        Lc, labels, weight = load_tile(L, pid, C, M), load_tile(label, pid, C, M), load_tile(w, pid, C, M)
        K0 = load_state(states, first, 0, D, BD, M)
        xk = feature(load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, count, 1, C, 1, D, BD), SILU).to(DTYPE)
        q_first = row * q_b + begin * q_t + (h * G + g0) * q_h
        logits = logits_of(q, q_sink, q_first, q_t, q_h, count, G - g0, xk, K0, weight, Lc, labels, classes, SINKS,
                           HAS_SINK, SILU, PRECISION, DTYPE, D, BD, M, C, GB)  # fmt: skip
        p = read(logits, slot_occupancy(occupancy, pid, Lc, C, GB, M, OCCUPANCY), scale, OCCUPANCY)
        xo = load_output_gradient(do, positions, row0, h, H, G, g0, count, HAS_POSITIONS, C, GB, E, BE).to(DTYPE)
        xv = feature(load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, count, 1, C, 1, E, BE), SILU).to(DTYPE)
        ov, ov_own = triangle(tl.dot(xo, tl.trans(xv), input_precision=PRECISION), C, GB)
        ov = ov.to(DTYPE)
        grad_w += over_heads(p * ov_own[:, None], C, GB, M)
        A = tl.zeros([C * GB, C], tl.float32)
        for c in range(0, classes + 1):
            row_c, col_c = factors(Lc, labels, c)
            left = (p * to_rows(row_c, C, GB, M)).to(DTYPE)
            A = tl.dot(left, tl.trans((col_c * weight).to(DTYPE)), A, input_precision=PRECISION)
            cols += col_c * tl.dot(tl.trans(ov), left, input_precision=PRECISION)
        A = with_own(A, tl.sum(p * to_rows(weight, C, GB, M), axis=1), C, GB).to(DTYPE)
        grad = tl.dot(tl.trans(A), xo, grad, input_precision=PRECISION)
        left = (p * to_rows(tl.exp(Lc), C, GB, M)).to(DTYPE)
        gain = tl.dot(tl.trans(xo), left, gain, input_precision=PRECISION)
    store_rows(dv, grad, (row0 * H + h) * E, H * E, 0, count, 1, C, 1, E, BE)
    store_state(adjoint, gain, first, D, E, BE, M)
    store_tile(dw, grad_w + cols, pid, C, M)
    store_tile(dlog, -cols * load_tile(w, pid, C, M), pid, C, M)


@triton.jit
def logits_of(q, q_sink, q_first, q_t, q_h, count, heads, xk, K0, weight, L, labels, classes, SINKS: tl.constexpr,
              HAS_SINK: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
              D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, C: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """q.K of every token and slot [R,M]; the first SINKS slots are read by q_sink if there is one."""
    x = feature(load_rows(q, q_first, q_t, q_h, count, heads, C, GB, D, BD), SILU).to(DTYPE)
    _p, own, before, within = meet(x, xk, K0, weight, L, labels, classes, C, GB, M, PRECISION)
    logits = before + within + own[:, None] * to_rows(weight, C, GB, M)
    if HAS_SINK:
        x = feature(load_rows(q_sink, q_first, q_t, q_h, count, heads, C, GB, D, BD), SILU).to(DTYPE)
        _p, own, before, within = meet(x, xk, K0, weight, L, labels, classes, C, GB, M, PRECISION)
        sink = (tl.arange(0, M) < SINKS)[None, :]
        logits = tl.where(sink, before + within + own[:, None] * to_rows(weight, C, GB, M), logits)
    return logits


@triton.jit
def keys_kernel(
    q, q_sink, k, v, positions, table, states, occupancy, L, label, w, last, do, dq, dq_sink, dk, dw, dlog, adjoint,
    d_occupancy,
    T, chunks_per_row, H, G, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, LINEAR: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr, SILU: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    GB: tl.constexpr,
):  # fmt: skip
    """As values_kernel, whose dw and dlog it completes in place: dq [B,T,H*G,D]; dk [B,T,H,D] inside the chunk, before
    the slope; key rows of adjoint; gain of d_occupancy [n,H,M]."""
    pid = tl.program_id(0)
    chunk, h = pid // H, pid % H
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = row * T + begin
    DTYPE = states.dtype.element_ty
    classes = tl.load(last + pid)
    first = pid.to(tl.int64) * ((D + E) * M)
    grad = tl.zeros([C, BD], tl.float32)
    gain = tl.zeros([BD, M], tl.float32)
    grad_w = tl.zeros([C, M], tl.float32)
    # Sums of p dp whose reverse cumulative sum is d log alpha: of rows that read the chunk's first state, and of rows
    # minus columns of pairs inside the chunk. Where a class begins the latter give way to the sum over all pairs across.
    outside = tl.zeros([C, M], tl.float32)
    inside = tl.zeros([C, M], tl.float32)
    across = tl.zeros([C, M], tl.float32)
    grad_z0 = tl.zeros([M], tl.float32)
    for g0 in range(0, G, GB):
        Lc, labels, weight = load_tile(L, pid, C, M), load_tile(label, pid, C, M), load_tile(w, pid, C, M)
        weight_rows = to_rows(weight, C, GB, M)
        K0 = load_state(states, first, 0, D, BD, M)
        xk = feature(load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, count, 1, C, 1, D, BD), SILU).to(DTYPE)
        q_first = row * q_b + begin * q_t + (h * G + g0) * q_h
        xq = feature(load_rows(q, q_first, q_t, q_h, count, G - g0, C, GB, D, BD), SILU).to(DTYPE)
        qk, own, before_k, within_k = meet(xq, xk, K0, weight, Lc, labels, classes, C, GB, M, PRECISION)
        own_k = tl.broadcast_to(own[:, None], [C * GB, M])
        if HAS_SINK:
            sink = (tl.arange(0, M) < SINKS)[None, :]
            xs = feature(load_rows(q_sink, q_first, q_t, q_h, count, G - g0, C, GB, D, BD), SILU).to(DTYPE)
            sk, own, before_s, within_s = meet(xs, xk, K0, weight, Lc, labels, classes, C, GB, M, PRECISION)
            own_k = tl.where(sink, own[:, None], own_k)
            before_k = tl.where(sink, before_s, before_k)
            within_k = tl.where(sink, within_s, within_k)
        logits = before_k + within_k + own_k * weight_rows
        z = slot_occupancy(occupancy, pid, Lc, C, GB, M, OCCUPANCY)
        p = read(logits, z, scale, OCCUPANCY)
        xo = load_output_gradient(do, positions, row0, h, H, G, g0, count, HAS_POSITIONS, C, GB, E, BE).to(DTYPE)
        xv = feature(load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, count, 1, C, 1, E, BE), SILU).to(DTYPE)
        V0 = load_state(states, first, D, E, BE, M)
        ov, own, before_v, within_v = meet(xo, xv, V0, weight, Lc, labels, classes, C, GB, M, PRECISION)
        dp = before_v + within_v + own[:, None] * weight_rows
        dl, dz = read_backward(p, dp, logits, z, scale, OCCUPANCY)
        grad_w += over_heads(dl * own_k, C, GB, M)
        outside += over_heads(dl * before_k + p * before_v, C, GB, M)
        inside += over_heads(dl * within_k + p * within_v, C, GB, M)
        if OCCUPANCY:
            z0 = tl.load(occupancy + pid.to(tl.int64) * M + tl.arange(0, M))[None, :]
            grad_z = over_heads(dz, C, GB, M) * tl.exp(Lc)
            outside += grad_z * (z0 - 1.0)
            grad_z0 += tl.sum(grad_z, axis=0)

        A = tl.zeros([C * GB, C], tl.float32)
        if HAS_SINK:
            A_sink = tl.zeros([C * GB, C], tl.float32)
        for c in range(0, classes + 1):
            row_c, col_c = factors(Lc, labels, c)
            row_rows = to_rows(row_c, C, GB, M)
            right = (col_c * weight).to(DTYPE)
            left = (dl * row_rows).to(DTYPE)
            if HAS_SINK:
                left_sink = tl.where(sink, left, 0.0)
                left = tl.where(sink, 0.0, left)
                A_sink = tl.dot(left_sink, tl.trans(right), A_sink, input_precision=PRECISION)
            A = tl.dot(left, tl.trans(right), A, input_precision=PRECISION)
            met = tl.dot(tl.trans(qk), left, input_precision=PRECISION)
            if HAS_SINK:
                met = tl.dot(tl.trans(sk), left_sink, met, input_precision=PRECISION)
            met *= col_c
            grad_w += met
            inside -= weight * met
            if LINEAR:
                reads = tl.dot(qk, right, input_precision=PRECISION)
                if HAS_SINK:
                    reads = tl.where(sink, tl.dot(sk, right, input_precision=PRECISION), reads)
                pairs = p * tl.dot(ov, right, input_precision=PRECISION) + dl * reads
                pairs = over_heads(pairs * row_rows, C, GB, M)
                across += tl.where(labels > c, tl.cumsum(pairs, axis=0, reverse=True), 0.0)
        rest = dl
        left = (dl * to_rows(tl.exp(Lc), C, GB, M)).to(DTYPE)
        at = (row0 * H + h) * G * D + g0 * D
        if HAS_SINK:
            rest = tl.where(sink, 0.0, dl)
            left_sink = tl.where(sink, left, 0.0)
            left = tl.where(sink, 0.0, left)
            A_sink = with_own(A_sink, tl.sum((dl - rest) * weight_rows, axis=1), C, GB).to(DTYPE)
            y = tl.dot(left_sink, tl.trans(K0), input_precision=PRECISION)
            y = tl.dot(A_sink, xk, y, input_precision=PRECISION)
            raw = load_rows(q_sink, q_first, q_t, q_h, count, G - g0, C, GB, D, BD)
            store_rows(dq_sink, y * feature_slope(raw, SILU), at, H * G * D, D, count, G - g0, C, GB, D, BD)
            grad = tl.dot(tl.trans(A_sink), xs, grad, input_precision=PRECISION)
            gain = tl.dot(tl.trans(xs), left_sink, gain, input_precision=PRECISION)
        A = with_own(A, tl.sum(rest * weight_rows, axis=1), C, GB).to(DTYPE)
        y = tl.dot(left, tl.trans(K0), input_precision=PRECISION)
        y = tl.dot(A, xk, y, input_precision=PRECISION)
        raw = load_rows(q, q_first, q_t, q_h, count, G - g0, C, GB, D, BD)
        store_rows(dq, y * feature_slope(raw, SILU), at, H * G * D, D, count, G - g0, C, GB, D, BD)
        grad = tl.dot(tl.trans(A), xq, grad, input_precision=PRECISION)
        gain = tl.dot(tl.trans(xq), left, gain, input_precision=PRECISION)

    store_rows(dk, grad, (row0 * H + h) * D, H * D, 0, count, 1, C, 1, D, BD)
    store_state(adjoint, gain, first, 0, D, BD, M)
    if OCCUPANCY:
        tl.store(d_occupancy + pid.to(tl.int64) * M + tl.arange(0, M), grad_z0)
    store_tile(dw, grad_w + load_tile(dw, pid, C, M), pid, C, M)
    inside += load_tile(dlog, pid, C, M)
    if LINEAR:
        inside = tl.cumsum(inside, axis=0, reverse=True)
        outside = tl.cumsum(outside, axis=0, reverse=True)
        store_tile(dlog, outside + tl.where(begins_class(label, pid, C, M), across, inside), pid, C, M)
    else:
        store_tile(dlog, tl.cumsum(outside + inside, axis=0, reverse=True), pid, C, M)


@triton.jit
def outer_kernel(
    k, v, gate, s, write, keep, positions, table, states, adjoint, occupancy, d_occupancy,
    dk, dv, dw, dlog, dgate, ds, d_bias,
    T, chunks_per_row, H, damping, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, FORM: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    SILU: tl.constexpr, HAS_S: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One chunk and kv head: adds the gradients through the memory after the chunk (adjoint, d_occupancy) to dk, dv in
    place, and turns dw and dlog into dgate [B,T,H,M], ds (if s was given) and the chunk's part of the gradients of
    write and keep, d_bias [n,H,2,M]."""
    pid = tl.program_id(0)
    chunk, h = pid // H, pid % H
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    m = tl.arange(0, M)
    bias_at = pid.to(tl.int64) * (2 * M) + m
    if count <= 0:
        if RING:
            tl.store(d_bias + bias_at, tl.zeros([M], tl.float32))
            tl.store(d_bias + bias_at + M, tl.zeros([M], tl.float32))
        return
    row0 = row * T + begin
    DTYPE = states.dtype.element_ty
    position = load_positions(positions, row0, count, C, HAS_POSITIONS)
    log_alpha, weight, x = load_gates(
        gate, s, write, keep, position, row0, count, h, H, damping, FORM, RING, SINKS, HAS_S, C, M
    )
    suffix = tl.exp(tl.cumsum(log_alpha, axis=0, reverse=True) - log_alpha)
    left = (suffix * weight).to(DTYPE)
    first = pid.to(tl.int64) * ((D + E) * M)

    dK = load_state(adjoint, first, 0, D, BD, M)
    through = tl.sum(load_state(states, first, 0, D, BD, M).to(tl.float32) * dK.to(tl.float32), axis=0)
    raw = load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, count, 1, C, 1, D, BD)
    held = tl.dot(feature(raw, SILU).to(DTYPE), dK, input_precision=PRECISION)
    grad = tl.dot(left, tl.trans(dK), input_precision=PRECISION)
    at = (row0 * H + h) * D
    grad += load_rows(dk, at, H * D, 0, count, 1, C, 1, D, BD).to(tl.float32)
    store_rows(dk, grad * feature_slope(raw, SILU), at, H * D, 0, count, 1, C, 1, D, BD)

    dV = load_state(adjoint, first, D, E, BE, M)
    through += tl.sum(load_state(states, first, D, E, BE, M).to(tl.float32) * dV.to(tl.float32), axis=0)
    raw = load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, count, 1, C, 1, E, BE)
    held = tl.dot(feature(raw, SILU).to(DTYPE), dV, held, input_precision=PRECISION)
    grad = tl.dot(left, tl.trans(dV), input_precision=PRECISION)
    at = (row0 * H + h) * E
    grad += load_rows(dv, at, H * E, 0, count, 1, C, 1, E, BE).to(tl.float32)
    store_rows(dv, grad * feature_slope(raw, SILU), at, H * E, 0, count, 1, C, 1, E, BE)

    if OCCUPANCY:
        z0 = tl.load(occupancy + pid.to(tl.int64) * M + m)
        through += tl.load(d_occupancy + pid.to(tl.int64) * M + m) * (z0 - 1.0)
    held *= suffix
    written = weight * held
    grad_log = load_tile(dlog, pid, C, M) + (tl.exp(tl.sum(log_alpha, axis=0)) * through)[None, :]
    grad_log += tl.cumsum(written, axis=0) - written
    grad_w = load_tile(dw, pid, C, M) + held
    row_at = (row0 * H + h) * M
    at = (tl.arange(0, C) * (H * M))[:, None] + m[None, :]
    inside = (tl.arange(0, C) < count)[:, None]
    real = (position >= 0)[:, None]
    if HAS_S:
        tl.store(ds + row_at + at, tl.where(real, grad_w, 0.0), mask=inside)
        grad_w = tl.zeros([C, M], tl.float32)
    if FORM == "linear":
        grad_x = grad_w - grad_log * tl.exp(-log_alpha)
        grad_x = tl.where(real & (x >= 0.0) & (x <= 1.0), grad_x, 0.0)
        slope = 1.0 / damping
    elif FORM == "sigmoid":
        grad_x = (grad_log - grad_w * tl.exp(log_alpha)) * sigmoid(-x) / damping
        grad_x = tl.where(real, grad_x, 0.0)
        slope = 1.0
    else:
        grad_x = tl.where(real, grad_log - grad_w * tl.exp(log_alpha), 0.0)
        slope = 1.0
    tl.store(dgate + row_at + at, (grad_x * slope).to(dgate.dtype.element_ty), mask=inside)
    if RING:
        turn = on_turn(position, RING, SINKS, M)
        tl.store(d_bias + bias_at, tl.sum(tl.where(turn, grad_x, 0.0), axis=0))
        tl.store(d_bias + bias_at + M, tl.sum(tl.where(turn, 0.0, grad_x), axis=0))
