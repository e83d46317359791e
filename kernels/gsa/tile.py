"""What the Triton kernels share: the gates of one chunk, products of decays that cannot overflow, and masked meetings.

Inside a chunk token i reads what token j <= i wrote, times e^{L_i - L_j} with L the cumulative log decay of a slot.
Factored as e^{L_i} e^{-L_j} that overflows as soon as a gate is hard. So the tokens of a slot fall into classes: a new
class begins at each hard gate (a *break*, log alpha < BREAK) and whenever soft decay has added up to SPAN. Columns of
one class meet all rows of that class and later ones in one matrix product, with

    e^{L_i - L_j} = e^{L_i - a} e^{a - L_j} = row_i col_j,      a = L at the first token of the column's class

row is in [0, 1], col in [1, e^SPAN]: nothing overflows, for any gates. Slow gates need one product a chunk, a clock
with R slots and S sinks 1 + C / (R - S), and only gates that are hard at every token as many as there are tokens.

Shape legend: spec.py; a tile has C tokens (columns) and R = C * GB rows: 8 tokens of the first of GB query heads, the
same 8 tokens of the next, and so on, so that with two heads a thread's rows r and r + 8 of a tensor core's tile are the
same token.
"""

import triton
import triton.language as tl

SPAN = tl.constexpr(32.0)  # a power of two, so that dividing by it is exact; e^32 leaves bfloat16 and float32 room
FLOOR = tl.constexpr(-60.0)  # least log alpha of one token: e^-60 is nothing beside a write, yet no denormal
EMPTY = tl.constexpr(2.0**-100)  # spec.EMPTY


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 to float32 precision, also near 0."""
    taylor = 1.0 + x / 8
    taylor = 1.0 + x / 7 * taylor
    taylor = 1.0 + x / 6 * taylor
    taylor = 1.0 + x / 5 * taylor
    taylor = 1.0 + x / 4 * taylor
    taylor = 1.0 + x / 3 * taylor
    taylor = 1.0 + x / 2 * taylor
    return tl.where(x > -0.5, x * taylor, tl.exp(x) - 1.0)


@triton.jit
def atanh_series(w):
    """2 atanh(w) for |w| < 0.18 to float32 precision."""
    w2 = w * w
    return 2.0 * w * (1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * (1.0 / 9)))))


@triton.jit
def split(x):
    """Normal x > 0 -> (exponent e, mantissa m in [0.707, 1.414)) with x = m 2^e."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    return e.to(tl.float32), (bits - (e << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """log x for normal x > 0 to float32 precision, in a third of the library's instructions."""
    e, m = split(x)
    return e * 0.6931471805599453 + atanh_series((m - 1.0) / (m + 1.0))


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1 to float32 precision, also near 0: there 2 atanh(x / (2 + x))."""
    small = (x > -0.29) & (x < 0.41)
    e, m = split(tl.where(small, 1.0, 1.0 + x))
    w = tl.where(small, x, m - 1.0) / tl.where(small, 2.0 + x, m + 1.0)
    return e * 0.6931471805599453 + atanh_series(w)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), finite for every x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def chunk_span(table, chunk, T, chunks_per_row, C: tl.constexpr, PACKED: tl.constexpr):
    """(batch row, its first token, number of tokens) of a chunk; table [n,2]: first token and count, when packed."""
    if PACKED:
        row = chunk * 0
        begin = tl.load(table + 2 * chunk).to(tl.int64)
        count = tl.load(table + 2 * chunk + 1).to(tl.int32)
    else:
        row = chunk // chunks_per_row
        begin = ((chunk % chunks_per_row) * C).to(tl.int64)
        count = tl.minimum(C, T - begin).to(tl.int32)
    return row.to(tl.int64), begin, count


@triton.jit
def row_token(C: tl.constexpr, GB: tl.constexpr):
    """[R]: token of each row of a tile."""
    r = tl.arange(0, C * GB)
    return r // (8 * GB) * 8 + r % 8


@triton.jit
def row_head(C: tl.constexpr, GB: tl.constexpr):
    """[R]: query head of each row of a tile, from 0."""
    return tl.arange(0, C * GB) // 8 % GB


@triton.jit
def row_mask(count, heads, C: tl.constexpr, GB: tl.constexpr):
    """[R]: rows of tokens before `count` and of heads before `heads`."""
    return (row_token(C, GB) < count) & (row_head(C, GB) < heads)


@triton.jit
def real_rows(positions, row0, count, heads, C: tl.constexpr, GB: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """`row_mask` without padding, whose position is -1."""
    mask = row_mask(count, heads, C, GB)
    if HAS_POSITIONS:
        mask = mask & (tl.load(positions + row0 + row_token(C, GB), mask=mask, other=-1) >= 0)
    return mask


@triton.jit
def load_rows(x, first, stride_t, stride_h, mask, C: tl.constexpr, GB: tl.constexpr, D: tl.constexpr,
              BD: tl.constexpr):  # fmt: skip
    """[C*GB,BD] tile of GB neighbouring heads of C tokens from x + first, zero outside the mask [R] and from D on."""
    d = tl.arange(0, BD)
    at = (row_token(C, GB) * stride_t + row_head(C, GB) * stride_h)[:, None] + d[None, :]
    return tl.load(x + first + at, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, first, stride_t, stride_h, mask, C: tl.constexpr, GB: tl.constexpr, D: tl.constexpr,
               BD: tl.constexpr):  # fmt: skip
    """The counterpart of `load_rows`."""
    d = tl.arange(0, BD)
    at = (row_token(C, GB) * stride_t + row_head(C, GB) * stride_h)[:, None] + d[None, :]
    tl.store(x + first + at, value.to(x.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def add_rows(x, value, first, stride_t, mask, again, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """x += value [C,BD] for one head of C tokens; x = value unless `again`."""
    t, d = tl.arange(0, C), tl.arange(0, BD)
    mask = mask[:, None] & (d < D)[None, :]
    at = x + first + ((t * stride_t)[:, None] + d[None, :])
    value += tl.load(at, mask=mask & again, other=0.0).to(tl.float32)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_state(states, first, row0, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr):
    """[BD,M] block of a chunk's state, features from row0 on, zero from D on."""
    d, m = tl.arange(0, BD), tl.arange(0, M)
    return tl.load(states + (first + row0 * M) + (d[:, None] * M + m[None, :]), mask=(d < D)[:, None], other=0.0)


@triton.jit
def add_state(states, value, first, row0, again, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr):
    """Block of a chunk's state += value [BD,M]; = value unless `again`."""
    d, m = tl.arange(0, BD), tl.arange(0, M)
    mask = (d < D)[:, None] & (m >= 0)[None, :]
    at = states + (first + row0 * M) + (d[:, None] * M + m[None, :])
    value += tl.load(at, mask=mask & again, other=0.0).to(tl.float32)
    tl.store(at, value.to(states.dtype.element_ty), mask=mask)


@triton.jit
def load_positions(positions, row0, count, C: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Position [C] of each token, -1 for padding and outside the chunk; without positions 0 where there is a token."""
    t = tl.arange(0, C)
    if HAS_POSITIONS:
        return tl.load(positions + row0 + t, mask=t < count, other=-1).to(tl.int32)
    else:
        return tl.where(t < count, 0, -1)


@triton.jit
def on_turn(position, RING: tl.constexpr, SINKS: tl.constexpr, M: tl.constexpr):
    """[C,M]: is the slot on turn (spec.GSASpec.turn)."""
    turn = tl.where(position < RING, position, SINKS + (position - RING) % (RING - SINKS))
    return turn[:, None] == tl.arange(0, M)[None, :]


@triton.jit
def load_gates(gate, s, write, keep, position, row0, count, h, H, rate, FORM: tl.constexpr, RING: tl.constexpr,
               SINKS: tl.constexpr, HAS_S: tl.constexpr, C: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Gates of one chunk and head, as spec.gates: (log alpha floored, write weight, pre-activation), each [C,M].
    rate = 1 / damping."""
    t, m = tl.arange(0, C), tl.arange(0, M)
    first = (row0 * H + h) * M
    at = (t * (H * M))[:, None] + m[None, :]
    x = tl.load(gate + first + at, mask=(t < count)[:, None], other=0.0).to(tl.float32)
    if RING:
        on = tl.load(write + h * M + m).to(tl.float32)
        off = tl.load(keep + h * M + m).to(tl.float32)
        bias = tl.where(on_turn(position, RING, SINKS, M), on[None, :], off[None, :])
    else:
        bias = tl.zeros([C, M], tl.float32)
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


@triton.jit
def time_sum(x, LATER: tl.constexpr, OWN: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr):
    """[C,M] -> sum over later (else earlier) tokens, with the token's own if OWN. A product with a triangle of ones, as
    sums of terms of one sign keep their relative precision (a difference of two cumulative sums would not) and scans in
    reverse are slow. For bfloat16 inputs x is split into two terms, which keeps 16 bits."""
    t, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    taken = (i > t) if LATER else (i < t)
    if OWN:
        taken = taken | (i == t)
    ones = tl.where(taken, 1.0, 0.0).to(DTYPE)
    high = x.to(DTYPE)
    total = tl.dot(ones, high, input_precision="ieee")
    if DTYPE == tl.bfloat16:
        total = tl.dot(ones, (x - high.to(tl.float32)).to(DTYPE), total)
    return total


@triton.jit
def load_tile(x, pid, C: tl.constexpr, M: tl.constexpr):
    """[C,M] tile of scratch that is laid out chunk by chunk."""
    at = (tl.arange(0, C) * M)[:, None] + tl.arange(0, M)[None, :]
    return tl.load(x + pid.to(tl.int64) * (C * M) + at).to(tl.float32)


@triton.jit
def add_tile(x, value, pid, again, C: tl.constexpr, M: tl.constexpr):
    """[C,M] tile of scratch += value; = value unless `again`."""
    t, m = tl.arange(0, C), tl.arange(0, M)
    at = x + pid.to(tl.int64) * (C * M) + ((t * M)[:, None] + m[None, :])
    mask = (t >= 0)[:, None] & (m >= 0)[None, :]
    value += tl.load(at, mask=mask & again, other=0).to(tl.float32)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def begins_class(label, pid, C: tl.constexpr, M: tl.constexpr):
    """[C,M]: is the token the first of its class (the chunk's first token is)."""
    t, m = tl.arange(0, C), tl.arange(0, M)
    at = label + pid.to(tl.int64) * (C * M) + ((t * M)[:, None] + m[None, :])
    before = tl.load(at - M, mask=(t > 0)[:, None] & (m >= 0)[None, :], other=-1)
    return tl.load(at) > before


@triton.jit
def factors(anchors, pid, L, label, c, C: tl.constexpr, M: tl.constexpr):
    """(row, col), each [C,M], of columns of class c: see the module's text."""
    anchor = tl.load(anchors + (pid.to(tl.int64) * C + c) * M + tl.arange(0, M))[None, :]
    row = tl.where(label >= c, tl.exp(tl.minimum(L - anchor, 0.0)), 0.0)
    col = tl.where(label == c, tl.exp(tl.minimum(anchor - L, SPAN)), 0.0)
    return row, col


@triton.jit
def to_rows(x, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr):
    """[C,M] -> [C*GB,M]: every query head of a token gets its token's values."""
    if GB > 1:
        x = tl.reshape(x, [C // 8, 1, 8, M])
        x = tl.reshape(tl.broadcast_to(x, [C // 8, GB, 8, M]), [C * GB, M])
    return x


@triton.jit
def over_heads(x, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr):
    """[C*GB,M] -> [C,M]: sum over the query heads of a token."""
    if GB > 1:
        x = tl.reshape(tl.sum(tl.reshape(x, [C // 8, GB, 8, M]), axis=1), [C, M])
    return x


@triton.jit
def triangle(S, C: tl.constexpr, GB: tl.constexpr):
    """[R,C] -> (part strictly before the row's token, value at the row's token [R])."""
    row, col = row_token(C, GB), tl.arange(0, C)
    same = row[:, None] == col[None, :]
    return tl.where(row[:, None] > col[None, :], S, 0.0), tl.sum(tl.where(same, S, 0.0), axis=1)


@triton.jit
def meet(x, y, state, w, L, label, anchors, pid, last, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
    """Rows x [R,D] with what slots hold of y: sum_j e^{L_i - L_j} w_j (x_i . y_j) and the same with the chunk's first
    state [D,M].

    Returns the pairs x_i . y_j of earlier tokens [R,C] in x's type, x_i . y_i [R], and [R,M]: part from the state, part
    from earlier tokens of the chunk. (The token's own part is x_i . y_i w_i.)
    """
    pairs, own = triangle(tl.dot(x, tl.trans(y), input_precision=PRECISION), C, GB)
    pairs = pairs.to(x.dtype)
    before = tl.dot(x, state, input_precision=PRECISION) * to_rows(tl.exp(L), C, GB, M)
    within = tl.zeros([C * GB, M], tl.float32)
    for c in range(0, last + 1):
        row, col = factors(anchors, pid, L, label, c, C, M)
        met = tl.dot(pairs, (col * w).to(x.dtype), input_precision=PRECISION)
        within += met * to_rows(row, C, GB, M)
    return pairs, own, before, within


@triton.jit
def spread(p, own, w, L, label, anchors, pid, last, DTYPE: tl.constexpr, C: tl.constexpr, GB: tl.constexpr,
           M: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Slot weights p [R,M] -> token weights [R,C]: sum_m p_i e^{L_i - L_j} w_j for j < i, and own [R] at j = i."""
    A = tl.zeros([C * GB, C], tl.float32)
    for c in range(0, last + 1):
        row, col = factors(anchors, pid, L, label, c, C, M)
        left = (p * to_rows(row, C, GB, M)).to(DTYPE)
        A = tl.dot(left, tl.trans((col * w).to(DTYPE)), A, input_precision=PRECISION)
    return with_own(A, own, C, GB)


@triton.jit
def with_own(A, own, C: tl.constexpr, GB: tl.constexpr):
    """[R,C] with everything before the row's token kept, `own` [R] at it and 0 after it."""
    row, col = row_token(C, GB), tl.arange(0, C)
    A = tl.where(row[:, None] > col[None, :], A, 0.0)
    return tl.where(row[:, None] == col[None, :], own[:, None], A)


@triton.jit
def slot_occupancy(occupancy, pid, L, C: tl.constexpr, M: tl.constexpr):
    """[C,M] occupancy z after each token: z_0 e^L + (1 - e^L), as every write weight is one minus its decay."""
    z0 = tl.load(occupancy + pid.to(tl.int64) * M + tl.arange(0, M))[None, :]
    return z0 * tl.exp(L) - expm1(L)


@triton.jit
def inverse_and_log(z):
    """1 / z and log z of an occupancy; 0 and -3e38 for an empty slot, which `read` then gives no weight."""
    present = z > EMPTY
    z = tl.where(present, z, 1.0)
    return tl.where(present, 1.0 / z, 0.0), tl.where(present, log(z), -3e38)


@triton.jit
def read(logits, inverse, log_z, scale):
    """Softmax over slots, as spec.read_weights: logits q.K [R,M] -> its weights, which times `inverse` are the weights
    on the slot values."""
    y = scale * logits * inverse + log_z
    e = tl.exp(y - tl.max(y, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]
