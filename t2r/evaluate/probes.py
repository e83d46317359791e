"""What a memory holds, by size: a needle in real text, a list of pairs, a copy of a list."""

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import ClassVar, NamedTuple

from t2r.errors import UserError
from t2r.evaluate.recall import NAMES, make_facts, real_text
from t2r.evaluate.scoring import Passage, score
from t2r.evaluate.statistics import Metric, share
from t2r.evaluate.statistics import score as mean_score
from t2r.evaluate.task import Outcome, Place, Plot, Task


class Probe(NamedTuple):
    """A passage whose continuation only its context gives away. group: the report's row; x: its place in a plot."""

    group: str
    x: int
    passage: Passage


@dataclass
class Probes(Task):
    """Passages in groups, each scored by whether greedy decoding gives the continuation.

    items: passages of a group. seed: of what is drawn.
    """

    items: int | None = 32
    seed: int = 0
    batch_size: int | None = None

    def probes(self, tokenizer, place: Place) -> Iterator[Probe]:
        raise NotImplementedError

    def prepare(self, tokenizer, place: Place) -> list[Probe]:
        self.per_group = self.items or 32
        found = list(self.probes(tokenizer, place))
        if self.cpu_tokens is not None and place.on_cpu:
            found = self.cheapest(found)
        groups = dict.fromkeys(probe.group for probe in found)
        self.coverage = f"{len(found)} questions in {len(groups)} groups"
        return found

    def cheapest(self, found: list[Probe]) -> list[Probe]:
        """The first of each group, then the second, up to `cpu_tokens`: no group gets nothing."""
        turns: dict[str, int] = {}
        order = []
        for probe in found:
            turns[probe.group] = turns.get(probe.group, 0) + 1
            order.append((turns[probe.group], len(probe.passage.ids), probe))
        spent, kept = 0, []
        for turn, cost, probe in sorted(order, key=lambda one: one[:2]):
            spent += cost
            if turn == 1 or spent <= self.cpu_tokens:
                kept.append(probe)
        return sorted(kept, key=lambda probe: probe.x)

    def run(self, model, items: list[Probe]) -> Outcome:
        scores = score(model, [probe.passage for probe in items], self.batch_size)
        groups: dict[tuple[str, int], list[int]] = {}
        for i, probe in enumerate(items):
            groups.setdefault((probe.group, probe.x), []).append(i)
        metrics = [
            self.metric(name, x, [(items[i].passage, scores[i]) for i in own]) for (name, x), own in groups.items()
        ]
        return Outcome(metrics, [{"group": p.group, **s._asdict()} for p, s in zip(items, scores, strict=True)])

    def metric(self, name: str, x: int, scored: list) -> Metric:
        return share(name, [one.greedy for _, one in scored], x=x)


@dataclass
class Needle(Probes):
    """One fact in real text of `lengths` tokens, at `depths` (0: its beginning, 1: its end), asked for at the end."""

    lengths: list[int] = dataclasses.field(default_factory=lambda: [256, 1024, 4096, 16384])
    depths: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    data: str = "shipped:text"
    field: str = "text"

    about: ClassVar[str] = (
        "One fact in real text, asked for at its end: share of four-digit codes that come back exactly, over all "
        "depths at which the fact can lie."
    )
    plot: ClassVar[Plot] = Plot("Needle in a haystack", "length of the text (tokens)", "found exactly")

    def probes(self, tokenizer, place: Place) -> Iterator[Probe]:
        if not all(0 <= depth <= 1 for depth in self.depths) or not self.depths:
            raise UserError(f"depths {self.depths} do not lie between 0 and 1", where=f"task {self.name}")
        rng, end = random.Random(self.seed), tokenizer.encode(".\n", add_special_tokens=False)
        text = list(islice(endless(tokenizer, self, place), 4 * max(self.lengths)))
        for length in self.lengths:
            for i in range(self.per_group):
                (fact,) = make_facts(tokenizer, 1, rng)
                stated = [*fact.question, *fact.answer, *end]
                room = length - len(stated)
                if room < 0:
                    raise UserError(f"{length} tokens do not hold a fact", where=f"task {self.name}", nearest=64)
                begin = rng.randrange(len(text) - room)
                before = round(self.depths[i % len(self.depths)] * room)
                hay = text[begin : begin + room]
                context = [*tokenizer.encode(""), *hay[:before], *stated, *hay[before:], *fact.question]
                yield Probe(f"{length:,} tokens", length, Passage([*context, *fact.answer], len(context)))


@dataclass
class Pairs(Probes):
    """A list of `counts` names with their codes, then the question for one of them."""

    counts: list[int] = dataclasses.field(default_factory=lambda: [2, 4, 8, 16, 32, 64])

    about: ClassVar[str] = (
        "A plain list of names and four-digit codes, then the question for one of the names: share of codes that come "
        "back exactly, by the number of pairs in the list."
    )
    plot: ClassVar[Plot] = Plot("Recall by number of pairs", "pairs in the list", "recalled exactly")

    def prepare(self, tokenizer, place: Place) -> list[Probe]:
        if not all(1 <= count <= len(NAMES) for count in self.counts):
            raise UserError(f"counts {self.counts}: there are {len(NAMES)} names", where=f"task {self.name}")
        return super().prepare(tokenizer, place)

    def probes(self, tokenizer, place: Place) -> Iterator[Probe]:
        rng = random.Random(self.seed)
        for count in self.counts:
            for i in range(self.per_group):
                yield Probe(f"{count} pairs", count, self.passage(tokenizer, rng, count, i, []))

    def passage(self, tokenizer, rng: random.Random, count: int, i: int, between: list[int]) -> Passage:
        """The i-th list of `count` pairs, the tokens `between` and the question."""
        facts, end = make_facts(tokenizer, count, rng), tokenizer.encode(".", add_special_tokens=False)
        listed = [token for fact in facts for token in [*fact.question, *fact.answer, *end]]
        asked = facts[i * count // self.per_group]  # from the first to the last, evenly
        context = [*tokenizer.encode(""), *listed, *between, *asked.question]
        return Passage([*context, *asked.answer], len(context))


@dataclass
class PairsLater(Pairs):
    """The same, with each of `distances` tokens of real text between the list and the question."""

    counts: list[int] = dataclasses.field(default_factory=lambda: [8])
    distances: list[int] = dataclasses.field(default_factory=lambda: [64, 128, 256, 512, 1024])
    data: str = "shipped:text"
    field: str = "text"

    about: ClassVar[str] = (
        "A list of names and four-digit codes, so many tokens of real text, then the question for one of the names: "
        "share of codes that come back exactly."
    )
    plot: ClassVar[Plot] = Plot("Recall of lists by distance", "tokens since the list", "recalled exactly")

    def probes(self, tokenizer, place: Place) -> Iterator[Probe]:
        if min(self.distances, default=0) < 1:
            raise UserError(f"distances {self.distances}: 1 token or more", where=f"task {self.name}", nearest=[64])
        rng = random.Random(self.seed)
        text = list(islice(endless(tokenizer, self, place), 4 * max(self.distances)))
        for count, distance in product(self.counts, self.distances):
            for i in range(self.per_group):
                begin = rng.randrange(len(text) - distance)
                passage = self.passage(tokenizer, rng, count, i, text[begin : begin + distance])
                yield Probe(f"{count} pairs, {distance:,} tokens ago", distance, passage)


@dataclass
class Copying(Probes):
    """A list of `lengths` random names, then the same list again, of which all but the first name is predicted."""

    items: int | None = 8
    lengths: list[int] = dataclasses.field(default_factory=lambda: [8, 16, 32, 64, 128, 256])

    about: ClassVar[str] = (
        "A list of random words, given twice: percent of the second list's tokens that are predicted."
    )
    plot: ClassVar[Plot] = Plot("Copying", "words in the list", "tokens of the copy that are right (%)")

    def probes(self, tokenizer, place: Place) -> Iterator[Probe]:
        if any(length < 2 for length in self.lengths):
            raise UserError(f"lengths {self.lengths}: a list has two words", where=f"task {self.name}", nearest=2)
        rng = random.Random(self.seed)
        for length in self.lengths:
            for _ in range(self.per_group):
                words = rng.choices(NAMES, k=length)
                context = f"List: {' '.join(words)}\nList again: {words[0]}"
                ids = tokenizer.encode(context)
                rest = tokenizer.encode(f"{context} {' '.join(words[1:])}")[len(ids) :]
                yield Probe(f"{length} words", length, Passage([*ids, *rest], len(ids)))

    def metric(self, name: str, x: int, scored: list) -> Metric:
        return mean_score(name, [100 * one.right / (len(p.ids) - p.start) for p, one in scored], x)


def endless(tokenizer, task: Needle | PairsLater, place: Place) -> Iterator[int]:
    """The tokens of the task's data, over and over: a haystack may be longer than all of it."""
    text = []
    try:
        for token in real_text(tokenizer, task.data, task.field, place):
            text.append(token)
            yield token
    except UserError:
        if not text:
            raise
    while True:
        yield from text
