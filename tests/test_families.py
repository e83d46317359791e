"""Every family of the table: a checkpoint with all that its attention can have, converted and verified."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.convert import convert
from t2r.convert.verify import verify
from t2r.families import FAMILIES

SIZES = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# What the family has beyond plain attention: a converter that lost it would not verify.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPECIAL = {
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_bias": True},
    "llama": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}, "tie_word_embeddings": True},
    "mistral": {"head_dim": 24, "sliding_window": 512},
    "olmo2": {},  # norms over all of q and all of k
    "qwen2": {},  # biases on q, k and v
    "qwen3": {"head_dim": 24, "attention_bias": True},  # a norm on each head of q and k
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_converts_exactly(name, tiny_llama, tmp_path):
    vocabulary = 3 + 256
    config = CONFIG_MAPPING[name](vocab_size=vocabulary, **SIZES, **SPECIAL[name])
    model = AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():  # norms at 1 and biases at 0 would hide that one was lost
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.2)
    model.save_pretrained(tmp_path / "source")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), slots=32, verify=False)
    report = verify(tmp_path / "out", str(tmp_path / "source"))
    assert report.passed and sum("exact start" in check.name for check in report.checks) == 2, report
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == f"gsa_{name}"
