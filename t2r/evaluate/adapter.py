"""lm-eval around a loaded model: its tasks read from files that are here, its requests answered by our scoring.

Nothing but `harness.py` imports this module: lm-eval is an extra.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import datasets
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from t2r.evaluate.scoring import Passage, Score, Text, arrange, continue_texts, encode, encode_pairs, score, score_texts

OWN_TASKS = Path(__file__).parents[1] / "recipes" / "tasks"
SEED = 1234  # lm-eval's own default for the choice of examples
PAIRS = 4096  # requests that are encoded at once

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# lm-eval compiles the template of a prompt anew for every item: half of a short task's time on the host
utils.env.from_string = cache(utils.env.from_string)


class Encoded:
    """The texts of one task's requests, which are the same for every model: encoding thousands of prompts with five
    examples each takes longer than a small model needs to read them."""

    def __init__(self) -> None:
        self.key, self.texts = None, []

    def of(self, tokenizer, pairs: list[tuple[str, str]], max_length: int) -> list[Text]:
        if (pairs, max_length) != self.key:
            parts = (pairs[at : at + PAIRS] for at in range(0, len(pairs), PAIRS))  # tokens as lists are large
            passages = (cut(*pair, max_length) for part in parts for pair in encode_pairs(tokenizer, part))
            self.key, self.texts = (pairs, max_length), arrange(passages)
        return self.texts


class Adapter(TemplateLM):
    """A transformers model as lm-eval sees it. max_length: tokens of a request; its start is cut off beyond that.
    encoded: what an earlier model's requests were encoded to."""

    def __init__(
        self, model, tokenizer, batch_size: int | None, max_length: int, encoded: Encoded | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.max_length = model, tokenizer, batch_size, max_length
        self.encoded = encoded or Encoded()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:
            return encode(self.tokenizer, [string])[string]
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts = self.encoded.of(self.tokenizer, [request.args for request in requests], self.max_length)
        return results(score_texts(self.model, texts, self.batch_size))

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        return self.scores([cut([*context, *rest], len(context), self.max_length) for _, context, rest in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Each text in windows of max_length tokens that do not overlap, as lm-eval's word perplexity wants it."""
        windows, counts = [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            own = [make_disjoint_window(window) for window in cut]
            windows += [Passage([*context, *rest], len(context)) for context, rest in own]
            counts.append(len(own))
        found = iter(self.scores(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        tokens = encode(self.tokenizer, [request.args[0] for request in requests])
        texts: dict[int, str] = {}
        for group in groups.values():
            options = dict(normalize_gen_kwargs(requests[group[0]].args[1], 256))
            stops = handle_stop_sequences(options.pop("until"), eos=None)
            new = options.pop("max_gen_toks")
            if not options.pop("do_sample"):
                options = {}
            prompts = [tokens[requests[i].args[0]][-(self.max_length - new) :] for i in group]
            sampling = {"do_sample": True, **options} if options else {}
            written = continue_texts(self.model, self.tokenizer, prompts, new, stops, self.batch_size, **sampling)
            texts.update(zip(group, (one.text for one in written), strict=True))
        return [texts[i] for i in range(len(requests))]

    def scores(self, passages: list[Passage]) -> list[tuple[float, bool]]:
        return results(score(self.model, passages, self.batch_size))


def cut(ids: list[int], start: int, max_length: int) -> Passage:
    """What of a request is read: its last max_length + 1 tokens, the last of which is only predicted."""
    drop = max(0, len(ids) - max_length - 1)
    return Passage(ids[drop:], max(1, start - drop))


def results(scores: list[Score]) -> list[tuple[float, bool]]:
    return [(-s.loss, s.greedy) for s in scores]


@cache
def manager() -> TaskManager:
    return TaskManager(include_path=str(OWN_TASKS))


def known_tasks() -> list[str]:
    return manager().all_tasks


class Splits(dict):
    """Splits of a data set; one that is not there is empty: a task opens its training split even if it asks nothing of
    it."""  # fmt: skip

    def __missing__(self, split):
        return next(iter(self.values())).select([])


@contextmanager
def reading(load) -> Iterator[None]:
    """Within, lm-eval's tasks get their data sets from `load(path, name, original)` in place of datasets.load_dataset.

    original: calls the true one.
    """
    original = datasets.load_dataset

    def replaced(path, name=None, **options):
        return load(path, name, lambda: original(path, name, **options))

    datasets.load_dataset = replaced
    try:
        yield
    finally:
        datasets.load_dataset = original


def run(adapter: TemplateLM, tasks: dict, limit: int | None, unsafe: bool = False) -> dict:
    """lm-eval's results and samples of loaded tasks. limit: of each task's items."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)
    return evaluator.evaluate(
        adapter, tasks, limit=limit, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=unsafe
    )
