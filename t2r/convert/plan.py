"""What a conversion will do, tensor by tensor, worked out from names and shapes before a weight is read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from t2r.convert.source import Source
from t2r.errors import UserError
from t2r.families import check_attention, family_of, head_dim
from t2r.modeling.configuration import CONFIG_CLASSES, FLOAT32, GSAConfig, fit_layers, preset

Status = Literal["copied", "transformed", "new", "tied", "ignored"]
MEMORY_FLOOR = 600_000_000  # python, torch and transformers before the first tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of the source or of the result. status: copied bit for bit; transformed (note says how); new (added by
    GSA); tied (stored by the source, but the model reads another tensor in its place); ignored (no weight)."""

    name: str
    status: Status
    shape: tuple[int, ...]
    dtype: torch.dtype
    note: str = ""


class NewTensors(Mapping[str, torch.Tensor]):
    """Starting values of the tensors that GSA adds, made a layer at a time as they are asked for."""

    def __init__(self, modules: dict[str, torch.nn.Module]) -> None:
        """modules: name -> attention module with slots; its own parameters may be on the meta device."""
        self.places = {f"{path}.{name}": (path, name) for path, m in modules.items() for name in m.new_names()}
        self.modules, self.last, self.values_of_last = modules, None, {}

    def __getitem__(self, name: str) -> torch.Tensor:
        path, short = self.places[name]
        if path != self.last:
            self.last, self.values_of_last = path, self.modules[path].new_tensors()
        return self.values_of_last[short]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Plan:
    """A conversion: config of the result, every tensor, and the starting values of the new ones."""

    source: Source
    config: object
    gsa: GSAConfig
    preset: str
    entries: list[Entry]
    new_tensors: Mapping[str, torch.Tensor]

    @property
    def targets(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor to write, in the order of reading."""
        written = (e for e in self.entries if e.status in ("copied", "transformed", "new"))
        return {e.name: (e.shape, e.dtype) for e in written}

    @property
    def disk_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.targets.values()) + 20_000_000

    @property
    def ram_bytes(self) -> int:
        """Two tensors in float32; to fit scores, what a layer makes of all texts: four times its input and three times
        the width of its MLP."""
        from t2r.convert.evict import CONTEXT, TEXTS

        largest = max(torch.Size(e.shape).numel() for e in self.entries)
        width = 4 * self.config.hidden_size + 3 * getattr(self.config, "intermediate_size", 0)
        texts = any(".bonus." in name for name in self.new_tensors) * TEXTS * CONTEXT * width
        return MEMORY_FLOOR + 4 * (2 * largest + texts)

    @property
    def verify_ram_bytes(self) -> int:
        """Read by layer: the largest part in float32, and twice that for what it is made of and what reads it."""
        parts: dict[str, int] = {}
        for name, (shape, _) in self.targets.items():
            layer = re.match(r"model\.layers\.\d+\.", name)
            part = layer[0] if layer else name
            parts[part] = parts.get(part, 0) + torch.Size(shape).numel()
        return MEMORY_FLOOR + 3 * 4 * max(parts.values())

    def parameters(self) -> tuple[int, int]:
        """(all, new) parameters of the result."""
        count = {name: torch.Size(shape).numel() for name, (shape, _) in self.targets.items()}
        return sum(count.values()), sum(count[name] for name in self.new_tensors)

    @property
    def state_bytes(self) -> int:
        """Memory of one sequence, however long."""
        return self.gsa.state_bytes(self.config)

    @property
    def cache_bytes_per_token(self) -> int:
        """What the key-value cache of the layers with slots grew by with each token, in the dtype to write."""
        c = self.config
        return len(self.gsa.gsa_layers(c)) * 2 * c.num_key_value_heads * head_dim(c) * c.dtype.itemsize

    def slots_line(self) -> str:
        """Slots of the layers in words."""
        layers = list(self.gsa.gsa_layers(self.config).values())
        count = {gsa.slots for gsa in layers}
        line = f"{min(count)} slots" if len(count) == 1 else f"{min(count)} to {max(count)} slots"
        sinks = max(gsa.sinks for gsa in layers)
        line += ", evicted by score" if any(gsa.scored for gsa in layers) else ""
        line += f", {sinks} sinks" if sinks else ""
        kept = self.gsa.softmax_layers
        return line + (f", softmax kept in {len(kept)} of {self.config.num_hidden_layers} layers" if kept else "")

    def __str__(self) -> str:
        total, new = self.parameters()
        counts = {status: sum(e.status == status for e in self.entries) for status in Status.__args__}
        c = self.config
        even = self.state_bytes / self.cache_bytes_per_token
        rows = {
            "source": f"{self.source.spec} ({c.model_type.removeprefix('gsa_')}, {c.num_hidden_layers} layers, "
            f"{c.num_attention_heads} heads, {c.num_key_value_heads} kv heads)",
            "result": f"{c.architectures[0]}, preset {self.preset}: {self.slots_line()}",
            "parameters": f"{total:,}, of them {new:,} new ({new / total:.2%})",
            "tensors": ", ".join(f"{n} {status}" for status, n in counts.items() if n),
            "dtype": name_of(c.dtype),
            "state": f"{self.state_bytes / 1e6:.2f} MB a sequence at any length; a key-value cache passes it after "
            f"{even:.0f} tokens" + (", and the kept layers have one" if self.gsa.softmax_layers else ""),
            "disk": f"{self.disk_bytes / 1e9:.2f} GB",
            "memory": f"{self.ram_bytes / 1e9:.2f} GB to convert, {self.verify_ram_bytes / 1e9:.2f} GB to verify",
        }
        return "\n".join(f"{key:<11} {value}" for key, value in rows.items())

    def report(self) -> dict:
        """The plan as plain data, for conversion.json."""
        return {
            "source": str(self.source.spec),
            "preset": self.preset,
            "parameters": dict(zip(("all", "new"), self.parameters(), strict=True)),
            "state_bytes": self.state_bytes,
            "tensors": {
                e.name: {
                    "status": e.status,
                    "shape": list(e.shape),
                    "dtype": name_of(e.dtype),
                    **({"note": e.note} if e.note else {}),
                }
                for e in self.entries
            },
        }


def make_plan(
    source: Source,
    preset_name: str,
    slots: int | None,
    sinks: int | None,
    dtype: str | None,
    eviction: str = "oldest",
    layer_slots: str = "",
    keep_softmax: str = "",
) -> Plan:
    """Work out the conversion of `source`; dtype None keeps the source's. layer_slots: such as "0-3=128,9=256";
    keep_softmax: layers such as "0,8-11".

    Raises UserError for an unsupported architecture, impossible options, and for every tensor of the source that would
    be dropped, every tensor of the result that nothing provides and every shape that disagrees with the config.
    """
    config = converted_config(
        source.config, source.path, preset_name, slots, sinks, eviction, layer_slots, keep_softmax
    )
    return lay_out(source, config, preset_name, dtype)


def import_plan(source: Source, dtype: str | None) -> Plan:
    """The plan for a source that has Gated Slot Attention already, in another project's format (Source.is_foreign)."""
    return lay_out(source, source.config, "paper", dtype)


def lay_out(source: Source, config, preset_name: str, dtype: str | None) -> Plan:
    """Account for every tensor of the source and of the model that `config` describes; UserError where that fails."""
    to_dtype = getattr(torch, dtype) if dtype else None
    main_dtype = to_dtype or source.dtype(next(name for name in source.names() if name.endswith("o_proj.weight")))
    config.dtype = main_dtype
    target, new = target_tensors(config)
    if given := set(source.names()).intersection(new):
        new = {name: new[name] for name in new if name not in given}

    entries, wrong = [], []
    for name in source.names():
        shape, stored = source.shape(name), source.dtype(name)
        final = to_dtype if to_dtype and stored.is_floating_point else stored
        if name == "lm_head.weight" and config.tie_word_embeddings:
            entries.append(Entry(name, "tied", shape, stored, "the model reads model.embed_tokens.weight"))
            continue
        if name not in target:
            wrong.append(f"{name} of the source has no place in the result: it would be dropped")
        elif target[name] != shape:
            wrong.append(f"{name} has shape {list(shape)}, the config asks for {list(target[name])}")
        notes = ["dequantised to float32"] if source.is_quantised else []
        notes += [f"{name_of(stored)} -> {name_of(final)}"] if final != stored else []
        entries.append(Entry(name, "transformed" if notes else "copied", shape, final, ", ".join(notes)))
    entries += [Entry(name, "new", target[name], new_dtype(name, main_dtype)) for name in new]
    entries += [Entry(name, "ignored", (), torch.uint8, reason) for name, reason in source.ignored.items()]
    provided = {e.name for e in entries}
    wrong += [f"{name} is missing from the source" for name in target if name not in provided]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(wrong[0] + more, where=source.path)
    return Plan(source, config, GSAConfig.of(config), preset_name, entries, new)


def layer_indices(text: str, layers: int, where: str) -> list[int]:
    """ "0,8-11" -> [0, 8, 9, 10, 11]; UserError unless all are layers of a model of that many."""
    found = []
    for part in str(text).split(",") if text else []:
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"{part!r} is no layer and no range of layers", where=where, nearest="0,8-11")
        found += range(int(first), int(last or first) + 1)
        if int(last or first) >= layers or int(last or first) < int(first):
            raise UserError(f"there are no layers {part}", where=where, nearest=f"0-{layers - 1}")
    return found


def layer_numbers(text: str, layers: int, where: str) -> dict[int, int]:
    """ "0-1=128,9=256" -> {0: 128, 1: 128, 9: 256}; UserError likewise."""
    numbers, left = {}, ""
    for part in str(text).split(",") if text else []:
        names, equals, number = part.partition("=")
        left = f"{left},{names}".strip(",")
        if equals and not number.isdigit():
            raise UserError(f"{number!r} is no number of slots", where=where, nearest="0-3=128,9=256")
        if equals:
            numbers |= dict.fromkeys(layer_indices(left, layers, where), int(number))
            left = ""
    if layer_indices(left, layers, where):
        raise UserError(f"layers {left} have no number of slots", where=where, nearest=f"{left}=64")
    return numbers


def converted_config(
    source_config,
    where: object,
    preset_name: str,
    slots: int | None,
    sinks: int | None,
    eviction: str,
    layer_slots: str,
    keep_softmax: str,
):
    """The result's config, for the options of a conversion. Raises UserError for an unsupported architecture (`where`
    names it) and for options that do not fit."""
    family = family_of(source_config.model_type, where=where)
    check_attention(source_config, where=where)
    layers = source_config.num_hidden_layers
    gsa = fit_layers(
        preset(preset_name, slots, sinks, eviction),
        source_config,
        layer_numbers(layer_slots, layers, "--layer-slots"),
        layer_indices(keep_softmax, layers, "--keep-softmax"),
    )
    return gsa_config(source_config, family.model_type, gsa)


def gsa_config(source_config, model_type: str, gsa: GSAConfig):
    """The result's config: the source's, with the record of the GSA layers."""
    values = source_config.to_dict()
    for name in ("model_type", "architectures", "quantization_config", "transformers_version", "_name_or_path"):
        values.pop(name, None)
    config_class = CONFIG_CLASSES[model_type]
    config = config_class.from_dict({**values, "gsa": gsa.to_dict()})
    config.architectures = [config_class.__name__.replace("Config", "ForCausalLM")]
    return config


def target_tensors(config) -> tuple[dict[str, tuple[int, ...]], NewTensors]:
    """Of the model that `config` describes: shape of each stored tensor, and the values of those that GSA adds."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    from t2r.modeling.attention import GSAttention

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    new = NewTensors({path: m for path, m in model.named_modules() if isinstance(m, GSAttention)})
    shapes = {name: tuple(x.shape) for name, x in revert_weight_conversion(model, model.state_dict()).items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes, new


def new_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Projections and norms are stored like the model, the rest in float32."""
    return torch.float32 if name.rsplit(".", 1)[-1] in FLOAT32 else dtype


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
