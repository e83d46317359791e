"""GSA models as Hugging Face models: equal to their source at the start, and the same however a text is read."""

import copy

import pytest
import torch
from model_cases import SINKS, SLOTS, STUDENTS, padded, read, same, same_where, student_model, teacher_model, tokens
from torch.nn.functional import logsigmoid, silu
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from t2r.kernels.gsa import GSASpec, gsa
from t2r.modeling.cache import CACHE, SlotCacheLayer
from t2r.modeling.configuration import GSAConfig

CASES = pytest.mark.parametrize("model", STUDENTS, indirect=True)


@pytest.fixture
def model(request):
    return student_model(request.param)


@torch.no_grad()
def test_exact_start_equals_the_teacher_then_its_window():
    teacher, student, ids = teacher_model(), student_model(trained=False), tokens(2, 150)
    start, full = student(ids).logits, teacher(ids).logits
    same(start[:, :SLOTS], full[:, :SLOTS])
    t = torch.arange(150)
    seen = (t[None] <= t[:, None]) & (
        (t[None] < SINKS) | (t[None] > t[:, None] - (SLOTS - SINKS)) | (t[:, None] < SLOTS)
    )
    window = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    same(start, teacher(ids, attention_mask=window).logits)
    assert (start - full).abs().max() > 0.1


@torch.no_grad()
def test_paper_layer_is_its_equations():
    """silu on q, k, v, no RoPE, no scale, alpha = sigmoid(W x)^(1/8), then W_o RMSNorm(silu(o)) (paper eq. 7-9)."""
    layer = student_model("paper").model.layers[1].self_attn
    x = torch.randn(2, 70, 48)
    q, k, v = (silu(p(x)).unflatten(-1, (-1, 16)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    g = logsigmoid(layer.f_proj(x)).unflatten(-1, (2, SLOTS)) / 8
    o, _ = gsa(q, k, v, g, s=1 - g.exp(), spec=GSASpec(gate="log_alpha"), scale=1.0, backend="reference")
    o = silu(o.flatten(2))
    expected = layer.o_proj(layer.g_norm.weight * o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    rope = torch.randn(2, 70, 16)  # must not matter
    same(layer(x, position_embeddings=(rope, rope))[0], expected)


@CASES
@torch.no_grad()
def test_reading_at_once_in_parts_and_by_token_agree(model):
    ids = tokens(2, 150)
    whole = model(ids).logits
    for cuts in ([0, 150], [0, 64, 65, 150], [0, 7, *range(8, 151)]):
        cache = DynamicCache(config=model.config)
        same(read(model, ids, cuts, cache), whole)
        slots = [i for i, layer in enumerate(cache.layers) if isinstance(layer, SlotCacheLayer)]
        assert cache.get_seq_length() == 150 and slots == list(model.model.gsa_layers)


@CASES
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model):
    rows = [tokens(1, n, seed=n) for n in (90, 33, 64)]
    alone = [model(row).logits[0] for row in rows]
    for left in (True, False):
        batch, mask = padded(rows, left)
        same_where(mask, model(batch, attention_mask=mask).logits, alone)
        if left:
            cache, parts = DynamicCache(), []
            for a, b in ((0, 70), (70, 71), (71, 90)):
                parts.append(model(batch[:, a:b], attention_mask=mask[:, :b], **{CACHE: cache}).logits)
            same_where(mask, torch.cat(parts, dim=1), alone)


@CASES
@torch.no_grad()
def test_packed_documents_are_read_alone(model):
    lengths = [40, 1, 23, 86, 50]
    documents = [tokens(1, n, seed=n) for n in lengths]
    want = torch.cat([model(d).logits for d in documents], dim=1)
    ids = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    same(model(ids, position_ids=position_ids, use_cache=False).logits, want)
    same(model(ids, cu_seq_lens_q=bounds, use_cache=False).logits, want)
    bounds_with_row = torch.tensor(sorted({*bounds.tolist(), 100}))
    split = model(ids, cu_seq_lens_q=bounds_with_row, use_cache=False).logits
    rows = ids.view(2, 100)
    same(model(rows, cu_seq_lens_q=bounds_with_row, use_cache=False).logits.flatten(0, 1)[None], split)
    if len(model.model.gsa_layers) == 2:  # a document may go on in the next row
        same(model(rows, cu_seq_lens_q=bounds, use_cache=False).logits.flatten(0, 1)[None], want)
    else:
        with pytest.raises(ValueError, match="cannot go on in the next row"):
            model(rows, cu_seq_lens_q=bounds, use_cache=False)
    with pytest.raises(ValueError, match="one or the other"):
        model(ids, cu_seq_lens_q=bounds, **{CACHE: DynamicCache()})


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "prefill_in_chunks": {"do_sample": False, "prefill_chunk_size": 8},
    "static_cache": {"do_sample": False, "cache_implementation": "static"},
}


@CASES
@pytest.mark.parametrize("how", GENERATION)
def test_generation_with_memory_equals_without(model, how):
    """The memory changes how fast tokens come, not which: use_cache=False reads the whole text anew for each."""
    ids, options = tokens(2, 37), GENERATION[how]
    torch.manual_seed(3)
    with_memory = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, **options)
    torch.manual_seed(3)
    plain = {k: v for k, v in options.items() if k not in ("prefill_chunk_size", "cache_implementation")}
    without = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, use_cache=False, **plain)
    assert torch.equal(with_memory, without)


@CASES
def test_left_padded_generation_equals_each_alone(model):
    rows = [tokens(1, n, seed=n) for n in (41, 12, 30)]
    batch, mask = padded(rows, left=True)
    together = model.generate(batch, attention_mask=mask, max_new_tokens=40, do_sample=False)
    for i, row in enumerate(rows):
        alone = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=40, do_sample=False)
        mine = together[i, 41:].tolist()
        theirs = alone[0, row.shape[1] :].tolist()
        assert mine[: len(theirs)] == theirs


@CASES
def test_generation_continues_from_a_cache(model):
    ids = tokens(1, 30)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=10, do_sample=False, **{CACHE: cache})
    longer = torch.cat([first, tokens(1, 9, seed=5)], dim=1)
    went_on = model.generate(longer, max_new_tokens=10, do_sample=False, **{CACHE: cache})
    assert torch.equal(went_on, model.generate(longer, max_new_tokens=10, do_sample=False))


def count_calls(model):
    """Forward calls of a model, counted from here on."""
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@CASES
def test_assisted_decoding_and_prompt_lookup_are_exact(model):
    """Candidates that are rejected leave no trace in the memory, and accepted ones save forwards."""
    pattern, options = tokens(1, 7).repeat(1, 6), {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    assistant = copy.deepcopy(model)
    calls = count_calls(model)
    want = model.generate(pattern, **options)
    assert len(calls) == 40
    calls.clear()
    assert torch.equal(model.generate(pattern, **options, prompt_lookup_num_tokens=5), want)
    assert len(calls) <= 40
    calls.clear()
    assert torch.equal(model.generate(pattern, **options, assistant_model=assistant), want)
    assert len(calls) <= 25

    teacher = teacher_model()
    want = teacher.generate(pattern, max_new_tokens=20, do_sample=False)
    assert torch.equal(teacher.generate(pattern, max_new_tokens=20, do_sample=False, assistant_model=model), want)


@CASES
@torch.no_grad()
def test_crop_takes_back_tokens(model):
    ids = tokens(1, 60)
    for remove in (0, 1, 12, 20, 33):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], **{CACHE: cache})
        cache.activate_past_recording()
        model(ids[:, 20:40], **{CACHE: cache})
        model(ids[:, 40:53], **{CACHE: cache})
        cache.crop(-remove)
        assert cache.get_seq_length() == 53 - remove
        same(model(ids[:, 53:], **{CACHE: cache}).logits, kept(model, ids, 53 - remove))
        with pytest.raises(ValueError, match="more than were recorded"):
            cache.crop(-30)


def kept(model, ids, n):
    """Logits of the last tokens of ids after its first n."""
    return model(torch.cat([ids[:, :n], ids[:, 53:]], dim=1)).logits[:, n:]


def test_a_cache_of_another_model_is_refused():
    ids = tokens(1, 5)
    cache = teacher_model()(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="keys and values of another model"):
        student_model()(ids, **{CACHE: cache})


@torch.no_grad()
def test_static_cache_object():
    model, ids = student_model(), tokens(1, 40)
    cache = StaticCache(config=model.config, max_cache_len=64)
    same(read(model, ids, [0, 20, 40], cache), model(ids).logits)


@CASES
def test_gradient_checkpointing_changes_no_gradient(model):
    ids, grads = tokens(2, 70), []
    model.train()
    for checkpointing in (False, True):
        model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        # a gate at rest may have gradient 0; the projections of a live layer may not
        assert all(g.abs().sum() > 0 for name, g in grads[-1].items() if "proj" in name)
    for name, grad in grads[0].items():
        same(grads[1][name], grad, atol=1e-6)


@CASES
def test_save_and_load(model, tmp_path):
    ids = tokens(1, 60)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__ == "GSALlamaForCausalLM" and GSAConfig.of(loaded.config) == GSAConfig.of(model.config)
    with torch.no_grad():
        same(loaded(ids).logits, model(ids).logits, atol=0)
        base = AutoModel.from_pretrained(tmp_path)
        same(base(ids).last_hidden_state, model.model(ids).last_hidden_state, atol=0)


def test_gate_biases_stay_float32_in_a_bfloat16_model(tmp_path):
    model = student_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer, source = loaded.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert layer.f_proj.weight.dtype == torch.bfloat16
    assert torch.equal(layer.write, source.write) and torch.equal(layer.keep, source.keep)
    with torch.no_grad():
        assert torch.isfinite(loaded(tokens(1, 60)).logits).all()


def test_tensors_missing_from_a_checkpoint_start_as_conversion_starts_them(tmp_path):
    teacher = teacher_model()
    teacher.save_pretrained(tmp_path)
    student = student_model(trained=False)
    student.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, x in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name


@torch.no_grad()
def test_far_sinks_are_read_at_the_bounded_distance():
    """Beyond sink_distance a sink's logit is that of a query sink_distance tokens away; up to it nothing changes."""
    teacher = teacher_model().model
    q = torch.randn(1, 6, 100, 16)

    def turned(q, cos, sin):
        return apply_rotary_pos_emb(q, q, cos, sin)[0]

    t = torch.arange(100)[None]
    model = student_model(trained=False, sink_distance=40)
    turns = model.model.sink_turns(t, longest=100)
    (turn,) = turns
    assert turn[0] == 40 and not model.model.sink_turns(t[:, :41], longest=41)
    there, near = (turned(q, *teacher.rotary_emb(q, positions)) for positions in (t, t.clamp(max=40)))
    same(turned(there, *turns[turn]), near, atol=1e-5)

    ids, unbounded = tokens(1, 100), student_model(trained=False)
    near, far = model(ids).logits, unbounded(ids).logits
    same(near[:, :41], far[:, :41])
    assert (near[:, 41:] - far[:, 41:]).abs().max() > 1e-3
    same(read(model, ids, [0, 30, 55, 56, 100], DynamicCache()), near)
    same(model(ids, position_ids=t).logits, near)
    rows = [ids, tokens(1, 70, seed=1), tokens(1, 30, seed=2)]
    alone = [model(row).logits[0] for row in rows]
    batch, mask = padded(rows, left=True)
    same_where(mask, model(batch, attention_mask=mask).logits, alone)
    packed, bounds = torch.cat(rows, dim=1), torch.tensor([0, 100, 170, 200])
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    same(model(packed, position_ids=positions, use_cache=False).logits[0], torch.cat(alone))
    for options in ({}, {"max_length_q": 100}):
        logits = model(packed.view(2, 100), cu_seq_lens_q=bounds, use_cache=False, **options).logits
        same(logits.flatten(0, 1), torch.cat(alone))
