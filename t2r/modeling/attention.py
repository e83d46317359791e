"""The GSA mixer: the source's own attention module with Gated Slot Attention in place of softmax attention.

transformers runs every attention through a function that it looks up by name, after projections, biases, q/k norms and
rotary embedding and before o_proj. A GSA layer is the source's module with that function exchanged and the gate
projection beside it, so it is right for any family whose code transformers has.

Shape legend: kernels/gsa/spec.py; W = hidden size.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2r.kernels.gsa import SlotState, gsa

from .cache import SlotCacheLayer
from .configuration import GSAConfig


@dataclass
class Context:
    """What all GSA layers of one forward share, worked out once by the model (models.py).

    positions [B,T]: position in the document, -1 = padding; None: counted from the memory's.
    cu_seqlens [N+1]: bounds of packed documents over the flattened [B*T] tokens, or None.
    sink_turns: GSAttention.turn -> (cos, sin) [B,T,R] float32 that turn a query from its true distance to the bounded
        one; only where a token is beyond it.
    """

    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sink_turns: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)


class GSAttention:
    """Mixed in front of a source's attention class; `adopt_attention` makes the instance.

    Nothing here reads the number of the layer while it is trained, so torch.compile needs one graph for all layers.
    """

    gsa: GSAConfig
    rotate: Callable  # the source's apply_rotary_pos_emb: its layout of pairs, its share of the channels
    rotary: str | None  # which of the source's rotary embeddings (families.layer_type), None: it has none here

    def add_gsa(self, gsa_config: GSAConfig, rotary: str | None) -> None:
        """Add the new parameters (named in GSAConfig.new_tensors) and switch the attention function."""
        self.gsa, self.rotary, weight = gsa_config, rotary, self.o_proj.weight
        self.config = copy.copy(self.config)
        self.config._attn_implementation = "gsa"
        with torch.device(weight.device):
            self.f_proj = nn.Linear(
                self.config.hidden_size, self.kv_heads * gsa_config.slots, bias=False, dtype=weight.dtype
            )
            if gsa_config.ring:
                self.write = nn.Parameter(torch.empty(self.kv_heads, gsa_config.slots))
                self.keep = nn.Parameter(torch.empty(self.kv_heads, gsa_config.slots))
            if gsa_config.scored:
                self.bonus = nn.Linear(self.config.hidden_size, self.kv_heads, dtype=weight.dtype)
                self.recent = nn.Parameter(torch.empty(self.kv_heads))
            if gsa_config.output_norm:
                self.g_norm = nn.RMSNorm(self.config.num_attention_heads * self.head_dim, eps=1e-5, dtype=weight.dtype)
        self.reset_gsa()

    @property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def turn(self) -> tuple[int, str] | None:
        """(farthest distance at which sinks are read, rotary embedding) where that is bounded."""
        bounded = self.gsa.sinks and self.gsa.sink_distance is not None and self.rotary is not None
        return (self.gsa.sink_distance, self.rotary) if bounded else None

    def new_names(self) -> list[str]:
        """Names of the parameters of `add_gsa`."""
        added = ("f_proj.weight", "write", "keep", "bonus.weight", "bonus.bias", "recent", "g_norm.weight")
        return [name for name, _ in self.named_parameters() if name in added]

    def new_tensors(self) -> dict[str, Tensor]:
        """Starting values of the parameters of `add_gsa`; each layer draws its own."""
        config = self.config
        return self.gsa.new_tensors(
            config.hidden_size, config.num_attention_heads, self.kv_heads, self.head_dim, seed=self.layer_idx
        )

    @torch.no_grad()
    def reset_gsa(self) -> None:
        """Set the new parameters to their starting values (not those already loaded from a checkpoint)."""
        if self.f_proj.weight.is_meta:
            return
        for name, value in self.new_tensors().items():
            init.copy_(self.get_parameter(name), value)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        gsa_context: Context | None = None,
        cache=None,
        **kwargs,
    ):
        """As the source's forward. The mask is not read: padding and packing come with gsa_context.

        cache: past_key_values by its newer name.
        """
        cache = past_key_values if cache is None else cache
        context = gsa_context or Context()
        if position_embeddings is not None and not self.gsa.rope:
            cos, sin = position_embeddings
            position_embeddings = torch.ones_like(cos), torch.zeros_like(sin)
        return super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=None,
            gsa_gate=self.f_proj(hidden_states),
            gsa_bonus=self.token_bonus(hidden_states, context.positions),
            gsa_context=context,
            gsa_memory=None if cache is None else cache.layers[self.layer_idx],
            **kwargs,
        )

    @torch.no_grad()
    def token_bonus(self, hidden_states: Tensor, positions: Tensor | None) -> Tensor | None:
        """How many tokens younger each token [B,T] counts when one has to be evicted: [B,T,H], None without scores.
        positions: theirs, for whoever takes this method's place (t2r.convert.checks)."""
        return self.bonus(hidden_states) if self.gsa.scored else None


def adopt_attention(module: nn.Module, gsa_config: GSAConfig, rotary: str | None) -> None:
    """Turn a source's attention module, in place, into its GSA counterpart. Its tensors and their names stay."""
    module.__class__ = attention_class(type(module))
    module.add_gsa(gsa_config, rotary)


@cache
def attention_class(source: type) -> type:
    """The GSA counterpart of a source's attention class, one for all layers."""
    rotate = staticmethod(sys.modules[source.__module__].apply_rotary_pos_emb)
    return type(f"GSA{source.__name__}", (GSAttention, source), {"__module__": __name__, "rotate": rotate})


def gsa_attention(
    module: GSAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    gsa_gate: Tensor | None = None,
    gsa_bonus: Tensor | None = None,
    gsa_context: Context | None = None,
    gsa_memory: SlotCacheLayer | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B,H*G,T,D], key and value [B,H,T,D] -> o [B,T,H*G,D], no weights."""
    config, context = module.gsa, gsa_context
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    B, T = q.shape[:2]
    gate = gsa_gate.unflatten(-1, (module.kv_heads, config.slots))
    q_sink, positions = None, context.positions
    if module.turn in context.sink_turns:
        turned, _ = module.rotate(query.float(), key[:, :1].float(), *context.sink_turns[module.turn])
        q_sink = turned.to(q.dtype).transpose(1, 2)
    if context.cu_seqlens is not None and B > 1:
        rows = (q, k, v, gate, q_sink, gsa_bonus, positions)
        q, k, v, gate, q_sink, gsa_bonus, positions = (None if x is None else x.flatten(0, 1)[None] for x in rows)
    memory = None if gsa_memory is None else gsa_memory.state

    def read(tokens: slice) -> tuple[Tensor, SlotState | None]:
        part = (None if x is None else x[:, tokens] for x in (q, k, v, gate, q_sink, gsa_bonus, positions))
        q_, k_, v_, gate_, q_sink_, bonus_, positions_ = part
        return gsa(
            q_,
            k_,
            v_,
            gate_,
            spec=config.spec,
            scale=scaling if config.scale is None else config.scale,
            write=module.write if config.ring else None,
            keep=module.keep if config.ring else None,
            q_sink=q_sink_,
            bonus=bonus_,
            recent=module.recent if config.scored else None,
            positions=positions_,
            cu_seqlens=context.cu_seqlens,
            initial_state=memory,
            output_final_state=gsa_memory is not None,
            overwrite_state=gsa_memory is not None and not gsa_memory.record_past,
        )

    o, state = read(slice(None))
    if gsa_memory is not None:
        gsa_memory.advance(state, T, replay=lambda n: read(slice(n))[1])
    o = o.reshape(B, T, *o.shape[2:])
    if config.output_norm:
        o = module.g_norm(silu(o).flatten(2)).view_as(o)
    return o, None


ALL_ATTENTION_FUNCTIONS.register("gsa", gsa_attention)
