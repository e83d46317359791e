"""The sizes of the Triton kernels' tiles: a table by shared memory, head dim and slots.

Shape legend: spec.py, tile.py.
"""

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """chunk: tokens of a chunk (C); heads: query heads of a tile (GB); warps of the kernels that have query rows."""

    chunk: int
    heads: int
    warps: int


class Row(NamedTuple):
    """shared: bytes of shared memory that a block must be given; size: of an element; dim, slots: the largest; chunk;
    rows: the most of a tile; warps, if not one for 16 rows and at least 4; groups: the fewest query heads of a kv
    head."""

    shared: int
    size: int
    dim: int
    slots: int
    chunk: int
    rows: int
    warps: int | None = None
    groups: int = 1


# The first row that fits is taken. Times and errors: docs/results/kernels/.
TILES = [
    Row(90_000, 2, 128, 32, chunk=32, rows=32, warps=2),
    Row(90_000, 2, 64, 128, chunk=16, rows=64, warps=4, groups=3),
    Row(200_000, 2, 128, 64, chunk=32, rows=128),
    Row(160_000, 2, 256, 64, chunk=32, rows=32, warps=8),
    Row(200_000, 2, 128, 128, chunk=32, rows=128, warps=8),
    Row(160_000, 2, 128, 128, chunk=32, rows=32, warps=8),
    Row(200_000, 2, 256, 256, chunk=16, rows=32, warps=8),
    Row(90_000, 2, 128, 64, chunk=32, rows=32, warps=4),
    Row(90_000, 4, 128, 64, chunk=16, rows=16, warps=8),
    Row(200_000, 4, 256, 128, chunk=16, rows=16, warps=8),
    Row(200_000, 4, 128, 256, chunk=16, rows=16, warps=8),  # 256 by 256 in float32 is more than any GPU's block has
]
INTERPRETED = 227_000  # the interpreter has no limit: the tiles of a Hopper GPU


def find_tile(dim: int, slots: int, groups: int, dtype: torch.dtype, shared: int = INTERPRETED) -> Tile | None:
    """The tile for the larger head dim, slots, query heads per kv head, type, and shared memory of a block in bytes;
    None if there is none."""
    size = 2 if dtype == torch.bfloat16 else 4  # float16 is computed in float32: decays leave its range
    for row in TILES:
        fits = dim <= row.dim and slots <= row.slots and groups >= row.groups
        if shared >= row.shared and size <= row.size and fits:
            heads = min(padded(groups), row.rows // row.chunk)
            return Tile(row.chunk, heads, row.warps or max(4, row.chunk * heads // 16))
    return None


def step_form(dim: int, slots: int, groups: int, shared: int = INTERPRETED) -> tuple[bool, int]:
    """Whether the decode kernel takes the query heads of a kv head together, and its warps: 4, or 32 numbers of each
    memory a thread. A memory of 64 x 128 leaves registers for that only on a Hopper GPU, which multiplies from shared
    memory."""
    together = groups > 1 and slots <= 64 and padded(dim) * slots <= (8192 if shared >= 200_000 else 4096)
    return together, 4 if together else min(32, max(4, slots * padded(dim) // 1024))


def padded(n: int) -> int:
    """The power of two from n on: triton.next_power_of_2 takes microseconds, as triton.cdiv does."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def block_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads may have."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)  # unknown: no tile is safe, PyTorch's form runs


# for a launch; torch.compile, which looks into what remembers nothing, warns of what remembers
tile_for, shared_memory = functools.cache(find_tile), functools.cache(block_memory)
