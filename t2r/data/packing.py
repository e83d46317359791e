"""Tokens -> batches: rows of equal length, in an order that is a pure function of the seed and the step.

Documents lie one after the other and are cut where a row ends; the rest of a document begins the next row as a
document of its own. Nothing is remembered between steps, so a run resumes where it stopped, on any number of processes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2r.data.tokens import Shard, Tokens, stretch
from t2r.errors import UserError

UNLABELLED = -100  # what cross_entropy ignores
AHEAD = 2  # batches that are prepared while the device works
BLOCK = 1000  # rows among which a mixture's parts have their exact shares


@dataclass
class Batch:
    """Packed rows of one forward.

    input_ids [B,T]. labels [B,T]: the next token of the same document, UNLABELLED at its end. position_ids [B,T]: in
    the document. cu_seqlens [N+1] int64: bounds of the documents over the flattened [B*T] tokens. share []: labelled
    tokens of the whole optimizer step over the number of its forwards: what a summed loss is divided by, so that the
    mean over the step's forwards, on any number of processes, is the mean over its tokens. answers [n+1] int64: places
    of the labels, over the flattened tokens, that are answers of lookups to what the same row says, and a 0 that is no
    answer.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    share: Tensor
    answers: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def to(self, device: torch.device) -> "Batch":
        """On a GPU the copies are asynchronous, from pinned memory."""
        tensors = [getattr(self, f.name) for f in fields(self)]
        if device.type == "cuda":
            tensors = [x.pin_memory() for x in tensors]
        return Batch(*(x.to(device, non_blocking=True) for x in tensors))

    def attention_mask(self) -> Tensor:
        """[B,1,T,T] bool: causal attention inside each document, for models that attend."""
        T = self.input_ids.shape[1]
        index = torch.arange(T, device=self.input_ids.device)
        first = (index - self.position_ids)[:, None, :, None]  # where the query's document begins
        return (index <= index[:, None]) & (index >= first)


class Row(NamedTuple):
    """One row: ids [T+1], the token after the row included; starts of its documents, 0 first; labels [T]; places of
    those that are answers, as of Batch."""

    ids: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    answers: np.ndarray


class Rows:
    """The rows of `tokens`, `context` tokens each; what is left over at the end of a shard is not used.

    boundaries: whether documents are kept apart. growing: rows of one shard are in random order, shards in theirs, so
    that training can begin before the last shard is there; else all rows are in random order.
    Raises UserError when there is not one row.
    """

    def __init__(
        self,
        tokens: Tokens,
        context: int,
        seed: int = 0,
        name: str = "data.train",
        boundaries: bool = True,
        growing: bool = False,
    ) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.boundaries, self.growing = boundaries, growing
        self._before = [0]  # rows before each shard that has been seen
        self._order: tuple[tuple[int, ...], np.ndarray] = ((), np.empty(0, np.int64))
        self.see(1 if growing else None)
        if not self.seen:
            n = len(tokens)
            what = f"the data has {n} tokens, less than one row of {context} and the token after it"
            raise UserError(what, where=name, nearest=f"context={max(2, n - 1)}")

    @property
    def seen(self) -> int:
        return self._before[-1]

    def see(self, rows: int | None) -> bool:
        """Open shards until so many rows are known, None: all. Returns whether there are so many."""
        while rows is None or self.seen < rows:
            shard = self.tokens.shard(len(self._before) - 1)
            if shard is None:
                return False
            # a row's last label is the token after it
            self._before.append(self.seen + max(0, len(shard.ids) - 1) // self.context)
        return True

    def place(self, n: int) -> int:
        """Which row is the n-th to be trained on: a new order each time through the data."""
        if self.growing and self.see(n + 1):
            epoch = 0
        else:
            epoch, n = divmod(n, self.seen)
        if not self.growing:
            return int(self.permutation(epoch, 0, self.seen)[n])
        shard = bisect_right(self._before, n) - 1
        first, last = self._before[shard : shard + 2]
        return first + int(self.permutation(epoch, shard, last - first)[n - first])

    def permutation(self, epoch: int, shard: int, count: int) -> np.ndarray:
        key = (self.seed, epoch, shard)
        if self._order[0] != key:
            self._order = (key, np.random.default_rng(key).permutation(count))
        return self._order[1]

    def locate(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and the row's first token in it."""
        shard = bisect_right(self._before, row) - 1
        return self.tokens.shard(shard), (row - self._before[shard]) * self.context

    def bounds(self, row: int) -> tuple[np.ndarray, bool]:
        """Where documents begin inside a row, its own beginning first; and whether one begins right after the row."""
        if not self.boundaries:
            return np.zeros(1, np.int64), False
        shard, begin = self.locate(row)
        low, high = np.searchsorted(shard.starts, [begin + 1, begin + self.context])
        cut = high < len(shard.starts) and shard.starts[high] == begin + self.context
        return np.concatenate([[0], shard.starts[low:high] - begin]), bool(cut)

    def labelled(self, row: int) -> int:
        """Tokens of a row that have a label."""
        starts, cut = self.bounds(row)
        if self.locate(row)[0].learned is None:
            return self.context - (len(starts) - 1) - int(cut)
        return int(self.wanted(row, starts, cut).sum())

    def wanted(self, row: int, starts: np.ndarray, cut: bool) -> np.ndarray:
        """[T] bool: whether the next token belongs to the same document and is to be learned. starts, cut: `bounds`."""
        wanted = np.ones(self.context, bool)
        wanted[starts[1:] - 1] = False
        wanted[-1] &= not cut
        shard, begin = self.locate(row)
        if shard.learned is not None:
            wanted &= stretch(shard.learned, begin + 1, begin + self.context + 1)
        return wanted

    def read(self, row: int) -> Row:
        shard, begin = self.locate(row)
        ids = stretch(shard.ids, begin, begin + self.context + 1).astype(np.int64)
        starts, cut = self.bounds(row)
        labels = np.where(self.wanted(row, starts, cut), ids[1:], UNLABELLED)
        return Row(ids, starts, labels, np.flatnonzero((labels != UNLABELLED) & self.answered(row)))

    def answered(self, row: int) -> np.ndarray:
        """[T] bool: whether the next token is an answer's, to a fact that is said in the row."""
        shard, begin = self.locate(row)
        if shard.back is None:
            return np.zeros(self.context, bool)
        back = stretch(shard.back, begin + 1, begin + self.context + 1)
        return (back > 0) & (back <= np.arange(1, self.context + 1))


class Mixture:
    """Rows of several parts in fixed shares: in each 1,000 rows every part has its number, in random order."""

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float] = (1.0,), seed: int = 0) -> None:
        self.parts, self.seed = list(parts), seed
        self.counts = shares(weights, BLOCK)
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def pick(self, n: int) -> tuple[Rows, int]:
        """The part that the n-th row comes from, and which of its own rows that is."""
        if len(self.parts) == 1:
            return self.parts[0], n
        block, at = divmod(n, BLOCK)
        if self._block[0] != block:
            deck = np.repeat(np.arange(len(self.parts)), self.counts)
            # a key of its own: with a plain (seed, block) the deck would follow the order of the rows
            self._block = (block, np.random.default_rng((self.seed, block, len(self.parts))).permutation(deck))
        part = int(self._block[1][at])
        earlier = int((self._block[1][:at] == part).sum())
        return self.parts[part], block * self.counts[part] + earlier

    def step(self, step: int, rows: int, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The forwards of process `rank` in optimizer step `step`, which reads `rows` rows over `world` processes."""
        picked = [self.pick(n) for n in range(step * rows, (step + 1) * rows)]
        chosen = [(part, part.place(n)) for part, n in picked]
        yield from forwards(chosen, micro_batch, rank, world)

    def first(self, rows: int, micro_batch: int) -> Iterator[Batch]:
        """The first rows in their order, in whole forwards, for validation; no row twice."""
        chosen: list[tuple[Rows, int]] = []
        for n in range(rows):
            part, row = self.pick(n)
            if row >= part.seen:
                break
            chosen.append((part, row))
        micro_batch = min(micro_batch, len(chosen))
        yield from forwards(chosen[: len(chosen) // micro_batch * micro_batch], micro_batch)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total` in proportion to the weights, each at least 1: the largest remainders are
    rounded up."""
    exact = [Fraction(w) * total / sum(map(Fraction, weights)) for w in weights]
    counts = [max(1, int(x)) for x in exact]
    order = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
    for i in range(total - sum(counts)):
        counts[order[i % len(order)]] += 1
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    return counts


def forwards(chosen: Sequence[tuple[Rows, int]], micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """The chosen rows in forwards of `micro_batch`, of which process `rank` has each `world`-th."""
    count = len(chosen) // micro_batch
    # 1 where nothing is labelled: the sums that it divides are 0 then
    share = max(1, sum(part.labelled(row) for part, row in chosen)) / count
    for forward in range(rank, count, world):
        mine = chosen[forward * micro_batch : (forward + 1) * micro_batch]
        yield batch([part.read(row) for part, row in mine], share)


def batch(rows: Sequence[Row], share: float) -> Batch:
    T = len(rows[0].labels)
    positions = [np.arange(T) - np.repeat(row.starts, np.diff(np.append(row.starts, T))) for row in rows]
    cu_seqlens = np.concatenate([*(row.starts + i * T for i, row in enumerate(rows)), [len(rows) * T]])
    arrays = np.stack([row.ids[:-1] for row in rows]), np.stack([row.labels for row in rows]), np.stack(positions)
    answers = np.concatenate([*(row.answers + i * T for i, row in enumerate(rows)), [0]])
    tensors = map(torch.from_numpy, (*arrays, cu_seqlens))
    return Batch(*tensors, share=torch.tensor(float(share)), answers=torch.from_numpy(answers))


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`, made by a thread while the device works."""

    def take() -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else batch.to(device)

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(take) for _ in range(AHEAD)]
        while (batch := waiting.pop(0).result()) is not None:
            waiting.append(pool.submit(take))
            yield batch
