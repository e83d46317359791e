"""The part of a transformers cache that a GSA layer needs: a slot memory of constant size instead of keys and values.

Shape legend: kernels/gsa/spec.py; B is the batch of the generation (beams included).
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from t2r.kernels.gsa import SlotState

# What transformers calls the cache that a model is given and returns: `cache` from 5.24 on.
CACHE = next(f.name for f in dataclasses.fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


class SlotCacheLayer(CacheLayerMixin):
    """One layer's memory. `state` is None before the first token; `cumulative_length` counts tokens, padding included,
    because that is what transformers sizes masks with.

    A recurrent state cannot forget its last tokens, which assisted decoding asks for when it rejects candidates. After
    `activate_past_recording` the layer therefore keeps, until the next `crop`, the state before each call and a way to
    read the call's first tokens again.
    """

    _layer_type = "gated_slot_attention"
    is_compileable = True
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.state: SlotState | None = None
        self.cumulative_length = 0
        self.record_past = False
        self.log: list[tuple[int, SlotState | None, Callable[[int], SlotState]]] = []

    def advance(self, state: SlotState, num_tokens: int, replay: Callable[[int], SlotState]) -> None:
        """Take over the state after `num_tokens` more tokens; replay(n) is the state after only the first n of them.

        In place where autograd allows it and nothing is recorded, so that captured CUDA graphs keep reading the same
        addresses.
        """
        if self.record_past:
            self.log.append((num_tokens, self.state, replay))
        if self.state is None or self.record_past or torch.is_grad_enabled():
            self.state = state
        else:
            for mine, new in zip(self.state, state, strict=True):
                mine.copy_(new)
        self.is_initialized = True
        self.cumulative_length += num_tokens

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens (transformers counts them negative) and end the recording so far;
        0 only does the latter."""
        left = -tokens_to_remove
        if left < 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        if left > sum(num_tokens for num_tokens, _, _ in self.log):
            raise ValueError(f"{left} tokens are more than were recorded: call activate_past_recording before them")
        while left:
            num_tokens, before, replay = self.log.pop()
            removed = min(left, num_tokens)
            self.state = before if removed == num_tokens else replay(num_tokens - removed)
            self.cumulative_length -= removed
            left -= removed
        self.log.clear()

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to allocate: the memory is born with the first `advance`."""

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError("a slot memory is advanced by its GSA layer; it takes no keys and values")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """A slot memory is small: it stays where it is used."""

    prefetch = offload

    def reset(self) -> None:
        self.state = None
        self.is_initialized = False
        self.cumulative_length = 0
        self.log.clear()

    def _rows(self, pick) -> None:
        if self.state is not None:
            self.state = SlotState(*(pick(x) for x in self.state))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda x: x[indices])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, for the whole batch."""
        return 0 if self.state is None else sum(x.numel() * x.element_size() for x in self.state)


def adopt(cache: Cache, layers: Iterable[int], num_layers: int) -> None:
    """Give a transformers cache a slot memory for each of the GSA `layers`, before anything was stored in it.

    Works on whatever cache generate() or the caller made: which layers are GSA is our config's to say, and its
    layer_types must keep the values that the source's own code reads.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    for i in layers:
        layer = cache.layers[i]
        if not isinstance(layer, SlotCacheLayer):
            if layer.is_initialized:
                raise ValueError(f"layer {i} of the cache holds keys and values of another model")
            cache.layers[i] = SlotCacheLayer()
