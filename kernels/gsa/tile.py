"""What the Triton kernels share: the gates of one chunk, products of decays that cannot overflow, and masked meetings.

Inside a chunk token i reads what token j <= i wrote, times e^{L_i - L_j} with L the cumulative log decay of a slot.
Factored as e^{L_i} e^{-L_j} that overflows as soon as a gate is hard. So the tokens of a slot fall into classes: a new
class begins at each hard gate (`gates.classify`) and whenever soft decay has added up to SPAN. Columns of
one class meet all rows of that class and later ones in one matrix product, with

    e^{L_i - L_j} = e^{L_i - a} e^{a - L_j} = row_i col_j,      a = L at the first token of the column's class

row is in [0, 1], col in [1, e^SPAN]: nothing overflows, for any gates. Slow gates need one product a chunk, a clock
with R slots and S sinks 1 + C / (R - S), and only gates that are hard at every token as many as there are tokens.

Functions that need a chunk's gates take them as one tuple, `gates`: tiles of scratch (gates.py), then the program's
chunk and head and the chunk's largest class: (written, later, L, label, anchors, pid, classes).

Shape legend: spec.py; a tile has C tokens (columns) and R = C * GB rows: 8 tokens of the first of GB query heads, the
same 8 tokens of the next, and so on, so that with two heads a thread's rows r and r + 8 of a tensor core's tile are the
same token.
"""

import triton
import triton.language as tl

from .functions import expm1, log

EMPTY = tl.constexpr(2.0**-100)  # spec.EMPTY
SPAN = tl.constexpr(32.0)  # a power of two, so that dividing by it is exact; e^32 leaves bfloat16 and float32 room


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
def sum_tokens(taken, x, SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """[.,R] of truths, x [R,M] -> sums of the rows taken. A product, as sums of terms of one sign keep their relative
    precision (a difference of two cumulative sums would not), and scans in reverse or over heads are slow. For bfloat16
    inputs x is rounded, or if SPLIT made of two terms, which keeps 16 bits."""
    ones = tl.where(taken, 1.0, 0.0).to(DTYPE)
    high = x.to(DTYPE)
    total = tl.dot(ones, high, input_precision=PRECISION)
    if SPLIT and DTYPE == tl.bfloat16:
        total = tl.dot(ones, (x - high.to(tl.float32)).to(DTYPE), total)
    return total


@triton.jit
def over_heads(x, SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, GB: tl.constexpr):
    """[C*GB,M] -> [C,M]: sum over the query heads of a token."""
    if GB > 1:
        x = sum_tokens(row_token(C, GB)[None, :] == tl.arange(0, C)[:, None], x, SPLIT, DTYPE, PRECISION)
    return x


@triton.jit
def load_tile(x, pid, m, C: tl.constexpr, M: tl.constexpr):
    """[C,BM]: slots m [BM] of a [C,M] tile of scratch that is laid out chunk by chunk."""
    at = (tl.arange(0, C) * M)[:, None] + m[None, :]
    return tl.load(x + pid.to(tl.int64) * (C * M) + at)


@triton.jit
def to_rows(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, GB: tl.constexpr):
    """[C,M] -> [R,M]: every query head of a token gets its token's values. A product with zeros and ones lays them out
    as the accumulators that they meet; loading the tile in that layout keeps the load unit busy five times as long."""
    return sum_tokens(row_token(C, GB)[:, None] == tl.arange(0, C)[None, :], x, True, DTYPE, PRECISION)


@triton.jit
def add_tile(x, value, pid, m, again, C: tl.constexpr, M: tl.constexpr):
    """Slots m [BM] of a [C,M] tile of scratch += value [C,BM]; = value unless `again`."""
    at = x + pid.to(tl.int64) * (C * M) + ((tl.arange(0, C) * M)[:, None] + m[None, :])
    mask = (tl.arange(0, C) >= 0)[:, None] & (m >= 0)[None, :]
    value += tl.load(at, mask=mask & again, other=0).to(tl.float32)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(x, value, pid, m, C: tl.constexpr, M: tl.constexpr):
    """Slots m [BM] of a [C,M] tile of scratch = value [C,BM]."""
    at = (tl.arange(0, C) * M)[:, None] + m[None, :]
    tl.store(x + pid.to(tl.int64) * (C * M) + at, value.to(x.dtype.element_ty))


@triton.jit
def load_classes(last, pid, BLOCKS: tl.constexpr):
    """The largest class of a chunk and head."""
    return tl.max(tl.load(last + pid * BLOCKS + tl.arange(0, BLOCKS)), axis=0)


@triton.jit
def decayed(gates, DTYPE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr):
    """[R,M]: `row` of class 0, of all tokens."""
    _written, _later, L, _label, _anchors, pid, _classes = gates
    m = tl.arange(0, M)
    first_token = tl.load(L + pid.to(tl.int64) * (C * M) + m)[None, :]
    return to_rows(tl.exp(load_tile(L, pid, m, C, M) - first_token), DTYPE, PRECISION, C, GB)


@triton.jit
def row(gates, c, DTYPE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr):
    """[R,M]: `row` of the tokens of class c > 0 and later ones, 0 for earlier ones."""
    _written, _later, L, label, anchors, pid, _classes = gates
    m = tl.arange(0, M)
    anchor = tl.load(anchors + (pid.to(tl.int64) * C + c) * M + m)[None, :]
    factor = tl.exp(tl.minimum(load_tile(L, pid, m, C, M) - anchor, 0.0))
    factor = tl.where(load_tile(label, pid, m, C, M) >= c, factor, 0.0)
    return to_rows(factor, DTYPE, PRECISION, C, GB)


@triton.jit
def written_in(gates, c, C: tl.constexpr, M: tl.constexpr):
    """[C,M]: `col` times the write weight of the tokens of class c > 0, 0 for all others; of class 0 it is the tile
    written."""
    _written, later, _L, label, _anchors, pid, _classes = gates
    m = tl.arange(0, M)
    here = load_tile(later, pid, m, C, M)
    return tl.where(load_tile(label, pid, m, C, M) == c, here, 0.0).to(here.dtype)


@triton.jit
def triangle(S, C: tl.constexpr, GB: tl.constexpr):
    """[R,C] -> (part strictly before the row's token, value at the row's token [R])."""
    row, col = row_token(C, GB), tl.arange(0, C)
    same = row[:, None] == col[None, :]
    return tl.where(row[:, None] > col[None, :], S, 0.0), tl.sum(tl.where(same, S, 0.0), axis=1)


@triton.jit
def up_to_own(S, C: tl.constexpr, GB: tl.constexpr):
    """[R,C] with 0 after the row's token."""
    return tl.where(row_token(C, GB)[:, None] >= tl.arange(0, C)[None, :], S, 0.0)


@triton.jit
def reads(x, pairs, state, p, gates, ACROSS: tl.constexpr, C: tl.constexpr, GB: tl.constexpr, M: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """[R,M]: what rows x [R,D] read in slots: of the state [D,M], and w_j pairs_ij e^{L_i - L_j} of the chunk's tokens,
    pairs [R,C] being the products x_i . y_j of those that count and 0 elsewhere.

    If ACROSS also [C,M]: where a token begins a class c > 0, the sum of p [R,M] times what was read, over rows from
    that token on and over what was written before it."""
    written, _later, _L, label, _anchors, pid, classes = gates
    m = tl.arange(0, M)
    met = tl.dot(x, state, input_precision=PRECISION)
    met = tl.dot(pairs, load_tile(written, pid, m, C, M), met, input_precision=PRECISION)
    met *= decayed(gates, x.dtype, PRECISION, C, GB, M)
    total = met
    across = tl.zeros([C, M], tl.float32)
    for c in range(1, classes + 1):
        if ACROSS:
            later = row_token(C, GB)[None, :] >= tl.arange(0, C)[:, None]
            # two terms where few slots leave room for them; with 64 they cost registers (470 spills in place of 291)
            crossed = sum_tokens(later, p * met, M <= 32, x.dtype, PRECISION)
            across += tl.where(load_tile(label, pid, m, C, M) >= c, crossed, 0.0)
        met = tl.dot(pairs, written_in(gates, c, C, M), input_precision=PRECISION)
        met *= row(gates, c, x.dtype, PRECISION, C, GB, M)
        total += met
    return total, across


@triton.jit
def columns_met(pairs, x, rounded, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """[C,M]: sum_i pairs_ij x_i, for bfloat16 with x rounded, or if SPLIT made of two terms: only their difference
    from sums over rows of the same pairs counts, for slow gates a small part of either."""
    met = tl.dot(tl.trans(pairs), rounded, input_precision=PRECISION)
    if SPLIT and rounded.dtype == tl.bfloat16:
        met = tl.dot(tl.trans(pairs), (x - rounded.to(tl.float32)).to(rounded.dtype), met)
    return met


@triton.jit
def weights(p, passed, left, pairs, gates, MET: tl.constexpr, LINEAR: tl.constexpr, C: tl.constexpr, GB: tl.constexpr,
            M: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Slot weights p [R,M] -> token weights [R,C]: sum_m p_i e^{L_i - L_j} w_j for j <= i; passed is p times
    `decayed`, left the same in the tiles' type.

    If MET also the gradient of what a token wrote, w_j `col_j`, [C,M]: sum_i p_i pairs_ij `row_i`; pairs as of `reads`.
    LINEAR: also in classes after the first it must be fit for a difference; other gates are seldom slow there.
    """
    written, _later, _L, label, _anchors, pid, classes = gates
    A = tl.dot(left, tl.trans(load_tile(written, pid, tl.arange(0, M), C, M)), input_precision=PRECISION)
    met = tl.zeros([C, M], tl.float32)
    if MET:
        met = columns_met(pairs, passed, left, True, PRECISION)
    for c in range(1, classes + 1):
        passed = p * row(gates, c, left.dtype, PRECISION, C, GB, M)
        here = passed.to(left.dtype)
        A = tl.dot(here, tl.trans(written_in(gates, c, C, M)), A, input_precision=PRECISION)
        if MET:
            mine = load_tile(label, pid, tl.arange(0, M), C, M) == c
            met = tl.where(mine, columns_met(pairs, passed, here, LINEAR, PRECISION), met)
    return up_to_own(A, C, GB).to(left.dtype), met


@triton.jit
def inverse_and_log(z):
    """1 / z and log2 z of an occupancy; 0 and -3e38 for an empty slot, which `read` then gives no weight."""
    present = z > EMPTY
    z = tl.where(present, z, 1.0)
    return tl.where(present, 1.0 / z, 0.0), tl.where(present, log(z) * 1.4426950408889634, -3e38)


@triton.jit
def occupied(occupancy, L, pid, m, C: tl.constexpr, M: tl.constexpr):
    """Tiles [C,BM]: `inverse_and_log` of the occupancy z after each token, z_0 e^L + (1 - e^L), as every write weight
    is one minus its decay."""
    total = load_tile(L, pid, m, C, M)
    z = tl.load(occupancy + pid.to(tl.int64) * M + m)[None, :] * tl.exp(total) - expm1(total)
    return inverse_and_log(z)


@triton.jit
def read(logits, inverse, log_z, scale):
    """Softmax over slots, the last axis, as spec.read_weights: logits q.K [R,M] or [M] -> its weights, which times
    `inverse` are the weights on the slot values. log_z is in base 2."""
    y = scale * 1.4426950408889634 * logits * inverse + log_z
    e = tl.exp2(y - tl.max(y, axis=-1, keep_dims=True))
    return e * (1.0 / tl.sum(e, axis=-1, keep_dims=True))
