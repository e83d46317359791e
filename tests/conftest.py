import json
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, also in its subprocesses; torch reads this when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch
import torch.utils._device

if not torch.cuda.is_available():  # our kernels then run in Triton's interpreter; it is chosen when they are imported
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Memory that nobody has written holds NaN, so that a result which depends on it cannot pass by luck."""
    # `with torch.device(...)` recognises constructors from a list that it makes once: before we replace two of them.
    torch.utils._device._device_constructors()

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype in FLOATS:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A Llama folder that transformers wrote: random weights, 2 layers, 6 heads on 2 kv heads, bfloat16, two shards,
    and a byte-level tokenizer that reads any text. Not to be changed: copy it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, initializer_range=0.2, attention_bias=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # biases start at 0, which would hide that one was lost
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="80KB")
    return folder


SIZES = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny():
    """tiny(config_class, dtype, **options): a random model whose norms and biases are no constants."""

    def make(config_class=None, dtype=torch.float32, **options):
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config((config_class or LlamaConfig)(**{**SIZES, **options}))
        for parameter in model.parameters():  # norms and biases start as constants, which would hide a mix-up
            torch.nn.init.normal_(parameter, std=0.1)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def start(tiny_llama, tmp_path_factory) -> Path:
    """The conversion of tiny_llama that is trained, in float32. Not to be changed."""
    from t2r.convert import convert

    out = tmp_path_factory.mktemp("start") / "start"
    convert(str(tiny_llama), str(out), slots=16, sinks=2, dtype="float32", verify=False)
    return out


@pytest.fixture(scope="session")
def stages(tiny_llama, tmp_path_factory) -> Path:
    """A config file of three short stages on text of its own."""
    folder = tmp_path_factory.mktemp("config")
    lines = [{"text": "".join(chr(97 + (i * j * j) % 23) for j in range(5 + 17 * (i % 11)))} for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = "tokens: 512, context: 32, batch_tokens: 128, micro_batch: 2, loss: {chunk: 40, kl: 0.8}"
    (folder / "c.yaml").write_text(f"""source: {tiny_llama}
data: {{train: [{folder}/text.jsonl], validation: [{folder}/text.jsonl], cache: {folder}/cache}}
device: cpu
stages:
- {{kind: align, lr: {{gates: 3e-3, mixer: 3e-4}}, validation_tokens: 64, {stage}}}
- {{kind: distill, lr: {{gates: 1e-3, mixer: 1e-3, body: 1e-3}}, {stage}}}
- {{kind: lm, lr: {{gates: 1e-3, mixer: 1e-3, body: 1e-3}}, {stage}}}
""")
    return folder / "c.yaml"


@pytest.fixture(scope="session")
def straight(stages, start, tmp_path_factory) -> Path:
    """The run of all stages by one process, without interruption. Not to be changed."""
    from t2r.train.finetune import finetune

    out = tmp_path_factory.mktemp("straight") / "run"
    finetune(str(stages), model=str(start), out=str(out))
    return out


@pytest.fixture(scope="session")
def fault():
    """fault(source, *fragments): opening it fails with one line that holds all of them, and changes nothing on disk."""
    from t2r.convert.source import open_source
    from t2r.errors import UserError

    def check(src, *fragments):
        folder = Path(src).parent
        before = sorted(map(str, folder.rglob("*"))) if folder.is_dir() else []
        with pytest.raises(UserError) as error:
            open_source(src)
        message = str(error.value)
        assert "\n" not in message
        for fragment in fragments:
            assert fragment in message, message
        assert before == (sorted(map(str, folder.rglob("*"))) if folder.is_dir() else [])

    return check
