"""The losses of logits in one Triton kernel: a program a token, which reads the vocabulary twice.

The first pass finds the largest logit and the sum of exponentials of both models, at temperature 1 and, where it is
another, at that; the second the KL and the gradient. Threads keep a maximum and a sum of their own until the end of a
row, so that no warp waits for another while it reads. The second pass goes backwards: what was read last is still in a
cache.

Logits of -inf have probability 0, as in the reference: nothing in the KL where the teacher's are, an infinite KL where
only the student's are. NaN, +inf, rows of nothing but -inf, and labels that are no word give NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2r.data.packing import UNLABELLED

from .reference import Mix

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Logits of a step, 16 of each model a thread. Of fewer than 8 some threads would hold the same as others, and one might
# read a logit after another had written its gradient there.
BLOCK, WARPS = 8192, 16
RUN = tl.constexpr(8)  # neighbours that one thread takes: 16 bytes of half precision
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # where a maximum starts: finite, so that -inf minus it is no NaN
IGNORED = tl.constexpr(UNLABELLED)


@triton.jit
def load_step(logits, at, V):
    """[BLOCK / RUN, RUN] logits in float32, -inf beyond the vocabulary."""
    return tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)


@triton.jit
def add_exponentials(x, top, total, rate):
    """A step's share of sum 2^((x - top) rate), [BLOCK / RUN] a thread's own, with its maximum: (maximum, sum)."""
    higher = tl.maximum(top, tl.max(x, axis=1))
    return higher, total * tl.exp2((top - higher) * rate) + tl.sum(tl.exp2((x - higher[:, None]) * rate), axis=1)


@triton.jit
def log_sum(top, total, highest, rate):
    """log2 sum 2^((x - highest) rate) of all threads."""
    return tl.log2(tl.sum(total * tl.exp2((top - highest) * rate), axis=0))


@triton.jit
def loss_kernel(logits, teacher, labels, gradient, kl, ce, V, of_kl, of_ce, temperature, HAS_TEACHER: tl.constexpr,
                SOFTENED: tl.constexpr, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """kl, ce [tokens]; with HAS_GRADIENT the gradient [tokens,V] of of_kl KL + of_ce CE. SOFTENED: temperature != 1."""
    row = tl.program_id(0).to(tl.int64)  # tokens times words may be more than 2^31
    label = tl.load(labels + row)
    logits += row * V
    if HAS_GRADIENT:
        gradient += row * V
    run = tl.arange(0, BLOCK // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]

    if label == IGNORED:
        tl.store(kl + row, 0.0)
        tl.store(ce + row, 0.0)
        if HAS_GRADIENT:
            for start in range(0, V, BLOCK):
                at = start + run
                tl.store(gradient + at, tl.zeros_like(run).to(gradient.dtype.element_ty), mask=at < V)
        return

    said = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    rate = LOG2E / temperature if SOFTENED else LOG2E
    top = tl.full([BLOCK // RUN], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // RUN], tl.float32)
    if SOFTENED:
        soft_total = total
    if HAS_TEACHER:
        teacher += row * V
        their_top, their_total = top, total
    for start in range(0, V, BLOCK):
        at = start + run
        x = load_step(logits, at, V)
        if SOFTENED:
            _, soft_total = add_exponentials(x, top, soft_total, rate)
        top, total = add_exponentials(x, top, total, LOG2E)
        if HAS_TEACHER:
            their_top, their_total = add_exponentials(load_step(teacher, at, V), their_top, their_total, rate)

    highest = tl.max(top, axis=0)
    norm = log_sum(top, total, highest, LOG2E)
    tl.store(ce + row, highest - said + norm * LN2)
    if HAS_TEACHER:
        soft_norm = log_sum(top, soft_total, highest, rate) if SOFTENED else norm
        their_highest = tl.max(their_top, axis=0)
        their_norm = log_sum(their_top, their_total, their_highest, rate)
        of_soft = of_kl * temperature
    divergence = tl.zeros([BLOCK // RUN], tl.float32)
    if HAS_TEACHER or HAS_GRADIENT:
        for back in range(0, V, BLOCK):
            start = (V - 1) // BLOCK * BLOCK - back
            at = start + run
            x = load_step(logits, at, V) - highest
            slope = tl.exp2(x * LOG2E - norm) * of_ce
            if HAS_TEACHER:
                ours = x * rate - soft_norm
                theirs = (load_step(teacher, at, V) - their_highest) * rate - their_norm
                wanted = tl.exp2(theirs)
                divergence += tl.sum(tl.where(wanted == 0.0, 0.0, theirs - ours) * wanted, axis=1)
                slope = slope + tl.exp2(ours) * of_soft - wanted * of_soft
            if HAS_GRADIENT:
                if (label >= start) & (label < start + BLOCK):
                    slope -= tl.where(at == label.to(tl.int32), of_ce, 0.0)
                tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=at < V)
    tl.store(kl + row, tl.sum(divergence, axis=0) * (LN2 * temperature * temperature))


def launch(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(KL, cross-entropy), each [tokens] float32; the gradient goes to `gradient`, which may be the logits."""
    if teacher is not None and teacher.shape != logits.shape:
        raise ValueError(f"logits {list(logits.shape)} of the student, {list(teacher.shape)} of the teacher")
    tokens, V = logits.shape
    kl, ce = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(2))
    loss_kernel[(tokens,)](
        logits, teacher, labels, gradient, kl, ce, V, mix.kl, mix.ce, mix.temperature, HAS_TEACHER=teacher is not None,
        SOFTENED=teacher is not None and mix.temperature != 1, HAS_GRADIENT=gradient is not None,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return kl, ce


def token_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix) -> tuple[Tensor, Tensor]:
    """As reference.token_losses, without autograd. Raises ValueError where the models have other vocabularies."""
    teacher = None if teacher is None else teacher.contiguous()
    return launch(logits.contiguous(), labels.contiguous(), teacher, mix, None)


def with_gradient(logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.with_gradient. The gradient is written over the logits, and autograd told so: it raises RuntimeError
    if what made them needs them for its own gradient. Raises ValueError where the models have other vocabularies."""
    gradient = logits.contiguous()
    teacher = None if teacher is None else teacher.contiguous()
    kl, ce = launch(gradient, labels.contiguous(), teacher, mix, gradient)
    torch.autograd.graph.increment_version(gradient)
    return kl, ce, gradient
