"""Every family of the table: a checkpoint with all that its attention can have, converted and verified."""

import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.convert import convert
from t2r.convert.verify import verify
from t2r.errors import UserError
from t2r.families import FAMILIES, REFUSED, family_of

SIZES = {
    "vocab_size": 3 + 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# What the family has beyond plain attention: a converter that lost it would not verify.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [4.0, 6.0, 8.0], "original_max_position_embeddings": 512,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 40}
SPECIAL = {
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},  # rotary pairs lie side by side, not in halves
    "gemma3_text": {**MIXED, "head_dim": 16, "query_pre_attn_scalar": 30, "final_logit_softcapping": 30.0},
    "glm": {"head_dim": 16, "attention_bias": True},  # half of the channels are rotated, in pairs side by side
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_bias": True},
    "llama": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}, "tie_word_embeddings": True},
    "mistral": {"head_dim": 24, "sliding_window": 40},  # v0.1
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmo2": {},  # norms over all of q and all of k
    "olmo3": {**MIXED, "rope_parameters": {"full_attention": LLAMA3 | {"original_max_position_embeddings": 64}}},
    "phi3": {"rope_parameters": LONGROPE},  # one matrix for q, k and v
    "qwen2": {},  # biases on q, k and v
    "qwen3": {"head_dim": 24, "attention_bias": True},  # a norm on each head of q and k
    "qwen3_moe": {"head_dim": 24, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "mlp_only_layers": [0]},
    "seed_oss": {"head_dim": 16, "attention_bias": True, "attention_out_bias": True, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"use_bias": True, "sliding_window": None},
}  # fmt: skip


def save_source(name, folder, tokenizer, **changes):
    """A checkpoint of a family with random weights."""
    config = CONFIG_MAPPING[name](**SIZES | SPECIAL[name] | changes)
    model = AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():  # norms at 1 and biases at 0 would hide that one was lost
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.2)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return config


@pytest.mark.parametrize("name", FAMILIES)
def test_family_converts_exactly(name, tiny_llama, tmp_path):
    save_source(name, tmp_path / "source", tiny_llama)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=32, verify=False)
    report = verify(tmp_path / "out", str(tmp_path / "source"))
    names = " ".join(check.name for check in report.checks)
    assert report.passed and names.count("exact start") == 2 and "bfloat16" in names and "far sinks" in names, report
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == f"gsa_{name}"


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe"])
def test_a_model_larger_than_memory_is_verified_by_layer(name, tiny_llama, tmp_path):
    save_source(name, tmp_path / "source", tiny_llama)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=32, verify=False)
    whole, by_layer = (verify(tmp_path / "out", str(tmp_path / "source"), by_layer=b) for b in (False, True))
    assert by_layer.passed and len(by_layer.checks) == len(whole.checks) - 1, by_layer
    measured = [{c.name: c.value for c in report.checks} for report in (whole, by_layer)]
    for question in ("first 32 tokens", "beyond", "move the source's logits", "far sinks"):
        a, b = (next(v for n, v in values.items() if question in n) for values in measured)
        assert abs(a - b) <= 1e-5, question


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_far_sink_at_the_wrong_distance_is_found(by_layer, tiny_llama, tmp_path, monkeypatch):
    """As if a layer without rotary embedding had one."""
    save_source("smollm3", tmp_path / "source", tiny_llama)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=32, verify=False)
    monkeypatch.setattr("t2r.modeling.models.GSAMixin.rotates", lambda self, layer: True)
    report = verify(tmp_path / "out", str(tmp_path / "source"), by_layer=by_layer)
    assert ["far sinks" in check.name for check in report.failed] == [True], report


def test_rotary_frequencies_do_not_change_with_the_length_of_the_text(tiny_llama, tmp_path):
    """phi3 has other frequencies beyond its original context: keys that slots hold already cannot follow."""
    save_source("phi3", tmp_path / "source", tiny_llama)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=8, sinks=2, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids, cache = torch.randint(3, 200, (1, 700)), DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 500), (500, 520), (520, 700))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_slots_cannot_equal_is_refused_with_the_reason(name):
    assert name not in FAMILIES
    with pytest.raises(UserError, match=re.escape(f"{name!r}: {REFUSED[name]}")):
        family_of(name)


def test_options_that_slots_cannot_equal_are_refused(tiny_llama, tmp_path):
    save_source("gemma3_text", tmp_path / "source", tiny_llama, attn_logit_softcapping=50.0)
    with pytest.raises(UserError, match="attn_logit_softcapping: it caps attention logits"):
        convert(str(tmp_path / "source"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
