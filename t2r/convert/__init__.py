"""`t2r convert`: a pretrained Transformer in, a Gated Slot Attention model out, as a Hugging Face folder.

locate.py finds the source; source.py, folder.py and gguf.py read it one tensor at a time; plan.py says what happens to
each; writer.py writes the folder aside and renames it when it is complete; verify.py proves that it equals its source.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def convert(
    source: str,
    out: str,
    preset: str | None = None,
    slots: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    verify: bool = True,
    hash: bool = True,
    shard_size: int | None = None,
    eviction: str = "oldest",
    layer_slots: str = "",
    keep_softmax: str = "",
    eviction_text: Sequence[str] = ("shipped:train",),
    eviction_reach: str = "far",
) -> None:
    """Convert `source` (hub id, folder, GGUF file or package:NAME) into the new folder `out`.

    preset: "exact", the default, starts as a ring buffer that equals the source within its slots; "paper" as arXiv
    2409.07146, which a model of flash-linear-attention is already.
    slots, sinks: in place of the preset's. layer_slots: in place of slots in single layers, such as "0-3=128,9=256".
    keep_softmax: layers that stay as they are, such as "0,8-11".
    eviction: which token makes room, the "oldest" or by "score": that which the source's own attention, on
    `eviction_text` (as DataConfig.train), would miss least. eviction_reach: "far" holds what is asked for late longer,
    "near" what the next words need.
    dtype: name of the dtype to write, default the source's (float32 for GGUF).
    dry_run: print the plan and stop. verify: prove the result before it gets its name; nothing is left if that fails.
    hash: record the SHA-256 of every file of the source. shard_size: bytes of a weight file at most, default 5 GB.

    A run that was killed is continued by the same command. Raises UserError for whatever the user can mend; `out` then
    does not exist.
    """
    from t2r.convert.evict import fit_scores
    from t2r.convert.plan import import_plan, make_plan
    from t2r.convert.source import open_source
    from t2r.convert.verify import verify as verify_folder
    from t2r.convert.writer import SHARD_SIZE, FolderWriter, available_ram, check_absent, preflight
    from t2r.errors import UserError
    from t2r.publish import model_card

    if eviction_reach != "far" and eviction == "oldest":
        what = f"{eviction_reach}, but the oldest token makes room: nothing is scored"
        raise UserError(what, where="--eviction-reach", nearest="--eviction score")
    if not dry_run:
        check_absent(out)
    opened = open_source(source)
    check_config(opened)
    if opened.is_foreign:
        if slots is not None or sinks is not None or eviction != "oldest" or layer_slots or keep_softmax:
            raise UserError("this model has its slots already: only its dtype can be chosen", where=opened.path)
        if preset not in (None, "paper"):
            what = f"this model is of the preset paper already and cannot become {preset}"
            raise UserError(what, where=opened.path, nearest="--preset paper")
        plan = import_plan(opened, dtype)
    else:
        plan = make_plan(opened, preset or "exact", slots, sinks, dtype, eviction, layer_slots, keep_softmax)
    print(plan, flush=True)
    if dry_run:
        return
    opened.load_tokenizer()
    preflight(out, plan.disk_bytes, plan.ram_bytes)
    resume = state_of(plan, *((*eviction_text, eviction_reach) if eviction == "score" else ()))
    with FolderWriter(out, plan.targets, shard_size or SHARD_SIZE, resume=resume) as writer:
        if writer.written:
            print(f"going on    a killed run has written {len(writer.written)} of {len(plan.targets)} tensors")
        scores = {}
        if any(".bonus." in name for name in plan.new_tensors if name not in writer.written):
            with timed("scores fit"):
                scores = fit_scores(opened, plan.gsa.gsa_layers(plan.config), eviction_text, eviction_reach)
        with timed("copied", sum(writer.nbytes(name) for name in plan.targets if name not in writer.written)):
            digests = write_weights(plan, writer, hash, scores)
            made = write_rest(plan, writer.path, digests)
            writer.flush()
        ram, report = available_ram(), None
        if verify and ram is not None and ram < plan.verify_ram_bytes:
            print(f"not verified: that takes {plan.verify_ram_bytes / 1e9:.1f} GB of memory, {ram / 1e9:.1f} are free")
        elif verify:
            with timed("checked"):
                report = verify_folder(writer.path, source)
            print(report, flush=True)
            if not report.passed:
                raise UserError(f"the result does not equal its source: {report.failed[0].name}", where=source)
        card = model_card(plan, made, report and str(report))
        (writer.path / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {out}")


def check_config(source) -> None:
    """UserError unless transformers can build the model that the source's config describes."""
    import torch
    from transformers import AutoModelForCausalLM

    from t2r.convert.source import CONFIG_FAULTS, first_line
    from t2r.errors import UserError

    config = source.config
    for name in SIZES:
        if isinstance(size := getattr(config, name, None), int) and size < 1:
            raise UserError(f"{name} is {size}", where=source.path)
    heads, kv_heads = (getattr(config, f"num_{kind}_heads", None) or 1 for kind in ("attention", "key_value"))
    if heads % kv_heads:
        raise UserError(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly", where=source.path)
    layers, tensors = getattr(config, "num_hidden_layers", 1), len(source.names())
    if layers > tensors:  # before a model of a billion layers is built
        raise UserError(f"the config asks for {layers} layers, but there are only {tensors} tensors", where=source.path)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except CONFIG_FAULTS as error:
        what = f"the config describes no model: {type(error).__name__}: {first_line(error)}"
        raise UserError(what, where=source.path) from error


@contextmanager
def timed(what: str, size: int | None = None):
    """Print how long the block took, and how many bytes a second that makes."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    amount = (
        f"{size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e6 / seconds:,.0f} MB/s" if size else f"in {seconds:.1f} s"
    )
    print(f"{what:<11} {amount}", flush=True)


def state_of(plan, *options) -> str:
    """Names a conversion: the source's files as they are now, and all that decides the result, `options` included. What
    a killed run left is continued only where it has the same name."""
    from t2r import __version__

    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in plan.source.files]
    return repr((__version__, files, plan.config.to_dict(), *options))


def write_weights(plan, writer, hashing: bool, fitted: dict) -> dict[str, str] | None:
    """Stream every tensor of the plan into the writer: the source's in storage order, then the new ones, `fitted` in
    place of their starting values.

    Returns name and SHA-256 of each file of the source, taken from the same read, or None without `hashing`.
    """
    import torch
    from tqdm import tqdm

    from t2r.errors import UserError

    source, digests = plan.source, {} if hashing else None
    targets, tied = plan.targets, {e.name for e in plan.entries if e.status == "tied"}
    size = sum(source.nbytes(name) for name in source.names() if name not in writer.written)
    with tqdm(total=size, unit="B", unit_scale=True, desc="converting", disable=not sys.stderr.isatty()) as bar:
        for name, start, values in source.pieces(skip=writer.written, digests=digests):
            if not all_finite(values):
                raise UserError(f"tensor {name} holds NaN or infinite values", where=source.path)
            if name in tied:
                if not start:
                    embedding = source.tensor("model.embed_tokens.weight").flatten()
                if not torch.equal(values, embedding[start : start + len(values)]):
                    raise UserError(
                        f"{name} differs from model.embed_tokens.weight, but the config ties them",
                        where=source.path,
                        nearest='"tie_word_embeddings": false in config.json',
                    )
            elif targets[name][1] != source.dtype(name) or not (place := source.place(name)):
                writer.add_piece(name, start, values.to(targets[name][1]))
            elif not start:
                writer.add_copy(name, *place)
            bar.update(values.nbytes)
    for name, tensor in plan.new_tensors.items():
        if name not in writer.written:
            writer.add(name, fitted.get(name, tensor).to(targets[name][1]))
    return digests


def all_finite(tensor) -> bool:
    """Whether no value is NaN or infinite: both extremes say it, in one pass without a temporary tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(least.isfinite() and most.isfinite())


def write_rest(plan, path, digests: dict[str, str] | None) -> dict:
    """Everything of the folder but weights and card: config, code, generation config, tokenizer, conversion.json.

    Returns what conversion.json says: the source's files, every tensor.
    """
    import json

    from transformers import GenerationConfig

    from t2r import __version__
    from t2r.convert.standalone import write_standalone

    plan.config.save_pretrained(path)
    write_standalone(plan.config, path)
    generation = plan.source.generation_config() or GenerationConfig.from_model_config(plan.config)
    generation.save_pretrained(path)
    plan.source.save_tokenizer(path)
    files = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": digests and digests[file.name]}
        for file in plan.source.files
    ]
    report = {"schema_version": 1, "t2r": __version__, "source_files": files, **plan.report()}
    (path / "conversion.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
