"""From a YAML file to a checked model: every problem at once, with the key that was probably meant."""

import copy
import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from protocol.errors import ConfigurationError, shown

M = TypeVar("M", bound=BaseModel)
_MOST_LETTERS = 2**24


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
    return from_yaml(read_text(path), path)


def read_text(path: Path) -> str:
    """The letters of a file that somebody wrote.

    Raises:
        ConfigurationError: Missing or unreadable file.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_LETTERS + 1)
    except FileNotFoundError:
        raise ConfigurationError(str(path), ["no such file; give the path of a YAML file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(str(path), [f"not readable as UTF-8 text ({type(error).__name__})"]) from None
    if len(text) > _MOST_LETTERS:
        raise ConfigurationError(str(path), [f"over {_MOST_LETTERS} letters long; expected a file that somebody wrote"])
    return text


def from_yaml(text: str, path: Path) -> Any:
    """What letters of a file say as YAML.

    Raises:
        ConfigurationError: Broken YAML (with its line).
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigurationError(str(path), [f"line {line}: broken YAML: {shown(str(error.problem))}"]) from None
    except Exception as error:  # noqa: BLE001 - PyYAML raises whatever its constructors do (a 13th month, !!bool x)
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigurationError(str(path), [f"broken YAML: {shown(what)}"]) from None


def value_of(text: str) -> Any:
    """A value as YAML writes it, for options such as ``NAME=VALUE``; what is no YAML is the text itself."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except Exception:  # noqa: BLE001 - PyYAML raises whatever its constructors do
        return text


def parse(content: Any, model: type[M], *, source: str) -> M:
    """Checks ``content`` against ``model``; see ``load``."""
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ConfigurationError(source, [f"found {found}; expected a mapping with keys such as {_some_keys(model)}"])
    respelt = getattr(model, "respelt", None)  # of a model whose files people write in other words too
    content, problems = respelt(content) if respelt else (content, [])
    try:
        made = model.model_validate(content)
    except ValidationError as error:
        problems += _problems(error, copy.deepcopy(content), model)
        inherited = set(problems) if respelt else set()
        problems = [line for line in problems if re.sub(r"^stages\.\d+\.", "", line) not in inherited - {line}]
        raise ConfigurationError(source, problems) from None
    if problems:
        raise ConfigurationError(source, problems)
    return made


def _problems(error: ValidationError, content: Any, model: type[BaseModel]) -> list[str]:
    """A line for every problem; takes what is wrong by itself out of ``content`` and looks at the rest again.

    For only whole models are asked whether their settings go together. A conflict that speaks of what was taken out is left for
    the next time: it may be one of the default in its place.
    """
    lines: list[str] = []
    gone: set[str] = set()
    while True:
        found = error.errors(include_url=False)
        told = [line for problem in found if not gone or problem["type"] == "value_error" for line in _lines(problem, model)]
        lines += [line for line in told if line not in lines and not any(re.search(rf"\b{re.escape(w)}\b", line) for w in gone)]
        wrong = [place for problem in found if (place := _innermost(content, problem["loc"]))]
        gone |= {str(key) for _, key in wrong}
        gone |= {meant for problem in found if problem["type"] == "extra_forbidden" for meant in _meant(problem, model)}
        for holder, key in wrong:
            holder.pop(key, None)
        if not wrong:
            return lines
        try:
            model.model_validate(content)
            return lines
        except ValidationError as next_error:
            error = next_error


def _innermost(content: Any, location: tuple[Any, ...]) -> tuple[dict[Any, Any], Any] | None:
    """The innermost mapping and key of a location, of what is there of it."""
    found = None
    for part in location:
        if isinstance(content, dict) and part in content:
            found = content, part
        elif not (isinstance(content, list) and isinstance(part, int) and part < len(content)):
            break
        content = content[part]
    return found


def _lines(problem: Any, model: type[BaseModel]) -> list[str]:
    """Of one error that pydantic found: a validator tells several conflicts in as many lines."""
    where = shown(".".join(str(part) for part in problem["loc"]), 200) or "(whole file)"
    if problem["type"] == "extra_forbidden":
        close = _meant(problem, model)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(_keys_at(model, problem['loc'][:-1]))}"
        return [f"{where}: unknown key; {hint}"]
    if problem["type"] == "missing":
        return [f"{where}: missing; this key is needed"]
    message = str(problem["msg"]).removeprefix("Value error, ")
    found = problem["input"]
    value = f" (found {shown(repr(found), 80)})" if isinstance(found, str | int | float | bool) and problem["loc"] else ""
    return [f"{where}: {shown(line[:1].lower() + line[1:], 1000)}{value}" for line in message.split("\n")]


def _meant(problem: Any, model: type[BaseModel]) -> list[str]:
    """The known key that an unknown one resembles."""
    return difflib.get_close_matches(str(problem["loc"][-1])[:80], _keys_at(model, problem["loc"][:-1]), n=1)


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


_MOST_DIGITS = 100


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
    # No setting means more, and more overflows wherever it is put into a float or an array.
    if len(text) > _MOST_DIGITS or abs(value := int(text, 0 if text[:2] in ("0o", "0x") else 10)) >= 2**63:
        raise yaml.constructor.ConstructorError(None, None, "found a whole number beyond 2**63", node.start_mark)
    return value


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
