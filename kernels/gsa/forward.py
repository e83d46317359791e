"""Triton forward: what each chunk adds to the memory, the scan over chunks, the output of each chunk.

    gates_kernel     (gates.py) decays and write weights                          a program a chunk, head and some slots
    memory_kernel    memory before every chunk; the final memory                  a document, head, 64 features
    output_kernel    logits, softmax over slots, output                           a program a chunk, head and tile

For a long text alone, whose heads do not fill a GPU, in place of memory_kernel:

    written_kernel   what a chunk adds to the memory                              a program a chunk and head
    scan_kernel      memory before every chunk, in place of the gains; the final  elementwise over chunks

The memory of a chunk is a [D+E,M] matrix in the inputs' type (float32 for float16): features in rows, so that every
product takes a loaded tile transposed. It is kept decayed by the chunk's first token, whose class then has one `row`
for the memory and for the tokens. The gates are tiles of scratch, which every kernel loads in the layout it needs.

Shape legend: spec.py, tile.py; n = chunks.
"""

import triton
import triton.language as tl

from .functions import expm1
from .tile import (
    add_state,
    chunk_span,
    decayed,
    load_classes,
    load_rows,
    load_state,
    load_tile,
    occupied,
    read,
    reads,
    real_rows,
    row_mask,
    store_rows,
    to_rows,
    up_to_own,
    weights,
)


@triton.jit
def load_memory(keys, values, occupancy, at, is_key, is_value, counted, z, OCCUPANCY: tl.constexpr):
    """Features [BF,M] of a document's memory, keys and values [BF,M] pointing to them where is_key and is_value; and
    its occupancy `at` [M], where counted, or z."""
    memory = tl.load(keys, mask=is_key, other=0.0).to(tl.float32)
    memory += tl.load(values, mask=is_value, other=0.0).to(tl.float32)
    if OCCUPANCY:
        z = tl.load(occupancy + at, mask=counted, other=0.0).to(tl.float32)
    return memory, z


@triton.jit
def load_step(x, stride, left, L, at, token, tokens, f, size, m, more, C: tl.constexpr, M: tl.constexpr):
    """What a step of memory_kernel reads: features [C,BF], weights [C,M], L at the first and last token [M]."""
    t = tl.arange(0, C)
    rows = tl.load(
        x + (token + t).to(tl.int64)[:, None] * stride + f[None, :],
        mask=(token + t < tokens)[:, None] & (f < size)[None, :], other=0.0,
    )  # fmt: skip
    tile, there = at * (C * M) + m, m < tl.where(more, M, 0)
    weight = tl.load(left + tile[None, :] + (t * M)[:, None], mask=(t >= 0)[:, None] & there[None, :], other=0.0)
    first = tl.load(L + tile, mask=there, other=0.0)
    last = tl.load(L + tile + (C - 1) * M, mask=there, other=0.0)
    return rows, weight, first, last


@triton.jit(do_not_specialize=["T", "chunks_per_row", "heads"])
def memory_kernel(
    k, v, states, left, L, occupancy, begin_keys, begin_values, begin_occupancy, end_keys, end_values, end_occupancy,
    table, bounds, T, chunks_per_row, H, heads, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, OCCUPANCY: tl.constexpr, HAS_BEGIN: tl.constexpr,
    HAS_END: tl.constexpr, D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """`written_kernel` and `scan_kernel` (not in reverse) in one: the memory is written once and never read.

    One program goes through the chunks of a document and head with BF features of the keys or of the values, in all
    slots, in registers; it reads two chunks ahead. The first also does the occupancy."""
    n, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    if PACKED:
        start = tl.load(bounds + n)
        chunks = (tl.load(bounds + n + 1) - start).to(tl.int32)
        begin = tl.load(table + 2 * start, mask=chunks > 0, other=0)
        tokens = (chunks - 1) * C + tl.load(table + 2 * (start + chunks) - 1, mask=chunks > 0, other=0).to(tl.int32)
        row = n * 0
    else:
        start, chunks, begin, tokens, row = n * chunks_per_row, chunks_per_row, n * 0, T, n
    blocks: tl.constexpr = D // BF
    block = tl.program_id(1)
    if block < blocks:
        x, stride, size = k + row * k_b + begin * k_t + h * k_h, k_t, D
        offset, in_states = block * BF, block * BF
    else:
        x, stride, size = v + row * v_b + begin * v_t + h * v_h, v_t, E
        offset, in_states = (block - blocks) * BF, D + (block - blocks) * BF
    DTYPE = states.dtype.element_ty
    f, m = offset + tl.arange(0, BF), tl.arange(0, M)
    is_key = (f < tl.where(block < blocks, D, 0))[:, None] & (m >= 0)[None, :]
    is_value = (f < tl.where(block < blocks, 0, E))[:, None] & (m >= 0)[None, :]
    counted = m < tl.where(block == 0, M, 0)
    key_at = (n * H + h) * M * D + m[None, :] * D + f[:, None]
    value_at = (n * H + h) * M * E + m[None, :] * E + f[:, None]
    carry = tl.zeros([BF, M], tl.float32)
    z = tl.zeros([M], tl.float32)
    if HAS_BEGIN:
        carry, z = load_memory(
            begin_keys + key_at, begin_values + value_at, begin_occupancy, (n * H + h) * M + m, is_key, is_value,
            counted, z, OCCUPANCY,
        )  # fmt: skip
    at = start * heads + h
    here = load_step(x, stride, left, L, at, 0, tokens, f, size, m, chunks > 0, C, M)
    after = load_step(x, stride, left, L, at + heads, C, tokens, f, size, m, chunks > 1, C, M)
    for i in range(0, chunks):
        later = load_step(
            x, stride, left, L, at + 2 * heads, (i + 2) * C, tokens, f, size, m, i + 2 < chunks, C, M
        )  # fmt: skip
        rows, weight, first, last = here
        place = at * ((D + E) * M) + (in_states + tl.arange(0, BF))[:, None] * M + m[None, :]
        tl.store(states + place, (carry * tl.exp(first)[None, :]).to(DTYPE))
        if OCCUPANCY:
            tl.store(occupancy + at * M + m, z, mask=counted)
            z = tl.exp(last) * z - expm1(last)
        carry *= tl.exp(last)[None, :]
        carry = tl.dot(tl.trans(rows.to(DTYPE)), weight, carry, input_precision=PRECISION)
        at += heads
        here, after = after, later
    if HAS_END:
        tl.store(end_keys + key_at, carry, mask=is_key)
        tl.store(end_values + value_at, carry, mask=is_value)
        if OCCUPANCY:
            tl.store(end_occupancy + (n * H + h) * M + m, z, mask=counted)


@triton.jit(do_not_specialize=["T", "chunks_per_row", "heads"])
def written_kernel(
    k, v, table, states, left, T, chunks_per_row, heads, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """states [n,H,D+E,M] = sum_j e^{L_end - L_j} w_j [k_j, v_j], what a chunk and head writes."""
    pid = tl.program_id(0)
    chunk, h = pid // heads, pid % heads
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    columns, m = row_mask(count, 1, C, 1), tl.arange(0, M)
    DTYPE = states.dtype.element_ty
    weight = load_tile(left, pid, m, C, M)
    first = pid.to(tl.int64) * ((D + E) * M)
    x = load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD)
    gain = tl.dot(tl.trans(x.to(DTYPE)), weight, input_precision=PRECISION)
    add_state(states, gain, first, 0, False, D, BD, M)
    x = load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE)
    gain = tl.dot(tl.trans(x.to(DTYPE)), weight, input_precision=PRECISION)
    add_state(states, gain, first, D, False, E, BE, M)


@triton.jit(do_not_specialize=["chunks_per_row", "heads"])
def scan_kernel(
    states, L, occupancy, begin_keys, begin_values, begin_occupancy, end_keys, end_values, end_occupancy, bounds,
    chunks_per_row, H, heads,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, OCCUPANCY: tl.constexpr, HAS_BEGIN: tl.constexpr,
    HAS_END: tl.constexpr, D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Over a document's chunks in order, carry = e^decay carry + gain, starting from `begin` [N,H,M,D|E] and ending in
    `end`; each gain [chunk,h,D+E,M] is replaced by the carry before it, decayed by the chunk's first token. Likewise
    the occupancy [chunk,h,M], of which a chunk writes 1 - e^decay. REVERSE: from the last chunk to the first, the gain
    counts decayed by the first token, the carry is stored as it is, gains of the occupancy are read like the others.

    One program holds BF of the D+E features of all slots of one document and head; the first also does the occupancy.
    """
    n, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
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
        carry, z = load_memory(
            begin_keys + key_at, begin_values + value_at, begin_occupancy, (n * H + h) * M + m, is_key, is_value,
            counted, z, OCCUPANCY,
        )  # fmt: skip
    for i in tl.range(0, chunks, num_stages=8):
        chunk = first + (chunks - 1 - i if REVERSE else i)
        at = chunk * heads + h
        end = tl.load(L + (at * C + C - 1) * M + m)
        kept = tl.exp(end)
        here = states + at * ((D + E) * M) + f[:, None] * M + m[None, :]
        first_token = tl.exp(tl.load(L + at * (C * M) + m))[None, :]
        gain = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        if REVERSE:
            tl.store(here, carry.to(states.dtype.element_ty), mask=inside)
            gain *= first_token
        else:
            tl.store(here, (carry * first_token).to(states.dtype.element_ty), mask=inside)
        carry = kept[None, :] * carry + gain
        if OCCUPANCY:
            if REVERSE:
                gained = tl.load(occupancy + at * M + m, mask=counted, other=0.0)
            else:
                gained = -expm1(end)
            tl.store(occupancy + at * M + m, z, mask=counted)
            z = kept * z + gained
    if HAS_END:
        tl.store(end_keys + key_at, carry, mask=is_key)
        tl.store(end_values + value_at, carry, mask=is_value)
        if OCCUPANCY:
            tl.store(end_occupancy + (n * H + h) * M + m, z, mask=counted)


@triton.jit(do_not_specialize=["T", "chunks_per_row", "heads", "positions"])
def output_kernel(
    q, q_sink, k, v, positions, table, states, occupancy, L, label, anchors, written, later, last, o,
    T, chunks_per_row, H, heads, G, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    PACKED: tl.constexpr, SINKS: tl.constexpr, OCCUPANCY: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SINK: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    GB: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """o [B,T,H*G,E] of one chunk, kv head and tile of GB query heads. ROOM: for the values' tile beside the keys'."""
    tiles = tl.cdiv(G, GB)
    pid, g0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * GB
    chunk, h = pid // heads, pid % heads
    row, begin, count = chunk_span(table, chunk, T, chunks_per_row, C, PACKED)
    if count <= 0:
        return
    row0 = row * T + begin
    m, rows, columns = tl.arange(0, M), row_mask(count, G - g0, C, GB), row_mask(count, 1, C, 1)
    DTYPE = states.dtype.element_ty
    gates = written, later, L, label, anchors, pid, load_classes(last, pid, BLOCKS)
    first = pid.to(tl.int64) * ((D + E) * M)
    y = load_rows(k, row * k_b + begin * k_t + h * k_h, k_t, 0, columns, C, 1, D, BD).to(DTYPE)
    K0 = load_state(states, first, 0, D, BD, M)
    if ROOM:
        V0 = load_state(states, first, D, E, BE, M)  # asked for here, needed later
    z = load_rows(v, row * v_b + begin * v_t + h * v_h, v_t, 0, columns, C, 1, E, BE).to(DTYPE)
    q_first = row * q_b + begin * q_t + (h * G + g0) * q_h
    x = load_rows(q, q_first, q_t, q_h, rows, C, GB, D, BD).to(DTYPE)
    pairs = up_to_own(tl.dot(x, tl.trans(y), input_precision=PRECISION), C, GB).to(DTYPE)
    logits, _ = reads(x, pairs, K0, x, gates, False, C, GB, M, PRECISION)
    if HAS_SINK:
        x = load_rows(q_sink, q_first, q_t, q_h, rows, C, GB, D, BD).to(DTYPE)
        pairs = up_to_own(tl.dot(x, tl.trans(y), input_precision=PRECISION), C, GB).to(DTYPE)
        far, _ = reads(x, pairs, K0, x, gates, False, C, GB, M, PRECISION)
        logits = tl.where((m < SINKS)[None, :], far, logits)
    if OCCUPANCY:
        inverse, log_z = occupied(occupancy, L, pid, m, C, M)
        inverse_rows = to_rows(inverse, DTYPE, PRECISION, C, GB)
        log_rows = to_rows(log_z, DTYPE, PRECISION, C, GB)
        p = read(logits, inverse_rows, log_rows, scale) * inverse_rows
    else:
        p = read(logits, 1.0, 0.0, scale)
    passed = p * decayed(gates, DTYPE, PRECISION, C, GB, M)
    left = passed.to(DTYPE)
    A, _met = weights(p, passed, left, pairs, gates, False, False, C, GB, M, PRECISION)
    if not ROOM:
        V0 = load_state(states, first, D, E, BE, M)
    out = tl.dot(left, tl.trans(V0), input_precision=PRECISION)
    out = tl.dot(A, z, out, input_precision=PRECISION)
    if HAS_POSITIONS:
        out = tl.where(real_rows(positions, row0, count, G - g0, C, GB, HAS_POSITIONS)[:, None], out, 0.0)
    store_rows(o, out, (row0 * H + h) * G * E + g0 * E, H * G * E, E, rows, C, GB, E, BE)
