"""pydantic's errors as lines a person can act on: `file:line: key: what was given; what is allowed; did you mean`."""

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from mlx_training.yaml_loader import KeyPath, describe

Schema = Mapping[str, Any]

# Spellings of earlier configurations -> what to write now. A dotted name is that key of that section; a plain name
# is recognised wherever it stands.
OLDER_SPELLINGS = {
    "lr_encoder": "training.learning_rate.encoder",
    "lr_projector": "training.learning_rate.projector",
    "dataset.name": "dataset.format (and dataset.path)",
    "device.type": "device (one word: auto, cpu, gpu, cuda or mps)",
    "model.type": "model.family: timeseries (for OpenTSLMSP with model.preset: opentslm-sp)",
    "freeze_llm": "nothing: the LM is always frozen (model.train_lm_head trains its output head)",
    "encoder_hidden_dim": "model.encoder.hidden_size",
    "eval_every": "evaluation.every_steps",
    "save_every": "checkpoint.every_steps",
    "wandb_project": "logging.project",
}


class Problem(NamedTuple):
    """One thing that is wrong, at a key."""

    path: KeyPath
    message: str
    related: tuple[KeyPath, ...] = ()  # for a contradiction: all its keys, this one first


def take_older_spellings(data: dict[str, Any], path: KeyPath = ()) -> Iterator[Problem]:
    """Report older spellings and remove them from `data`, so that nothing else complains about them."""
    for key in list(data):
        here = (*path, key)
        new = OLDER_SPELLINGS.get(".".join(map(str, here)), OLDER_SPELLINGS.get(key))
        if new is not None:
            yield Problem(here, f"given {describe(data.pop(key))}; this is an older spelling, now write {new}")
        elif isinstance(data[key], dict):
            held = bool(data[key])
            yield from take_older_spellings(data[key], here)
            if held and not data[key]:  # a section that was given empty stays, and counts
                del data[key]


def explain(error: ValidationError, data: Mapping[str, Any], schema: Schema) -> list[Problem]:
    """One problem per key of `data`, in the order of the schema."""
    problems: dict[KeyPath, Problem] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "conflicts":
            for conflict in item["ctx"]["conflicts"]:
                related: tuple[KeyPath, ...] = tuple(tuple(key.split(".")) for key in conflict.keys)
                problems.setdefault(related[0], Problem(related[0], conflict.message, related))
            continue
        path = _given_path(item["loc"], data)
        given, value = _lookup(data, path)
        if item["type"] == "family":
            path = (*path, "family")
            given, value = _lookup(data, path)
        if item["type"] == "extra_forbidden":
            message = _unknown_key(path, data, schema)
        elif not given:
            message = f"missing; allowed: {allowed(path, data, schema)}"
        else:
            message = f"given {describe(value)}; allowed: {allowed(path, data, schema)}"
            message += _did_you_mean(value, _choices(schema, path, data))
        problems.setdefault(path, Problem(path, message))
    return list(problems.values())


def allowed(path: KeyPath, data: Mapping[str, Any], schema: Schema) -> str:
    """What may stand at `path`, in words."""
    words = [_words(node, schema) for node in _nodes(schema, path, data)]
    return " or ".join(dict.fromkeys(words)) or "nothing"


def closest_key(key: str, known: Collection[str]) -> str | None:
    """The dotted key that was meant: of the same section, else nearly the same anywhere."""
    section, _, name = key.rpartition(".")
    names = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    if meant := _closest_names(name, names):
        return names[meant[0]]
    return next(iter(get_close_matches(key, {other for other in known if not key.startswith(f"{other}.")}, 1)), None)


def _closest_names(name: str, names: Collection[str]) -> list[str]:
    """Those that have these initials (lr) or this word (clip); else one that is nearly the same, or begins so."""
    found = [other for other in names if len(name) > 1 and "".join(word[:1] for word in other.split("_")) == name]
    found += [other for other in names if name in other.split("_") and other not in found]
    found = found or get_close_matches(name, names, 1)
    return found[:3] or [other for other in names if other.startswith(name) and len(name) > 2][:1]


def _given_path(loc: KeyPath, data: Any) -> KeyPath:
    """pydantic's location without the names of union branches: "<...>" tags, and types below a plain value."""
    path: KeyPath = ()
    for part in loc:
        if isinstance(data, dict | list) and not str(part).startswith("<"):
            path = (*path, part)
            found, value = _lookup(data, (part,))
            data = value if found else {}
    return path


def _lookup(data: Any, path: KeyPath) -> tuple[bool, Any]:
    """(whether the path exists, its value)."""
    for part in path:
        if isinstance(data, list):
            data = dict(enumerate(data))
        if not isinstance(data, dict) or part not in data:
            return False, None
        data = data[part]
    return True, data


def _branches(node: Schema, schema: Schema) -> Iterator[Schema]:
    """A schema node with references and alternatives resolved."""
    if "$ref" in node:
        yield from _branches(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    elif "anyOf" in node or "oneOf" in node:
        for option in node.get("anyOf") or node["oneOf"]:
            yield from _branches(option, schema)
    else:
        yield node


def _nodes(schema: Schema, path: KeyPath, data: Any) -> list[Schema]:
    """Schema nodes for what may stand at `path`; in the model section, those of the family that is given."""
    nodes = list(_branches(schema, schema))
    for i, part in enumerate(path):
        below: list[Schema] = []
        for node in nodes:
            if part in node.get("properties", {}):
                below.append(node["properties"][part])
            elif isinstance(node.get("additionalProperties"), dict):
                below.append(node["additionalProperties"])
            elif isinstance(part, int) and "prefixItems" in node:
                below.extend(node["prefixItems"][part : part + 1])
            elif isinstance(part, int) and "items" in node:
                below.append(node["items"])
        nodes = [branch for node in below for branch in _branches(node, schema)]
        family = _lookup(data, (*path[: i + 1], "family"))[1]
        of_family = [n for n in nodes if n.get("properties", {}).get("family", {}).get("const") == family]
        nodes = of_family or nodes
    return nodes


def _choices(schema: Schema, path: KeyPath, data: Any) -> list[str]:
    nodes = _nodes(schema, path, data)
    return [str(v) for node in nodes for v in ([node["const"]] if "const" in node else node.get("enum", ()))]


def _words(node: Schema, schema: Schema) -> str:
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return ", ".join(map(str, node["enum"]))
    kind = node.get("type")
    if kind in ("integer", "number"):
        bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        limits = [f"{sign} {node[name]:,}" for name, sign in bounds.items() if name in node]
        return " ".join(["a whole number" if kind == "integer" else "a number", " and ".join(limits)]).strip()
    if kind == "array":
        items = node.get("prefixItems") or [node.get("items", {})]
        length = f" of {len(items)}" if "prefixItems" in node else ""
        inner = " or ".join(_words(branch, schema) for branch in _branches(items[0], schema))
        return f"a list{length}, each {inner}"
    if kind == "object":
        if "properties" in node:
            return f"a mapping of {', '.join(node['properties'])}"
        return f"a mapping of names to {_words(node['additionalProperties'], schema)}"
    return {"boolean": "true or false", "string": "text", "null": "null"}.get(str(kind), "anything")


def _unknown_key(path: KeyPath, data: Mapping[str, Any], schema: Schema) -> str:
    name, parent = str(path[-1]), path[:-1]
    siblings = [key for node in _nodes(schema, parent, data) for key in node.get("properties", ())]
    allowed_here = f"allowed here: {', '.join(siblings)}"
    if parent == ("model",) and (owners := _families_with(name, schema)):
        given = _lookup(data, ("model", "family"))[1]
        return (
            f"unknown key; it belongs to the family {' or '.join(owners)}, and model.family is {given}; {allowed_here}"
        )
    if close := _closest_names(name, siblings):
        meant = [".".join(map(str, (*parent, key))) for key in close]
    else:
        places = _places(schema, schema, data)
        meant = places.get(name) or places.get(next(iter(get_close_matches(name, places, 1, 0.8)), ""), [])
    return "unknown key; " + (f"did you mean {' or '.join(meant)}? " if meant else "") + allowed_here


def _families_with(key: str, schema: Schema) -> list[str]:
    """The families whose `model` section has a key."""
    branches = [node["properties"] for node in _branches(schema["properties"]["model"], schema)]
    return [str(keys["family"]["const"]) for keys in branches if key in keys]


def _places(node: Schema, schema: Schema, data: Any, path: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Every key of the schema -> the dotted places where it may stand."""
    found: dict[str, list[str]] = {}
    for branch in _nodes(schema, path, data):
        for key in branch.get("properties", {}):
            found.setdefault(key, []).append(".".join((*path, key)))
            for name, places in _places(node, schema, data, (*path, key)).items():
                found.setdefault(name, []).extend(places)
    return {name: list(dict.fromkeys(places)) for name, places in found.items()}


def _did_you_mean(value: Any, choices: list[str]) -> str:
    close = get_close_matches(str(value).lower(), choices, 1) if isinstance(value, str | bool) else []
    return f"; did you mean {close[0]}?" if close else ""
