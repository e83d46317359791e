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
    """

    model_type: str
    attention: str = "layers.{}.self_attn"

    @property
    def gsa_model_type(self) -> str:
        return f"gsa_{self.model_type}"


FAMILIES = {
    family.model_type: family
    for family in (
        Family("granite"),
        Family("llama"),
        Family("mistral"),
        Family("olmo2"),
        Family("qwen2"),
        Family("qwen3"),
    )
}


def head_dim(config) -> int:
    """Channels of an attention head, which some configs leave to be worked out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def family_of(model_type: str, where: str | None = None) -> Family:
    """The entry of a source's model_type; UserError with the nearest supported one otherwise."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.removeprefix("gsa_") in FAMILIES:
        raise UserError(
            f"{model_type} is a converted model already",
            where=where,
            next="t2r generate MODEL",
        )
    raise UserError(
        f"cannot convert architecture {model_type!r}",
        where=where,
        nearest=nearest(model_type, FAMILIES) or ", ".join(FAMILIES),
    )
