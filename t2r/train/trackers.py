"""Services that show a run's metrics elsewhere, by name. metrics.jsonl is written in any case."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from t2r.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
Tracker = Callable[[int, dict[str, float]], None]


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a service whose package is not installed."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise UserError(f"log.trackers names {name}, which is not installed", next=f"pip install {PACKAGES[name]}")


def open_tracker(name: str, project: str, folder: Path, run: str) -> tuple[Tracker, Callable[[], None]]:
    """(what takes the numbers of a step, what ends it)."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    if name == "wandb":
        import wandb

        # one run on their side too, however often it is resumed
        mark = {"id": os.urandom(8).hex()}
        kept = folder / ".wandb-id"
        if kept.exists():
            mark["id"] = kept.read_text()
        kept.write_text(mark["id"])
        session = wandb.init(project=project, name=run, dir=str(folder), resume="allow", **mark)
        return lambda step, numbers: session.log(numbers, step=step), session.finish
    import trackio

    trackio.init(project=project, name=run, resume="allow")
    return lambda step, numbers: trackio.log(numbers, step=step), trackio.finish


def flat(record: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a record, nested keys joined by slashes."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found
