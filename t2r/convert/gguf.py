"""GGUF files as a source: llama.cpp's names and layout turned back into Hugging Face's, one tensor at a time."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from t2r.convert.source import Reader, Source, Stored, first_line, load_config, load_tokenizer
from t2r.errors import UserError, nearest

# Whether llama.cpp permutes the rows of q and k for its interleaved rotary embedding.
PERMUTED = {"gemma3": False, "llama": True, "qwen2": False, "qwen3": False}
# Gemma multiplies by 1 + weight; llama.cpp stores the sum.
NORMS_PLUS_ONE = {"gemma3"}
# Metadata whose meaning the config or this module carries over. Any other key could change the model.
UNDERSTOOD = {
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
SPECIAL_TOKENS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}
ROPE_FREQS = "rope_freqs.weight"
ATTN_ROT = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


@dataclass(frozen=True)
class _Blocks(Stored):
    """A quantised tensor: `rows` is the shape of its bytes, `kind` their type. `heads` > 0 undoes a permutation,
    `shift` is taken off."""

    rows: tuple[int, ...]
    kind: object
    heads: int
    shift: int


class GgufSource(Source):
    """One `.gguf` file. Every tensor is dequantised to float32 when it is read."""

    is_quantised = True

    def __init__(self, spec: str, path: Path) -> None:
        super().__init__(spec, path)
        reader = _read(path)
        self._metadata = _metadata(reader)
        self._architecture = self._metadata.get("general.architecture")
        self._check_architecture()
        self.config = load_config(path.parent, path.name)
        blocks = self._blocks(reader)
        self._complete_config(blocks)
        self._stored = self._rename(blocks)

    def generation_config(self):
        from transformers import GenerationConfig

        ids = {key: getattr(self.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**ids)

    def load_tokenizer(self):
        if "tokenizer.ggml.model" not in self._metadata:
            raise UserError("no tokenizer in this GGUF file", where=self.path)
        tokenizer = load_tokenizer(self.path.parent, self.path.name)
        # transformers 5.17 swaps bos and eos when it reads them from a GGUF file.
        for role, key in SPECIAL_TOKENS.items():
            if (token := self._metadata.get(key)) is not None:
                setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
        return tokenizer

    def _check_architecture(self) -> None:
        architecture = self._architecture
        if architecture not in PERMUTED:
            raise UserError(
                f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(PERMUTED)}",
                where=self.path,
                nearest=nearest(str(architecture), PERMUTED),
            )
        parts = self._metadata.get("split.count", 1)
        if parts > 1:
            first = re.sub(r"-\d{5}-of-", "-00001-of-", self.path.name)
            raise UserError(
                f"this is one of {parts} parts of a model",
                where=self.path,
                next=f"llama-gguf-split --merge {first} merged.gguf",
            )
        for key, value in self._metadata.items():
            scope, _, field = key.partition(".")
            if scope == architecture and (field not in UNDERSTOOD or isinstance(value, list)):
                raise UserError(f"GGUF metadata {key} = {value} is not supported", where=self.path)

    def _blocks(self, reader) -> dict[str, _Blocks]:
        """Tensors by their GGUF names, in file order."""
        from gguf.quants import quant_shape_to_byte_shape

        heads = {}
        if PERMUTED[self._architecture]:
            heads = {"attn_q": self.config.num_attention_heads, "attn_k": self.config.num_key_value_heads}
        blocks = {}
        for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
            kind = tensor.tensor_type
            if not _can_dequantise(kind):
                raise UserError(
                    f"tensor {tensor.name} has type {kind.name}, which cannot be dequantised", where=self.path
                )
            shape = tuple(reversed(tensor.shape.tolist()))
            in_layer = tensor.name.startswith("blk.")
            blocks[tensor.name] = _Blocks(
                file=self.path,
                key=tensor.name,
                shape=shape,
                dtype=torch.float32,
                offset=int(tensor.data_offset),
                rows=tuple(quant_shape_to_byte_shape(shape, kind)),
                kind=kind,
                heads=heads.get(tensor.name.split(".")[-2], 0) if in_layer else 0,
                shift=int(self._architecture in NORMS_PLUS_ONE and tensor.name.endswith("norm.weight")),
            )
        return blocks

    def _read(self, block: _Blocks, reader: Reader) -> torch.Tensor:
        from gguf.quants import dequantize

        data = reader.read(block.offset, math.prod(block.rows), block.key).numpy()
        tensor = torch.from_numpy(dequantize(data.reshape(block.rows), block.kind)).reshape(block.shape)
        if block.shift:
            tensor = tensor - block.shift
        if not block.heads:
            return tensor
        # llama.cpp interleaves the two rotary halves of each head; Hugging Face keeps them one after the other.
        half = block.shape[0] // block.heads // 2
        paired = tensor.reshape(block.heads, half, 2, *block.shape[1:])
        return paired.transpose(1, 2).reshape(block.shape)

    def _complete_config(self, blocks: dict[str, _Blocks]) -> None:
        """Carry over what transformers' own GGUF reader leaves at the family's defaults."""
        config, metadata = self.config, self._metadata
        if "token_embd.weight" in blocks:
            config.vocab_size = blocks["token_embd.weight"].shape[0]
        if head_dim := metadata.get(f"{self._architecture}.attention.key_length"):
            config.head_dim = head_dim
        window = metadata.get(f"{self._architecture}.attention.sliding_window")
        if hasattr(config, "sliding_window"):
            config.sliding_window = window
        elif window:
            raise UserError(f"a sliding window of {window} is not supported for {self._architecture}", where=self.path)
        if hasattr(config, "query_pre_attn_scalar"):  # only Gemma 3 27B, the one with 62 layers, has another
            per_head = config.hidden_size // config.num_attention_heads
            config.query_pre_attn_scalar = per_head if config.num_hidden_layers == 62 else config.head_dim
        for role in ("bos", "eos", "pad"):
            setattr(config, f"{role}_token_id", metadata.get(SPECIAL_TOKENS[role]))
        end_of_turn = metadata.get("tokenizer.ggml.eot_token_id", config.eos_token_id)
        if end_of_turn != config.eos_token_id:
            config.eos_token_id = [config.eos_token_id, end_of_turn]
        config.dtype = torch.float32
        factors = None
        if ROPE_FREQS in blocks:
            with Reader(self.path) as reader:
                factors = self._read(blocks[ROPE_FREQS], reader)
        self._complete_rope(factors)

    def _complete_rope(self, factors: torch.Tensor | None) -> None:
        config, prefix = self.config, f"{self._architecture}.rope.scaling"
        kind = self._metadata.get(f"{prefix}.type", "none")
        # Gemma's sliding layers have frequencies of their own, which are never scaled and not in the file.
        parameters = config.rope_parameters
        sliding = parameters.get("sliding_attention")
        theta = (parameters["full_attention"] if sliding else parameters)["rope_theta"]
        rope = {"rope_theta": theta, "rope_type": "default"}
        if kind == "linear":
            rope |= {"rope_type": "linear", "factor": self._metadata[f"{prefix}.factor"]}
        elif kind != "none":
            raise UserError(f"rope scaling {kind!r} is not supported for GGUF", where=self.path, nearest="linear")
        config.rope_parameters = {"full_attention": rope, "sliding_attention": sliding} if sliding else rope
        if factors is None or torch.equal(factors, torch.ones_like(factors)):
            return
        # Llama 3 stores only the factors, not the four numbers they came from; all releases share three of them.
        context = self._metadata.get(f"{prefix}.original_context_length", 8192)
        config.rope_parameters = rope | {
            "rope_type": "llama3",
            "factor": round(factors.max().item(), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        if kind != "none" or not _explains(config, factors):
            raise UserError(f"{ROPE_FREQS} holds rope factors of no known scaling", where=self.path)

    def _rename(self, blocks: dict[str, _Blocks]) -> dict[str, _Blocks]:
        """Blocks by Hugging Face names. Every tensor has a place, every place a tensor, or UserError."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self.config.architectures = [type(model).__name__]
        architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        name_map = get_tensor_name_map(architecture, self.config.num_hidden_layers)
        places = {
            name_map.get_name(name, try_suffixes=(".weight", ".bias")): (name, tuple(tensor.shape))
            for name, tensor in model.state_dict().items()
        }
        renamed = {}
        leftover = []
        for gguf_name, block in blocks.items():
            name, shape = places.pop(gguf_name, (None, None))
            if gguf_name == ROPE_FREQS:
                self.ignored[gguf_name] = "rope factors, which the config's rope_parameters express"
            elif ATTN_ROT.fullmatch(gguf_name):
                self.ignored[gguf_name] = "rope frequencies, which the model computes from its config"
            elif name is None:
                leftover.append(gguf_name)
            elif shape != block.shape:
                raise UserError(f"tensor {gguf_name} is {block.shape}, but {name} is {shape}", where=self.path)
            else:
                renamed[name] = block
        if self.config.tie_word_embeddings:
            places.pop("output.weight", None)
        for fault, names in (("has no place for", leftover), ("needs", list(places))):
            if names:
                listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                absent = ", which the file lacks" if fault == "needs" else ""
                raise UserError(f"{type(model).__name__} {fault} {listed}{absent}", where=self.path)
        return renamed


def _read(path: Path):
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF needs the package gguf", where=path, next="pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(f"{path.name} is truncated or not a GGUF file: {first_line(error)}", where=path) from error
    if reader.byte_order != "I":
        raise UserError("this GGUF file is big-endian", where=path)
    return reader


def _metadata(reader) -> dict[str, object]:
    """All metadata but the tokenizer's long lists."""
    return {
        key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1 or "tokenizer" not in key
    }


def _can_dequantise(kind) -> bool:
    import numpy as np
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _explains(config, factors: torch.Tensor) -> bool:
    """Whether the config's rope divides the default frequencies by `factors`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dim = 2 * len(scaled)
    default = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    return factors.shape == scaled.shape and torch.allclose(default / scaled, factors, rtol=1e-4)
