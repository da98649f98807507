"""YAML as configurations need it: YAML 1.2 scalars, no duplicate keys, and the line every key stands on.

PyYAML's own safe loader keeps the last of two equal keys, reads `3e-4` as text and `no` as false. This one
builds plain values (mappings, lists, text, numbers, booleans, null) from PyYAML's node tree by YAML 1.2's
core schema (https://yaml.org/spec/1.2.2/#103-core-schema). It never makes Python objects.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_training.errors import ConfigError

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 20  # nesting of a document
MAX_VALUES = 10_000  # values after aliases are expanded: a "billion laughs" file stops here

_INT = re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_UNWRITABLE = re.compile(r"[\0\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"


@dataclass
class Document:
    """One YAML file as plain values, `where` each key stands, and what is wrong with the file's keys."""

    data: dict[str, Any]
    where: dict[KeyPath, str] = field(default_factory=dict)  # "file:line"
    problems: list[str] = field(default_factory=list)  # "file:line: key: what is wrong"


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and composer, with YAML 1.2's implicit types and a bound on nesting."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 *or* 1.1 would read as something else (`3e-4`, `no`), so any reader agrees."""

    yaml_implicit_resolvers = {
        first: _Loader.yaml_implicit_resolvers.get(first, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        for first in {*_Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(data: Any) -> str:
    """Plain values as YAML text, keys in their own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_yaml(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping; raise `ConfigError` when it cannot be read as one."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Document:
    """Like `read_yaml`, from text; `file` is the name that errors cite."""
    value, document = _parse(text, file)
    if value is None:
        raise ConfigError(f"{file}:1: the file is empty; a configuration is a mapping of keys, `model: ...`")
    if not isinstance(value, dict):
        raise ConfigError(f"{file}:1: the top level is {describe(value)}; it must be a mapping of keys, `model: ...`")
    document.data = value
    return document


def parse_value(text: str, source: str) -> Any:
    """One YAML value, as an override gives it; `source` is the name that errors cite."""
    value, document = _parse(text, source)
    if document.problems:
        raise ConfigError("\n".join(document.problems))
    return value


def describe(value: Any) -> str:
    """A value as an error message shows it: its YAML spelling, and its kind where that could be mistaken."""
    if isinstance(value, dict):
        return f"a mapping ({', '.join(map(str, value)) or 'empty'})"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _writable(node: yaml.ScalarNode) -> str:
    """The node's text, unless it holds what no file name or terminal takes."""
    if found := _UNWRITABLE.search(node.value):
        problem = f"a text with the character {found[0]!r}, which cannot be written"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return node.value


def _bounded(number: int) -> int:
    """A number of at most 64 bits: ValueError for others, which nothing could count."""
    if abs(number) >= 2**63:
        raise ValueError(number.bit_length())
    return number


def _parse(text: str, file: str) -> tuple[Any, Document]:
    document = Document({})
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, document
        return _Builder(file, document).build(node, ()), document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{file}:{mark.line + 1 if mark else 1}: not valid YAML: {what}") from None
    except yaml.YAMLError as error:  # a control character, before there is any mark
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None


class _Builder:
    """Nodes to plain values, noting the line of every key."""

    def __init__(self, file: str, document: Document) -> None:
        self.file, self.document, self.num_values = file, document, 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            what = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels once its aliases are expanded"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        self.document.where.setdefault(path, self._where(node))
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is not allowed", problem_mark=node.start_mark)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        first: dict[str, str] = {}
        for key_node, value_node in node.value:
            place = self._where(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.document.problems.append(f"{place}: a key must be text, not a list or a mapping")
                continue
            key = _writable(key_node)  # text however it looks: `1: one` has the key "1"
            name = ".".join(map(str, (*path, key)))
            if key == "<<":
                self.document.problems.append(f"{place}: {name}: merge keys are not read; use `extends:`")
            elif key in mapping:
                self.document.problems.append(f"{place}: {name}: given twice (first at {first[key]}); keep one of them")
            else:
                first[key] = self.document.where[(*path, key)] = place
                mapping[key] = self.build(value_node, (*path, key))
        return mapping

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        tag, text = node.tag.removeprefix(_TAG), node.value
        try:
            if tag == "str":
                return _writable(node)
            if tag == "null":
                return None
            if tag == "bool" and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if tag == "int":
                return _bounded(int(text, {"0x": 16, "0o": 8}.get(text[:2], 10)))
            if tag == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:
            pass
        raise yaml.MarkedYAMLError(
            problem=f"{text[:60]!r} cannot be read as {node.tag!r}", problem_mark=node.start_mark
        )

    def _where(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"
