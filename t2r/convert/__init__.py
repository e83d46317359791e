"""`t2r convert`: a pretrained Transformer in, a Gated Slot Attention model out, as a Hugging Face folder.

source.py reads one tensor at a time, plan.py says what happens to each, writer.py writes the folder aside and renames
it when it is complete, verify.py proves that it equals its source.
"""

import sys


def convert(
    source: str,
    out: str,
    preset: str = "exact",
    slots: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    verify: bool = True,
) -> None:
    """Convert `source` (hub id, folder, GGUF file or package:NAME) into the new folder `out`.

    preset: "exact" starts as a ring buffer that equals the source within its slots; "paper" as arXiv 2409.07146.
    slots, sinks: in place of the preset's. dtype: name of the dtype to write, default the source's (float32 for GGUF).
    dry_run: print the plan and stop. verify: prove the result before it gets its name; nothing is left if that fails.

    Raises UserError for whatever the user can mend; `out` then does not exist.
    """
    from t2r.convert.plan import make_plan
    from t2r.convert.source import open_source
    from t2r.convert.verify import verify as verify_folder
    from t2r.convert.writer import FolderWriter, available_ram, check_absent, preflight
    from t2r.errors import UserError

    if not dry_run:
        check_absent(out)
    opened = open_source(source)
    plan = make_plan(opened, preset, slots, sinks, dtype)
    print(plan, flush=True)
    if dry_run:
        return
    opened.load_tokenizer()
    preflight(out, plan.disk_bytes, plan.ram_bytes)
    with FolderWriter(out, plan.targets) as writer:
        write_weights(plan, writer)
        write_rest(plan, writer.path)
        ram = available_ram()
        if verify and ram is not None and ram < plan.verify_ram_bytes:
            print(f"not verified: that takes {plan.verify_ram_bytes / 1e9:.1f} GB of memory, {ram / 1e9:.1f} are free")
        elif verify:
            report = verify_folder(writer.path, source)
            print(report, flush=True)
            if not report.passed:
                raise UserError(f"the result does not equal its source: {report.failed[0].name}", where=source)
    print(f"wrote {out}")


def write_weights(plan, writer) -> None:
    """Stream every tensor of the plan into the writer: the source's in storage order, then the new ones."""
    import torch
    from tqdm import tqdm

    from t2r.errors import UserError

    status = {e.name: e.status for e in plan.entries}
    for name, tensor in tqdm(
        plan.source.items(), total=len(plan.source.names()), desc="converting", disable=not sys.stderr.isatty()
    ):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name} holds NaN or infinite values", where=plan.source.path)
        if status[name] == "tied":
            if not torch.equal(tensor, plan.source.tensor("model.embed_tokens.weight")):
                raise UserError(
                    f"{name} differs from model.embed_tokens.weight, but the config ties them",
                    where=plan.source.path,
                    nearest='"tie_word_embeddings": false in config.json',
                )
            continue
        writer.add(name, tensor.to(plan.targets[name][1]))
    for name, tensor in plan.new_tensors.items():
        writer.add(name, tensor.to(plan.targets[name][1]))


def write_rest(plan, path) -> None:
    """Everything of the folder but the weights: config, generation config, tokenizer, and the report of the tensors."""
    import json

    from transformers import GenerationConfig

    from t2r import __version__

    plan.config.save_pretrained(path)
    generation = plan.source.generation_config() or GenerationConfig.from_model_config(plan.config)
    generation.save_pretrained(path)
    plan.source.save_tokenizer(path)
    report = {"schema_version": 1, "t2r": __version__, **plan.report()}
    (path / "conversion.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
