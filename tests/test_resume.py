"""Runs that end early: interrupted, killed, told to stop, out of disk, with damaged checkpoints and data."""

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_cases import at_step, equals, only, records, tensors

from t2r.data import prepare
from t2r.data.tokens import request
from t2r.errors import UserError
from t2r.train import engine, finetune

ROOT = Path(__file__).resolve().parents[1]


def test_an_interrupted_run_goes_on_bit_for_bit(straight, start, stages, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    out, words = tmp_path / "run", [f"stages.{i}.save_every=2" for i in range(3)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(8, patch, interrupt)  # the last step of distill: 4 of align, 3 of distill are done
        finetune.finetune(str(stages), words, model=str(start), out=str(out))
    assert not (out / "model").exists()
    assert [r["step"] for r in records(out, "2-distill")] == [1, 2, 3]
    assert [p.name for p in sorted((out / "2-distill").glob("step-*"))] == ["step-000002"]
    (out / "2-distill" / ".step-000004.partial-0000").mkdir()  # as a killed run leaves it
    finetune.finetune(str(stages), words, model=str(start), out=str(out))
    for stage in ("1-align", "2-distill", "3-lm"):
        assert records(out, stage) == records(straight, stage)
        extra = {"teacher.json"} if stage == "1-align" else set()
        assert {p.name for p in (out / stage).iterdir()} == {"metrics.jsonl", "training.svg", "step-000004"} | extra
    ours, theirs = tensors(out / "model"), tensors(straight / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match=f"the run in {out} is finished; nearest valid: --out {out}-2"):
        finetune.finetune(str(stages), words, model=str(start), out=str(out))


LONG = ["stages.0.tokens=5120", "stages.0.save_every=3", "stages.0.validation_tokens=64", "stages.0.keep=2"]


@pytest.fixture(scope="module")
def long(stages, start, tmp_path_factory):
    """The words of a run of 40 steps, and its folder when it was never interrupted."""
    out, words = tmp_path_factory.mktemp("long") / "run", [only("lm", stages), *LONG]
    finetune.finetune(str(stages), words, str(start), str(out))
    return words, out


def command(config, words, start, out, *options):
    """`t2r finetune` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for name in ("RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    line = [sys.executable, "-m", "t2r", "finetune", "--config", config, *words, "--model", start, "--out", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, line), *options], env=environment, text=True, **pipes)


def wait_for_step(step, process, out):
    """Return when a run has logged `step`; its process must live until then."""
    while not any(line["step"] >= step for line in records(out, "1-lm")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_killed_run_goes_on_bit_for_bit(long, stages, start, tmp_path):
    """kill -9 at two moments that nobody has chosen, checkpoints being written every 3 steps."""
    words, straight = long
    out, chance = tmp_path / "run", random.SystemRandom()
    for first, last in ((1, 12), (15, 36)):
        process = command(stages, words, start, out)
        wait_for_step(step := chance.randint(first, last), process, out)
        time.sleep(delay := chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
    finetune.finetune(str(stages), words, str(start), str(out))
    assert equals(out, straight), (step, delay)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_ends_the_run(number, code, long, stages, start, tmp_path, monkeypatch, capfd):
    words, straight = long
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(5, patch, lambda: os.kill(os.getpid(), number))
        finetune.finetune(str(stages), words, str(start), str(out))
    assert stopped.value.code == code
    assert f"stopped by {number.name} after step 5/40; the same command goes on from it" in capfd.readouterr().err
    assert {p.name for p in (out / "1-lm").iterdir()} == {"metrics.jsonl", "teacher.json", "step-000003", "step-000005"}
    finetune.finetune(str(stages), words, str(start), str(out))
    assert equals(out, straight)


def test_sigterm_in_the_last_step_of_a_stage_does_not_begin_the_next(straight, stages, start, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(4, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune.finetune(str(stages), model=str(start), out=str(out))
    assert (out / "1-align" / "step-000004").is_dir() and not (out / "2-distill").exists()
    finetune.finetune(str(stages), model=str(start), out=str(out))
    assert records(out, "3-lm") == records(straight, "3-lm")


def test_a_full_disk_leaves_the_last_checkpoint(long, stages, start, tmp_path, monkeypatch):
    """A file that may not grow is what the operating system has to offer in place of a disk that is full."""
    words, straight = long
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            at_step(5, patch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard)))
            what = "cannot write checkpoint step-000006: .*; checkpoint step-000003 is intact"
            with pytest.raises(UserError, match=what):
                finetune.finetune(str(stages), words, str(start), str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in (out / "1-lm").iterdir()} == {"metrics.jsonl", "teacher.json", "step-000003"}
    finetune.finetune(str(stages), words, str(start), str(out))
    assert equals(out, straight)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000}))
    with pytest.raises(UserError, match="3 checkpoints need 0.0 GB of disk, 0.0 GB are free"):
        finetune.finetune(str(stages), words, str(start), str(tmp_path / "other"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(long, stages, start, tmp_path, monkeypatch, capfd):
    words, straight = long
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(9, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune.finetune(str(stages), words, str(start), str(out))
    weights = out / "1-lm" / "step-000009" / "model.safetensors"
    os.truncate(weights, size := weights.stat().st_size - 1)
    finetune.finetune(str(stages), words, str(start), str(out))
    assert f"step-000009 is not complete: model.safetensors has {size} bytes of {size + 1}" in capfd.readouterr().err
    assert equals(out, straight) and (out / "1-lm" / "damaged-step-000009").is_dir()


@pytest.mark.parametrize("fault", ["truncated", "gone"])
def test_tokens_that_are_damaged_while_they_are_read(long, stages, start, tmp_path, monkeypatch, fault):
    (words, straight), out = long, tmp_path / "run"
    words = [*words, f"data.cache={tmp_path}/cache"]

    def damage():
        # of both sets of tokens, training and validation, the one that is read
        for ids in (tmp_path / "cache").glob("*/00000/ids.npy"):
            os.truncate(ids, 500) if fault == "truncated" else ids.unlink()

    with monkeypatch.context() as patch:
        at_step(5, patch, damage)
        with pytest.raises(UserError, match=r"damaged tokens: .*ids.npy.* \(in .*00000\); try: `rm -r ") as error:
            finetune.finetune(str(stages), words, str(start), str(out))
    left = f"; checkpoint step-000003 is intact, the same command goes on from it (in {out}/1-lm)"
    assert "\n" not in str(error.value) and str(error.value).endswith(left)
    assert engine.newest_checkpoint(out / "1-lm").name == "step-000003"
    shutil.rmtree(tmp_path / "cache")
    finetune.finetune(str(stages), words, str(start), str(out))
    assert equals(out, straight)


def test_data_that_ends_in_the_middle_leaves_the_last_checkpoint(stages, start, tmp_path, monkeypatch):
    """Tokenised while training: the run gets as far as the data can be read, and goes on when they are mended."""
    text = "".join(json.dumps({"text": f"line {i} " + "abc" * (i % 50)}) + "\n" for i in range(600))
    path, whole = tmp_path / "data.jsonl.gz", gzip.compress(text.encode(), mtime=0)
    monkeypatch.setattr(prepare, "request", lambda *a: replace(request(*a), shard=1000))
    words = [only("lm", stages), f"data.train=[{path}]", "data.stream=true", "stages.0.tokens=40960"]
    words += [f"stages.0.{word}" for word in ("context=64", "batch_tokens=4096", "micro_batch=16", "save_every=2")]
    path.write_bytes(whole)
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "straight"))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read: .*data.jsonl.gz.*; checkpoint step-0000.* is intact"):
        finetune.finetune(str(stages), words, str(start), str(tmp_path / "run"))
    assert engine.newest_checkpoint(tmp_path / "run" / "1-lm")
    path.write_bytes(whole)
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "run"))
    assert equals(tmp_path / "run", tmp_path / "straight")
