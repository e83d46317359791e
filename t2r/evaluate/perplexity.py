"""Perplexity: the loss on every token of a text, read in segments through the model's cache."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from t2r.errors import UserError
from t2r.evaluate.scoring import batches, losses
from t2r.evaluate.statistics import perplexity
from t2r.evaluate.task import Outcome, Place, Plot, Task, locate, rows, take
from t2r.modeling.cache import CACHE

SEGMENT = 512  # tokens whose logits are in memory at once


def in_segments(model, ids: Tensor, segment: int) -> Iterator[Tensor]:
    """Logits [B, segment, V] for all tokens of ids [B, T] but the last, read `segment` tokens at a time; the cache is
    handed on, so that T is bounded by nothing but the model's own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for read in ids[:, :-1].to(model.device).split(segment, dim=1):
        yield model(read, **{CACHE: cache}, use_cache=True).logits


@torch.inference_mode()
def token_nll(model, ids: Tensor, segment: int = 2048) -> Tensor:
    """-log p(ids[:, t+1] | ids[:, :t+1]) in nats: ids [B, T], T >= 2 -> [B, T-1] float32 on the CPU.

    model: a causal language model of transformers, a converted one or any other. The largest tensor is
    [B, segment, vocabulary].
    """
    targets = ids[:, 1:].to(model.device).split(segment, dim=1)
    logits = in_segments(model, ids, segment)
    return torch.cat([losses(part, target).cpu() for part, target in zip(logits, targets, strict=True)], dim=1)


@dataclass
class Blocks(Task):
    """Documents in blocks of tokens, each to be read from a fresh state.

    data, field: the documents. join: a field; rows that share its value are the pieces of one document, in order.
    block: tokens; a document's rest and documents shorter than a block are left out. per_document: at most so many
    blocks of each. edges: bounds of buckets of positions.
    """

    data: str = "shipped:text"
    field: str = "text"
    join: str = ""
    block: int = 2048
    per_document: int | None = None
    edges: list[int] = dataclasses.field(default_factory=lambda: [0, 64, 256, 512, 1024, 2048])
    batch_size: int | None = 1

    noun: ClassVar[str] = "blocks"

    def bounds(self) -> dict[str, list[int]]:
        """The options that are positions in a block."""
        return {"edges": self.edges}

    def prepare(self, tokenizer, place: Place) -> list[list[int]]:
        where = f"task {self.name}"
        for key, bounds in self.bounds().items():
            if bounds != sorted(set(bounds)) or not all(0 <= bound <= self.block for bound in bounds):
                raise UserError(f"{key} {bounds} do not rise from 0 to block = {self.block}", where=where)
            if any(bound < 2 for bound in (bounds[1:] if key == "edges" else bounds)):
                raise UserError(
                    "token 0 has nothing before it to be predicted from", where=where, nearest="a bound of 2"
                )
        path, blocks = locate(self.data, place), []
        for text in self.documents(path):
            ids = tokenizer.encode(text)
            blocks += [ids[i : i + self.block] for i in range(0, len(ids) - self.block + 1, self.block)][
                : self.per_document
            ]
        if not blocks:
            raise UserError(f"no document of {self.block} tokens", where=path, nearest="a smaller `block`")
        return self.within_budget(blocks, len, place)

    def documents(self, path: Path) -> list[str]:
        if not self.join:
            return [take(row, self.field, path) for row in rows(path)]
        joined: dict[str, list[str]] = {}
        for row in rows(path):
            joined.setdefault(take(row, self.join, path), []).append(take(row, self.field, path))
        return ["".join(pieces) for pieces in joined.values()]


@dataclass
class Perplexity(Blocks):
    """Perplexity by position. totals: perplexities over the first so many tokens of a block."""

    totals: list[int] = dataclasses.field(default_factory=lambda: [1024, 2048])

    about: ClassVar[str] = (
        "Perplexity of the tokens at these positions of a block of text, a position being the number of tokens before "
        "it. Every block is read from a fresh state; the error is over blocks. A model that forgets stops improving "
        "where its memory ends."
    )
    plot: ClassVar[Plot] = Plot("Perplexity by position", "position in the text, up to (tokens)", "perplexity")

    def bounds(self) -> dict[str, list[int]]:
        return {"edges": self.edges, "totals": self.totals}

    def run(self, model, items: list[list[int]]) -> Outcome:
        parts: list[Tensor] = []
        read = lambda batch: parts.append(token_nll(model, torch.tensor(batch), SEGMENT))  # noqa: E731
        batches(items, self.batch_size, model.device, read)
        # token t is in column t - 1; token 0 is not predicted
        nll = torch.cat(parts).double()
        metrics = []
        for low, high in pairwise(self.edges):
            block_losses = nll[:, max(low - 1, 0) : high - 1].mean(-1).tolist()
            metrics.append(perplexity(f"[{low}, {high})", block_losses, x=high))
        for total in self.totals:
            metrics.append(perplexity(f"first {total}", nll[:, : total - 1].mean(-1).tolist()))
        records = [{m.name: m.samples[i] for m in metrics} for i in range(len(items))]
        return Outcome(metrics, records)
