"""Recipes: a YAML file of tasks, each one kind with its options."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2r import config
from t2r.errors import UserError, nearest
from t2r.evaluate.diagnostics import SlotUse
from t2r.evaluate.efficiency import Generation, Memory, Speed
from t2r.evaluate.fidelity import Fidelity, Layers
from t2r.evaluate.harness import Harness
from t2r.evaluate.instruct import TemplateFollowing
from t2r.evaluate.likelihood import LastWord, MultipleChoice
from t2r.evaluate.perplexity import Perplexity
from t2r.evaluate.probes import Copying, Needle, Pairs, PairsLater
from t2r.evaluate.recall import Recall
from t2r.evaluate.task import MissingData, Place, Task
from t2r.evaluate.throughput import Throughput

KINDS: dict[str, type[Task]] = {
    "perplexity": Perplexity,
    "last_word": LastWord,
    "multiple_choice": MultipleChoice,
    "harness": Harness,
    "recall": Recall,
    "needle": Needle,
    "pairs": Pairs,
    "pairs_later": PairsLater,
    "copying": Copying,
    "fidelity": Fidelity,
    "layers": Layers,
    "slot_use": SlotUse,
    "template": TemplateFollowing,
    "generation": Generation,
    "memory": Memory,
    "speed": Speed,
    "throughput": Throughput,
}


@dataclass
class RecipeFile:
    """What a recipe's YAML holds. ablation: evaluate a trained memory again as the bare window that it started from."""

    tasks: list[dict[str, Any]]
    ablation: bool = True


@dataclass
class Recipe:
    """name and folder of the file, and its tasks, each with a name of its own. notes: for the report."""

    name: str
    folder: Path
    tasks: list[Task] = field(default_factory=list)
    ablation: bool = True
    notes: list[str] = field(default_factory=list)

    def prepare(self, tokenizer, place: Place) -> dict[str, list]:
        """Each task's items, the same for every model. A task that cannot be run here is dropped, with a note, if it is
        optional. Raises UserError for missing or unfit data otherwise."""
        items = {}
        for task in list(self.tasks):
            try:
                items[task.name] = task.prepare(tokenizer, place)
            except MissingData as error:
                if not task.optional:
                    raise
                self.tasks.remove(task)
                self.notes.append(f"Left out: {task.name}, {error}.")
        if not items:
            raise UserError("no task of this recipe can be run here", where=self.name, nearest=self.notes[0])
        return items

    def to_dict(self) -> dict:
        """Every option spelled out."""
        kinds = {task_class: kind for kind, task_class in KINDS.items()}
        tasks = [{"kind": kinds[type(task)], **asdict(task)} for task in self.tasks]
        return {"name": self.name, "ablation": self.ablation, "tasks": tasks}


def load_recipe(name_or_path: str | Path, limit: int | None = None, batch_size: int | str | None = None) -> Recipe:
    """The recipe of a YAML file or a shipped name, each task with at most `limit` items and, where it reads in batches,
    `batch_size` texts at once: a number, "auto", None for the recipe's own. Raises UserError."""
    path = config.find(name_or_path, ["recipes"])
    raw = config.load(path, RecipeFile)
    recipe = Recipe(path.stem, path.parent, ablation=raw.ablation)
    if not raw.tasks:
        raise UserError("no tasks", where=path, nearest=", ".join(KINDS))
    for i, options in enumerate(raw.tasks):
        kind = options.pop("kind", None)
        if kind not in KINDS:
            close = nearest(str(kind), KINDS) or ", ".join(KINDS)
            raise UserError(
                f"tasks.{i}: unknown kind {kind!r}" if kind else f"tasks.{i}: no kind", where=path, nearest=close
            )
        task = config.build(KINDS[kind], options, path, f"tasks.{i}.")
        task.name = task.name or kind
        if task.name in [other.name for other in recipe.tasks]:
            raise UserError(f"tasks.{i}: a second task is named {task.name!r}", where=path, nearest=f"{task.name}-2")
        if not re.fullmatch(r"[\w.-]+", task.name):
            raise UserError(f"tasks.{i}.name {task.name!r} does not fit a file name", where=path, nearest=kind)
        if task.items is not None and task.items < 1:
            raise UserError(f"tasks.{i}.items is {task.items}, it must be positive", where=path, nearest=1)
        if limit is not None:
            task.items = min(limit, task.items or limit)
        if batch_size is not None and hasattr(task, "batch_size"):
            task.batch_size = None if batch_size == "auto" else batch_size
        recipe.tasks.append(task)
    return recipe
