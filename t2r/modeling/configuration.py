"""What a converted checkpoint says about its GSA layers: one typed record, stored in config.json under "gsa"."""

from dataclasses import asdict, dataclass, fields, replace

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.errors import UserError, nearest
from t2r.families import FAMILIES, Family, head_dim
from t2r.kernels.gsa import GSASpec


@dataclass(frozen=True)
class GSAConfig:
    """All choices of a GSA layer. The first six fields are those of `kernels.gsa.GSASpec`, with its meanings.

    slots: M, memory slots per kv head.
    rope: keep the source's rotary embedding on q and k.
    scale: factor on q.K; None is the source's own.
    output_norm: o_proj reads RMSNorm(silu(o)) over all heads (paper eq. 9) instead of o.
    sink_distance: the sinks are read as if at most this many tokens away, so that their rotary distance stays inside
        what the source was trained on however long the text gets (needs rope; None: their true distance).
    gate_std: standard deviation of the gate projection at conversion.
    """

    gate: str = "linear"
    damping: float = 512.0
    ring: int = 64
    sinks: int = 4
    occupancy: bool = True
    feature_map: str = "identity"
    slots: int = 64
    rope: bool = True
    scale: float | None = None
    output_norm: bool = False
    sink_distance: int | None = None
    gate_std: float = 0.0

    @property
    def spec(self) -> GSASpec:
        return GSASpec(self.gate, self.damping, self.ring, self.sinks, self.occupancy, self.feature_map)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "GSAConfig":
        """The record of a converted model's config; UserError if a field is unknown."""
        known = [field.name for field in fields(cls)]
        for name in config.gsa:
            if name not in known:
                raise UserError(f"unknown GSA setting {name!r}", where="config.json: gsa", nearest=nearest(name, known))
        return cls(**config.gsa)

    def state_bytes(self, config: PreTrainedConfig) -> int:
        """Memory of one sequence, however long: float32 keys, values and occupancy of each slot, and the position."""
        per_layer = 4 * config.num_key_value_heads * self.slots * (2 * head_dim(config) + 1) + 8
        return config.num_hidden_layers * per_layer

    def to_dict(self) -> dict:
        return asdict(self)

    def new_tensors(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """The parameters that GSA adds to one attention module, at their starting values, in float32.

        f_proj.weight [H*M, hidden]; with a clock write, keep [H, M]; with output_norm g_norm.weight [heads * head_dim].
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            "f_proj.weight": torch.randn(kv_heads * self.slots, hidden, generator=generator) * self.gate_std,
        }
        if self.ring:
            tensors["write"] = torch.ones(kv_heads, self.slots)
            tensors["keep"] = torch.zeros(kv_heads, self.slots)
        if self.output_norm:
            tensors["g_norm.weight"] = torch.ones(heads * head_dim)
        return tensors


# exact: a ring buffer with sinks, equal to the source's attention over the slots' tokens before any training.
# paper: arXiv 2409.07146 section 4.2 with the settings of its public checkpoints.
PRESETS = {
    "exact": GSAConfig(),
    "paper": GSAConfig(
        gate="sigmoid", damping=8.0, ring=0, sinks=0, occupancy=False, feature_map="silu", rope=False, scale=1.0,
        output_norm=True, gate_std=0.02,
    ),
}  # fmt: skip


def preset(name: str, slots: int | None = None, sinks: int | None = None) -> GSAConfig:
    """A preset with the number of slots and sinks replaced; UserError where they do not fit."""
    if name not in PRESETS:
        raise UserError(
            f"unknown preset {name!r}", where="--preset", nearest=nearest(name, PRESETS) or ", ".join(PRESETS)
        )
    gsa = PRESETS[name]
    if slots is not None:
        if slots < 1:
            raise UserError(f"{slots} slots cannot hold anything", where="--slots", nearest="64")
        gsa = replace(gsa, slots=slots, ring=slots if gsa.ring else 0)
    if sinks is not None:
        if not gsa.ring and sinks:
            raise UserError(f"preset {name!r} has no clock, so no sinks", where="--sinks", nearest="0")
        gsa = replace(gsa, sinks=sinks)
    if gsa.ring and not 0 <= gsa.sinks < gsa.ring:
        raise UserError(
            f"{gsa.sinks} sinks leave no slot of {gsa.ring} for the ring",
            where="--sinks",
            nearest=str(min(4, gsa.ring - 1)),
        )
    return gsa


def make_config_class(family: Family) -> type[PreTrainedConfig]:
    """The source's config class with our model_type and the field `gsa` (a dict: see GSAConfig)."""
    source = CONFIG_MAPPING[family.model_type]

    return type(
        f"GSA{source.__name__}",
        (source,),
        {
            "__module__": __name__,
            "__doc__": f"{source.__name__} of a model whose attention is Gated Slot Attention (gsa: see GSAConfig).",
            "__annotations__": {"gsa": dict | None},
            "model_type": family.gsa_model_type,
            "gsa": None,
        },
    )


CONFIG_CLASSES = {name: make_config_class(family) for name, family in FAMILIES.items()}
globals().update({cls.__name__: cls for cls in CONFIG_CLASSES.values()})
