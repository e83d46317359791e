"""Scores for eviction, fitted to a source before anything is converted.

What a token will be read for later shows in what its layer reads at that token: on SmolLM2-135M a linear map of the
mixer's input predicts how much attention the token gets from the next few hundred queries beyond its neighbourhood.
What is lost with a token grows with the square of the attention it would have got. The score is the log of what is to
be expected of that, by Poisson regression with the source's own attention as the target: a token that one text in ten
will need is worth a tenth of one that all need, where the mean of logs would make it worth nothing. It is fitted to the
root of the squares' sum, which a few tokens do not rule. Of the text half has lookups (t2r.data.lookups): in plain text
hardly any token is needed in its own right far away, so plain text does not tell which ones could be.

How fast a token's worth fades with its age, and how many of the last tokens a head is better off keeping whatever their
score, is chosen for each head by simulation: of a few settings that which loses the least squared attention on texts
with lookups, which tells more of them apart than plain text does.

Shape legend: N texts, T tokens, H kv heads, G query heads per kv head, D head dim, W hidden size, K settings, M slots.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2r.convert.checks import gsa_mixers, hooked
from t2r.convert.paged import Pages
from t2r.convert.source import Source
from t2r.convert.verify import empty_model, load_source, softmax_config
from t2r.convert.writer import available_ram
from t2r.data import lookups, sources
from t2r.errors import UserError
from t2r.families import FAMILIES, trained_context, window
from t2r.kernels.gsa import SlotState
from t2r.kernels.gsa.evict import evict
from t2r.modeling.configuration import GSAConfig

NEAR, FAR = 40, 512  # distances between which attention counts as read later
RIDGE = 1e-3  # of the mean square of the input's channels
STEPS = 60  # of the regression at most
TEXTS, CONTEXT = 32, 1024
TRIED = 8  # of the texts: settings are chosen on those of them that have lookups, with scores fitted to the others
RECENT = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)  # of the slots beside the sinks; 1 is a plain window
FADING = tuple(2.0**-e for e in range(5, 11))  # of the score, in nats a token
AWAY = 100  # tokens, from which on attention counts REACH times where settings are chosen
REACH = {"near": 1.0, "far": 4.0}


def fit_scores(source: Source, gsa: dict[int, GSAConfig], text: Sequence[str], reach: str) -> dict[str, Tensor]:
    """Name -> values of the tensors with which each layer that evicts by score does so. gsa: the layers with slots.

    text: as DataConfig.train; every second of its documents is read with lookups. reach: of REACH. On a GPU if there is
    one and the memory to load the source, else a layer at a time. Raises UserError where no text is long enough.
    """
    context = min(CONTEXT, trained_context(source.config))
    otherwise = "--eviction-text shipped:train"
    ids = score_texts(source.load_tokenizer(), text, TEXTS, context, otherwise=otherwise)
    size = torch.bfloat16.itemsize * sum(torch.Size(source.shape(name)).numel() for name in source.names())
    ram = available_ram()
    if torch.cuda.is_available() and 2 * size < torch.cuda.mem_get_info()[0] and (ram is None or 2 * size < ram):
        model, ids = load_source(source, torch.bfloat16).cuda(), ids.cuda()
    else:
        model = Pages(empty_model(softmax_config(source)), source).model
    path = FAMILIES[source.config.model_type].attention
    fitted = fit_mixers(model, ids, {i: [layer] for i, layer in gsa.items() if layer.scored}, reach)
    return {f"model.{path.format(i)}.{name}": x for i, (one,) in fitted.items() for name, x in one.items()}


def score_texts(tokenizer, text: Sequence[str], texts: int, context: int, **options) -> Tensor:
    """`blocks` of the text, of which every second one has lookups."""
    return blocks(tokenizer, [kind + spec for spec in text for kind in ("", lookups.NEAR)], texts, context, **options)


@torch.inference_mode()
def fit_mixers(
    model, ids: Tensor, options: dict[int, list[GSAConfig]], reach: str
) -> dict[int, list[dict[str, Tensor]]]:
    """The tensors of each layer, for each of the ways in which it could have slots, on what `model` reads in ids [N,T].
    model: the source."""
    found, inputs = {}, {}

    def note(module, query: Tensor, key: Tensor, scaling: float) -> None:
        i, hidden = module.layer_idx, inputs.pop(module.layer_idx)
        texts = [Attention(*one, scaling, window(model.config, i)) for one in zip(query, key, strict=True)]
        found[i] = fit(hidden, texts, options[i], reach)

    def keep(module, args, kwargs) -> None:
        inputs[module.layer_idx] = kwargs["hidden_states"]

    mixers = gsa_mixers(model, options).values()
    with hooked(mixers, before=keep), watched(mixers, note):
        model.model(ids, use_cache=False)
    return found


def blocks(tokenizer, specs: Sequence[str], texts: int, context: int, otherwise: str = "a smaller --context") -> Tensor:
    """ids [N,T]: the first `context` tokens of documents that have so many, of each spec in turn, `texts` in all. Where
    there are fewer documents, as in a text file, which is one, their later pieces follow.
    otherwise: what a user could do where none has."""
    size = 16 * context  # characters of a piece: in any script enough for its tokens

    def piece(source: sources.Source, document: str, n: int) -> Iterator[list[int]]:
        ids = tokenizer(source.finish(document[n * size : (n + 1) * size])).input_ids[:context]
        if len(ids) == context:
            yield ids

    def long_enough(spec: str) -> Iterator[list[int]]:
        long = []
        for source in sources.resolve([spec]):
            for document in source.documents("text"):
                if isinstance(document, str):
                    yield from piece(source, document, 0)
                    if len(document) > size and len(long) < texts:
                        long.append((source, document))
        for n in range(1, max((len(document) for _, document in long), default=0) // size + 1):
            for source, document in long:
                yield from piece(source, document, n)

    in_turn = zip_longest(*map(long_enough, specs))
    found = list(islice((ids for each in in_turn for ids in each if ids), texts))
    if not found:
        raise UserError(f"no document of {context} tokens", where=", ".join(specs), nearest=otherwise)
    return torch.tensor(found)


@contextmanager
def watched(mixers, note: Callable) -> Iterator[None]:
    """Within, note(module, query [N,H*G,T,D], key [N,H,T,D], scaling) is called for the attention of each mixer."""
    configs = {module: module.config for module in mixers}

    def attend(module, query, key, value, mask, scaling=None, **options):
        note(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **options)

    ALL_ATTENTION_FUNCTIONS.register("t2r_watched", attend)
    for module, config in configs.items():
        module.config = copy.copy(config)
        module.config._attn_implementation = "t2r_watched"
    try:
        yield
    finally:
        for module, config in configs.items():
            module.config = config


def distances(T: int) -> tuple[int, int]:
    """NEAR and FAR, or less where texts of T tokens are too short for them."""
    far = min(FAR, T // 2)
    return min(NEAR, far // 4), far


class Attention(NamedTuple):
    """The source's attention on one text: query [H*G,T,D] and key [H,T,D] after rotary embedding, the factor on their
    product, and how many tokens back it reaches (None: all)."""

    query: Tensor
    key: Tensor
    scaling: float
    reach: int | None

    def squares(self) -> Iterator[Tensor]:
        """[T,T] float32 of each kv head: squared weight of each token (column) at each query, mean over its group."""
        H, T = self.key.shape[:2]
        at = torch.arange(T, device=self.key.device)
        distance = at[:, None] - at
        hidden = (distance < 0) | (distance >= (self.reach or T))
        for q, k in zip(self.query.unflatten(0, (H, -1)), self.key, strict=True):
            weights = (self.scaling * q @ k.mT).float().masked_fill(hidden, -torch.inf).softmax(-1)
            yield weights.square().mean(0)

    def read_later(self) -> Tensor:
        """[H,T]: squared weights of each token at the queries NEAR to FAR tokens later, summed."""
        at = torch.arange(self.key.shape[1], device=self.key.device)
        distance, (near, far) = at[:, None] - at, distances(len(at))
        later = (distance >= near) & (distance < far)
        return torch.stack([(squares * later).sum(0) for squares in self.squares()])


def fit(hidden: Tensor, texts: list[Attention], options: list[GSAConfig], reach: str) -> list[dict[str, Tensor]]:
    """The tensors of one layer for each number of slots that it could have, float32 on the CPU. hidden [N,T,W]: the
    mixer's input; texts: what it makes of it; reach: of REACH."""
    T, sinks = hidden.shape[1], options[0].sinks
    told = slice(sinks, T - distances(T)[1])  # tokens whose later readers are in the text
    later = torch.stack([text.read_later() for text in texts])
    x, y = hidden[:, told].double(), later[:, :, told].mT.double().sqrt()
    tried = max(1, min(TRIED, len(texts) // 2))
    rest = max(1, len(texts) - tried)  # a single text has to do for both
    asking = list(range(len(texts) - 1, len(texts) - 1 - tried, -2))  # every second one
    score = hidden[asking].double() @ log_mean(x[:rest], y[:rest]).mT
    weight, centre = log_mean(x, y), hidden[:, sinks:].double().mean((0, 1))
    found = []
    for gsa in options:
        recent, fading = choose(score, [texts[n] for n in asking], gsa, REACH[reach])
        tensors = {"bonus.weight": weight / fading[:, None], "recent": recent}
        tensors["bonus.bias"] = -(tensors["bonus.weight"] @ centre)
        found.append({name: x.float().cpu() for name, x in tensors.items()})
    return found


def log_mean(x: Tensor, y: Tensor) -> Tensor:
    """Weights [H,W] of the linear map from x [N,T,W] whose exponential, times a constant, is what y [N,T,H] >= 0 is on
    average: Poisson regression, the least sum of e^{w x + b} - y (w x + b), with a ridge.

    The inputs are whitened first, where a quasi-Newton method takes a few dozen cheap steps.
    """
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    x, y = x - x.mean(0), y / y.mean(0).clamp(min=torch.finfo(y.dtype).tiny)
    square = x.mT @ x
    ridge = RIDGE * square.diagonal().mean()
    square.diagonal().add_(ridge)
    whitening = torch.linalg.inv(torch.linalg.cholesky(square)).mT * len(x) ** 0.5  # [W,W]
    white = x @ whitening
    with torch.inference_mode(False), torch.enable_grad():
        white, whitening, y = white.clone(), whitening.clone(), y.clone()  # autograd takes no inference tensors
        u = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        b = torch.zeros(y.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS([u, b], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

        def deviance() -> Tensor:
            solver.zero_grad()
            log_rate = (white @ u + b).clamp(max=30.0)
            total = (log_rate.exp() - y * log_rate).mean(0) + ridge / (2 * len(x)) * (whitening @ u).square().sum(0)
            total.sum().backward()
            return total.sum()

        solver.step(deviance)
        return (whitening @ u).detach().mT


def choose(score: Tensor, texts: list[Attention], gsa: GSAConfig, times: float) -> tuple[Tensor, Tensor]:
    """(tokens that stay in any case, fading of the score a token) of each head [H], with score [N,T,H] in nats: what
    loses least of the texts' squared attention, of which that from AWAY on counts so many times."""
    (N, T, H), M, room = score.shape, gsa.slots, gsa.ring - gsa.sinks
    settings = [(max(1, int(share * room)), rate) for share in RECENT for rate in FADING]
    recent, fading = torch.tensor(settings, device=score.device, dtype=score.dtype).T
    state = SlotState.empty(N, H * len(settings), M, 1, 1, score.device, ranked=True)
    at = torch.arange(T, device=score.device)
    bonus = (score[..., None] / fading).flatten(2)
    turn, *_ = evict(bonus, recent.repeat(H), at.expand(N, T), None, state.rank, state.stamp, gsa.ring, gsa.sinks)
    end = next_turn(turn).unflatten(2, (H, -1))
    lost = score.new_zeros(H, len(settings))
    counts = torch.where(at[:, None] - at >= AWAY, times, 1.0)
    for n, text in enumerate(texts):
        for h, squares in enumerate(text.squares()):
            rest = (counts * squares).flip(0).cumsum(0).flip(0)
            rest = torch.nn.functional.pad(rest, (0, 0, 0, 1))  # [T+1,T], from a query on
            lost[h] += rest[end[n, :, h], at[:, None]].sum(0)
    best = lost.argmin(1)
    return recent[best], fading[best]


def next_turn(turn: Tensor) -> Tensor:
    """turn [N,T,H] -> [N,T,H] int64: the token that takes the same slot next, T if none does."""
    T = turn.shape[1]
    order = (turn.long() * T + torch.arange(T, device=turn.device)[:, None]).sort(dim=1).values  # by slot, then by time
    slot, token = order // T, order % T
    after = torch.where(slot[:, 1:] == slot[:, :-1], token[:, 1:], T)
    after = torch.nn.functional.pad(after, (0, 0, 0, 1), value=T)
    return torch.empty_like(token).scatter_(1, token, after)
