"""The model classes: a source's own Hugging Face classes with GSA attention modules, one pair per family.

The backbone's code stays the source's. `GSAMixin` works out once per forward what GSA layers need and the backbone
does not know (positions in the document, packed documents, bounded sink distance) and hands it down through **kwargs.
"""

import inspect
from functools import cache

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from t2r.families import FAMILIES, Family, layer_type
from t2r.kernels.gsa.documents import count_positions

from .attention import Context, GSAttention, adopt_attention
from .cache import CACHE, adopt
from .configuration import CONFIG_CLASSES, CONFIG_MAPPING, FLOAT32, GSAConfig

BY_BOUNDS = "t2r_varlen"  # of transformers' attention functions that which is given bounds of documents, no mask


class GSAParameters:
    """How transformers is to treat the parameters that GSA adds: mixed in front of both of a family's classes."""

    _keep_in_fp32_modules_strict = [f"self_attn.{name}" for name in FLOAT32]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GSAttention):
            module.reset_gsa()


class GSAMixin(GSAParameters):
    """What a GSA model does before its backbone runs. Mixed in front of the source's base model class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        become_gsa(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        cache=None,
        **kwargs,
    ):
        """The source's forward. attention_mask [B, T] or [B, past + T], 1 = token, 0 = padding on either side;
        cu_seq_lens_q [N+1]: packed documents, over the flattened [B*T] tokens (no cache then); max_length_q: no
        document is longer (where it matters, one host read finds out otherwise); cache: past_key_values by its newer
        name."""
        cache = past_key_values if cache is None else cache
        tokens = input_ids if input_ids is not None else inputs_embeds
        B, T = tokens.shape[:2]
        wants_cache = self.config.use_cache if use_cache is None else use_cache
        if cu_seq_lens_q is None and cache is None and position_ids is not None and attention_mask is None:
            cu_seq_lens_q = packed_documents(position_ids.expand(B, T))
        if cu_seq_lens_q is not None and cache is not None:
            raise ValueError("a cache cannot go on with packed documents: give one or the other")
        if wants_cache and cache is None and cu_seq_lens_q is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            adopt(cache, self.gsa_layers, len(self.layers))
        context, position_ids = self.gsa_context(
            tokens, attention_mask, position_ids, cache, cu_seq_lens_q, max_length_q
        )
        if len(self.gsa_layers) == len(self.layers):
            # A 4-D mask passes through the backbone untouched: without one it would build [B, 1, T, T] for nobody.
            attention_mask = torch.empty(1, 1, 1, 1, device=tokens.device)
        elif cu_seq_lens_q is not None and self.config._attn_implementation == BY_BOUNDS:
            kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": B * T if max_length_q is None else max_length_q}
        elif cu_seq_lens_q is not None:
            if (position_ids[:, 0] != 0).any():
                raise ValueError("with softmax layers a packed document cannot go on in the next row")
            attention_mask = None  # transformers tells packed documents apart by their positions
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=cache is not None,
            gsa_context=context,
            **{CACHE: cache},
            **kwargs,
        )

    def gsa_context(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache,
        cu_seqlens: Tensor | None,
        max_length: int | None = None,
    ) -> tuple[Context, Tensor]:
        """Context of one forward and the rotary positions [B,T]: the given ones, else the positions in the document."""
        B, T = tokens.shape[:2]
        memory = None if cache is None else cache.layers[next(iter(self.gsa_layers))]
        past = 0 if memory is None else memory.get_seq_length()
        documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        first = memory.state.position if past else torch.zeros(documents, dtype=torch.long, device=tokens.device)
        longest = past + T
        if cu_seqlens is not None:
            positions, longest = count_positions(first, 1, B * T, cu_seqlens).view(B, T), max_length
        elif mask is not None:
            real = mask[:, -T:] != 0
            positions = torch.where(real, first[:, None] + real.cumsum(-1) - 1, -1)
        elif position_ids is not None and past == 0:
            positions, longest = position_ids.expand(B, T), None
        else:
            positions = count_positions(first, B, T, None)
        context = Context(positions, cu_seqlens, self.sink_turns(positions, longest))
        return context, positions.clamp(min=0) if position_ids is None else position_ids

    def sink_turns(self, positions: Tensor, longest: int | None) -> dict[tuple, tuple[Tensor, Tensor]]:
        """GSAttention.turn -> rotation of a query at each position back to the bounded distance, where some position is
        beyond it. Made by the source's own rotary embedding. longest: no document is longer; None: the positions tell,
        for one host read."""
        turns = {}
        for turn in dict.fromkeys(module.turn for module in self.gsa_modules):
            if turn is None:
                continue
            if longest is None:
                longest = int(positions.max()) + 1
            distance, kind = turn
            if longest > distance + 1:
                turns[turn] = self.rotation((distance - positions).clamp(max=0), kind)
        return turns

    def rotation(self, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B,T,R] float32 of the source's rotary embedding, without its factor on the attention logits."""
        rotary, kinds = self.rotary_emb, {}
        scaling = getattr(rotary, "attention_scaling", 1.0)
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            kinds, scaling = {"layer_type": kind}, getattr(rotary, f"{kind}_attention_scaling")
        cos, sin = rotary(torch.empty(0, device=positions.device), position_ids=positions, **kinds)
        return cos / scaling, sin / scaling


def packed_documents(position_ids: Tensor) -> Tensor | None:
    """Bounds [N+1] of the documents that position_ids [B,T] count from 0 one after the other, or None if every row is
    one document. Rows are flattened; costs one host read, so trainers pass cu_seq_lens_q instead."""
    starts = position_ids == 0
    if not starts[:, 1:].any():
        return None
    starts = starts.clone()
    starts[:, 0] = True
    bounds = starts.flatten().nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([position_ids.numel()])])


def become_gsa(base) -> None:
    """Replace the attention modules of a source's base model, but for those that keep softmax, on the instance."""
    family = FAMILIES[base.config.model_type.removeprefix("gsa_")]
    base.gsa_layers, base.gsa_modules = GSAConfig.of(base.config).gsa_layers(base.config), []
    for i, gsa in base.gsa_layers.items():
        attention = base.get_submodule(family.attention.format(i))
        rotates = family.rotates is None or getattr(attention, family.rotates)
        adopt_attention(attention, gsa, layer_type(base.config, i) if rotates else None)
        base.gsa_modules.append(attention)
    # Some rotary embeddings change their frequencies once a text is long. Keys in slots cannot be turned anew, and they
    # are never read from far away, so the frequencies stay those of short texts.
    rotary = type(base.rotary_emb)
    forward = torch.no_grad()(inspect.unwrap(rotary.forward))
    base.rotary_emb.__class__ = type(rotary.__name__, (rotary,), {"__module__": __name__, "forward": forward})


@cache
def model_classes(family: Family) -> tuple[type, type]:
    """(base model, causal LM) of a family, such as GSALlamaModel(GSAMixin, LlamaModel) and its GSALlamaForCausalLM."""
    source, config_class = CONFIG_MAPPING[family.model_type], CONFIG_CLASSES[family.model_type]
    base_source, lm_source = MODEL_MAPPING[source], MODEL_FOR_CAUSAL_LM_MAPPING[source]

    def make(parents: tuple[type, ...], **attributes) -> type:
        name = parents[-1].__name__
        doc = f"{name} with Gated Slot Attention in its attention layers; forward as in GSAMixin."
        return type(
            f"GSA{name}", parents, {"__module__": __name__, "__doc__": doc, "config_class": config_class, **attributes}
        )

    def __init__(self, config):
        lm_source.__init__(self, config)
        self.model.__class__ = base
        become_gsa(self.model)

    def create_masks_for_generate(attention_mask=None, **kwargs):
        """Keep the 2-D mask: `GSAMixin.forward` reads positions from it."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """transformers makes the cache; its GSA layers must be ours before it is told to record for a rollback."""
        lm_source._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        past = model_kwargs.get(CACHE)
        if past is not None:
            adopt(past, self.model.gsa_layers, len(self.model.layers))
            if generation_config.is_assistant:
                past.activate_past_recording()

    base = make((GSAMixin, base_source))
    lm = make(
        (GSAParameters, lm_source),
        __init__=__init__,
        create_masks_for_generate=staticmethod(create_masks_for_generate),
        _prepare_cache_for_generation=_prepare_cache_for_generation,
    )
    globals().update({cls.__name__: cls for cls in (base, lm)})  # where pickle and transformers look them up
    return base, lm
