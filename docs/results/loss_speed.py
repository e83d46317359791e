"""The loss on logits, by the reference and by the kernel: errors against float64, then times and memory. Needs a GPU.

    python docs/results/loss_speed.py OUT.json [--tokens 4096] [--vocabulary 49152] [--width 576]

One line of json a result. Times are medians in ms; bandwidth: the share of a device copy's at which reading the logits
of both models once and writing the gradient would take as long. It is meant to end within 25 seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from t2r.bench import copy_bandwidth
from t2r.env import facts
from t2r.kernels.loss import Mix, fused, reference
from t2r.schema import LossConfig
from t2r.train import losses
from t2r.train.losses import mixed_loss

TOLERANCE = {"kl": 2e-5, "ce": 2e-5, "gradient": 5e-3}  # relative RMS
TILES = [
    (8192, 16),
    (4096, 8),
    (4096, 16),
    (8192, 8),
    (16384, 32),
]  # logits of a step, warps; the first is the kernel's
MODEL_TOKENS = 16384  # of one forward


def milliseconds(run: Callable) -> float:
    return round(do_bench(run, warmup=5, rep=40, return_mode="median"), 4)


def draw(tokens: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(tokens, V, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, V, (tokens,), device="cuda")
    labels[::7] = -100
    return logits, labels, logits + torch.randn_like(logits)


def errors(V: int, mix: Mix, with_teacher: bool) -> dict[str, float]:
    logits, labels, teacher = draw(256, V)
    teacher = teacher if with_teacher else None
    exact = reference.with_gradient(logits.double(), labels, teacher.double() if with_teacher else None, mix)
    found = fused.with_gradient(logits, labels, teacher, mix)
    pairs = zip(TOLERANCE, found, exact, strict=True)
    return {name: ((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for name, x, y in pairs}


def time_kernels(tokens: int, V: int, report: Callable) -> None:
    bandwidth = copy_bandwidth()
    report(what="copy", gigabytes_per_second=round(bandwidth / 1e9))
    logits, labels, teacher = draw(tokens, V)
    for theirs in (teacher, None):
        common = {"teacher": theirs is not None}
        least = (3 if common["teacher"] else 2) * logits.nbytes / bandwidth * 1e3
        args = (logits, labels, theirs, Mix(0.9, 0.1))
        report(what="reference", **common, ms=milliseconds(lambda args=args: reference.with_gradient(*args)))
        # the logits become gradients, and these again: the work does not depend on them
        for fused.BLOCK, fused.WARPS in TILES if common["teacher"] else TILES[:1]:
            ms = milliseconds(lambda args=args: fused.with_gradient(*args))
            report(what="kernel", **common, block=fused.BLOCK, warps=fused.WARPS, ms=ms, bandwidth=round(least / ms, 3))
        fused.BLOCK, fused.WARPS = TILES[0]
        report(what="kernel, value", **common, ms=milliseconds(lambda args=args: fused.token_losses(*args)))


def time_model(V: int, width: int, report: Callable) -> None:
    """Forward and backward of a head and its loss, the teacher's head with them."""

    def model() -> SimpleNamespace:
        lm_head = torch.nn.Linear(width, V, bias=False, device="cuda", dtype=torch.bfloat16)
        return SimpleNamespace(lm_head=lm_head, config=None)

    student, teacher = model(), model()
    hidden, theirs = torch.randn(2, 1, MODEL_TOKENS, width, device="cuda", dtype=torch.bfloat16)
    hidden.requires_grad_()
    labels = torch.randint(0, V, (1, MODEL_TOKENS), device="cuda")
    inputs = [hidden, student.lm_head.weight]
    for way, chunk in ((reference, 1024), (fused, 256), (fused, 1024), (fused, 2048)):
        losses.implementation = lambda x, way=way: way
        for mix in (Mix(0.9, 0.1), Mix(0.0, 1.0)):
            others = (teacher, theirs) if mix.kl else ()

            def step(mix=mix, chunk=chunk, others=others) -> None:
                sums = mixed_loss(student, hidden, labels, mix, LossConfig(chunk=chunk), *others)
                torch.autograd.grad(sums.loss, inputs)

            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ms = milliseconds(step)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            name = "reference" if way is reference else "kernel"
            common = {"what": "model", "by": name, "chunk": chunk, "teacher": bool(others)}
            top = {"top": kernel_times(step)} if way is fused and chunk == 1024 else {}
            report(**common, ms=ms, peak_gib=round(peak, 2), **top)


def kernel_times(run: Callable) -> dict[str, float]:
    """Milliseconds of the costliest GPU kernels of one call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)
    return {e.key[:60]: round(e.self_device_time_total / 1e3, 4) for e in events[:8]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("loss_speed.py times a GPU's kernel; there is no GPU here")
    torch.manual_seed(0)
    begin, environment, rows = time.perf_counter(), facts(), []

    def report(**row) -> None:
        rows.append(row | {"at_second": round(time.perf_counter() - begin, 1)})
        print(json.dumps(rows[-1]), flush=True)
        arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")

    wrong = []
    for with_teacher, temperature in ((True, 1.0), (True, 2.0), (False, 1.0)):
        found = errors(arguments.vocabulary, Mix(0.9, 0.1, temperature), with_teacher)
        report(what="error", teacher=with_teacher, temperature=temperature, **found)
        wrong += [row for row in found.items() if not row[1] < TOLERANCE[row[0]]]
    time_kernels(arguments.tokens, arguments.vocabulary, report)
    time_model(arguments.vocabulary, arguments.width, report)
    if wrong:
        sys.exit(f"over the tolerance: {wrong}")


if __name__ == "__main__":
    main()
