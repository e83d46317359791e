"""The stages: packed documents against each alone, every family, and what is trained."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from stage_cases import PACKED, SIZES, STAGE, alone, batch_of, student_model, teacher_model
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.data.packing import UNLABELLED, Batch, Mixture, Rows
from t2r.data.tokens import Shard, Tokens
from t2r.families import FAMILIES
from t2r.kernels.gsa import launch
from t2r.modeling.attention import GSAttention
from t2r.modeling.configuration import CONFIG_CLASSES, preset
from t2r.schema import LearningRates, LossConfig
from t2r.train import engine
from t2r.train.losses import head
from t2r.train.parameters import group_of, parameter_groups, train_offsets
from t2r.train.stages import STAGES, Align, attention_lessons, hidden_states


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


def test_of_a_chat_distill_imitates_the_assistant_and_align_all():
    """Rows of tokens half of which are to be learned, beside the same rows to be learned whole."""
    student, teacher = student_model(), teacher_model()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (161,), generator=generator).numpy()
    learned = torch.rand(161, generator=generator).numpy() < 0.5
    shards = [Shard(ids, np.array([0, 50, 95]), marks) for marks in (None, learned)]
    whole, chat = (next(Mixture([Rows(Tokens([shard]), 40)]).step(0, 4, 4)) for shard in shards)
    assert torch.equal(whole.input_ids, chat.input_ids) and whole.share > 1.5 * chat.share

    stage = STAGES["distill"](replace(STAGE, kind="distill", loss=LossConfig(kl=0.7)))
    loss, metrics = stage.loss(student, teacher, chat)
    ours, theirs = (log_softmax(head(m)(hidden_states(m, chat)), -1) for m in (student, teacher))
    order = [Rows(Tokens(shards[1:]), 40).place(n) for n in range(4)]
    said = torch.from_numpy(np.stack([learned[40 * row + 1 : 40 * row + 41] for row in order]))
    said &= whole.labels != UNLABELLED
    kl = (theirs.exp() * (theirs - ours)).sum(-1)[said].mean()
    ce = -ours.gather(-1, whole.labels.clamp(min=0)[..., None])[..., 0][said].mean()
    assert (metrics["kl"].item(), metrics["ce"].item()) == pytest.approx((kl.item(), ce.item()), rel=1e-4)
    assert loss.item() == pytest.approx(0.7 * kl.item() + 0.3 * ce.item(), rel=1e-4)
    assert torch.equal(Align(STAGE).loss(student, teacher, chat)[0], Align(STAGE).loss(student, teacher, whole)[0])


def test_answers_are_learned_from_the_text():
    """Cross-entropy at the answers, in place of what the teacher would say there."""
    student, teacher = student_model(), teacher_model()
    batch, options = batch_of(PACKED), LossConfig(kl=0.7, answers="text")
    places = torch.nonzero(batch.labels.flatten() != UNLABELLED)[[3, 7, 20], 0]
    stage = STAGES["distill"](replace(STAGE, kind="distill", loss=options), lookups=True)
    ours, theirs = (log_softmax(head(m)(hidden_states(m, batch)), -1).flatten(0, 1) for m in (student, teacher))
    labels = batch.labels.flatten()
    for answers in (places, places[:0]):
        loss, metrics = stage.loss(student, teacher, replace(batch, answers=torch.cat([answers, torch.tensor([0])])))
        rest = (labels != UNLABELLED).index_fill(0, answers, False)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)[rest].sum() / batch.share
        ce = -ours.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        of_rest, of_answers = (ce[which].sum() / batch.share for which in (rest, answers))
        expected = 0.7 * kl + 0.3 * of_rest + of_answers
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(metrics["kl"], kl.detach(), rtol=1e-4, atol=0)
        torch.testing.assert_close(metrics["ce"], (of_rest + of_answers).detach(), rtol=1e-4, atol=0)
        trained = [p for p in student.parameters() if p.requires_grad]
        found, wanted = (torch.autograd.grad(x, trained, retain_graph=True) for x in (loss, expected))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


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


@pytest.mark.parametrize("kind", STAGES)
def test_compiled_layers_have_the_same_gradients(kind):
    """Also with other documents than those it was compiled for."""
    gradients = []
    for on in (False, True):
        student, teacher = student_model().train(), teacher_model().requires_grad_(False)
        step = engine.Step(STAGES[kind](replace(STAGE, kind=kind)), student, teacher)
        if on:
            engine.compile_layers(student, teacher, kind)
            assert all(any(x._compiled_call_impl for x in layer.modules()) for layer in student.model.layers)
        for documents in (PACKED, [[15, 25], [40]]):
            step(batch_of(documents))[0].backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eviction", ["oldest", "score"])
def test_layers_with_kernels_are_one_graph(eviction, monkeypatch):
    """One for all layers and any number of documents, without a break, and for both ways one table of their chunks."""
    monkeypatch.setattr("t2r.kernels.gsa.op.choose_backend", lambda *args: "triton")
    sizes = SIZES | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    gsa = preset("exact", slots=16, sinks=3, eviction=eviction).to_dict()
    student = AutoModelForCausalLM.from_config(CONFIG_CLASSES["llama"](**sizes, gsa=gsa)).train()
    train_offsets(student)
    graphs, table = CompileCounter(), Mock(wraps=launch.chunk_table, __name__="chunk_table")
    monkeypatch.setattr(launch, "chunk_table", table)
    for layer in student.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    step = engine.Step(STAGES["lm"](replace(STAGE, kind="lm")), student, None)
    for documents in ([[9, 11]], [[5, 10, 1, 4]]):
        step(batch_of(documents))[0].backward()
    assert graphs.frame_count == 1 and table.call_count == 2


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
