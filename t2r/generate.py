"""`t2r generate`: continue a text or answer it, streamed, with the speed and the size of the memory."""

import sys
import time

from t2r.errors import UserError


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Stream the continuation of `prompt` to stdout, then one line of statistics to stderr.

    model: a converted folder or any causal language model that transformers loads. temperature 0 is greedy.
    chat: wrap the prompt in the chat template; None: if the tokenizer has one. dtype None: as stored.
    device None: the GPU if there is one.
    """
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} tokens are nothing to generate", where="--max-new-tokens", nearest=128)
    if temperature < 0:
        raise UserError(f"temperature {temperature} is negative", where="--temperature", nearest=0)
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"{top_p} is no probability", where="--top-p", nearest=0.9)
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.cache_utils import DynamicCache

    from t2r.convert.source import open_source
    from t2r.evaluate.efficiency import cache_bytes
    from t2r.evaluate.models import pick_device
    from t2r.modeling.cache import CACHE, SlotCacheLayer

    source = open_source(model)
    if source.is_quantised:
        raise UserError("a GGUF file cannot be run, only converted", where=model, next=f"t2r convert {model} OUT")
    device = pick_device(device)
    tokenizer = source.load_tokenizer()
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", where=model, nearest="--no-chat")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    network = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype or "auto", local_files_only=True).eval()
    network = network.to(device)
    streamer = TimedStreamer(tokenizer, prompt_tokens=inputs["input_ids"].shape[1])
    cache = DynamicCache(config=network.config)
    if seed is not None:
        set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    if not temperature:
        # greedy decoding reads none of these; left at the model's defaults they only raise warnings
        network.generation_config.update(temperature=None, top_p=None, top_k=None)
    network.generate(
        **inputs.to(device), max_new_tokens=max_new_tokens, streamer=streamer, **{CACHE: cache}, **sampling
    )
    constant = all(isinstance(layer, SlotCacheLayer) for layer in cache.layers)
    kind = "state, the same at any length" if constant else "cache, growing with the text"
    print(f"{streamer.summary()}; {cache_bytes(cache):,} bytes of {kind}", file=sys.stderr)


class TimedStreamer:
    """Writes text as it comes and notes when: transformers hands over the prompt first, then token by token."""

    def __init__(self, tokenizer, prompt_tokens: int):
        from transformers import TextStreamer

        self.text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prompt_tokens = prompt_tokens
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())
        self.text.put(value)

    def end(self) -> None:
        self.text.end()

    def summary(self) -> str:
        """Tokens and tokens/s of prompt and continuation; the first token counts to the prompt, whose read made it."""
        prefill, decode = self.times[1] - self.times[0], self.times[-1] - self.times[1]
        steps = len(self.times) - 2
        speed = f", {steps / decode:.1f} tokens/s" if steps else ""
        return (
            f"read {self.prompt_tokens} tokens in {prefill:.2f} s ({self.prompt_tokens / prefill:.0f} tokens/s), "
            f"wrote {steps + 1}{speed}"
        )
