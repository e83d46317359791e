"""Checkpoints as they are stored: one tensor in memory at a time, every fault named before anything is written."""

import hashlib
import json
import shlex
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from t2r.errors import UserError, nearest

PACKAGE = "package:"
PIECE_BYTES = 2 << 20  # large enough for a disk, small enough for a cache
# What transformers raises for a config that makes no sense, depending on where it notices.
CONFIG_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_source(src: str | Path) -> "Source":
    """Open a checkpoint and check all of it but the values.

    src: a folder, a `.gguf` file, `package:NAME[/FILE]` (an installed Python package that ships a model; it is
        not imported) or a hub id `org/name`.

    Raises UserError for everything that is missing, damaged, unsafe or of an unknown format, with file and tensor.
    """
    from t2r.convert.locate import locate

    path = locate(str(src))
    try:
        return _open(str(src), path)
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or first_line(error)}", where=error.filename or path
        ) from error


def _open(spec: str, path: Path) -> "Source":
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{path} is neither a folder nor a .gguf file", next=f"t2r convert {quote(path.parent)} OUT")
    if path.is_file():
        from t2r.convert.gguf import GgufSource

        return GgufSource(spec, path)
    from t2r.convert.folder import FolderSource

    return FolderSource(spec, path)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its shape and dtype once read, `offset` bytes from the file's start.

    A pickled tensor has no offset; it is found by `key`, its name on disk.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor once read."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Reader:
    """One file read front to back, in parts. With `hashing` every byte of it enters a SHA-256 exactly once, those
    between the parts included, so that a file is hashed by the read that copies it."""

    def __init__(self, path: Path, hashing: bool = False) -> None:
        self.path = path
        # Plain reads, no mapping: pages of a mapping count as resident memory.
        self._file = open(path, "rb")
        self._sha256 = hashlib.sha256() if hashing else None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def read(self, offset: int, size: int, what: str) -> torch.Tensor:
        """`size` bytes from `offset` on, as a uint8 tensor that owns its memory. UserError if the file ends early."""
        data = torch.empty(size, dtype=torch.uint8)
        self.read_into(data, offset, what)
        return data

    def read_into(self, data: torch.Tensor, offset: int, what: str) -> None:
        """Fill the uint8 tensor `data`. UserError as `read`."""
        if self._sha256:
            self._hash_up_to(offset)
        view = memoryview(data.numpy())
        try:
            self._file.seek(offset)
            count = self._file.readinto(view)
        except OSError as error:
            raise UserError(f"tensor {what} cannot be read: {error.strerror}", where=self.path) from error
        if count != len(view):
            raise UserError(f"tensor {what} ends early: the file changed while it was read", where=self.path)
        if self._sha256:
            self._sha256.update(view)

    def digest(self) -> str | None:
        """SHA-256 of the whole file in hexadecimal, or None without `hashing`."""
        if self._sha256:
            self._hash_up_to(self.path.stat().st_size)
        return self._sha256 and self._sha256.hexdigest()

    def _hash_up_to(self, offset: int) -> None:
        while (gap := offset - self._file.tell()) > 0:
            data = self._file.read(min(gap, 1 << 20))
            if not data:
                return
            self._sha256.update(data)


class Source:
    """A checkpoint. Names, shapes and dtypes are known without reading a value.

    spec: what the user wrote; path: the folder or file on disk
    config: the transformers config of the model
    is_quantised: True when tensors are dequantised on reading (GGUF)
    is_foreign: True when it has Gated Slot Attention already, in another project's format; `config` and `names()` are
        then those of the same model in t2r
    ignored: stored tensors that carry no weight, each with the reason; they are not in `names()`
    """

    is_quantised = False
    is_foreign = False

    def __init__(self, spec: str, path: Path) -> None:
        self.spec = spec
        self.path = path
        self.config = None
        self.ignored: dict[str, str] = {}
        self._stored: dict[str, Stored] = {}

    def names(self) -> list[str]:
        """All tensor names, in storage order, spelled as `AutoModelForCausalLM` of this family reads them."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype as stored; float32 where the file is quantised."""
        return self._stored[name].dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor in memory."""
        return self._stored[name].nbytes

    def place(self, name: str) -> tuple[Path, int] | None:
        """File and offset of a tensor's bytes, or None where they are not stored as they are read."""
        stored = self._stored[name]
        return None if self.is_quantised or stored.offset is None else (stored.file, stored.offset)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in storage order."""
        return list(dict.fromkeys(stored.file for stored in self._stored.values()))

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor) in storage order."""
        for name in self.names():
            yield name, self.tensor(name)

    def pieces(
        self, skip: Container[str] = (), digests: dict[str, str] | None = None
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        """The values of every tensor but those in `skip`, in storage order: (name, index of the first value, values).

        A piece is flat, of the tensor's dtype, and gone when the next one is asked for: memory for each anew would cost
        more than reading it. digests: filled with each file's name and SHA-256, from the same read.
        """
        buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        for file, group in groupby(self._stored.items(), key=lambda item: item[1].file):
            with Reader(file, hashing=digests is not None) as reader:
                for name, stored in group:
                    if name not in skip:
                        for start, values in self._pieces(stored, reader, buffer):
                            yield name, start, values
                if digests is not None:
                    digests[file.name] = reader.digest()

    def _pieces(self, stored: Stored, reader: Reader, buffer: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, self._read(stored, reader).reshape(-1)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU. It owns its memory."""
        stored = self._stored[name]
        with Reader(stored.file) as reader:
            return self._read(stored, reader)

    def _read(self, stored: Stored, reader: Reader) -> torch.Tensor:
        raise NotImplementedError

    def generation_config(self):
        """The transformers GenerationConfig that comes with the model, or None."""
        raise NotImplementedError

    def load_tokenizer(self):
        """The transformers tokenizer, chat template included. Raises UserError when there is none."""
        raise NotImplementedError

    def save_tokenizer(self, out: Path) -> None:
        """Write tokenizer and chat template into `out`. Raises UserError when the source has no tokenizer."""
        self.load_tokenizer().save_pretrained(out)


def load_config(path: Path, gguf_file: str | None = None):
    """The transformers config in folder `path`, or in its file `gguf_file`. Raises UserError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where = path / (gguf_file or "config.json")
    options = {"gguf_file": gguf_file} if gguf_file else {}
    raw = {} if gguf_file else read_json(where)
    try:
        kind = raw.get("model_type")
        if raw and kind not in CONFIG_MAPPING:
            close = nearest(str(kind), CONFIG_MAPPING.keys())
            raise UserError(f"unknown model_type {kind!r}", where=where, nearest=close)
        if quantised := raw.get("quantization_config"):
            method = quantised.get("quant_method", "unnamed method")
            raise UserError(f"the weights are quantised ({method}); only plain weights and GGUF are read", where=where)
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except (*CONFIG_FAULTS, OSError, StrictDataclassError) as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise UserError(f"the config cannot be used: {first_line(cause)}", where=where) from error


def load_tokenizer(path: Path, gguf_file: str | None = None):
    """The transformers tokenizer in folder `path`, or in its file `gguf_file`. Raises UserError."""
    from transformers import AutoTokenizer

    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # the Rust tokenizer raises bare Exception
        where = path / gguf_file if gguf_file else path
        raise UserError(f"the tokenizer cannot be loaded: {first_line(error)}", where=where) from error


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_once)
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is not readable JSON: {first_line(error)}", where=path) from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} holds {type(value).__name__}, not an object", where=path)
    return value


def each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, or ValueError if a key is there twice, of which json.loads would keep the last."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is there twice")
    return dict(pairs)


def first_line(error: BaseException) -> str:
    """What a library's error says first: the rest is advice that is not ours to give."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def quote(path: str | Path) -> str:
    """A path as a shell reads it."""
    return shlex.quote(str(path))
