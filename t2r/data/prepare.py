"""The data of a run: what its configuration names, tokenised before it, beside it, or by `t2r prepare`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from t2r.data.lookups import AGAIN
from t2r.data.packing import Mixture, Rows
from t2r.data.tokens import Request, Tokens, check_hashes, check_text, request, tokenise, tokenise_ahead
from t2r.errors import UserError
from t2r.schema import DataConfig, PartConfig, RunConfig, StageConfig


class RunData:
    """The tokens of all stages of a run, for training and for validation. Raises UserError for data that is missing, or
    that has no row of a stage's context, and for a tokenizer that cannot mark answers which a stage asks for."""

    def __init__(self, settings: RunConfig, tokenizer) -> None:
        self.settings, data = settings, settings.data
        asked = data.has_lookups and any(s.kind == "distill" and s.loss.answers == "text" for s in settings.stages)
        if asked and not tokenizer.is_fast:
            raise UserError("loss.answers is text: this tokenizer cannot say where answers are", nearest="teacher")
        load = tokenise_ahead if data.stream else tokenise
        self.training = [load(wanted, tokenizer, data.cache) for wanted in training(settings)]
        self.held_out = [tokenise(wanted, tokenizer, data.cache) for wanted in validation(settings)]
        for stage in settings.stages:
            self.rows(stage, settings.seed)
            self.validation_rows(stage)

    def rows(self, stage: StageConfig, seed: int) -> Mixture:
        data, names = self.settings.data, part_names(self.settings.data)
        names += [f"{name} with lookups" for name in names if data.lookups]
        return self.mixture(self.training, parts(data), names, stage, seed, data.stream)

    def validation_rows(self, stage: StageConfig) -> Mixture | None:
        if not stage.validation_tokens:
            return None
        data = self.settings.data
        names = ["data.validation"] if data.validation else [f"data.held_out of {n}" for n in part_names(data)]
        return self.mixture(self.held_out, plain_parts(data), names, stage, seed=0, growing=False)

    def mixture(
        self, tokens: Sequence[Tokens], parts: list[PartConfig], names: Sequence[str], stage: StageConfig, seed: int,
        growing: bool,
    ) -> Mixture:  # fmt: skip
        keep = self.settings.data.boundaries
        rows = [Rows(one, stage.context, seed, name, keep, growing) for one, name in zip(tokens, names, strict=True)]
        return Mixture(rows, [part.weight for part in parts] if len(rows) > 1 else (1.0,), seed)


def plain_parts(data: DataConfig) -> list[PartConfig]:
    """The parts of the data as the configuration names them: one, unless there is a mixture."""
    return data.mix or [PartConfig(data.train)]


def parts(data: DataConfig) -> list[PartConfig]:
    """The parts that training reads: each a second time with lookups, if there are to be some."""
    kinds = (("", 1 - data.lookups), (AGAIN, data.lookups)) if data.lookups else (("", 1.0),)
    return [
        replace(part, data=[prefix + spec for spec in part.data], weight=share * part.weight)
        for prefix, share in kinds
        for part in plain_parts(data)
    ]


def part_names(data: DataConfig) -> list[str]:
    return [f"data.mix.{i}" for i in range(len(data.mix))] or ["data.train"]


def training(settings: RunConfig) -> list[Request]:
    needed = max(stage.tokens + stage.context for stage in settings.stages)
    return requests(settings.data, parts(settings.data), needed, validation=False)


def validation(settings: RunConfig) -> list[Request]:
    """What is held out: files of its own, or documents of the training data by their hash; [] without validation."""
    data = settings.data
    needed = max(stage.validation_tokens + stage.context for stage in settings.stages)
    if not any(stage.validation_tokens for stage in settings.stages):
        return []
    if data.validation:
        return [request(data.validation, data.field, needed)]
    return requests(data, plain_parts(data), needed, validation=True)


def requests(data: DataConfig, parts: list[PartConfig], needed: int, validation: bool) -> list[Request]:
    total = sum(part.weight for part in parts)
    return [
        # a few rows more than its share: in a block of rows a part may come early
        request(
            part.data, part.field or data.field, int(1.1 * needed * part.weight / total) + 1, data.held_out, validation
        )
        for part in parts
    ]


def check_data(settings: RunConfig) -> None:
    """Raise UserError unless the first document of every file is there and has what the configuration says, and files
    leave something to train on and to validate with. Hub data sets are not read."""
    for wanted in [*training(settings), *validation(settings)]:
        local = [source for source in wanted.sources if source.path is not None]
        for source in local:
            next(source.documents(wanted.field), None)
        if len(local) == len(wanted.sources):
            check_text(wanted)


def prepare(config: str, overrides: Sequence[str] = ()) -> None:
    """Tokenise all that the stages of `config` will read, so that no run has to; what is there already is checked
    against its hashes. Raises UserError for data that is missing or damaged."""
    from t2r.convert.source import open_source
    from t2r.schema import load_run

    settings = load_run(config, overrides)
    if not settings.stages:
        raise UserError("there are no stages to prepare data for", where=config)
    check_data(settings)
    tokenizer = open_source(settings.source).load_tokenizer()
    cache = Path(settings.data.cache).expanduser()
    for kind, wanted in (("training", training(settings)), ("validation", validation(settings))):
        for one in wanted:
            folder = cache / one.key(tokenizer)
            there = folder.exists()
            tokens = tokenise(one, tokenizer, cache)
            if there:
                check_hashes(folder)
            documents, state = sum(len(shard.starts) for shard in tokens.shards), "unchanged" if there else "written"
            count = f"{len(tokens):,} tokens, {documents:,} documents, {len(tokens.shards)} shards"
            name = f"{kind} with lookups" if one.sources[0].lookups else kind
            print(f"{name}: {count}, {state}: {folder}")
