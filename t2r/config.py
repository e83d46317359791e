"""Configurations: typed dataclasses, filled from a YAML file and `key=value` words, where every mistake is named.

`load` knows no particular schema: the runs of schema.py and the recipes of a comparison are both read by it.
"""

import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeVar

from t2r.errors import UserError, nearest

Schema = TypeVar("Schema")
FOLDERS = {"configs": "configuration", "recipes": "recipe"}  # what each holds


def shipped(kind: str) -> dict[str, str]:
    """Name -> first comment line of every YAML file in the package's folder `kind`: configs or recipes."""
    found = {}
    for file in sorted(files(f"t2r.{kind}").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def find(name_or_path: str | Path, folders: Iterable[str] = FOLDERS) -> Path:
    """A file of one of `folders`: a path, or the name of a shipped one. Raises UserError with the nearest name."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = {name: folder for folder in folders for name in shipped(folder)}
    if str(name_or_path) in names:
        return Path(str(files(f"t2r.{names[str(name_or_path)]}") / f"{name_or_path}.yaml"))
    wanted = " or ".join(FOLDERS[folder] for folder in folders)
    raise UserError(
        f"no {wanted} {str(name_or_path)!r}: neither a file nor the name of a shipped one",
        nearest=nearest(path.stem, names) or ", ".join(names) or None,
        next="t2r ls",
    )


def read(path: Path, words: Sequence[str] = ()) -> dict:
    """A YAML file as plain data, with `key=value` words in it and ${references} resolved after that. Raises UserError
    unless it holds a mapping."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        raw = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
        if not isinstance(raw, dict):
            raise UserError(f"holds {plural(raw)}, not keys and values", where=path)
        override(raw, words)
        return OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"not readable as YAML: {error}", where=path) from error


def load(name_or_path: str | Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """An instance of the dataclass `schema`, from a YAML file or the name of a shipped one, and `key=value` words.

    A key of an override is dotted (stages.0.lr.gates=1e-3), its value YAML. Raises UserError for a missing file, an
    unknown key, a wrong type and a required key that is not there, with the full key, the file and the nearest.
    """
    path = find(name_or_path)
    return build(schema, read(path, overrides), path, said=[word.partition("=")[0] for word in overrides])


def override(raw: dict, words: Iterable[str]) -> None:
    """Set dotted keys of plain data in place. Keys are checked later, with those of the file."""
    import yaml
    from omegaconf import OmegaConf

    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{word!r} is not of the form key=value", nearest="stages.0.tokens=100000")
        try:
            # through OmegaConf, whose YAML reads 1e-3 as a number
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"the value of {word!r} is not readable as YAML", where="command line") from error
        *parents, last = key.split(".")
        place = raw
        for part in parents:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[part] if isinstance(place, dict) else place[index(place, part, key)]
        if isinstance(place, dict):
            place[last] = value
        else:
            place[index(place, last, key)] = value


def index(place: object, part: str, key: str) -> int:
    if not isinstance(place, list):
        raise UserError(f"unknown key {key!r}: nothing lies below {plural(place)}", where="command line")
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"no item {part!r} of {len(place)} in {key!r}", where="command line", nearest=len(place) - 1)
    return int(part)


def build(schema: type[Schema], raw: object, path: Path, prefix: str = "", said: Sequence[str] = ()) -> Schema:
    """Plain data -> dataclass, each leaf converted and checked by OmegaConf's structured configs. said: the keys that
    the command line gave and not the file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.')} is {plural(raw)}, not keys and values", where=path)
    hints, values = typing.get_type_hints(schema), {}
    for key, value in raw.items():
        full = f"{prefix}{key}"
        where = "command line" if full in said else path
        if key not in hints:
            close = nearest(str(key), hints) or ", ".join(hints)
            raise UserError(f"unknown key {full!r}", where=where, nearest=close)
        kind, item = inner(hints[key])
        if value is None and hints[key] is str and full in said:
            value = ""  # `key=` of a shell, where YAML says null
        if is_dataclass(kind) and not (value is None and kind is not hints[key]):
            values[key] = build(kind, value, path, f"{full}.", said)
        elif kind is list and is_dataclass(item):
            if not isinstance(value, list):
                raise UserError(f"{full} is {plural(value)}, not a list", where=where)
            values[key] = [build(item, one, path, f"{full}.{i}.", said) for i, one in enumerate(value)]
        else:
            try:
                leaf = OmegaConf.structured(one_field(schema.__name__, key, hints[key]))
                OmegaConf.update(leaf, key, value)
                values[key] = getattr(OmegaConf.to_object(leaf), key)
            except (OmegaConfBaseException, TypeError) as error:
                choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
                close = nearest(str(value), map(str, choices)) or ", ".join(map(str, choices)) or None
                raise UserError(
                    f"{full} is {value!r}, expected {spelled(hints[key])}", where=where, nearest=close
                ) from error
    required = [f.name for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING]
    for name in required:
        if name not in values:
            raise UserError(f"{prefix}{name} is missing, {spelled(hints[name])}", where=path)
    return schema(**values)


def inner(hint: object) -> tuple[object, object]:
    """A type without its `| None`, list[X] as (list, X)."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        return list, typing.get_args(hint)[0]
    return hint, None


def one_field(name: str, key: str, hint: object) -> type:
    """An OmegaConf schema of one typed field."""
    return make_dataclass(name, [(key, hint, field(default="???"))])


def spelled(hint: object) -> str:
    """A type in a user's words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(spelled, parts))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, parts))
    if typing.get_origin(hint) is list:
        return f"a list, each item {spelled(parts[0])}"
    if typing.get_origin(hint) is dict:
        return f"keys and values, each value {spelled(parts[1])}"
    return "keys and values"


def plural(value: object) -> str:
    names = {list: "a list", dict: "keys and values", type(None): "empty"}
    return names.get(type(value), repr(value))


def save(config: object, path: Path) -> None:
    """Write a configuration as YAML, every value spelled out."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
