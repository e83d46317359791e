"""Hugging Face folders as a source: safetensors or pickled tensors, one file or shards with an index."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import torch

from t2r.convert.locate import WEIGHT_FILES
from t2r.convert.source import (
    SAFETENSORS_DTYPES,
    Reader,
    Source,
    Stored,
    each_once,
    first_line,
    load_config,
    load_tokenizer,
    quote,
    read_json,
)
from t2r.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Old Llama checkpoints store this buffer; every model computes it from its config.
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


class FolderSource(Source):
    """A Hugging Face folder: safetensors or `.bin`, one file or shards with an index."""

    def __init__(self, spec: str, path: Path) -> None:
        super().__init__(spec, path)
        if (path / "adapter_config.json").exists():
            raise UserError("this folder holds a PEFT adapter, not a model", where=path, next=_merge_command(path))
        if not (path / "config.json").exists():
            files = sorted(p.name for p in path.glob("*.gguf"))
            raise UserError("no config.json", where=path, nearest=path / files[0] if files else None)
        raw, name_of = read_json(path / "config.json"), str
        self.is_foreign = raw.get("model_type") == "gsa"
        if self.is_foreign:
            from t2r.convert import fla

            self.config, name_of = fla.read_config(raw, path / "config.json"), fla.ours
        else:
            self.config = load_config(path)
        stored = {name_of(key): tensor for key, tensor in self._scan().items()}
        # A base model, saved without its head, leaves out the prefix under which the causal model holds it.
        prefix = "model." if "embed_tokens.weight" in stored else ""
        for key, tensor in stored.items():
            if DERIVED.search(key):
                self.ignored[key] = "a buffer that the model computes from its config"
            elif not tensor.dtype.is_floating_point:
                name = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"tensor {key} has dtype {name}, which no weight has", where=tensor.file)
            else:
                self._stored[key if key.startswith("lm_head.") else prefix + key] = tensor

    def _read(self, stored: Stored, reader: Reader) -> torch.Tensor:
        if stored.offset is None:
            # Mapped anew for each tensor: pages of a mapping that stays open count as resident memory.
            return _load_pickle(stored.file)[stored.key].clone(memory_format=torch.contiguous_format)
        return reader.read(stored.offset, stored.nbytes, stored.key).view(stored.dtype).reshape(stored.shape)

    def _pieces(self, stored: Stored, reader: Reader, buffer: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        if stored.offset is None:
            yield from super()._pieces(stored, reader, buffer)
            return
        size = stored.nbytes
        for begin in range(0, size, len(buffer)):
            piece = buffer[: min(len(buffer), size - begin)]
            reader.read_into(piece, stored.offset + begin, stored.key)
            yield begin // stored.dtype.itemsize, piece.view(stored.dtype)
        if not size:
            yield 0, torch.empty(0, dtype=stored.dtype)

    def generation_config(self):
        from transformers import GenerationConfig

        if not (self.path / "generation_config.json").exists():
            return None
        try:
            return GenerationConfig.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"generation_config.json cannot be used: {first_line(error)}", where=self.path) from error

    def load_tokenizer(self):
        if not any((self.path / file).exists() for file in TOKENIZER_FILES):
            what = f"no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
            raise UserError(what, where=self.path, next=_refetch(self.path, "tokenizer.json tokenizer_config.json"))
        return load_tokenizer(self.path)

    def _scan(self) -> dict[str, Stored]:
        found = next((file for file in WEIGHT_FILES if (self.path / file).exists()), None)
        if found is None:
            stray = sorted(p.name for p in self.path.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
            what = f"no weights: none of {', '.join(WEIGHT_FILES)}"
            raise UserError(what, where=self.path, nearest=stray[0] if stray else None)
        index = _read_index(self.path / found) if found.endswith(".json") else {}
        files = sorted(set(index.values())) or [found]
        for file in files:
            if not (self.path / file).is_file():
                raise UserError(f"shard {file} is missing", where=self.path / found, next=_refetch(self.path, file))
        tensors: dict[str, Stored] = {}
        for file in files:
            scan = _scan_safetensors if file.endswith(".safetensors") else _scan_pickle
            for key, stored in scan(self.path / file).items():
                if key in tensors:
                    both = f"{tensors[key].file.name} and {file}"
                    raise UserError(f"tensor {key} is in two shards: {both}", where=self.path)
                tensors[key] = stored
        for key, tensor in tensors.items():
            if index and key not in index and not DERIVED.search(key):
                raise UserError(f"tensor {key} of {tensor.file.name} is not in the index", where=self.path / found)
        for key, file in index.items():
            if key not in tensors or tensors[key].file != self.path / file:
                raise UserError(f"tensor {key} is not in {file}, where the index places it", where=self.path / found)
        return tensors


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise UserError("the index has no weight_map of tensor names to file names", where=path)
    suffix = ".safetensors" if path.name.startswith("model.safetensors") else ".bin"
    for key, file in index.items():
        # Spelling, not resolved paths: in the hub cache every shard is a link to a file elsewhere.
        # Windows' reading of a path is the strictest: it has all of POSIX's anchors and separators, and its own.
        escapes = PureWindowsPath(file).anchor or ".." in PureWindowsPath(file).parts
        if escapes or not file.endswith(suffix):
            fault = "leaves the folder" if escapes else f"is not a {suffix} file"
            raise UserError(f"the index places tensor {key} in {file!r}, which {fault}", where=path)
    return index


def _scan_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        data = 8 + header_size
        if size < data:
            raise _truncated(path, size, data)
        raw = file.read(header_size)
    try:
        header = json.loads(raw, object_pairs_hook=each_once)
        header.pop("__metadata__", None)
        end = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < end:
            raise _truncated(path, size, end)
        # The library's own check of the rest: holes, overlaps, sizes against shapes. It reads no values.
        with safe_open(path, framework="pt"):
            pass
        for key, entry in header.items():
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise UserError(f"tensor {key} has dtype {entry['dtype']}, which is not read", where=path)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path.name} is not a readable safetensors file: {first_line(error)}", where=path) from error
    stored = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, offset = SAFETENSORS_DTYPES[entry["dtype"]], data + entry["data_offsets"][0]
        stored[key] = Stored(path, key, tuple(entry["shape"]), dtype, offset)
    return stored


def _truncated(path: Path, size: int, needed: int) -> UserError:
    what = f"{path.name} is truncated: {size:,} bytes of at least {needed:,}"
    return UserError(what, where=path, next=_refetch(path.parent, path.name))


def _refetch(folder: Path, files: str) -> str:
    cached = re.search(r"/models--(.+?)--(.+?)/snapshots/", folder.as_posix() + "/")
    if cached:
        return f"hf download {cached[1]}/{cached[2]} {files} --force-download"
    return f"hf download ORG/NAME {files} --local-dir {quote(folder)} --force-download"


def _scan_pickle(path: Path) -> dict[str, Stored]:
    tensors = _load_pickle(path)
    if not isinstance(tensors, dict):
        raise UserError(f"{path.name} holds {type(tensors).__name__}, not named tensors", where=path)
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"entry {key} of {path.name} is {type(tensor).__name__}, not a plain tensor", where=path)
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise UserError(f"tensor {key} has dtype {tensor.dtype}, which is not read", where=path)
    return {key: Stored(path, key, tuple(tensor.shape), tensor.dtype, None) for key, tensor in tensors.items()}


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        if LEGACY_MAGIC in file.read(64):
            code = f"import torch; p = {str(path)!r}; torch.save(torch.load(p, weights_only=True), p)"
            what = f"{path.name} is in torch's format of before 1.6, which cannot be read tensor by tensor"
            raise UserError(what, where=path, next=f"python -c {quote(code)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({culprit[1]})" if culprit else ""
        raise UserError(f"{path.name} is a pickle with code{what}; it was not executed", where=path) from error
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"{path.name} is truncated or not a torch file: {first_line(error)}", where=path) from error


def _merge_command(path: Path) -> str:
    merged = f"{path.resolve()}-merged"
    code = (
        "import peft, transformers as t; "
        f"a, out = {str(path)!r}, {merged!r}; "
        "base = peft.PeftConfig.from_pretrained(a).base_model_name_or_path; "
        "peft.AutoPeftModelForCausalLM.from_pretrained(a, dtype='auto').merge_and_unload().save_pretrained(out); "
        "t.AutoTokenizer.from_pretrained(base).save_pretrained(out)"
    )
    return f"python -c {quote(code)}"
