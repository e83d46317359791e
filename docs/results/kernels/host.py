"""The host's time of the GSA kernels' launches on a GPU, by Triton and past it (kernels/gsa/arguments.py), and whether
the two give the same bits.

    python docs/results/kernels/host.py OUT.json

Times are of a shape that is nothing to a GPU, so that the host is what takes them: microseconds of forward and
backward, launches in them, and microseconds of a launch, which by Triton are also those of cutting tensors for it. Bits
are compared for long and short texts, parts, documents, memories, types and alignments; on another stream, and the
output out of a CUDA graph.
"""

import json
import sys
import time
from contextlib import contextmanager
from unittest import mock

import torch

from t2r.bench import Shape, inputs, spec_of
from t2r.env import facts
from t2r.kernels.gsa import SlotState, gsa, launch
from t2r.kernels.gsa.arguments import Arguments

SMALL = Shape(4, 256, 9, 3, 64, 64)
# what is compared: shape, type, and which of parts, documents, memory, odd addresses
CASES = [
    (Shape(8, 2048, 32, 8, 128, 64), torch.bfloat16, ()),
    (Shape(32, 2048, 9, 3, 64, 64), torch.bfloat16, ()),
    (Shape(1, 16384, 4, 1, 64, 64), torch.bfloat16, ()),
    (Shape(4, 333, 9, 3, 64, 64), torch.bfloat16, ("parts", "memory")),
    (Shape(1, 700, 8, 4, 64, 32), torch.bfloat16, ("parts", "documents", "memory")),
    (Shape(3, 65, 4, 2, 80, 32), torch.bfloat16, ("parts", "odd")),
    (Shape(2, 130, 4, 2, 64, 64), torch.float32, ("parts", "memory", "odd")),
    (Shape(2, 130, 4, 2, 64, 64), torch.float16, ("memory",)),
]


@contextmanager
def by_triton():
    """Every launch as if it were the first."""
    with mock.patch.object(Arguments, "look", lambda self: {}):
        yield


def arguments(shape: Shape, gates: str, dtype: torch.dtype, what: tuple[str, ...]) -> tuple[dict, dict]:
    """(Tensors with gradients, the rest) for gsa()."""
    B, T, _, H, D, M = shape
    args, rest = inputs(shape, gates, dtype), {"spec": spec_of(gates, M), "scale": D**-0.5, "backend": "triton"}
    if "odd" in what:
        for name in ("q", "k", "gate"):
            x = args[name].detach()
            args[name] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape).requires_grad_()
    documents = 4 if "documents" in what else B
    if "documents" in what:
        rest["cu_seqlens"] = torch.tensor([0, 1, T // 3, T // 3, T], device="cuda")
    if "memory" in what:
        state = SlotState.empty(documents, H, M, D, D, "cuda")
        state = SlotState(*(torch.rand_like(x) + 0.1 for x in state[:3]), *state[3:])
        rest |= {"initial_state": state, "output_final_state": True}
    return args, rest


def both(args: dict, rest: dict) -> list[torch.Tensor]:
    """Outputs and gradients."""
    o, final = gsa(**args, **rest)
    outputs = [o] if final is None else [o, *(x for x in final[:3] if x.requires_grad)]
    generator = torch.Generator("cuda").manual_seed(1)
    given = [torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(args.values()), given)]


def host(args: dict, rest: dict, calls: int = 200) -> dict[str, float]:
    """Microseconds of the host."""
    o, _ = gsa(**args, **rest)
    do, leaves = torch.ones_like(o), list(args.values())
    count, within = 0, 0.0
    launch = Arguments.launch

    def counted(self, *args, **options):
        nonlocal count, within
        begin = time.perf_counter()
        launch(self, *args, **options)
        count, within = count + 1, within + time.perf_counter() - begin

    def run(times: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            torch.autograd.grad(gsa(**args, **rest)[0], leaves, do)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times * 1e6

    run(20)
    whole = min(run(calls) for _ in range(3))
    with mock.patch.object(Arguments, "launch", counted):
        run(calls)
    return {"both_us": whole, "launches": count / calls, "launch_us": within / count * 1e6}


def same(shape: Shape, gates: str, dtype: torch.dtype, what: tuple[str, ...]) -> dict[str, bool]:
    """By Triton and past it, on another stream, and replayed from a CUDA graph."""
    args, rest = arguments(shape, gates, dtype, what)
    with mock.patch.object(launch, "SCRATCH", 0 if "parts" in what else launch.SCRATCH):
        with mock.patch.object(launch, "PROGRAMS", 24 if "parts" in what else launch.PROGRAMS):
            with by_triton():
                want = both(args, rest)
            both(args, rest)
            got = {"again": both(args, rest)}
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got["stream"] = both(args, rest)
            stream.synchronize()
            if "documents" not in what:
                graph = torch.cuda.CUDAGraph()
                with torch.no_grad(), torch.cuda.graph(graph):
                    replayed = gsa(**args, **rest)[0]
                replayed.zero_()
                graph.replay()
                got["graph"] = [replayed]
    torch.cuda.synchronize()
    return {name: all(torch.equal(x, y) for x, y in zip(found, want)) for name, found in got.items()}  # noqa: B905


def main(out: str) -> None:
    record = {"facts": facts(), "host": {}, "same": []}
    for gates in ("paper", "exact"):
        for scratch in (launch.SCRATCH, 0):
            with mock.patch.object(launch, "SCRATCH", scratch), mock.patch.object(launch, "PROGRAMS", 32):
                args, rest = arguments(SMALL, gates, torch.bfloat16, ())
                name = gates + (", in parts" if not scratch else "")
                with by_triton():
                    before = host(args, rest)
                record["host"][name] = {"triton": before, "direct": host(args, rest)}
                print(name, json.dumps(record["host"][name]), flush=True)
    for shape, dtype, what in CASES:
        for gates in ("paper", "exact"):
            row = {"shape": str(shape), "dtype": str(dtype), "what": what, "gates": gates}
            record["same"].append(row | same(shape, gates, dtype, what))
            print(json.dumps(record["same"][-1]), flush=True)
    with open(out, "w") as file:
        json.dump(record, file, indent=1)
    if not all(row.get(name, True) for row in record["same"] for name in ("again", "stream", "graph")):
        sys.exit("other bits than by Triton's launches")


if __name__ == "__main__":
    main(sys.argv[1])
