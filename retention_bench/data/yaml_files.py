"""Read YAML that others wrote: suites, and configurations of `accelerate`.

A key stands once and is a text; anchors and aliases may share settings, and are limited so that no bomb expands.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from retention_bench.data.files import read_text, shortened
from retention_bench.errors import RetentionBenchError, UsageError

MOST_CHARACTERS = 500_000
MOST_VALUES = 20_000
"""In a file, each alias counted as all that it stands for."""
MOST_LEVELS = 50

_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OLD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|.*:.*)")


def read_yaml(path: Path | str, what: str = "YAML file") -> Any:
    """The value in a YAML file.

    Args:
        path: The file.
        what: What the file should be, for the error.

    Raises:
        UsageError: As `find_file`; or it is not YAML in UTF-8, holds more than one document, a key that is no text or
            stands twice, a value that is none, or too much; the line is named.
    """
    try:
        text = read_text(path, what)
    except UsageError:
        raise
    except RetentionBenchError as error:
        raise UsageError(str(error)) from error
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"{path} has {len(text):,} characters; a {what} has {MOST_CHARACTERS:,} at most.")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value in a text of YAML.

    Args:
        text: The text.
        name: Where it is from, for the error.

    Raises:
        UsageError: As `read_yaml`, but for what may be wrong with a file.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{where}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UsageError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from error


class _Loader(yaml.SafeLoader):
    """Stricter than YAML 1.1: see the top of this file. A date is the text that it is written in."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the class above
        first: [one for one in some if one[0] != "tag:yaml.org,2002:timestamp"]
        for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._begun = 0
        self._values: dict[yaml.Node, int] = {}  # how many values a finished node stands for

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            node = super().compose_node(parent, index)
            if node not in self._values:
                raise _problem("an alias stands within what it is an alias of", event.start_mark)
            return node
        self._level += 1
        self._begun += 1
        if self._begun > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES:,} values", self.peek_event().start_mark)
        if self._level > MOST_LEVELS:
            raise _problem(f"more than {MOST_LEVELS} levels stand within one another", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        assert node is not None  # an event that is no alias makes one
        within: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            within = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            within = node.value
        self._values[node] = 1 + sum(self._values[one] for one in within)
        if self._values[node] > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES:,} values, with what the aliases stand for", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            # What a text with a tag raises in the library depends on the tag.
            raise _problem(f"{shortened(node.value)} is no {node.tag.rpartition(':')[2]}", node.start_mark) from error
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
            raise _problem("a text holds a NUL or half a character", node.start_mark)
        if node.tag in _NUMBERS and _OLD_NUMBER.fullmatch(node.value):
            # YAML 1.1 reads 010 as 8 and 1:30 as 90; later versions, and people, do not.
            raise _problem(
                f"{shortened(node.value)} is read as {value!r}; write that, or put it in quotes", node.start_mark
            )
        if isinstance(value, int) and abs(value) > sys.maxsize:
            raise _problem("an integer is larger than any here may be", node.start_mark)
        return value


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
            named = f"the key {shortened(key.value)}" if isinstance(key, yaml.ScalarNode) else "a key"
            raise _problem(f"{named} is no text; write it in quotes if it is meant as one", key.start_mark)
        if key.value in seen:
            raise _problem(
                f"the key {shortened(key.value)} stands here again, after line {seen[key.value]}; leave one of them",
                key.start_mark,
            )
        seen[key.value] = line


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)
