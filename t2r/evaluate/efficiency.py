"""What a model costs and writes: memory by length of the context, speed, and a greedy continuation to read."""

import dataclasses
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from t2r.errors import UserError
from t2r.evaluate.statistics import Metric
from t2r.evaluate.task import Outcome, Place, Plot, Task
from t2r.families import head_dim, window
from t2r.modeling import GSAConfig
from t2r.modeling.cache import CACHE


def cache_bytes(cache) -> int:
    """Bytes that a transformers cache holds: keys and values, and the slots of GSA layers."""
    from t2r.modeling.cache import SlotCacheLayer

    slots = [layer.nbytes for layer in cache.layers if isinstance(layer, SlotCacheLayer)]
    dense = [layer for layer in cache.layers if not isinstance(layer, SlotCacheLayer) and layer.is_initialized]
    return sum(slots) + sum(layer.keys.nbytes + layer.values.nbytes for layer in dense)


def state_bytes(config, length: int, itemsize: int) -> int:
    """Bytes that a model of this config has to remember of one text of `length` tokens, from its config alone.

    itemsize: bytes of a number in the KV cache; the state of a GSA layer is float32 whatever the model's dtype.
    """
    gsa = GSAConfig.of(config) if getattr(config, "gsa", None) else None
    kept = gsa.softmax_layers if gsa else range(config.num_hidden_layers)
    # a sliding layer keeps the window without the token that is being read
    tokens = sum(min(length, (window(config, i) or length + 1) - 1) for i in kept)
    dense = 2 * config.num_key_value_heads * head_dim(config) * itemsize * tokens
    return dense + (gsa.state_bytes(config) if gsa else 0)


@dataclass
class Memory(Task):
    """Bytes of state or KV cache by context length, batch 1: computed, and measured at `check_at` tokens."""

    lengths: list[int] = dataclasses.field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    )
    check_at: int = 128

    about: ClassVar[str] = (
        "What a model has to keep of one text to go on with it: the KV cache of a Transformer, the state of a "
        "converted model. Computed from the configuration and checked against a real cache."
    )
    plot: ClassVar[Plot] = Plot("Memory by context length", "context (tokens)", "memory for one text")
    quality: ClassVar[bool] = False

    def prepare(self, tokenizer, place: Place) -> list[int]:
        return self.lengths

    @torch.inference_mode()
    def run(self, model, items: list[int]) -> Outcome:
        from transformers import DynamicCache

        itemsize = model.dtype.itemsize
        cache = DynamicCache(config=model.config)
        model(some_tokens(model, self.check_at), **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        measured, computed = cache_bytes(cache), state_bytes(model.config, self.check_at, itemsize)
        metrics = [
            Metric(f"{length:,} tokens", "bytes", state_bytes(model.config, length, itemsize), x=length)
            for length in items
        ]
        text = f"measured at {self.check_at} tokens: {measured:,} bytes, computed: {computed:,} bytes"
        if measured != computed:
            text = f"NOT CONFIRMED, the numbers above do not hold for this model: {text}"
        return Outcome(metrics, [{"length": self.check_at, "measured": measured, "computed": computed}], text)


@dataclass
class Speed(Task):
    """Tokens per second of one text: reading `prompt` tokens at once, then writing `new` tokens one by one."""

    prompt: int = 256
    new: int = 16

    about: ClassVar[str] = (
        "One text at a time on this machine, the better of two runs after a warm-up. Short contexts show the overhead, "
        "not the scaling."
    )
    quality: ClassVar[bool] = False

    def prepare(self, tokenizer, place: Place) -> list[int]:
        if self.prompt < 1 or self.new < 2:
            raise UserError("speed needs a prompt of 1 token and 2 new ones", where=f"task {self.name}")
        return [self.prompt]

    def run(self, model, items: list[int]) -> Outcome:
        ids = some_tokens(model, self.prompt)
        greedy(model, ids[:, :16], 2)
        times = [greedy(model, ids, self.new)[1] for _ in range(2)]
        prefill = min(stamps[0] for stamps in times)
        decode = min(stamps[-1] - stamps[0] for stamps in times)
        metrics = [
            Metric(f"prefill, {self.prompt} tokens", "tokens/s", self.prompt / prefill),
            Metric(f"decode, {self.new} tokens", "tokens/s", (self.new - 1) / decode),
        ]
        return Outcome(metrics, [{"seconds": stamps} for stamps in times])


@dataclass
class Generation(Task):
    """Greedy continuations to read."""

    prompts: list[str] = dataclasses.field(default_factory=list)
    new: int = 48

    about: ClassVar[str] = "Greedy continuations of the same prompt."

    def prepare(self, tokenizer, place: Place) -> list[str]:
        if not self.prompts:
            raise UserError("no prompts", where=f"task {self.name}")
        self.tokenizer = tokenizer
        return self.prompts[: self.items]

    def run(self, model, items: list[str]) -> Outcome:
        end, records = self.tokenizer.eos_token_id, []
        for prompt in items:
            ids = torch.tensor([self.tokenizer.encode(prompt)], device=model.device)
            tokens = greedy(model, ids, self.new, end)[0]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            records.append({"prompt": prompt, "tokens": tokens, "text": text})
        return Outcome([], records, "\n\n".join(record["prompt"] + record["text"] for record in records))


def some_tokens(model, count: int) -> Tensor:
    """[1, count] token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, count), generator=generator).to(model.device)


@torch.inference_mode()
def greedy(model, ids: Tensor, new: int, end: int | None = None) -> tuple[list[int], list[float]]:
    """The most likely continuation of ids [1, T], up to `new` tokens or `end`, and the seconds until each was known."""
    from transformers import DynamicCache

    cache, tokens, stamps = DynamicCache(config=model.config), [], []
    start = time.perf_counter()
    while len(tokens) < new and (not tokens or tokens[-1] != end):
        logits = model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids.item())  # waits for the device
        stamps.append(time.perf_counter() - start)
    return tokens, stamps
