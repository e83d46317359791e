"""Recipes: a YAML file of tasks, each one kind with its options."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2r import config
from t2r.errors import UserError, nearest
from t2r.evaluate.efficiency import Generation, Memory, Speed
from t2r.evaluate.likelihood import LastWord, MultipleChoice
from t2r.evaluate.perplexity import Perplexity
from t2r.evaluate.recall import Recall
from t2r.evaluate.task import Place, Task

KINDS: dict[str, type[Task]] = {
    "perplexity": Perplexity,
    "last_word": LastWord,
    "multiple_choice": MultipleChoice,
    "recall": Recall,
    "generation": Generation,
    "memory": Memory,
    "speed": Speed,
}


@dataclass
class RecipeFile:
    """What a recipe's YAML holds. ablation: evaluate a trained memory again as the bare window that it started from."""

    tasks: list[dict[str, Any]]
    ablation: bool = True


@dataclass
class Recipe:
    """name and folder of the file, and its tasks, each with a name of its own."""

    name: str
    folder: Path
    tasks: list[Task] = field(default_factory=list)
    ablation: bool = True

    def prepare(self, tokenizer, device, data: Path | None = None) -> dict[str, list]:
        """Each task's items, the same for every model. Raises UserError for missing or unfit data."""
        place = Place(self.folder, data, device.type == "cpu")
        return {task.name: task.prepare(tokenizer, place) for task in self.tasks}

    def to_dict(self) -> dict:
        """Every option spelled out."""
        kinds = {task_class: kind for kind, task_class in KINDS.items()}
        tasks = [{"kind": kinds[type(task)], **asdict(task)} for task in self.tasks]
        return {"name": self.name, "ablation": self.ablation, "tasks": tasks}


def load_recipe(name_or_path: str | Path, limit: int | None = None) -> Recipe:
    """The recipe of a YAML file or a shipped name, each task with at most `limit` items. Raises UserError."""
    path = config.find(name_or_path)
    raw = config.load(name_or_path, RecipeFile)
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
        recipe.tasks.append(task)
    return recipe
