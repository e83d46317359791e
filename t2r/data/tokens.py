"""Tokens on disk: the documents of some sources, tokenised once and mapped into memory from then on."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from t2r.data.sources import Source, resolve
from t2r.errors import UserError

BATCH = 256  # documents that the tokenizer, which works in parallel, gets at a time
FORMAT = 1  # of the files below; a new number makes old caches unknown


@dataclass(frozen=True)
class Tokens:
    """ids [n] uint16 or uint32: documents one after the other, each ended by the end-of-text token.
    starts [documents] int64: where each begins."""

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Tokens":
        return cls(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "starts.npy"))


def tokenise(specs: Sequence[str], tokenizer, field: str, cache: str | Path, hub_tokens: int) -> Tokens:
    """The tokens of the data `specs` (see DataConfig), from the cache or put there.

    hub_tokens: how many to take of a data set on the hub, which may be endless; files are read whole. In a group of
    processes the first of each machine works and the others wait for its folder to appear.
    Raises UserError for data that is missing, damaged, without text or empty.
    """
    sources = resolve(specs)
    if not sources:
        raise UserError("no data to train on", where="data.train")
    folder = Path(cache).expanduser() / key(sources, tokenizer, field, hub_tokens)
    while not folder.exists():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            write(sources, tokenizer, field, folder, hub_tokens)
        else:
            time.sleep(0.5)
    return Tokens.open(folder)


def key(sources: Sequence[Source], tokenizer, field: str, hub_tokens: int) -> str:
    """Name of the folder: whatever changes a token changes it."""
    hub = hub_tokens if any(source.path is None for source in sources) else 0
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    facts = [FORMAT, [source.identity for source in sources], field, hub, tokenizer.eos_token_id, identity]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def write(sources: Sequence[Source], tokenizer, field: str, folder: Path, hub_tokens: int) -> None:
    """Tokenise into a hidden sibling of `folder` and rename it when it is complete."""
    from tqdm import tqdm

    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to put between documents")
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    aside = folder.parent / f".{folder.name}.partial-{secrets.token_hex(2)}"
    starts, n = [], 0
    try:
        aside.mkdir(parents=True)
        with (
            open(aside / "ids.raw", "wb") as raw,
            tqdm(desc="tokenising", unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
        ):
            for ids in token_lists(sources, tokenizer, field, hub_tokens):
                if ids[-1:] != [tokenizer.eos_token_id]:
                    ids = [*ids, tokenizer.eos_token_id]
                raw.write(np.array(ids, dtype).tobytes())
                starts.append(n)
                n += len(ids)
                bar.update(len(ids))
        if not starts:
            raise UserError("the data holds no text", where=", ".join(source.name for source in sources))
        ids = np.lib.format.open_memmap(aside / "ids.npy", mode="w+", dtype=dtype, shape=(n,))
        ids[:] = np.memmap(aside / "ids.raw", dtype=dtype, mode="r")
        ids.flush()
        (aside / "ids.raw").unlink()
        np.save(aside / "starts.npy", np.array(starts, np.int64))
        if not folder.exists():  # another run may have been faster
            aside.rename(folder)
    except OSError as error:
        raise UserError(f"cannot keep the tokens: {error.strerror}", where=folder.parent) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def token_lists(sources: Sequence[Source], tokenizer, field: str, hub_tokens: int) -> Iterator[list[int]]:
    """Token ids of each document that holds any, begun as the tokenizer begins a text."""
    for source in sources:
        taken = 0
        texts = (text for text in source.documents(field) if text.strip())
        while batch := list(islice(texts, BATCH)):
            lists = tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
            yield from lists
            taken += sum(map(len, lists))
            if source.path is None and taken >= hub_tokens:
                break
