"""Launching: two machines that are this one, and every way to describe machines wrongly."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from t2r.errors import UserError
from t2r.train import launch
from t2r.train.checkpoint import newest_checkpoint, step_of
from t2r.train.finetune import finetune
from t2r.train.launch import Machines, check_machines, free_port, launch_by_ssh, read_hostfile, root_cause


@pytest.mark.parametrize(
    "machines, message",
    [
        (Machines(processes=0), "--processes is 0, it must be positive"),
        (Machines(nodes=2), "--nodes 2 needs --master HOST"),
        (Machines(nodes=2, node=2, master="a"), "--node-rank is 2, but --nodes is 2; nearest valid: 1"),
        (Machines(hostfile="h", nodes=2, master="a"), "--hostfile says which machines"),
        (Machines(hostfile="h", processes=2), "--hostfile says which machines"),
    ],
)
def test_machines_that_contradict_each_other(machines, message):
    with pytest.raises(UserError, match=message):
        check_machines(machines)


def test_a_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\n\nnode-1 slots=8 # the first\nnode-2\n")
    assert read_hostfile(path) == [("node-1", 8), ("node-2", None)]
    for text, message in {
        "": "names no machine.*nearest valid: host-1 slots=8",
        "a slots=x": "line 1 is 'a slots=x'.*nearest valid: a slots=8",
        "a\nb gpus=2": "line 2 is 'b gpus=2'",
        "a slots=0": "line 1 is",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_hostfile(path)
    with pytest.raises(UserError, match="cannot read the hostfile: No such file"):
        read_hostfile(tmp_path / "none")


def test_a_killed_process_is_the_cause_of_the_others():
    assert root_cause([(0, 2), (3, -9), (1, 1)]) == (3, -9)
    assert root_cause([(2, 1), (0, 2)]) == (0, 2)


@pytest.fixture
def run(tiny_llama, start, tmp_path, monkeypatch):
    """A config of three steps and the model that it begins with. Processes are started as by a user."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # an earlier test may have made this process a group of its own
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    lines = [json.dumps({"text": f"line {i} " * (i % 9)}) + "\n" for i in range(99)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    config = tmp_path / "c.yaml"
    stage = "tokens: 192, context: 32, batch_tokens: 64, micro_batch: 1, lr: {gates: 1e-3, mixer: 1e-3, body: 1e-3}"
    data = f"{{train: [{tmp_path}/text.jsonl], cache: {tmp_path}/cache}}"
    config.write_text(f"source: {tiny_llama}\ndevice: cpu\ndata: {data}\nstages: [{{kind: lm, {stage}}}]\n")
    return {"config": str(config), "model": str(start)}


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "1-lm" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(sys.platform == "win32", reason="ssh is replaced by a shell script")
def test_two_machines_give_the_losses_of_one_process(run, tmp_path, monkeypatch):
    """ssh runs the command here, except for the machine `broken`."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text('#!/bin/sh\necho "$1" >> "$SSH_LOG"\n[ "$1" = broken ] && exit 255\nexec sh -c "$2"\n')
    (folder / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(launch, "PORT", free_port())
    finetune(**run, out=str(out), hostfile=str(tmp_path / "hosts"))
    assert sorted((tmp_path / "log").read_text().split()) == ["127.0.0.1", "localhost"]
    assert (out / "logs" / "process-1.log").exists() and (out / "model" / "config.json").exists()
    finetune(**run, out=str(alone))
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    (tmp_path / "hosts").write_text("broken\n")
    with pytest.raises(UserError, match="machine broken ended with code 255"):
        launch_by_ssh(["env"], str(tmp_path / "hosts"))


def after_steps(count, out, action):
    """Have `action` called when a run in `out` has logged so many steps."""

    def wait():
        while not (out / "1-lm" / "metrics.jsonl").exists() or len(losses(out)) < count:
            time.sleep(0.02)
        action()

    threading.Thread(target=wait, daemon=True).start()


LONG = ["stages.0.tokens=640000", "stages.0.save_every=2"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")
def test_sigterm_to_the_launcher_reaches_every_process(run, tmp_path, capfd):
    out = tmp_path / "run"
    after_steps(2, out, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        finetune(**run, overrides=LONG, out=str(out), processes=2)
    errors = capfd.readouterr().err
    assert stopped.value.code == 143 and "stopped by SIGTERM after step" in errors and "Traceback" not in errors
    (checkpoint,) = (out / "1-lm").glob("step-*")
    assert step_of(checkpoint) == len(losses(out))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_process_that_dies_ends_the_run_with_its_name(run, tmp_path, capfd):
    def kill():
        for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            with suppress(OSError):  # one that has ended since
                if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)

    out = tmp_path / "run"
    after_steps(3, out, kill)
    with pytest.raises(UserError, match="process 1 of 2 was killed by signal SIGKILL"):
        finetune(**run, overrides=LONG, out=str(out), processes=2)
    errors = capfd.readouterr().err
    assert "another process of this run is gone; checkpoint step-" in errors and "Traceback" not in errors
    AutoModelForCausalLM.from_pretrained(newest_checkpoint(out / "1-lm"))
