"""Models that read packed documents by torch's varlen attention, against themselves with a mask. Without a GPU that
attention is a loop over the documents."""

import pytest
import torch
from stage_cases import PACKED, SIZES, alone, batch_of, student_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.families import FAMILIES
from t2r.train import varlen
from t2r.train.stages import attention_lessons, hidden_states


def by_loop(q, k, v, bounds, same, longest, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What varlen_attn promises, from its documentation."""
    assert torch.equal(bounds, same) and bounds.dtype == torch.int32 and longest == longest_k
    assert bounds.diff().max() <= longest and window_size[1] == 0
    outputs = []
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        q1, k1, v1 = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        o = scaled_dot_product_attention(q1, k1, v1, mask, scale=scale, enable_gqa=q1.shape[0] != k1.shape[0])
        outputs.append(o.transpose(0, 1))
    return torch.cat(outputs)


def model_of(name, window=None):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SIZES, **({"sliding_window": window} if window else {}))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("rows", [PACKED, [[40], [40]]], ids=["packed", "whole"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_reads_documents_as_with_a_mask(name, rows, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", by_loop)
    model, batch = model_of(name), batch_of(rows)
    want = torch.cat([model.model(document.input_ids).last_hidden_state[0] for document in alone(batch)])
    lessons = attention_lessons(model, batch)
    model.set_attn_implementation(varlen.BY_BOUNDS)
    assert torch.allclose(hidden_states(model, batch).flatten(0, 1), want, atol=1e-5)
    for ours, theirs in zip(attention_lessons(model, batch), lessons, strict=True):
        assert torch.allclose(ours[2], theirs[2], atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_windows_are_kept(name, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", by_loop)
    model, batch = model_of(name, window=8), batch_of(PACKED)
    want = torch.cat([model.model(document.input_ids).last_hidden_state[0] for document in alone(batch)])
    model.set_attn_implementation(varlen.BY_BOUNDS)
    assert torch.allclose(hidden_states(model, batch).flatten(0, 1), want, atol=1e-5)


def with_gradients(student, batch):
    """Outputs of a student, and the gradients of its weights."""
    names, weights = zip(*student.named_parameters(), strict=True)
    hidden = hidden_states(student, batch)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    grads = torch.autograd.grad((hidden * weight).float().sum(), weights, allow_unused=True)
    return {"hidden": hidden.detach()} | {name: x for name, x in zip(names, grads, strict=True) if x is not None}


def test_layers_of_a_student_that_stay_softmax(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", by_loop)
    student, batch = student_model(softmax_layers=[1]), batch_of(PACKED)
    want = with_gradients(student, batch)
    student.set_attn_implementation(varlen.BY_BOUNDS)
    assert student.model.layers[1].self_attn.config._attn_implementation == varlen.BY_BOUNDS
    got = with_gradients(student, batch)
    assert got.keys() == want.keys() and "model.layers.1.self_attn.q_proj.weight" in want
    for name, x in want.items():
        assert torch.allclose(got[name], x, rtol=1e-4, atol=1e-4), name
    assert "varlen" not in student.config.to_json_string()


@pytest.mark.parametrize("dim, want", [(16, "t2r_varlen"), (20, "sdpa"), (264, "sdpa")])
def test_only_heads_that_there_are_kernels_for(dim, want, monkeypatch):
    monkeypatch.setattr(varlen, "can_attend", lambda device, dtype: True)
    config = CONFIG_MAPPING["llama"](**SIZES | {"head_dim": dim, "num_attention_heads": 2, "num_key_value_heads": 1})
    model = AutoModelForCausalLM.from_config(config)
    varlen.read_by_bounds(model, torch.device("cuda"), torch.bfloat16)
    assert model.config._attn_implementation == want


def test_bounds_that_do_not_arrive_are_an_error():
    model = model_of("llama")
    model.set_attn_implementation(varlen.BY_BOUNDS)
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        model(batch_of(PACKED).input_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name, window", [("llama", None), ("mistral", 8), ("gemma3_text", 8), ("qwen3", None)])
@torch.no_grad()
def test_documents_on_a_gpu(name, window, compiled):
    model, batch = model_of(name, window).cuda().bfloat16(), batch_of(PACKED).to(torch.device("cuda"))
    exact = model_of(name, window).cuda()
    want = torch.cat([exact.model(document.input_ids.cuda()).last_hidden_state[0] for document in alone(batch)])
    masked = hidden_states(model, batch).flatten(0, 1)
    assert varlen.can_attend(batch.input_ids.device, torch.bfloat16)
    model.set_attn_implementation(varlen.BY_BOUNDS)
    if compiled:
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    ours = hidden_states(model, batch).flatten(0, 1)
    assert (ours - want).norm() < 1.25 * (masked - want).norm() + 1e-3 * want.norm()


@pytest.mark.gpu
def test_gradients_on_a_gpu():
    """Of a student with a softmax layer, in bfloat16: as near to float32 as with a mask."""
    batch = batch_of(PACKED).to(torch.device("cuda"))
    want = with_gradients(student_model(softmax_layers=[1]).cuda(), batch)
    masked = with_gradients(student_model(softmax_layers=[1]).cuda().bfloat16(), batch)
    student = student_model(softmax_layers=[1]).cuda().bfloat16()
    student.set_attn_implementation(varlen.BY_BOUNDS)
    for name, ours in with_gradients(student, batch).items():
        apart, allowed = ((x.float() - want[name].float()).norm() for x in (ours, masked[name]))
        assert apart < 1.5 * allowed + 1e-2 * want[name].norm(), name
