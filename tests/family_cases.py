"""A small checkpoint of every family, with all that the family has beyond plain attention."""

import shutil

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 3 + 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# What the family has beyond plain attention: a converter that lost it would not verify.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [4.0, 6.0, 8.0],
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
    # one matrix for q, k and v
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512, "sliding_window": 600},
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
