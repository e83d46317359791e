"""What is trained: groups of parameters, adapters, and the rates of a schedule."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from stage_cases import PACKED, STAGE, batch_of, student_model

from t2r.errors import UserError
from t2r.schema import LearningRates, LoRAConfig
from t2r.train.parameters import (
    add_adapters,
    check_saved,
    learning_rate,
    parameter_groups,
    plain_name,
    saved_tensors,
    train_offsets,
)
from t2r.train.stages import hidden_states


def test_groups_of_parameters():
    student = student_model(output_norm=True)
    train_offsets(student)
    groups = parameter_groups(student, replace(STAGE, lr=LearningRates(3e-3, 1e-3, 0.0)))
    assert {(g["name"], g["peak"], g["weight_decay"]) for g in groups} == {
        ("gates", 3e-3, 0.0),
        ("mixer", 1e-3, 0.01),
        ("mixer", 1e-3, 0.0),
    }
    names = {id(p): name for name, p in student.named_parameters()}
    inside = {names[id(p)]: g["name"] for g in groups for p in g["params"]}
    kinds = {name.split("self_attn.")[1]: kind for name, kind in inside.items() if ".layers.0." in f".{name}"}
    assert kinds == {
        "f_proj.weight": "gates",
        "parametrizations.write.original": "gates",
        "parametrizations.keep.original": "gates",
        **{f"{x}_proj.weight": "mixer" for x in "qkvo"},
        "g_norm.weight": "mixer",
    }
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (name in inside)


@pytest.mark.parametrize("named", [{}, {"*self_attn*": 1e-4}], ids=["groups", "named"])
def test_scores_for_eviction_are_not_trained(named):
    student = student_model(eviction="score")
    train_offsets(student)
    groups = parameter_groups(student, replace(STAGE, lr=LearningRates(1e-3, 1e-3, 1e-3, named=named)))
    trained = {id(p) for group in groups for p in group["params"]}
    for name, parameter in student.named_parameters():
        assert (
            (id(parameter) in trained) == parameter.requires_grad == (".bonus." not in name and ".recent" not in name)
        )


def test_named_groups_come_before_the_others():
    rates = LearningRates(3e-3, 1e-3, 1e-4, named={"model.layers.0.*": 0.0, "*.write": 5e-3, "lm_head.weight": 2e-4})
    student = student_model()
    train_offsets(student)
    groups = parameter_groups(student, replace(STAGE, lr=rates))
    names = {id(p): plain_name(name) for name, p in student.named_parameters()}
    peaks = {names[id(p)]: g["peak"] for g in groups for p in g["params"]}
    assert not any(name.startswith("model.layers.0.") for name in peaks)
    assert peaks["model.layers.1.self_attn.write"] == 5e-3 and peaks["model.layers.1.self_attn.keep"] == 3e-3
    assert peaks["lm_head.weight"] == 2e-4 and peaks["model.embed_tokens.weight"] == 1e-4
    with pytest.raises(UserError, match="lr.named 'lm_hed.weight' is the name of no.*nearest valid: lm_head.weight"):
        parameter_groups(student, replace(STAGE, lr=LearningRates(1e-3, named={"lm_hed.weight": 0.0})))


def test_adapters_start_as_nothing_and_are_saved_as_part_of_their_weight(monkeypatch):
    monkeypatch.setattr("t2r.train.parameters.full_tensors", lambda parameters: parameters)
    student, batch = student_model(), batch_of(PACKED)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    plain = hidden_states(student, batch)
    lora = LoRAConfig(rank=3, alpha=6, targets=["q_proj", "down_proj"])
    add_adapters(student, lora)
    assert torch.equal(hidden_states(student, batch), plain)
    groups = parameter_groups(student, replace(STAGE, lora=lora, lr=LearningRates(1e-3, 2e-3, 3e-3)))
    count = {name: sum(len(g["params"]) for g in groups if g["name"] == name) for name in ("gates", "mixer", "body")}
    assert count == {"gates": 6, "mixer": 4, "body": 4}
    for group in groups:
        for parameter in group["params"]:
            torch.nn.init.normal_(parameter, std=0.1)
    changed = hidden_states(student, batch)
    saved = dict(saved_tensors(student, SimpleNamespace(tensor=before.__getitem__)))
    names = {name.split(".", 3)[3].removeprefix("self_attn.") for name in saved}
    assert names == {"q_proj.weight", "mlp.down_proj.weight", "f_proj.weight", "write", "keep"}
    merged = student_model()
    merged.load_state_dict(before | saved)
    assert torch.allclose(hidden_states(merged, batch), changed, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-2)
    with pytest.raises(UserError, match="lora.targets 'q_prj' is no linear layer; nearest valid: q_proj"):
        add_adapters(student_model(), LoRAConfig(targets=["q_prj"]))


def test_what_no_tensor_of_the_files_is_cannot_be_trained(tmp_path):
    """As transformers' mixtral, which has all experts of a layer in one parameter."""
    student = student_model()
    names = [name for name, _ in student.named_parameters() if name != "model.layers.1.mlp.up_proj.weight"]
    source = SimpleNamespace(names=lambda: names, path=tmp_path)
    parameter_groups(student, replace(STAGE, lr=LearningRates(1e-3, 1e-3, 1e-3, named={"*.mlp.*": 0.0})))
    check_saved(student, source)
    parameter_groups(student, STAGE)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight cannot be trained.*lr.named: .*mlp"):
        check_saved(student, source)
    train_offsets(student)
    add_adapters(student, lora := LoRAConfig(targets=["q_proj"]))
    parameter_groups(student, replace(STAGE, lora=lora))
    check_saved(student, source)


def test_schedules():
    stage = replace(STAGE, tokens=1000, batch_tokens=10, warmup_tokens=200, end_lr=0.1)
    rates = {s: [learning_rate(replace(stage, schedule=s), i) for i in range(100)] for s in ("linear", "cosine")}
    for s in rates:
        assert rates[s][:20] == pytest.approx([(i + 1) / 21 for i in range(20)])
        assert rates[s][20] == 1 and rates[s][60] == pytest.approx(0.55) and 0.1 < rates[s][99] < 0.12
        assert all(a > b for a, b in zip(rates[s][20:], rates[s][21:], strict=False))
    assert [learning_rate(replace(stage, schedule="constant"), i) for i in (0, 20, 99)] == [1 / 21, 1, 1]
    wsd = [learning_rate(replace(stage, schedule="wsd", decay_tokens=300), i) for i in (0, 20, 70, 85, 99)]
    assert wsd == pytest.approx([1 / 21, 1, 1, 0.55, 0.13])
