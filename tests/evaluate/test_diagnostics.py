"""Fidelity, errors of layers and the use of slots against plain computations; faults made on purpose are found."""

import copy
import json
import re

import pytest
import torch
from torch.nn.functional import kl_div, silu
from transformers import AutoConfig, AutoModelForCausalLM

from t2r.convert import convert
from t2r.evaluate import compare
from t2r.evaluate.diagnostics import SlotUse, look_into, spied
from t2r.evaluate.efficiency import greedy
from t2r.evaluate.fidelity import Fidelity, Layers

SLOTS = 16


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def pair(folders):
    return load(folders / "llama"), load(folders / "gsa")


@pytest.fixture(scope="module")
def blocks():
    return torch.randint(2, 258, (3, 96), generator=torch.Generator().manual_seed(1)).tolist()


def test_divergence_is_its_definition(pair, blocks):
    original, model = pair
    task = Fidelity("f", block=96, edges=[0, 16, 96], prompt=8, new=12)
    found = {m.name: m for m in task.run(model, blocks, original).metrics}
    with torch.no_grad():
        p, q = (m(torch.tensor(blocks)).logits[:, :-1].log_softmax(-1) for m in (original, model))
    kl, same = kl_div(q, p, log_target=True, reduction="none").sum(-1), p.argmax(-1) == q.argmax(-1)
    assert found["KL [0, 16)"].samples == pytest.approx(kl[:, :15].mean(-1).tolist(), abs=1e-6)
    assert found["KL [16, 96)"].samples == pytest.approx(kl[:, 15:].mean(-1).tolist(), rel=1e-4)
    assert found["agreement [16, 96) %"].samples == pytest.approx((100.0 * same[:, 15:]).mean(-1).tolist())
    assert found["KL [0, 16)"].value < 1e-6 < 0.05 < found["KL [16, 96)"].value
    for block, alike in zip(blocks, found["greedy, alike of 12"].samples, strict=True):
        ids = torch.tensor([block[:8]])
        ours, theirs = greedy(model, ids, 12)[0], greedy(original, ids, 12)[0]
        assert alike == next((i for i in range(12) if ours[i] != theirs[i]), 12)
    itself = {m.name: m.value for m in task.run(original, blocks, original).metrics}
    assert itself["KL [16, 96)"] == pytest.approx(0, abs=1e-9) and itself["greedy, alike of 12"] == 12


def learned(folders):
    """The conversion with gates that write and forget at any time."""
    model = load(folders / "gsa")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.f_proj.weight, std=60.0)
    return model


@pytest.mark.parametrize("kind", ["exact", "learned", "far sinks", "paper"])
def test_the_attention_of_each_token_gives_the_layers_output(kind, folders, blocks, tmp_path):
    if kind == "paper":
        convert(str(folders / "llama"), str(tmp_path / "paper"), "paper", slots=SLOTS, verify=False)
        model = load(tmp_path / "paper")
    else:
        model = load(folders / "gsa") if kind == "exact" else learned(folders)
    if kind == "far sinks":
        config = AutoConfig.from_pretrained(folders / "gsa")
        config.gsa["sink_distance"] = 8
        model = AutoModelForCausalLM.from_pretrained(folders / "gsa", config=config).eval()
    calls, outputs = {}, []
    for layer in model.model.layers:
        read = lambda _, args: outputs.append(args[0])  # noqa: E731
        (layer.self_attn.g_norm if kind == "paper" else layer.self_attn.o_proj).register_forward_pre_hook(read)
    with torch.no_grad(), spied(model, lambda layer, call: calls.update({layer: call})):
        model(torch.tensor(blocks), use_cache=False)
    at = torch.tensor([5, 40, 95])
    for call, output in zip(calls.values(), outputs, strict=True):
        assert (call["q_sink"] is not None) == (kind == "far sinks")
        found = torch.cat(
            [
                torch.einsum("bqgt,btd->bqgd", look_into(call, head, at).tokens, call["v"][:, :, head].double())
                for head in range(2)
            ],
            dim=2,
        ).float()
        found = silu(found) if kind == "paper" else found
        assert torch.allclose(found.flatten(2), output[:, at], atol=1e-4)


def test_what_an_exact_start_looks_at(pair, blocks):
    metrics = {m.name: m.value for m in SlotUse("s", queries=8).run(pair[1], blocks).metrics}
    assert metrics["attention past the window"] < 1e-6
    assert metrics["attention inside the window"] + metrics["attention on sinks"] == pytest.approx(100)
    assert metrics["occupancy"] == pytest.approx(100)
    # of the 14 slots of the ring each holds a token for 14 tokens, the 2 sinks for all of the text
    assert metrics["half-life"] == 14


def test_a_memory_is_seen(folders, blocks):
    outcome = SlotUse("s", queries=8).run(learned(folders), blocks)
    metrics = {m.name: m.value for m in outcome.metrics}
    assert metrics["attention past the window"] > 1 and outcome.warnings == []
    assert {"layer", "head", "half_life", "similarity"} <= outcome.records[0].keys() and len(outcome.records) == 4
    assert outcome.text.count("\n") == 4


def swap_heads(attention):
    weight = attention.k_proj.weight
    weight.data = weight.data.unflatten(0, (2, -1)).flip(0).flatten(0, 1)


def empty_gates(attention):
    for parameter in (attention.f_proj.weight, attention.write, attention.keep):
        parameter.data.zero_()


@pytest.mark.parametrize("layer, damage", [(0, swap_heads), (1, swap_heads), (0, empty_gates), (1, empty_gates)])
def test_a_damaged_layer_is_named(layer, damage, folders, tmp_path, recipe, byte_tokenizer):
    model = load(folders / "gsa")
    damage(model.model.layers[layer].self_attn)
    model.save_pretrained(tmp_path / "damaged")
    byte_tokenizer().save_pretrained(tmp_path / "damaged")
    tasks = [
        {"kind": "fidelity", "block": 64, "edges": [0, 16, 64], "items": 4, "prompt": 8, "new": 8},
        {"kind": "layers", "block": 64, "items": 2},
        {"kind": "slot_use", "block": 64, "items": 2},
    ]
    models = [f"original={folders / 'llama'}", f"healthy={folders / 'gsa'}", str(tmp_path / "damaged")]
    report = compare(models, recipe(tasks=tasks, ablation=False), str(tmp_path / "report"))
    named = [line for line in report["warnings"] if "is damaged" in line]
    assert named and all(line.startswith(f"damaged: layer {layer} is damaged") for line in named)
    assert any("heads 0 " in line for line in named) or damage is empty_gates
    assert any("100 % empty" in line for line in named) == (damage is empty_gates)
    kl = report["results"]["fidelity"]["metrics"]["KL [0, 16)"]
    assert kl["healthy"]["high"] < 1e-5 < kl["damaged"]["low"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert (
        f"layer {layer} is damaged" in page
        and json.dumps(named[0])[1:20] in (tmp_path / "report" / "report.md").read_text()
    )


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.f_proj", "self_attn.o_proj", "mlp.up_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_nan_weights_is_named(layer, name, folders, tmp_path, recipe, byte_tokenizer):
    model = load(folders / "gsa")
    model.model.layers[layer].get_submodule(name).weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    byte_tokenizer().save_pretrained(tmp_path / "nan")
    tasks = [{"kind": kind, "block": 64, "items": 2} for kind in ("layers", "slot_use")]
    models = [str(folders / "llama"), str(tmp_path / "nan")]
    report = compare(models, recipe(tasks=tasks, ablation=False), str(tmp_path / "report"))
    want = [f"nan: layer {layer} is damaged: model.layers.{layer}.{name}.weight is not finite"]
    if name != "mlp.up_proj":
        want.insert(0, f"nan: layer {layer} is damaged: its output is not finite")
    assert [line for line in report["warnings"] if "is damaged" in line] == want
    worst = report["results"]["layers"]["metrics"]["worst layer, within"]["nan"]["value"]
    assert (worst is None) == (name != "mlp.up_proj")  # JSON has no NaN


@pytest.fixture(scope="module")
def slightly_trained(folders, tmp_path_factory, byte_tokenizer):
    """An original of four layers whose first says little, so that the same steps change its output far more than the
    others', and its conversion after a few steps towards it."""
    folder = tmp_path_factory.mktemp("trained")
    config = AutoConfig.from_pretrained(folders / "llama", num_hidden_layers=4)
    original = AutoModelForCausalLM.from_config(config).eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    original.model.layers[0].self_attn.v_proj.weight.data *= 0.04
    original.save_pretrained(folder / "llama")
    byte_tokenizer().save_pretrained(folder / "llama")
    convert(str(folder / "llama"), str(folder / "gsa"), slots=SLOTS, sinks=2, verify=False)
    model = load(folder / "gsa")
    ids = torch.randint(2, 258, (8, 4, 48), generator=torch.Generator().manual_seed(2))
    mixers = [p for name, p in model.named_parameters() if "self_attn" in name]
    optimizer = torch.optim.AdamW(mixers, lr=3e-4)
    for batch in ids:
        with torch.no_grad():
            aim = original(batch).logits.log_softmax(-1)
        kl_div(model(batch).logits.log_softmax(-1), aim, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
    return original, model


def test_training_is_no_damage(slightly_trained, blocks):
    original, model = slightly_trained
    outcome = Layers("l").run(model, blocks, original)
    first, *others = (record["within"] for record in outcome.records)
    assert first > max(5, 4 * max(others))  # it does stand out
    assert outcome.warnings == []
    assert re.findall(r"layer (\d) is changed by training: \d+ % error", outcome.text) == ["0"]


def test_a_start_that_is_not_exact_is_no_damage(slightly_trained, blocks, byte_tokenizer, tmp_path):
    """The paper's layers are not their source's at the start, and one of them is further from it than the others."""
    original, _ = slightly_trained
    original.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    convert(str(tmp_path / "llama"), str(tmp_path / "paper"), preset="paper", slots=SLOTS, verify=False)
    outcome = Layers("l").run(load(tmp_path / "paper"), blocks, original)
    first, *others = (record["within"] for record in outcome.records)
    assert first > max(5, 4 * max(others))
    assert outcome.warnings == []


@pytest.mark.parametrize("layer, damage", [(0, swap_heads), (2, swap_heads), (0, empty_gates), (2, empty_gates)])
def test_a_damaged_layer_of_a_trained_model_is_named(layer, damage, slightly_trained, blocks):
    original, model = slightly_trained
    damaged = copy.deepcopy(model)
    damage(damaged.model.layers[layer].self_attn)
    found = Layers("l").run(damaged, blocks, original).warnings
    assert found and all(line.startswith(f"layer {layer} is damaged") for line in found)
    empty = [line for line in SlotUse("s").run(damaged, blocks).warnings if "empty" in line]
    assert len(empty) == (damage is empty_gates)
    assert all(line.startswith(f"layer {layer} is damaged") for line in empty)


def test_a_memory_that_adds_nothing_is_told(folders, tmp_path, recipe, byte_tokenizer):
    model = load(folders / "gsa")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.f_proj.weight, std=60.0)  # noise: no help
    model.save_pretrained(tmp_path / "noise")
    byte_tokenizer().save_pretrained(tmp_path / "noise")
    tasks = [{"kind": "perplexity", "block": 64, "edges": [0, 64], "totals": [64], "items": 4}]
    report = compare([str(folders / "llama"), str(tmp_path / "noise")], recipe(tasks=tasks), str(tmp_path / "report"))
    assert list(report["models"]) == ["llama", "noise", "noise, window only"]
    (warning,) = report["warnings"]
    assert warning.startswith("noise: the memory adds nothing over the window: without it perplexity first 64 changes")


def test_only_the_original_knows_its_layers(folders, tmp_path, recipe):
    from t2r.evaluate import evaluate

    tasks = [{"kind": "layers", "block": 64, "items": 1}, {"kind": "slot_use", "block": 64, "items": 1}]
    report = evaluate(str(folders / "gsa"), recipe=recipe(tasks=tasks), out=str(tmp_path / "report"))
    assert report["results"]["layers"]["metrics"] == {} and report["results"]["slot_use"]["metrics"]


def test_errors_of_an_exact_start_lie_past_its_slots(pair, blocks):
    outcome = Layers("l").run(pair[1], blocks, pair[0])
    for record in outcome.records:
        assert record["within"] < 1e-2 < 1 < record["past"] and len(record["heads"]) == 4
    assert outcome.warnings == []


def test_a_hybrid_that_evicts_by_score(folders, tmp_path, recipe):
    options = dict(slots=SLOTS, sinks=2, eviction="score", keep_softmax="0", verify=False)
    convert(str(folders / "llama"), str(tmp_path / "hybrid"), **options)
    tasks = [
        {"kind": "perplexity", "block": 64, "edges": [0, 64], "totals": [64], "items": 3},
        {"kind": "fidelity", "block": 64, "edges": [0, 16, 64], "items": 2, "prompt": 8, "new": 4},
        {"kind": "layers", "block": 64, "items": 2},
        {"kind": "slot_use", "block": 128, "items": 2},
        {"kind": "throughput", "contexts": [32], "batches": [2], "new": 2, "repeats": 1},
        {"kind": "memory", "lengths": [64, 256], "check_at": 40},
    ]
    models = [str(folders / "llama"), str(tmp_path / "hybrid")]
    results = compare(models, recipe(tasks=tasks), str(tmp_path / "report"))["results"]
    # the layer that kept its attention makes no error; of the other, slots reach past the window
    layers = results["layers"]["metrics"]
    assert layers["layer 0"]["hybrid"]["value"] < 1e-3 < 0.1 < layers["layer 1"]["hybrid"]["value"]
    assert list(results["slot_use"]["metrics"])[7:] == ["layer 1"]
    assert results["slot_use"]["metrics"]["attention past the window"]["hybrid"]["value"] > 1
    assert "hybrid, window only" in results["perplexity"]["metrics"]["first 64"]
    memory = results["memory"]
    assert "NOT CONFIRMED" not in "".join(memory["text"].values())
    states = [memory["metrics"][f"{n} tokens"]["hybrid"]["value"] for n in (64, 256)]
    assert states[0] < states[1] < memory["metrics"]["256 tokens"]["llama"]["value"]
