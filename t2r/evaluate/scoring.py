"""The one place where texts are scored and continued for a task: right-padded batches, logits only where needed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

import numpy
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


class Text(NamedTuple):
    """What a model reads once. asked: for each passage that it serves, the passage's number, the place from which its
    continuation is predicted, and the continuation."""  # fmt: skip

    ids: numpy.ndarray
    asked: list[tuple[int, int, list[int]]]


def arrange(passages: Iterable[Passage]) -> list[Text]:
    """The texts to read for these passages, longest first. Those that differ in their last token only, such as the
    letters of a question's options, share one. It is the same for every model, and little beside the passages."""
    shared: dict[bytes, list[tuple[int, int, list[int]]]] = {}
    for i, passage in enumerate(passages):
        read = numpy.array(passage.ids[:-1], dtype=numpy.int32).tobytes()
        shared.setdefault(read, []).append((i, passage.start - 1, passage.ids[passage.start :]))
    texts = [Text(numpy.frombuffer(read, dtype=numpy.int32), asked) for read, asked in shared.items()]
    return [texts[i] for i in longest_first([len(text.ids) for text in texts])]


def score(model, passages: Iterable[Passage], batch_size: int | None) -> list[Score]:
    """Score each passage, in the order given."""
    return score_texts(model, arrange(passages), batch_size)


@torch.inference_mode()
def score_texts(model, texts: list[Text], batch_size: int | None) -> list[Score]:
    """Score the passages of arranged texts, in the passages' own order.

    Batches are padded on the right: no token of a causal model sees what follows it, so a score depends neither on the
    padding nor on the batch.
    """
    scores: dict[int, Score] = {}
    read = lambda batch: scores.update(score_batch(model, batch))  # noqa: E731
    batches(texts, batch_size, model.device, read, length=lambda text: len(text.ids))
    return [scores[i] for i in range(len(scores))]


def score_batch(model, batch: Sequence[Text]) -> Iterator[tuple[int, Score]]:
    """(number, score) of each passage of the texts, the longest of which comes first."""
    ids = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.long)
    for row, text in enumerate(batch):
        ids[row, : len(text.ids)] = torch.from_numpy(text.ids.astype(numpy.int64))
    asked = [
        (row, first + n, token)
        for row, text in enumerate(batch)
        for _, first, rest in text.asked
        for n, token in enumerate(rest)
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
    for i, _, rest in (own for text in batch for own in text.asked):
        loss, right = map(sum, zip(*islice(results, len(rest)), strict=True))
        yield i, Score(loss, right == len(rest), int(right))


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
