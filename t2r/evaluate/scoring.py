"""The one place where texts are scored and continued for a task: right-padded batches, logits only where needed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from t2r.errors import UserError

ROWS = 256  # rows of logits that are turned into float32 losses at once
AUTO = {"cuda": 128, "cpu": 8}  # where a batch size of `auto` begins


class Passage(NamedTuple):
    """Token ids; those from `start` on are the continuation to score. start >= 1."""

    ids: list[int]
    start: int


class Score(NamedTuple):
    """loss: -log p of the continuation, nats, summed. right: how many of its tokens are the model's first choice;
    greedy: whether all of them are."""

    loss: float
    greedy: bool
    right: int


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target. logits [..., V] of any dtype, targets [...] -> [...] float32, on the logits' device.

    Works through a few rows at a time: the float32 copy of a long text's logits would be the largest tensor of all.
    """
    pieces = zip(logits.flatten(0, -2).split(ROWS), targets.flatten().split(ROWS), strict=True)
    parts = [part.float().logsumexp(-1) - part.gather(-1, target[:, None])[:, 0].float() for part, target in pieces]
    return torch.cat(parts).view(targets.shape)


def encode(tokenizer, texts: Iterable[str]) -> dict[str, list[int]]:
    """Text -> its tokens as a model reads it from its start: with BOS where the tokenizer adds it, but not twice.

    Each distinct text is encoded once, many in one call, which a fast tokenizer spreads over the cores.
    """
    found, bos = {}, tokenizer.bos_token
    groups: dict[bool, list[str]] = {True: [], False: []}
    for text in dict.fromkeys(texts):
        groups[not (bos and text.startswith(bos))].append(text)
    for special, group in groups.items():
        for at in range(0, len(group), 1024):  # what a tokenizer returns is many times what is kept of it
            part = group[at : at + 1024]
            found.update(zip(part, tokenizer(part, add_special_tokens=special)["input_ids"], strict=True))
    return found


def encode_pairs(tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Passage]:
    """Each (context, continuation) as one text, split where the context's own tokens end. Spaces between them belong to
    the continuation."""
    contexts = [context.rstrip() for context, _ in pairs]
    tokens = encode(tokenizer, [*filter(None, contexts), *(context + rest for context, rest in pairs)])
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    passages = []
    for stripped, (context, rest) in zip(contexts, pairs, strict=True):
        whole, start = tokens[context + rest], len(tokens[stripped]) if stripped else 0
        if start == 0:
            whole, start = ([first, *whole] if whole[0] != first else whole), 1
        passages.append(Passage(whole, start))
    return passages


class Written(NamedTuple):
    """ended: with the end-of-text token, by itself."""

    text: str
    ended: bool


def batches(
    items: Sequence,
    size: int | None,
    device: torch.device,
    work: Callable[[Sequence], None],
    length: Callable[[object], int] = lambda item: 1,
) -> None:
    """work(batch) for consecutive batches of `size` items, None: as many as the device's memory holds, found by
    halving where it ends. work must leave nothing behind when it fails.

    length: of an item in tokens; items come longest first, and one of less than half the first's length begins the next
    batch, so that little is read that is only padding. Raises UserError where not even one item fits.
    """
    room = size or AUTO.get(device.type, 8)
    at = 0
    while at < len(items):
        bound = length(items[at]) / 2
        batch = list(takewhile(lambda item, bound=bound: length(item) >= bound, items[at : at + room]))
        try:
            work(batch)
        except torch.OutOfMemoryError as error:
            if size is not None or len(batch) == 1:
                fit = "not even one item" if len(batch) == 1 else f"not a batch of {len(batch)}"
                close = "auto" if len(batch) > 1 else None
                raise UserError(
                    f"out of memory on {device}: {fit} fits", where="--batch-size", nearest=close
                ) from error
        else:
            at += len(batch)
            continue
        torch.cuda.empty_cache()  # here, where the failed attempt's tensors are gone
        room = len(batch) // 2


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The order of work: texts of like length share a batch, and memory that does not suffice shows at once."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


@torch.inference_mode()
def score(model, passages: list[Passage], batch_size: int | None) -> list[Score]:
    """Score each passage, in the order given.

    Passages that differ in their last token only, such as the letters of a question's options, are read once. Batches
    are padded on the right: no token of a causal model sees what follows it, so a score depends neither on the padding
    nor on the batch.
    """
    shared: dict[tuple[int, ...], list[int]] = {}
    for i, passage in enumerate(passages):
        shared.setdefault(tuple(passage.ids[:-1]), []).append(i)
    texts = list(shared.items())
    order = [texts[i] for i in longest_first([len(read) for read, _ in texts])]
    scores: dict[int, Score] = {}
    read = lambda batch: scores.update(score_batch(model, passages, batch))  # noqa: E731
    batches(order, batch_size, model.device, read, length=lambda text: len(text[0]))
    return [scores[i] for i in range(len(passages))]


def score_batch(
    model, passages: list[Passage], batch: Sequence[tuple[tuple[int, ...], list[int]]]
) -> Iterator[tuple[int, Score]]:
    """(i, score) of passages[i] for each (tokens to read, the passages i that they belong to), the longest first."""
    ids = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.long)
    for row, (read, _) in enumerate(batch):
        ids[row, : len(read)] = torch.tensor(read)
    own = [(row, i) for row, (_, own) in enumerate(batch) for i in own]
    asked = [
        (row, passages[i].start + n - 1, token) for row, i in own for n, token in enumerate(continuation(passages[i]))
    ]
    # the head is as large as the rest of a small model: it runs only where some passage's continuation is predicted
    places = torch.tensor(sorted({place for _, place, _ in asked}), device=model.device)
    logits = model(ids.to(model.device), use_cache=False, logits_to_keep=places).logits
    rows, columns, targets = torch.tensor(asked, device=logits.device).T.contiguous()
    columns, parts = torch.searchsorted(places, columns), []
    for row, column, target in zip(rows.split(ROWS), columns.split(ROWS), targets.split(ROWS), strict=True):
        given = logits[row, column]
        parts.append(torch.stack([losses(given, target), (given.argmax(-1) == target).float()]))
    results = iter(torch.cat(parts, dim=1).T.tolist())  # the only wait for the device
    for _, i in own:
        loss, right = map(sum, zip(*islice(results, len(continuation(passages[i]))), strict=True))
        yield i, Score(loss, right == len(continuation(passages[i])), int(right))


def continuation(passage: Passage) -> list[int]:
    return passage.ids[passage.start :]


@torch.inference_mode()
def continue_texts(
    model, tokenizer, prompts: list[list[int]], new: int, stops: Sequence[str], batch_size: int | None, **sampling
) -> list[Written]:
    """The continuation of each prompt (token ids), up to `new` tokens, the end-of-text token or the first of `stops`.

    Greedy without `sampling`, which are options of transformers' generate. Prompts are padded on the left and masked.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    longest = max((len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops), default=0) + 2

    class Stopped(StoppingCriteria):
        def __init__(self, prompt: int) -> None:
            self.prompt = prompt

        def __call__(self, ids, scores, **kwargs):
            tails = tokenizer.batch_decode(ids[:, max(self.prompt, ids.shape[1] - longest) :])
            return torch.tensor([any(stop in tail for stop in stops) for tail in tails], device=ids.device)

    order = longest_first([len(prompt) for prompt in prompts])
    texts: dict[int, Written] = {}

    def work(batch: Sequence[int]) -> None:
        width = len(prompts[batch[0]])
        ids, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        end = tokenizer.eos_token_id
        written = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new, eos_token_id=end,
            pad_token_id=end, stopping_criteria=StoppingCriteriaList([Stopped(width)] if stops else []),
            **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **sampling},
        )[:, width:]  # fmt: skip
        for i, row in zip(batch, written.tolist(), strict=True):
            ended = end in row
            row = row[: row.index(end)] if ended else row
            text = tokenizer.decode(row, skip_special_tokens=True)
            for stop in filter(None, stops):
                text = text.partition(stop)[0]
            texts[i] = Written(text, ended)

    batches(order, batch_size, model.device, work, length=lambda i: len(prompts[i]))
    return [texts[i] for i in range(len(prompts))]
