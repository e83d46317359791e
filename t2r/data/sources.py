"""Where documents come from: local files of several formats, text that ships with t2r, and data sets on the hub."""

import glob
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from t2r.data.lookups import MORE, with_lookups
from t2r.errors import UserError, nearest

SHIPPED, TEXT = "shipped:", ".txt"
Document = str | list[dict]  # a text, or the messages of a chat


@dataclass(frozen=True)
class Source:
    """One file (`path`) or one data set on the hub (`name`, or `name:subset`; its split `train` is streamed).

    lookups: the kind of facts and questions that are to be put into its texts (`finish`), None: none; they are held out
    or not as they are without. identity: what the cache of its tokens is named after; it changes when the file does.
    """

    name: str
    path: Path | None
    lookups: str | None = None

    @property
    def identity(self) -> list:
        made = [self.lookups] if self.lookups else []
        if self.path is None:
            return [self.name, *made]
        stat = self.path.stat()
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, *made]

    @property
    def is_document(self) -> bool:
        """Whether the whole source is one document: a text file."""
        return self.path is not None and format_of(self.path) == TEXT

    def documents(self, field: str) -> Iterator[Document]:
        """The texts or chats, in the order of the source. Raises UserError for a document without `field`, named by its
        line."""
        for number, record in enumerate(self.records(field), start=1):
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str) and not is_chat(text):
                keys = list(record) if isinstance(record, dict) else []
                raise UserError(
                    f"document {number} has no text under {field!r}",
                    where=self.name,
                    nearest=f"data.field={nearest(field, keys) or keys[0]}" if keys else None,
                )
            if self.lookups and not isinstance(text, str):
                raise UserError(f"document {number} is a chat: lookups are put into texts", where=self.name)
            yield text

    def finish(self, document: Document) -> Document:
        """A document, or what was taken of it, as it is to be read."""
        return with_lookups(document, self.lookups) if self.lookups else document

    def records(self, field: str) -> Iterator[dict]:
        if self.path is None:
            yield from hub_records(self.name)
            return
        try:
            yield from FORMATS[format_of(self.path)](self.path, field)
        except UserError:
            raise
        except (OSError, EOFError, ValueError, ImportError) as error:  # EOFError: a gzip file that ends early
            raise UserError(f"cannot be read: {error}", where=self.path) from error


def is_chat(value: object) -> bool:
    """Whether a field holds messages, each with a role and a text."""
    turns = isinstance(value, list) and value
    return bool(turns) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)


def resolve(specs: Sequence[str]) -> list[Source]:
    """Files, patterns, shipped names and hub names, any with a kind of lookups before it -> sources. Raises UserError
    for what is not there."""
    found = []
    for spec in specs:
        if kind := next((kind for kind in MORE if spec.startswith(kind)), None):
            found += [replace(source, lookups=kind) for source in resolve([spec.removeprefix(kind)])]
            continue
        if spec.startswith(SHIPPED):
            found.append(shipped_source(spec))
            continue
        pattern = str(Path(spec).expanduser())
        paths = [Path(path) for path in sorted(glob.glob(pattern))] or [Path(pattern)]
        for path in paths:
            if path.is_dir():
                raise UserError(f"{path} is a folder", where="data", nearest=f"{path}/*.jsonl")
            if not path.exists() and is_hub_name(spec):
                found.append(Source(spec, None))
                continue
            if not path.exists():
                siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
                head, _, rest = spec.partition(":")
                prefix = nearest(f"{head}:", [*MORE, SHIPPED]) if rest else None
                other = prefix + rest if prefix else nearest(path.name, siblings)
                other = other or f"{SHIPPED}train, or files: 'data.train=[\"DIR/*.jsonl\"]'"
                raise UserError(f"no data at {spec}", where="data", nearest=other)
            format_of(path)
            found.append(Source(str(path), path))
    return found


def shipped_source(spec: str) -> Source:
    folder = Path(str(files("t2r.configs") / "data"))
    names = {path.name.removesuffix(".jsonl.gz"): path for path in folder.glob("*.jsonl.gz")}
    name = spec.removeprefix(SHIPPED)
    if name not in names:
        close = nearest(name, names) or ", ".join(names)
        raise UserError(f"t2r ships no text {name!r}", where="data", nearest=SHIPPED + close)
    return Source(spec, names[name])


def is_hub_name(spec: str) -> bool:
    """org/name or org/name:subset, and no ending of a file."""
    return spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not any(map(spec.endswith, FORMATS))


def format_of(path: Path) -> str:
    for ending in FORMATS:
        if path.name.endswith(ending):
            return ending
    raise UserError(f"{path.name} has no known ending", where="data", nearest=", ".join(FORMATS))


def json_lines(path: Path, binary: io.BufferedIOBase) -> Iterator[dict]:
    for number, line in enumerate(io.TextIOWrapper(binary, encoding="utf-8"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} is not JSON: {error}", where=path) from error


def read_jsonl(path: Path, field: str) -> Iterator[dict]:
    with open(path, "rb") as file:
        yield from json_lines(path, file)


def read_gzip(path: Path, field: str) -> Iterator[dict]:
    with gzip.open(path, "rb") as file:
        yield from json_lines(path, file)


def read_zstd(path: Path, field: str) -> Iterator[dict]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("reading .zst files needs a package", where=path, next="pip install zstandard") from error
    try:
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            yield from json_lines(path, stream)
    except zstandard.ZstdError as error:
        raise UserError(f"cannot be read: {error}", where=path) from error


def read_text(path: Path, field: str) -> Iterator[dict]:
    """A text file is one document."""
    yield {field: path.read_text(encoding="utf-8")}


def read_parquet(path: Path, field: str) -> Iterator[dict]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    columns = [field] if field in file.schema_arrow.names else None
    for batch in file.iter_batches(batch_size=256, columns=columns):
        yield from batch.to_pylist()


FORMATS: dict[str, Callable[[Path, str], Iterator[dict]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_gzip,
    ".jsonl.zst": read_zstd,
    TEXT: read_text,
    ".parquet": read_parquet,
}


def hub_records(name: str) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        path, _, subset = name.partition(":")
        yield from load_dataset(path, **({"name": subset} if subset else {}), split="train", streaming=True)
    except Exception as error:  # the hub client's HTTP errors share no base class with the library's own
        raise UserError(f"no file {name!r} here, and the hub did not deliver it: {error}", where="data") from error
