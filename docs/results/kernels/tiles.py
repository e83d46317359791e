"""Time candidate tiles kernel by kernel on a GPU: what fills fused.TILES.

    python docs/results/kernels/tiles.py OUT.json

Each candidate is checked against float64 first; one that is wrong or does not compile is reported and left out.
"""

import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from t2r.bench import TOLERANCE, Shape, errors, inputs, median, ours, spec_of
from t2r.env import facts
from t2r.kernels.gsa import fused
from t2r.kernels.gsa.fused import Tile

SHAPES = [Shape(8, 2048, 32, 8, 128, 64), Shape(32, 2048, 9, 3, 64, 64), Shape(8, 2048, 32, 32, 128, 64)]
TILES = [
    Tile(64, 2, output=8, inner=8, outer=8), Tile(64, 1), Tile(64, 1, output=8, inner=8, outer=8),
    Tile(32, 4, output=8, inner=8, outer=4), Tile(32, 2), Tile(32, 1), Tile(64, 4, output=8, inner=8, outer=8),
]  # fmt: skip


def kernel_times(run) -> dict[str, float]:
    """Milliseconds of every GPU kernel in one call of `run`."""
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    times = {event.key[:40]: event.device_time_total / 5000 for event in profiled.key_averages()}
    return dict(sorted(((k, round(t, 4)) for k, t in times.items() if t > 0), key=lambda x: -x[1])[:9])


def main(out: str) -> None:
    table, record = fused.tile_for, []
    for shape in SHAPES:
        for tile in TILES:
            if tile.heads > shape.HQ // shape.H:
                continue
            fused.tile_for = lambda *args, tile=tile: tile
            for gates in ("paper", "exact"):
                row = {"shape": shape, "tile": tile, "gates": gates}
                try:
                    worst = max(errors(shape._replace(B=1, T=257), gates).items(), key=lambda x: x[1])
                    row["worst"] = worst
                    args, spec = inputs(shape, gates), spec_of(gates, shape.M)
                    do = torch.randn_like(args["q"])

                    def both(args=args, spec=spec, do=do):
                        return torch.autograd.grad(ours(args, spec, "triton"), list(args.values()), do)

                    if worst[1] < TOLERANCE:
                        with torch.no_grad():
                            row["forward_ms"] = median(lambda args=args, spec=spec: ours(args, spec, "triton"))
                        row["both_ms"], row["kernels_ms"] = median(both), kernel_times(both)
                except Exception as error:  # a candidate may exceed the hardware: that is an answer
                    row["error"] = repr(error)[:200]
                record.append(row)
                print(json.dumps(row), flush=True)
                with open(out, "w") as file:
                    json.dump({"facts": facts(), "rows": record}, file, indent=1)
    fused.tile_for = table


if __name__ == "__main__":
    main(sys.argv[1])
