"""Tokens on disk: the documents of some sources, tokenised once, in shards that are mapped into memory from then on.

A shard is a folder that appears complete or not at all; what is written after a kill goes on behind the last one. So
training may begin with the first shard while the others are being made.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from t2r.data.chat import encode_chats
from t2r.data.sources import Document, Source, resolve
from t2r.errors import UserError

BATCH = 256  # documents that the tokenizer, which works in parallel, gets at a time
SHARD = 2**24
FORMAT = 4  # of the files below; a new number makes old caches unknown
FACTS, COMPLETE, FAULT, LOCK = "shard.json", "complete.json", "fault.txt", ".lock"


class Shard(NamedTuple):
    """ids [n] uint16 or uint32: documents one after the other, a text ended by the end-of-text token, a chat as its
    template ends it. starts [documents] int64: where each begins. learned [n] bool: the tokens to be predicted, None:
    all. back [n] uint16: of an answer's tokens, how many tokens before the fact was said; else 0, None: no lookups.
    All but starts are mapped: take `stretch`es of them."""

    ids: np.ndarray
    starts: np.ndarray
    learned: np.ndarray | None = None
    back: np.ndarray | None = None


class Encoded(NamedTuple):
    """A document, as of Shard."""

    ids: list[int]
    learned: list[bool] | None = None
    back: np.ndarray | None = None


@dataclass(frozen=True)
class Request:
    """What is to be tokenised, and how. held_out: share of the documents that is kept for validation, and of each text
    file, which is one. validation: take these, and no others. limit: tokens after which to stop; None: at the end of
    the files. shard: tokens of one, or a little more: documents are not cut."""

    sources: tuple[Source, ...]
    field: str
    held_out: float = 0.0
    validation: bool = False
    limit: int | None = None
    shard: int = SHARD

    def take(self, document: Document, source: Source) -> Document | None:
        """What is wanted of a document, None: nothing. The hash of a document says whether it is held out; of a text
        file it is the end."""
        if not self.held_out:
            return source.finish(document)
        if source.is_document:
            cut = round(len(document) * (1 - self.held_out))
            return source.finish(document[cut:] if self.validation else document[:cut])
        digest = hashlib.sha256(json.dumps(document).encode()).digest()
        held = int.from_bytes(digest[:8], "big") < self.held_out * 2**64
        return source.finish(document) if held == self.validation else None

    def key(self, tokenizer) -> str:
        """Name of the folder: whatever changes a token changes it."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        identity = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        facts = [FORMAT, self.shard, [source.identity for source in self.sources], self.field, self.limit]
        facts += [self.held_out, self.validation, tokenizer.eos_token_id, tokenizer.chat_template, identity]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def request(specs: Sequence[str], field: str, tokens: int, held_out: float = 0.0, validation: bool = False) -> Request:
    """The data `specs` (see DataConfig) as a Request for at least `tokens` tokens, if there are so many.

    Files are read whole; a data set on the hub, which may be endless, and what is held out are read no further.
    Raises UserError for data that is not there.
    """
    sources = tuple(resolve(specs))
    if not sources:
        raise UserError("no data to train on", where="data.train")
    limited = validation or any(source.path is None for source in sources)
    return Request(sources, field, held_out, validation, tokens if limited else None)


def has_text(document: Document | None) -> bool:
    return bool(document.strip() if isinstance(document, str) else document)


def check_text(wanted: Request) -> None:
    """Raise UserError unless there is a document to tokenise; reads no further than that."""
    count = 0
    for source in wanted.sources:
        for document in source.documents(wanted.field):
            if has_text(document):
                count += 1
                if has_text(wanted.take(document, source)):
                    return
    where = ", ".join(source.name for source in wanted.sources)
    if not count:
        raise UserError("the data holds no text", where=where)
    some = "none" if wanted.validation else "all"
    what = f"data.held_out is {wanted.held_out}, which holds out {some} of the data's documents ({count})"
    raise UserError(what, where=where, nearest="data.held_out=0 data.validation=[FILE]")


class Tokens:
    """Some shards, all of them there."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)

    def shard(self, i: int) -> Shard | None:
        """The i-th, None where there are no more."""
        return self.shards[i] if i < len(self.shards) else None

    def __len__(self) -> int:
        return sum(len(shard.ids) for shard in self.shards)


class GrowingTokens(Tokens):
    """The shards of a folder that another process is writing: asking for one waits for it."""

    def __init__(self, folder: Path, writer) -> None:
        super().__init__([])
        self.folder, self.writer = folder, writer

    def shard(self, i: int) -> Shard | None:
        while i >= len(self.shards):
            if (path := self.folder / shard_name(len(self.shards))).exists():
                self.shards.append(open_shard(path))
            elif (self.folder / FAULT).exists():
                raise UserError((self.folder / FAULT).read_text(encoding="utf-8"))
            elif (self.folder / COMPLETE).exists():
                return None
            elif self.writer is not None and not self.writer.is_alive() and not path.exists():
                raise UserError("the process that tokenises has ended without a word", where=self.folder)
            else:
                time.sleep(0.1)
        return self.shards[i]


def tokenise(wanted: Request, tokenizer, cache: str | Path) -> Tokens:
    """The tokens, from the cache or put there. In a group of processes the first of each machine works and the others
    wait. Raises UserError for data that is damaged, without text or empty."""
    folder = Path(cache).expanduser() / wanted.key(tokenizer)
    while not (folder / COMPLETE).exists():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            write(wanted, tokenizer, folder)
        else:
            time.sleep(0.5)
    return open_tokens(folder)


def tokenise_ahead(wanted: Request, tokenizer, cache: str | Path) -> Tokens:
    """The same tokens while a process of their own makes them."""
    folder = Path(cache).expanduser() / wanted.key(tokenizer)
    if (folder / COMPLETE).exists():
        return open_tokens(folder)
    writer = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAULT).unlink(missing_ok=True)
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=write_for, args=(wanted, tokenizer, folder, os.getpid()), daemon=True)
        writer.start()
    return GrowingTokens(folder, writer)


def write_for(wanted: Request, tokenizer, folder: Path, parent: int) -> None:
    """`write` in a process of its own, as long as `parent` lives; a fault is left in the folder."""
    try:
        write(wanted, tokenizer, folder, parent)
    except UserError as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAULT).write_text(str(error), encoding="utf-8")


def open_tokens(folder: Path) -> Tokens:
    count = json.loads((folder / COMPLETE).read_text())["shards"]
    return Tokens([open_shard(folder / shard_name(i)) for i in range(count)])


def open_shard(path: Path) -> Shard:
    """Map a shard. Raises UserError where a file of it is missing or of the wrong length."""
    try:
        facts = json.loads((path / FACTS).read_text())
        ids = np.load(path / "ids.npy", mmap_mode="r")
        marks = (path / f"{name}.npy" for name in ("learned", "back"))
        marks = (np.load(file, mmap_mode="r") if file.exists() else None for file in marks)
        shard = Shard(ids, np.load(path / "starts.npy"), *marks)
        if (len(ids), len(shard.starts)) != (facts["tokens"], facts["documents"]):
            raise ValueError(f"{len(ids)} tokens of {facts['tokens']}")
        return shard
    except (OSError, ValueError, LookupError, EOFError) as error:
        raise damaged(path, error) from error


def stretch(array: np.ndarray, begin: int, end: int) -> np.ndarray:
    """array[begin:end] of what may be mapped. It is read from the file, whose bytes may be gone since it was opened:
    the map would answer with a signal that ends the process. Raises UserError then."""
    if not isinstance(array, np.memmap):
        return array[begin:end]
    path = Path(array.filename)
    try:
        found = np.fromfile(path, array.dtype, end - begin, offset=array.offset + begin * array.itemsize)
        if len(found) < end - begin:
            raise ValueError(f"{path.name} has no more than {begin + len(found)} tokens of {len(array)}")
        return found
    except (OSError, ValueError) as error:
        raise damaged(path.parent, error) from error


def damaged(shard: Path, what: object) -> UserError:
    return UserError(f"damaged tokens: {what}", where=shard, next=f"rm -r {shard.parent}")


def check_hashes(folder: Path) -> None:
    """Raise UserError unless the tokens are those that were written."""
    for path in sorted(folder.glob("[0-9]*")):
        known = json.loads((path / FACTS).read_text())["sha256"]
        for name, digest in known.items():
            if sha256(path / name) != digest:
                raise damaged(path, f"{name} is not what was written")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_name(i: int) -> str:
    return f"{i:05d}"


def write(wanted: Request, tokenizer, folder: Path, parent: int | None = None) -> None:
    """Tokenise shard by shard, behind what is there. Nothing is left where not even one shard was completed."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to put between documents")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / COMPLETE).exists():
                write_shards(wanted, tokenizer, folder, parent)
    except OSError as error:
        raise UserError(f"cannot keep the tokens: {error.strerror}", where=folder.parent) from error
    finally:
        if folder.exists() and not any(folder.glob("[0-9]*")):
            shutil.rmtree(folder, ignore_errors=True)


class locked:
    """Context manager: one process at a time writes into `folder`; another waits."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK

    def __enter__(self) -> None:
        self.file = open(self.path, "w")  # noqa: SIM115
        try:
            import fcntl
        except ImportError:  # Windows: whoever is last overwrites the same tokens with the same tokens
            return
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error) -> None:
        self.file.close()


def write_shards(wanted: Request, tokenizer, folder: Path, parent: int | None) -> None:
    from tqdm import tqdm

    done = [json.loads((path / FACTS).read_text()) for path in sorted(folder.glob("[0-9]*"))]
    tokens, begin = sum(facts["tokens"] for facts in done), done[-1]["next"] if done else [0, 0]
    place = begin
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    buffer: list[Encoded] = []
    size = 0
    with tqdm(
        desc="tokenising", unit=" tokens", unit_scale=True, initial=tokens, disable=not sys.stderr.isatty()
    ) as bar:
        for place, encoded in token_lists(wanted, tokenizer, begin):
            if parent is not None and os.getppid() != parent:
                return
            for one in encoded:
                if one.learned is None and one.ids[-1:] != [tokenizer.eos_token_id]:
                    one = one._replace(ids=[*one.ids, tokenizer.eos_token_id])
                buffer.append(one)
                size += len(one.ids)
                bar.update(len(one.ids))
            if size >= wanted.shard:
                done.append(write_shard(buffer, dtype, place, folder, len(done)))
                tokens, size, buffer = tokens + size, 0, []
            if wanted.limit is not None and tokens + size >= wanted.limit:
                break
    if buffer:
        done.append(write_shard(buffer, dtype, place, folder, len(done)))
    if not done:
        check_text(wanted)
    facts = {key: sum(shard[key] for shard in done) for key in ("tokens", "documents")}
    aside = folder / f".{COMPLETE}"
    aside.write_text(json.dumps({"shards": len(done), **facts}) + "\n")
    aside.rename(folder / COMPLETE)


def write_shard(buffer: list[Encoded], dtype: type, place: list[int], folder: Path, number: int) -> dict:
    """Write the folder of a shard aside, rename it, and return its facts. next: where to go on, see token_lists."""
    aside = folder / f".{shard_name(number)}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    lengths = np.array([len(one.ids) for one in buffer])
    starts = (np.cumsum(lengths) - lengths).astype(np.int64)
    arrays = {"ids.npy": np.concatenate([np.array(one.ids, dtype) for one in buffer]), "starts.npy": starts}
    if any(one.learned is not None for one in buffer):
        marks = [np.ones(len(one.ids), bool) if one.learned is None else np.array(one.learned) for one in buffer]
        arrays["learned.npy"] = np.concatenate(marks)
    if any(one.back is not None for one in buffer):
        arrays["back.npy"] = np.zeros(lengths.sum(), np.uint16)
        for start, one in zip(starts, buffer, strict=True):
            if one.back is not None:
                arrays["back.npy"][start : start + len(one.back)] = one.back
    for name, array in arrays.items():
        np.save(aside / name, array)
    facts = {"tokens": int(lengths.sum()), "documents": len(lengths), "next": place}
    facts["sha256"] = {name: sha256(aside / name) for name in arrays}
    (aside / FACTS).write_text(json.dumps(facts) + "\n")
    aside.rename(folder / shard_name(number))
    return facts


def token_lists(wanted: Request, tokenizer, place: Sequence[int]) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Batches of documents as (place behind them, documents). A place is [source, documents of it]; one given
    begins there. Texts are encoded as the tokenizer begins a text, chats by its template."""
    first, skip = place
    for number, source in enumerate(wanted.sources[first:], start=first):
        documents = islice(source.documents(wanted.field), skip, None)
        while batch := list(islice(documents, BATCH)):
            skip += len(batch)
            chosen = [taken for document in batch if has_text(taken := wanted.take(document, source))]
            texts = [document for document in chosen if isinstance(document, str)]
            chats = [document for document in chosen if not isinstance(document, str)]
            encoded = encode_texts(tokenizer, texts, bool(source.lookups and tokenizer.is_fast)) if texts else []
            encoded += [Encoded(*chat) for chat in encode_chats(tokenizer, chats, source.name)]
            if encoded:
                yield [number, skip], encoded
        skip = 0


def encode_texts(tokenizer, texts: list[str], marked: bool) -> list[Encoded]:
    """marked: with what a tokenizer that tells places says of the answers of lookups."""
    found = tokenizer(texts, return_attention_mask=False, return_offsets_mapping=marked, verbose=False)
    if not marked:
        return [Encoded(ids) for ids in found["input_ids"]]
    ends = [np.maximum.accumulate(np.array(offsets).reshape(-1, 2)) for offsets in found["offset_mapping"]]
    return [
        Encoded(ids, back=tokens_back(*end.T, text.answers))
        for ids, end, text in zip(found["input_ids"], ends, texts, strict=True)
    ]


def tokens_back(low: np.ndarray, high: np.ndarray, answers: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Shard.back of a text whose tokens reach from the characters low to high, neither of which ever falls."""
    back = np.zeros(len(low), np.uint16)
    for begin, end, said in answers:
        first, last = np.searchsorted(high, begin, "right"), np.searchsorted(low, end, "left")
        distance = np.arange(first, last) - np.searchsorted(high, said, "right")
        back[first:last] = distance.clip(0, np.iinfo(np.uint16).max)
    return back
