"""t2r turns a pretrained Transformer into a Gated Slot Attention RNN.

After `import t2r`, transformers' AutoConfig and AutoModelForCausalLM load converted folders.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

__version__ = "0.1.0"

# Our models must be known to transformers, but `import t2r` runs before `t2r --help` and must stay instant, while
# transformers takes seconds to import. Nor can our models be imported as soon as transformers' auto classes are: its
# own model files import those first, so half of it may be unfinished then. Hence two steps. A finder on sys.meta_path
# waits for transformers' AutoConfig module; once that has run, each of our model types gets a stand-in among its
# configurations. The first use of a stand-in, which is AutoConfig meeting one of our config.json, imports our models.
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _OnFirstUse:
    """Stands for the configuration class of one model type until `t2r.modeling` has put that in its place."""

    def __init__(self, model_type):
        self._model_type = model_type

    def _config_class(self):
        import_module("t2r.modeling")
        return sys.modules[_AUTO_CONFIG].CONFIG_MAPPING[self._model_type]

    def __call__(self, *args, **kwargs):
        return self._config_class()(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._config_class(), name)


def _place_stand_ins():
    from t2r.families import FAMILIES

    mapping = sys.modules[_AUTO_CONFIG].CONFIG_MAPPING
    for family in FAMILIES.values():
        mapping.register(family.gsa_model_type, _OnFirstUse(family.gsa_model_type))


class _AfterAutoConfig:
    """The finder: asked for every module not loaded yet, it answers for one and is then gone."""

    def find_spec(self, name, path=None, target=None):
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)  # what the regular finders say
        if spec is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_place(module):
            del loader.exec_module  # back to its class's method: some loaders are shared between modules
            execute(module)
            _place_stand_ins()

        loader.exec_module = execute_and_place
        return spec


if hasattr(sys.modules.get(_AUTO_CONFIG), "CONFIG_MAPPING"):
    _place_stand_ins()
else:
    sys.meta_path.insert(0, _AfterAutoConfig())
