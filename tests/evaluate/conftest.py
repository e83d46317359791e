"""Two tiny models to evaluate, a Llama and its conversion, and a tokenizer of bytes."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2r.convert import convert

SLOTS = 16


def make_tokenizer(bos=False):
    """One token a byte, so that every length in a test can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {character: i + 2 for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def byte_tokenizer():
    return make_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny Llama and its conversion."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=258, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "llama")
    make_tokenizer().save_pretrained(folder / "llama")
    convert(str(folder / "llama"), str(folder / "gsa"), slots=SLOTS, sinks=2, verify=False)
    return folder


@pytest.fixture(scope="module", params=["llama", "gsa"])
def model(request, folders):
    return AutoModelForCausalLM.from_pretrained(folders / request.param).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(changes))
        return str(path)

    return write


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory):
    """A folder for --data with five made-up items of each benchmark."""
    spec = spec_from_file_location("items", Path(__file__).with_name("items.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(tmp_path_factory.mktemp("shared") / "eval")
