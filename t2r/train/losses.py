"""Losses on logits that never exist for more than a chunk of tokens: cross-entropy and KL to a teacher.

The gradient of a chunk's logits is known as soon as the logits are, so it is worked out with them and only its products
with the head are kept: [tokens, width] and the head's own gradient. Where ZeRO 3 has the head in parts, chunks are
computed again in the backward pass instead.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from t2r.data.packing import UNLABELLED
from t2r.errors import UserError
from t2r.schema import LossConfig

Logits = Callable[[Tensor], Tensor]


class Mix(NamedTuple):
    """What a token's loss is: kl KL(teacher || student) + ce cross-entropy. The KL is of softmax(logits / temperature),
    times temperature^2 as is usual, so that its gradient does not fade."""

    kl: float
    ce: float
    temperature: float = 1.0


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

    Unlabelled tokens do not count, in the KL either. Logits exist for options.chunk tokens at a time.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    theirs = None if teacher_hidden is None else teacher_hidden.flatten(0, 1)
    if options.backend == "liger":
        return liger_loss(model, hidden, labels, mix, teacher, theirs)
    parameters = [p for p in model.lm_head.parameters() if p.requires_grad]
    chunks = Chunks(head(model), head(teacher) if teacher else None, theirs, labels, mix, options.chunk)
    if any(hasattr(p, "ds_id") for p in model.lm_head.parameters()):
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

    def split(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(hidden states, labels, the teacher's hidden states) of each chunk."""
        tokens, labels = hidden.split(self.size), self.labels.split(self.size)
        theirs = [None] * len(tokens) if self.teacher_hidden is None else self.teacher_hidden.split(self.size)
        return zip(tokens, labels, theirs, strict=True)

    @torch.no_grad()
    def target(self, teacher_hidden: Tensor | None) -> Tensor | None:
        return None if teacher_hidden is None else wide(self.teacher_logits(teacher_hidden))

    def recomputed(self, hidden: Tensor) -> Sums:
        """The sums by autograd, each chunk computed again in the backward pass."""

        def part(x: Tensor, y: Tensor, x_teacher: Tensor | None) -> tuple[Tensor, Tensor]:
            return token_losses(wide(self.logits(x)), y, self.target(x_teacher), self.mix)

        parts = [recomputed(part, *chunk) for chunk in self.split(hidden)]
        kl, ce = (torch.stack(sums).sum() for sums in zip(*parts, strict=True))
        return Sums(self.mix.kl * kl + self.mix.ce * ce, kl.detach(), ce.detach())


class Fused(torch.autograd.Function):
    """Sums of hidden states [tokens, W] whose gradients, also those of the head's parameters, are made in forward."""

    @staticmethod
    def forward(ctx, chunks: Chunks, hidden: Tensor, *parameters: Tensor):
        wanted = ctx.needs_input_grad[1]
        kl, ce = hidden.new_zeros((2,), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradients = []
        # bfloat16 would lose what a chunk adds to the sum of those before it
        sums = [torch.zeros_like(p, dtype=kl.dtype) for p in parameters] if wanted else []
        for x, y, x_teacher in chunks.split(hidden):
            x, target = x.detach().requires_grad_(wanted), chunks.target(x_teacher)
            with torch.set_grad_enabled(wanted):
                logits = wide(chunks.logits(x))
            if wanted:
                kl_part, ce_part, upstream = with_gradient(logits.detach(), y, target, chunks.mix)
            else:
                kl_part, ce_part = token_losses(logits, y, target, chunks.mix)
            kl, ce = kl + kl_part, ce + ce_part
            if wanted:
                of_x, *of_parameters = torch.autograd.grad(logits, [x, *parameters], upstream)
                gradients.append(of_x)
                for total, part in zip(sums, of_parameters, strict=True):
                    total += part
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


def wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix) -> tuple[Tensor, Tensor]:
    """(KL, cross-entropy) of logits [tokens, V], summed over the labelled tokens; the KL is 0 without a teacher."""
    ce = cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    if teacher is None:
        return ce.new_zeros(()), ce
    target = log_softmax(teacher / mix.temperature, dim=-1)
    ours = log_softmax(logits / mix.temperature, dim=-1)
    each = (target.exp() * (target - ours)).sum(-1)
    return torch.where(labels != UNLABELLED, each, 0.0).sum() * mix.temperature**2, ce


def with_gradient(logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """`token_losses`, and the gradient [tokens, V] of mix.kl KL + mix.ce CE by the logits. One softmax of each model
    serves both, and most steps are in place: a chunk's logits are read from memory a dozen times, not two dozen."""
    T, labelled, at = mix.temperature, (labels != UNLABELLED)[:, None], labels.clamp(min=0)[:, None]
    ours = log_softmax(logits, dim=-1)
    ce, kl = -torch.where(labelled, ours.gather(1, at), 0.0).sum(), logits.new_zeros(())
    gradient = ours.exp()
    if teacher is None:
        gradient.mul_(mix.ce)
    else:
        softened = ours if T == 1 else log_softmax(logits / T, dim=-1)
        target = log_softmax(teacher if T == 1 else teacher / T, dim=-1)
        wanted = target.exp()
        each = target.sub_(softened).mul_(wanted).sum(-1, keepdim=True)
        kl = torch.where(labelled, each, 0.0).sum() * T**2
        if T == 1:
            gradient.mul_(mix.ce + mix.kl)
        else:
            gradient.mul_(mix.ce).add_(softened.exp_(), alpha=mix.kl * T)
        gradient.sub_(wanted, alpha=mix.kl * T)
    gradient.scatter_add_(1, at, torch.full_like(at, -mix.ce, dtype=logits.dtype))
    return kl, ce, gradient.mul_(labelled)


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
