"""Triton kernels of the gates: from logits to what the other kernels read of them, and the gradient back.

    gates_kernel       log alpha and write weights of a chunk; cumulative decays, their classes (tile.py) and anchors
    occupancy_kernel   backward, after the scan: what a normalised read needs of the occupancy at each token
    logits_kernel      backward: from the gradients of decays and write weights to those of the gates' inputs

They are elementwise but for sums over a chunk's tokens, so a program takes BM of the M slots: little code and few
registers, where a whole tile would take 12,000 instructions, more than a multiprocessor's cache holds.

Shape legend: spec.py, tile.py; n = chunks, BM slots of a program.
"""

import triton
import triton.language as tl

from .functions import expm1, log1p, sigmoid
from .tile import SPAN, chunk_span, load_tile, occupied, store_tile, sum_tokens

FLOOR = tl.constexpr(-60.0)  # least log alpha of one token: e^-60 is nothing beside a write, yet no denormal


@triton.jit
def load_positions(positions, row0, count, C: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Position [C] of each token, -1 for padding and outside the chunk; without positions 0 where there is a token."""
    t = tl.arange(0, C)
    if HAS_POSITIONS:
        return tl.load(positions + row0 + t, mask=t < count, other=-1).to(tl.int32)
    else:
        return tl.where(t < count, 0, -1)


@triton.jit
def ring_turn(position, RING: tl.constexpr, SINKS: tl.constexpr):
    """Slot on turn at a position (spec.GSASpec.turn)."""
    return tl.where(position < RING, position, SINKS + (position - RING) % (RING - SINKS))


@triton.jit
def load_turns(turns, position, row0, count, h, H, C: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr,
               HAS_TURNS: tl.constexpr):  # fmt: skip
    """Slot on turn [C] for each token of a chunk: given by turns [B,T,H], else by position."""
    if HAS_TURNS:
        t = tl.arange(0, C)
        return tl.load(turns + (row0 + t) * H + h, mask=t < count, other=-1)
    elif RING:
        return ring_turn(position, RING, SINKS)
    else:
        return position


@triton.jit
def load_gates(gate, s, write, keep, position, turn, row0, count, h, H, rate, m, FORM: tl.constexpr,
               RING: tl.constexpr, HAS_S: tl.constexpr, C: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Gates of one chunk, head and slots m [BM], as spec.gates: (log alpha floored, write weight, pre-activation), each
    [C,BM]. turn [C]: the slot on turn; rate = 1 / damping."""
    t = tl.arange(0, C)
    first = (row0 * H + h) * M
    at = (t * (H * M))[:, None] + m[None, :]
    x = tl.load(gate + first + at, mask=(t < count)[:, None], other=0.0).to(tl.float32)
    if RING:
        on = tl.load(write + h * M + m).to(tl.float32)
        off = tl.load(keep + h * M + m).to(tl.float32)
        bias = tl.where(turn[:, None] == m[None, :], on[None, :], off[None, :])
    else:
        bias = 0.0
    if FORM == "sigmoid":
        x += bias
        log_alpha = -(tl.maximum(-x, 0.0) + log1p(tl.exp(-tl.abs(x)))) * rate
        w = -expm1(log_alpha)
    elif FORM == "linear":
        x = x * rate + bias
        w = tl.minimum(tl.maximum(x, 0.0), 1.0)
        log_alpha = tl.where(w < 1.0, log1p(-tl.where(w < 1.0, w, 0.0)), FLOOR)
    else:
        log_alpha = x
        w = -expm1(log_alpha)
    if HAS_S:
        w = tl.load(s + first + at, mask=(t < count)[:, None], other=0.0).to(tl.float32)
    real = (position >= 0)[:, None]
    return tl.where(real, tl.maximum(log_alpha, FLOOR), 0.0), tl.where(real, w, 0.0), x


@triton.jit
def classify(log_alpha, FORM: tl.constexpr):
    """[C,M] log alpha -> class of every token, int32, from 0 and under C.

    A gate is a break where log alpha < -16; in the linear form, whose d alpha is d log alpha / alpha, already where
    alpha < 1/4, so that its d log alpha is summed without cancellation. Counted in whole numbers of SPAN / 2^17 nats, a
    break as 2^17: a later token's class is never smaller, and a break always begins one. (A chunk's first token has
    nothing before it to break with.)"""
    if FORM == "linear":
        broken = log_alpha < -1.3862944
    else:
        broken = log_alpha < -16.0
    steps = tl.where(broken, 1 << 17, (log_alpha * (-(1 << 17) / SPAN)).to(tl.int32))
    steps = tl.where((tl.arange(0, log_alpha.shape[0]) > 0)[:, None], steps, 0)
    return tl.cumsum(steps, axis=0) >> 17


@triton.jit(do_not_specialize=["T", "chunks_per_row", "heads", "positions", "turns"])
def gates_kernel(
    gate, s, write, keep, positions, turns, table, L, label, anchors, written, later, left, w, last,
    T, chunks_per_row, H, heads, rate,
    PACKED: tl.constexpr, FORM: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, HAS_S: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_TURNS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of one chunk, head and BM slots:

    Tiles [n,H,C,M]: L = cumulative log alpha; label (int8) = class; w = write weight, in forward in the place of
    anchors; in the matrix products' type: written = w times `col` in class 0, later = the same in the others, left = w
    times the decay from the token to the chunk's end.
    anchors [n,H,C,M]: L at the first token of every class, by label; last [n,H,M/BM]: the largest label of these slots.
    """
    pid = tl.program_id(0)
    chunk, h = pid // heads, pid % heads
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row0 = row * T + begin
    position = load_positions(positions, row0, count, C, HAS_POSITIONS)
    turn = load_turns(turns, position, row0, count, h, H, C, RING, SINKS, HAS_TURNS)
    log_alpha, weight, _x = load_gates(
        gate, s, write, keep, position, turn, row0, count, h, H, rate, m, FORM, RING, HAS_S, C, M
    )
    # through memory, or the compiler works the gates out anew in every layout that needs them
    store_tile(L, log_alpha, pid, m, C, M)
    store_tile(w, weight, pid, m, C, M)
    tl.debug_barrier()
    log_alpha, weight = load_tile(L, pid, m, C, M), load_tile(w, pid, m, C, M)
    total, labels = tl.cumsum(log_alpha, axis=0), classify(log_alpha, FORM)
    classes = tl.max(labels)
    tl.debug_barrier()
    tl.store(last + pid * (M // BM) + tl.program_id(1), classes)
    store_tile(L, total, pid, m, C, M)
    tl.debug_barrier()
    first_token = tl.load(L + pid.to(tl.int64) * (C * M) + m)[None, :]
    begin_of_class = tl.zeros([C, BM], tl.float32) + first_token
    for c in range(1, classes + 1):
        anchor = tl.max(tl.where(labels == c, total, -3e38), axis=0)  # where the class has no member any number will do
        tl.store(anchors + (pid.to(tl.int64) * C + c) * M + m, anchor)
        begin_of_class = tl.where(labels == c, anchor[None, :], begin_of_class)
    since = total - begin_of_class
    store_tile(label, labels, pid, m, C, M)
    here = tl.exp(-since) * weight
    store_tile(written, tl.where(labels == 0, here, 0.0), pid, m, C, M)
    if classes > 0:
        store_tile(later, here, pid, m, C, M)
    t = tl.arange(0, C)
    to_end = tl.exp(sum_tokens(t[None, :] > t[:, None], log_alpha, True, DTYPE, PRECISION))
    store_tile(left, to_end * weight, pid, m, C, M)


@triton.jit
def occupancy_kernel(
    occupancy, L, inverse, log_z, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Tiles [n,H,C,M]: 1 / z and log2 z of the occupancy z after each token. (In forward each is needed once, and is
    made where it is.)"""
    pid = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    inverted, logarithm = occupied(occupancy, L, pid, m, C, M)
    store_tile(inverse, inverted, pid, m, C, M)
    store_tile(log_z, logarithm, pid, m, C, M)


@triton.jit(do_not_specialize=["T", "chunks_per_row", "heads", "positions", "turns"])
def logits_kernel(
    gate, s, write, keep, positions, turns, table, occupancy, d_occupancy, L, label, anchors, last, own, rows, met,
    after, across, z_rows, through, dgate, ds, d_bias,
    T, chunks_per_row, H, heads, rate,
    PACKED: tl.constexpr, FORM: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    HAS_S: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_TURNS: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """From the sums of backward.py, tiles [n,H,C,M] but for through [n,H,M], to dgate [B,T,H,M], ds (if s was given)
    and the chunk's part of the gradients of write and keep, d_bias [n,H,2,M]."""
    pid = tl.program_id(0)
    chunk, h = pid // heads, pid % heads
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    bias_at = (chunk.to(tl.int64) * H + h) * (2 * M) + m
    if count <= 0:
        if RING:
            tl.store(d_bias + bias_at, tl.zeros([BM], tl.float32))
            tl.store(d_bias + bias_at + M, tl.zeros([BM], tl.float32))
        return
    row0 = row * T + begin
    position = load_positions(positions, row0, count, C, HAS_POSITIONS)
    turn = load_turns(turns, position, row0, count, h, H, C, RING, SINKS, HAS_TURNS)
    log_alpha, weight, x = load_gates(
        gate, s, write, keep, position, turn, row0, count, h, H, rate, m, FORM, RING, HAS_S, C, M
    )
    t = tl.arange(0, C)
    from_here, before = t[None, :] >= t[:, None], t[None, :] < t[:, None]
    at = pid.to(tl.int64) * M + m
    tile_at = pid.to(tl.int64) * (C * M) + m
    end = tl.load(L + tile_at + (C - 1) * M)
    first_token = tl.load(L + tile_at)
    after_chunk = tl.exp(end - first_token) * tl.load(through + at)
    begin_of_class = tl.zeros([C, BM], tl.float32) + first_token[None, :]
    for c in range(1, tl.load(last + pid * (M // BM) + tl.program_id(1)) + 1):
        anchor = tl.load(anchors + (pid.to(tl.int64) * C + c) * M + m)
        begin_of_class = tl.where(load_tile(label, pid, m, C, M) == c, anchor[None, :], begin_of_class)
    column = tl.exp(begin_of_class - load_tile(L, pid, m, C, M))  # `col`
    met_here = load_tile(met, pid, m, C, M)
    inner_w = met_here * column
    # of what rows read of a token after t nothing may be left in the sum at t: so with the rounded weight of `reads`
    inside = load_tile(rows, pid, m, C, M) - met_here * (column * weight).to(DTYPE).to(tl.float32)
    if OCCUPANCY:
        after_chunk += tl.exp(end) * tl.load(d_occupancy + at) * (tl.load(occupancy + at) - 1.0)
        z = load_tile(z_rows, pid, m, C, M)
        inside += z
    grad_log = sum_tokens(from_here, inside, True, DTYPE, PRECISION)
    if FORM == "linear":
        # at the start of a class the common sum is of large terms that cancel, the gradient is what crosses it
        crossing = load_tile(across, pid, m, C, M)
        if OCCUPANCY:
            crossing += sum_tokens(from_here, z, True, DTYPE, PRECISION)
        grad_log = tl.where(begins_class(label, pid, m, C, M), crossing, grad_log)
    to_end = tl.exp(sum_tokens(t[None, :] > t[:, None], log_alpha, True, DTYPE, PRECISION))
    outer_w = load_tile(after, pid, m, C, M) * to_end
    grad_log += sum_tokens(before, weight * outer_w, True, DTYPE, PRECISION) + after_chunk[None, :]
    grad_w = load_tile(own, pid, m, C, M) + inner_w + outer_w
    at = (row0 * H + h) * M + (t * (H * M))[:, None] + m[None, :]
    mask = (t < count)[:, None]
    real = (position >= 0)[:, None]
    if HAS_S:
        tl.store(ds + at, tl.where(real, grad_w, 0.0), mask=mask)
        grad_w = tl.zeros([C, BM], tl.float32)
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
    tl.store(dgate + at, (grad_x * slope).to(dgate.dtype.element_ty), mask=mask)
    if RING:
        on = turn[:, None] == m[None, :]
        tl.store(d_bias + bias_at, tl.sum(tl.where(on, grad_x, 0.0), axis=0))
        tl.store(d_bias + bias_at + M, tl.sum(tl.where(on, 0.0, grad_x), axis=0))


@triton.jit
def begins_class(label, pid, m, C: tl.constexpr, M: tl.constexpr):
    """[C,BM]: is the token the first of its class (the chunk's first token is)."""
    t = tl.arange(0, C)
    at = label + pid.to(tl.int64) * (C * M) + ((t * M)[:, None] + m[None, :])
    before = tl.load(at - M, mask=(t > 0)[:, None] & (m >= 0)[None, :], other=-1)
    return tl.load(at) > before
