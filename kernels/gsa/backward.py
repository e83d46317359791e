"""Triton backward: everything but the inputs is recomputed; logits, weights and their gradients stay on the chip.

    inner_kernel   from dO and the memory before a chunk: dQ; what stays inside the chunk of dK, dV, dw and d log alpha;
                   the chunk's gain of the memory's adjoint
    scan_kernel    (forward.py, in reverse) adjoint of the memory after every chunk
    outer_kernel   adds what flows through the memory after the chunk; gradients of the gates' inputs

Keys and values are two passes of one form: slot weights u (d logits for keys, p for values), rows x (q, dO), columns y
(k, v). `flow` is the backward of that form. A program goes over its query heads tile by tile and adds to the outputs in
place, because the accumulators of all would not fit into registers.

d log alpha_t sums u times what it read over all pairs (i, j) with j < t <= i. Between soft gates that is a cumulative
sum of row sums minus column sums. Where a gate is hard the two cancel to nothing, so that in the linear form, whose
gradient is d log alpha / alpha, the sum at the start of a class is made directly: rows of this and later classes with
columns of earlier ones all lie across it.

Shape legend: spec.py, tile.py; n = chunks.
"""

import triton
import triton.language as tl

from .tile import (
    add_rows,
    add_state,
    add_tile,
    begins_class,
    chunk_span,
    factors,
    inverse_and_log,
    load_gates,
    load_positions,
    load_rows,
    load_state,
    load_tile,
    meet,
    on_turn,
    over_heads,
    read,
    real_rows,
    row_mask,
    sigmoid,
    slot_occupancy,
    store_rows,
    time_sum,
    to_rows,
    triangle,
    with_own,
)


@triton.jit
def flow(
    u, x, y, pairs, own, states, first, state_row, L, label, anchors, w, classes, dy, dy_first, dy_t, columns, gains,
    pid, again, grad_w, rows, across, LINEAR: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """What rows x [R,D] read, r_i = (state e^{L_i} + sum_{j <= i} e^{L_i - L_j} w_j y_j)^T x_i, and its backward for a
    gradient u [R,M]; pairs and own as `meet` returns them. Adds to dy and to the gain of the state's adjoint.

    Returns r [R,M], the gradient of x [R,D], and, added up: grad_w; rows, whose sum over later tokens is d log alpha;
    and across, which is d log alpha where a class begins (if LINEAR), each [C,M]."""
    # tiles loaded anew occupy no registers from one use to the next
    tl.debug_barrier()
    Lc, labels, weight = load_tile(L, pid, C, M), load_tile(label, pid, C, M), load_tile(w, pid, C, M)
    state = load_state(states, first, state_row, D, BD, M)
    prefix = to_rows(tl.exp(Lc), C, GB, M)
    left = (u * prefix).to(x.dtype)
    gain = tl.dot(tl.trans(x), left, input_precision=PRECISION)
    add_state(gains, gain, first, state_row, again, D, BD, M)
    dx = tl.dot(left, tl.trans(state), input_precision=PRECISION)
    r = tl.dot(x, state, input_precision=PRECISION) * prefix
    before = over_heads(u * r, C, GB, M)
    rows += before
    if LINEAR:
        # across the chunk's first token lies what all rows read of the state, and nothing else
        across += tl.where((tl.arange(0, C) == 0)[:, None], tl.sum(before, axis=0)[None, :], 0.0)
    grad_w += over_heads(u * own[:, None], C, GB, M)
    weight_rows = to_rows(weight, C, GB, M)
    r += own[:, None] * weight_rows
    own = tl.sum(u * weight_rows, axis=1)
    A = tl.zeros([C * GB, C], tl.float32)
    for c in range(0, classes + 1):
        row, col = factors(anchors, pid, Lc, labels, c, C, M)
        row = to_rows(row, C, GB, M)
        right = (col * weight).to(x.dtype)
        here = (u * row).to(x.dtype)
        met = col * tl.dot(tl.trans(pairs), here, input_precision=PRECISION)
        grad_w += met
        A = tl.dot(here, tl.trans(right), A, input_precision=PRECISION)
        reads = tl.dot(pairs, right, input_precision=PRECISION) * row
        r += reads
        reads = over_heads(u * reads, C, GB, M)
        rows += reads - weight * met
        if LINEAR:
            if c < classes:
                # the chunk's first state was written before all classes
                reads += tl.where(c == 0, before, 0.0)
                across += tl.where(labels > c, time_sum(reads, True, True, x.dtype, C), 0.0)
    A = with_own(A, own, C, GB).to(x.dtype)
    add_rows(dy, tl.dot(tl.trans(A), x, input_precision=PRECISION), dy_first, dy_t, columns, again, C, D, BD)
    return r, tl.dot(A, y, dx, input_precision=PRECISION), grad_w, rows, across


@triton.jit
def inner_kernel(
    q, q_sink, k, v, positions, table, states, occupancy, L, label, anchors, w, last, do, dq, dq_sink, dk, dv, dw, dlog,
    adjoint, d_occupancy,
    T, chunks_per_row, H, G, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, LINEAR: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    GB: tl.constexpr,
):  # fmt: skip
    """One chunk and kv head, GB query heads at a time: dq [B,T,H*G,D]; dk, dv [B,T,H,D|E] inside the chunk; tiles dw
    and dlog [n,H,C,M] float32; adjoint [n,H,D+E,M] and d_occupancy [n,H,M]: the gains for the reverse scan."""
    pid = tl.program_id(0)
    chunk, h = pid // H, pid % H
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = row * T + begin
    DTYPE = states.dtype.element_ty
    classes = tl.load(last + pid)
    first = pid.to(tl.int64) * ((D + E) * M)
    m = tl.arange(0, M)
    columns = row_mask(count, 1, C, 1)
    sink = (m < SINKS)[None, :]
    for g0 in range(0, G, GB):
        again = g0 > 0
        live = row_mask(count, G - g0, C, GB)
        Lc, labels, weight = load_tile(L, pid, C, M), load_tile(label, pid, C, M), load_tile(w, pid, C, M)
        weight_rows = to_rows(weight, C, GB, M)
        K0 = load_state(states, first, 0, D, BD, M)
        xk = load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD).to(DTYPE)
        q_first = row * q_b + begin * q_t + (h * G + g0) * q_h
        xq = load_rows(q, q_first, q_t, q_h, live, C, GB, D, BD).to(DTYPE)
        qk, qk_own, before, within = meet(xq, xk, K0, weight, Lc, labels, anchors, pid, classes, C, GB, M, PRECISION)
        logits = before + within + qk_own[:, None] * weight_rows
        if HAS_SINK:
            xs = load_rows(q_sink, q_first, q_t, q_h, live, C, GB, D, BD).to(DTYPE)
            sk, sk_own, before, within = meet(
                xs, xk, K0, weight, Lc, labels, anchors, pid, classes, C, GB, M, PRECISION
            )
            logits = tl.where(sink, before + within + sk_own[:, None] * weight_rows, logits)
        if OCCUPANCY:
            inverse, log_z = inverse_and_log(slot_occupancy(occupancy, pid, Lc, C, M))
            inverse = to_rows(inverse, C, GB, M)
            softmax = read(logits, inverse, to_rows(log_z, C, GB, M), scale)
            p = softmax * inverse
        else:
            softmax = read(logits, 1.0, 0.0, scale)
            p = softmax

        # at padding dO counts as zero: with it everything that padding could receive is zero
        xo = load_rows(
            do, (row0 * H + h) * G * E + g0 * E, H * G * E, E,
            real_rows(positions, row0, count, G - g0, C, GB, HAS_POSITIONS), C, GB, E, BE,
        ).to(DTYPE)  # fmt: skip
        xv = load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE).to(DTYPE)
        ov, own = triangle(tl.dot(xo, tl.trans(xv), input_precision=PRECISION), C, GB)
        grad_w, rows, across = (
            tl.zeros([C, M], tl.float32), tl.zeros([C, M], tl.float32), tl.zeros([C, M], tl.float32),
        )  # fmt: skip
        dp, _dx, grad_w, rows, across = flow(
            p, xo, xv, ov.to(DTYPE), own, states, first, D, L, label, anchors, w, classes, dv, (row0 * H + h) * E,
            H * E, columns, adjoint, pid, again, grad_w, rows, across, LINEAR, PRECISION, E, BE, M, C, GB,
        )  # fmt: skip
        dp_p = dp * p
        total = tl.sum(dp_p, axis=1)[:, None]
        if OCCUPANCY:
            dy = softmax * (dp * inverse - total)
            dl = dy * scale * inverse
            dz = over_heads((dy * (1.0 - scale * logits * inverse) - dp_p) * inverse, C, GB, M)
            dz *= tl.exp(load_tile(L, pid, C, M))
            z0 = tl.load(occupancy + pid.to(tl.int64) * M + m)[None, :]
            dz_log = time_sum(dz * (z0 - 1.0), True, True, DTYPE, C)
            at = d_occupancy + pid.to(tl.int64) * M + m
            tl.store(at, tl.sum(dz, axis=0) + tl.load(at, mask=(m >= 0) & again, other=0.0))
            # what flows through the occupancy comes from before all classes, as what flows through the first state
            rows += dz * (z0 - 1.0)
            if LINEAR:
                across += tl.where(begins_class(label, pid, C, M), dz_log, 0.0)
        else:
            dl = scale * (dp_p - p * total)

        at = (row0 * H + h) * G * D + g0 * D
        rest = dl
        if HAS_SINK:
            rest = tl.where(sink, 0.0, dl)
        _r, dx, grad_w, rows, across = flow(
            rest, xq, xk, qk, qk_own, states, first, 0, L, label, anchors, w, classes, dk, (row0 * H + h) * D, H * D,
            columns, adjoint, pid, again, grad_w, rows, across, LINEAR, PRECISION, D, BD, M, C, GB,
        )  # fmt: skip
        store_rows(dq, dx, at, H * G * D, D, live, C, GB, D, BD)
        if HAS_SINK:
            _r, dx, grad_w, rows, across = flow(
                dl - rest, xs, xk, sk, sk_own, states, first, 0, L, label, anchors, w, classes, dk, (row0 * H + h) * D,
                H * D, columns, adjoint, pid, True, grad_w, rows, across, LINEAR, PRECISION, D, BD, M, C, GB,
            )  # fmt: skip
            store_rows(dq_sink, dx, at, H * G * D, D, live, C, GB, D, BD)
        grad_log = time_sum(rows, True, True, DTYPE, C)
        if LINEAR:
            grad_log = tl.where(begins_class(label, pid, C, M), across, grad_log)
        add_tile(dlog, grad_log, pid, again, C, M)
        add_tile(dw, grad_w, pid, again, C, M)
        tl.debug_barrier()


@triton.jit
def outer_kernel(
    k, v, gate, s, write, keep, positions, table, states, adjoint, occupancy, d_occupancy,
    dk, dv, dw, dlog, dgate, ds, d_bias,
    T, chunks_per_row, H, rate, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, FORM: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    HAS_S: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
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
    columns = row_mask(count, 1, C, 1)
    DTYPE = states.dtype.element_ty
    position = load_positions(positions, row0, count, C, HAS_POSITIONS)
    log_alpha, weight, x = load_gates(
        gate, s, write, keep, position, row0, count, h, H, rate, FORM, RING, SINKS, HAS_S, C, M
    )
    suffix = tl.exp(time_sum(log_alpha, True, False, DTYPE, C))
    left = (suffix * weight).to(DTYPE)
    first = pid.to(tl.int64) * ((D + E) * M)

    dK = load_state(adjoint, first, 0, D, BD, M)
    through = tl.sum(load_state(states, first, 0, D, BD, M).to(tl.float32) * dK.to(tl.float32), axis=0)
    y = load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD).to(DTYPE)
    held = tl.dot(y, dK, input_precision=PRECISION)
    grad = tl.dot(left, tl.trans(dK), input_precision=PRECISION)
    add_rows(dk, grad, (row0 * H + h) * D, H * D, columns, True, C, D, BD)

    dV = load_state(adjoint, first, D, E, BE, M)
    through += tl.sum(load_state(states, first, D, E, BE, M).to(tl.float32) * dV.to(tl.float32), axis=0)
    y = load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE).to(DTYPE)
    held = tl.dot(y, dV, held, input_precision=PRECISION)
    grad = tl.dot(left, tl.trans(dV), input_precision=PRECISION)
    add_rows(dv, grad, (row0 * H + h) * E, H * E, columns, True, C, E, BE)

    if OCCUPANCY:
        z0 = tl.load(occupancy + pid.to(tl.int64) * M + m)
        through += tl.load(d_occupancy + pid.to(tl.int64) * M + m) * (z0 - 1.0)
    held *= suffix
    written = weight * held
    grad_log = load_tile(dlog, pid, C, M) + (tl.exp(tl.sum(log_alpha, axis=0)) * through)[None, :]
    grad_log += time_sum(written, False, False, DTYPE, C)
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
        slope = rate
    elif FORM == "sigmoid":
        grad_x = (grad_log - grad_w * tl.exp(log_alpha)) * sigmoid(-x) * rate
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
