"""The losses of logits in PyTorch: what the kernel is tested against, and what runs on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from t2r.data.packing import UNLABELLED


class Mix(NamedTuple):
    """What a token's loss is: kl KL(teacher || student) + ce cross-entropy. The KL is of softmax(logits / temperature),
    times temperature^2 as is usual, so that its gradient does not fade."""

    kl: float
    ce: float
    temperature: float = 1.0


def wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix) -> tuple[Tensor, Tensor]:
    """(KL, cross-entropy), each [tokens] and at least float32, of logits [tokens, V] and the teacher's. 0 for
    unlabelled tokens, the KL also without a teacher. What has no probability in the teacher adds nothing to the KL."""
    logits = wide(logits)
    ce = cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="none")
    if teacher is None:
        return torch.zeros_like(ce), ce
    target = log_softmax(wide(teacher) / mix.temperature, dim=-1)
    ours = log_softmax(logits / mix.temperature, dim=-1)
    wanted = target.exp()
    each = torch.where(wanted == 0, 0.0, (target - ours) * wanted).sum(-1)
    return torch.where(labels != UNLABELLED, each, 0.0) * mix.temperature**2, ce


def with_gradient(logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """`token_losses`, and the gradient [tokens, V] of mix.kl KL + mix.ce CE by the logits, in their type; it may take
    the logits' place. One softmax of each model serves both, and most steps are in place: a chunk's logits are read
    from memory a dozen times, not two dozen."""
    T, labelled, at = mix.temperature, (labels != UNLABELLED)[:, None], labels.clamp(min=0)[:, None]
    ours = log_softmax(wide(logits), dim=-1)
    ce = -torch.where(labelled, ours.gather(1, at), 0.0)[:, 0]
    kl, gradient = torch.zeros_like(ce), ours.exp()
    if teacher is None:
        gradient.mul_(mix.ce)
    else:
        softened = ours if T == 1 else log_softmax(wide(logits) / T, dim=-1)
        target = log_softmax(wide(teacher) if T == 1 else wide(teacher) / T, dim=-1)
        wanted = target.exp()
        each = target.sub_(softened).mul_(wanted).masked_fill_(wanted == 0, 0.0).sum(-1, keepdim=True)
        kl = torch.where(labelled, each, 0.0)[:, 0] * T**2
        if T == 1:
            gradient.mul_(mix.ce + mix.kl)
        else:
            gradient.mul_(mix.ce).add_(softened.exp_(), alpha=mix.kl * T)
        gradient.sub_(wanted, alpha=mix.kl * T)
    gradient.scatter_add_(1, at, torch.full_like(at, -mix.ce, dtype=gradient.dtype))
    return kl, ce, gradient.mul_(labelled).to(logits.dtype)
