"""What a converted checkpoint says about its GSA layers: one typed record, stored in config.json under "gsa"."""

from dataclasses import asdict, dataclass, field, fields, replace

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2r.errors import UserError, nearest
from t2r.families import FAMILIES, Family, head_dim, trained_context, window
from t2r.kernels.gsa import GSASpec

EVICTIONS = ("oldest", "score")
FLOAT32 = ("write", "keep", "recent")  # parameters that stay in it: gate biases are far from bfloat16's grid


@dataclass(frozen=True)
class GSAConfig:
    """All choices of the GSA layers. The first six fields are those of `kernels.gsa.GSASpec`, with its meanings.

    slots: M, memory slots per kv head.
    eviction: the token that makes room in a full memory is the "oldest", or chosen by "score" (kernels/gsa/evict.py).
    rope: keep the source's rotary embedding on q and k.
    scale: factor on q.K; None is the source's own.
    output_norm: o_proj reads RMSNorm(silu(o)) over all heads (paper eq. 9) instead of o.
    sink_distance: the sinks are read as if at most this many tokens away, so that their rotary distance stays inside
        what the source was trained on however long the text gets (needs rope; None: their true distance).
    gate_std: standard deviation of the gate projection at conversion.
    softmax_layers: layers that keep the source's softmax attention and its key-value cache.
    layers: changes of the fields above in single layers, such as {"3": {"slots": 128, "ring": 128}}.
    """

    gate: str = "linear"
    damping: float = 512.0
    ring: int = 64
    sinks: int = 4
    occupancy: bool = True
    feature_map: str = "identity"
    slots: int = 64
    eviction: str = "oldest"
    rope: bool = True
    scale: float | None = None
    output_norm: bool = False
    sink_distance: int | None = None
    gate_std: float = 0.0
    softmax_layers: list[int] = field(default_factory=list)
    layers: dict[str, dict] = field(default_factory=dict)

    @property
    def spec(self) -> GSASpec:
        return GSASpec(self.gate, self.damping, self.ring, self.sinks, self.occupancy, self.feature_map)

    @property
    def scored(self) -> bool:
        return self.eviction == "score"

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "GSAConfig":
        """The record of a converted model's config; UserError if a field is unknown or a layer does not exist."""
        where = "config.json: gsa"
        record = cls(**known_fields(cls, config.gsa, where))
        for layer, changes in record.layers.items():
            known_fields(cls, changes, f"{where}.layers.{layer}")
        for layer in [*record.layers, *record.softmax_layers]:
            if not 0 <= int(layer) < config.num_hidden_layers:
                raise UserError(f"there is no layer {layer}", where=where, nearest=config.num_hidden_layers - 1)
        return record

    def layer(self, index: int) -> "GSAConfig | None":
        """The choices of one layer, or None where it keeps softmax attention."""
        if index in self.softmax_layers:
            return None
        return replace(self, softmax_layers=[], layers={}, **self.layers.get(str(index), {}))

    def gsa_layers(self, config: PreTrainedConfig) -> dict[int, "GSAConfig"]:
        """Layer -> its choices, for each layer without softmax attention."""
        every = {i: self.layer(i) for i in range(config.num_hidden_layers)}
        return {i: gsa for i, gsa in every.items() if gsa is not None}

    def state_bytes(self, config: PreTrainedConfig) -> int:
        """Memory of one sequence in the GSA layers, however long: float32 keys, values and occupancy of each slot, with
        scores its token's rank and position, and the text's position. Layers that keep softmax attention come on top
        (families.window tells for how many tokens)."""
        numbers = 2 * head_dim(config) + 1
        slots = sum(gsa.slots * (numbers + 2 * gsa.scored) for gsa in self.gsa_layers(config).values())
        return 4 * config.num_key_value_heads * slots + 8 * len(self.gsa_layers(config))

    def to_dict(self) -> dict:
        return asdict(self)

    def new_tensors(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """The parameters that GSA adds to one attention module, at their starting values, in float32.

        f_proj.weight [H*M, hidden]; with a clock write, keep [H, M]; with scores bonus.weight [H, hidden], bonus.bias
        [H] and recent [H], with which the oldest goes until they are fitted (t2r.convert.evict); with output_norm
        g_norm.weight [heads * head_dim].
        """
        gate = torch.zeros(kv_heads * self.slots, hidden)
        if self.gate_std:
            gate.normal_(std=self.gate_std, generator=torch.Generator().manual_seed(seed))
        tensors = {"f_proj.weight": gate}
        if self.ring:
            tensors["write"] = torch.ones(kv_heads, self.slots)
            tensors["keep"] = torch.zeros(kv_heads, self.slots)
        if self.scored:
            tensors["bonus.weight"] = torch.zeros(kv_heads, hidden)
            tensors["bonus.bias"] = torch.zeros(kv_heads)
            tensors["recent"] = torch.ones(kv_heads)
        if self.output_norm:
            tensors["g_norm.weight"] = torch.ones(heads * head_dim)
        return tensors


def known_fields(cls: type, values: dict, where: str) -> dict:
    """`values` themselves; UserError if one is no field of the dataclass `cls`."""
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            raise UserError(f"unknown GSA setting {name!r}", where=where, nearest=nearest(name, known))
    return values


# exact: a ring buffer with sinks, equal to the source's attention over the slots' tokens before any training.
# paper: arXiv 2409.07146 section 4.2 with the settings of its public checkpoints.
PRESETS = {
    "exact": GSAConfig(),
    "paper": GSAConfig(
        gate="sigmoid", damping=8.0, ring=0, sinks=0, occupancy=False, feature_map="silu", rope=False, scale=1.0,
        output_norm=True, gate_std=0.02,
    ),
}  # fmt: skip


def preset(name: str, slots: int | None = None, sinks: int | None = None, eviction: str = "oldest") -> GSAConfig:
    """A preset with the number of slots and sinks, and eviction, replaced; UserError where they do not fit."""
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
    if eviction not in EVICTIONS:
        raise UserError(f"unknown eviction {eviction!r}", where="--eviction", nearest=nearest(eviction, EVICTIONS))
    if eviction != "oldest" and not gsa.ring:
        what = f"preset {name!r} has no clock: its slots hold no single tokens to evict"
        raise UserError(what, where="--eviction", nearest="oldest")
    return replace(gsa, eviction=eviction)


def fit_layers(gsa: GSAConfig, source: PreTrainedConfig, slots: dict[int, int], softmax_layers: list[int]) -> GSAConfig:
    """The record of a conversion of `source`: `gsa` with slots of single layers, layers that keep softmax
    attention, and what each layer's own window asks for.

    A layer whose window fits into its ring needs no sinks: a ring of the window's size equals it on any text. In the
    others sinks are read within an eighth of what the layer was trained on: on SmolLM2 anything up to a quarter of the
    trained context holds at 32K tokens, and half of it costs 7 % of perplexity (docs/results/far_sinks.json).
    """
    if set(softmax_layers) >= set(range(source.num_hidden_layers)):
        raise UserError("every layer would keep softmax attention", where="--keep-softmax")

    for i in sorted(slots):
        if i in softmax_layers:
            raise UserError(f"layer {i} keeps softmax attention and has no slots", where="--layer-slots")
        if slots[i] <= gsa.sinks:
            raise UserError(f"{slots[i]} slots are too few in layer {i}", where="--layer-slots", nearest=gsa.slots)

    def fitted(slots: int, limit: int | None) -> GSAConfig:
        ring, sinks, distance, eviction = (slots if gsa.ring else 0), gsa.sinks, None, gsa.eviction
        if ring and limit and slots >= limit:
            ring = slots = limit
            sinks, eviction = 0, "oldest"
        if sinks and gsa.rope:
            distance = max(ring, min(trained_context(source), limit or trained_context(source)) // 8)
        return replace(gsa, slots=slots, ring=ring, sinks=sinks, sink_distance=distance, eviction=eviction)

    main, layers = fitted(gsa.slots, None), {}
    for i in sorted(set(range(source.num_hidden_layers)) - set(softmax_layers)):
        mine = asdict(fitted(slots.get(i, gsa.slots), window(source, i)))
        changes = {name: value for name, value in mine.items() if value != getattr(main, name)}
        if changes:
            layers[str(i)] = changes
    return replace(main, softmax_layers=sorted(set(softmax_layers)), layers=layers)


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
