"""Key-value recall: facts strewn through real text, asked for again at growing distance."""

import copy
import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from t2r.errors import UserError
from t2r.evaluate.perplexity import losses
from t2r.evaluate.statistics import share
from t2r.evaluate.task import Outcome, Plot, Task, locate, rows, take

NAMES = (
    "Maria Peter Anna Thomas Julia Martin Laura Robert Helen George Alice Frank Nora Henry Clara Victor Emma Oscar "
    "Lucy Simon Rosa Walter Irene Paul Diana Hugo Sarah Leon Ruth Felix Olga Bruno Grace Ivan Elena Karl Judith Louis "
    "Nina Arthur Vera Edgar Sofia Ralph Marta Conrad Ellen Stefan Carol Adam Linda Boris Jane Dennis Flora Gordon Amy "
    "Harold Betty Jacob Susan Kevin Rachel Luke Monica Norman Paula Roger Sandra Stanley Teresa Vincent Wendy Xavier "
    "Yvonne Albert Brenda Charles Doris Edward Fiona Gerald Hannah Isaac Joyce Keith Lydia Miles Naomi Owen Penny Quinn"
).split()
FACT = " The code of {} is"


class Fact(NamedTuple):
    """name, value: the words; question, answer: their tokens. The text states question + answer."""

    name: str
    value: str
    question: list[int]
    answer: list[int]


class Ask(NamedTuple):
    """One question: `fact` stands in the stream so that `distance` tokens lie between it and the question."""

    distance: int
    fact: Fact


class Moment(NamedTuple):
    """A stop in the stream: the tokens since the last one, and what is asked after them."""

    read: list[int]
    asks: list[Ask]


@dataclass
class Recall(Task):
    """A stream of text with a fact ("The code of Maria is 4821.") at the end of every `every` tokens. At each stop the
    model is asked, aside, for the facts that lie `distances` tokens back; then it reads on. So each question sees
    max(distances) / every facts or more, and an item is a stop with one question of each distance.

    items: the number of stops. data, field: text between the facts. seed: of names and codes.
    """

    items: int | None = 32
    distances: list[int] = dataclasses.field(default_factory=lambda: [32, 64, 128, 256, 512, 1024])
    every: int = 32
    data: str = "shipped:text"
    field: str = "text"
    seed: int = 0

    about: ClassVar[str] = (
        'Share of four-digit codes that come back exactly, by the number of tokens between a fact ("The code of Maria '
        'is 4821.") and the question for it ("The code of Maria is"), in real text with many such facts.'
    )
    plot: ClassVar[Plot] = Plot("Recall by distance", "distance to the question (tokens)", "recalled exactly")

    def prepare(self, tokenizer, folder: Path, on_cpu: bool) -> list[Moment]:
        where = f"task {self.name}"
        for distance in self.distances:
            if distance <= 0 or distance % self.every:
                close = max(1, round(distance / self.every)) * self.every
                what = f"distance {distance} is no multiple of every = {self.every}"
                raise UserError(what, where=where, nearest=close)
        warm_up, stops = max(self.distances) // self.every, self.items or 0
        if stops < 1 or warm_up + stops > len(NAMES):
            what = f"{warm_up + stops} facts for {stops} stops, but there are {len(NAMES)} names"
            raise UserError(what, where=where, nearest=f"items: {len(NAMES) - warm_up}")
        moments = self.stream(tokenizer, folder, warm_up, stops)
        return self.within_budget(moments, cost, on_cpu)

    def stream(self, tokenizer, folder: Path, warm_up: int, stops: int) -> list[Moment]:
        facts, end = self.facts(tokenizer, warm_up + stops), tokenizer.encode(".", add_special_tokens=False)
        filler, stretches = self.filler(tokenizer, folder), []
        for number, fact in enumerate(facts):
            prefix = tokenizer.encode("") if number == 0 else []  # what this tokenizer begins every text with
            stated = [*fact.question, *fact.answer, *end]
            room = self.every - len(prefix) - len(stated)
            if room < 0:
                where = f"task {self.name}"
                raise UserError(f"a fact takes {len(stated)} tokens, more than every = {self.every}", where=where)
            stretches.append([*prefix, *(next(filler) for _ in range(room)), *stated])
        moments = []
        for stop in range(stops):
            last = warm_up + stop  # stretches 0..last have been read
            asks = [Ask(distance, facts[last - distance // self.every]) for distance in self.distances]
            read = stretches[last] if stop else sum(stretches[: last + 1], [])
            moments.append(Moment(read, asks))
        return moments

    def facts(self, tokenizer, count: int) -> list[Fact]:
        rng = random.Random(self.seed)
        facts = []
        for name in rng.sample(NAMES, count):
            value = str(rng.randint(1000, 9999))
            question = tokenizer.encode(FACT.format(name), add_special_tokens=False)
            whole = tokenizer.encode(f"{FACT.format(name)} {value}", add_special_tokens=False)
            facts.append(Fact(name, value, question, whole[len(question) :]))
        return facts

    def filler(self, tokenizer, folder: Path):
        """Tokens of the data's documents, the last document first: perplexity begins with the first."""
        path = locate(self.data, folder)
        texts = [take(row, self.field, path) for row in rows(path)]
        for text in reversed(texts):
            yield from tokenizer.encode(" ".join(text.split()), add_special_tokens=False)
        raise UserError("not enough text between the facts", where=path, nearest="fewer items")

    @torch.inference_mode()
    def run(self, model, items: list[Moment]) -> Outcome:
        from transformers import DynamicCache

        cache, records = DynamicCache(config=model.config), []
        for moment in items:
            read = torch.tensor([moment.read], device=model.device)
            model(read, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for ask, (loss, hit) in zip(moment.asks, self.answers(model, cache, moment.asks), strict=True):
                records.append(
                    {"distance": ask.distance, "name": ask.fact.name, "value": ask.fact.value, "loss": loss, "hit": hit}
                )
        metrics = []
        for distance in self.distances:
            hits = [record["hit"] for record in records if record["distance"] == distance]
            metrics.append(share(f"at {distance} tokens", hits, x=distance))
        return Outcome(metrics, records)

    def answers(self, model, cache, asks: list[Ask]) -> list[tuple[float, bool]]:
        """(loss of the answer, whether greedy decoding gives it) of each question, from a copy of the cache."""
        fork = copy.deepcopy(cache)
        fork.batch_repeat_interleave(len(asks))
        texts = [[*ask.fact.question, *ask.fact.answer] for ask in asks]
        ids = torch.zeros(len(asks), max(map(len, texts)) - 1, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text) - 1] = torch.tensor(text[:-1])
        logits = model(ids.to(model.device), past_key_values=fork, use_cache=True).logits
        results = []
        for row, (ask, text) in enumerate(zip(asks, texts, strict=True)):
            own = logits[row, len(ask.fact.question) - 1 : len(text) - 1]
            target = torch.tensor(ask.fact.answer, device=own.device)
            results.append((losses(own, target).sum().item(), bool((own.argmax(-1) == target).all())))
        return results


def cost(moment: Moment) -> int:
    return len(moment.read) + sum(len(ask.fact.question) + len(ask.fact.answer) for ask in moment.asks)
