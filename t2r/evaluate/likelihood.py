"""Tasks scored by the likelihood of a continuation: the last word of a passage, and multiple choice.

Tokenization, choice and normalisation are those of lm-eval's tasks of the same data.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple

from t2r.errors import UserError, nearest
from t2r.evaluate.scoring import Passage, encode_pairs, score
from t2r.evaluate.statistics import mean, perplexity, share
from t2r.evaluate.task import Outcome, Place, Task, locate, rows, take


@dataclass
class LastWord(Task):
    """The last word of a passage, as LAMBADA asks for it. Rows: {"context", "continuation"}."""

    data: str = "shipped:lambada"
    batch_size: int = 8

    about: ClassVar[str] = (
        "Accuracy: share of passages whose last word is the model's first choice, token by token. Perplexity: of that "
        "word, over passages."
    )

    def prepare(self, tokenizer, place: Place) -> list[Passage]:
        path = locate(self.data, place)
        pairs = [(take(row, "context", path), " " + take(row, "continuation", path).strip()) for row in rows(path)]
        passages = encode_pairs(tokenizer, pairs)
        return self.within_budget(passages, lambda passage: len(passage.ids), place)

    def run(self, model, items: list[Passage]) -> Outcome:
        scores = score(model, items, self.batch_size)
        metrics = [share("accuracy", [s.greedy for s in scores]), perplexity("perplexity", [s.loss for s in scores])]
        return Outcome(metrics, [s._asdict() for s in scores])


class Question(NamedTuple):
    """choices: one passage each; lengths: characters of each choice; gold: index of the right one."""

    choices: list[Passage]
    lengths: list[int]
    gold: int


def piqa(row: dict, path: Path) -> tuple[str, list[str], int]:
    choices = [take(row, key, path) for key in ("sol1", "sol2")]
    return f"Question: {take(row, 'goal', path)}\nAnswer:", choices, take(row, "label", path, int)


def arc(row: dict, path: Path) -> tuple[str, list[str], int]:
    choices, key = take(row, "choices", path, dict), take(row, "answerKey", path)
    labels = take(choices, "label", path, list)
    gold = labels.index(key) if key in labels else -1
    return f"Question: {take(row, 'question', path)}\nAnswer:", take(choices, "text", path, list), gold


def hellaswag(row: dict, path: Path) -> tuple[str, list[str], int]:
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    activity, start, end = (take(row, key, path) for key in ("activity_label", "ctx_a", "ctx_b"))
    query = clean(f"{activity}: {start} {end.capitalize()}")
    return query, [clean(choice) for choice in take(row, "endings", path, list)], int(take(row, "label", path))


def plain(row: dict, path: Path) -> tuple[str, list[str], int]:
    return take(row, "query", path), take(row, "choices", path, list), take(row, "gold", path, int)


# how a row of a data set becomes (query, choices, index of the right choice)
FORMATS: dict[str, Callable[[dict, Path], tuple[str, list[str], int]]] = {
    "piqa": piqa,
    "arc": arc,
    "hellaswag": hellaswag,
    "plain": plain,
}


@dataclass
class MultipleChoice(Task):
    """The likeliest of several answers. format: the rows' fields, those of the Hugging Face data set of that name, or
    plain: {"query", "choices", "gold"}."""  # fmt: skip

    data: str = "shipped:piqa"
    format: str = "piqa"
    batch_size: int = 16

    about: ClassVar[str] = (
        "acc: the choice of the highest log-likelihood is the right one. acc_norm: the same with the log-likelihood "
        "divided by the choice's length in characters."
    )

    def prepare(self, tokenizer, place: Place) -> list[Question]:
        if self.format not in FORMATS:
            close = nearest(self.format, FORMATS) or ", ".join(FORMATS)
            raise UserError(f"unknown format {self.format!r}", where=f"task {self.name}", nearest=close)
        path, found = locate(self.data, place), []
        for row in rows(path):
            query, choices, gold = FORMATS[self.format](row, path)
            if not all(isinstance(choice, str) and choice for choice in choices) or not 0 <= gold < len(choices):
                raise UserError(f"no right answer among the choices {choices!r:.80}", where=path)
            found.append((query, choices, gold))
        pairs = [(query, " " + choice) for query, choices, _ in found for choice in choices]
        passages = iter(encode_pairs(tokenizer, pairs))
        questions = [
            Question(list(islice(passages, len(choices))), [len(choice) for choice in choices], gold)
            for _, choices, gold in found
        ]
        return self.within_budget(questions, lambda q: sum(len(choice.ids) for choice in q.choices), place)

    def run(self, model, items: list[Question]) -> Outcome:
        scores = iter(score(model, [choice for item in items for choice in item.choices], self.batch_size))
        records = []
        for item in items:
            loss = [next(scores).loss for _ in item.choices]
            pick = min(range(len(loss)), key=loss.__getitem__)
            normed = min(range(len(loss)), key=lambda i: loss[i] / item.lengths[i])
            hits = {"acc": pick == item.gold, "acc_norm": normed == item.gold}
            records.append({"losses": loss, "gold": item.gold, **hits})
        chance = mean([1 / len(item.choices) for item in items])
        return Outcome([share(key, [r[key] for r in records], chance=chance) for key in ("acc", "acc_norm")], records)
