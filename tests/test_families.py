"""Every family of the table: a checkpoint with all that its attention can have, converted and verified."""

import re
from dataclasses import replace

import pytest
import torch
from family_cases import save_source
from model_cases import read, same
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.convert import convert
from t2r.convert.plan import gsa_config, target_tensors
from t2r.convert.verify import verify
from t2r.errors import UserError
from t2r.families import FAMILIES, REFUSED, family_of
from t2r.modeling.configuration import fit_layers, preset


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
    monkeypatch.setitem(FAMILIES, "smollm3", replace(FAMILIES["smollm3"], rotates=None))
    report = verify(tmp_path / "out", str(tmp_path / "source"), by_layer=by_layer)
    assert ["far sinks" in check.name for check in report.failed] == [True], report


def test_rotary_frequencies_do_not_change_with_the_length_of_the_text(tiny_llama, tmp_path):
    """phi3 has other frequencies beyond its original context: keys that slots hold already cannot follow."""
    save_source("phi3", tmp_path / "source", tiny_llama)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=8, sinks=2, verify=False)
    teacher, model = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("source", "out"))
    ids, cache = torch.randint(3, 200, (1, 700)), DynamicCache(config=model.config)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(teacher.model.rotary_emb.inv_freq, frequencies)
    assert teacher.model.rotary_emb.attention_scaling == model.model.rotary_emb.attention_scaling > 1
    with torch.no_grad():
        teacher(ids)
        whole = model(ids).logits
        parts = read(model, ids, [0, 500, 520, 700], cache)
    same(parts, whole, atol=1e-3)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert not torch.equal(teacher.model.rotary_emb.inv_freq, frequencies)


def test_a_source_of_texts_hardly_longer_than_its_slots(tiny_llama, tmp_path):
    """There is no text in which a sink is far away; all the rest is verified."""
    save_source("qwen2", tmp_path / "source", tiny_llama, max_position_embeddings=64)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=60, verify=False)
    report = verify(tmp_path / "out", str(tmp_path / "source"))
    assert report.passed and not any("far sinks" in check.name for check in report.checks), report


@pytest.mark.parametrize("name", REFUSED)
def test_what_slots_cannot_equal_is_refused_with_the_reason(name):
    assert name not in FAMILIES and name in CONFIG_MAPPING
    with pytest.raises(UserError, match=re.escape(f"{name!r}: {REFUSED[name]}")):
        family_of(name)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: it caps attention logits"),
        ({"use_bidirectional_attention": True}, "a model that attends to later tokens too"),
    ],
)
def test_options_that_slots_cannot_equal_are_refused(option, message, tiny_llama, tmp_path):
    save_source("gemma3_text", tmp_path / "source", tiny_llama, **option)
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "source"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def full(parameters, vocabulary, hidden, intermediate, layers, heads, kv_heads, **more):
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return parameters, sizes | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | more


# One published model of each family: the number of its parameters and its config.
FULL_SIZE = {
    "cohere": full(34_980_831_232, 256000, 8192, 22528, 40, 64, 64),  # Command R
    "gemma3_text": full(268_098_176, 262144, 640, 2048, 18, 4, 1, head_dim=256, sliding_window=512),  # Gemma 3 270M
    "glm": full(9_399_951_360, 151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True),  # GLM-4 9B
    "granite": full(8_170_848_256, 49155, 4096, 12800, 40, 32, 8, tie_word_embeddings=True),  # Granite 3.1 8B
    "llama": full(8_030_261_248, 128256, 4096, 14336, 32, 32, 8),  # Llama 3.1 8B
    "mistral": full(7_241_732_096, 32000, 4096, 14336, 32, 32, 8, sliding_window=4096),  # Mistral 7B v0.1
    "mixtral": full(46_702_792_704, 32000, 4096, 14336, 32, 32, 8, num_local_experts=8),  # Mixtral 8x7B
    "olmo2": full(7_298_617_344, 100352, 4096, 11008, 32, 32, 32),  # OLMo 2 7B
    "olmo3": full(7_298_011_136, 100278, 4096, 11008, 32, 32, 32),  # Olmo 3 7B
    "phi3": full(3_821_079_552, 32064, 3072, 8192, 32, 32, 32),  # Phi-3.5 mini
    "qwen2": full(7_615_616_512, 152064, 3584, 18944, 28, 28, 4),  # Qwen2.5 7B
    "qwen3": full(8_190_735_360, 151936, 4096, 12288, 36, 32, 8, head_dim=128),  # Qwen3 8B
    "qwen3_moe": full(30_532_122_624, 151936, 2048, 6144, 48, 32, 4, head_dim=128, num_experts=128,
                      moe_intermediate_size=768),  # Qwen3 30B A3B
    "seed_oss": full(36_151_104_512, 155136, 5120, 27648, 64, 80, 8, head_dim=128),  # Seed-OSS 36B
    "smollm3": full(3_075_098_624, 128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True),  # SmolLM3 3B
    "starcoder2": full(3_030_371_328, 49152, 3072, 12288, 30, 24, 2, sliding_window=4096),  # StarCoder2 3B
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_full_size_model_without_weights(name):
    """The tensors of the result are the published model's, in the names on disk, and those that GSA adds; it runs."""
    parameters, sizes = FULL_SIZE[name]
    source = CONFIG_MAPPING[name](**sizes)
    config = gsa_config(source, name, fit_layers(preset("exact"), source, {}, []))
    stored, new = target_tensors(config)
    count = sum(torch.Size(shape).numel() for shape in stored.values())
    assert count == parameters + sum(torch.Size(stored[name]).numel() for name in new)
    assert len(new) == 3 * sizes["num_hidden_layers"]
    experts = {
        "mixtral": "model.layers.31.block_sparse_moe.experts.7.w2.weight",
        "qwen3_moe": "model.layers.47.mlp.experts.127.down_proj.weight",
    }
    assert name not in experts or experts[name] in stored
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, experts_implementation="batched_mm")
        logits = model(torch.ones(1, 1, dtype=torch.long), use_cache=False).logits
    assert logits.shape == (1, 1, sizes["vocab_size"])
