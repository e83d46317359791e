"""The one table of source model families: what `t2r` can convert, and what it must know that transformers cannot say.

A family needs an entry here and a test. Everything else (projections, biases, q/k norms, attention scale, rotary
embedding) is the source's own code, which a GSA layer runs unchanged up to the attention itself.
"""

from dataclasses import dataclass

from t2r.errors import UserError, nearest


@dataclass(frozen=True)
class Family:
    """One source architecture.

    model_type: its name in transformers' config.json.
    attention: path of layer {}'s attention module inside the base model.
    rotates: attribute of an attention module that is false where it has no rotary embedding; None: every one has it.
    """

    model_type: str
    attention: str = "layers.{}.self_attn"
    rotates: str | None = None

    @property
    def gsa_model_type(self) -> str:
        return f"gsa_{self.model_type}"


FAMILIES = {
    family.model_type: family
    for family in (
        Family("cohere"),
        Family("gemma3_text"),
        Family("glm"),
        Family("granite"),
        Family("llama"),
        Family("mistral"),
        Family("mixtral"),
        Family("olmo2"),
        Family("olmo3"),
        Family("phi3"),
        Family("qwen2"),
        Family("qwen3"),
        Family("qwen3_moe"),
        Family("seed_oss"),
        Family("smollm3", rotates="use_rope"),
        Family("starcoder2"),
    )
}

CAPPED = "it caps attention logits with tanh, which no softmax over slots reproduces"
LATENT = "its attention keeps a latent vector, not keys and values"
RECURRENT = "it is recurrent already"
REFUSED = {
    "gemma2": CAPPED,
    "gemma3": "it holds a vision model too; its text model alone (gemma3_text) can be converted",
    "vaultgemma": CAPPED,
    "gpt_oss": "its softmax has a learned sink logit in every head, which slots do not have",
    "llama4_text": "it attends in blocks of the text, which a ring of the last tokens does not reproduce",
    "bloom": "its attention adds a bias for distance (ALiBi), which slots do not know",
    "mpt": "its attention adds a bias for distance (ALiBi), which slots do not know",
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "hunyuan_v1_dense": "it normalises queries after rotating them, so far sinks cannot be brought near",
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "rwkv": RECURRENT,
}


def head_dim(config) -> int:
    """Channels of an attention head, which some configs leave to be worked out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_type(config, layer: int) -> str:
    """The source's name of a layer's kind of attention: full_attention or sliding_attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return kinds[layer] if kinds else "sliding_attention" if window else "full_attention"


def window(config, layer: int) -> int | None:
    """How many tokens, its own included, a token attends to in a layer of the source; None: all."""
    return getattr(config, "sliding_window", None) if layer_type(config, layer) == "sliding_attention" else None


def trained_context(config) -> int:
    """Tokens of the longest text that the source's rotary frequencies for short texts were trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return config.max_position_embeddings


def family_of(model_type: str, where: object = None) -> Family:
    """The entry of a source's model_type; UserError with the reason or the nearest supported one otherwise."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.removeprefix("gsa_") in FAMILIES:
        raise UserError(
            f"{model_type} is a converted model already",
            where=where,
            next=f"t2r generate {where or 'MODEL'}",
        )
    if model_type in REFUSED:
        raise UserError(f"cannot convert architecture {model_type!r}: {REFUSED[model_type]}", where=where)
    raise UserError(
        f"cannot convert architecture {model_type!r}",
        where=where,
        nearest=nearest(model_type, FAMILIES) or ", ".join(FAMILIES),
    )


def check_attention(config, where: object = None) -> None:
    """Raise UserError where a config of a supported family asks for attention that no softmax over slots equals."""
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(f"cannot convert a model with attn_logit_softcapping: {CAPPED}", where=where)
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError("cannot convert a model that attends to later tokens too", where=where)
