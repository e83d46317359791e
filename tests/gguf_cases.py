"""Writes GGUF files for tests."""

import gguf
import numpy as np


def interleave(weight, heads):
    """llama.cpp's order of the rows of q and k: row j of a head's first half, then row j of its second, ..."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind=None, metadata=None, extra=None, without=(), architecture=None):
    """`model` as llama.cpp's converter writes it. kind: quantisation of the matrices."""
    config = model.config
    kind_of_model = config.model_type.removesuffix("_text")
    architecture = architecture or kind_of_model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    out = gguf.GGUFWriter(path, architecture)
    out.add_vocab_size(config.vocab_size)
    out.add_context_length(config.max_position_embeddings)
    out.add_block_count(config.num_hidden_layers)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    out.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        out.add_sliding_window(config.sliding_window)
    if architecture == "llama":
        out.add_rope_dimension_count(head_dim)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            out.add_string(key, value)
        elif isinstance(value, float):
            out.add_float32(key, value)
        else:
            out.add_uint32(key, value)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind_of_model)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name in without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = tensor.float().numpy() + (kind_of_model == "gemma3" and "norm" in name)
        if config.model_type == "llama" and "q_proj" in name:
            array = interleave(array, config.num_attention_heads)
        if config.model_type == "llama" and "k_proj" in name:
            array = interleave(array, config.num_key_value_heads)
        if kind is not None and array.ndim == 2:
            out.add_tensor(gguf_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            out.add_tensor(gguf_name, np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
