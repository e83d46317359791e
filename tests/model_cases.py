"""Tiny models, token ids and the comparisons that the tests of models and of their configuration share."""

from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import t2r  # noqa: F401
from t2r.modeling.attention import GSAttention
from t2r.modeling.cache import CACHE
from t2r.modeling.configuration import CONFIG_CLASSES, preset

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 96, "pad_token_id": 0,
}  # fmt: skip
SLOTS, SINKS = 16, 3
STUDENTS = ["exact", "paper", "hybrid"]


def teacher_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def student_model(name="exact", trained=True, **changes):
    """A converted tiny model; trained: with disturbed gates."""
    if name == "hybrid":  # softmax below slots that are evicted by score
        name, changes = "exact", {"softmax_layers": [0], "eviction": "score", **changes}
    record = preset(name, slots=SLOTS, sinks=SINKS if name == "exact" else None).to_dict() | changes
    model = AutoModelForCausalLM.from_config(CONFIG_CLASSES["llama"](**SIZES, gsa=record)).eval()
    missing, unexpected = model.load_state_dict(teacher_model().state_dict(), strict=False)
    assert not unexpected and all("self_attn" in key for key in missing)
    if trained:
        disturb(model)
    return model


@torch.no_grad()
def disturb(model):
    """Gates that do everything a gate can do, not the clock alone."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, GSAttention):
            module.f_proj.weight.normal_(std=module.gsa.damping / 10)
            if module.gsa.ring:
                module.write.add_(0.2 * torch.randn_like(module.write))
                module.keep.add_(0.2 * torch.randn_like(module.keep))
            if module.gsa.scored:
                module.bonus.weight.normal_(std=10)
                module.recent.copy_(torch.tensor([2, 9]))


def tokens(*shape, seed=0):
    """Token ids that are words in every tiny model: none is special."""
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def same(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def read(model, ids, cuts, cache):
    """Logits of ids [B, T] from the first cut to the last, read from cut to cut into `cache`."""
    return torch.cat([model(ids[:, a:b], **{CACHE: cache}).logits for a, b in pairwise(cuts)], dim=1)


def padded(rows, left):
    """Rows [1, n] of any lengths as one batch [B, T], filled up with a word, and its mask."""
    T = max(row.shape[1] for row in rows)
    batch, mask = torch.full((len(rows), T), 5), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(T - row.shape[1], T) if left else slice(0, row.shape[1])
        batch[i, where], mask[i, where] = row[0], 1
    return batch, mask


def same_where(mask, batch, rows):
    """Each row of the batch, without its padding, is the same as that row read alone."""
    for mine, real, alone in zip(batch, mask, rows, strict=True):
        same(mine[real == 1], alone)
