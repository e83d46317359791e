"""Converted models as Hugging Face models: configuration, attention, cache, classes.

Importing this package makes transformers' Auto classes know them; t2r/__init__.py has it imported when they are needed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from t2r.families import FAMILIES

from .configuration import CONFIG_CLASSES, GSAConfig, preset
from .models import model_classes

__all__ = ["CONFIG_CLASSES", "GSAConfig", "model_classes", "preset"]

for _family in FAMILIES.values():
    _config = CONFIG_CLASSES[_family.model_type]
    _base, _lm = model_classes(_family)
    AutoConfig.register(_family.gsa_model_type, _config, exist_ok=True)  # in place of its stand-in
    AutoModel.register(_config, _base)
    AutoModelForCausalLM.register(_config, _lm)
    # Experts are stored one by one and held as one tensor; how, transformers looks up by model type.
    if _experts := get_checkpoint_conversion_mapping(_family.model_type):
        register_checkpoint_conversion_mapping(_family.gsa_model_type, _experts, overwrite=True)
