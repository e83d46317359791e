"""What the Triton kernels share: the gates of one chunk, products of decays that cannot overflow, and masked meetings.

Inside a chunk token i reads what token j <= i wrote, times e^{L_i - L_j} with L the cumulative log decay of a slot.
Factored as e^{L_i} e^{-L_j} that overflows as soon as a gate is hard. So the tokens of a slot fall into classes: a new
class begins at each hard gate (a *break*, log alpha < BREAK) and whenever soft decay has added up to SPAN. Columns of
one class meet all rows of that class and later ones in one matrix product, with

    e^{L_i - L_j} = e^{L_i - a} e^{a - L_j} = row_i col_j,      a = L at the first token of the column's class

row is in [0, 1], col in [1, e^SPAN]: nothing overflows, for any gates. Slow gates need one product a chunk, a clock with
R slots and S sinks 1 + C / (R - S), and only gates that are hard at every token as many as there are tokens.

Shape legend: spec.py; a tile has C tokens (columns) and R = C * GB rows, row r = query head r % GB of token r // GB.
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
def log1p(x):
    """log(1 + x) for x > -1 to float32 precision, also near 0: log(1 + x) = 2 atanh(x / (2 + x))."""
    w = x / (2.0 + x)
    w2 = w * w
    series = 2.0 * w * (1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * (1.0 / 9)))))
    small = (x > -0.3) & (x < 0.4)
    return tl.where(small, series, tl.log(tl.where(small, 1.0, 1.0 + x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), finite for every x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def feature(x, SILU: tl.constexpr):
    """The feature map of spec.py in float32, back in x's type."""
    if SILU:
        x32 = x.to(tl.float32)
        x = (x32 * sigmoid(x32)).to(x.dtype)
    return x


@triton.jit
def feature_slope(x, SILU: tl.constexpr):
    """Derivative of `feature` at x, float32."""
    x = x.to(tl.float32)
    if SILU:
        y = sigmoid(x)
        return y * (1.0 + x * (1.0 - y))
    else:
        return tl.full(x.shape, 1.0, tl.float32)


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
def load_rows(x, first, stride_t, stride_h, count, heads, C: tl.constexpr, GB: tl.constexpr, D: tl.constexpr,
              BD: tl.constexpr):  # fmt: skip
    """[C*GB,BD] tile of GB neighbouring heads of C tokens from x + first, zero outside count, heads and D."""
    r = tl.arange(0, C * GB)
    d = tl.arange(0, BD)
    t, g = r // GB, r % GB
    mask = ((t < count) & (g < heads))[:, None] & (d < D)[None, :]
    at = (t * stride_t + g * stride_h)[:, None] + d[None, :]
    return tl.load(x + first + at, mask=mask, other=0.0)


@triton.jit
def store_rows(x, value, first, stride_t, stride_h, count, heads, C: tl.constexpr, GB: tl.constexpr, D: tl.constexpr,
               BD: tl.constexpr):  # fmt: skip
    """The counterpart of `load_rows`."""
    r = tl.arange(0, C * GB)
    d = tl.arange(0, BD)
    t, g = r // GB, r % GB
    mask = ((t < count) & (g < heads))[:, None] & (d < D)[None, :]
    at = (t * stride_t + g * stride_h)[:, None] + d[None, :]
    tl.store(x + first + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_state(states, first, row0, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr):
    """[BD,M] block of a chunk's state, features from row0 on, zero from D on."""
    d, m = tl.arange(0, BD), tl.arange(0, M)
    return tl.load(states + (first + row0 * M) + (d[:, None] * M + m[None, :]), mask=(d < D)[:, None], other=0.0)


@triton.jit
def store_state(states, value, first, row0, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr):
    """The counterpart of `load_state`."""
    d, m = tl.arange(0, BD), tl.arange(0, M)
    at = states + (first + row0 * M) + (d[:, None] * M + m[None, :])
    tl.store(at, value.to(states.dtype.element_ty), mask=(d < D)[:, None])


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
def load_gates(gate, s, write, keep, position, row0, count, h, H, damping, FORM: tl.constexpr, RING: tl.constexpr,
               SINKS: tl.constexpr, HAS_S: tl.constexpr, C: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Gates of one chunk and head, as spec.gates: (log alpha floored, write weight, pre-activation), each [C,M]."""
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
        log_alpha = -(tl.maximum(-x, 0.0) + log1p(tl.exp(-tl.abs(x)))) / damping
        w = -expm1(log_alpha)
    elif FORM == "linear":
        x = x / damping + bias
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
def is_break(log_alpha, FORM: tl.constexpr):
    """Where a class begins at a hard gate. In the linear form d alpha is d log alpha / alpha, so a gate counts as hard
    early: its d log alpha is then summed without cancellation."""
    if FORM == "linear":
        return log_alpha < -1.3862944
    else:
        return log_alpha < -16.0


@triton.jit
def classify(log_alpha, FORM: tl.constexpr):
    """[C,M] log alpha -> (cumulative log decay L, class label), float32."""
    broken = is_break(log_alpha, FORM)
    soft = tl.cumsum(tl.where(broken, 0.0, log_alpha), axis=0)
    breaks = tl.cumsum(tl.where(broken, 1.0, 0.0), axis=0)
    return tl.cumsum(log_alpha, axis=0), breaks + tl.floor(-soft / SPAN)


@triton.jit
def load_tile(x, pid, C: tl.constexpr, M: tl.constexpr):
    """[C,M] tile of scratch that is laid out chunk by chunk."""
    at = (tl.arange(0, C) * M)[:, None] + tl.arange(0, M)[None, :]
    return tl.load(x + pid.to(tl.int64) * (C * M) + at).to(tl.float32)


@triton.jit
def store_tile(x, value, pid, C: tl.constexpr, M: tl.constexpr):
    """The counterpart of `load_tile`."""
    at = (tl.arange(0, C) * M)[:, None] + tl.arange(0, M)[None, :]
    tl.store(x + pid.to(tl.int64) * (C * M) + at, value.to(x.dtype.element_ty))


@triton.jit
def begins_class(label, pid, C: tl.constexpr, M: tl.constexpr):
    """[C,M]: is the token the first of its class (the chunk's first token is)."""
    t, m = tl.arange(0, C), tl.arange(0, M)
    at = label + pid.to(tl.int64) * (C * M) + ((t * M)[:, None] + m[None, :])
    before = tl.load(at - M, mask=(t > 0)[:, None] & (m >= 0)[None, :], other=-1)
    return tl.load(at) > before


@triton.jit
def factors(L, label, c):
    """(row, col), each [C,M], of columns of class c: see the module's text."""
    member = label == c
    anchor = tl.max(tl.where(member, L, float("-inf")), axis=0)[None, :]
    anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
    row = tl.where(label >= c, tl.exp(tl.minimum(L - anchor, 0.0)), 0.0)
    col = tl.where(member, tl.exp(tl.minimum(anchor - L, SPAN)), 0.0)
    return row, col


@triton.jit
def to_rows(x, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr):
    """[C,M] -> [C*GB,M]: every query head of a token gets its token's values."""
    if GB > 1:
        x = tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), [C, GB, M]), [C * GB, M])
    return x


@triton.jit
def over_heads(x, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr):
    """[C*GB,M] -> [C,M]: sum over the query heads of a token."""
    if GB > 1:
        x = tl.sum(tl.reshape(x, [C, GB, M]), axis=1)
    return x


@triton.jit
def triangle(S, C: tl.constexpr, GB: tl.constexpr):
    """[R,C] -> (part strictly before the row's token, value at the row's token [R])."""
    row, col = tl.arange(0, C * GB) // GB, tl.arange(0, C)
    same = row[:, None] == col[None, :]
    return tl.where(row[:, None] > col[None, :], S, 0.0), tl.sum(tl.where(same, S, 0.0), axis=1)


@triton.jit
def meet(x, y, state, w, L, label, last, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr,
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
        row, col = factors(L, label, c)
        met = tl.dot(pairs, (col * w).to(x.dtype), input_precision=PRECISION)
        within += met * to_rows(row, C, GB, M)
    return pairs, own, before, within


@triton.jit
def spread(p, own, w, L, label, last, DTYPE: tl.constexpr, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Slot weights p [R,M] -> token weights [R,C]: sum_m p_i e^{L_i - L_j} w_j for j < i, and own [R] at j = i."""
    A = tl.zeros([C * GB, C], tl.float32)
    for c in range(0, last + 1):
        row, col = factors(L, label, c)
        left = (p * to_rows(row, C, GB, M)).to(DTYPE)
        A = tl.dot(left, tl.trans((col * w).to(DTYPE)), A, input_precision=PRECISION)
    return with_own(A, own, C, GB)


@triton.jit
def with_own(A, own, C: tl.constexpr, GB: tl.constexpr):
    """[R,C] with everything before the row's token kept, `own` [R] at it and 0 after it."""
    row, col = tl.arange(0, C * GB) // GB, tl.arange(0, C)
    A = tl.where(row[:, None] > col[None, :], A, 0.0)
    return tl.where(row[:, None] == col[None, :], own[:, None], A)


@triton.jit
def slot_occupancy(occupancy, pid, L, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr, OCCUPANCY: tl.constexpr):
    """[R,M] occupancy z after each token: z_0 e^L + (1 - e^L), as every write weight is one minus its decay."""
    if OCCUPANCY:
        z0 = tl.load(occupancy + pid.to(tl.int64) * M + tl.arange(0, M))[None, :]
        return to_rows(z0 * tl.exp(L) - expm1(L), C, GB, M)
    else:
        return tl.full([C * GB, M], 1.0, tl.float32)


@triton.jit
def read(logits, z, scale, OCCUPANCY: tl.constexpr):
    """Softmax over slots, as spec.read_weights: logits q.K [R,M], occupancy z [R,M] -> weights on the slot values."""
    if OCCUPANCY:
        present = z > EMPTY
        z = tl.where(present, z, 1.0)
        y = tl.where(present, scale * logits / z + tl.log(z), -3e38)
        e = tl.where(present, tl.exp(y - tl.max(y, axis=1)[:, None]), 0.0)
        total = tl.sum(e, axis=1)
        return e / tl.where(total > 0, total, 1.0)[:, None] / z
    else:
        y = scale * logits
        e = tl.exp(y - tl.max(y, axis=1)[:, None])
        return e / tl.sum(e, axis=1)[:, None]
