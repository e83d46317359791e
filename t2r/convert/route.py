"""The routers of long slots, fitted to a source before anything is converted.

What a token will be read for later shows in what its layer reads at that token: on SmolLM2-135M a linear map of the
mixer's input predicts how much attention the token gets from the next few hundred queries beyond its neighbourhood,
with a correlation of about 0.9 in most heads. What is lost with a token grows with the square of the attention it would
have got, so a router is the map to the log of the squares' sum, found by least squares with the source's own attention
as the target, and a threshold: the share of tokens that it sends to the long slots.

Shape legend: N texts, T tokens, H kv heads, G query heads per kv head, D head dim, W hidden size.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2r.convert.allocate import blocks
from t2r.convert.checks import gsa_mixers, hooked
from t2r.convert.paged import Pages
from t2r.convert.source import Source
from t2r.convert.verify import empty_model, load_source, softmax_config
from t2r.convert.writer import available_ram
from t2r.families import FAMILIES, trained_context, window
from t2r.modeling.configuration import GSAConfig

NEAR, FAR = 48, 304  # distances between which attention counts as read later
FLOOR = 1e-3  # squared attention, summed over those queries, under which a token counts as read by nobody
RIDGE = 1e-3  # of the mean square of the input's channels
TEXTS, CONTEXT = 16, 1024


def fit_routers(source: Source, gsa: dict[int, GSAConfig], share: float, text: Sequence[str]) -> dict[str, Tensor]:
    """Name -> values of the router's tensors of each layer with long slots. gsa: the layers with slots.

    share: of a text's tokens that each head sends to its long slots. text: as DataConfig.train. On a GPU if there is
    one and the memory to load the source, else a layer at a time. Raises UserError where no text is long enough.
    """
    context = min(CONTEXT, trained_context(source.config))
    ids = blocks(source.load_tokenizer(), text, TEXTS, context, otherwise="--long-text shipped:train")
    layers = {i: layer for i, layer in gsa.items() if layer.long_slots}
    size = torch.bfloat16.itemsize * sum(torch.Size(source.shape(name)).numel() for name in source.names())
    ram = available_ram()
    if torch.cuda.is_available() and 2 * size < torch.cuda.mem_get_info()[0] and (ram is None or 2 * size < ram):
        model, ids = load_source(source, torch.bfloat16).cuda(), ids.cuda()
    else:
        model = Pages(empty_model(softmax_config(source)), source).model
    path = FAMILIES[source.config.model_type].attention
    found, inputs = {}, {}

    def note(module, query: Tensor, key: Tensor, scaling: float) -> None:
        i = module.layer_idx
        reach = window(source.config, i)
        mass = torch.stack([read_later(*one, scaling, reach) for one in zip(query, key, strict=True)])
        fitted = fit(inputs.pop(i), mass, layers[i].sinks, share)
        found.update({f"model.{path.format(i)}.{name}": value for name, value in fitted.items()})

    def keep(module, args, kwargs) -> None:
        inputs[module.layer_idx] = kwargs["hidden_states"]

    mixers = gsa_mixers(model, layers).values()
    with torch.inference_mode(), hooked(mixers, before=keep), watched(mixers, note):
        model.model(ids, use_cache=False)
    return found


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


def read_later(query: Tensor, key: Tensor, scaling: float, reach: int | None) -> Tensor:
    """Squares of the attention that each token of one text gets from the queries NEAR to FAR tokens later, summed, the
    mean over a group's heads. query [H*G,T,D] and key [H,T,D] after rotary embedding -> [H,T] float32."""
    H, T = key.shape[:2]
    at = torch.arange(T, device=key.device)
    distance, (near, far) = at[:, None] - at, distances(T)
    hidden = (distance < 0) | (distance >= (reach or T))
    later = (distance >= near) & (distance < far)
    found = []
    for q, k in zip(query.unflatten(0, (H, -1)), key, strict=True):
        weights = (scaling * q @ k.mT).float().masked_fill(hidden, -torch.inf).softmax(-1)
        found.append((weights.square().mean(0) * later).sum(0))
    return torch.stack(found)


def fit(hidden: Tensor, mass: Tensor, sinks: int, share: float) -> dict[str, Tensor]:
    """Router of one layer: hidden [N,T,W], the mixer's input, and mass [N,H,T] of read_later -> router.weight [H,W] and
    router.bias [H], float32 on the CPU. Its outputs have deviation 1 and are positive for `share` of the tokens."""
    told = slice(sinks, hidden.shape[1] - distances(hidden.shape[1])[1])  # tokens whose later readers are in the text
    x, y = hidden[:, told].flatten(0, 1).double(), torch.log(mass[:, :, told] + FLOOR).mT.flatten(0, 1).double()
    middle = x.mean(0)
    x = x - middle
    square = x.mT @ x
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    weight = torch.linalg.solve(square, x.mT @ (y - y.mean(0))).mT
    scores = hidden[:, sinks:].flatten(0, 1).double() @ weight.mT
    deviation = scores.std(0)
    return {
        "router.weight": (weight / deviation[:, None]).float().cpu(),
        "router.bias": (-torch.quantile(scores, 1 - share, dim=0) / deviation).float().cpu(),
    }
