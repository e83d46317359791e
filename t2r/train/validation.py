"""Looking at a model between steps: loss on held-out rows, perplexity by position, what its gates and slots do."""

import json
import math
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from t2r.convert.checks import hooked
from t2r.data.packing import UNLABELLED, Batch, Mixture
from t2r.kernels.loss import Mix, implementation
from t2r.schema import StageConfig
from t2r.train.losses import head
from t2r.train.sharding import Group
from t2r.train.stages import hidden_states

EDGES = (0, 64, 256, 512, 1024)  # bounds of the buckets of positions; doubled from there on
HALF_LIVES = tuple(2**i for i in range(17))  # tokens
USES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of a slot, 1 being its even share
LOOKED_AT = 1024  # tokens of the row whose slots are looked into
QUERIES = 16  # of its positions


def edges(context: int) -> list[int]:
    """Bounds of the buckets of positions in documents of up to `context` tokens."""
    doubled = (EDGES[-1] * 2**i for i in range(1, 32))
    return [*(e for e in chain(EDGES, doubled) if e < context), context]


@torch.no_grad()
def position_losses(model, batch: Batch, chunk: int, hidden: Tensor | None = None) -> Tensor:
    """[2, buckets] float64: cross-entropy summed over the labelled tokens of each bucket, and how many these are.

    hidden [B,T,W]: the model's `hidden_states`, where they are known already."""
    hidden = (hidden_states(model, batch) if hidden is None else hidden).flatten(0, 1)
    labels, logits, losses = batch.labels.flatten(), head(model), implementation(hidden)
    parts = [
        losses.token_losses(logits(x), y, None, Mix(kl=0.0, ce=1.0))[1]
        for x, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    bounds = edges(batch.labels.shape[1])
    bucket = torch.bucketize(batch.position_ids.flatten(), torch.tensor(bounds[1:], device=labels.device), right=True)
    sums = torch.zeros(2, len(bounds) - 1, dtype=torch.float64, device=labels.device)
    sums[0].index_add_(0, bucket, torch.cat(parts).double())
    return sums.index_add_(1, bucket, torch.stack([torch.zeros_like(labels), labels != UNLABELLED]).double())


def held_out(rows: Mixture, stage: StageConfig, group: Group) -> list[tuple[Batch, float]]:
    """This process's forwards of a validation, each with its weight: all processes have as many, some of weight 0."""
    batches = list(rows.first(stage.validation_tokens // stage.context, stage.micro_batch))
    rounds = -(-len(batches) // group.world)
    mine = [(i * group.world + group.rank) for i in range(rounds)]
    return [(batches[min(i, len(batches) - 1)], float(i < len(batches))) for i in mine]


@torch.no_grad()
def validate(engine, rows: Mixture, stage: StageConfig, group: Group) -> dict:
    """validation_loss: the stage's, the mean over forwards. ppl: by position in the document. gates: see `look`.

    Every process must call it, and gets the same.
    """
    batches = held_out(rows, stage, group)
    engine.eval()
    student, seen = engine.module.student, []
    loss, sums = torch.zeros(2, dtype=torch.float64, device=group.device), 0
    for batch, weight in batches:
        batch = batch.to(group.device)
        with hooked([student.model], after=lambda *call: seen.append(call[-1].last_hidden_state)):
            loss += weight * torch.stack([engine(batch)[0].double(), loss.new_ones(())])
        # align runs the mixers alone, the other stages have run the model
        sums = sums + weight * position_losses(student, batch, stage.loss.chunk, seen.pop() if seen else None)
    gates = look(student, batches[0][0].input_ids[:1, :LOOKED_AT].to(group.device))
    engine.train()
    if group.world > 1:
        dist.all_reduce(loss)
        dist.all_reduce(sums)
    return {"validation_loss": (loss[0] / loss[1]).item(), "ppl": perplexities(sums, stage.context), "gates": gates}


@torch.no_grad()
def teacher_perplexities(
    load: Callable[[], object], rows: Mixture, stage: StageConfig, group: Group, out: Path
) -> dict[str, float]:
    """The ppl on the rows of `validate` of the teacher that `load` gets, worked out once a run: out/teacher.json."""
    path = out / "teacher.json"
    if path.exists():
        return json.loads(path.read_text())
    teacher, sums = load(), 0
    for batch, weight in held_out(rows, stage, group):
        sums = sums + weight * position_losses(teacher, batch.to(group.device), stage.loss.chunk)
    if group.world > 1:
        dist.all_reduce(sums)
    found = perplexities(sums, stage.context)
    if group.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        path.with_name(".teacher.json").write_text(json.dumps(found) + "\n")
        os.replace(path.with_name(".teacher.json"), path)
    return found


def perplexities(sums: Tensor, context: int) -> dict[str, float]:
    """{"0-64": ..., "all": ...}; a bucket without tokens is left out."""
    bounds, (losses, counts) = edges(context), sums.tolist()
    names = [f"{low}-{high}" for low, high in zip(bounds, bounds[1:], strict=False)]
    found = {name: math.exp(s / n) for name, s, n in zip(names, losses, counts, strict=True) if n}
    return found | {"all": math.exp(sum(losses) / sum(counts))} if sum(counts) else {}


@torch.no_grad()
def look(student, ids: Tensor) -> dict:
    """Histograms over all slots of the converted layers, read from one row of text ids [1, T].

    half_life: tokens after which half of a slot is gone at its mean decay, counted up to 1, 2, 4 ... tokens and more.
    use: share of the reads that a slot gets, 1 being even, counted from 0, 0.01 ... on. layers: the median half-life of
    each layer, and how many slots its reads spread over (exp of the entropy of their mean).
    """
    from t2r.evaluate.diagnostics import look_into, spied

    half_lives, uses, layers = [], [], {}

    def note(layer: int, call: dict) -> None:
        forget = call["forget"][0].double().mean(0)  # [H,M]
        half_life = math.log(2) / forget.clamp(min=1e-12)
        at = torch.linspace(ids.shape[1] // 2, ids.shape[1] - 1, QUERIES, device=ids.device).long()
        share = torch.stack([look_into(call, h, at).slots.mean((0, 1, 2)) for h in range(forget.shape[0])])
        half_lives.append(half_life.flatten())
        uses.append((share * share.shape[-1]).flatten())
        spread = torch.special.entr(share).sum(-1).exp().mean()
        layers[layer] = torch.stack([half_life.median(), spread])

    with spied(student, note):
        student.model(ids, use_cache=False)
    summary = torch.stack(list(layers.values())).tolist()
    return {
        "half_life": counts(torch.cat(half_lives), HALF_LIVES),
        "use": counts(torch.cat(uses), USES[1:]),
        "layers": {i: {"half_life": h, "slots": s} for i, (h, s) in zip(layers, summary, strict=True)},
    }


def counts(values: Tensor, bounds: tuple[float, ...]) -> list[int]:
    """How many values lie up to the first bound, up to the second ..., and beyond the last."""
    bucket = torch.bucketize(values, torch.tensor(bounds, dtype=values.dtype, device=values.device))
    return torch.bincount(bucket, minlength=len(bounds) + 1).tolist()
