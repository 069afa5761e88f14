"""`--set key=value`: other values for a suite, checked like those in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from retention_bench.data import shortened
from retention_bench.data.yaml_files import parse_yaml
from retention_bench.display import cut
from retention_bench.errors import UsageError, unknown_name
from retention_bench.registry import EDITORS, FINETUNES, Registry

REGISTRIES: Mapping[str, Registry] = {registry.section: registry for registry in (EDITORS, FINETUNES)}

EXAMPLE = "editors.alphaedit.layers=3-8"


def parse_overrides(given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Read overrides.

    Args:
        given: `key=value` texts; or values by key, those that are texts as they would stand behind the `=`.

    Returns:
        Values by dotted key, parsed as YAML; of a key that stands twice the last.

    Raises:
        UsageError: One has no key or no value, or its value is not YAML.
    """
    if isinstance(given, str):
        raise UsageError(f"Overrides are a list of KEY=VALUE or a mapping, got the text {shortened(given)}.")
    pairs: list[tuple[str, Any]] = []
    for one in given.items() if isinstance(given, Mapping) else given:
        if isinstance(one, str):
            key, equals, value = one.partition("=")
            if not equals or not key.strip():
                raise UsageError(f"--set {shortened(one)} is no KEY=VALUE. Write it as in --set {EXAMPLE}.")
            pairs.append((key, value))
        else:
            pairs.append(one)
    parsed = {}
    for key, value in pairs:
        if isinstance(value, str):
            if not value.strip():
                raise UsageError(f"--set {cut(key)}= has no value. Give one behind the =, or null for none.")
            value = parse_yaml(value, f"--set {cut(key)}")
        parsed[key.strip()] = value
    return parsed


def is_place(path: Sequence[str]) -> bool:
    """Whether a value of a suite, given by the keys that lead to it, is a path or a Hub id."""
    match tuple(path):
        case (
            ("facts", "source")
            | ("covariance", "source" | "file")
            | ("models", _, "path")
            | (
                "models",
                _,
                "finetunes",
                _,
                "source",
            )
        ):
            return True
    return False


def override(
    suite: Mapping[str, Any], key: str, value: Any, keys: Sequence[str], place: Callable[[str], str]
) -> dict[str, Any]:
    """A suite with another value.

    `editors.NAME` and `finetunes.NAME` stand for the entries of every model. An entry that the suite lacks is added.

    Args:
        suite: A suite that is valid, as its file has it.
        key: A dotted key.
        value: The value.
        keys: The keys at the top of a suite.
        place: Makes a path absolute, and leaves a Hub id as it is.

    Raises:
        UsageError: There is no such key, entry or setting.
    """
    first, _, rest = key.partition(".")
    at: list[tuple[str, ...]]
    if first in REGISTRIES:
        at = [("models", model, first, rest) for model in suite["models"]]
    elif first == "models":
        name, rest = _name(rest, suite["models"])
        if name not in suite["models"]:
            raise _refused(key, unknown_name("model of the suite", name, suite["models"]))
        section, _, rest = rest.partition(".")
        if not section:
            raise _no_setting(key)
        at = [("models", name, section, rest)]
    elif first in keys:
        at = [(first, *rest.split("."))] if rest else [(first,)]
    else:
        raise _refused(key, unknown_name("key of a suite", first, [*keys, *REGISTRIES]))
    changed = dict(suite)
    for path in at:
        if path[0] == "models" and path[2] in REGISTRIES:
            path = (*path[:3], *_setting(key, changed["models"][path[1]], path[2], path[3], value))
        path = tuple(part for part in path if part)
        located = place(value) if is_place(path) and isinstance(value, str) else value
        changed = _put(changed, path, located, key)
    return changed


def _setting(key: str, model: Mapping[str, Any], section: str, rest: str, value: Any) -> tuple[str, ...]:
    """The path to a setting of an editor or a fine-tune below its section, once it is known to be one."""
    registry, entries = REGISTRIES[section], model[section]
    names = {*entries, *registry.names()}
    name, setting = _name(rest, names)
    if not setting:
        raise _no_setting(key)
    if name in names or setting == "editor":
        registered = str(value) if setting == "editor" else str(entries.get(name, {}).get("editor", name))
        if registered not in registry.names():
            raise _refused(key, unknown_name(registry.kind, registered, registry.names()))
        allowed = [*registry.fields(registered), *(["editor"] if section == "editors" else [])]
        if setting.partition(".")[0] not in allowed:
            raise _refused(key, unknown_name(f"setting of the {registry.kind} {name!r}:", setting, allowed))
        return (name, *setting.split("."))
    raise _refused(key, unknown_name(registry.kind, name, names))


def _name(rest: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> tuple[str, str]:
    """The name that a dotted key begins with, and what follows it; a name may have dots itself."""
    for name in sorted(known, key=len, reverse=True):
        if rest == name or rest.startswith(f"{name}."):
            return name, rest[len(name) + 1 :]
    name, _, rest = rest.partition(".")
    return name, rest


def _put(tree: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """A copy of nested mappings with another value; they may share parts, as YAML's aliases do."""
    if not path:
        return value
    if not isinstance(tree, Mapping):
        raise UsageError(f"--set {cut(key)}: there is no {path[0]!r} in {shortened(tree)}. Correct the key.")
    return {**tree, path[0]: _put(tree.get(path[0], {}), path[1:], value, key)}


def _refused(key: str, error: UsageError) -> UsageError:
    return UsageError(f"--set {cut(key)}: {error}")


def _no_setting(key: str) -> UsageError:
    return UsageError(f"--set {cut(key)} names no setting. Write the whole key, as in --set {EXAMPLE}.")
