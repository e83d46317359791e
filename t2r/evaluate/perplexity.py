"""Perplexity: the loss on every token of a text, read in segments through the model's cache."""

import torch
from torch import Tensor

ROWS = 256  # rows of logits that are turned into float32 losses at once


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target. logits [..., V] of any dtype, targets [...] -> [...] float32, on the logits' device.

    Works through a few rows at a time: the float32 copy of a long text's logits would be the largest tensor of all.
    """
    rows = zip(logits.flatten(0, -2).split(ROWS), targets.flatten().split(ROWS), strict=True)
    parts = [part.float().logsumexp(-1) - part.gather(-1, target[:, None])[:, 0].float() for part, target in rows]
    return torch.cat(parts).view(targets.shape)


@torch.inference_mode()
def token_nll(model, ids: Tensor, segment: int = 2048) -> Tensor:
    """-log p(ids[:, t+1] | ids[:, :t+1]) in nats: ids [B, T], T >= 2 -> [B, T-1] float32 on the CPU.

    model: a causal language model of transformers, a converted one or any other. The text is read in segments of
    `segment` tokens that hand the cache on, so T is bounded by nothing but the model's own cache, and the largest
    tensor is [B, segment, vocabulary].
    """
    from transformers import DynamicCache

    ids = ids.to(model.device)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    cache = DynamicCache(config=model.config)
    parts = []
    for read, target in zip(inputs.split(segment, dim=1), targets.split(segment, dim=1), strict=True):
        logits = model(read, past_key_values=cache, use_cache=True).logits
        parts.append(losses(logits, target).cpu())
    return torch.cat(parts, dim=1)
