"""Losses on logits that never exist for more than a chunk of tokens: cross-entropy and KL to a teacher.

The gradient of a chunk's logits is known as soon as the logits are, so it is worked out with them and only its products
with the head are kept: [tokens, width] and the head's own gradient. Where ZeRO 3 has the head in parts, chunks are
computed again in the backward pass instead.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2r.data.packing import UNLABELLED
from t2r.errors import UserError
from t2r.kernels.loss import Mix, implementation, reference, wide
from t2r.schema import LossConfig

Logits = Callable[[Tensor], Tensor]
KERNEL_BYTES = 8  # of a word's logit, for each token of a chunk: with the teacher's 16, where the reference takes 20


class Sums(NamedTuple):
    """Summed over the labelled tokens: the mixed loss, with its gradient, and both its parts, without."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


def head(model) -> Logits:
    """Hidden states -> logits, as the causal LM itself does it."""
    scale, cap = scale_and_cap(model)

    def logits(hidden: Tensor) -> Tensor:
        plain = model.lm_head(hidden)
        plain = plain if scale == 1 else plain * scale
        return plain if cap is None else torch.tanh(plain / cap) * cap

    return logits


def scale_and_cap(model) -> tuple[float, float | None]:
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # cohere's, granite's
    return scale, getattr(config, "final_logit_softcapping", None)  # gemma's


def mixed_loss(
    model, hidden: Tensor, labels: Tensor, mix: Mix, options: LossConfig, teacher=None, teacher_hidden=None
) -> Sums:
    """The loss of labels [B,T] on a model's hidden states [B,T,W]; with mix.kl also on the teacher's, [B,T,W'].

    Unlabelled tokens do not count, in the KL either. Logits exist for options.chunk tokens at a time, where the kernel
    works for four times as many in half precision and twice as many in float32: it needs no copies of them.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    theirs = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)
    if options.backend == "liger":
        return liger_loss(model, hidden, labels, mix, teacher, theirs)
    parameters = [p for p in model.lm_head.parameters() if p.requires_grad]
    sharded = any(hasattr(p, "ds_id") for p in model.lm_head.parameters())
    losses = reference if sharded else implementation(hidden)  # autograd cannot follow the kernel
    size = options.chunk if losses is reference else options.chunk * KERNEL_BYTES // hidden.element_size()
    chunks = Chunks(head(model), head(teacher) if teacher else None, theirs, labels, mix, size, losses)
    if sharded:
        return chunks.recomputed(hidden)
    return Sums(*Fused.apply(chunks, hidden, *parameters))


class Chunks(NamedTuple):
    """All that the loss of hidden states depends on beside them."""

    logits: Logits
    teacher_logits: Logits | None
    teacher_hidden: Tensor | None
    labels: Tensor
    mix: Mix
    size: int
    losses: ModuleType

    def split(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(hidden states, labels, the teacher's hidden states) of each chunk."""
        tokens, labels = hidden.split(self.size), self.labels.split(self.size)
        theirs = [None] * len(tokens) if self.teacher_hidden is None else self.teacher_hidden.split(self.size)
        return zip(tokens, labels, theirs, strict=True)

    @torch.no_grad()
    def target(self, teacher_hidden: Tensor | None) -> Tensor | None:
        return None if teacher_hidden is None else self.teacher_logits(teacher_hidden)

    def sums(self, x: Tensor, y: Tensor, x_teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """(KL, cross-entropy) of a chunk."""
        kl, ce = self.losses.token_losses(self.logits(x), y, self.target(x_teacher), self.mix)
        return kl.sum(), ce.sum()

    def with_gradients(self, x: Tensor, y: Tensor, x_teacher: Tensor | None, parameters: tuple[Tensor, ...]):
        """(KL, cross-entropy, gradients of x and the parameters) of a chunk."""
        x, target = x.detach().requires_grad_(), self.target(x_teacher)
        with torch.enable_grad():
            logits = self.logits(x)
        kl, ce, upstream = self.losses.with_gradient(logits.detach(), y, target, self.mix)
        return kl.sum(), ce.sum(), torch.autograd.grad(logits, [x, *parameters], upstream)

    def recomputed(self, hidden: Tensor) -> Sums:
        """The sums by autograd, each chunk computed again in the backward pass."""
        parts = [recomputed(self.sums, *chunk) for chunk in self.split(hidden)]
        kl, ce = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
        return Sums(self.mix.kl * kl + self.mix.ce * ce, kl.detach(), ce.detach())


class Fused(torch.autograd.Function):
    """Sums of hidden states [tokens, W] whose gradients, also those of the head's parameters, are made in forward."""

    @staticmethod
    def forward(ctx, chunks: Chunks, hidden: Tensor, *parameters: Tensor):
        wanted = ctx.needs_input_grad[1]
        kl, ce = wide(hidden.new_zeros(2))
        gradients = []
        # bfloat16 would lose what a chunk adds to the sum of those before it
        sums = [torch.zeros_like(p, dtype=kl.dtype) for p in parameters] if wanted else []
        for chunk in chunks.split(hidden):
            if wanted:
                kl_part, ce_part, (of_x, *of_parameters) = chunks.with_gradients(*chunk, parameters)
                gradients.append(of_x)
                for total, part in zip(sums, of_parameters, strict=True):
                    total += part
            else:
                kl_part, ce_part = chunks.sums(*chunk)
            kl, ce = kl + kl_part, ce + ce_part
        if wanted:
            ctx.save_for_backward(torch.cat(gradients), *sums)
            ctx.dtypes = [p.dtype for p in parameters]
        ctx.mark_non_differentiable(kl, ce)
        return chunks.mix.kl * kl + chunks.mix.ce * ce, kl, ce

    @staticmethod
    def backward(ctx, upstream: Tensor, *unused: Tensor):
        of_hidden, *sums = ctx.saved_tensors
        scaled = [(total * upstream).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)]
        return None, (of_hidden * upstream).to(of_hidden.dtype), *scaled


def recomputed(function: Callable, *args):
    """function(*args), computed again in the backward pass. It draws no random numbers, so none are kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def check_liger(model, device: str) -> None:
    """Raise UserError where liger-kernel cannot take the place of our own loss."""
    if find_spec("liger_kernel") is None:
        raise UserError("loss.backend is liger", nearest="own", next="pip install liger-kernel")
    if device != "cuda":
        raise UserError("loss.backend is liger, which needs a GPU", nearest="own")
    if scale_and_cap(model) != (1.0, None) or model.lm_head.bias is not None:
        raise UserError(f"loss.backend is liger, which does not know the head of {model.config.model_type}")


def liger_loss(model, hidden: Tensor, labels: Tensor, mix: Mix, teacher, teacher_hidden: Tensor | None) -> Sums:
    """The same by liger-kernel's fused kernels. They read the number of labelled tokens back to the host."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_jsd

    weight = model.lm_head.weight
    kl = ce = hidden.new_zeros((), dtype=torch.float32)
    if mix.ce:
        ce = liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=UNLABELLED, reduction="sum")
    if mix.kl and teacher is not None:
        mean = liger_fused_linear_jsd(
            hidden, weight, teacher_hidden, teacher.lm_head.weight, labels, 0.0, UNLABELLED, mix.temperature
        )
        kl = mean * (labels != UNLABELLED).sum() * mix.temperature**2
    return Sums(mix.kl * kl + mix.ce * ce, kl.detach(), ce.detach())
