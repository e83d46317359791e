"""A small teacher, a student and packed batches, which the tests of stages, losses and parameters share."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from t2r.data.packing import UNLABELLED, Batch
from t2r.modeling.configuration import CONFIG_CLASSES, GSAConfig, preset
from t2r.schema import LearningRates, LossConfig, StageConfig

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
STAGE = StageConfig("align", tokens=10**6, lr=LearningRates(1e-3, 1e-3, 1e-3), loss=LossConfig(kl=0.7, temperature=2.0))


def teacher_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def student_model(**changes):
    gsa = GSAConfig(**(preset("exact", slots=16, sinks=3).to_dict() | changes))
    model = AutoModelForCausalLM.from_config(CONFIG_CLASSES["llama"](**SIZES, gsa=gsa.to_dict()))
    model.load_state_dict(teacher_model().state_dict(), strict=False)
    return model


def batch_of(lengths, seed=0):
    """Rows of documents, lengths[row][document]; the last document of a row ends with it."""
    B, T = len(lengths), sum(lengths[0])
    ids = torch.randint(3, 96, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    labels, positions, bounds = ids[:, 1:].clone(), [], [0]
    for row, documents in enumerate(lengths):
        end = 0
        for n in documents:
            end += n
            labels[row, end - 1] = UNLABELLED
            bounds.append(bounds[-1] + n)
        positions.append(torch.cat([torch.arange(n) for n in documents]))
    share = torch.tensor(float((labels != UNLABELLED).sum()))
    return Batch(ids[:, :-1], labels, torch.stack(positions), torch.tensor(bounds), share)


def alone(batch):
    """Each document of a batch as a batch of its own."""
    for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        cut = [x.flatten()[None, begin:end] for x in (batch.input_ids, batch.labels, batch.position_ids)]
        yield Batch(*cut, torch.tensor([0, end - begin]), torch.tensor(1.0))


PACKED = [[20, 1, 19], [7, 33]]
