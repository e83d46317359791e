"""What the tests of training share: reading a run's folder, and stepping in at a step of it."""

import json

import torch

from t2r.config import read as read_config
from t2r.convert.source import open_source
from t2r.train import engine
from t2r.train.log import read


def only(kind, path):
    """Words that leave one stage of the three in the config at `path`."""
    (stage,) = (stage for stage in read_config(path)["stages"] if stage["kind"] == kind)
    return f"stages=[{json.dumps(stage)}]"


def records(out, stage):
    """The optimizer steps in a stage's metrics, without what depends on the clock."""
    lines = read(out / stage / "metrics.jsonl")
    timed = ("tokens_per_second", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "loss" in line]


def tensors(folder):
    source = open_source(folder)
    return {name: source.tensor(name) for name in source.names()}


def at_step(number, monkeypatch, action):
    """Have `action` called before the run's optimizer step `number`, counted from 1 over all stages."""
    run_step, count = engine.optimizer_step, [0]

    def step(*args):
        count[0] += 1
        if count[0] == number:
            action()
        return run_step(*args)

    monkeypatch.setattr(engine, "optimizer_step", step)


def equals(out, long):
    """Whether a run's metrics and result are, bit for bit, those of the uninterrupted one."""
    ours, theirs = tensors(out / "model"), tensors(long / "model")
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return same and records(out, "1-lm") == records(long, "1-lm")
