"""Perplexity: the loss on every token of a text, read in segments through the model's cache."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from t2r.errors import UserError
from t2r.evaluate.statistics import perplexity
from t2r.evaluate.task import Outcome, Place, Plot, Task, locate, rows, take

ROWS = 256  # rows of logits that are turned into float32 losses at once
SEGMENT = 512  # tokens whose logits are in memory at once


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target. logits [..., V] of any dtype, targets [...] -> [...] float32, on the logits' device.

    Works through a few rows at a time: the float32 copy of a long text's logits would be the largest tensor of all.
    """
    pieces = zip(logits.flatten(0, -2).split(ROWS), targets.flatten().split(ROWS), strict=True)
    parts = [part.float().logsumexp(-1) - part.gather(-1, target[:, None])[:, 0].float() for part, target in pieces]
    return torch.cat(parts).view(targets.shape)


@torch.inference_mode()
def token_nll(model, ids: Tensor, segment: int = 2048) -> Tensor:
    """-log p(ids[:, t+1] | ids[:, :t+1]) in nats: ids [B, T], T >= 2 -> [B, T-1] float32 on the CPU.

    model: a causal language model of transformers, a converted one or any other. The text is read in segments of
    `segment` tokens that hand the cache on, so T is bounded by nothing but the model's own cache, and the largest
    tensor is [B, segment, vocabulary].
    """
    from transformers import DynamicCache

    ids = ids.to(model.device)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    cache = DynamicCache(config=model.config)
    parts = []
    for read, target in zip(inputs.split(segment, dim=1), targets.split(segment, dim=1), strict=True):
        logits = model(read, past_key_values=cache, use_cache=True).logits
        parts.append(losses(logits, target).cpu())
    return torch.cat(parts, dim=1)


@dataclass
class Perplexity(Task):
    """Perplexity by position: documents in blocks, each read from a fresh state.

    data, field: the documents. block: tokens; a document's rest and documents shorter than a block are left out.
    edges: bounds of the buckets of positions. totals: perplexities over the first so many tokens of a block.
    """

    data: str = "shipped:text"
    field: str = "text"
    block: int = 2048
    edges: list[int] = dataclasses.field(default_factory=lambda: [0, 64, 256, 512, 1024, 2048])
    totals: list[int] = dataclasses.field(default_factory=lambda: [1024, 2048])
    batch_size: int = 1

    about: ClassVar[str] = (
        "Perplexity of the tokens at these positions of a block of text, a position being the number of tokens before "
        "it. Every block is read from a fresh state; the error is over blocks. A model that forgets stops improving "
        "where its memory ends."
    )
    noun: ClassVar[str] = "blocks"
    plot: ClassVar[Plot] = Plot("Perplexity by position", "position in the text, up to (tokens)", "perplexity")

    def prepare(self, tokenizer, place: Place) -> list[list[int]]:
        where = f"task {self.name}"
        for key in ("edges", "totals"):
            bounds = getattr(self, key)
            if bounds != sorted(set(bounds)) or not all(0 <= bound <= self.block for bound in bounds):
                raise UserError(f"{key} {bounds} do not rise from 0 to block = {self.block}", where=where)
        if any(bound < 2 for bound in self.edges[1:] + self.totals):
            raise UserError("token 0 has nothing before it to be predicted from", where=where, nearest="a bound of 2")
        path, blocks = locate(self.data, place), []
        for row in rows(path):
            ids = tokenizer.encode(take(row, self.field, path))
            blocks += [ids[i : i + self.block] for i in range(0, len(ids) - self.block + 1, self.block)]
        if not blocks:
            raise UserError(f"no document of {self.block} tokens", where=path, nearest="a smaller `block`")
        return self.within_budget(blocks, len, place)

    def run(self, model, items: list[list[int]]) -> Outcome:
        batches = torch.tensor(items).split(self.batch_size)
        # token t is in column t - 1; token 0 is not predicted
        nll = torch.cat([token_nll(model, batch, SEGMENT) for batch in batches]).double()
        metrics = []
        for low, high in pairwise(self.edges):
            block_losses = nll[:, max(low - 1, 0) : high - 1].mean(-1).tolist()
            metrics.append(perplexity(f"[{low}, {high})", block_losses, x=high))
        for total in self.totals:
            metrics.append(perplexity(f"first {total}", nll[:, : total - 1].mean(-1).tolist()))
        records = [{m.name: m.samples[i] for m in metrics} for i in range(len(items))]
        return Outcome(metrics, records)
