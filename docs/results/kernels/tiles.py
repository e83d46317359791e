"""Time candidate tiles kernel by kernel on a GPU: what fills TILES of tiles.py.

    python docs/results/kernels/tiles.py OUT.json [PROCESSES]

Each candidate is checked against float64 first, many at once, as that takes a compiler each; one that is wrong or does
not compile is reported and left out. Then they are timed one by one.
"""

import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch.profiler import ProfilerActivity, profile

from t2r.bench import GATES, TOLERANCE, Shape, errors, gradients, inputs, median, ours, short, spec_of
from t2r.env import facts
from t2r.kernels.gsa import launch
from t2r.kernels.gsa.tiles import Tile

# shape: tiles (chunk, heads, warps). Not with 8 warps and chunks of 16: with 256 slots that ends in an illegal access
CANDIDATES = {
    Shape(8, 2048, 32, 8, 128, 64): [(32, 4, 8), (16, 4, 4)],
    Shape(32, 2048, 9, 3, 64, 64): [(16, 4, 4)],
    Shape(8, 2048, 32, 8, 128, 128): [(32, 4, 8), (16, 4, 4)],
    Shape(16, 2048, 4, 1, 256, 64): [(16, 4, 4)],
}


def check(candidate: tuple[Shape, Tile, str]) -> tuple[str, float] | str:
    """The worst error of a candidate, or why there is none."""
    shape, tile, gates = candidate
    launch.tile_for = lambda *args: tile
    try:
        return max(errors(short(shape), gates).items(), key=lambda x: x[1])
    except Exception as error:  # a candidate may exceed the hardware: that is an answer
        return repr(error)[:300]


def kernel_times(run) -> dict[str, float]:
    """Milliseconds of every GPU kernel in one call of `run`."""
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    times = {event.key[:40]: event.device_time_total / 5000 for event in profiled.key_averages()}
    return dict(sorted(((k, round(t, 4)) for k, t in times.items() if t > 0), key=lambda x: -x[1])[:9])


def time_one(shape: Shape, tile: Tile, gates: str) -> dict:
    launch.tile_for = lambda *args: tile
    args, spec = inputs(shape, gates), spec_of(gates, shape.M)
    do = torch.randn_like(args["q"])

    def both():
        return gradients(ours(args, spec, "triton"), args, do)

    with torch.no_grad():
        forward = median(lambda: ours(args, spec, "triton"))
    return {"forward_ms": forward, "both_ms": median(both), "kernels_ms": kernel_times(both)}


def main(out: str, processes: int = 8) -> None:
    candidates = [
        (shape, Tile(*tile), gates)
        for shape, tiles in CANDIDATES.items()
        for tile, gates in itertools.product(tiles, GATES)
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        checked = list(pool.map(check, candidates))
    record = []
    for (shape, tile, gates), worst in zip(candidates, checked, strict=True):
        row = {"shape": shape, "tile": tile, "gates": gates, "worst": worst}
        if not isinstance(worst, str) and worst[1] < TOLERANCE:
            row |= time_one(shape, tile, gates)
        record.append(row)
        print(json.dumps(row), flush=True)
        with open(out, "w") as file:
            json.dump({"facts": facts(), "rows": record}, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
