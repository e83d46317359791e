"""The loop: against itself on several processes, with other options, and with losses that are not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_cases import at_step, only, records, tensors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from t2r.config import load
from t2r.convert import convert
from t2r.errors import UserError
from t2r.schema import DeepSpeedConfig, RunConfig
from t2r.train import finetune, sharding
from t2r.train.parameters import group_of
from t2r.train.sharding import Group, join_group
from t2r.train.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_leaves_loadable_models_and_its_metrics(straight, start, stages):
    model, info = AutoModelForCausalLM.from_pretrained(straight / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (straight / "model").resolve() == straight / "3-lm" / "step-000004"
    for file in ("tokenizer.json", "generation_config.json", "conversion.json"):
        assert (straight / "model" / file).read_bytes() == (start / file).read_bytes()
    saved = load(straight / "config.yaml", RunConfig)
    assert saved.stages == load(stages, RunConfig).stages
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


def torchrun(script, *words):
    """Run a script in two processes. Its own launcher is in tests/test_launch.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_and_every_zero_stage_give_the_losses_of_one(straight, start, stages, tmp_path):
    """With activation checkpointing, the optimizer's state offloaded, a teacher that is sharded too, and when they go
    on from the checkpoint of one process."""
    options = {
        1: [f"stages.{i}.activation_checkpointing=true" for i in range(3)],
        2: ["deepspeed.offload=optimizer"],
        3: ["deepspeed.teacher=sharded"],
    }
    rates = "stages.0.lr={gates: 3e-3, mixer: 1e-3, body: 3e-4}"
    half = [only("lm", stages), rates, "stages.0.save_every=2", "stages.0.keep=9"]
    for zero in options:
        alone, again = tmp_path / f"alone{zero}", tmp_path / f"again{zero}"
        finetune.finetune(str(stages), [*half, f"deepspeed.zero={zero}"], str(start), str(alone))
        shutil.copytree(alone, again, ignore=shutil.ignore_patterns("step-000004", "model"), symlinks=True)
    script = tmp_path / "three.py"
    script.write_text(f"""
import os
from transformers import AutoModelForCausalLM
from t2r.train.finetune import finetune

def refuse(*args, **options):
    raise AssertionError("a process reads weights that it gets from the first")

for zero, words in {options}.items():
    if zero == 3 and os.environ["RANK"] == "1":
        AutoModelForCausalLM.from_pretrained = refuse
    finetune({str(stages)!r}, [f"deepspeed.zero={{zero}}", *words], {str(start)!r}, f"{tmp_path}/zero{{zero}}")
    finetune({str(stages)!r}, {half} + [f"deepspeed.zero={{zero}}"], {str(start)!r}, f"{tmp_path}/again{{zero}}")
""")
    torchrun(script)
    assert torch.nn.functional.linear is torch._C._nn.linear, "ZeRO 3 has left its own"
    for zero in options:
        ours, theirs = (records(tmp_path / f"{which}{zero}", "1-lm") for which in ("again", "alone"))
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
        assert [r["lr"] for r in ours] == [r["lr"] for r in theirs] and len(set(ours[3]["lr"].values())) == 3
    finetune.finetune(str(stages), ["deepspeed.zero=0"], str(start), str(tmp_path / "zero0"))
    before, theirs = tensors(start), tensors(straight / "model")
    for zero in range(4):
        for stage in ("1-align", "2-distill", "3-lm"):
            ours, want = records(tmp_path / f"zero{zero}", stage), records(straight, stage)
            assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in want], rel=1e-5)
            assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in want], rel=1e-3)
        for name, tensor in tensors(tmp_path / f"zero{zero}" / "model").items():
            # Adam turns the rounding of a gradient near 0 into a whole step: compare by norm, not one by one
            assert (tensor - theirs[name]).norm() < 0.02 * (theirs[name] - before[name]).norm(), (zero, name)


def test_answers_from_the_text_in_two_processes(start, stages, tmp_path):
    """Of which one may have none in a forward, while ZeRO 3 gathers the head for both."""
    names = [a + b for a in ("river", "castle", "bridge", "market") for b in ("ford", "wick", "town", "gate")]
    names += [f"{name}{end}" for name in names for end in ("side", "ham", "moor")]
    lines = [{"text": " ".join(f"{names[i]} lies by {names[i * n % 64]}." for i in range(64))} for n in range(1, 20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [only("distill", stages), f"data.train=[{tmp_path}/text.jsonl]", "data.validation=[]", "data.lookups=0.9"]
    words += [f"data.cache={tmp_path}/cache", "stages.0.context=1024", "stages.0.batch_tokens=4096"]
    words += ["stages.0.micro_batch=1", "stages.0.tokens=8192"]
    for answers in ("text", "teacher"):
        finetune.finetune(
            str(stages), [*words, f"stages.0.loss.answers={answers}"], str(start), f"{tmp_path}/{answers}"
        )
    script = tmp_path / "two.py"
    script.write_text(f"""
from t2r.train.finetune import finetune
words = {words} + ["stages.0.loss.answers=text", "deepspeed.zero=3"]
finetune({str(stages)!r}, words, {str(start)!r}, "{tmp_path}/zero3")
""")
    torchrun(script)
    ours, want, other = (
        [r["loss"] for r in records(tmp_path / name, "1-distill")] for name in ("zero3", "text", "teacher")
    )
    assert ours == pytest.approx(want, rel=1e-5)
    assert all(abs(a - b) > 1e-3 * b for a, b in zip(want, other, strict=True))


def test_adapters_are_trained_resumed_and_merged(straight, start, stages, tmp_path, monkeypatch):
    rates = "{gates: 1e-3, mixer: 1e-2, body: 0}"
    words = [
        only("distill", stages),
        f"stages.0.lr={rates}",
        "stages.0.lora={rank: 2, targets: [q_proj, o_proj]}",
    ]
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "straight"))
    before, after = tensors(start), tensors(tmp_path / "straight" / "model")
    changed = {name.split("self_attn.")[-1] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj.weight", "o_proj.weight", "f_proj.weight", "write", "keep"}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(2, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune.finetune(str(stages), words, str(start), str(tmp_path / "run"))
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "run"))
    assert records(tmp_path / "run", "1-distill") == records(tmp_path / "straight", "1-distill")
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors(tmp_path / "run" / "model").items())


def test_accumulation_does_not_change_the_losses(straight, start, stages, tmp_path):
    words = [f"stages.{i}.micro_batch=4" for i in range(3)]
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "run"))
    for stage in ("1-align", "2-distill", "3-lm"):
        ours = [r["loss"] for r in records(tmp_path / "run", stage)]
        assert ours == pytest.approx([r["loss"] for r in records(straight, stage)], rel=1e-5)


def test_bfloat16_follows_float32_and_keeps_the_clock_fine(straight, start, stages, tmp_path):
    words = [f"stages.{i}.dtype=bfloat16" for i in range(3)]
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "run"))
    for stage in ("1-align", "2-distill", "3-lm"):
        ours = [r["loss"] for r in records(tmp_path / "run", stage)]
        assert ours == pytest.approx([r["loss"] for r in records(straight, stage)], rel=2e-2)
    write = tensors(tmp_path / "run" / "model")["model.layers.0.self_attn.write"]
    assert write.dtype == torch.float32
    assert not torch.equal(write, write.bfloat16().float()), "bfloat16 has rounded the clock's biases"


def test_gathered_gradients_are_those_of_deepspeed(stages, start, tmp_path, monkeypatch):
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    words = [only("lm", stages), "deepspeed.zero=1", "stages.0.dtype=bfloat16", "stages.0.clip=0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "gather_gradients", lambda optimizer: None)
        finetune.finetune(str(stages), words, str(start), str(tmp_path / "theirs"))
    monkeypatch.setattr(BF16_Optimizer, "_update_hp_grad", None)
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "ours"))
    theirs, ours = (records(tmp_path / name, "1-lm") for name in ("theirs", "ours"))
    assert len(ours) == len(theirs) > 3 and ours[0]["grad_norm"] > 0.5
    for one, other in zip(theirs, ours, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    theirs, ours = (tensors(tmp_path / name / "model") for name in ("theirs", "ours"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_a_bfloat16_teacher_keeps_its_rotary_frequencies(tiny_llama):
    settings, group = RunConfig(str(tiny_llama)), Group(0, 1, torch.device("cpu"))
    cast, plain = (finetune.load_teacher(settings, group, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in cast.parameters())
    buffers = dict(plain.named_buffers())
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in cast.named_buffers())


def test_a_stage_without_a_teacher_does_not_keep_that_of_the_stage_before(stages, start, tmp_path, monkeypatch):
    teachers = []

    def train(config, stage, folder, teacher, *rest):
        teachers.append(teacher and weakref.ref(teacher))
        assert stage.kind != "lm" or teachers[0]() is None
        return folder

    monkeypatch.setattr(finetune, "train", train)
    finetune.finetune(str(stages), model=str(start), out=str(tmp_path / "run"))
    assert teachers[0] == teachers[1] and teachers[2] is None


@pytest.mark.parametrize("place", ["sharded", "cpu"])
def test_a_teacher_in_parts_answers_as_the_whole_one_and_leaves_torch_as_it_was(tiny_llama, place):
    group, linear = join_group("cpu"), torch.nn.functional.linear
    settings = RunConfig(str(tiny_llama))
    whole = finetune.load_teacher(settings, group, torch.float32)
    split = replace(settings, deepspeed=DeepSpeedConfig(teacher=place))
    parts = finetune.load_teacher(split, group, torch.float32)
    assert not any(p.numel() for p in parts.parameters()) and not any(p.requires_grad for p in parts.parameters())
    ids = torch.randint(3, 250, (2, 30))
    with torch.no_grad():
        assert torch.equal(parts(ids).logits, whole(ids).logits)
    assert torch.nn.functional.linear is linear


@pytest.mark.parametrize("zero, dtype", [(0, "float32"), (1, "float32"), (1, "bfloat16")])
def test_a_loss_that_is_not_finite_skips_the_step_and_then_stops(stages, start, tmp_path, monkeypatch, zero, dtype):
    plain, calls = STAGES["lm"].loss, []

    def spoilt(self, student, teacher, batch):
        loss, metrics = plain(self, student, teacher, batch)
        calls.append(1)
        return (loss * float("nan") if 2 < len(calls) <= 2 + 2 * spoilt_steps else loss), metrics

    monkeypatch.setattr(STAGES["lm"], "loss", spoilt)
    words = [only("lm", stages), f"deepspeed.zero={zero}", f"stages.0.dtype={dtype}", "stages.0.tokens=768"]
    spoilt_steps = 2
    finetune.finetune(str(stages), words, str(start), str(tmp_path / "two"))
    lines = records(tmp_path / "two", "1-lm")
    assert [line.get("skipped", False) for line in lines] == [False, True, True, False, False, False]
    assert lines[1]["loss"] is None and lines[5]["loss"] < lines[0]["loss"]
    assert all(torch.isfinite(x).all() for x in tensors(tmp_path / "two" / "model").values())
    calls.clear()
    spoilt_steps = 6
    with pytest.raises(UserError, match="not finite in 5 steps in a row, the last is step 6"):
        finetune.finetune(str(stages), words, str(start), str(tmp_path / "six"))
    assert not (tmp_path / "six" / "model").exists()


def test_what_cannot_be_trained_is_refused_before_anything_is_written(stages, start, tiny_llama, tmp_path, monkeypatch):
    def refuses(message, *words, model=start, out="new"):
        with pytest.raises(UserError, match=message):
            finetune.finetune(str(stages), words, str(model), str(tmp_path / out))
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
        refuses("training needs DeepSpeed; try: `DS_BUILD_OPS=0 pip install 'deepspeed>=0.19'`")
    if not torch.cuda.is_available():
        refuses("device is cuda, but torch sees no GPU", "device=cuda")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "other")
    refuses("does not come from .*other: vocab_size is 259, not 96", f"source={tmp_path}/other")
    long = ["stages.0.validation_tokens=0", "stages.0.context=100000", "stages.0.batch_tokens=200000"]
    refuses("less than one row of 100000.*nearest valid: context=", *long, out="rows")
    refuses("zero is 0, which keeps no float32 weights.*stages.0", "deepspeed.zero=0", "stages.0.dtype=bfloat16")


def test_a_folder_whose_run_has_not_trained_takes_a_corrected_configuration(stages, tmp_path, monkeypatch):
    out, common = tmp_path / "run", ["convert={slots: 16, sinks: 2, dtype: float32, verify: false}", "seed=3"]

    def fails(step, *words):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            at_step(step, patch, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            finetune.finetune(str(stages), [*common, *words], out=str(out))

    fails(1)
    made, first = (
        (out / "start" / "model.safetensors").stat().st_mtime_ns,
        (out / "1-align" / "teacher.json").read_text(),
    )
    with pytest.raises(UserError, match=f"whose conversion start is of another source.*try: `rm -r {out}/start`"):
        finetune.finetune(str(stages), [*common, "convert.slots=8"], out=str(out))
    fails(2, corrected := "stages.0.validation_tokens=128")  # one step of it, and no checkpoint
    assert (out / "start" / "model.safetensors").stat().st_mtime_ns == made
    assert (out / "1-align" / "teacher.json").read_text() != first
    assert load(out / "config.yaml", RunConfig).stages[0].validation_tokens == 128
    with pytest.raises(UserError, match=f"has made 1-align .*nearest valid: --out {out}-2"):
        finetune.finetune(str(stages), common, out=str(out))
    assert len(records(out, "1-align")) == 1
    finetune.finetune(str(stages), [*common, corrected], out=str(out))
    assert len(records(out, "1-align")) == 4
    (out / "model").unlink()
    for metrics in out.glob("*/metrics.jsonl"):
        metrics.unlink()
    with pytest.raises(UserError, match="has made 1-align"):
        finetune.finetune(str(stages), common, out=str(out))
    assert len(list(out.glob("*/step-000004"))) == 3


def test_a_run_folder_is_for_one_configuration_and_a_checkpoint_for_one_model(stages, start, straight, tmp_path):
    with pytest.raises(UserError, match="holds a run of another configuration.*nearest valid: --out"):
        finetune.finetune(str(stages), ["seed=1"], str(start), str(straight))
    out, other = tmp_path / "run", tmp_path / "other"
    words = [only("align", stages)]
    finetune.finetune(str(stages), words, str(start), str(out))
    (out / "model").unlink()
    (out / "1-align" / "step-000004").rename(out / "1-align" / "step-000003")
    convert(str(load(stages, RunConfig).source), str(other), slots=8, sinks=2, verify=False)
    with pytest.raises(UserError, match="the checkpoint is of another model"):
        finetune.finetune(str(stages), words, str(other), str(out))
