"""Launches of Triton kernels at a fraction of the host's time that Triton's own take.

For every launch Triton binds the arguments, some 50 here, looks at each for what it compiles kernels apart by, and
makes a key of all that. The kernels of one call share their arguments, so here they are looked at once a call: a table
holds the kernels that were launched with arguments of the same kind before. They are called with addresses in place of
tensors, which spares the driver a question about each. The first launch is Triton's own, and in its interpreter every
launch is.
"""

from collections.abc import Callable, Mapping
from operator import itemgetter

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

NOTHING: Mapping = {}
# versions of Triton whose compiled kernels are known to be called as `starter` does
DIRECT = (3, 3) <= tuple(int(x) for x in triton.__version__.split(".")[:2]) <= (3, 9)
# by the kind of the arguments, then by kernel: what starts it, and what picks its arguments
_tables: dict[tuple, dict[tuple, dict[tuple, tuple]]] = {}


class Arguments:
    """Arguments of kernels by name: addresses of tensors (None where there is none), numbers and constants."""

    def __init__(self, device: torch.device):
        self.device = device
        self.current: int | None = None
        self.values: dict = {}
        self.tensors: dict[str, Tensor | None] = {}
        self.types: dict[str, tuple[torch.dtype, int] | None] = {}  # and the device: Triton refuses tensors of a CPU
        self.numbers: list[str] = []
        self.constants: dict = {}
        self.tables: dict | None = None
        self.table: dict | None = None

    def add(self, tensors: Mapping = NOTHING, numbers: Mapping = NOTHING, constants: Mapping = NOTHING) -> None:
        """A number that is constexpr to any kernel must be among the constants."""
        self.tensors |= tensors
        self.types |= {name: x if x is None else (x.dtype, x.get_device()) for name, x in tensors.items()}
        self.values |= {name: x if x is None else x.data_ptr() for name, x in tensors.items()}
        self.values |= numbers
        self.values |= constants
        self.numbers += numbers
        self.constants |= constants
        self.tables = self.table = None

    def change(self, values: Mapping[str, int]) -> None:
        """Other addresses and numbers in place of some."""
        self.values |= values
        self.table = None

    def look(self) -> dict:
        """The table for all that Triton may look at. Of addresses and numbers that is little, so there are few."""
        values = self.values
        if self.tables is None:
            # the device that Triton compiles for and launches on, whatever the tensors'
            self.current = torch.cuda.current_device() if self.device.type == "cuda" else None
            kind = self.current, *self.constants.items(), *self.types.items(), *self.numbers
            self.tables = _tables.setdefault(kind, {})
        aligned = [x is None or x % 16 == 0 for x in map(values.get, self.types)]
        numbers = [(x == 1, x % 16 == 0, -(2**31) <= x < 2**31) for x in map(values.get, self.numbers)]
        return self.tables.setdefault((*aligned, *numbers), {})

    def tensor(self, name: str) -> Tensor | None:
        """The tensor at the address values[name]."""
        return self.tensors[name]

    def launch(self, kernel, grid: tuple[int, ...], names: Mapping[str, str] = NOTHING, **options: int | None) -> None:
        """names: what arguments of the kernel are called here, where that is not their name there."""
        if self.table is None:
            self.table = self.look()
        key = kernel.fn, *names.items(), *options.items()
        grid = (*grid, 1, 1)[:3]
        if key in self.table:
            start, pick = self.table[key]
            start(grid, driver.active.get_current_stream(self.current), pick(self.values))
            return
        picked = [names.get(name, name) for name in kernel.arg_names]
        args = [self.tensor(name) if name in self.types else self.values[name] for name in picked]
        compiled = kernel[grid](*args, **options)
        # on AMD's GPUs Triton looks at the tensors' sizes, too
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            self.table[key] = starter(compiled), itemgetter(*picked)


def starter(compiled: CompiledKernel) -> Callable[[tuple[int, ...], int, tuple], None]:
    """compiled[grid](*args) on a stream, without Triton's hooks, which take as long as all the rest."""
    if not DIRECT:
        return lambda grid, stream, args: compiled[grid](*args, stream=stream)
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    return lambda grid, stream, args: run(*grid, stream, function, metadata, None, None, None, *args)
