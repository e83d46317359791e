"""Key-value recall: facts strewn through real text, asked for again at growing distance."""

import copy
import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import ClassVar, NamedTuple

import torch

from t2r.errors import UserError
from t2r.evaluate.scoring import losses
from t2r.evaluate.statistics import share
from t2r.evaluate.task import Outcome, Place, Plot, Task, locate, rows, take
from t2r.modeling.cache import CACHE

NAMES = (
    "Maria Peter Anna Thomas Julia Martin Laura Robert Helen George Alice Frank Nora Henry Clara Victor Emma Oscar "
    "Lucy Simon Rosa Walter Irene Paul Diana Hugo Sarah Leon Ruth Felix Olga Bruno Grace Ivan Elena Karl Judith Louis "
    "Nina Arthur Vera Edgar Sofia Ralph Marta Conrad Ellen Stefan Carol Adam Linda Boris Jane Dennis Flora Gordon Amy "
    "Harold Betty Jacob Susan Kevin Rachel Luke Monica Norman Paula Roger Sandra Stanley Teresa Vincent Wendy Xavier "
    "Yvonne Albert Brenda Charles Doris Edward Fiona Gerald Hannah Isaac Joyce Keith Lydia Miles Naomi Owen Penny Quinn"
).split()
FACT = "\nCode of {}:"  # a small source recalls this twice as often as "The code of {} is" (docs/LOG.md)


class Fact(NamedTuple):
    """name, value: the words; question, answer: their tokens. The text states question + answer."""

    name: str
    value: str
    question: list[int]
    answer: list[int]


class Stop(NamedTuple):
    """A place in the stream: the tokens since the last stop, and what is asked there, as (distance, fact)."""

    read: list[int]
    asks: list[tuple[int, Fact]]


@dataclass
class Recall(Task):
    """A stream of real text in which every stretch of `every` tokens ends with a fact ("Code of Maria: 4821.").
    At each of `distances` tokens after a fact the model is asked for it, aside: then it reads on as if it had not been.

    items: the number of facts that are asked for, each at all distances. data, field: the text. seed: of the facts.
    """

    items: int | None = 32
    distances: list[int] = dataclasses.field(default_factory=lambda: [32, 64, 128, 256, 512, 1024])
    every: int = 64
    data: str = "shipped:text"
    field: str = "text"
    seed: int = 0

    about: ClassVar[str] = (
        'Share of four-digit codes that come back exactly, by the number of tokens between a fact ("Code of Maria: '
        '4821.") and the question for it ("Code of Maria:"), in real text with many such facts.'
    )
    plot: ClassVar[Plot] = Plot("Recall by distance", "distance to the question (tokens)", "recalled exactly")

    def prepare(self, tokenizer, place: Place) -> list[Stop]:
        where = f"task {self.name}"
        if not self.distances or min(self.distances) < 1 or self.every < 1:
            raise UserError("recall needs distances and `every` of 1 token or more", where=where)
        after = max(self.distances) // self.every  # facts that follow the last one that is asked for
        most = len(NAMES) - after
        if not 1 <= (self.items or 1) <= most:
            what = f"{self.items} facts and {after} after the last, but there are {len(NAMES)} names"
            raise UserError(what, where=where, nearest=f"items: {most}" if most > 0 else "a larger `every`")
        facts = self.facts(tokenizer, len(NAMES))

        def cost(fact: Fact) -> int:
            rest = max(self.distances) if fact is facts[0] else 0
            return rest + self.every + len(self.distances) * (len(fact.question) + len(fact.answer))

        asked = len(self.within_budget(facts[:most], cost, place))
        self.coverage = f"{asked} facts"
        stream = self.stream(tokenizer, place, facts[: asked + after])
        asks: dict[int, list[tuple[int, Fact]]] = {}
        for number, fact in enumerate(facts[:asked], start=1):
            for distance in self.distances:
                asks.setdefault(number * self.every + distance, []).append((distance, fact))
        times = sorted(asks)
        return [Stop(stream[a:b], asks[b]) for a, b in pairwise([0, *times])]

    def stream(self, tokenizer, place: Place, facts: list[Fact]) -> list[int]:
        """All tokens of the text: its stretches, and what is read after the last fact."""
        end = tokenizer.encode(".\n", add_special_tokens=False)
        filler, tokens = (
            real_text(tokenizer, self.data, self.field, place),
            tokenizer.encode(""),
        )  # what this tokenizer begins a text with
        for number, fact in enumerate(facts, start=1):
            stated = [*fact.question, *fact.answer, *end]
            room = number * self.every - len(tokens) - len(stated)
            if room < 0:
                where = f"task {self.name}"
                raise UserError(f"a fact takes {len(stated)} tokens, more than every = {self.every}", where=where)
            tokens += [*islice(filler, room), *stated]
        tokens += islice(filler, max(self.distances) % self.every)
        return tokens

    def facts(self, tokenizer, count: int) -> list[Fact]:
        return make_facts(tokenizer, count, random.Random(self.seed))

    @torch.inference_mode()
    def run(self, model, items: list[Stop]) -> Outcome:
        from transformers import DynamicCache

        cache, records = DynamicCache(config=model.config), []
        for read, asks in items:
            ids = torch.tensor([read], device=model.device)
            model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            for (distance, fact), (loss, hit) in zip(asks, answers(model, cache, asks), strict=True):
                records.append({"distance": distance, "name": fact.name, "value": fact.value, "loss": loss, "hit": hit})
        metrics = []
        for distance in self.distances:
            hits = [record["hit"] for record in records if record["distance"] == distance]
            metrics.append(share(f"at {distance} tokens", hits, x=distance))
        return Outcome(metrics, records)


def make_facts(tokenizer, count: int, rng: random.Random) -> list[Fact]:
    """Facts about so many different names."""
    facts = []
    for name in rng.sample(NAMES, count):
        value = str(rng.randint(1000, 9999))
        question = tokenizer.encode(FACT.format(name), add_special_tokens=False)
        whole = tokenizer.encode(f"{FACT.format(name)} {value}", add_special_tokens=False)
        facts.append(Fact(name, value, question, whole[len(question) :]))
    return facts


def real_text(tokenizer, data: str, field: str, place: Place) -> Iterator[int]:
    """Tokens of the data's documents, the last document first: perplexity begins with the first."""
    path = locate(data, place)
    texts = [take(row, field, path) for row in rows(path)]
    for text in reversed(texts):
        yield from tokenizer.encode(" ".join(text.split()), add_special_tokens=False)
    raise UserError("not enough text between the facts", where=path, nearest="fewer items")


def answers(model, cache, asks: list[tuple[int, Fact]]) -> list[tuple[float, bool]]:
    """(loss of the answer in nats, whether greedy decoding gives it) of each question, from a copy of the cache."""
    fork = copy.deepcopy(cache)
    fork.batch_repeat_interleave(len(asks))
    texts = [[*fact.question, *fact.answer] for _, fact in asks]
    ids = torch.zeros(len(asks), max(map(len, texts)) - 1, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text) - 1] = torch.tensor(text[:-1])
    logits = model(ids.to(model.device), **{CACHE: fork}, use_cache=True).logits
    results = []
    for row, (_, fact) in enumerate(asks):
        first = len(fact.question) - 1
        own, target = logits[row, first : first + len(fact.answer)], torch.tensor(fact.answer, device=logits.device)
        results.append((losses(own, target).sum().item(), bool((own.argmax(-1) == target).all())))
    return results
