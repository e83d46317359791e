"""From a request to a report: units are run beside the folder to make, which appears when it is whole."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2r.errors import UserError
from t2r.evaluate.models import pick_devices
from t2r.evaluate.plots import require_matplotlib
from t2r.evaluate.report import summary, write
from t2r.evaluate.results import collect
from t2r.evaluate.run import Plan, Request, run


def measure(request: Request) -> dict:
    """Run the request and write its report; what report.json holds.

    Raises UserError, before any model is run, for whatever the user can mend; KeyboardInterrupt, with a message, when
    interrupted. What was finished is kept for the next call in both cases.
    """
    for name, value, of in (("--limit", request.limit, "items"), ("--batch-size", request.batch_size, "texts at once")):
        if isinstance(value, int) and value < 1:
            raise UserError(f"{value} {of} are nothing to measure", where=name, nearest=1)
    require_matplotlib()
    devices = pick_devices(request.device)
    plan = Plan(request, devices[0].type == "cpu")
    check_absent(plan.out)
    with folder_beside(plan):
        run(plan, devices)
        results = collect(plan, devices)
        shutil.rmtree(plan.aside / "report", ignore_errors=True)
        with named_fault(plan.out):
            (plan.aside / "report").mkdir()
            write(results, plan.aside / "report", request.log_samples)
        check_absent(plan.out)
        with named_fault(plan.out):
            os.rename(plan.aside / "report", plan.out)
    shutil.rmtree(plan.aside)
    print(summary(results))
    print(f"\nwrote {plan.out / 'report.md'}")
    return results.to_dict()


@contextmanager
def folder_beside(plan: Plan) -> Iterator[None]:
    """The folder aside, with what an earlier run has left in it. After a failure it stays if it holds finished units,
    and the message says so; otherwise nothing stays."""
    made = [parent for parent in plan.aside.absolute().parents if not parent.exists()]
    with named_fault(plan.out):
        plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        done, total = sum(file.exists() for _, _, file in plan.units()), len(plan.units())
        if not done:
            shutil.rmtree(plan.aside, ignore_errors=True)
            for parent in made:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
        kept = f"{done} of {total} results are kept, the same command goes on from there"
        if done and isinstance(error, UserError):
            raise UserError(f"{error}; {kept}") from error
        if done and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted: {kept}") from error
        raise


def check_absent(out: Path) -> None:
    """Raise UserError where something lies at `out`."""
    if not os.path.lexists(out):
        return
    number = 2
    while os.path.lexists(free := out.with_name(f"{out.name}-{number}")):
        number += 1
    raise UserError(f"{out} already exists", where="--out", next=f"t2r ... --out {shlex.quote(str(free))}")


@contextmanager
def named_fault(out: Path) -> Iterator[None]:
    """A full disk or a missing permission as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write there: {error.strerror}", where=out) from error
