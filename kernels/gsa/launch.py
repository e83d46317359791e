"""One call of the kernels: tile, scratch and shared arguments, and the order in which its parts are worked on.

Shape legend: spec.py, tile.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import forward, gates
from .arguments import Arguments
from .documents import chunk_table, document_count, remembered
from .tiles import cdiv, padded, shared_memory, tile_for

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
             "ROOM": padded(E) * M * dtype.itemsize < 256 * 256 * 2,  # for the values' tile beside the keys'
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
