"""t2r turns a pretrained Transformer into a Gated Slot Attention RNN.

After `import t2r`, transformers' AutoConfig and AutoModelForCausalLM load converted folders.
"""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _register():
    from t2r.modeling import register

    register()


class _RegisterAfterAutoConfig:
    """Import hook: calls `t2r.modeling.register()` once, right after transformers' AutoConfig module has run.

    Registering needs transformers, whose import takes seconds, while `import t2r` runs before `t2r --help` and must
    stay instant. So the registration waits until somebody else imports transformers: `sys.meta_path` asks each finder
    for each module not yet loaded; this one answers for one name only, lets the regular finders locate that module,
    and wraps its execution. At that moment other modules of transformers may be half imported (its model files import
    AutoConfig too), hence `register()` itself must import no more of transformers than configurations.
    """

    def find_spec(self, name, path=None, target=None):
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_register(module):
            del loader.exec_module  # back to the class's method: some loaders are shared between modules
            execute(module)
            _register()

        loader.exec_module = execute_and_register
        return spec


if _AUTO_CONFIG in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterAutoConfig())
