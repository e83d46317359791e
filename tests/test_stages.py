"""The stages: losses against their formulas, packed documents against each alone, groups of parameters."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.data.packing import UNLABELLED, Batch
from t2r.errors import UserError
from t2r.families import FAMILIES
from t2r.modeling.attention import GSAttention
from t2r.modeling.configuration import CONFIG_CLASSES, GSAConfig, preset
from t2r.schema import LearningRates, LoRAConfig, LossConfig, StageConfig
from t2r.train import engine
from t2r.train.losses import Mix, check_liger, head, mixed_loss
from t2r.train.parameters import (
    add_adapters,
    group_of,
    learning_rate,
    parameter_groups,
    plain_name,
    saved_tensors,
    train_offsets,
)
from t2r.train.stages import STAGES, Align, attention_lessons, hidden_states

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
STAGE = StageConfig("align", tokens=10**6, lr=LearningRates(1e-3, 1e-3, 1e-3), loss=LossConfig(kl=0.7, temperature=2.0))


def teacher_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def student_model(**changes):
    gsa = GSAConfig(**(preset("exact", slots=16, sinks=3).to_dict() | changes))
    model = AutoModelForCausalLM.from_config(CONFIG_CLASSES["llama"](**SIZES, gsa=gsa.to_dict()))
    model.load_state_dict(teacher_model().state_dict(), strict=False)
    return model


def batch_of(lengths, seed=0):
    """Rows of documents, lengths[row][document]; the last document of a row ends with it."""
    B, T = len(lengths), sum(lengths[0])
    ids = torch.randint(3, 96, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    labels, positions, bounds = ids[:, 1:].clone(), [], [0]
    for row, documents in enumerate(lengths):
        end = 0
        for n in documents:
            end += n
            labels[row, end - 1] = UNLABELLED
            bounds.append(bounds[-1] + n)
        positions.append(torch.cat([torch.arange(n) for n in documents]))
    share = torch.tensor(float((labels != UNLABELLED).sum()))
    return Batch(ids[:, :-1], labels, torch.stack(positions), torch.tensor(bounds), share)


def alone(batch):
    """Each document of a batch as a batch of its own."""
    for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        cut = [x.flatten()[None, begin:end] for x in (batch.input_ids, batch.labels, batch.position_ids)]
        yield Batch(*cut, torch.tensor([0, end - begin]), torch.tensor(1.0))


PACKED = [[20, 1, 19], [7, 33]]


def tiny_head(width, bias=False, **config):
    """As much of a causal LM as a loss looks at, in float64."""
    lm_head = torch.nn.Linear(width, 50, bias=bias, dtype=torch.float64)
    return SimpleNamespace(lm_head=lm_head, config=SimpleNamespace(**config))


def plain_losses(student, teacher, hidden, theirs, labels, temperature):
    """(KL, cross-entropy) by the formulas, on the labelled tokens, all logits at once."""
    seen = labels != UNLABELLED
    logits, target = head(student)(hidden)[seen], head(teacher)(theirs)[seen]
    ce = cross_entropy(logits, labels[seen], reduction="sum")
    target = log_softmax(target / temperature, -1)
    kl = kl_div(log_softmax(logits / temperature, -1), target, log_target=True, reduction="sum")
    return kl * temperature**2, ce


@pytest.mark.parametrize("way", ["in forward", "recomputed"])
@pytest.mark.parametrize("chunk", [1, 7, 80, 1000])
@pytest.mark.parametrize("mix", [Mix(0.7, 0.3, 2.5), Mix(1.0, 0.0, 1.0), Mix(0.0, 1.0)])
@pytest.mark.parametrize("config", [{}, {"logit_scale": 0.3, "final_logit_softcapping": 2.0}])
def test_chunked_losses_are_the_plain_formulas(mix, chunk, way, config):
    student, teacher = tiny_head(16, bias=True, **config), tiny_head(12)
    hidden, theirs = torch.randn(2, 40, 16).double().requires_grad_(), torch.randn(2, 40, 12).double()
    labels = torch.randint(0, 50, (2, 40))
    labels[0, ::5] = UNLABELLED
    if way == "recomputed":
        student.lm_head.weight.ds_id = 0  # as ZeRO 3 marks what it has in parts
    inputs = [hidden, *student.lm_head.parameters()]
    loss, kl, ce = mixed_loss(student, hidden, labels, mix, LossConfig(chunk=chunk), teacher, theirs)
    gradients = torch.autograd.grad(3 * loss, inputs)
    plain_kl, plain_ce = plain_losses(student, teacher, hidden, theirs, labels, mix.temperature)
    plain = mix.kl * plain_kl + mix.ce * plain_ce
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert (kl.item(), ce.item()) == pytest.approx((plain_kl.item(), plain_ce.item()), rel=1e-12)
    for ours, wanted in zip(gradients, torch.autograd.grad(3 * plain, inputs), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert mixed_loss(student, hidden, labels, mix, LossConfig(chunk=chunk), teacher, theirs).loss == loss
    alone = mixed_loss(student, hidden, labels, Mix(0.0, 1.0), LossConfig(chunk=chunk))
    assert alone.kl.item() == 0 and alone.loss.item() == pytest.approx(plain_ce.item(), rel=1e-12)


LIGER = """
import torch
from types import SimpleNamespace
from t2r.schema import LossConfig
from t2r.train.losses import Mix, mixed_loss
torch.manual_seed(0)
student, teacher = (SimpleNamespace(lm_head=torch.nn.Linear(n, 50, bias=False), config=None) for n in (16, 12))
hidden, theirs = torch.randn(2, 40, 16, requires_grad=True), torch.randn(2, 40, 12)
labels = torch.randint(0, 50, (2, 40))
labels[0, ::5] = -100
for mix in (Mix(0.0, 1.0), Mix(1.0, 0.0, 1.0), Mix(0.7, 0.3, 2.5)):
    found = []
    for backend in ("own", "liger"):
        loss = mixed_loss(student, hidden, labels, mix, LossConfig(backend=backend), teacher, theirs).loss
        found.append([loss, *torch.autograd.grad(loss, [hidden, student.lm_head.weight])])
    for ours, liger in zip(*found):
        assert torch.allclose(ours, liger, rtol=1e-5, atol=1e-5), mix
"""


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs `pip install liger-kernel`")
def test_liger_computes_the_same():
    """Its kernels, by Triton's interpreter, which must be chosen before anything is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_liger_is_refused_where_it_cannot_work(monkeypatch):
    with pytest.raises(UserError, match="loss.backend is liger.*nearest valid: own; try: `pip install liger-kernel`"):
        monkeypatch.setattr("t2r.train.losses.find_spec", lambda name: None)
        check_liger(student_model(), "cuda")
    monkeypatch.setattr("t2r.train.losses.find_spec", lambda name: "there")
    with pytest.raises(UserError, match="loss.backend is liger, which needs a GPU; nearest valid: own"):
        check_liger(student_model(), "cpu")
    check_liger(student_model(), "cuda")
    with pytest.raises(UserError, match="liger, which does not know the head of"):
        check_liger(tiny_head(16, bias=True, model_type="x"), "cuda")


def test_a_frozen_head_gets_no_gradient_and_the_rest_does():
    student, hidden = tiny_head(16), torch.randn(1, 40, 16).double().requires_grad_()
    student.lm_head.requires_grad_(False)
    labels = torch.randint(0, 50, (1, 40))
    mixed_loss(student, hidden, labels, Mix(0.0, 1.0), LossConfig(chunk=7)).loss.backward()
    plain = torch.autograd.grad(cross_entropy(head(student)(hidden)[0], labels[0], reduction="sum"), hidden)[0]
    assert torch.allclose(hidden.grad, plain) and student.lm_head.weight.grad is None


@pytest.mark.parametrize("kind", ["distill", "lm"])
def test_a_packed_loss_is_that_of_the_documents_alone(kind):
    """Teacher and student see each document as if it were the only one: contexts, positions, clocks, labels."""
    student, teacher = student_model(), teacher_model()
    stage = STAGES[kind](replace(STAGE, kind=kind))
    batch = batch_of(PACKED)
    loss, metrics = stage.loss(student, teacher, batch)
    want = {"kl": 0.0, "ce": 0.0}
    for document in alone(batch):
        _, parts = stage.loss(student, teacher, document)
        want["ce"] += parts["ce"].item() / batch.share.item()
        if "kl" in parts:
            want["kl"] += parts["kl"].item() / batch.share.item()
    assert metrics["ce"].item() == pytest.approx(want["ce"], rel=1e-4)
    if kind == "distill":
        assert metrics["kl"].item() == pytest.approx(want["kl"], rel=1e-3)
        assert loss.item() == pytest.approx(0.7 * want["kl"] + 0.3 * want["ce"], rel=1e-4)


def test_packed_align_is_the_relative_error_of_the_documents_alone():
    student, teacher = student_model(), teacher_model()
    batch = batch_of(PACKED)
    loss, _ = Align(STAGE).loss(student, teacher, batch)
    documents = list(alone(batch))
    for document, (begin, end) in zip(documents, [(0, 20), (20, 21), (21, 40), (40, 47), (47, 80)], strict=True):
        assert torch.equal(document.input_ids[0], batch.input_ids.flatten()[begin:end])
    errors = torch.zeros(2, 2, 2)  # row, layer, (difference, target)
    for document, row in zip(documents, [0, 0, 0, 1, 1], strict=True):
        for layer, (x, rotary, target) in enumerate(attention_lessons(teacher, document)):
            mixer = student.model.layers[layer].self_attn
            output = mixer(x, position_embeddings=rotary)[0]
            errors[row, layer] += torch.stack([(output - target).square().sum(), target.square().sum()]).detach()
    want = (errors[..., 0] / errors[..., 1]).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert loss.item() > 1e-3


def test_the_cosine_of_align_is_over_tokens():
    student, teacher = student_model(), teacher_model()
    cosine = Align(replace(STAGE, loss=LossConfig(align="cosine")))
    loss, _ = cosine.loss(student, teacher, batch_of([[40], [40]]))
    angles = []
    for layer, (x, rotary, target) in enumerate(attention_lessons(teacher, batch_of([[40], [40]]))):
        output = student.model.layers[layer].self_attn(x, position_embeddings=rotary)[0]
        angles.append((output * target).sum(-1) / output.norm(dim=-1) / target.norm(dim=-1))
    assert loss.item() == pytest.approx(1 - torch.stack(angles).mean().item(), rel=1e-4) and loss.item() > 1e-3


def test_our_mask_is_what_transformers_builds_from_positions():
    teacher, batch = teacher_model(), batch_of(PACKED)
    theirs = teacher.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    assert torch.allclose(hidden_states(teacher, batch), theirs, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_from_an_exact_start(name):
    """Documents that fit the slots: the student is its teacher, in all three losses, each read as the model's own."""
    sizes = SIZES | ({"logits_scaling": 3.0, "residual_multiplier": 0.5} if name == "granite" else {})
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes)).double().eval()
    gsa = preset("exact", slots=16, sinks=3).to_dict()
    student = AutoModelForCausalLM.from_config(CONFIG_CLASSES[name](**sizes, gsa=gsa)).double().eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    for model in (teacher, student):
        model.set_experts_implementation("eager")  # the default one knows no float64
    batch = batch_of([[10, 6, 14], [16, 14]])
    losses = {kind: STAGES[kind](replace(STAGE, kind=kind)).loss(student, teacher, batch) for kind in STAGES}
    assert losses["align"][0].item() < 1e-8 and losses["distill"][1]["kl"].item() < 1e-8
    want = 0.0
    for document in alone(batch):
        logits = teacher(document.input_ids).logits[0]
        want += cross_entropy(logits, document.labels[0], ignore_index=UNLABELLED, reduction="sum").item()
    assert losses["lm"][0].item() == pytest.approx(want / batch.share.item(), rel=1e-5)
    losses["align"][0].backward()
    assert student.model.layers[1].self_attn.f_proj.weight.grad is not None


@pytest.mark.parametrize("window", [None, 8])
def test_rows_of_one_document_need_no_mask(window, monkeypatch):
    teacher, batch = teacher_model(), batch_of([[40], [40]])
    if window:
        torch.manual_seed(0)
        config = CONFIG_MAPPING["mistral"](**SIZES, sliding_window=window)
        teacher = AutoModelForCausalLM.from_config(config).eval()
    documents = torch.cat([teacher.model(document.input_ids).last_hidden_state for document in alone(batch)])
    monkeypatch.setattr(Batch, "attention_mask", lambda self: pytest.fail("a mask was made"))
    assert torch.allclose(hidden_states(teacher, batch), documents, atol=1e-6)


def test_a_teacher_with_a_window_keeps_it_when_packed():
    config = CONFIG_MAPPING["mistral"](**SIZES, sliding_window=8)
    torch.manual_seed(0)
    teacher, batch = AutoModelForCausalLM.from_config(config).eval(), batch_of(PACKED)
    packed = hidden_states(teacher, batch).flatten(0, 1)
    documents = torch.cat([teacher.model(document.input_ids).last_hidden_state[0] for document in alone(batch)])
    assert torch.allclose(packed, documents, atol=1e-5)
    teacher.config.sliding_window = None
    assert not torch.allclose(packed, hidden_states(teacher, batch).flatten(0, 1), atol=1e-2)


def test_align_trains_mixers_only_and_the_teacher_not_at_all():
    student, teacher = student_model(), teacher_model()
    loss, _ = Align(STAGE).loss(student, teacher, batch_of(PACKED))
    loss.backward()
    touched = {group_of(name) for name, p in student.named_parameters() if p.grad is not None}
    assert touched == {"gates", "mixer"}
    assert all(p.grad is None for p in teacher.parameters())


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value decides what the host does next: on a GPU the host would wait for it."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in self.READS, f"{name} is read by the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", STAGES)
def test_the_stages_and_their_losses_read_nothing_back(kind, monkeypatch):
    """All of forward and backward but the operation itself and the model's reading of where documents begin."""
    student, teacher, batch = student_model().train(), teacher_model(), batch_of(PACKED)
    context = student.model.gsa_context(batch.input_ids, None, batch.position_ids, None, batch.cu_seqlens)
    monkeypatch.setattr(student.model, "gsa_context", lambda *args: context)
    stand_in = lambda q, k, v, gate, write, keep, **options: (  # noqa: E731
        q * gate.mean() + (write.mean() + keep.mean()) * v.mean() * k.mean(),
        None,
    )
    monkeypatch.setattr("t2r.modeling.attention.gsa", stand_in)
    step = engine.Step(STAGES[kind](replace(STAGE, kind=kind)), student, teacher)
    with NoHostReads():
        step(batch)[0].backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        batch.share.item()
    assert all(p.grad is not None for name, p in student.named_parameters() if group_of(name) == "mixer")


@pytest.mark.parametrize("kind", STAGES)
def test_activation_checkpointing_changes_no_gradient(kind):
    gradients = []
    for on in (False, True):
        student = student_model().train()
        if on:
            engine.recompute_layers(student)
        stage = STAGES[kind](replace(STAGE, kind=kind, activation_checkpointing=on))
        stage.loss(student, teacher_model(), batch_of(PACKED))[0].backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


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


def gate_gradient(student, teacher, batch):
    loss, _ = Align(STAGE).loss(student, teacher, batch)
    weights = [m.f_proj.weight for m in student.modules() if isinstance(m, GSAttention)]
    squares = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).square()
    return squares.mean().sqrt().item()


def test_the_gates_of_the_exact_start_train():
    """Gradient at the start within 100x of a soft clock's; after 200 steps gates have moved and the loss has fallen."""
    torch.manual_seed(0)
    teacher, batch = teacher_model(), batch_of([[128], [100, 28]])
    soft = student_model(gate="sigmoid", damping=8.0)
    with torch.no_grad():
        for module in soft.modules():
            if isinstance(module, GSAttention):
                module.write.fill_(-40.0)
                module.keep.fill_(8.0)
    student = student_model()
    ratio = gate_gradient(student, teacher, batch) * student.model.layers[0].self_attn.gsa.damping
    ratio /= gate_gradient(soft, teacher, batch)
    assert 1e-2 < ratio

    stage = replace(STAGE, lr=LearningRates(gates=3e-3, mixer=3e-4))
    optimizer = torch.optim.AdamW(parameter_groups(student, stage), betas=(0.9, 0.95))
    losses = []
    for step in range(200):
        loss, _ = Align(stage).loss(student, teacher, batch_of([[64], [40, 24]], seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    x, *_ = attention_lessons(teacher, batch)[0]
    mixer = student.model.layers[0].self_attn
    offset = mixer.f_proj(x).unflatten(-1, (2, 16)) / mixer.gsa.damping
    moved = [((offset + bias - start).clamp(0, 1)).abs().mean() for bias, start in ((mixer.keep, 0.0),)]
    moved += [(1 - (offset + mixer.write).clamp(0, 1)).abs().mean()]
    assert min(moved).item() > 1e-3
