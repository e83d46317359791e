"""`t2r bench kernels`: are the GSA kernels right on this GPU, and how fast are they beside fla's and softmax attention.

Every number is a median of one process on one GPU. What is wrong is not timed.

Shape legend: kernels/gsa/spec.py; HQ = H * G query heads.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from t2r.env import facts
from t2r.errors import UserError
from t2r.kernels.gsa import GSASpec, SlotState, gsa

TOLERANCE = 5e-3  # relative RMS error in bfloat16 of the output and of every gradient


class Shape(NamedTuple):
    """Batch, tokens, query heads, kv heads, head dim, slots."""

    B: int
    T: int
    HQ: int
    H: int
    D: int
    M: int

    def __str__(self) -> str:
        return f"{self.B}x{self.T} {self.HQ}/{self.H} heads of {self.D}, {self.M} slots"


SHAPES = (
    Shape(8, 2048, 32, 8, 128, 64),
    Shape(1, 16384, 32, 8, 128, 64),
    Shape(1, 65536, 32, 8, 128, 64),
    Shape(32, 2048, 9, 3, 64, 64),
    Shape(8, 2048, 32, 32, 128, 64),
    Shape(8, 2048, 32, 8, 128, 128),
    Shape(8, 2048, 32, 8, 128, 256),
)
DECODE = tuple(Shape(B, 1, 32, 8, 128, 64) for B in (1, 16, 128, 512))
GATES = ("paper", "exact", "score")  # of the presets; score: exact gates, and the token worth least makes room


def spec_of(gates: str, slots: int) -> GSASpec:
    """What `gsa` does for a converted model, from raw logits on."""
    if gates == "paper":
        return GSASpec(gate="sigmoid", damping=8.0)
    return GSASpec(gate="linear", damping=512.0, ring=slots, sinks=4, occupancy=True)


def inputs(shape: Shape, gates: str, dtype=torch.bfloat16, far: bool = False, device="cuda") -> dict[str, Tensor]:
    """Random arguments of `gsa`, leaves that require grad where there is one. far: sinks have queries of their own."""
    B, T, HQ, H, D, M = shape
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    args = {"q": randn(B, T, HQ, D), "k": randn(B, T, H, D), "v": randn(B, T, H, D), "gate": randn(B, T, H, M)}
    if gates != "paper":
        args["gate"] *= 20  # of the damping's 512: logits that learning may reach
        args |= {"write": torch.ones(H, M, device=device), "keep": torch.zeros(H, M, device=device)}
        if far:
            args["q_sink"] = randn(B, T, HQ, D)
    args = {name: x.requires_grad_() for name, x in args.items()}
    if gates == "score":  # three eighths of the slots for the last tokens, as heads of a small model choose
        args |= {"bonus": M * randn(B, T, H).float(), "recent": torch.full((H,), 3.0 * M // 8, device=device)}
    return args


def ours(args: dict[str, Tensor], spec: GSASpec, backend: str) -> Tensor:
    return gsa(**args, spec=spec, scale=args["q"].shape[-1] ** -0.5, backend=backend)[0]


def gradients(o: Tensor, args: dict[str, Tensor], do: Tensor, **options) -> dict[str, Tensor | None]:
    """By argument, of those that have one: which token makes room has none."""
    own = {name: x for name, x in args.items() if x.requires_grad}
    return dict(zip(own, torch.autograd.grad(o, list(own.values()), do, **options), strict=True))


def errors(shape: Shape, gates: str, dtype=torch.bfloat16, device="cuda") -> dict[str, float]:
    """Relative RMS error of the output and every gradient against the PyTorch form in float64, same inputs."""
    spec, args = spec_of(gates, shape.M), inputs(shape, gates, dtype, far=True, device=device)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in args.items()}
    results = []
    for tensors, backend in ((args, "triton"), (exact, "torch")):
        o = ours(tensors, spec, backend)
        do = torch.randn(o.shape, generator=torch.Generator(device).manual_seed(1), device=device)
        grads = gradients(o, tensors, do.to(dtype).to(o.dtype))
        results.append({"o": o.detach(), **{f"d {name}": x for name, x in grads.items()}})
    got, want = results
    return {
        name: ((got[name].double() - x).norm() / x.norm().clamp(min=1e-6)).item() if got[name].isfinite().all() else 1e9
        for name, x in want.items()
    }


def peer() -> Callable | None:
    """fla's chunk_gsa with its gate prologue, from raw logits; None where it is not installed."""
    try:
        from fla.ops.gsa import chunk_gsa
    except ImportError:
        return None

    def run(args: dict[str, Tensor]) -> Tensor:
        g = logsigmoid(args["gate"].float()) / 8.0
        s = (1 - g.exp()).to(args["gate"].dtype)
        return chunk_gsa(args["q"], args["k"], args["v"], s, g, scale=args["q"].shape[-1] ** -0.5)[0]

    return run


def softmax_attention(args: dict[str, Tensor]) -> Tensor:
    q, k, v = (args[name].transpose(1, 2) for name in "qkv")
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def median(run: Callable) -> float:
    """Milliseconds."""
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median")


@dataclass
class Timing:
    """One row: medians in ms, peak memory of forward and backward in GiB with the inputs, and the share of the measured
    copy bandwidth at which the inputs, outputs and their gradients, each moved once, would take as long."""

    shape: str
    what: str
    forward_ms: float
    both_ms: float | None = None
    peak_gib: float | None = None
    bandwidth_share: float | None = None


def time_one(shape: Shape, what: str, run: Callable, args: dict[str, Tensor], bandwidth: float) -> Timing:
    with torch.no_grad():
        forward = median(lambda: run(args))
    do = torch.randn_like(run(args))

    def both() -> dict:
        return gradients(run(args), args, do, allow_unused=True)

    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    moved = sum(x.numel() * x.element_size() for x in (*args.values(), do))
    time = median(both)
    return Timing(str(shape), what, forward, time, peak, 2 * moved / (time * 1e-3) / bandwidth)


def copy_bandwidth() -> float:
    """Bytes per second of a device copy, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (median(lambda: y.copy_(x)) * 1e-3)


def time_decode(shape: Shape, bandwidth: float) -> Timing:
    """One token of every sequence, the memory read and written in place."""
    B, _, _, H, D, M = shape
    spec, args = spec_of("exact", M), {name: x.detach() for name, x in inputs(shape, "exact").items()}
    state = SlotState.empty(B, H, M, D, D, "cuda")
    positions = torch.full((B, 1), 1000, device="cuda")
    common = {"spec": spec, "scale": D**-0.5, "positions": positions, "output_final_state": True, "backend": "triton"}

    @torch.no_grad()
    def run() -> None:
        gsa(**args, **common, initial_state=state, overwrite_state=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    time = median(graph.replay)
    moved = 2 * sum(x.numel() * x.element_size() for x in state[:3])
    return Timing(str(shape), "ours, decode", time, bandwidth_share=moved / (time * 1e-3) / bandwidth)


def table(rows: list[Timing]) -> str:
    """The rows as a Markdown table."""
    titles = ("shape", "", "forward ms", "forward + backward ms", "peak GiB", "of copy bandwidth")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        numbers = [f"{row.forward_ms:.3f}", *("" if x is None else f"{x:.2f}" for x in (row.both_ms, row.peak_gib))]
        share = "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}"
        lines.append(f"| {row.shape} | {row.what} | {' | '.join(numbers)} | {share} |")
    return "\n".join(lines)


def plot(rows: list[Timing], file: Path) -> None:
    """Bars of forward + backward by shape."""
    from t2r.evaluate.plots import STYLES, require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.both_ms is not None]
    shapes, kinds = (list(dict.fromkeys(x)) for x in ([r.shape for r in rows], [r.what for r in rows]))
    figure = Figure(figsize=(9, 0.5 + 0.9 * len(shapes)), layout="constrained")
    axes = figure.subplots()
    for i, kind in enumerate(kinds):
        mine = [row for row in rows if row.what == kind]
        height = 0.8 / len(kinds)
        places = [shapes.index(row.shape) + i * height for row in mine]
        bars = axes.barh(places, [row.both_ms for row in mine], height, label=kind, color=STYLES[i % len(STYLES)][0])
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks([i + 0.4 - 0.4 / len(kinds) for i in range(len(shapes))], shapes, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("forward + backward, ms")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def parse_shape(text: str) -> Shape:
    try:
        return Shape(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise UserError(f"a shape is six numbers B,T,HQ,H,D,M, not '{text}'", nearest="8,2048,32,8,128,64") from None


def short(shape: Shape) -> Shape:
    """The shape at which a shape is checked: the same kernels, 257 tokens."""
    return shape._replace(B=1, T=257)


def check(shapes: list[Shape], gates: list[str]) -> dict[tuple[Shape, str], dict[str, float]]:
    """`errors` of every shape, made short, with every kind of gates. Each needs a compiler of its own, so
    they run side by side; the timings then find everything compiled."""
    cases = list(dict.fromkeys((short(shape), kind) for shape in shapes for kind in gates))
    with ProcessPoolExecutor(min(len(cases), os.cpu_count()), mp_context=get_context("spawn")) as pool:
        found = [pool.submit(errors, *case) for case in cases]
        return {case: error.result() for case, error in zip(cases, found, strict=True)}


def judge(found: dict[tuple[Shape, str], dict[str, float]]) -> set[tuple[Shape, str]]:
    """Print the worst error of every shape and kind of gates; returns those whose error is too large."""
    wrong = set()
    for (shape, kind), of in found.items():
        worst = max(of, key=of.get)
        print(f"{kind}: {shape}: worst error {of[worst]:.1e} ({worst})", flush=True)
        if of[worst] > TOLERANCE:
            wrong.add((shape, kind))
    return wrong


def bench(what: str, shapes: list[str], gates: list[str] | None, decode: bool, out: str | None) -> None:
    """Check, then time; print the table, and write bench.json and bench.png into the folder `out` if given."""
    shapes, gates = [parse_shape(text) for text in shapes] or list(SHAPES), gates or list(GATES)
    if not torch.cuda.is_available():
        raise UserError("kernels are timed on an NVIDIA GPU, and there is none here", next="t2r env")
    bandwidth, other = copy_bandwidth(), peer()
    print(f"{torch.cuda.get_device_name()}, device copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    checks, rows = check(shapes, gates), []
    wrong = judge(checks)
    for shape in shapes:
        for kind in gates:
            if (short(shape), kind) in wrong:
                continue
            args, spec = inputs(shape, kind), spec_of(kind, shape.M)
            run = lambda args, spec=spec: ours(args, spec, "triton")  # noqa: E731
            rows.append(time_one(shape, f"ours, {kind} gates", run, args, bandwidth))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        args = inputs(shape, "paper")
        for name, run in (("fla", other), ("SDPA", softmax_attention)):
            if run is not None:
                rows.append(time_one(shape, name, run, args, bandwidth))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    if decode:
        rows += [time_decode(shape, bandwidth) for shape in DECODE]
    print(table(rows))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "facts": facts(),
            "copy_bytes_per_s": bandwidth,
            "errors": {f"{kind}: {shape}": of for (shape, kind), of in checks.items()},
            "rows": [asdict(r) for r in rows],
        }
        (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
        plot(rows, folder / "bench.png")
    if wrong:
        names = "; ".join(f"{kind}: {shape}" for shape, kind in sorted(wrong))
        raise UserError(
            f"the kernels are wrong on this GPU, so not timed: an error of over {TOLERANCE:.0e}",
            where=names, next="t2r env, and report both",
        )  # fmt: skip
