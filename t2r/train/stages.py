"""The three stages of a conversion: what each one runs, and its loss.

A stage is `loss(student, teacher, batch) -> (loss, metrics)`: both models are causal LMs of one family, the loss is
this forward's part of the mean over the optimizer step (Batch.share), metrics are detached scalars.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from t2r.convert.checks import hooked
from t2r.data.packing import UNLABELLED, Batch
from t2r.families import FAMILIES
from t2r.modeling.attention import GSAttention
from t2r.modeling.models import BY_BOUNDS
from t2r.schema import StageConfig
from t2r.train.losses import Mix, mixed_loss, recomputed

Loss = tuple[Tensor, dict[str, Tensor]]


def mixers(model) -> list[nn.Module]:
    """The attention modules of a causal LM, first layer first."""
    family = FAMILIES[model.config.model_type.removeprefix("gsa_")]
    return [model.model.get_submodule(family.attention.format(i)) for i in range(model.config.num_hidden_layers)]


class Stage:
    """What the stages share: their options, whether their text has lookups, and whether they run a teacher."""

    needs_teacher = True

    def __init__(self, config: StageConfig, lookups: bool = False) -> None:
        self.config, self.lookups = config, lookups

    def loss(self, student, teacher, batch: Batch) -> Loss:
        raise NotImplementedError


class Align(Stage):
    """Each student mixer reads what the teacher's attention of its layer reads and imitates what that answers."""

    def loss(self, student, teacher, batch: Batch) -> Loss:
        """Mean over layers of the error of the mixers' outputs, as o_proj puts them out."""
        lessons = attention_lessons(teacher, batch)
        context, _ = student.model.gsa_context(
            batch.input_ids, None, batch.position_ids, None, batch.cu_seqlens, batch.input_ids.shape[1]
        )

        def run(mixer: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
            return mixer(x, position_embeddings=rotary, gsa_context=context)[0]

        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        call = partial(recomputed, run) if recompute else run
        errors = []
        for mixer, (inputs, rotary, target) in zip(mixers(student), lessons, strict=True):
            if isinstance(mixer, GSAttention):
                errors.append(self.error(call(mixer, inputs, rotary).float(), target.float()))
        loss = torch.stack(errors).mean()
        return loss, {"align": loss.detach()}

    def error(self, output: Tensor, target: Tensor) -> Tensor:
        """mse: the mean of |o - t|^2 / |t|^2 over rows; cosine: that of 1 - cos(o, t) over tokens. Output o, target t
        [B,T,W]. Neither depends on how the rows of a step are split up."""
        if self.config.loss.align == "cosine":
            return 1 - cosine_similarity(output, target, dim=-1).mean()
        return ((output - target).square().sum((1, 2)) / target.square().sum((1, 2))).mean()


@torch.no_grad()
def attention_lessons(teacher, batch: Batch) -> list[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:
    """(input, rotary cos and sin, output) of each of the teacher's attention modules, from one forward."""
    lessons: list = []

    def note(module, args, kwargs, output) -> None:
        lessons.append((kwargs["hidden_states"], kwargs["position_embeddings"], output[0]))

    with hooked(mixers(teacher), after=note):
        hidden_states(teacher, batch)
    return lessons


class Distill(Stage):
    """The student's logits imitate the teacher's: kl KL(teacher || student) + (1 - kl) cross-entropy; at answers of
    lookups cross-entropy alone, where loss.answers is text."""

    def loss(self, student, teacher, batch: Batch) -> Loss:
        with torch.no_grad():
            theirs = hidden_states(teacher, batch)
        ours = hidden_states(student, batch)
        c, labels, parts = self.config.loss, batch.labels, []
        if self.lookups and c.answers == "text":
            hidden, answers, labels = apart(ours, batch)
            parts.append(mixed_loss(student, hidden, answers, Mix(kl=0.0, ce=1.0), c))
        parts.append(mixed_loss(student, ours, labels, Mix(c.kl, 1 - c.kl, c.temperature), c, teacher, theirs))
        loss, kl, ce = (sum(rest, first) / batch.share for first, *rest in zip(*parts, strict=True))
        return loss, {"kl": kl, "ce": ce}


def apart(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states [1,n+1,W] and labels [1,n+1] of the n answers of lookups, labels [B,T] without them), hidden
    [B,T,W]. The last of the n+1 has no label: a process without answers runs the head as often as the others."""
    places, labels = batch.answers, batch.labels.flatten()
    answers = labels[places]
    answers[-1:].fill_(UNLABELLED)
    rest = labels.index_fill(0, places[:-1], UNLABELLED)
    return hidden.flatten(0, 1).index_select(0, places)[None], answers[None], rest.view_as(batch.labels)


class LM(Stage):
    """The next token: cross-entropy on the text itself, no teacher."""

    needs_teacher = False

    def loss(self, student, teacher, batch: Batch) -> Loss:
        hidden = hidden_states(student, batch)
        loss, _, ce = mixed_loss(student, hidden, batch.labels, Mix(kl=0.0, ce=1.0), self.config.loss)
        return loss / batch.share, {"ce": ce / batch.share}


STAGES = {"align": Align, "distill": Distill, "lm": LM}


def hidden_states(model, batch: Batch) -> Tensor:
    """Output [B,T,W] of a causal LM before its head; documents do not see each other, in either kind of model."""
    (B, T), window = batch.input_ids.shape, getattr(model.config, "sliding_window", None)
    if getattr(model.config, "gsa", None) or model.config._attn_implementation == BY_BOUNDS:
        packing = {"position_ids": batch.position_ids, "cu_seq_lens_q": batch.cu_seqlens, "max_length_q": T}
    elif batch.cu_seqlens.numel() == B + 1:
        packing = {}  # each row is one document: plain causal attention, for which there are the fastest kernels
    elif window and window < T:
        # transformers builds the masks from the positions, at the price of one host read
        packing = {"position_ids": batch.position_ids}
    else:
        packing = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask()}
    return model.model(batch.input_ids, use_cache=False, **packing).last_hidden_state
