"""Checkpoints: Hugging Face folders with the engine's state inside, that appear complete or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from t2r.convert.source import Source, open_source
from t2r.convert.writer import FolderWriter
from t2r.errors import UserError
from t2r.schema import StageConfig
from t2r.train.parameters import saved_tensors
from t2r.train.sharding import Group, from_a_peer

STATE = "deepspeed"  # folder of the engine's state inside a checkpoint
MANIFEST = "checkpoint.json"
# What a trained parameter takes beside its weight: float32 weight and Adam's two moments.
STATE_BYTES = 12


def save(engine, source: Source, out: Path, step: int, stage: StageConfig, zero: int, group: Group) -> None:
    """Write out/step-N and remove all but the newest `stage.keep`.

    Raises UserError if that fails; the checkpoints before are untouched then.
    """
    target, aside = out / name_of(step), out / f".{name_of(step)}.{STATE}"
    try:
        engine.save_checkpoint(str(aside), tag=STATE, save_latest=False)
        if group.rank == 0:
            write_folder(engine, source, target, aside, {"step": step, "world": group.world, "zero": zero})
            discard_old(out, stage.keep)
        else:
            for _ in saved_tensors(engine.module.student):
                pass  # their parts of each tensor are being gathered
    except (OSError, RuntimeError, UserError) as error:  # torch's own writer raises RuntimeError where the disk is full
        if from_a_peer(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        free = shutil.disk_usage(out).free / 1e9
        raise lost(f"cannot write checkpoint {target.name}: {reason}, {free:.1f} GB of disk are free", out) from error
    finally:
        if group.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    if group.world > 1:
        dist.barrier()


def write_folder(engine, source: Source, target: Path, state: Path, facts: dict) -> None:
    plan = {name: (source.shape(name), source.dtype(name)) for name in source.names()}
    with FolderWriter(target, plan) as writer:
        trained = set()
        for name, tensor in saved_tensors(engine.module.student, source):
            writer.add(name, tensor.to(source.dtype(name)))
            trained.add(name)
        for name in source.names():
            if name not in trained:
                writer.add(name, source.tensor(name))
        copy_rest(source.path, writer.path)
        os.rename(state / STATE, writer.path / STATE)
        files = {str(p.relative_to(writer.path)): p.stat().st_size for p in writer.path.rglob("*") if p.is_file()}
        (writer.path / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")


def discard_old(out: Path, keep: int) -> None:
    """Under a hidden name first: a folder called step-N is whole at any moment."""
    for old in sorted(out.glob("step-*"), key=step_of)[:-keep]:
        shutil.rmtree(old.rename(out / f".{old.name}.old"))


def copy_rest(folder: Path, to: Path) -> None:
    """What a model folder holds beside its weights: config, tokenizer, generation config, reports."""
    for path in folder.iterdir():
        weights = path.name.startswith((".", "model.safetensors", "model-", "pytorch_model"))
        if path.is_file() and not weights and path.name != MANIFEST:
            shutil.copyfile(path, to / path.name)


class Lost(UserError):
    """Ends a run, and says what is left of it."""


def lost(what: str, out: Path) -> Lost:
    newest = newest_checkpoint(out)
    rest = f"checkpoint {newest.name} is intact, the same command goes on from it" if newest else "no checkpoint yet"
    return Lost(f"{what}; {rest}", where=out)


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def damage(checkpoint: Path) -> str | None:
    """What is missing of a checkpoint, or None if it is complete."""
    try:
        files = manifest(checkpoint)["files"]
    except (OSError, ValueError, LookupError):
        return f"no readable {MANIFEST}"
    for name, size in files.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} has {found} bytes of {size}" if found is not None else f"{name} is missing"
    return None


def newest_checkpoint(out: Path) -> Path | None:
    """The newest complete one. Damaged ones are named on stderr."""
    for checkpoint in sorted(out.glob("step-*"), key=step_of, reverse=True):
        fault = damage(checkpoint)
        if not fault:
            return checkpoint
        if os.environ.get("RANK", "0") == "0":
            print(f"checkpoint {checkpoint} is not complete: {fault}", file=sys.stderr)
    return None


def check_disk(out: Path, source: Source, trained: int, keep: int) -> None:
    """Raise UserError unless one checkpoint more than are kept has room: the old one goes when the new one is there."""
    size = sum(source.nbytes(name) for name in source.names()) + STATE_BYTES * trained
    present = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    free = shutil.disk_usage(out).free + present
    if free < (needed := size * (keep + 1)):
        what = f"{keep + 1} checkpoints need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
        raise UserError(what, where=out, nearest="keep: 1" if keep > 1 else None, next=f"df -h {out}")


def of_other_world(checkpoint: Path, group: Group) -> bool:
    """Whether the state was split over another number of processes, and has to be put together first."""
    facts = manifest(checkpoint)
    return facts["zero"] > 0 and facts["world"] != group.world


def put_together(checkpoint: Path, group: Group) -> Path:
    """The state of a checkpoint in DeepSpeed's universal form, in a hidden folder."""
    whole = checkpoint.parent / f".{checkpoint.name}.universal"
    if group.rank == 0:
        module = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        paths = ["--input_folder", checkpoint / STATE, "--output_folder", whole / STATE]
        done = subprocess.run([*module, *map(str, paths)], capture_output=True, text=True, env=without_group())
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"the state cannot be split over {group.world} processes: {why}", where=checkpoint)
    dist.barrier()
    return whole


def without_group() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def resume(engine, checkpoint: Path, source: Source, group: Group) -> int:
    """Load the engine's state and return the step it stands at. UserError if the checkpoint is of another model."""
    theirs = open_source(checkpoint)
    shapes = [{name: s.shape(name) for name in s.names()} for s in (source, theirs)]
    if shapes[0] != shapes[1]:
        raise UserError("the checkpoint is of another model", where=checkpoint, next=f"rm -r {checkpoint.parent}")
    if of_other_world(checkpoint, group):
        load_universal(engine, checkpoint, group)
    elif engine.load_checkpoint(str(checkpoint), tag=STATE)[0] is None:
        raise UserError("the checkpoint has no state to go on from", where=checkpoint)
    return step_of(checkpoint)


def load_universal(engine, checkpoint: Path, group: Group) -> None:
    """Load the state of a checkpoint that another number of processes wrote.

    DeepSpeed (0.19) then gives all groups of parameters the options of the first under ZeRO 3, and all states one step
    counter, which each of them advances: both are put right.
    """
    optimizer = engine.optimizer.optimizer
    options = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    whole = put_together(checkpoint, group)
    engine.load_checkpoint(str(whole), tag=STATE)
    for param_group, known in zip(optimizer.param_groups, options, strict=True):
        param_group.update(known)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    dist.barrier()
    if group.rank == 0:
        shutil.rmtree(whole)


def clear(out: Path, newest: Path | None) -> None:
    """Remove what a killed run was writing or removing, and give up the names of what is damaged: steps after `newest`
    will be written again."""
    for unfinished in out.glob(".step-*"):
        shutil.rmtree(unfinished)
    for damaged in out.glob("step-*"):
        if newest is None or step_of(damaged) > step_of(newest):
            kept = out / f"damaged-{damaged.name}"
            shutil.rmtree(kept, ignore_errors=True)
            damaged.rename(kept)
