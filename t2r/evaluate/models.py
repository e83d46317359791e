"""The models of a comparison: opened and checked together, loaded one at a time, all in one dtype."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path

import torch

from t2r.convert.source import PACKAGE, Source, open_source
from t2r.convert.verify import TEXT, load_source
from t2r.errors import UserError
from t2r.train.log import METRICS
from t2r.train.log import read as read_metrics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# gate form -> (write, keep) of a clock without exceptions: an overwrite in turn, an exact keep out of turn
CLOCK = {"linear": (1.0, 0.0), "sigmoid": (-120.0, 70.0)}


@dataclass
class Entry:
    """One column. label: its name in the report; spec: what the user wrote."""

    label: str
    spec: str
    source: Source
    digest: str = ""

    @property
    def is_converted(self) -> bool:
        return getattr(self.source.config, "gsa", None) is not None

    def stored_dtype(self) -> torch.dtype:
        """The dtype of most of the weights on disk; float32 where they are dequantised."""
        sizes = Counter()
        for name in self.source.names():
            sizes[self.source.dtype(name)] += self.source.nbytes(name)
        return sizes.most_common(1)[0][0]

    def has_learned(self) -> bool:
        """Whether `window_only` would change the model: whether a clocked GSA model's gates differ from the start's."""
        gsa = getattr(self.source.config, "gsa", None)
        if not gsa or not gsa.get("ring") or gsa.get("gate") not in CLOCK:
            return False
        write, keep = CLOCK[gsa["gate"]]
        start = {"f_proj.weight": 0.0, "write": write, "keep": keep, "bonus.weight": 0.0}
        for name in self.source.names():
            value = next((v for key, v in start.items() if name.endswith(f".{key}")), None)
            if value is not None and bool((self.source.tensor(name) != value).any()):
                return True
        return False

    def fingerprint(self) -> str:
        """SHA-256, shortened, of the configuration and of all weights: a copy elsewhere is the same model, one changed
        number makes another. Reading the files once is little beside an evaluation."""
        if not self.digest:
            files = [file for file in (self.source.path / "config.json", *self.source.files) if file.is_file()]
            with ThreadPoolExecutor() as pool:
                content = "".join(pool.map(file_hash, files))
            self.digest = sha256(content.encode()).hexdigest()[:16]
        return self.digest

    def trained_tokens(self) -> int | None:
        """Tokens that the stages of a run have trained it on, 0 for a fresh conversion; None for an original."""
        if not self.is_converted:
            return None
        checkpoint = Path(self.source.path).resolve()
        total = 0
        for stage in sorted(checkpoint.parents[1].glob("[0-9]*-*")) if checkpoint.name.startswith("step-") else []:
            steps = [line.get("tokens", 0) for line in read_metrics(stage / METRICS)]
            total += max(steps, default=0)
            if stage == checkpoint.parent:
                break
        return total


def file_hash(file: Path) -> str:
    with open(file, "rb") as data:
        return file_digest(data, "sha256").hexdigest()


def open_models(words: list[str]) -> list[Entry]:
    """`PATH` or `LABEL=PATH` -> entries. Raises UserError for what cannot be read and for a label used twice."""
    entries: list[Entry] = []
    for word in words:
        label, equals, spec = word.partition("=")
        if not equals or Path(word).exists():
            label, spec = default_label(word), word
        if not label or not spec:
            raise UserError(f"{word!r} is not LABEL=MODEL")
        if label in [entry.label for entry in entries]:
            raise UserError(f"two models are called {label!r}", nearest=f"{label}-2={spec}")
        entries.append(Entry(label, spec, open_source(spec)))
    return entries


def default_label(spec: str) -> str:
    path = Path(spec.removeprefix(PACKAGE).rstrip("/"))
    return path.name.removesuffix(".gguf") or path.absolute().name


def common_tokenizer(entries: list[Entry]):
    """The tokenizer of the first model. Raises UserError unless every other one gives the same ids."""
    first = entries[0].source.load_tokenizer()
    for entry in entries[1:]:
        other = entry.source.load_tokenizer()
        if other.get_vocab() != first.get_vocab() or other.encode(TEXT) != first.encode(TEXT):
            what = f"the tokenizers of {entries[0].label} and {entry.label} differ: their losses cannot be compared"
            raise UserError(what, where=entry.spec, nearest="a model converted from the other one")
    return first


def pick_devices(device: str | None) -> list[torch.device]:
    """The named devices ("cpu", "cuda:0", "cuda:0,cuda:1"), by default all GPUs, or the CPU; one named twice is two.
    Raises UserError for one that is not there."""
    if device is None:
        count = torch.cuda.device_count()
        return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    return [pick_device(name) for name in device.split(",")]


def pick_device(name: str | None) -> torch.device:
    """The named device, by default a GPU if there is one. Raises UserError if it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r}", where="--device", nearest="cpu", next="t2r env") from error


def pick_dtype(entries: list[Entry], dtype: str | None) -> tuple[torch.dtype, torch.dtype]:
    """(dtype to compute in, dtype that the first converted model is stored in). The default is to compute in that."""
    converted = next((entry for entry in entries if entry.is_converted), entries[-1])
    stored = converted.stored_dtype()
    return (DTYPES[dtype] if dtype else stored), stored


def load(entry: Entry, dtype: torch.dtype, stored: torch.dtype, device: torch.device):
    """The model, ready to evaluate in `dtype`. An original is first rounded to `stored`, as its conversion was."""
    from transformers import AutoModelForCausalLM

    if entry.is_converted:
        model = AutoModelForCausalLM.from_pretrained(entry.source.path, dtype=dtype, local_files_only=True)
        return model.eval().to(device)
    if entry.source.is_quantised:
        model = load_source(entry.source)
    else:
        model = AutoModelForCausalLM.from_pretrained(entry.source.path, dtype="auto", local_files_only=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(dtype)
    return model.eval().to(device)


def window_only(model) -> bool:
    """Switch off, in place, what the gates of a clocked GSA model have learned: what is left is its window of the last
    tokens, as many as there are slots, and the sinks. False, and nothing changed, where no layer has a clock or none
    has learned anything."""
    from t2r.modeling.attention import GSAttention

    changed = False
    for layer in model.modules():
        if not isinstance(layer, GSAttention) or not layer.gsa.ring or layer.gsa.gate not in CLOCK:
            continue
        write, keep = CLOCK[layer.gsa.gate]
        for parameter, value in ((layer.f_proj.weight, 0.0), (layer.write, write), (layer.keep, keep)):
            changed |= bool((parameter != value).any())
            parameter.data.fill_(value)
        changed |= layer.gsa.scored
        layer.gsa = replace(layer.gsa, eviction="oldest")
    return changed
