"""Benchmark tasks as lm-eval defines them: from the hub, or from local files of the same fields."""

import dataclasses
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy

from t2r.errors import UserError, nearest
from t2r.evaluate.statistics import Metric, perplexity, score, share
from t2r.evaluate.task import EVAL, MissingData, Outcome, Place, Task, locate, rows, take

# Metrics of lm-eval that are right or wrong. Their names say so: a ROUGE that is 0 on every item is no share.
SHARE = re.compile(r"acc|exact|contains|pass@|^em$")
SLICE = re.compile(r"(.+)\[(-?\d*):(-?\d*)\]")


@dataclass
class Harness(Task):
    """A task or group of lm-eval, with its prompts, few-shot examples, filters and metrics.

    task: its name. shots: few-shot examples, None: the task's own number. metrics: those to report, by lm-eval's names
        (acc, acc_norm ...), [] for all. items: over all tasks of a group, as equally as they go.
    files: split -> file, used instead of the hub where `--data` is given; `path[:-200]` takes a part. A task of a group
        keeps of a file the rows whose field `subset` is the name of its data set. A few-shot split may not be a split
        that is evaluated.
    adapt: how a row of the files becomes one of the hub's: "", or "lambada" for {"context", "continuation"},
        "qmsum" for that data set's own meetings.
    permute: shuffle the choices of every item, with this seed (rows of {"choices", "answer"}).
    max_length: tokens of a request, whose start is cut off beyond that. None: what the original was trained for.
    unsafe_code: the task runs code that the model wrote. It needs `--allow-code` beside this.
    """

    task: str = ""
    shots: int | None = None
    metrics: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    subset: str = ""
    adapt: str = ""
    permute: int | None = None
    max_length: int | None = None
    batch_size: int | None = None
    unsafe_code: bool = False

    about: ClassVar[str] = "Scored by lm-eval."

    def prepare(self, tokenizer, place: Place) -> dict:
        """lm-eval's loaded tasks. Raises UserError for an unknown task and for data that is not there."""
        adapter = require_lm_eval()
        if self.task not in adapter.known_tasks():
            close = nearest(self.task, adapter.known_tasks())
            raise UserError(f"lm-eval has no task {self.task!r}", where=f"task {self.name}", nearest=close)
        if self.unsafe_code and not place.allow_code:
            raise MissingData(
                f"{self.task} runs code that the model writes", where=f"task {self.name}", next="t2r ... --allow-code"
            )
        if self.adapt not in ADAPT:
            close = nearest(self.adapt, ADAPT) or ", ".join(filter(None, ADAPT))
            raise UserError(f"no way to adapt {self.adapt!r}", where=f"task {self.name}", nearest=close)
        self.tokenizer, self.place, self.opened, self.encoded = tokenizer, place, {}, adapter.Encoded()
        with adapter.reading(self.load):
            try:
                loaded = adapter.manager().load(self.task)
            except UserError:
                raise
            except Exception as error:  # the hub's client and the tasks themselves raise anything at all
                what = f"lm-eval cannot load {self.task}: {type(error).__name__}: {error!s:.160}"
                raise MissingData(what, where=f"task {self.name}", next="t2r ... --data DIR") from error
        for task in loaded["tasks"].values():
            if self.shots is not None:
                task.set_config("num_fewshot", self.shots)
            elif task.config.num_fewshot is None:
                task.set_config("num_fewshot", 0)
            self.check_shots(task)
        self.per_task = None if self.items is None else -(-self.items // len(loaded["tasks"]))
        total = [len(task.eval_docs) for task in loaded["tasks"].values()]
        used = [min(count, self.per_task or count) for count in total]
        shots = sorted({task.config.num_fewshot for task in loaded["tasks"].values()})
        source = "local files" if self.local else "the hub"
        self.coverage = f"{sum(used)} of {sum(total)} items from {source}, {', '.join(map(str, shots))} shots"
        return loaded

    def digest(self, items: dict) -> str:
        """A hash of the documents of all tasks, with the version of each."""
        found = sha256()
        for name, task in items["tasks"].items():
            found.update(f"{name} {task.VERSION} {task.config.num_fewshot}".encode())
            for doc in list(task.eval_docs)[: self.per_task]:
                found.update(json.dumps(doc, sort_keys=True, default=str).encode())
        return found.hexdigest()[:16]

    @property
    def local(self) -> bool:
        return bool(self.files) and self.place.data is not None

    def check_shots(self, task) -> None:
        shots = task.config.num_fewshot
        own = task.fewshot_cfg.samples
        if shots and own is None and len(task.sampler.df) < shots:
            what = f"{self.task} wants {shots} examples, but there are {len(task.sampler.df)} beside the items"
            raise UserError(what, where=f"task {self.name}", nearest="shots: 0, or a few-shot split in `files`")

    def load(self, path: str, name: str | None, original) -> Any:
        """What lm-eval gets as the data set `path`, `name`."""
        if not self.local:
            loaded = original()
            return loaded if self.permute is None else loaded.map(permuted, fn_kwargs={"seed": self.permute})
        from datasets import Dataset

        from t2r.evaluate.adapter import Splits

        splits = Splits()
        for split, file in self.files.items():
            found = list(self.read(file, name))
            if self.permute is not None and split != "dev":
                found = [permuted(row, self.permute) for row in found]
            splits[split] = Dataset.from_list(found)
        return splits

    def read(self, file: str, name: str | None) -> Iterator[dict]:
        bounds = slice(None)
        if part := SLICE.fullmatch(file):
            file, bounds = part[1], slice(*(int(bound) if bound else None for bound in part.groups()[1:]))
        path = locate(EVAL + file, self.place)
        if path not in self.opened:
            self.opened[path] = defaultdict(list)
            for row in rows(path):
                self.opened[path][take(row, self.subset, path) if self.subset else ""].append(row)
        found = self.opened[path].get(name if self.subset else "", [])
        if not found[bounds]:
            raise UserError(f"holds no rows of {name or self.task}", where=path)
        for row in found[bounds]:
            yield from ADAPT[self.adapt](row, path)

    def run(self, model, items: dict) -> Outcome:
        from t2r.evaluate.adapter import Adapter, run

        length = self.max_length or getattr(model.config, "max_position_embeddings", None) or 2048
        adapter = Adapter(model, self.tokenizer, self.batch_size, length, self.encoded)
        return self.outcome(items, run(adapter, items, self.per_task, self.unsafe_code))

    def outcome(self, items: dict, found: dict) -> Outcome:
        order = list(items["tasks"])
        samples = [sample for name in order for sample in found["samples"][name]]
        outcome = Outcome(self.summarise(samples), records(samples))
        children = next((names for group, names in items["group_map"].items() if group == self.task), [])
        for child in children:
            below = set(leaves(child, items["group_map"]))
            own = [sample for name in order if name in below for sample in found["samples"][name]]
            outcome.metrics += [rename(m, f"{child} {m.name}") for m in self.summarise(own)]
        return outcome

    def summarise(self, samples: list[dict]) -> list[Metric]:
        """One metric for each of lm-eval's metrics and filters that is a number for each item."""
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        metrics = []
        for chosen in filters:
            own = [sample for sample in samples if sample["filter"] == chosen]
            for key in self.metrics or own[0]["metrics"]:
                if key not in own[0]["metrics"]:
                    continue
                values = [sample[key] for sample in own]
                if not all(isinstance(value, Real | numpy.bool_) for value in values):
                    continue
                values = [float(value) for value in values]
                name = key if len(filters) == 1 else f"{key}, {chosen}"
                if key in ("perplexity", "ppl"):
                    metrics.append(perplexity(name, [-value for value in values]))
                elif SHARE.search(key) and set(values) <= {0, 1}:
                    metrics.append(share(name, values, chance=chance(own)))
                else:
                    metrics.append(score(name, values))
        if not metrics:
            raise UserError(f"none of the metrics {self.metrics}", where=f"task {self.name}", nearest=own[0]["metrics"])
        return metrics


def require_lm_eval():
    """Our module around lm-eval. Raises UserError where the extra is not installed."""
    try:
        from t2r.evaluate import adapter
    except ImportError as error:
        what = f"this recipe runs tasks of lm-eval, which cannot be imported: {error}"
        raise UserError(what, next="pip install 't2r[eval]'") from error
    return adapter


def as_it_is(row: dict, path: Path) -> Iterator[dict]:
    yield row


def lambada(row: dict, path: Path) -> Iterator[dict]:
    yield {"text": f"{take(row, 'context', path)} {take(row, 'continuation', path).strip()}"}


def qmsum(row: dict, path: Path) -> Iterator[dict]:
    """A meeting -> a row of SCROLLS for each query about it."""
    turns = take(row, "meeting_transcripts", path, list)
    text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in turns)
    queries = take(row, "general_query_list", path, list) + take(row, "specific_query_list", path, list)
    for query in queries:
        key = sha256(f"{query['query']}\n{text}".encode()).hexdigest()[:16]
        yield {"id": key, "input": f"{query['query']}\n\n{text}", "output": query["answer"]}


ADAPT = {"": as_it_is, "lambada": lambada, "qmsum": qmsum}


def permuted(row: dict, seed: int) -> dict:
    """The row with its choices in another order, the answer's index following: the same for every model and run."""
    order = list(range(len(row["choices"])))
    random.Random(f"{seed} {row['question']}").shuffle(order)
    return {**row, "choices": [row["choices"][i] for i in order], "answer": order.index(row["answer"])}


def chance(samples: list[dict]) -> float | None:
    """What guessing gives on multiple choice; None for other tasks, where it gives nothing."""
    counts = [len(sample["resps"]) for sample in samples]
    if min(counts) < 2 or not isinstance(samples[0]["resps"][0][0], tuple):
        return None
    return sum(1 / count for count in counts) / len(counts)


def leaves(name: str, group_map: dict[str, list[str]]) -> Iterator[str]:
    for child in group_map.get(name, []):
        yield from leaves(child, group_map)
    if name not in group_map:
        yield name


def rename(metric: Metric, name: str) -> Metric:
    return dataclasses.replace(metric, name=name)


def records(samples: list[dict]) -> list[dict]:
    """For items.jsonl: of each item what was asked, as a hash, what the model said, and how that counts."""
    kept = ("doc_id", "filter", "target", "filtered_resps", "doc_hash", "prompt_hash")
    return [
        {**{key: sample[key] for key in kept}, **{key: sample[key] for key in sample["metrics"]}} for sample in samples
    ]
