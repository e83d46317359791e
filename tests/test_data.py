"""Data: every format gives the same documents, and tokens are made once."""

import copy
import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from t2r.data import tokens as tokens_module
from t2r.data.packing import UNLABELLED, Rows
from t2r.data.prepare import RunData, prepare, training, validation
from t2r.data.sources import resolve
from t2r.data.tokens import Tokens, check_hashes, request, tokenise, tokenise_ahead
from t2r.errors import UserError
from t2r.schema import load_run

TEXTS = ["The tide was out.", "Two clocks,\none wall: \u00e9t\u00e9.", "x" * 300, "Four."]
LINES = "".join(json.dumps({"text": text, "title": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_zstd(path):
    zstandard = pytest.importorskip("zstandard", reason="needs `pip install zstandard`")
    # two frames, as `zstd -T2` or `cat a.zst b.zst` write them
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(LINES[:100]) + compress(LINES[100:]))


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(len(TEXTS))}), path)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    WRITERS[name](tmp_path / name)
    (source,) = resolve([str(tmp_path / name)])
    assert list(source.documents("text")) == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[1], encoding="utf-8")
    (source,) = resolve([str(tmp_path / "*.txt")])
    assert list(source.documents("text")) == [TEXTS[1]]


def test_patterns_are_sorted_and_shipped_text_is_found(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert [s.path.name for s in resolve([str(tmp_path / "*.jsonl")])] == ["a.jsonl", "b.jsonl"]
    for name in ("train", "validation"):
        (source,) = resolve([f"shipped:{name}"])
        assert all(len(text) > 200 for text in source.documents("text"))


def test_hub_names_are_streamed(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter([{"text": str((args, options))}]))
    for name in ("some-org/some-data", "some-org/some-data:subset"):
        (source,) = resolve([name])
        asked += source.documents("text")
    assert asked == [
        "(('some-org/some-data',), {'split': 'train', 'streaming': True})",
        "(('some-org/some-data',), {'name': 'subset', 'split': 'train', 'streaming': True})",
    ]


@pytest.mark.parametrize(
    "spec, content, message",
    [
        ("a.jsnl", None, "no data at "),
        ("none/*.jsonl", None, "nearest valid: shipped:train, or files: 'data.train="),
        ("a.csv", b"text\n", "a.csv has no known ending"),
        ("", None, " is a folder (in data); nearest valid: "),
        ("shipped:trian", None, "t2r ships no text 'trian' (in data); nearest valid: shipped:train"),
        ("b.jsonl", b'{"txt": "a"}\n', "document 1 has no text under 'text' (in "),
        ("b.jsonl", b'{"text": null}\n', "document 1 has no text under 'text' (in "),
        ("b.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON: "),
        ("b.jsonl", b"", "the data holds no text (in "),
        ("b.jsonl", b'{"text": " "}\n', "the data holds no text (in "),
        ("b.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "cannot be read: "),
        ("b.jsonl.gz", LINES, "cannot be read: Not a gzipped file"),
        ("b.parquet", LINES, "cannot be read: "),
        ("b.txt", b"\xff\xfe\xfa", "cannot be read: "),
    ],
)
def test_bad_data_is_named_and_leaves_nothing(tmp_path, tokenizer, spec, content, message):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_bytes(LINES)
    if content is not None:
        (data / spec).write_bytes(content)
    with pytest.raises(UserError) as error:
        spec = spec if spec.startswith("shipped:") else str(data / spec)
        tokenise(request([spec], "text", 100), tokenizer, tmp_path / "cache")
    assert message in str(error.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_wrong_field_is_answered_with_a_key_of_the_data(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match="no text under 'txt'.*nearest valid: data.field=text"):
        tokenise(request([str(tmp_path / "a.jsonl")], "txt", 100), tokenizer, tmp_path / "cache")


def test_tokens_are_made_once(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    arguments = (tokenizer, tmp_path / "cache")
    tokens = tokenise(request([str(path)], "text", 100), *arguments)
    (shard,) = tokens.shards
    documents = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    assert shard.ids.tolist() == sum(documents, [])
    assert shard.ids.dtype == np.uint16 and isinstance(shard.ids, np.memmap)
    assert shard.starts.tolist() == np.cumsum([0] + [len(d) for d in documents[:-1]]).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "write", lambda *args: pytest.fail("tokenised again"))
        assert tokenise(request([str(path)], "text", 100), *arguments).shards[0].ids.tolist() == shard.ids.tolist()
    path.write_bytes(LINES + LINES)
    assert len(tokenise(request([str(path)], "text", 100), *arguments)) == 2 * len(tokens)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_hub_is_read_no_further_than_needed(tmp_path, tokenizer, monkeypatch):
    import datasets

    endless = ({"text": "word " * 50} for _ in iter(int, 1))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: endless)
    assert 1000 <= len(tokenise(request(["org/endless"], "text", 1000), tokenizer, tmp_path)) < 10**6


def in_shards(specs):
    """A request for small shards."""
    return replace(request(specs, "text", 1), shard=300)


@pytest.fixture
def one_by_one(monkeypatch):
    """Documents are read one at a time, so that a shard has two or three."""
    monkeypatch.setattr(tokens_module, "BATCH", 1)


def jsonl(path, documents, field="text"):
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents))
    return str(path)


def many(count=40):
    return [f"document {i} " + "abc " * (i * 7 % 40) for i in range(count)]


def contents(tokens):
    """ids of each document."""
    return [list(d) for shard in tokens.shards for d in np.split(shard.ids, shard.starts[1:])]


def test_shards_together_hold_every_document_once(tmp_path, tokenizer, one_by_one):
    specs = [jsonl(tmp_path / "a.jsonl", many(30)), jsonl(tmp_path / "b.jsonl", many(10))]
    tokens = tokenise(in_shards(specs), tokenizer, tmp_path / "cache")
    assert len(tokens.shards) > 5
    want = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in many(30) + many(10)]
    assert contents(tokens) == want


def test_tokenising_goes_on_after_the_last_whole_shard(tmp_path, tokenizer, one_by_one, monkeypatch):
    wanted = in_shards([jsonl(tmp_path / "a.jsonl", many())])
    want = contents(tokenise(wanted, tokenizer, tmp_path / "straight"))
    plain, count = tokens_module.write_shard, [0]

    def killed(*arguments):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens_module, "write_shard", killed)
        tokenise(wanted, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    first = (folder / "00000" / "ids.npy").stat().st_mtime_ns
    assert {path.name for path in folder.iterdir()} == {"00000", "00001", "00002", ".lock"}
    assert contents(tokenise(wanted, tokenizer, tmp_path / "cache")) == want
    assert (folder / "00000" / "ids.npy").stat().st_mtime_ns == first


def test_tokens_can_be_used_while_they_are_made(tmp_path, tokenizer):
    wanted = in_shards([jsonl(tmp_path / "a.jsonl", many(3000))])
    want = tokenise(wanted, tokenizer, tmp_path / "before")
    growing = tokenise_ahead(wanted, tokenizer, tmp_path / "cache")
    rows = Rows(growing, 16, seed=3, growing=True)
    assert rows.seen < len(want) // 32, "training had to wait for all shards"
    whole = Rows(want, 16, seed=3, growing=True)
    first = [rows.place(n) for n in range(30)]
    assert first == [whole.place(n) for n in range(30)]
    assert all(np.array_equal(rows.read(n).ids, whole.read(n).ids) for n in first)
    # a resumed run asks for a late row first
    again = Rows(tokenise_ahead(wanted, tokenizer, tmp_path / "cache"), 16, seed=3, growing=True)
    whole.see(None)
    late = [whole.seen - 1, whole.seen, 2 * whole.seen + 5]
    assert [again.place(n) for n in late] == [whole.place(n) for n in late]
    epochs = [sorted(whole.place(e * whole.seen + n) for n in range(whole.seen)) for e in range(2)]
    assert epochs[0] == epochs[1] == list(range(whole.seen))


def test_bad_data_is_named_by_the_process_that_reads_it(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in many(4000)).encode())[:-20])
    rows = Rows(tokenise_ahead(in_shards([str(path)]), tokenizer, tmp_path / "cache"), 16, growing=True)
    assert rows.place(20) >= 0
    with pytest.raises(UserError, match=r"cannot be read: .* \(in .*a.jsonl.gz\)"):
        rows.see(None)


@pytest.mark.parametrize("name", ["ids.npy", "starts.npy", "shard.json"])
def test_a_damaged_shard_is_named(tmp_path, tokenizer, one_by_one, name):
    wanted = in_shards([jsonl(tmp_path / "a.jsonl", many())])
    tokenise(wanted, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    check_hashes(folder)
    path = folder / "00001" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-9])
    with pytest.raises(UserError, match=f"damaged tokens: .*00001.*try: `rm -r {folder}"):
        tokenise(wanted, tokenizer, tmp_path / "cache")
    if name == "ids.npy":
        path.write_bytes(raw[:-2] + b"\1\1")
        tokenise(wanted, tokenizer, tmp_path / "cache")
        with pytest.raises(UserError, match="damaged tokens: ids.npy is not what was written"):
            check_hashes(folder)


def test_held_out_documents_are_chosen_by_hash_and_never_trained_on(tmp_path, tokenizer):
    spec = [jsonl(tmp_path / "a.jsonl", texts := many(200))]
    sets = [
        contents(tokenise(request(spec, "text", 10**9, 0.2, held), tokenizer, tmp_path / "cache"))
        for held in (False, True)
    ]
    want = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert sorted(sets[0] + sets[1]) == sorted(want) and 20 < len(sets[1]) < 60
    longer = [jsonl(tmp_path / "b.jsonl", texts + ["one more"])]
    again = contents(tokenise(request(longer, "text", 10**9, 0.2, True), tokenizer, tmp_path / "cache"))
    assert again[: len(sets[1])] == sets[1]


@pytest.mark.parametrize("chunk", ["The tide was out. ", "\u6f6e\u6c34\u9000\u4e86"])
def test_of_a_text_file_the_end_is_held_out(tmp_path, tokenizer, chunk):
    (tmp_path / "own.txt").write_text(chunk * 100, encoding="utf-8")
    spec = [str(tmp_path / "own.txt")]
    train, held = (
        tokenise(request(spec, "text", 10**9, 0.25, held), tokenizer, tmp_path / "cache") for held in (False, True)
    )
    assert contents(train) == [tokenizer(chunk * 75)["input_ids"] + [tokenizer.eos_token_id]]
    assert contents(held) == [tokenizer(chunk * 25)["input_ids"] + [tokenizer.eos_token_id]]


@pytest.mark.parametrize("share, which, held", [(1e-9, "none", True), (1 - 1e-9, "all", False)])
def test_a_share_that_leaves_nothing_is_told(tmp_path, tokenizer, share, which, held):
    spec = [jsonl(tmp_path / "a.jsonl", TEXTS)]
    what = rf"data.held_out is {share}, which holds out {which} of the data's documents \(4\) \(in .*a.jsonl\)"
    with pytest.raises(UserError, match=f"{what}; nearest valid: data.held_out=0 data.validation="):
        tokenise(request(spec, "text", 100, share, held), tokenizer, tmp_path / "cache")


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_of_a_chat_only_the_assistant_is_learned(tmp_path, chatty):
    chats = [chat("Hello?", "Yes.", "And you?", "No."), chat("a" * 20, "b")]
    wanted = request([jsonl(tmp_path / "a.jsonl", chats, "messages")], "messages", 1)
    (shard,) = tokenise(wanted, chatty, tmp_path / "cache").shards
    text = "<user>Hello?</s>\n<assistant>Yes.</s>\n<user>And you?</s>\n<assistant>No.</s>\n"
    assert chatty.decode(shard.ids[: shard.starts[1]]) == text
    assert chatty.decode(shard.ids[: shard.starts[1]][shard.learned[: shard.starts[1]]]) == "Yes.</s>\nNo.</s>\n"
    rows = Rows(Tokens([shard]), 16)
    seen = 0
    for row in range(len(shard.ids) // 16 - 1):
        read = rows.read(row)
        labels = read.labels[read.labels != UNLABELLED]
        assert rows.labelled(row) == len(labels)
        positions = 16 * row + 1 + np.flatnonzero(read.labels != UNLABELLED)
        assert shard.learned[positions].all() and not set(positions) & set(shard.starts)
        seen += len(labels)
    assert seen > 5


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "the data holds messages, but the source's tokenizer has no chat template"),
        ("{{ messages | length }}", "the chat template writes a turn differently once others follow"),
        ("{{ raise_exception('not so') }}", "the chat template cannot write a chat: not so"),
    ],
)
def test_a_template_that_does_not_fit_is_named(tmp_path, chatty, template, message):
    chatty.chat_template = template
    wanted = request([jsonl(tmp_path / "a.jsonl", [chat("a", "b", "c", "d")], "messages")], "messages", 1)
    with pytest.raises(UserError, match=message):
        tokenise(wanted, chatty, tmp_path / "cache")


def test_prepare_makes_what_a_run_reads_and_checks_it_the_next_time(tmp_path, tiny_llama, tokenizer, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"""source: {tiny_llama}
data:
  mix: [{{data: [{jsonl(tmp_path / "a.jsonl", many())}]}}, {{data: [shipped:validation], weight: 3}}]
  held_out: 0.2
  lookups: 0.2
  cache: {tmp_path}/cache
stages: [{{kind: lm, tokens: 640, context: 64, batch_tokens: 128, lr: {{gates: 1e-3}}, validation_tokens: 128}}]
""")
    prepare(str(config))
    lines = capsys.readouterr().out.splitlines()
    kinds = ["training", "training with lookups", "validation"]
    assert [line.split(":")[0] for line in lines] == [kind for kind in kinds for _part in range(2)]
    assert all("written" in line for line in lines)
    prepare(str(config))
    assert all("unchanged" in line for line in capsys.readouterr().out.splitlines())
    settings = load_run(config)
    folders = {wanted.key(tokenizer) for wanted in [*training(settings), *validation(settings)]}
    assert folders == {path.name for path in (tmp_path / "cache").iterdir()}
    data = RunData(settings, tokenizer)
    assert [len(part.tokens) for part in data.rows(settings.stages[0], 0).parts] == [len(t) for t in data.training]
    assert len(list(data.validation_rows(settings.stages[0]).first(2, 1))) == 2
