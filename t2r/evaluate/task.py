"""What every kind of task has in common: options, items that are the same for all models, one outcome per model."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, TextIO

from t2r.errors import UserError, nearest
from t2r.evaluate.statistics import Metric

SHIPPED = "shipped:"
EVAL = "eval:"
OWN_DATA = Path(__file__).parents[1] / "recipes" / "data"


class MissingData(UserError):
    """Data, or leave to use it, that is not there: an optional task is then left out."""


@dataclass(frozen=True)
class Plot:
    """A line plot of the metrics that have an x: against tokens, on a log scale, or against layers."""

    title: str
    x: str
    y: str
    log: bool = True


@dataclass(frozen=True)
class Place:
    """Where a recipe runs. folder: the recipe's. data: what `--data` names. on_cpu: whether cpu_tokens bind.
    allow_code: whether code that a model wrote may be run.
    """

    folder: Path = Path(".")
    data: Path | None = None
    on_cpu: bool = True
    allow_code: bool = False


@dataclass
class Outcome:
    """What one model did. records: one JSON object per item; text: for tasks whose result is to be read; warnings: what
    a reader must not miss."""  # fmt: skip

    metrics: list[Metric] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)
    text: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass
class Task:
    """A kind of task; its fields are its options in a recipe.

    name: in the report. items: at most so many of them. cpu_tokens: on a CPU only as many items as these tokens hold.
    optional: where its data is not there the task is left out, with a note.
    """

    name: str = ""
    items: int | None = None
    cpu_tokens: int | None = None
    optional: bool = False

    about: ClassVar[str] = ""  # what the numbers mean, for the reader of a report
    plot: ClassVar[Plot | None] = None
    noun: ClassVar[str] = "items"
    quality: ClassVar[bool] = True  # whether the weights' values matter, so that the window ablation has its own result
    against_original: ClassVar[bool] = False  # whether `run` takes the original model as a third argument
    converted_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.coverage = ""  # how much of the data the items are, once they are prepared

    def prepare(self, tokenizer, place: Place) -> list:
        """The items, the same for every model. Raises UserError for data that is not there."""
        raise NotImplementedError

    def run(self, model, items: list) -> Outcome:
        raise NotImplementedError

    def digest(self, items: list) -> str:
        """A hash of the items."""
        return sha256(repr(items).encode()).hexdigest()[:16]

    def within_budget(self, items: list, tokens: Callable[[object], int], place: Place) -> list:
        """The first items that `items` and `cpu_tokens` allow, at least one. tokens: what an item costs."""
        used = len(items) if self.items is None else min(self.items, len(items))
        if self.cpu_tokens is not None and place.on_cpu:
            spent = accumulate(map(tokens, items[:used]))
            used = max(1, sum(total <= self.cpu_tokens for total in spent))
        self.coverage = f"{used} of {len(items)} {self.noun}"
        return items[:used]


def check_data(folder: str | None) -> Path | None:
    """The folder of `--data`. Raises UserError where there is none."""
    path = None if folder is None else Path(folder).expanduser()
    if path is not None and not path.is_dir():
        near = nearest(path.name, [p.name for p in path.parent.glob("*/")])
        raise UserError(f"no folder {folder}", where="--data", nearest=near and path.with_name(near))
    return path


def locate(data: str, place: Place) -> Path:
    """The file that a recipe names: `shipped:NAME` of t2r's own, `eval:PATH` below the folder that --data names, else
    a path, relative to the recipe's folder. Raises UserError where there is none."""
    if data.startswith(SHIPPED):
        name = data.removeprefix(SHIPPED)
        path = OWN_DATA / f"{name}.jsonl.gz"
        choices = [file.name.removesuffix(".jsonl.gz") for file in OWN_DATA.glob("*.jsonl.gz")]
    elif data.startswith(EVAL):
        if place.data is None:
            raise MissingData(f"{data} needs the folder of the data", where="--data", next="t2r compare ... --data DIR")
        path = place.data / data.removeprefix(EVAL)
        choices = [str(file.relative_to(place.data)) for file in place.data.glob("*/*")]
        name = data.removeprefix(EVAL)
    else:
        path = place.folder / Path(data).expanduser()
        choices = [file.name for file in path.parent.glob("*")]
        name = path.name
    if not path.is_file():
        close = nearest(name, choices) or (", ".join(sorted(choices)) if data.startswith(SHIPPED) else None)
        within = place.data if data.startswith(EVAL) else path.parent
        raise MissingData(f"no data file {data}", where=within, nearest=close)
    return path


def rows(path: Path) -> Iterator[dict]:
    """The objects of a .jsonl, .jsonl.gz or .jsonl.zst file; a .txt or .raw file is one {"text"}. Raises UserError."""
    if path.suffix in (".txt", ".raw"):
        yield {"text": path.read_text(encoding="utf-8")}
        return
    number = 1
    try:
        with open_text(path) as lines:
            for line in lines:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                yield row
                number += 1
        if number == 1:
            raise UserError("holds no rows", where=path)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"line {number} cannot be read: {error}", where=path) from error


def open_text(path: Path) -> TextIO:
    """A text file, decompressed if its name ends with .gz or .zst."""
    if path.suffix == ".zst":
        import zstandard

        return zstandard.open(path, "rt", encoding="utf-8")
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")


def take(row: dict, key: str, path: Path, kind: type = str):
    """row[key]; UserError with the nearest field where there is none, or where its value is of another type."""
    if key not in row:
        raise UserError(f"no field {key!r}", where=path, nearest=nearest(key, row) or ", ".join(row))
    if not isinstance(row[key], kind):
        raise UserError(f"field {key!r} is {row[key]!r:.60}, expected {kind.__name__}", where=path)
    return row[key]
