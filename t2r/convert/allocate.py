"""`t2r slots`: how many slots each layer needs, measured on the source before anything is converted.

An exact start of M slots is its source with attention cut to a window of M tokens, sinks included (here at their true
distance). So the source itself tells what a number of slots costs: its loss on a text with all layers in equal windows,
and with one layer at a time in another. Numbers are chosen that lower the loss most at the same total, and measured
again around that choice: two layers that lose their memory together lose more than each alone.

Shape legend: N texts, T tokens, W hidden size, L layers.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from t2r.convert.checks import hooked, ring_window
from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.data.sources import resolve
from t2r.errors import UserError
from t2r.evaluate.models import pick_device
from t2r.families import family_of
from t2r.modeling.configuration import fit_layers, preset
from t2r.train.losses import head

SIZES = (16, 32, 64, 128, 256)  # the numbers of slots that there are kernels for


class Windows:
    """A causal LM and texts ids [N,T] that it reads with each layer's attention cut to a window."""

    def __init__(self, model, ids: Tensor, sinks: int) -> None:
        self.model, self.ids, self.sinks = model, ids, sinks
        self.layers, self.masks, calls = model.model.layers, {}, []
        with hooked(self.layers, before=lambda layer, args, kwargs: calls.append((args, kwargs))):
            self.full = self.loss(model.model(ids, use_cache=False).last_hidden_state, normed=True)
        self.embedded = calls[0][0][0]
        self.calls = [(args[1:], kwargs) for args, kwargs in calls]  # not the hidden states, one for every layer

    def mask(self, i: int, slots: int) -> Tensor:
        """[1,1,T,T] added to the attention's logits of layer i: what its conversion to `slots` begins with."""
        config = self.model.config
        gsa = fit_layers(preset("exact", sinks=self.sinks), config, {i: slots}, []).gsa_layers(config)[i]
        key = gsa.ring, gsa.sinks
        if key not in self.masks:
            seen = ring_window(gsa, self.ids.shape[1])
            least = torch.finfo(self.embedded.dtype).min
            self.masks[key] = torch.where(seen, 0.0, least)[None, None].to(self.embedded)
        return self.masks[key]

    def read(self, i: int, x: Tensor, slots: int) -> Tensor:
        """Layer i on hidden states x [N,T,W]."""
        args, kwargs = self.calls[i]
        y = self.layers[i](x, *args, **{**kwargs, "attention_mask": self.mask(i, slots)})
        return y[0] if isinstance(y, tuple) else y

    def loss(self, x: Tensor, normed: bool = False) -> float:
        """Mean cross-entropy in nats a token, from the last layer's output [N,T,W]."""
        logits = head(self.model)
        x = x if normed else self.model.model.norm(x)
        rows = [cross_entropy(logits(row[:-1]).float(), ids[1:]) for row, ids in zip(x, self.ids, strict=True)]
        return torch.stack(rows).mean().item()

    def states(self, sizes: Sequence[int]) -> list[Tensor]:
        """What every layer reads, and the last one's output."""
        states = [self.embedded]
        for i, slots in enumerate(sizes):
            states.append(self.read(i, states[-1], slots))
        return states

    def measure(self, sizes: Sequence[int]) -> float:
        return self.loss(self.states(sizes)[-1])

    def changes(self, sizes: Sequence[int], options: Sequence[Iterable[int]]) -> list[dict[int, float]]:
        """Of each layer: slots -> change of the loss if it alone had so many, its other options being `options`."""
        states, found = self.states(sizes), []
        now = self.loss(states[-1])
        for i, own in enumerate(sizes):
            found.append({own: 0.0})
            for slots in options[i]:
                x = self.read(i, states[i], slots)
                for later in range(i + 1, len(sizes)):
                    x = self.read(later, x, sizes[later])
                found[i][slots] = self.loss(x) - now
            row = ", ".join(f"{slots}: {change:+.4f}" for slots, change in sorted(found[i].items()) if slots != own)
            print(f"layer {i}, {own} slots, loss with {row}", flush=True)
        return found


def choose(changes: Sequence[dict[int, float]], budget: int) -> list[int]:
    """One size a layer, `budget` at most together, of the least sum of changes."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for options in changes:
        found: dict[int, tuple[float, list[int]]] = {}
        for used, (total, sizes) in best.items():
            for slots, change in options.items():
                whole = used + slots
                if whole <= budget and (whole not in found or total + change < found[whole][0]):
                    found[whole] = total + change, [*sizes, slots]
        best = found
    return min(best.values())[1]


def neighbours(slots: int) -> tuple[int, ...]:
    at = SIZES.index(slots)
    return SIZES[max(at - 1, 0) : at] + SIZES[at + 1 : at + 2]


class Allocation(NamedTuple):
    """sizes: slots of each layer. Losses in nats a token: with as many in each, with these, with full attention."""

    sizes: list[int]
    even: float
    uneven: float
    full: float

    @property
    def option(self) -> str:
        """The value of --layer-slots."""
        parts, i = [], 0
        for slots, run in groupby(self.sizes):
            last = i + len(list(run)) - 1
            parts.append(f"{i}={slots}" if i == last else f"{i}-{last}={slots}")
            i = last + 1
        return ",".join(parts)


def blocks(tokenizer, specs: Sequence[str], texts: int, context: int, otherwise: str = "a smaller --context") -> Tensor:
    """ids [N,T]: the first `context` tokens of documents that have so many, of each spec in turn, `texts` in all.
    otherwise: what a user could do where none has."""

    def long_enough(spec: str) -> Iterator[list[int]]:
        for source in resolve([spec]):
            for document in source.documents("text"):
                ids = tokenizer(document[: 16 * context]).input_ids[:context] if isinstance(document, str) else []
                if len(ids) == context:
                    yield ids

    in_turn = zip_longest(*map(long_enough, specs))
    found = list(islice((ids for each in in_turn for ids in each if ids), texts))
    if not found:
        raise UserError(f"no document of {context} tokens", where=", ".join(specs), nearest=otherwise)
    return torch.tensor(found)


@torch.inference_mode()
def allocate(windows: Windows, slots: int, rounds: int) -> Allocation:
    """Sizes of the same total as `slots` in each layer, no worse than these."""
    sizes = [slots] * len(windows.layers)
    even = best = windows.measure(sizes)
    print(f"loss {windows.full:.4f} with full attention, {even:.4f} with {slots} slots in each layer", flush=True)
    for number in range(rounds):
        changes = windows.changes(sizes, [neighbours(own) if number else SIZES for own in sizes])
        chosen = choose(changes, slots * len(sizes))
        loss = windows.measure(chosen)
        print(f"loss {loss:.4f} with {chosen}", flush=True)
        if loss >= best:
            break
        sizes, best = chosen, loss
    return Allocation(sizes, even, best, windows.full)


def slots(
    source: str,
    slots: int = 64,
    sinks: int | None = None,
    text: Sequence[str] = ("shipped:train",),
    texts: int = 4,
    context: int = 1024,
    rounds: int = 2,
    device: str | None = None,
) -> None:
    """Print how many slots each layer of `source` (anything that `t2r convert` reads) should have, of as many in all as
    `slots` in each, measured on the first `context` tokens of `texts` documents of `text` (see DataConfig.train).

    rounds: of measuring; each after the first tries the neighbours of the sizes chosen before. Raises UserError.
    """
    if slots not in SIZES:
        sizes = ", ".join(map(str, SIZES))
        raise UserError(
            f"--slots {slots}: layers get one of {sizes} each", nearest=min(SIZES, key=lambda size: abs(size - slots))
        )
    if min(texts, rounds) < 1 or context <= slots:
        raise UserError("--texts and --rounds must be positive, --context more than --slots")
    place, sinks = pick_device(device), preset("exact", slots=min(SIZES), sinks=sinks).sinks
    opened = open_source(source)
    family_of(opened.config.model_type, where=opened.path)
    ids = blocks(opened.load_tokenizer(), text, texts, context)
    model = load_source(opened).to(place, torch.bfloat16 if place.type == "cuda" else torch.float32)
    with torch.inference_mode():
        windows = Windows(model, ids.to(place), sinks)
    found = allocate(windows, slots, rounds)
    full, even, uneven = (f"{math.exp(loss):.2f}" for loss in (found.full, found.even, found.uneven))
    print(f"perplexity of {ids.numel():,} tokens: {full} with full attention, {even} with {slots} slots in each layer,")
    print(f"{uneven} with {sum(found.sizes):,} slots, {slots * len(found.sizes):,} being as many:")
    print(f"t2r convert {source} OUT --slots {slots} --layer-slots {found.option}")
