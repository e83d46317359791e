"""`t2r slots`: how many slots each layer needs, measured on the source before anything is converted.

An exact start of M slots is its source with attention cut to a window of M tokens, sinks included (here at their true
distance), or, with eviction by score, to the tokens that are worth most. So the source itself tells what a number of
slots costs: its loss on a text with all layers in equal memories, and with one layer at a time in another. Numbers are
chosen that lower the loss most at the same total, and measured again around that choice: two layers that lose their
memory together lose more than each alone.

Shape legend: N texts, T tokens, W hidden size, L layers.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from t2r.convert.checks import gsa_mixers, hooked, ring_window
from t2r.convert.evict import TEXTS, blocks, fit_mixers, next_turn, score_texts
from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.errors import UserError
from t2r.evaluate.models import pick_device
from t2r.families import family_of
from t2r.kernels.gsa import SlotState
from t2r.kernels.gsa.evict import evict
from t2r.modeling.configuration import GSAConfig, fit_layers, preset
from t2r.train.losses import head

SIZES = (16, 32, 64, 128, 256)  # the numbers of slots that there are kernels for


class Windows:
    """A causal LM and texts ids [N,T] that it reads with each layer's attention cut to a window."""

    eviction = "oldest"

    def __init__(self, model, ids: Tensor, sinks: int) -> None:
        self.model, self.ids, self.sinks = model, ids, sinks
        self.layers, self.masks, calls = model.model.layers, {}, []
        with hooked(self.layers, before=lambda layer, args, kwargs: calls.append((args, kwargs))):
            self.full = self.loss(model.model(ids, use_cache=False).last_hidden_state, normed=True)
        self.embedded = calls[0][0][0]
        self.calls = [(args[1:], kwargs) for args, kwargs in calls]  # not the hidden states, one for every layer

    def gsa(self, i: int, slots: int) -> GSAConfig:
        """Layer i converted to so many slots."""
        config = self.model.config
        return fit_layers(preset("exact", None, self.sinks, self.eviction), config, {i: slots}, []).gsa_layers(config)[
            i
        ]

    def mask(self, gsa: GSAConfig) -> Tensor:
        """[1,1,T,T] added to the attention's logits of a layer: what its conversion begins with."""
        key = gsa.ring, gsa.sinks
        if key not in self.masks:
            seen = ring_window(gsa, self.ids.shape[1])
            least = torch.finfo(self.embedded.dtype).min
            self.masks[key] = torch.where(seen, 0.0, least)[None, None].to(self.embedded)
        return self.masks[key]

    def read(self, i: int, x: Tensor, slots: int) -> Tensor:
        """Layer i on hidden states x [N,T,W]."""
        args, kwargs = self.calls[i]
        y = self.layers[i](x, *args, **{**kwargs, "attention_mask": self.mask(self.gsa(i, slots))})
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


class Scored(Windows):
    """The same with each layer's attention cut to the tokens that slots by score would hold. fit_ids [N,T]: other
    texts, on which the scores are fitted."""

    eviction = "score"

    def __init__(self, model, ids: Tensor, sinks: int, fit_ids: Tensor) -> None:
        super().__init__(model, ids, sinks)
        every = {i: [gsa for size in SIZES if (gsa := self.gsa(i, size)).scored] for i in range(len(self.layers))}
        options = {i: own for i, own in every.items() if own}
        self.mixers = gsa_mixers(model, options)
        self.scores = {
            (i, gsa.slots): {name: x.to(ids.device) for name, x in tensors.items()}
            for i, fitted in fit_mixers(model, fit_ids, options, "near").items()  # what counts here is the next words
            for gsa, tensors in zip(options[i], fitted, strict=True)
        }

    def read(self, i: int, x: Tensor, slots: int) -> Tensor:
        gsa = self.gsa(i, slots)
        if not gsa.scored:
            return super().read(i, x, slots)
        args, kwargs = self.calls[i]
        with hooked([self.mixers[i]], before=partial(self.forget, gsa, self.scores[i, slots])):
            y = self.layers[i](x, *args, **kwargs)
        return y[0] if isinstance(y, tuple) else y

    def forget(self, gsa: GSAConfig, scores: dict[str, Tensor], mixer, args, kwargs):
        """The mixer's arguments with a mask of what its slots have given up."""
        hidden, H = kwargs["hidden_states"], len(scores["recent"])
        (N, T), at = hidden.shape[:2], torch.arange(hidden.shape[1], device=hidden.device)
        bonus = hidden.float() @ scores["bonus.weight"].mT + scores["bonus.bias"]
        state = SlotState.empty(N, H, gsa.slots, 1, 1, hidden.device, ranked=True)
        memory = state.rank, state.stamp, gsa.ring, gsa.sinks
        end = next_turn(evict(bonus, scores["recent"], at.expand(N, T), None, *memory)[0]).mT
        seen = (at[:, None] >= at) & (at[:, None] < end[:, :, None])
        mask = torch.where(seen, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
        groups = self.model.config.num_attention_heads // H
        return args, kwargs | {"attention_mask": mask.repeat_interleave(groups, dim=1)}


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
    eviction: str = "oldest",
    device: str | None = None,
) -> None:
    """Print how many slots each layer of `source` (anything that `t2r convert` reads) should have, of as many in all as
    `slots` in each, measured on the first `context` tokens of `texts` documents of `text` (see DataConfig.train).

    eviction: as of `t2r convert`; scores are fitted to other documents of the text, and half of all have lookups.
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
    tokenizer = opened.load_tokenizer()
    if eviction == "score":
        both = score_texts(tokenizer, text, texts + TEXTS, context)
        ids, fit_ids = both[:texts], both[texts:]
        if not len(fit_ids):
            what = f"the text has {len(both)} documents of {context} tokens, and none is left to fit scores to"
            raise UserError(what, where=", ".join(text), nearest=f"--texts {max(1, len(both) // 2)}")
    else:
        ids = blocks(tokenizer, text, texts, context)
    model = load_source(opened).to(place, torch.bfloat16 if place.type == "cuda" else torch.float32)
    with torch.inference_mode():
        if eviction == "score":
            windows = Scored(model, ids.to(place), sinks, fit_ids.to(place))
        else:
            windows = Windows(model, ids.to(place), sinks)
    found = allocate(windows, slots, rounds)
    full, even, uneven = (f"{math.exp(loss):.2f}" for loss in (found.full, found.even, found.uneven))
    print(f"perplexity of {ids.numel():,} tokens: {full} with full attention, {even} with {slots} slots in each layer,")
    print(f"{uneven} with {sum(found.sizes):,} slots, {slots * len(found.sizes):,} being as many:")
    how = " --eviction score" if eviction == "score" else ""
    print(f"t2r convert {source} OUT --slots {slots}{how} --layer-slots {found.option}")
