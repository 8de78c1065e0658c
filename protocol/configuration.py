"""From a YAML file to a checked model: every problem at once, with the key that was probably meant."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from protocol.errors import ConfigurationError

M = TypeVar("M", bound=BaseModel)


def load(path: Path, model: type[M]) -> M:
    """Reads ``path`` as YAML (JSON is YAML) into ``model``.

    Raises:
        ConfigurationError: Missing file, broken YAML, or every key and value that does not fit, each in a line.
    """
    return parse(read_yaml(path), model, source=str(path))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigurationError: Missing or unreadable file, or broken YAML (with its line).
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigurationError(str(path), ["no such file; give the path of a YAML file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(str(path), [f"not readable as UTF-8 text ({type(error).__name__})"]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigurationError(str(path), [f"line {line}: broken YAML: {error.problem}"]) from None
    except Exception as error:  # noqa: BLE001 - PyYAML raises whatever its constructors do (a 13th month, !!bool x)
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigurationError(str(path), [f"broken YAML: {what}"]) from None


def parse(content: Any, model: type[M], *, source: str) -> M:
    """Checks ``content`` against ``model``; see ``load``."""
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ConfigurationError(source, [f"found {found}; expected a mapping with keys such as {_some_keys(model)}"])
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigurationError(source, [_line(problem, model) for problem in error.errors()]) from None


def _line(problem: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where}: missing; this key is needed"
    message = str(problem["msg"]).removeprefix("Value error, ")
    found = problem["input"]
    shown = f" (found {found!r})" if isinstance(found, str | int | float | bool) and problem["loc"] else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if not isinstance(part, str) or part not in model.model_fields:
            continue
        inner = [a for a in _types(model.model_fields[part].annotation) if issubclass(a, BaseModel)]
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[type]:
    nested = [t for arg in getattr(annotation, "__args__", ()) for t in _types(arg)]
    return [annotation] if isinstance(annotation, type) and not nested else nested


def _some_keys(model: type[BaseModel]) -> str:
    return ", ".join(list(model.model_fields)[:4])


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and no silent loss: ``2e-4`` is a number, ``0512`` is 512, a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


# YAML 1.1's numbers go (0512 is 330 there, 1:30 is 90) and those of YAML 1.2's core schema (section 10.3.2) come.
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (_INT, _FLOAT)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^([-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_Loader.add_constructor(_INT, _construct_int)
