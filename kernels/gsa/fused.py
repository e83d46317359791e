"""The Triton kernels behind torch operators: t2r::gsa_forward and t2r::gsa_backward with autograd between them, and
t2r::gsa_step for decoding, which writes the memory in place.

Being operators, they go through torch.compile(fullgraph=True) and activation checkpointing as one node each.

Shape legend: spec.py, tile.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import backward, decode, forward, gates
from .documents import chunk_table, document_count, remembered
from .launcher import Arguments
from .spec import GSASpec, SlotState
from .tiles import block_memory, cdiv, find_tile, padded, shared_memory, step_warps, tile_for

HEAD_DIMS = (64, 80, 96, 128, 256)
SLOTS = (16, 32, 64, 128, 256)
GROUPS = range(1, 9)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, occupancy: bool, s: Tensor | None) -> str | None:
    """Why the kernels cannot take these inputs, or None if they can."""
    D, E, M, G = k.shape[-1], v.shape[-1], gate.shape[-1], q.shape[2] // k.shape[2]
    if D not in HEAD_DIMS or E not in HEAD_DIMS:
        return f"head dims {D} and {E} (kernels have {', '.join(map(str, HEAD_DIMS))})"
    if M not in SLOTS:
        return f"{M} slots (kernels have {', '.join(map(str, SLOTS))})"
    if G not in GROUPS:
        return f"{G} query heads per kv head (kernels have 1 to 8)"
    if not {q.dtype, k.dtype, v.dtype} <= set(DTYPES):
        return f"inputs of {q.dtype}"
    if occupancy and s is not None:
        return "occupancy with write weights apart from the decay"
    if find_tile(max(D, E), M, G, q.dtype, block_memory(q.device)) is None:
        return f"heads of {max(D, E)} with {M} slots in {q.dtype}, more than a block of this GPU's threads can hold"
    return None


# Backward runs over parts of the rows or heads so that its scratch stays below SCRATCH bytes, but not below PROGRAMS
# chunks and heads, which fill a GPU for several waves. Smaller parts take longer: 180 MiB keep a step of 16,384 tokens
# within 0.9 GiB and cost a tenth of its time (docs/results/kernels/h200.json).
SCRATCH = 768 * 2**20
PROGRAMS = 1024


class Part(NamedTuple):
    """Rows of the batch and kv heads that are worked on together: from, how many."""

    row: int
    rows: int
    head: int
    heads: int


def parts(rows: int, heads: int, chunks: int, size: int) -> list[Part]:
    """All rows of `chunks` chunks each and all heads, in parts of SCRATCH bytes, a chunk and head needing `size`."""
    room = max(SCRATCH // size, PROGRAMS)  # chunks and heads of a part
    some_rows = even(rows, room // (chunks * heads))
    some_heads = heads if some_rows > 1 or chunks * heads <= room else even(heads, room // chunks)
    return [
        Part(row, min(some_rows, rows - row), head, min(some_heads, heads - head))
        for row in range(0, rows, some_rows)
        for head in range(0, heads, some_heads)
    ]


def even(n: int, most: int) -> int:
    """Size of the parts if n are to be in as few as possible, none larger than `most` (or than 1)."""
    return cdiv(n, cdiv(n, max(most, 1)))


MEMORY = ("keys", "values", "occupancy")
SIDES = [f"{side}_{part}" for side in ("begin", "end", "reverse_begin", "reverse_end") for part in MEMORY]
# axes of the rows and of the heads of the tensors that a part is cut out of; others belong to all parts
AXES = {
    **dict.fromkeys(("q", "q_sink", "k", "v", "gate", "s", "turns", "do", "o"), (0, 2)),
    **dict.fromkeys(("dq", "dk", "dv", "dgate", "ds", "dq_sink", "dlogits"), (0, 2)),
    "positions": (0, None), "write": (None, 0), "keep": (None, 0), "d_bias": (0, 1), **dict.fromkeys(SIDES, (0, 1)),
}  # fmt: skip
# what the scan's arguments are called in a Launch, and in reverse
SCAN = {"BF": "SCANNED"}
REVERSE = SCAN | {"states": "adjoint", "occupancy": "d_occupancy", "REVERSE": "YES"}
REVERSE |= {name.removeprefix("reverse_"): name for name in (*SIDES[6:], "reverse_HAS_BEGIN", "reverse_HAS_END")}
# Under so many programs and over so many chunks memory_kernel takes longer than the two kernels whose traffic it saves.
FEW, LONG = 96, 64
Memory = tuple[Tensor, Tensor, Tensor]  # keys [N,H,M,D], values [N,H,M,E], occupancy [N,H,M]


class Launch(Arguments):
    """Tile, scratch and the arguments that the kernels of one call share, by the kernels' names for them."""

    def __init__(self, q, k, v, q_sink, gate, s, write, keep, turns, positions, cu_seqlens, form, damping, ring,
                 sinks, normalised, scale, backward=False):  # fmt: skip
        super().__init__(q.device)
        B, T, HQ, D = q.shape
        H, M, E = k.shape[2], gate.shape[-1], v.shape[-1]
        self.tile = tile_for(max(D, E), M, HQ // H, q.dtype, shared_memory(q.device))
        C, slots = self.tile.chunk, min(M, 32)
        self.shape = H, M, D, E
        # here, not before the operator: of all layers that torch.compile has made, too, one works it out
        table, bounds = (None, None) if cu_seqlens is None else remembered(chunk_table, cu_seqlens, T, C)
        self.chunks = cdiv(T, C) if table is None else table.shape[0]  # of a row
        self.packed, self.documents = table is not None, document_count(B, cu_seqlens)
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        self.add(
            {"q": q, "q_sink": q_sink, "k": k, "v": v, "gate": gate, "s": s, "write": write, "keep": keep,
             "turns": turns, "positions": positions, "table": table, "bounds": bounds},
            {"T": T, "chunks_per_row": cdiv(T, C), "H": H, "heads": H, "scale": scale, "rate": 1.0 / damping,
             **strides("q", q), **strides("k", k), **strides("v", v)},
            {"FORM": form, "LINEAR": form == "linear", "RING": ring, "SINKS": sinks, "OCCUPANCY": normalised,
             "PACKED": self.packed, "HAS_POSITIONS": positions is not None, "HAS_TURNS": turns is not None,
             "HAS_S": s is not None, "HAS_SINK": q_sink is not None,
             "PRECISION": "tf32x3" if q.dtype == torch.float16 else "ieee",
             "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
             "D": D, "BD": padded(D), "E": E, "BE": padded(E), "M": M, "BM": slots,
             "BLOCKS": M // slots, "C": C, "G": HQ // H, "GB": self.tile.heads, "BF": math.gcd(D, E, 64), "SCANNED": 8,
             "REVERSE": False, "YES": True},
        )  # fmt: skip
        tiles = {name: ((C, M), torch.float32) for name in ("L", "anchors")}
        tiles |= {name: ((C, M), dtype) for name in ("written", "later", "left")}
        tiles |= {"label": ((C, M), torch.int8), "last": ((M // slots,), torch.int32)}
        tiles |= {"states": ((D + E, M), dtype), "occupancy": ((M,), torch.float32) if normalised else None}
        if backward:
            tiles |= {name: ((C, M), torch.float32) for name in ("w", "own", "rows", "met", "after")}
            tiles |= {name: ((C, M), torch.float32) if normalised else None for name in ("inverse", "log_z", "z_rows")}
            tiles |= {"across": ((C, M), torch.float32) if form == "linear" else None, "through": ((M,), torch.float32)}
            tiles |= {"adjoint": tiles["states"], "d_occupancy": tiles["occupancy"]}
        size = sum(math.prod(tile[0]) * tile[1].itemsize for tile in tiles.values() if tile)
        self.apart = backward and D * q.element_size() < 4 * M  # d logits have no room in the place of dq
        size += 4 * C * (HQ // H) * M * self.apart
        self.parts = parts(B, H, self.chunks, size) if backward else [Part(0, B, 0, H)]
        n, heads = self.chunks * self.parts[0].rows, self.parts[0].heads
        shapes = {name: tile and ((n, heads, *tile[0]), tile[1]) for name, tile in tiles.items()}
        if self.apart:
            shapes["dlogits"] = (self.parts[0].rows, T, heads * (HQ // H), M), torch.float32
        self.allocate(shapes)
        if not backward:  # gates_kernel is done with w before it writes anchors
            for known in (self.types, self.values, self.scratch):
                known["w"] = known["anchors"]

    def allocate(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype] | None]) -> None:
        """Scratch of these shapes and types, in one piece: the host's time goes by the number of allocations."""
        self.scratch, at = {}, 0
        for name, tile in shapes.items():
            if tile is not None:
                size = math.prod(tile[0]) * tile[1].itemsize
                self.scratch[name] = at, at + size, *tile
                at += -(-size // 256) * 256
        self.room = torch.empty(at, device=self.device, dtype=torch.uint8)
        begin = self.room.data_ptr()
        self.types |= {name: tile and (tile[1], self.room.get_device()) for name, tile in shapes.items()}
        self.values |= {name: tile and begin + self.scratch[name][0] for name, tile in shapes.items()}

    def add_backward(self, **tensors: Tensor | None) -> None:
        """What backward reads and writes beside its scratch."""
        H, M, D, _ = self.shape
        dq, part, G = tensors["dq"], self.parts[0], self.constants["G"]
        if not self.apart:  # a program has read its rows of the one before it writes those of the other
            tensors["dlogits"] = dq.view(torch.float32)
        heads, row = (part.heads, M) if self.apart else (H, D * dq.element_size() // 4)
        bias = torch.empty(dq.shape[0] * self.chunks, H, 2, M, device=self.device) if self.constants["RING"] else None
        self.add({**tensors, "d_bias": bias}, {"dl_t": heads * G * row, "dl_h": G * row, "dl_g": row})

    def sides(self, begin: Memory | None, end: Memory | None, kind: str = "") -> None:
        """Where the scan begins, and where it stores its end."""
        for side, memory in (("begin", begin), ("end", end)):
            tensors = zip(MEMORY, memory or 3 * (None,), strict=True)
            flag = {f"{kind}HAS_{side.upper()}": memory is not None}
            self.add({f"{kind}{side}_{part}": x for part, x in tensors}, constants=flag)

    def begin(self, part: Part) -> None:
        """Work on this part from here on."""
        self.part = part
        if len(self.parts) > 1:
            cut = {name: address + part.row * row + part.head * head for name, address, row, head in self.steps}
            self.change(cut | {"heads": part.heads})

    @functools.cached_property
    def steps(self) -> list[tuple[str, int, int, int]]:
        """Of every tensor that a part is cut out of: its address, and the bytes from row to row and kv head to head."""
        found = []
        for name, (rows, heads) in AXES.items():
            x = self.tensors.get(name)
            if x is not None:
                row = 0 if rows is None else x.stride(rows) * self.rows_of(name) * x.itemsize
                head = 0 if heads is None else x.stride(heads) * self.heads_of(x, heads) * x.itemsize
                found.append((name, x.data_ptr(), row, head))
        return found

    def rows_of(self, name: str) -> int:
        """Rows of a tensor to a row of the batch."""
        return self.chunks if name == "d_bias" else 1

    def heads_of(self, x: Tensor, axis: int) -> int:
        """Heads in an axis to a kv head."""
        return x.shape[axis] // self.shape[0]

    def tensor(self, name: str) -> Tensor | None:
        """Scratch, or the part's cut of a tensor."""
        if name in self.scratch:
            begin, end, shape, dtype = self.scratch[name]
            return self.room[begin:end].view(dtype).view(shape)
        x = self.tensors.get(name)
        rows, heads = AXES.get(name, (None, None))
        if rows is not None and x is not None:
            x = x[self.part.row * self.rows_of(name) :]
        if heads is not None and x is not None:
            each = self.heads_of(x, heads)
            x = x.narrow(heads, self.part.head * each, self.part.heads * each)
        return x

    def part_documents(self) -> int:
        return self.documents if self.packed else self.part.rows

    def state(self) -> Memory:
        """New keys [N,H,M,D], values [N,H,M,E] and occupancy [N,H,M] of the documents."""
        H, M, D, E = self.shape
        N = self.documents
        keys, values = (torch.empty(N, H, M, x, device=self.device) for x in (D, E))
        return keys, values, torch.zeros(N, H, M, device=self.device)

    def run(self, kernel, warps: int, heads: int = 1, slots: int = 1) -> None:
        """One program for every chunk and head, or `heads` of them, and each of `slots` parts of the slots."""
        grid = self.part.rows * self.chunks * self.part.heads * heads, slots
        self.launch(kernel, grid, num_warps=warps, num_stages=1)

    def scan(self, names: dict[str, str] = SCAN) -> None:
        """`forward.scan_kernel` over every document."""
        _, _, D, E = self.shape
        grid = self.part_documents() * self.part.heads, cdiv(D + E, self.constants["SCANNED"])
        self.launch(forward.scan_kernel, grid, names, num_warps=4)

    def write(self) -> None:
        """Gates of every chunk, and the memory before it."""
        self.run(gates.gates_kernel, 2, slots=self.constants["BLOCKS"])
        _, M, D, E = self.shape
        grid = self.part_documents() * self.part.heads, (D + E) // self.constants["BF"]
        if math.prod(grid) < FEW and self.chunks > LONG:
            self.run(forward.written_kernel, 4)
            self.scan()
        else:
            self.launch(forward.memory_kernel, grid, num_warps=4 if M > 32 else 2, num_stages=1)


def strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("bth")}


def prepare(q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, gate: Tensor, s: Tensor | None, silu: bool) -> list:
    """Inputs as the kernels read them: after the feature map (inside, each consumer of a tile would compute it anew),
    channels contiguous, q and q_sink with the same strides, gates contiguous."""
    rows = [torch.nn.functional.silu(x) if silu and x is not None else x for x in (q, k, v, q_sink)]
    if k.dtype != v.dtype:  # one kernel reads either
        rows[1:3] = (x.to(torch.promote_types(k.dtype, v.dtype)) for x in rows[1:3])
    rows = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in rows]
    if q_sink is not None and rows[3].stride() != rows[0].stride():
        rows[0], rows[3] = rows[0].contiguous(), rows[3].contiguous()
    return [*rows, gate.contiguous(), s if s is None else s.contiguous()]


@torch.library.custom_op("t2r::gsa_forward", mutates_args=())
def gsa_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, turns: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None,
    keys: Tensor | None, values: Tensor | None, occupancy: Tensor | None,
    form: str, damping: float, ring: int, sinks: int, normalised: bool, silu: bool, scale: float, final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o and the final memory (empty tensors unless `final`). Arguments as gsa(), the spec spelled out."""
    launch = Launch(
        *prepare(q, k, v, q_sink, gate, s, silu), write, keep, turns, positions, cu_seqlens, form, damping, ring,
        sinks, normalised, scale,
    )  # fmt: skip
    end = launch.state() if final else None
    o = torch.empty(*q.shape[:3], v.shape[-1], device=q.device, dtype=v.dtype)
    launch.add({"o": o})
    launch.sides(None if keys is None else (keys, values, occupancy), end)
    launch.begin(*launch.parts)
    launch.write()
    tiles = cdiv(q.shape[2] // k.shape[2], launch.tile.heads)
    launch.run(forward.output_kernel, launch.tile.warps, tiles)
    return o, *(end or [q.new_empty(0, dtype=torch.float32) for _ in range(3)])


@gsa_forward.register_fake
def _(q, k, v, gate, s, write, keep, q_sink, turns, positions, cu_seqlens, keys, values, occupancy, form, damping, ring,
      sinks, normalised, silu, scale, final):  # fmt: skip
    o = torch.empty(*q.shape[:3], v.shape[-1], device=q.device, dtype=v.dtype)
    shape = (document_count(q.shape[0], cu_seqlens), k.shape[2], gate.shape[-1])
    shapes = ((*shape, k.shape[-1]), (*shape, v.shape[-1]), shape) if final else 3 * ((0,),)
    return o, *(torch.empty(x, device=q.device, dtype=torch.float32) for x in shapes)


@torch.library.custom_op("t2r::gsa_backward", mutates_args=())
def gsa_backward(
    do: Tensor, d_keys: Tensor | None, d_values: Tensor | None, d_occupancy: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, turns: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None,
    keys: Tensor | None, values: Tensor | None, occupancy: Tensor | None,
    form: str, damping: float, ring: int, sinks: int, normalised: bool, silu: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, gate, s, write, keep, q_sink, keys, values, occupancy; empty where there was no input."""
    launch = Launch(
        *prepare(q, k, v, q_sink, gate, s, silu), write, keep, turns, positions, cu_seqlens, form, damping, ring,
        sinks, normalised, scale, backward=True,
    )  # fmt: skip

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, device=x.device, dtype=x.dtype)

    names = ("q", "k", "v", "gate", "s", "write", "keep", "q_sink")
    grads = {f"d{name}": like(x) for name, x in zip(names, (q, k, v, gate, s, None, None, q_sink), strict=True)}
    launch.add_backward(do=do.contiguous(), **grads)
    launch.sides(None if keys is None else (keys, values, occupancy), None)
    d_begin = None if keys is None else launch.state()
    d_end = None if d_keys is None else tuple(x.contiguous() for x in (d_keys, d_values, d_occupancy))
    launch.sides(d_end, d_begin, "reverse_")
    for part in launch.parts:
        launch.begin(part)
        launch.write()
        if normalised:
            launch.run(gates.occupancy_kernel, 2, slots=launch.constants["BLOCKS"])
        launch.run(backward.inner_kernel, launch.tile.warps)
        launch.scan(REVERSE)
        launch.run(backward.outer_kernel, launch.tile.warps)
        launch.run(gates.logits_kernel, 2, slots=launch.constants["BLOCKS"])
    if ring:
        d_bias = launch.tensors["d_bias"].sum(0)
        for i, (name, x) in enumerate((("dwrite", write), ("dkeep", keep))):
            grads[name] = d_bias[:, i].to(x.dtype, copy=True)
    if silu:
        for name, x in (("dq", q), ("dk", k), ("dv", v), ("dq_sink", q_sink)):
            if x is not None:
                grads[name] = torch.ops.aten.silu_backward(grads[name], x)
    return [q.new_empty(0) if x is None else x for x in (*grads.values(), *(d_begin or 3 * (None,)))]


@gsa_backward.register_fake
def _(do, d_keys, d_values, d_occupancy, q, k, v, gate, s, write, keep, q_sink, turns, positions, cu_seqlens, keys,
      values, occupancy, *rest):  # fmt: skip
    like = (q, k, v, gate, s, write, keep, q_sink, keys, values, occupancy)
    return [torch.empty(0 if x is None else x.shape, device=q.device, dtype=q.dtype if x is None else x.dtype)
            for x in like]  # fmt: skip


INPUTS = (
    "q", "k", "v", "gate", "s", "write", "keep", "q_sink", "turns", "positions", "cu_seqlens", "keys", "values",
    "occupancy",
)  # fmt: skip
# in the order in which gsa_backward returns their gradients
DIFFERENTIABLE = [name for name in INPUTS if name not in ("turns", "positions", "cu_seqlens")]


def setup_context(ctx, inputs, output) -> None:
    *ctx.spec, ctx.final = inputs[len(INPUTS) :]
    ctx.save_for_backward(*inputs[: len(INPUTS)])
    ctx.set_materialize_grads(False)


def gradient(ctx, do, d_keys, d_values, d_occupancy):
    given = dict(zip(INPUTS, ctx.saved_tensors, strict=True))
    q, k, v = (given[name] for name in "qkv")
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[-1])
    state = (None, None, None)
    if ctx.final:
        shape = (document_count(q.shape[0], given["cu_seqlens"]), k.shape[2], given["gate"].shape[-1])
        shapes = ((*shape, k.shape[-1]), (*shape, v.shape[-1]), shape)
        state = [
            q.new_zeros(x, dtype=torch.float32) if d is None else d
            for x, d in zip(shapes, (d_keys, d_values, d_occupancy), strict=True)
        ]
    grads = torch.ops.t2r.gsa_backward(do, *state, *given.values(), *ctx.spec)
    grads = dict(zip(DIFFERENTIABLE, grads, strict=True))
    return *(None if x is None else grads.get(name) for name, x in given.items()), *(len(ctx.spec) + 1) * [None]


gsa_forward.register_autograd(gradient, setup_context=setup_context)


class Direct(torch.autograd.Function):
    """gsa_forward with its gradient, where torch.compile does not look: torch itself goes through an operator's whole
    schema for every argument, which takes longer than the launches."""

    forward = staticmethod(lambda *args: gsa_forward(*args))
    setup_context = staticmethod(setup_context)
    backward = staticmethod(gradient)


@torch.library.custom_op("t2r::gsa_step", mutates_args=("keys", "values", "occupancy", "position", "rank", "stamp"))
def gsa_step(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, bonus: Tensor | None, recent: Tensor | None, positions: Tensor,
    keys: Tensor, values: Tensor, occupancy: Tensor, position: Tensor, rank: Tensor, stamp: Tensor,
    form: str, damping: float, ring: int, sinks: int, normalised: bool, silu: bool, scale: float,
) -> Tensor:  # fmt: skip
    """o [N,1,H*G,E] of one token a sequence; the memory from keys to stamp becomes that after it."""
    q, k, v, q_sink, gate, s = prepare(q, k, v, q_sink, gate, s, silu=False)
    N, _, HQ, D = q.shape
    H, M, E = k.shape[2], gate.shape[-1], v.shape[-1]
    o = torch.empty(N, 1, HQ, E, device=q.device, dtype=v.dtype)
    warps = step_warps(max(D, E), M)
    decode.step_kernel[(N * H,)](
        q, q_sink, k, v, gate, s, write, keep, bonus, recent, positions, keys, values, occupancy, position, rank, stamp,
        o, H, scale, 1.0 / damping, q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
        FORM=form, RING=ring, SINKS=sinks, OCCUPANCY=normalised, SILU=silu, HAS_S=s is not None,
        HAS_SINK=q_sink is not None, HAS_BONUS=bonus is not None, D=D, BD=padded(D), E=E,
        BE=padded(E), M=M, G=HQ // H, num_warps=warps,
        maxnreg=128 if warps <= 8 else None,  # so that two programs fit on a multiprocessor: one reads, one computes
    )  # fmt: skip
    return o


@gsa_step.register_fake
def _(q, k, v, *rest):
    return torch.empty(*q.shape[:3], v.shape[-1], device=q.device, dtype=v.dtype)


def spelled(spec: GSASpec, scale: float) -> tuple:
    """The spec as the operators take it."""
    silu = spec.feature_map == "silu"
    return spec.gate, float(spec.damping), spec.ring, spec.sinks, spec.occupancy, silu, float(scale)


def fused(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, turns: Tensor | None, positions: Tensor | None, cu_seqlens: Tensor | None,
    state: SlotState | None, spec: GSASpec, scale: float, final: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:  # fmt: skip
    """gsa() by the kernels: o and, if asked, the final (keys, values, occupancy)."""
    memory = (None, None, None) if state is None else tuple(x.float().contiguous() for x in state[:3])
    run = Direct.apply if torch.is_grad_enabled() and not torch.compiler.is_compiling() else gsa_forward
    o, *end = run(
        q, k, v, gate, s, write, keep, q_sink, turns, positions, cu_seqlens, *memory, *spelled(spec, scale), final
    )
    return o, tuple(end) if final else None


def fused_step(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, s: Tensor | None, write: Tensor | None, keep: Tensor | None,
    q_sink: Tensor | None, bonus: Tensor | None, recent: Tensor | None, positions: Tensor | None, state: SlotState,
    spec: GSASpec, scale: float, in_place: bool,
) -> tuple[Tensor, SlotState]:  # fmt: skip
    """One token of every sequence: o and the memory after it, in the state's own tensors if in_place."""
    positions = state.position.clone() if positions is None else positions.contiguous()
    memory = state if in_place else SlotState(*(x.clone() for x in state))
    bonus = bonus if bonus is None else bonus.contiguous()
    given = (q, k, v, gate, s, write, keep, q_sink, bonus, recent, positions)
    return gsa_step(*given, *memory, *spelled(spec, scale)), memory
