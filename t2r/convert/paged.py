"""Models larger than memory: each part's weights are read when the part runs, and forgotten after."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from t2r.convert.source import Source

Change = Callable[[str, Tensor], Tensor]


class Pages:
    """Makes `model`, a causal LM made on the meta device, run from the weights of `source`, in the model's dtype.

    A part is a decoder layer, or what stands beside them (embeddings, last norm, head): the largest of them is all that
    is in memory at once. `change` is applied to each tensor that is read, with its name on disk.
    """

    def __init__(self, model, source: Source, change: Change = lambda name, tensor: tensor) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model, self.source, self.change = model, source, change
        self.mapping = get_model_conversion_mapping(model)
        for module in model.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
                model._init_weights(module)  # buffers are not stored; this is where transformers computes them
        for name, part in parts(model):
            part.register_forward_pre_hook(lambda part, args, name=name: self.load(name))
            part.register_forward_hook(lambda part, args, output: forget(part))

    def load(self, part: str) -> None:
        """Read the part's tensors, as transformers would: experts are stored one by one and held as one tensor."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        stored = {name: name for name in self.source.names() if name.startswith(f"{part}.")}
        if part == "lm_head" and self.model.config.tie_word_embeddings:
            stored = {"lm_head.weight": "model.embed_tokens.weight"}
        tensors = {name: self.change(on_disk, self.source.tensor(on_disk)) for name, on_disk in stored.items()}
        options = LoadStateDictConfig(weight_mapping=self.mapping, dtype=self.model.dtype)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # it would be one for every part
        try:
            convert_and_load_state_dict_in_model(self.model, tensors, options)
        finally:
            if shown:
                logging.enable_progress_bar()


def parts(model) -> list[tuple[str, nn.Module]]:
    """(name, module) of each part of a causal LM that runs as one and has parameters."""
    found = []
    for name, child in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        path = name if name == "lm_head" else f"model.{name}"
        if isinstance(child, nn.ModuleList):
            found += [(f"{path}.{i}", layer) for i, layer in enumerate(child)]
        elif any(True for _ in child.parameters()):
            found.append((path, child))
    return found


def forget(part: nn.Module) -> None:
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
