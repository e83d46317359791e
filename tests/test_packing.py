"""Rows and batches against their definitions: a pure function of seed and step."""

import numpy as np
import pytest
import torch

from t2r.data.packing import UNLABELLED, Mixture, Rows, ahead, batch, shares
from t2r.data.tokens import Shard, Tokens
from t2r.errors import UserError


def random_tokens(documents=40, seed=0):
    """Documents whose every token is the number of the document."""
    lengths = np.random.default_rng(seed).integers(1, 30, documents)
    starts = np.cumsum(lengths) - lengths
    return Tokens([Shard(np.repeat(np.arange(documents), lengths).astype(np.uint16), starts.astype(np.int64))])


def many_shards():
    return Tokens([random_tokens(n, seed=n).shards[0] for n in (40, 3, 25)])


@pytest.mark.parametrize("context", [8, 16, 31])
def test_packing_against_its_definition(context):
    rows = Rows(random_tokens(), context)
    (tokens,) = rows.tokens.shards
    assert rows.seen == (len(tokens.ids) - 1) // context
    packed = batch([rows.read(r) for r in range(rows.seen)], share=1.0)
    starts = set(tokens.starts.tolist())
    bounds = []
    for r in range(rows.seen):
        position = -1
        for t in range(context):
            at = r * context + t
            begins = t == 0 or at in starts
            position = 0 if begins else position + 1
            bounds += [at] if begins else []
            assert packed.input_ids[r, t] == tokens.ids[at]
            assert packed.position_ids[r, t] == position
            assert packed.labels[r, t] == (UNLABELLED if at + 1 in starts else tokens.ids[at + 1])
        assert rows.labelled(r) == (packed.labels[r] != UNLABELLED).sum()
    assert packed.cu_seqlens.tolist() == [*bounds, rows.seen * context]
    labelled = packed.labels != UNLABELLED
    assert torch.equal(packed.labels[labelled], packed.input_ids[labelled]), "a label crossed into another document"


def test_without_boundaries_rows_are_cut_from_one_text():
    rows = Rows(random_tokens(), 16, boundaries=False)
    (tokens,) = rows.tokens.shards
    packed = batch([rows.read(r) for r in range(rows.seen)], share=1.0)
    assert torch.equal(packed.labels.flatten(), torch.from_numpy(tokens.ids[1 : 16 * rows.seen + 1].astype(np.int64)))
    assert packed.cu_seqlens.tolist() == list(range(0, 16 * rows.seen + 1, 16)) and rows.labelled(3) == 16
    assert torch.equal(packed.position_ids, torch.arange(16).expand(rows.seen, 16))


@pytest.mark.parametrize("growing", [False, True])
def test_rows_do_not_cross_shards(growing):
    rows, tokens = Rows(many_shards(), 8, growing=growing), many_shards()
    rows.see(None)
    assert rows.seen == sum((len(shard.ids) - 1) // 8 for shard in tokens.shards)
    whole = [row for shard in tokens.shards for row in range((len(shard.ids) - 1) // 8)]
    shards = [shard for shard in tokens.shards for row in range((len(shard.ids) - 1) // 8)]
    for n, (shard, row) in enumerate(zip(shards, whole, strict=True)):
        assert np.array_equal(rows.read(n).ids, shard.ids[8 * row : 8 * row + 9])


def test_the_mask_shows_each_token_its_own_document_up_to_itself():
    rows = Rows(random_tokens(), 16)
    packed = batch([rows.read(0), rows.read(3)], share=1.0)
    document = packed.input_ids  # in these data, the token is the document's number
    t = torch.arange(16)
    want = (document[:, :, None] == document[:, None, :]) & (t[None, :, None] >= t[None, None, :])
    assert torch.equal(packed.attention_mask()[:, 0], want)


def test_rows_of_a_step_do_not_depend_on_the_processes_nor_on_the_past():
    def seen(rank, world, seed=3, step=5):
        rows = Mixture([Rows(random_tokens(), 8, seed), Rows(many_shards(), 8, seed)], [1, 2], seed)
        return [b.input_ids for b in rows.step(step, 8, 2, rank, world)]

    alone = seen(0, 1)
    assert len(alone) == 4
    two = [x for pair in zip(seen(0, 2), seen(1, 2), strict=True) for x in pair]
    assert all(map(torch.equal, alone, two))
    assert not all(map(torch.equal, alone, seen(0, 1, seed=4)))
    assert not all(map(torch.equal, alone, seen(0, 1, step=6)))


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    rows = Rows(random_tokens(), 8)
    epochs = [[rows.place(e * rows.seen + i) for i in range(rows.seen)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(rows.seen))
    assert epochs[0] != epochs[1]


def test_a_mixture_has_its_shares_and_reads_each_part_in_order():
    assert shares([1, 1, 1], 1000) == [334, 333, 333] and shares([0.7, 0.3], 1000) == [700, 300]
    assert shares([1e-9, 1], 1000) == [1, 999]
    mixture = Mixture([Rows(random_tokens(), 8), Rows(many_shards(), 8)], [3, 1], seed=1)
    picked = [mixture.pick(n) for n in range(3000)]
    for part, count in zip(mixture.parts, (2250, 750), strict=True):
        assert [n for p, n in picked if p is part] == list(range(count))
    assert {p is mixture.parts[0] for p, _ in picked[:20]} == {True, False}
    assert picked == [mixture.pick(n) for n in range(3000)] and mixture.pick(2999) == picked[2999]


def test_shares_make_the_mean_over_forwards_the_mean_over_tokens():
    rows = Mixture([Rows(random_tokens(), 8)])
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
        Rows(Tokens([Shard(np.arange(3), np.array([0]))]), 8)


def test_batches_prepared_ahead_are_the_same_and_errors_arrive():
    rows = Mixture([Rows(random_tokens(), 8)])
    batches = list(ahead(rows.step(0, 8, 2), torch.device("cpu")))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, rows.step(0, 8, 2), strict=True))

    def broken():
        yield batches[0]
        raise OSError("the shard cannot be read")

    with pytest.raises(OSError, match="the shard cannot be read"):
        list(ahead(broken(), torch.device("cpu")))
