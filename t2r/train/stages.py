"""The three stages of a conversion: what each one runs, and its loss.

A stage is `loss(student, teacher, batch) -> (loss, metrics)`: both models are causal LMs of one family, the loss is
this forward's part of the mean over the optimizer step (Batch.share), metrics are detached scalars.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from t2r.data.packing import UNLABELLED, Batch
from t2r.families import FAMILIES
from t2r.modeling.attention import GSAttention
from t2r.schema import StageConfig

Loss = tuple[Tensor, dict[str, Tensor]]
Head = Callable[[Tensor], Tensor]


def mixers(model) -> list[nn.Module]:
    """The attention modules of a causal LM, first layer first."""
    family = FAMILIES[model.config.model_type.removeprefix("gsa_")]
    return [model.model.get_submodule(family.attention.format(i)) for i in range(model.config.num_hidden_layers)]


class Stage:
    """What the stages share: their options, and whether they run a teacher."""

    needs_teacher = True

    def __init__(self, config: StageConfig) -> None:
        self.config = config

    def loss(self, student, teacher, batch: Batch) -> Loss:
        raise NotImplementedError


class Align(Stage):
    """Each student mixer reads what the teacher's attention of its layer reads and imitates what that answers."""

    def loss(self, student, teacher, batch: Batch) -> Loss:
        """Mean over layers and rows of |o - o_teacher|^2 / |o_teacher|^2, both as o_proj puts them out.

        The ratio is taken for each row, so that a step's loss does not depend on how its rows are split up.
        """
        lessons = attention_lessons(teacher, batch)
        context, _ = student.model.gsa_context(batch.input_ids, None, batch.position_ids, None, batch.cu_seqlens)
        errors = []
        for mixer, (inputs, rotary, target) in zip(mixers(student), lessons, strict=True):
            run = lambda mixer, x, rotary: mixer(x, position_embeddings=rotary, gsa_context=context)[0]  # noqa: E731
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                output = recomputed(run, mixer, inputs, rotary)
            else:
                output = run(mixer, inputs, rotary)
            target = target.float()
            error = (output.float() - target).square().sum((1, 2)) / target.square().sum((1, 2))
            errors.append(error.mean())
        loss = torch.stack(errors).mean()
        return loss, {"align": loss.detach()}


@torch.no_grad()
def attention_lessons(teacher, batch: Batch) -> list[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:
    """(input, rotary cos and sin, output) of each of the teacher's attention modules, from one forward."""
    lessons: list = []

    def note(module, args, kwargs, output) -> None:
        lessons.append((kwargs["hidden_states"], kwargs["position_embeddings"], output[0]))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in mixers(teacher)]
    try:
        hidden_states(teacher, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return lessons


class Distill(Stage):
    """The student's logits imitate the teacher's: kl KL(teacher || student) + (1 - kl) cross-entropy."""

    def loss(self, student, teacher, batch: Batch) -> Loss:
        with torch.no_grad():
            theirs = hidden_states(teacher, batch)
        ours = hidden_states(student, batch)
        c = self.config.loss
        kl, ce = sums(head(student), ours, batch.labels, c.chunk, head(teacher), theirs, c.temperature)
        kl, ce = kl / batch.labels.numel(), ce / batch.share
        return c.kl * kl + (1 - c.kl) * ce, {"kl": kl.detach(), "ce": ce.detach()}


class LM(Stage):
    """The next token: cross-entropy on the text itself, no teacher."""

    needs_teacher = False

    def loss(self, student, teacher, batch: Batch) -> Loss:
        _, ce = sums(head(student), hidden_states(student, batch), batch.labels, self.config.loss.chunk)
        ce = ce / batch.share
        return ce, {"ce": ce.detach()}


STAGES = {"align": Align, "distill": Distill, "lm": LM}


def hidden_states(model, batch: Batch) -> Tensor:
    """Output [B,T,W] of a causal LM before its head; documents do not see each other, in either kind of model."""
    window = getattr(model.config, "sliding_window", None)
    if isinstance(mixers(model)[0], GSAttention):
        packing = {"cu_seq_lens_q": batch.cu_seqlens}
    elif window and window < batch.input_ids.shape[1]:
        packing = {}  # transformers builds the masks from the positions, at the price of one host read
    else:
        packing = {"attention_mask": batch.attention_mask()}
    output = model.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packing)
    return output.last_hidden_state


def head(model) -> Head:
    """Hidden states -> logits, as the causal LM itself does it."""
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # cohere's, granite's
    cap = getattr(config, "final_logit_softcapping", None)  # gemma's

    def logits(hidden: Tensor) -> Tensor:
        plain = model.lm_head(hidden)
        plain = plain if scale == 1 else plain * scale
        return plain if cap is None else torch.tanh(plain / cap) * cap

    return logits


def sums(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    chunk: int,
    teacher_head: Head | None = None,
    teacher_hidden: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(KL summed over all tokens, cross-entropy summed over labelled ones); the KL is 0 without a teacher.

    hidden, teacher_hidden [B,T,W], labels [B,T]. Logits exist for `chunk` tokens at a time, in the backward pass too,
    where they are computed again. The KL is of softmax(logits / temperature), times temperature^2 as is usual.
    """

    def part(x: Tensor, y: Tensor, x_teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(x).float()
        ce = cross_entropy(logits, y, ignore_index=UNLABELLED, reduction="sum")
        if x_teacher is None:
            return ce.new_zeros(()), ce
        with torch.no_grad():
            target = log_softmax(teacher_head(x_teacher).float() / temperature, dim=-1)
        ours = log_softmax(logits / temperature, dim=-1)
        kl = (target.exp() * (target - ours)).sum() * temperature**2
        return kl, ce

    tokens = hidden.flatten(0, 1).split(chunk)
    targets = labels.flatten().split(chunk)
    theirs = [None] * len(tokens) if teacher_hidden is None else teacher_hidden.flatten(0, 1).split(chunk)
    parts = [recomputed(part, *args) for args in zip(tokens, targets, theirs, strict=True)]
    kl, ce = zip(*parts, strict=True)
    return torch.stack(kl).sum(), torch.stack(ce).sum()


def recomputed(function: Callable, *args):
    """function(*args), computed again in the backward pass. It draws no random numbers, so none are kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
