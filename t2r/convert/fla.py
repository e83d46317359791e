"""flash-linear-attention's `GSAForCausalLM`: read as a model that is converted already, and written by `t2r export`.

What of its layer decides the result: q, k and v through SiLU, scale 1, no rotary embedding, alpha = sigmoid(f_proj x) ^
(1 / gate_logit_normalizer), RMSNorm with eps 1e-5 over all heads of SiLU(o). That is the preset `paper`. Its blocks are
Llama's under other names.
"""

from dataclasses import asdict
from pathlib import Path

from t2r.convert.source import CONFIG_FAULTS, Source, first_line
from t2r.errors import UserError

NAMES = {
    "model.embed_tokens.": "model.embeddings.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
    ".self_attn.": ".attn.",
}
# Families with Llama's block. A sliding window is gone with the softmax.
LLAMA_BLOCK = ("gsa_llama", "gsa_mistral")
# Settings of fla's that must have this value, and what another one would mean.
FIXED = {
    "feature_map": ("swish", "t2r has SiLU only"),
    "hidden_act": ("swish", "t2r reads such a model as Llama's block, which has SiLU"),
    "use_short_conv": (False, "t2r has no short convolutions"),
    "expand_k": (1, "heads x head_dim must be the hidden size"),
    "expand_v": (1, "heads x head_dim must be the hidden size"),
    "attn": (None, "layers with softmax attention are not read"),
    "attnres_block_size": (None, "attention over residuals is not read"),
}


def ours(name: str) -> str:
    """fla's name of a tensor -> t2r's."""
    for mine, theirs in NAMES.items():
        name = name.replace(theirs, mine)
    return name


def theirs(name: str) -> str:
    """t2r's name of a tensor -> fla's."""
    for mine, other in NAMES.items():
        name = name.replace(mine, other)
    return name


def read_config(raw: dict, where: Path):
    """fla's config.json -> the config of the same model in t2r. Raises UserError where t2r has no such layer."""
    from huggingface_hub.errors import StrictDataclassError

    from t2r.modeling.configuration import CONFIG_CLASSES, PRESETS

    for name, (value, reason) in FIXED.items():
        found = raw.get(name, value)
        if found != value and (found, value) != ("silu", "swish"):
            raise UserError(f"{name} is {found!r}: {reason}", where=where)
    same = ("num_hidden_layers", "vocab_size", "max_position_embeddings", "initializer_range", "tie_word_embeddings")
    same += ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "use_cache")
    try:
        hidden, heads = raw["hidden_size"], raw["num_heads"]
        width = raw.get("intermediate_size") or 256 * -(-int(hidden * (raw.get("hidden_ratio") or 4) * 2 / 3) // 256)
        gsa = asdict(PRESETS["paper"]) | {
            "slots": raw.get("num_slots") or hidden // heads,
            "damping": float(raw.get("gate_logit_normalizer", 8)),
        }
        values = {
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": raw.get("num_kv_heads") or heads,
            "rms_norm_eps": raw.get("norm_eps", 1e-6),
            "gsa": gsa,
            "architectures": ["GSALlamaForCausalLM"],
        }
        return CONFIG_CLASSES["llama"].from_dict(values | {name: raw[name] for name in same if name in raw})
    except (*CONFIG_FAULTS, StrictDataclassError) as error:
        raise UserError(
            f"the config cannot be used: {type(error).__name__} {first_line(error)}", where=where
        ) from error


def export_config(source: Source) -> dict:
    """config.json of the same model in fla. Raises UserError with the reason where fla has no such layer."""
    from t2r.modeling.configuration import PRESETS, GSAConfig

    config = source.config
    if not config.model_type.startswith("gsa_"):
        what = f"this is a {config.model_type} model, not a converted one"
        raise UserError(what, where=source.path, next=f"t2r convert {source.path} OUT --preset paper")
    gsa, paper = GSAConfig.of(config), PRESETS["paper"]
    free = {"slots", "damping", "gate_std", "sink_distance"}
    differs = [name for name, value in asdict(paper).items() if name not in free and getattr(gsa, name) != value]
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    reasons = {
        f"a {config.model_type.removeprefix('gsa_')} block is not Llama's": config.model_type not in LLAMA_BLOCK,
        f"its layers are not those of the preset paper ({', '.join(differs)})": differs,
        "fla's projections have no bias": getattr(config, "attention_bias", False)
        or getattr(config, "mlp_bias", False),
        f"{heads} heads x {head_dim} channels are not the hidden size": heads * (head_dim or 0) != config.hidden_size,
        f"its activation is {config.hidden_act}, not silu": config.hidden_act not in ("silu", "swish"),
    }
    if found := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(f"fla cannot express this model: {found}", where=source.path)
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    same += ("initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
    return {
        "architectures": ["GSAForCausalLM"],
        "model_type": "gsa",
        **{name: getattr(config, name) for name in same},
        **{name: value for name, (value, _) in FIXED.items()},
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads,
        "num_slots": gsa.slots,
        "gate_logit_normalizer": int(gsa.damping) if gsa.damping == int(gsa.damping) else gsa.damping,
        "norm_eps": config.rms_norm_eps,
        "elementwise_affine": True,
        "dtype": str(config.dtype).removeprefix("torch."),
    }


def export(folder: str, out: str, to: str = "fla") -> None:
    """Write the converted model in `folder` into the new folder `out` as another project's checkpoint.

    to: "fla", flash-linear-attention. Raises UserError where that cannot hold the model; nothing is written then.
    """
    import json

    from t2r.convert.source import open_source, quote
    from t2r.convert.writer import FolderWriter, check_absent, preflight

    command = f"t2r export {quote(folder)}"
    check_absent(out, command)
    source = open_source(folder)
    config = export_config(source)
    plan = {theirs(name): (source.shape(name), source.dtype(name)) for name in source.names()}
    preflight(out, sum(source.nbytes(name) for name in source.names()) + 20_000_000, 0, command)
    with FolderWriter(out, plan) as writer:
        for name, start, values in source.pieces():
            writer.add_piece(theirs(name), start, values)
        (writer.path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        source.save_tokenizer(writer.path)
        if generation := source.generation_config():
            generation.save_pretrained(writer.path)
    print(f"wrote {out}: {len(plan)} tensors, GSAForCausalLM of flash-linear-attention")
