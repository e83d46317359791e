"""Far sinks: is an exact start as good 32K tokens into a book as it is after 2K?

For every book, tokens P .. P+1023 at P = 2K, 8K, 16K, 32K are read twice: from the book's first token on, and from a
fresh state 2K tokens earlier. Writes perplexities of both for several values of sink_distance (null: true distance).

    python docs/results/far_sinks.py MODEL BOOKS.npy OUT.json      (BOOKS.npy: int32 [books, >= 33793] token ids)
"""

import json
import math
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import t2r  # noqa: F401
from t2r.env import facts
from t2r.evaluate.perplexity import token_nll

POSITIONS, TOKENS, LEAD = (2048, 8192, 16384, 32768), 1024, 2048
DISTANCES = (64, 128, 256, 512, 1024, 2048, 4096, None)


def perplexities(model, books: torch.Tensor) -> dict:
    """{position: {far, fresh, ratio}} over all books."""
    read = token_nll(model, books[:, : max(POSITIONS) + TOKENS], segment=2048)
    rows = {}
    for P in POSITIONS:
        # column t - 1 of read is the loss of token t
        far = read[:, P - 1 : P - 1 + TOKENS].mean().item()
        fresh = token_nll(model, books[:, P - LEAD : P + TOKENS])[:, LEAD - 1 :].mean().item()
        rows[P] = {"far": math.exp(far), "fresh": math.exp(fresh), "ratio": math.exp(far - fresh)}
        print(P, rows[P], flush=True)
    return rows


def main(folder: str, books_file: str, out: str) -> None:
    books = torch.from_numpy(np.load(books_file)).long()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {"books": len(books), "tokens_per_position": TOKENS * len(books), "lead": LEAD}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    results["gsa"] = dict(model.config.gsa)
    for distance in DISTANCES:
        print("sink_distance", distance, flush=True)
        model.config.gsa["sink_distance"] = distance
        results.setdefault("perplexity", {})[str(distance)] = perplexities(model, books)
    with open(out, "w") as file:
        json.dump({"environment": facts(), **results}, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
