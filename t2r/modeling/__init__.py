"""Converted models as Hugging Face models: configuration, attention, cache, classes."""


def register() -> None:
    """Make transformers' Auto classes load converted folders; called by `import t2r`."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration import CONFIG_CLASSES

    for config_class in CONFIG_CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class)
