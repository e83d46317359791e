"""What eviction by score keeps of a list that is asked for later, and of plain text, without training.

    python docs/results/reach.py fit SOURCE TEXT OUT.pt [--slots 0=32,1-29=64] [--reach far]
                                                       [--context T] [--far T] [--episode CHARS]
    python docs/results/reach.py read SOURCE BOOKS WIKI OUT.json FIT.pt [FIT.pt ...]

fit: the tensors of each layer that `t2r convert --eviction score` makes from TEXT. read: the share of the source's
squared attention that lies on tokens still held: at the answer of a list of eight pairs, on the pair, so many tokens of
BOOKS later; and in articles of WIKI on all tokens 40 and more back, without sinks. Over all layers and heads.
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path

import torch

from t2r.convert import evict
from t2r.convert.checks import gsa_mixers, hooked
from t2r.convert.plan import layer_numbers
from t2r.convert.source import open_source
from t2r.convert.verify import load_source
from t2r.data import lookups
from t2r.data.sources import resolve
from t2r.evaluate.recall import make_facts
from t2r.kernels.gsa import SlotState
from t2r.modeling.configuration import GSAConfig, fit_layers, preset

DISTANCES, LISTS, PAIRS, ARTICLES, LENGTH, NEAR = (128, 256, 512, 1024), 8, 8, 4, 2048, 40


def documents(path: str):
    return (text for source in resolve([path]) for text in source.documents("text"))


def fit(source, layer_slots: str, text: str, context: int, far: int, episode: int, reach: str) -> dict:
    """{layer: (its choices, its tensors)}"""
    lookups.EPISODE, evict.FAR = episode, far
    model = load_source(source, torch.float32)
    slots = layer_numbers(layer_slots, model.config.num_hidden_layers, "--slots")
    gsa = fit_layers(preset("exact", 64, None, "score"), model.config, slots, []).gsa_layers(model.config)
    ids = evict.score_texts(source.load_tokenizer(), [text], evict.TEXTS, context)
    fitted = evict.fit_mixers(model, ids, {i: [layer] for i, layer in gsa.items()}, reach)
    return {i: (gsa[i].to_dict(), tensors) for i, (tensors,) in fitted.items()}


class Reader:
    """Reads texts with the source and counts what each fit would still hold. totals: (text, fit) -> [held, all]."""

    def __init__(self, model, fits: dict[str, dict]) -> None:
        self.model, self.fits, self.totals = model, fits, {}

    def taken(self, hidden: torch.Tensor, gsa: GSAConfig, tensors: dict) -> torch.Tensor:
        """[H,T]: the token that takes the slot of each token."""
        bonus = hidden @ tensors["bonus.weight"].mT + tensors["bonus.bias"]
        state = SlotState.empty(1, bonus.shape[-1], gsa.slots, 1, 1, "cpu", ranked=True)
        at = torch.arange(hidden.shape[1])[None]
        turn, *_ = evict.evict(bonus, tensors["recent"], at, None, state.rank, state.stamp, gsa.ring, gsa.sinks)
        return evict.next_turn(turn)[0].T

    @torch.inference_mode()
    def read(self, ids: list[int], name: str, queries: slice, tokens: slice, near: int = 0) -> None:
        inputs, at = {}, torch.arange(len(ids))
        there = (at[:, None] - at >= near)[queries, tokens]

        def keep(module, args, kwargs) -> None:
            inputs[module.layer_idx] = kwargs["hidden_states"]

        def note(module, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
            i, hidden = module.layer_idx, inputs.pop(module.layer_idx)
            squares = torch.stack(list(evict.Attention(query[0], key[0], scaling, None).squares()))
            squares = squares[:, queries, tokens] * there
            for label, fitted in self.fits.items():
                gsa, tensors = fitted[i]
                held = self.taken(hidden, GSAConfig(**gsa), tensors)[:, None, tokens] > at[queries, None]
                total = self.totals.setdefault((name, label), [0.0, 0.0])
                total[0] += (squares * held).sum().item()
                total[1] += squares.sum().item()

        mixers = gsa_mixers(self.model, self.fits[next(iter(self.fits))]).values()
        with hooked(mixers, before=keep), evict.watched(mixers, note):
            self.model.model(torch.tensor([ids]), use_cache=False)


def read(source, books: str, wiki: str, fits: dict[str, dict], seed: int) -> dict:
    reader, tokenizer = Reader(load_source(source, torch.float32), fits), source.load_tokenizer()
    rng, end = random.Random(seed), tokenizer.encode(".", add_special_tokens=False)
    filler = [token for text in islice(documents(books), 8) for token in tokenizer(text).input_ids]
    for distance in DISTANCES:
        for i in range(LISTS):
            facts, listed, begins = make_facts(tokenizer, PAIRS, rng), filler[:20], []  # sinks are none of the list's
            for fact in facts:
                begins.append(len(listed))
                listed = [*listed, *fact.question, *fact.answer, *end]
            begins.append(len(listed))
            asked, begin = facts[i % PAIRS], rng.randrange(len(filler) - distance)
            ids = [*listed, *filler[begin : begin + distance], *asked.question, *asked.answer]
            answer = slice(len(ids) - len(asked.answer) - 1, len(ids) - 1)
            reader.read(ids, f"{distance} tokens later", answer, slice(begins[i % PAIRS], begins[i % PAIRS + 1]))
    long = (tokenizer(text).input_ids[:LENGTH] for text in documents(wiki))
    for ids in islice((ids for ids in long if len(ids) == LENGTH), ARTICLES):
        reader.read(ids, "articles", slice(512, None), slice(4, None), NEAR)
    return {f"{name}: {label}": held / total for (name, label), (held, total) in reader.totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("fit")
    for name in ("source", "text", "out"):
        one.add_argument(name)
    one.add_argument("--slots", default="0-29=64")
    for name, value in (("context", 1024), ("far", 512), ("episode", 3600)):
        one.add_argument(f"--{name}", type=int, default=value)
    one.add_argument("--reach", choices=evict.REACH, default="near")
    one = verbs.add_parser("read")
    for name in ("source", "books", "wiki", "out"):
        one.add_argument(name)
    one.add_argument("fits", nargs="+")
    one.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    source = open_source(arguments.source)
    if arguments.verb == "fit":
        words = arguments.slots, arguments.text, arguments.context, arguments.far, arguments.episode, arguments.reach
        torch.save(fit(source, *words), arguments.out)
        return
    fits = {Path(path).stem: torch.load(path) for path in arguments.fits}
    found = read(source, arguments.books, arguments.wiki, fits, arguments.seed)
    Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
