"""Data: every format gives the same documents, tokens are made once, and rows are a pure function of seed and step."""

import gzip
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from t2r.data import tokens as tokens_module
from t2r.data.packing import UNLABELLED, Rows, ahead
from t2r.data.sources import resolve
from t2r.data.tokens import Tokens, tokenise
from t2r.errors import UserError

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

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: iter([{"text": name + split}]))
    (source,) = resolve(["some-org/some-data"])
    assert list(source.documents("text")) == ["some-org/some-datatrain"]


@pytest.mark.parametrize(
    "spec, content, message",
    [
        ("a.jsnl", None, "no data at "),
        ("a.csv", b"text\n", "a.csv has no known ending"),
        ("", None, " is a folder (in data); nearest valid: "),
        ("shipped:trian", None, "t2r ships no text 'trian' (in data); nearest valid: shipped:train"),
        ("b.jsonl", b'{"txt": "a"}\n', "document 1 has no text under 'text' (in "),
        ("b.jsonl", b'{"text": null}\n', "document 1 has no text under 'text' (in "),
        ("b.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON: "),
        ("b.jsonl", b"", "the data holds no text (in "),
        ("b.jsonl", b'{"text": " "}\n', "the data holds no text (in "),
        ("b.jsonl.gz", gzip.compress(LINES)[:-20], "cannot be read: "),
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
        tokenise([spec], tokenizer, "text", tmp_path / "cache", 100)
    assert message in str(error.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_wrong_field_is_answered_with_a_key_of_the_data(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match="no text under 'txt'.*nearest valid: data.field=text"):
        tokenise([str(tmp_path / "a.jsonl")], tokenizer, "txt", tmp_path / "cache", 100)


def test_tokens_are_made_once(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    arguments = ([str(path)], tokenizer, "text", tmp_path / "cache", 100)
    tokens = tokenise(*arguments)
    documents = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    assert tokens.ids.tolist() == sum(documents, [])
    assert tokens.ids.dtype == np.uint16 and isinstance(tokens.ids, np.memmap)
    assert tokens.starts.tolist() == np.cumsum([0] + [len(d) for d in documents[:-1]]).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "write", lambda *args: pytest.fail("tokenised again"))
        assert tokenise(*arguments).ids.tolist() == tokens.ids.tolist()
    path.write_bytes(LINES + LINES)
    assert len(tokenise(*arguments).ids) == 2 * len(tokens.ids)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_hub_is_read_no_further_than_needed(tmp_path, tokenizer, monkeypatch):
    import datasets

    endless = ({"text": "word " * 50} for _ in iter(int, 1))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: endless)
    assert len(tokenise(["org/endless"], tokenizer, "text", tmp_path, 1000).ids) >= 1000


def random_tokens(documents=40, seed=0):
    """Documents whose every token is the number of the document."""
    lengths = np.random.default_rng(seed).integers(1, 30, documents)
    starts = np.cumsum(lengths) - lengths
    return Tokens(np.repeat(np.arange(documents), lengths).astype(np.uint16), starts.astype(np.int64))


@pytest.mark.parametrize("context", [8, 16, 31])
def test_packing_against_its_definition(context):
    tokens = random_tokens()
    rows = Rows(tokens, context)
    assert len(rows) == (len(tokens.ids) - 1) // context
    batch = rows.batch(list(range(len(rows))), share=1.0)
    starts = set(tokens.starts.tolist())
    bounds = []
    for r in range(len(rows)):
        position = -1
        for t in range(context):
            at = r * context + t
            begins = t == 0 or at in starts
            position = 0 if begins else position + 1
            bounds += [at] if begins else []
            assert batch.input_ids[r, t] == tokens.ids[at]
            assert batch.position_ids[r, t] == position
            assert batch.labels[r, t] == (UNLABELLED if at + 1 in starts else tokens.ids[at + 1])
        assert rows.labelled(r) == (batch.labels[r] != UNLABELLED).sum()
    assert batch.cu_seqlens.tolist() == [*bounds, len(rows) * context]
    labelled = batch.labels != UNLABELLED
    assert torch.equal(batch.labels[labelled], batch.input_ids[labelled]), "a label crossed into another document"


def test_the_mask_shows_each_token_its_own_document_up_to_itself():
    batch = Rows(random_tokens(), 16).batch([0, 3], share=1.0)
    document = batch.input_ids  # in these data, the token is the document's number
    t = torch.arange(16)
    want = (document[:, :, None] == document[:, None, :]) & (t[None, :, None] >= t[None, None, :])
    assert torch.equal(batch.attention_mask()[:, 0], want)


def test_rows_of_a_step_do_not_depend_on_the_processes_nor_on_the_past():
    def seen(rank, world, seed=3, step=5):
        rows = Rows(random_tokens(), 8, seed)
        return [batch.input_ids for batch in rows.step(step, 8, 2, rank, world)]

    alone = seen(0, 1)
    assert len(alone) == 4
    two = [x for pair in zip(seen(0, 2), seen(1, 2), strict=True) for x in pair]
    assert all(map(torch.equal, alone, two))
    assert not all(map(torch.equal, alone, seen(0, 1, seed=4)))
    assert not all(map(torch.equal, alone, seen(0, 1, step=6)))


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    rows = Rows(random_tokens(), 8)
    epochs = [[rows.row(e * len(rows) + i) for i in range(len(rows))] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(rows)))
    assert epochs[0] != epochs[1]


def test_shares_make_the_mean_over_forwards_the_mean_over_tokens():
    rows = Rows(random_tokens(), 8)
    batches = list(rows.step(2, 8, 2))
    counts = [(batch.labels != UNLABELLED).sum().item() for batch in batches]
    assert len(set(counts)) > 1
    assert sum(n / b.share.item() for n, b in zip(counts, batches, strict=True)) / len(batches) == pytest.approx(1)
    held_out = list(rows.first(5, 2))
    assert [len(b.input_ids) for b in held_out] == [2, 2]
    counts = [(batch.labels != UNLABELLED).sum().item() for batch in held_out]
    assert sum(n / b.share.item() for n, b in zip(counts, held_out, strict=True)) / 2 == pytest.approx(1)


def test_too_little_text_for_a_row_is_named():
    with pytest.raises(UserError, match="the data has 3 tokens, less than one row of 8.*nearest valid: context=2"):
        Rows(Tokens(np.arange(3), np.array([0])), 8)


def test_batches_prepared_ahead_are_the_same_and_errors_arrive():
    rows = Rows(random_tokens(), 8)
    batches = list(ahead(rows.step(0, 8, 2), torch.device("cpu")))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, rows.step(0, 8, 2), strict=True))

    def broken():
        yield batches[0]
        raise OSError("the shard cannot be read")

    with pytest.raises(OSError, match="the shard cannot be read"):
        list(ahead(broken(), torch.device("cpu")))
