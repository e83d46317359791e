"""What is looked at between steps: perplexity by position, half-lives and use of slots, trackers, MFU, the picture."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stage_cases import SIZES, student_model, teacher_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from t2r.data.packing import UNLABELLED, Mixture, Rows
from t2r.data.tokens import Shard, Tokens
from t2r.errors import UserError
from t2r.modeling.configuration import CONFIG_CLASSES, preset
from t2r.schema import LogConfig, LossConfig, StageConfig
from t2r.train import trackers
from t2r.train.cost import Flops
from t2r.train.engine import Step
from t2r.train.log import Log, read
from t2r.train.plot import plot
from t2r.train.sharding import Group
from t2r.train.stages import STAGES
from t2r.train.validation import counts, edges, held_out, look, perplexities, position_losses, validate

STAGE = StageConfig("lm", tokens=1000, context=100, batch_tokens=200, loss=LossConfig(chunk=30), validation_tokens=700)
ALONE = Group(0, 1, torch.device("cpu"))


def rows():
    """Documents of 90 and 130 tokens in turn."""
    lengths = torch.tensor([90, 130] * 6)
    ids = torch.randint(3, 96, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    return Mixture([Rows(Tokens([Shard(ids.numpy(), (lengths.cumsum(0) - lengths).numpy())]), 100)])


def test_perplexity_by_position_is_that_of_each_token():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    sums = sum(position_losses(model, batch, 30) for batch, _ in held_out(rows(), STAGE, ALONE))
    want = {}
    for batch, _ in held_out(rows(), STAGE, ALONE):
        logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=UNLABELLED)
        for place, label, loss in zip(batch.position_ids.flatten(), batch.labels.flatten(), losses, strict=True):
            if label != UNLABELLED:
                want.setdefault("0-64" if place < 64 else "64-100", []).append(loss.item())
    want["all"] = sum(want.values(), [])
    found = perplexities(sums, 100)
    assert found == pytest.approx({name: math.exp(sum(x) / len(x)) for name, x in want.items()}, rel=1e-5)
    assert edges(100) == [0, 64, 100] and edges(4096) == [0, 64, 256, 512, 1024, 2048, 4096] and edges(64) == [0, 64]


class Engine(torch.nn.Module):
    """As much of DeepSpeed's as a validation uses."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module(batch)


@pytest.mark.parametrize("kind", STAGES)
def test_a_validation_runs_the_student_once(kind):
    stage = replace(STAGE, kind=kind)
    engine, runs = Engine(Step(STAGES[kind](stage), student_model(), teacher_model())), []
    student = engine.module.student
    student.model.register_forward_hook(lambda *call: runs.append(1))
    found = validate(engine, rows(), stage, ALONE)
    assert len(runs) == 7 + 1  # each row, and the row whose slots are looked into
    batches = [batch for batch, _ in held_out(rows(), STAGE, ALONE)]
    with torch.no_grad():
        losses = [engine(batch)[0].item() for batch in batches]
    assert found["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["ppl"] == perplexities(sum(position_losses(student, b, 30) for b in batches), 100)


def test_all_processes_validate_as_often_and_each_row_counts_once():
    alone = held_out(rows(), STAGE, ALONE)
    assert len(alone) == 7 and all(weight == 1 for _, weight in alone)
    three = [held_out(rows(), STAGE, Group(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert [len(part) for part in three] == [3, 3, 3]
    counted = [batch.input_ids for turn in zip(*three, strict=True) for batch, weight in turn if weight]
    assert all(map(torch.equal, counted, (batch.input_ids for batch, _ in alone)))


def test_half_lives_and_use_of_slots_of_an_exact_start():
    """A ring of 16 with 3 sinks, read from 100 tokens: a sink is written once, a slot of the ring every 13 tokens."""
    gsa = preset("exact", slots=16, sinks=3).to_dict()
    model = AutoModelForCausalLM.from_config(CONFIG_CLASSES["llama"](**SIZES, gsa=gsa)).eval()
    found = look(model, torch.randint(3, 96, (1, 100)))
    half_life = torch.tensor([math.log(2) * 100] * 3 + [math.log(2) * 100 / n for n in [8] * 6 + [7] * 7])
    want = [4 * n for n in counts(half_life.double(), tuple(2.0**i for i in range(17)))]
    assert found["half_life"] == want and sum(want) == 64
    assert found["layers"].keys() == {0, 1} and 1 < found["layers"][0]["slots"] <= 16
    assert sum(found["use"]) == 64 and found["use"][0] == 0
    assert counts(torch.tensor([0.5, 1.0, 1.5, 9.0]), (1.0, 2.0)) == [2, 1, 1]


def a_log(tmp_path, start=0, **settings):
    return Log(tmp_path, STAGE, start, Flops(3e6, 1e6), 4e12, LogConfig(**settings))


GATES = {"half_life": [3] * 18, "use": [5] * 8, "layers": {0: {"half_life": 1.0, "slots": 2.0}}}


def test_mfu_counts_the_operations_of_student_and_teacher(tmp_path):
    log = a_log(tmp_path)
    log.step(1, {"loss": 1.0}, {"gates": 1e-3}, 0.5, False)
    log.step(2, {"loss": float("nan")}, {"gates": 1e-3}, float("inf"), True)
    log.step(3, {"loss": float("nan")}, {"gates": 1e-3}, float("inf"), True)
    log.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert lines[0]["mfu"] == pytest.approx(lines[0]["tokens_per_second"] * 4e6 / 4e12)
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 2] and lines[1]["loss"] is None
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # as a kill leaves it
    log = a_log(tmp_path, start=2)
    assert log.skipped == 1
    log.close()
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_picture_of_a_stage(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs `pip install matplotlib`")
    log = a_log(tmp_path)
    for step in (1, 2):
        log.step(step, {"loss": 1.0 / step}, {"gates": 1e-3}, 0.5, False)
    ppl = {"0-64": 3.0, "64-100": 2.0, "all": 2.5}
    log.validation(2, {"validation_loss": 0.6, "ppl": ppl, "teacher_ppl": ppl, "gates": GATES})
    log.close()
    picture = plot(tmp_path).read_text()
    assert all(f"<!-- {word} -->" in picture for word in ("held out", "teacher", "64-100", "more"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot(tmp_path) is None


def test_trackers_get_every_number(tmp_path, monkeypatch):
    sent, ended = [], []
    session = SimpleNamespace(log=lambda numbers, step: sent.append((step, numbers)), finish=lambda: ended.append(1))
    opened = []
    wandb = SimpleNamespace(init=lambda **options: opened.append(options) or session)
    trackio = SimpleNamespace(
        init=lambda **options: opened.append(options), log=session.log, finish=lambda: ended.append(2)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    for start in (0, 1):
        log = a_log(tmp_path, start, trackers=["wandb", "trackio"], project="mine")
        log.step(start + 1, {"loss": 2.0}, {"gates": 1e-3}, 0.5, False)
        log.close()
    assert [step for step, _ in sent] == [1, 1, 2, 2] and ended == [1, 2, 1, 2]
    assert sent[0][1]["loss"] == 2.0 and sent[0][1]["lr/gates"] == 1e-3
    assert [options["project"] for options in opened] == ["mine"] * 4
    assert opened[0]["id"] == opened[2]["id"], "a resumed run is another run for wandb"
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="log.trackers names wandb, which is not installed; try: `pip install wandb`"):
        trackers.check_trackers(["wandb"])


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="needs `pip install tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = a_log(tmp_path, trackers=["tensorboard"])
    log.step(1, {"loss": 2.0}, {"gates": 1e-3}, 0.5, False)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 2.0
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.0
