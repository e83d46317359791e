"""Tokens -> batches: rows of equal length, in an order that is a pure function of the seed and the step.

Documents lie one after the other and are cut where a row ends; the rest of a document begins the next row as a
document of its own. Nothing is remembered between steps, so a run resumes where it stopped, on any number of processes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from t2r.data.tokens import Tokens
from t2r.errors import UserError

UNLABELLED = -100  # what cross_entropy ignores
AHEAD = 2  # batches that are prepared while the device works


@dataclass
class Batch:
    """Packed rows of one forward.

    input_ids [B,T]. labels [B,T]: the next token of the same document, UNLABELLED at its end. position_ids [B,T]: in
    the document. cu_seqlens [N+1] int64: bounds of the documents over the flattened [B*T] tokens. share []: labelled
    tokens of the whole optimizer step over the number of its forwards: what a summed loss is divided by, so that the
    mean over the step's forwards, on any number of processes, is the mean over its tokens.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    share: Tensor

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


class Rows:
    """The rows of `tokens`, `context` tokens each; what is left over at the end is not used.

    Raises UserError when there is not one row.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int = 0, name: str = "data.train") -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        # a row's last label is the token after it
        self.count = max(0, len(tokens.ids) - 1) // context
        if not self.count:
            what = f"the data has {len(tokens.ids)} tokens, less than one row of {context} and the token after it"
            raise UserError(what, where=name, nearest=f"context={max(2, len(tokens.ids) - 1)}")
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def row(self, n: int) -> int:
        """Which row is the n-th to be trained on: a new order each time through the data."""
        epoch, place = divmod(n, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            self._epoch = epoch
        return int(self._order[place])

    def step(self, step: int, rows: int, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The forwards of process `rank` in optimizer step `step`, which reads `rows` rows over `world` processes."""
        chosen = [self.row(n) for n in range(step * rows, (step + 1) * rows)]
        forwards = rows // micro_batch
        share = sum(self.labelled(row) for row in chosen) / forwards
        for forward in range(rank, forwards, world):
            yield self.batch(chosen[forward * micro_batch : (forward + 1) * micro_batch], share)

    def first(self, rows: int, micro_batch: int) -> Iterator[Batch]:
        """The first rows in their order, in whole forwards, for validation."""
        micro_batch = min(micro_batch, rows, self.count)
        forwards = min(rows, self.count) // micro_batch
        share = sum(map(self.labelled, range(forwards * micro_batch))) / forwards
        for forward in range(forwards):
            yield self.batch(list(range(forward * micro_batch, (forward + 1) * micro_batch)), share)

    def bounds(self, row: int) -> np.ndarray:
        """Where documents begin inside a row, its own beginning first."""
        begin = row * self.context
        low, high = np.searchsorted(self.tokens.starts, [begin + 1, begin + self.context])
        return np.concatenate([[0], self.tokens.starts[low:high] - begin])

    def labelled(self, row: int) -> int:
        """Tokens of a row whose next token belongs to the same document."""
        following = (row + 1) * self.context
        starts = self.tokens.starts
        at = np.searchsorted(starts, following)
        ends_a_document = at < len(starts) and starts[at] == following
        return self.context - (len(self.bounds(row)) - 1) - int(ends_a_document)

    def batch(self, rows: list[int], share: float) -> Batch:
        T = self.context
        ids = np.stack([self.tokens.ids[row * T : (row + 1) * T + 1] for row in rows]).astype(np.int64)
        bounds = [self.bounds(row) for row in rows]
        labels, positions = ids[:, 1:].copy(), np.empty((len(rows), T), np.int64)
        for i, (row, starts) in enumerate(zip(rows, bounds, strict=True)):
            labels[i, starts[1:] - 1] = UNLABELLED
            if self.labelled(row) < T - (len(starts) - 1):
                labels[i, -1] = UNLABELLED
            positions[i] = np.arange(T) - np.repeat(starts, np.diff(np.append(starts, T)))
        cu_seqlens = np.concatenate([*(starts + i * T for i, starts in enumerate(bounds)), [len(rows) * T]])
        arrays = (ids[:, :-1].copy(), labels, positions, cu_seqlens)
        return Batch(*map(torch.from_numpy, arrays), share=torch.tensor(float(share)))


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
