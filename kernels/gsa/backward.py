"""Triton backward: everything but the inputs is recomputed; logits and probabilities stay on the chip.

    inner_kernel    from dO and the memory before a chunk: gradients of the logits; what stays inside the chunk of dV;
                    the chunk's gain of the memory's adjoint
    scan_kernel     (forward.py, in reverse) adjoint of the memory after every chunk
    outer_kernel    dQ and dK; adds to dV what flows through the memory after the chunk
    logits_kernel   (gates.py) gradients of the gates' inputs

Keys and values are two passes of one form: slot weights u (d logits for keys, p for values), rows x (q, dO), columns
y (k, v). d log alpha_t sums u times what it read over all pairs (i, j) with j < t <= i. Between soft gates that is the
sum of `rows` minus what columns got (`met`) over tokens from t on. Where a gate is hard the two cancel to nothing, so
that in the linear form, whose gradient is d log alpha / alpha, the sum `across` the start of a class is made directly.

Shape legend: spec.py, tile.py; n = chunks.
"""

import triton
import triton.language as tl

from .tile import (
    add_rows,
    add_state,
    add_tile,
    chunk_span,
    decayed,
    load_classes,
    load_rows,
    load_state,
    load_tile,
    over_heads,
    read,
    reads,
    real_rows,
    row_mask,
    store_rows,
    store_tile,
    to_rows,
    triangle,
    weights,
)


@triton.jit(do_not_specialize=["T", "chunks_per_row", "heads", "positions"])
def inner_kernel(
    q, q_sink, k, v, positions, table, states, occupancy, L, label, anchors, written, later, w, inverse, log_z, last,
    do, dlogits, dv, adjoint, d_occupancy, own, rows, met, across, z_rows,
    T, chunks_per_row, H, heads, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dl_t, dl_h, dl_g,
    PACKED: tl.constexpr, LINEAR: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    G: tl.constexpr, GB: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One chunk and kv head, GB query heads at a time: dlogits [B,T,H*G,M]; dv [B,T,H,E] inside the chunk; adjoint
    [n,H,D+E,M] and d_occupancy [n,H,M]: the gains for the reverse scan; tiles [n,H,C,M]: own, the gradient of w by what
    tokens read of themselves; rows, sums of u times what was read before; met, the values' part of the gradient of what
    tokens wrote; across, if LINEAR, the values' part and the first token's; z_rows, d log alpha at each row through the
    occupancy."""
    pid = tl.program_id(0)
    chunk, h = pid // heads, pid % heads
    batch, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = batch * T + begin
    DTYPE = states.dtype.element_ty
    gates = written, later, L, label, anchors, pid, load_classes(last, pid, BLOCKS)
    first = pid.to(tl.int64) * ((D + E) * M)
    m, d = tl.arange(0, M), tl.arange(0, C)
    columns = row_mask(count, 1, C, 1)
    for g0 in range(0, G, GB):
        again = g0 > 0
        live = row_mask(count, G - g0, C, GB)
        K0 = load_state(states, first, 0, D, BD, M)
        if ROOM:
            V0 = load_state(states, first, D, E, BE, M)  # asked for here, needed later
        z = load_rows(v, batch * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE).to(DTYPE)
        y = load_rows(k, batch * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD).to(DTYPE)
        q_first = batch * q_b + begin * q_t + (h * G + g0) * q_h
        xq = load_rows(q, q_first, q_t, q_h, live, C, GB, D, BD).to(DTYPE)
        pairs, alone = triangle(tl.dot(xq, tl.trans(y), input_precision=PRECISION), C, GB)
        before, _ = reads(xq, pairs.to(DTYPE), K0, xq, gates, False, C, GB, M, PRECISION)
        own_key = alone[:, None]
        if HAS_SINK:
            sink = (m < SINKS)[None, :]
            xs = load_rows(q_sink, q_first, q_t, q_h, live, C, GB, D, BD).to(DTYPE)
            pairs, alone = triangle(tl.dot(xs, tl.trans(y), input_precision=PRECISION), C, GB)
            far, _ = reads(xs, pairs.to(DTYPE), K0, xs, gates, False, C, GB, M, PRECISION)
            before = tl.where(sink, far, before)
            own_key = tl.where(sink, alone[:, None], own_key)
        logits = before + own_key * to_rows(load_tile(w, pid, m, C, M), DTYPE, PRECISION, C, GB)
        if OCCUPANCY:
            inverse_rows = to_rows(load_tile(inverse, pid, m, C, M), DTYPE, PRECISION, C, GB)
            log_rows = to_rows(load_tile(log_z, pid, m, C, M), DTYPE, PRECISION, C, GB)
            p = read(logits, inverse_rows, log_rows, scale) * inverse_rows
        else:
            p = read(logits, 1.0, 0.0, scale)

        if not ROOM:
            V0 = load_state(states, first, D, E, BE, M)
        # at padding dO counts as zero: with it everything that padding could receive is zero
        xo = load_rows(
            do, (row0 * H + h) * G * E + g0 * E, H * G * E, E,
            real_rows(positions, row0, count, G - g0, C, GB, HAS_POSITIONS), C, GB, E, BE,
        ).to(DTYPE)  # fmt: skip
        pairs, own_value = triangle(tl.dot(xo, tl.trans(z), input_precision=PRECISION), C, GB)
        pairs = pairs.to(DTYPE)
        passed = p * decayed(gates, DTYPE, PRECISION, C, GB, M)
        left = passed.to(DTYPE)
        gain = tl.dot(tl.trans(xo), left, input_precision=PRECISION)
        add_state(adjoint, gain, first, D, again, E, BE, M)
        if LINEAR:
            crossing = tl.sum(gain * V0.to(tl.float32), axis=0)
        A, met_here = weights(p, passed, left, pairs, gates, True, LINEAR, C, GB, M, PRECISION)
        dy = tl.dot(tl.trans(A), xo, input_precision=PRECISION)
        add_rows(dv, dy, (row0 * H + h) * E, H * E, columns, again, C, E, BE)
        add_tile(met, met_here, pid, m, again, C, M)
        dp, crossed = reads(xo, pairs, V0, p, gates, LINEAR, C, GB, M, PRECISION)
        read_rows = p * dp
        # made anew, like other tiles of rows here: one that waits for its use costs 32 registers, which are not there
        own_w = to_rows(load_tile(w, pid, m, C, M), DTYPE, PRECISION, C, GB)
        dp_p = read_rows + p * own_value[:, None] * own_w
        before = logits - own_key * own_w
        total = tl.sum(dp_p, axis=1)[:, None]
        if OCCUPANCY:
            inverse_rows = to_rows(load_tile(inverse, pid, m, C, M), DTYPE, PRECISION, C, GB)
            dl = scale * (dp_p * inverse_rows - p * total)
            dz = over_heads(-p * total - dl * logits * inverse_rows, True, DTYPE, PRECISION, C, GB)
            dz *= tl.exp(load_tile(L, pid, m, C, M))
            at = d_occupancy + pid.to(tl.int64) * M + m
            tl.store(at, tl.sum(dz, axis=0) + tl.load(at, mask=(m >= 0) & again, other=0.0))
            z0 = tl.load(occupancy + pid.to(tl.int64) * M + m)[None, :]
            add_tile(z_rows, dz * (z0 - 1.0), pid, m, again, C, M)
        else:
            dl = scale * (dp_p - p * total)
        store_rows(dlogits, dl, row0 * dl_t + h * dl_h + g0 * dl_g, dl_t, dl_g, live, C, GB, M, M)
        add_tile(rows, over_heads(read_rows + dl * before, True, DTYPE, PRECISION, C, GB), pid, m, again, C, M)
        value = over_heads(p * own_value[:, None] + dl * own_key, False, DTYPE, PRECISION, C, GB)
        add_tile(own, value, pid, m, again, C, M)
        if HAS_SINK:
            passed = dl * decayed(gates, DTYPE, PRECISION, C, GB, M)
            left = tl.where(sink, 0.0, passed).to(DTYPE)
            gain = tl.dot(tl.trans(xq), left, input_precision=PRECISION)
            left = tl.where(sink, passed, 0.0).to(DTYPE)
            gain = tl.dot(tl.trans(xs), left, gain, input_precision=PRECISION)
        else:
            left = (dl * decayed(gates, DTYPE, PRECISION, C, GB, M)).to(DTYPE)
            gain = tl.dot(tl.trans(xq), left, input_precision=PRECISION)
        add_state(adjoint, gain, first, 0, again, D, BD, M)
        if LINEAR:
            # across the chunk's first token lies what all rows read of the state, and nothing else
            crossing += tl.sum(gain * K0.to(tl.float32), axis=0)
            add_tile(across, tl.where((d == 0)[:, None], crossing[None, :], crossed), pid, m, again, C, M)
        tl.debug_barrier()


@triton.jit
def flow(u, x, y, K0, gates, dy, met, across, LINEAR: tl.constexpr, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of rows x [R,D] that read K0 [D,M] and columns y [C,D] with a gradient u [R,M]; and, added up: dy
    [C,D], met and across [C,M]."""
    classes = gates[6]
    pairs, _own = triangle(tl.dot(x, tl.trans(y), input_precision=PRECISION), C, GB)
    pairs = pairs.to(x.dtype)
    passed = u * decayed(gates, x.dtype, PRECISION, C, GB, M)
    left = passed.to(x.dtype)
    A, met_here = weights(u, passed, left, pairs, gates, True, LINEAR, C, GB, M, PRECISION)
    met += met_here
    if LINEAR:
        if classes > 0:
            _total, crossed = reads(x, pairs, K0, u, gates, True, C, GB, M, PRECISION)
            across += crossed
    dx = tl.dot(left, tl.trans(K0), input_precision=PRECISION)  # last: it is the largest tile
    dx = tl.dot(A, y, dx, input_precision=PRECISION)
    dy = tl.dot(tl.trans(A), x, dy, input_precision=PRECISION)
    return dx, dy, met, across


@triton.jit(do_not_specialize=["T", "chunks_per_row", "heads"])
def outer_kernel(
    q, q_sink, k, v, table, states, adjoint, L, label, anchors, written, later, left, last, dlogits, dq, dq_sink, dk,
    dv, met, after, across, through,
    T, chunks_per_row, H, heads, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dl_t, dl_h, dl_g,
    PACKED: tl.constexpr, LINEAR: tl.constexpr, SINKS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """One chunk and kv head, GB query heads at a time: dq [B,T,H*G,D], dk [B,T,H,D]; adds to dv what flows through the
    memory after the chunk, and to met and across [n,H,C,M] the keys' part; after [n,H,C,M] is the gradient of what a
    token left in that memory, through [n,H,M] that of the memory before the chunk's decay."""
    pid = tl.program_id(0)
    chunk, h = pid // heads, pid % heads
    batch, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = batch * T + begin
    DTYPE = states.dtype.element_ty
    gates = written, later, L, label, anchors, pid, load_classes(last, pid, BLOCKS)
    first = pid.to(tl.int64) * ((D + E) * M)
    m = tl.arange(0, M)
    columns = row_mask(count, 1, C, 1)
    y = load_rows(k, batch * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD).to(DTYPE)
    K0 = load_state(states, first, 0, D, BD, M)
    dy = tl.zeros([C, BD], tl.float32)
    met_here, crossed = tl.zeros([C, M], tl.float32), tl.zeros([C, M], tl.float32)
    for g0 in range(0, G, GB):
        live = row_mask(count, G - g0, C, GB)
        q_first = batch * q_b + begin * q_t + (h * G + g0) * q_h
        at = (row0 * H + h) * G * D + g0 * D
        dl = load_rows(dlogits, row0 * dl_t + h * dl_h + g0 * dl_g, dl_t, dl_g, live, C, GB, M, M)
        tl.debug_barrier()  # dq may lie in the same place
        x = load_rows(q, q_first, q_t, q_h, live, C, GB, D, BD).to(DTYPE)
        u = dl
        if HAS_SINK:
            u = tl.where((m < SINKS)[None, :], 0.0, dl)
        dx, dy, met_here, crossed = flow(u, x, y, K0, gates, dy, met_here, crossed, LINEAR, C, GB, M, PRECISION)
        store_rows(dq, dx, at, H * G * D, D, live, C, GB, D, BD)
        if HAS_SINK:
            x = load_rows(q_sink, q_first, q_t, q_h, live, C, GB, D, BD).to(DTYPE)
            dx, dy, met_here, crossed = flow(
                dl - u, x, y, K0, gates, dy, met_here, crossed, LINEAR, C, GB, M, PRECISION
            )
            store_rows(dq_sink, dx, at, H * G * D, D, live, C, GB, D, BD)
    add_tile(met, met_here, pid, m, True, C, M)
    if LINEAR:
        add_tile(across, crossed, pid, m, True, C, M)

    remaining = load_tile(left, pid, m, C, M)
    dK = load_state(adjoint, first, 0, D, BD, M)
    gone = K0.to(tl.float32) * dK.to(tl.float32)
    held = tl.dot(y, dK, input_precision=PRECISION)
    dy = tl.dot(remaining, tl.trans(dK), dy, input_precision=PRECISION)
    store_rows(dk, dy, (row0 * H + h) * D, H * D, 0, columns, C, 1, D, BD)
    dV = load_state(adjoint, first, D, E, BE, M)
    passed = load_state(states, first, D, E, BE, M).to(tl.float32) * dV.to(tl.float32)
    if BD == BE:  # one sum is cheaper than two
        gone = tl.sum(gone + passed, axis=0)
    else:
        gone = tl.sum(gone, axis=0) + tl.sum(passed, axis=0)
    y = load_rows(v, batch * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE).to(DTYPE)
    held = tl.dot(y, dV, held, input_precision=PRECISION)
    dy = tl.dot(remaining, tl.trans(dV), input_precision=PRECISION)
    add_rows(dv, dy, (row0 * H + h) * E, H * E, columns, True, C, E, BE)
    store_tile(after, held, pid, m, C, M)
    tl.store(through + pid.to(tl.int64) * M + m, gone)
