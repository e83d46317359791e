"""What others see of a converted folder: its model card, and `t2r push`, which uploads it to the Hugging Face hub."""

import re
from collections import Counter
from pathlib import Path

from t2r.errors import UserError

PUBLIC = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "README.md")

CARD = """# {name}

{description}

## Use

```python
import t2r  # pip install t2r; without it give both lines trust_remote_code=True, which runs this folder's PyTorch code
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## How it was made

| | |
|---|---|
| made by | `t2r convert`, version {version} |
| source | `{base}` |
| architecture | `{architecture}`, {dtype} |
| preset | {preset}: {slots} |
| parameters | {total:,}, of them {new:,} new |

The source's files:

| file | bytes | SHA-256 |
|---|---|---|
{files}

### Tensors

`*` stands for the layer. conversion.json lists every tensor by itself.

| tensor | number | status | shape | dtype |
|---|---|---|---|---|
{tensors}

### Verification

{verification}
"""

KINDS = {
    "exact": "It was not trained: it starts as a ring buffer, equal to the original as long as the text fits the slots "
    "and to the original with a sliding window beyond",
    "paper": "It was not trained and is no language model yet: this is the start that the Gated Slot Attention paper "
    "([arXiv 2409.07146](https://arxiv.org/abs/2409.07146)) trains from",
}


def model_card(plan, report: dict, verification: str | None) -> str:
    """README.md of a converted folder.

    plan: of the conversion; report: what conversion.json holds; verification: what verify printed, None if it did not
    run.
    """
    import yaml

    from t2r import __version__
    from t2r.convert.locate import HUB_ID
    from t2r.convert.plan import name_of

    is_hub_id = HUB_ID.fullmatch(plan.source.spec) and not Path(plan.source.spec).exists()
    base = plan.source.spec if is_hub_id or plan.source.spec.startswith("package:") else plan.source.path.name
    about = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    about["tags"] = ["t2r", "gated-slot-attention", "rnn"]
    if is_hub_id:
        about["base_model"] = base
    if terms := source_license(plan.source.path):
        about["license"] = terms
    files = (
        f"| {file['name']} | {file['bytes']:,} | {file['sha256'] or 'not taken'} |" for file in report["source_files"]
    )
    total, new = plan.parameters()
    text = CARD.format(
        name=f"{base.rpartition('/')[2].removeprefix('package:')}-gsa",
        base=base,
        description=describe(plan, f"[{base}](https://huggingface.co/{base})" if is_hub_id else f"`{base}`"),
        slots=plan.slots_line(),
        version=__version__,
        architecture=plan.config.architectures[0],
        dtype=name_of(plan.config.dtype),
        preset=plan.preset,
        total=total,
        new=new,
        files="\n".join(files),
        tensors=tensor_table(report["tensors"]),
        verification=f"```text\n{verification}\n```" if verification else "It was not verified.",
    )
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n{text}"


def describe(plan, original: str) -> str:
    """What the model is, in the words of the card. original: its source, in Markdown."""
    slots = f"{plan.slots_line()}. The slots of a sequence take {plan.state_bytes / 1e6:.2f} MB of memory at any length"
    if plan.source.is_foreign:
        return f"{original}, a model with **Gated Slot Attention** of flash-linear-attention, in t2r's format: {slots}."
    kind = KINDS[plan.preset]
    if plan.gsa.scored:
        kind += ", were it not for which tokens its slots hold: those that the source reads most, not the last ones"
    return (
        f"{original} with **Gated Slot Attention** in place of softmax attention: {slots}, where the key-value cache "
        f"of the same layers grew by {plan.cache_bytes_per_token / 1e3:.1f} KB a token.\n\n{kind}."
    )


def tensor_table(tensors: dict[str, dict]) -> str:
    """Rows of equal tensors in all layers as one."""
    rows = Counter()
    for name, entry in tensors.items():
        status = entry["status"] + (f" ({entry['note']})" if "note" in entry else "")
        shape = " x ".join(map(str, entry["shape"]))
        rows[re.sub(r"\.\d+\.", ".*.", name), status, shape, entry["dtype"]] += 1
    return "\n".join(
        f"| `{name}` | {count} | {status} | {shape} | {dtype} |" for (name, status, shape, dtype), count in rows.items()
    )


def source_license(folder: Path) -> str | None:
    """The license that the source's own card names, or None."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license
    except ValueError:  # a card that is no YAML is no reason to stop
        return None


def push(folder: str, repo: str, private: bool = False, dry_run: bool = False) -> None:
    """Upload the converted model in `folder` to the hub's repository `repo`, which is made if it is not there.

    Raises UserError when the folder holds no converted model, the name is no repository's, or the hub refuses.
    """
    from t2r.convert.locate import HUB_ID
    from t2r.convert.source import open_source

    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo!r} is no repository", nearest="NAME/MODEL", next=f"t2r push {folder} NAME/MODEL")
    source = open_source(folder)
    if not source.config.model_type.startswith("gsa_"):
        what = f"this is a {source.config.model_type} model, not a converted one"
        raise UserError(what, where=folder, next=f"t2r convert {folder} OUT")
    files = sorted({file for pattern in PUBLIC for file in source.path.glob(pattern) if file.is_file()})
    for file in files:
        print(f"{file.stat().st_size:>15,}  {file.name}")
    size = sum(file.stat().st_size for file in files) / 1e9
    print(
        f"{len(files)} files, {size:.2f} GB, to https://huggingface.co/{repo}{' (private)' if private else ''}",
        flush=True,
    )
    if not dry_run:
        print(f"pushed to {upload(source.path, repo, private, [file.name for file in files])}")


def upload(folder: Path, repo: str, private: bool, files: list[str]) -> str:
    """Upload `files` of `folder` in one commit and return the repository's address. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from t2r import __version__
    from t2r.convert.source import first_line

    api = HfApi(library_name="t2r", library_version=__version__)
    try:
        api.whoami()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="t2r push")
        return str(url)
    except OfflineModeIsEnabled as error:
        command = f"HF_HUB_OFFLINE=0 t2r push {folder} {repo}"
        raise UserError("the hub is switched off by HF_HUB_OFFLINE", next=command) from error
    except LocalTokenNotFoundError as error:
        raise UserError("you are not logged in to the hub", next="hf auth login") from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub refuses: {first_line(error)}", where=repo, next="hf auth whoami") from error
    except Exception as error:  # what fails below HTTP has no base class of the hub's
        raise UserError(f"the hub cannot be reached: {first_line(error)}", where=repo) from error
