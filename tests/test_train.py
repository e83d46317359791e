"""The loop: against itself interrupted, killed, sharded, out of disk and failing."""

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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from t2r.config import load
from t2r.convert import convert
from t2r.convert.source import open_source
from t2r.data import prepare
from t2r.data.tokens import request
from t2r.errors import UserError
from t2r.schema import RunConfig
from t2r.train import engine, finetune
from t2r.train.log import read
from t2r.train.parameters import group_of
from t2r.train.sharding import Group
from t2r.train.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def start(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "start"
    convert(str(tiny_llama), str(out), slots=16, sinks=2, dtype="float32", verify=False)
    return out


@pytest.fixture(scope="module")
def config(tiny_llama, tmp_path_factory):
    """A config file of three short stages on text of its own."""
    folder = tmp_path_factory.mktemp("config")
    lines = [{"text": "".join(chr(97 + (i * j * j) % 23) for j in range(5 + 17 * (i % 11)))} for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = "tokens: 512, context: 32, batch_tokens: 128, micro_batch: 2, loss: {chunk: 40, kl: 0.8}"
    (folder / "c.yaml").write_text(f"""source: {tiny_llama}
data: {{train: [{folder}/text.jsonl], validation: [{folder}/text.jsonl], cache: {folder}/cache}}
device: cpu
stages:
- {{kind: align, lr: {{gates: 3e-3, mixer: 3e-4}}, validation_tokens: 64, {stage}}}
- {{kind: distill, lr: {{gates: 1e-3, mixer: 1e-3, body: 1e-3}}, {stage}}}
- {{kind: lm, lr: {{gates: 1e-3, mixer: 1e-3, body: 1e-3}}, {stage}}}
""")
    return folder / "c.yaml"


def only(kind):
    """Words that leave one stage of the three."""
    stage = {"align": 0, "distill": 1, "lm": 2}[kind]

    def words(path):
        from omegaconf import OmegaConf

        stages = OmegaConf.to_container(OmegaConf.load(path).stages)
        return "stages=[" + json.dumps(stages[stage]).replace('"', "") + "]"

    return words


def records(out, stage):
    """The optimizer steps in a stage's metrics, without what depends on the clock."""
    lines = read(out / stage / "metrics.jsonl")
    timed = ("tokens_per_second", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "loss" in line]


def tensors(folder):
    source = open_source(folder)
    return {name: source.tensor(name) for name in source.names()}


@pytest.fixture(scope="module")
def straight(config, start, tmp_path_factory):
    """The run of all stages by one process, without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    finetune.finetune(str(config), model=str(start), out=str(out))
    return out


def test_a_run_leaves_loadable_models_and_its_metrics(straight, start, config):
    model, info = AutoModelForCausalLM.from_pretrained(straight / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (straight / "model").resolve() == straight / "3-lm" / "step-000004"
    for file in ("tokenizer.json", "generation_config.json", "conversion.json"):
        assert (straight / "model" / file).read_bytes() == (start / file).read_bytes()
    saved = load(straight / "config.yaml", RunConfig)
    assert saved.stages == load(config, RunConfig).stages
    assert json.loads((straight / "env.json").read_text())["torch"] == torch.__version__
    lines = [json.loads(line) for line in (straight / "1-align" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert lines[0]["validation_loss"] > lines[-1]["validation_loss"] > 0
    assert lines[0]["ppl"].keys() == lines[0]["teacher_ppl"].keys() == {"0-32", "all"}
    assert lines[0]["teacher_ppl"] == lines[-1]["teacher_ppl"] != lines[-1]["ppl"]
    slots = 2 * 2 * 16  # layers, kv heads, slots of each
    assert sum(lines[0]["gates"]["half_life"]) == sum(lines[0]["gates"]["use"]) == slots
    assert (straight / "1-align" / "training.svg").read_text().count("<path") > 20
    step = lines[2]
    assert step["tokens"] == 256 and step["lr"].keys() == {"gates", "mixer"} and step["grad_norm"] > 0
    assert step["tokens_per_second"] > 0 and step["memory_bytes"] > 1e8


def test_frozen_tensors_stay_and_trained_ones_move(straight, start):
    before, aligned, distilled = (tensors(f) for f in (start, straight / "1-align/step-000004", straight / "model"))
    for name in before:
        assert torch.equal(before[name], aligned[name]) == (group_of(name) == "body"), name
        assert not torch.equal(aligned[name], distilled[name]), name


def at_step(number, monkeypatch, action):
    """Have `action` called before the run's optimizer step `number`, counted from 1 over all stages."""
    run_step, count = engine.optimizer_step, [0]

    def step(*args):
        count[0] += 1
        if count[0] == number:
            action()
        return run_step(*args)

    monkeypatch.setattr(engine, "optimizer_step", step)


def test_an_interrupted_run_goes_on_bit_for_bit(straight, start, config, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    out, words = tmp_path / "run", [f"stages.{i}.save_every=2" for i in range(3)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(8, patch, interrupt)  # the last step of distill: 4 of align, 3 of distill are done
        finetune.finetune(str(config), words, model=str(start), out=str(out))
    assert not (out / "model").exists()
    assert [r["step"] for r in records(out, "2-distill")] == [1, 2, 3]
    assert [p.name for p in sorted((out / "2-distill").glob("step-*"))] == ["step-000002"]
    (out / "2-distill" / ".step-000004.partial-0000").mkdir()  # as a killed run leaves it
    finetune.finetune(str(config), words, model=str(start), out=str(out))
    for stage in ("1-align", "2-distill", "3-lm"):
        assert records(out, stage) == records(straight, stage)
        extra = {"teacher.json"} if stage == "1-align" else set()
        assert {p.name for p in (out / stage).iterdir()} == {"metrics.jsonl", "training.svg", "step-000004"} | extra
    ours, theirs = tensors(out / "model"), tensors(straight / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match=f"the run in {out} is finished; nearest valid: --out {out}-2"):
        finetune.finetune(str(config), words, model=str(start), out=str(out))


LONG = ["stages.0.tokens=5120", "stages.0.save_every=3", "stages.0.validation_tokens=64", "stages.0.keep=2"]


@pytest.fixture(scope="module")
def long(config, start, tmp_path_factory):
    """The words of a run of 40 steps, and its folder when it was never interrupted."""
    out, words = tmp_path_factory.mktemp("long") / "run", [only("lm")(config), *LONG]
    finetune.finetune(str(config), words, str(start), str(out))
    return words, out


def equals(out, long):
    """Whether a run's metrics and result are, bit for bit, those of the uninterrupted one."""
    ours, theirs = tensors(out / "model"), tensors(long / "model")
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return same and records(out, "1-lm") == records(long, "1-lm")


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


def test_a_killed_run_goes_on_bit_for_bit(long, config, start, tmp_path):
    """kill -9 at two moments that nobody has chosen, checkpoints being written every 3 steps."""
    words, straight = long
    out, chance = tmp_path / "run", random.SystemRandom()
    for first, last in ((1, 12), (15, 36)):
        process = command(config, words, start, out)
        wait_for_step(step := chance.randint(first, last), process, out)
        time.sleep(delay := chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
    finetune.finetune(str(config), words, str(start), str(out))
    assert equals(out, straight), (step, delay)


def test_sigterm_saves_a_checkpoint_and_ends_the_run(long, config, start, tmp_path, monkeypatch, capfd):
    words, straight = long
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(5, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune.finetune(str(config), words, str(start), str(out))
    assert stopped.value.code == 143
    assert "stopped by SIGTERM after step 5/40; the same command goes on from it" in capfd.readouterr().err
    assert {p.name for p in (out / "1-lm").iterdir()} == {"metrics.jsonl", "teacher.json", "step-000003", "step-000005"}
    finetune.finetune(str(config), words, str(start), str(out))
    assert equals(out, straight)


def test_sigterm_in_the_last_step_of_a_stage_does_not_begin_the_next(straight, config, start, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(4, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune.finetune(str(config), model=str(start), out=str(out))
    assert (out / "1-align" / "step-000004").is_dir() and not (out / "2-distill").exists()
    finetune.finetune(str(config), model=str(start), out=str(out))
    assert records(out, "3-lm") == records(straight, "3-lm")


def test_a_full_disk_leaves_the_last_checkpoint(long, config, start, tmp_path, monkeypatch):
    """A file that may not grow is what the operating system has to offer in place of a disk that is full."""
    words, straight = long
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            at_step(5, patch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard)))
            what = "cannot write checkpoint step-000006: .*; checkpoint step-000003 is intact"
            with pytest.raises(UserError, match=what):
                finetune.finetune(str(config), words, str(start), str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in (out / "1-lm").iterdir()} == {"metrics.jsonl", "teacher.json", "step-000003"}
    finetune.finetune(str(config), words, str(start), str(out))
    assert equals(out, straight)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000}))
    with pytest.raises(UserError, match="3 checkpoints need 0.0 GB of disk, 0.0 GB are free"):
        finetune.finetune(str(config), words, str(start), str(tmp_path / "other"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(long, config, start, tmp_path, monkeypatch, capfd):
    words, straight = long
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(9, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune.finetune(str(config), words, str(start), str(out))
    weights = out / "1-lm" / "step-000009" / "model.safetensors"
    os.truncate(weights, size := weights.stat().st_size - 1)
    finetune.finetune(str(config), words, str(start), str(out))
    assert f"step-000009 is not complete: model.safetensors has {size} bytes of {size + 1}" in capfd.readouterr().err
    assert equals(out, straight) and (out / "1-lm" / "damaged-step-000009").is_dir()


def test_data_that_ends_in_the_middle_leaves_the_last_checkpoint(config, start, tmp_path, monkeypatch):
    """Tokenised while training: the run gets as far as the data can be read, and goes on when they are mended."""
    text = "".join(json.dumps({"text": f"line {i} " + "abc" * (i % 50)}) + "\n" for i in range(600))
    path, whole = tmp_path / "data.jsonl.gz", gzip.compress(text.encode(), mtime=0)
    monkeypatch.setattr(prepare, "request", lambda *a: replace(request(*a), shard=1000))
    words = [only("lm")(config), f"data.train=[{path}]", "data.stream=true", "stages.0.tokens=40960"]
    words += [f"stages.0.{word}" for word in ("context=64", "batch_tokens=4096", "micro_batch=16", "save_every=2")]
    path.write_bytes(whole)
    finetune.finetune(str(config), words, str(start), str(tmp_path / "straight"))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read: .*data.jsonl.gz"):
        finetune.finetune(str(config), words, str(start), str(tmp_path / "run"))
    assert engine.newest_checkpoint(tmp_path / "run" / "1-lm")
    path.write_bytes(whole)
    finetune.finetune(str(config), words, str(start), str(tmp_path / "run"))
    assert equals(tmp_path / "run", tmp_path / "straight")


def torchrun(script, *words):
    """Run a script in two processes. Its own launcher is in tests/test_launch.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_and_every_zero_stage_give_the_losses_of_one(straight, start, config, tmp_path):
    """With activation checkpointing, the optimizer's state offloaded, a teacher that is sharded too, and when they go
    on from the checkpoint of one process."""
    options = {
        1: [f"stages.{i}.activation_checkpointing=true" for i in range(3)],
        2: ["deepspeed.offload=optimizer"],
        3: ["deepspeed.teacher=sharded"],
    }
    rates = "stages.0.lr={gates: 3e-3, mixer: 1e-3, body: 3e-4}"
    half = [only("lm")(config), rates, "stages.0.save_every=2", "stages.0.keep=9"]
    for zero in options:
        alone, again = tmp_path / f"alone{zero}", tmp_path / f"again{zero}"
        finetune.finetune(str(config), [*half, f"deepspeed.zero={zero}"], str(start), str(alone))
        shutil.copytree(alone, again, ignore=shutil.ignore_patterns("step-000004", "model"), symlinks=True)
    script = tmp_path / "three.py"
    script.write_text(f"""
from t2r.train.finetune import finetune
for zero, words in {options}.items():
    finetune({str(config)!r}, [f"deepspeed.zero={{zero}}", *words], {str(start)!r}, f"{tmp_path}/zero{{zero}}")
    finetune({str(config)!r}, {half} + [f"deepspeed.zero={{zero}}"], {str(start)!r}, f"{tmp_path}/again{{zero}}")
""")
    torchrun(script)
    for zero in options:
        ours, theirs = (records(tmp_path / f"{which}{zero}", "1-lm") for which in ("again", "alone"))
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
        assert [r["lr"] for r in ours] == [r["lr"] for r in theirs] and len(set(ours[3]["lr"].values())) == 3
    finetune.finetune(str(config), ["deepspeed.zero=0"], str(start), str(tmp_path / "zero0"))
    before, theirs = tensors(start), tensors(straight / "model")
    for zero in range(4):
        for stage in ("1-align", "2-distill", "3-lm"):
            ours, want = records(tmp_path / f"zero{zero}", stage), records(straight, stage)
            assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in want], rel=1e-5)
            assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in want], rel=1e-3)
        for name, tensor in tensors(tmp_path / f"zero{zero}" / "model").items():
            # Adam turns the rounding of a gradient near 0 into a whole step: compare by norm, not one by one
            assert (tensor - theirs[name]).norm() < 0.02 * (theirs[name] - before[name]).norm(), (zero, name)


def test_adapters_are_trained_resumed_and_merged(straight, start, config, tmp_path, monkeypatch):
    rates = "{gates: 1e-3, mixer: 1e-2, body: 0}"
    words = [only("distill")(config), f"stages.0.lr={rates}", "stages.0.lora={rank: 2, targets: [q_proj, o_proj]}"]
    finetune.finetune(str(config), words, str(start), str(tmp_path / "straight"))
    before, after = tensors(start), tensors(tmp_path / "straight" / "model")
    changed = {name.split("self_attn.")[-1] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj.weight", "o_proj.weight", "f_proj.weight", "write", "keep"}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(2, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune.finetune(str(config), words, str(start), str(tmp_path / "run"))
    finetune.finetune(str(config), words, str(start), str(tmp_path / "run"))
    assert records(tmp_path / "run", "1-distill") == records(tmp_path / "straight", "1-distill")
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors(tmp_path / "run" / "model").items())


def test_accumulation_does_not_change_the_losses(straight, start, config, tmp_path):
    words = [f"stages.{i}.micro_batch=4" for i in range(3)]
    finetune.finetune(str(config), words, str(start), str(tmp_path / "run"))
    for stage in ("1-align", "2-distill", "3-lm"):
        ours = [r["loss"] for r in records(tmp_path / "run", stage)]
        assert ours == pytest.approx([r["loss"] for r in records(straight, stage)], rel=1e-5)


def test_bfloat16_follows_float32_and_keeps_the_clock_fine(straight, start, config, tmp_path):
    words = [f"stages.{i}.dtype=bfloat16" for i in range(3)]
    finetune.finetune(str(config), words, str(start), str(tmp_path / "run"))
    for stage in ("1-align", "2-distill", "3-lm"):
        ours = [r["loss"] for r in records(tmp_path / "run", stage)]
        assert ours == pytest.approx([r["loss"] for r in records(straight, stage)], rel=2e-2)
    write = tensors(tmp_path / "run" / "model")["model.layers.0.self_attn.write"]
    assert write.dtype == torch.float32
    assert not torch.equal(write, write.bfloat16().float()), "bfloat16 has rounded the clock's biases"


def test_a_bfloat16_teacher_keeps_its_rotary_frequencies(tiny_llama):
    settings, group = RunConfig(str(tiny_llama)), Group(0, 1, torch.device("cpu"))
    cast, plain = (finetune.load_teacher(settings, group, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in cast.parameters())
    buffers = dict(plain.named_buffers())
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in cast.named_buffers())


@pytest.mark.parametrize("zero, dtype", [(0, "float32"), (1, "float32"), (1, "bfloat16")])
def test_a_loss_that_is_not_finite_skips_the_step_and_then_stops(config, start, tmp_path, monkeypatch, zero, dtype):
    plain, calls = STAGES["lm"].loss, []

    def spoilt(self, student, teacher, batch):
        loss, metrics = plain(self, student, teacher, batch)
        calls.append(1)
        return (loss * float("nan") if 2 < len(calls) <= 2 + 2 * spoilt_steps else loss), metrics

    monkeypatch.setattr(STAGES["lm"], "loss", spoilt)
    words = [only("lm")(config), f"deepspeed.zero={zero}", f"stages.0.dtype={dtype}", "stages.0.tokens=768"]
    spoilt_steps = 2
    finetune.finetune(str(config), words, str(start), str(tmp_path / "two"))
    lines = records(tmp_path / "two", "1-lm")
    assert [line.get("skipped", False) for line in lines] == [False, True, True, False, False, False]
    assert lines[1]["loss"] is None and lines[5]["loss"] < lines[0]["loss"]
    assert all(torch.isfinite(x).all() for x in tensors(tmp_path / "two" / "model").values())
    calls.clear()
    spoilt_steps = 6
    with pytest.raises(UserError, match="not finite in 5 steps in a row, the last is step 6"):
        finetune.finetune(str(config), words, str(start), str(tmp_path / "six"))
    assert not (tmp_path / "six" / "model").exists()


def test_what_cannot_be_trained_is_refused_before_anything_is_written(config, start, tiny_llama, tmp_path, monkeypatch):
    def refuses(message, *words, model=start, out="new"):
        with pytest.raises(UserError, match=message):
            finetune.finetune(str(config), words, str(model), str(tmp_path / out))
        assert not (tmp_path / "new").exists()

    refuses("stages.0.batch_tokens is 100, no multiple", "stages.0.batch_tokens=100")
    refuses("no data at /none.jsonl", "data.train=[/none.jsonl]")
    refuses("no text under 'txt'.*nearest valid: data.field=text", "data.field=txt")
    refuses("a llama model is not converted yet", model=tiny_llama)
    refuses("no such folder or file: /none", model="/none")
    refuses("there are no stages to train", "stages=[]")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refuses("exists and holds no run; nearest valid: --out .*full-2", out="full")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", None)
        refuses("training needs DeepSpeed; try: `DS_BUILD_OPS=0 pip install deepspeed`")
    if not torch.cuda.is_available():
        refuses("device is cuda, but torch sees no GPU", "device=cuda")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "other")
    refuses("does not come from .*other: vocab_size is 259, not 96", f"source={tmp_path}/other")
    long = ["stages.0.validation_tokens=0", "stages.0.context=100000", "stages.0.batch_tokens=200000"]
    refuses("less than one row of 100000.*nearest valid: context=", *long, out="rows")
    refuses("zero is 0, which keeps no float32 weights.*stages.0", "deepspeed.zero=0", "stages.0.dtype=bfloat16")


def test_a_run_folder_is_for_one_configuration_and_a_checkpoint_for_one_model(config, start, straight, tmp_path):
    with pytest.raises(UserError, match="holds a run of another configuration.*nearest valid: --out"):
        finetune.finetune(str(config), ["seed=1"], str(start), str(straight))
    out, other = tmp_path / "run", tmp_path / "other"
    words = [only("align")(config)]
    finetune.finetune(str(config), words, str(start), str(out))
    (out / "model").unlink()
    (out / "1-align" / "step-000004").rename(out / "1-align" / "step-000003")
    convert(str(load(config, RunConfig).source), str(other), slots=8, sinks=2, verify=False)
    with pytest.raises(UserError, match="the checkpoint is of another model"):
        finetune.finetune(str(config), words, str(other), str(out))
