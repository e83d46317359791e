"""The code that a converted folder carries, so that it loads where t2r is not installed (`trust_remote_code=True`).

modeling_t2r.py is what transformers imports: t2r's own classes where t2r is installed, else those of t2r_standalone.py,
which is made of t2r's own modules, one after the other, without what needs Triton.
"""

import ast
import json
from importlib.util import find_spec, resolve_name
from pathlib import Path

from t2r.convert.source import read_json

ROOT = "t2r.modeling"
NEEDS_TRITON = 'raise ImportError("this needs t2r: pip install t2r")'

HEAD = '"""t2r in one file, made when this model was converted; not read where t2r is installed."""\n\n'
ENTRY = '''"""{name} for `trust_remote_code=True`: t2r's own classes where it is installed, which has Triton kernels,
else those of t2r_standalone.py beside this file, which is the same in PyTorch."""

try:
    from t2r.modeling import CONFIG_CLASSES, FAMILIES, model_classes
except ImportError:
    from .t2r_standalone import CONFIG_CLASSES, FAMILIES, model_classes

Model, ForCausalLM = model_classes(FAMILIES["{family}"])


class {config}(CONFIG_CLASSES["{family}"]):
    """See t2r."""


class {model}(Model):
    """See t2r."""

    config_class = {config}


class {name}(ForCausalLM):
    """See t2r."""

    config_class = {config}
'''


def write_standalone(config, folder: Path) -> None:
    """Write both files into `folder` and name their classes in config.json, which is there already.

    config: of a converted model.
    """
    family = config.model_type.removeprefix("gsa_")
    name = config.architectures[0]
    names = {"config": type(config).__name__, "model": name.replace("ForCausalLM", "Model"), "name": name}
    (folder / "modeling_t2r.py").write_text(ENTRY.format(family=family, **names), encoding="utf-8")
    (folder / "t2r_standalone.py").write_text(bundle(family), encoding="utf-8")
    stored = read_json(folder / "config.json")
    classes = zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), names.values(), strict=True)
    stored["auto_map"] = {auto: f"modeling_t2r.{cls}" for auto, cls in classes}
    (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def bundle(family: str) -> str:
    """One file that holds t2r.modeling and all that it imports from t2r, for one family.

    Raises ValueError where that cannot be done: two modules give one name two meanings.
    """
    modules: dict[str, Module] = {}
    Module(ROOT).visit(modules)
    imports: set[str] = set()
    owner: dict[str, str] = {}  # name -> what gives it its meaning
    bodies = []
    for module in modules.values():
        for statement, names in module.external:
            imports.add(statement)
            for name in names:
                claim(owner, name, statement)
        for name in module.defined:
            claim(owner, name, module.name)
        bodies.append(f"# {module.name}\n\n{module.text(modules)}")
        if module.name == "t2r.families":
            bodies.append(f'FAMILIES = {{"{family}": FAMILIES["{family}"]}}\n')
    return "\n\n".join([HEAD + "\n".join(sorted(imports)) + "\n", *bodies])


def claim(owner: dict[str, str], name: str, by: str) -> None:
    if owner.setdefault(name, by) != by:
        raise ValueError(f"{name} means {owner[name]} and {by}: one of t2r's modules has to rename it")


class Module:
    """One of t2r's modules, parsed. `external`: (import statement, names it gives); `defined`: names at its top."""

    def __init__(self, name: str) -> None:
        spec = find_spec(name)
        self.name = name
        self.package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        self.source = Path(spec.origin).read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.external, self.defined = [], []
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.defined.append(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                self.defined += [name for name in names if name != "__all__"]
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and not self.internal(node):
                self.external += [split(node, alias) for alias in node.names]

    def internal(self, node: ast.Import | ast.ImportFrom) -> str | None:
        """The module of t2r that a statement imports from, or None."""
        if isinstance(node, ast.Import):
            return next((alias.name for alias in node.names if alias.name.split(".")[0] == "t2r"), None)
        name = resolve_name("." * node.level + (node.module or ""), self.package)
        return name if name.split(".")[0] == "t2r" else None

    def imports(self) -> list[ast.Import | ast.ImportFrom]:
        """Every import from t2r, also those in functions."""
        nodes = (node for node in ast.walk(self.tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
        return [node for node in nodes if self.internal(node)]

    def sources(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        """The modules whose code an import from t2r needs: submodules that it names, or the module itself."""
        name = self.internal(node)
        submodules = [f"{name}.{alias.name}" for alias in node.names if exists(f"{name}.{alias.name}")]
        return submodules if len(submodules) == len(node.names) else [name, *submodules]

    @property
    def needs_triton(self) -> bool:
        """Whether importing this imports Triton, here or in a module that is imported at the top."""
        if any("triton" in statement for statement, _ in self.external):
            return True
        top = [node for node in self.imports() if node in self.tree.body]
        return any(Module(source).needs_triton for node in top for source in self.sources(node))

    def visit(self, modules: dict[str, "Module"]) -> None:
        """Add what this module needs, then itself."""
        if self.name in modules:
            return
        for node in self.imports():
            for source in self.sources(node):
                if source not in modules and not (module := Module(source)).needs_triton:
                    module.visit(modules)
        modules[self.name] = self

    def text(self, modules: dict[str, "Module"]) -> str:
        """The source without its imports at the top; those of modules that are not in the file raise ImportError."""
        lines = self.source.splitlines()
        top = [node for node in self.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in [*top, *self.imports()]:
            first, last = node.lineno - 1, node.end_lineno
            if node in top and not self.internal(node):
                replacement = []
            else:
                replacement = [line for alias in node.names for line in self.given(node, alias, modules)]
                replacement = replacement or ([] if node in top else ["pass"])
            indent = " " * node.col_offset
            lines[first:last] = [indent + line for line in replacement] + [None] * (last - first - len(replacement))
        return "\n".join(line for line in lines if line is not None).strip() + "\n"

    def given(self, node, alias: ast.alias, modules: dict[str, "Module"]) -> list[str]:
        """What takes the place of one name of an import from t2r: nothing, since it is defined above, or an alias."""
        missing = [source for source in self.sources(node) if source not in modules]
        if missing:
            return [NEEDS_TRITON] if alias is node.names[0] else []
        if isinstance(node, ast.Import) or exists(f"{self.internal(node)}.{alias.name}"):
            raise ValueError(f"{self.name} imports a module of t2r, not names: {ast.unparse(node)}")
        return [f"{alias.asname} = {alias.name}"] if alias.asname and alias.asname != alias.name else []


def exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def split(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> tuple[str, list[str]]:
    """An import statement of one name alone, and the name."""
    alone = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)
    return ast.unparse(alone), [alias.asname or alias.name.split(".")[0]]
