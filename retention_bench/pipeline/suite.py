"""A suite: models, facts, covariance, the settings of editors and fine-tunes; read from YAML and checked once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from retention_bench.data import find_file, locate, shortened
from retention_bench.data.source import SUFFIXES
from retention_bench.data.yaml_files import read_yaml
from retention_bench.display import cut, line, plain
from retention_bench.editors import parse_editor
from retention_bench.errors import UsageError, unknown_name
from retention_bench.facts import Split
from retention_bench.finetune import parse_finetune
from retention_bench.pipeline.overrides import is_place, override, parse_overrides
from retention_bench.registry import EDITORS, FINETUNES

_log = logging.getLogger("retention_bench")

PACKAGED = Path(str(importlib.resources.files("retention_bench") / "suites"))

MOST_FACTS = 1_000_000
"""More than any pool holds; CounterFact has 21,919."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name becomes a folder, so it must be of up to 100 letters, digits, '.', '_' and '-', and begin with a "
            "letter or a digit"
        )
    return name


def _placed(path: str) -> str:
    if not path.strip():
        raise ValueError("a path or a Hub id must not be empty")
    if len(path) > 4000 or any(len(part.encode()) > 255 for part in path.split("/")):
        raise ValueError("no file or folder can have so long a name")
    return path


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("it must not be empty")
    return text


Name = Annotated[str, pydantic.AfterValidator(_named)]
Place = Annotated[str, pydantic.AfterValidator(_placed)]
Filled = Annotated[str, pydantic.AfterValidator(_filled)]
"""An empty revision would be the newest, whatever that is; an empty keyword is in every row."""
_AUTO, _WORDS = "[auto]", "[words]"
Keywords = Annotated[
    Annotated[Literal["auto"], pydantic.Tag(_AUTO)] | Annotated[dict[str, tuple[Filled, ...]], pydantic.Tag(_WORDS)],
    pydantic.Discriminator(lambda given: _AUTO if isinstance(given, str) else _WORDS),
]
Count = Annotated[int, pydantic.Field(strict=True, ge=1, le=2**31 - 1)]
Facts = Annotated[int, pydantic.Field(strict=True, ge=1, le=MOST_FACTS)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where rows come from: a local file or a Hub data set.

    Attributes:
        source: A local file, or a Hub data set id.
        revision: The Hub revision; pin it.
        config: The Hub data set's configuration.
    """

    source: Place
    revision: Filled | None = None
    config: Filled | None = None


class FactsConfig(Source):
    """The fact pool and how the edited and intrinsic facts are drawn from it.

    Attributes:
        margin: The known-fact filter's lead of the true target's first token over the second.
        edited: Facts to edit.
        intrinsic: Facts to leave alone; of other relations than the edited ones, or, with the split `subjects`, of any.
        intrinsic_matched: Facts to leave alone beside them that have the edited facts' relations; as many as there are
            where the pool has too few. Not used with the split `subjects`, where all facts left alone are such.
        split: `relations`, as the paper's: whole relations go to a side; `subjects`: each relation's facts are divided.
        keywords: Relation keywords for the contamination filter, by relation; or `auto`, which takes them from the
            prompts of the whole pool, see `relation_keywords`.
    """

    margin: float = pydantic.Field(0.1, strict=True, ge=0, lt=1)
    edited: Facts = 50
    intrinsic: Facts = 100
    intrinsic_matched: int = pydantic.Field(0, strict=True, ge=0, le=MOST_FACTS)
    split: Split = "relations"
    keywords: Keywords = {}


class CovarianceConfig(Source):
    """The corpus that the covariance of the keys is collected on, or a file of one.

    Attributes:
        texts: How many texts, from the front.
        max_length: Tokens of a text that count.
        file: A file of `retention-bench covariance` to take in place of collecting it (a path as in `Source`).
    """

    texts: Count = 100_000
    max_length: Count = 1024
    file: Place | None = None


class ModelConfig(_Strict):
    """A model of the suite, with the settings of the editors and fine-tunes on it.

    Attributes:
        path: A local folder, or a Hub model id.
        revision: The Hub revision; pin it.
        dtype: The dtype that the base model is edited, trained and scored in.
        editors: Settings by the name that an editor goes by in this suite, checked by the editor. The key `editor` in
            an entry names the registered editor where that is another, so one can stand there with several settings.
        finetunes: Settings by fine-tune, checked by the fine-tune.
    """

    path: Place
    revision: Filled | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    editors: dict[Name, dict[str, Any]]
    finetunes: dict[Name, dict[str, Any]]

    @pydantic.field_validator("editors", "finetunes")
    @classmethod
    def _sources(cls, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in entries.items():
            if isinstance(source := settings.get("source"), str):
                try:
                    _placed(source)
                except ValueError as error:
                    raise ValueError(f"the source of {name}: {error}") from error
        return entries

    _added: frozenset[tuple[str, str]] = pydantic.PrivateAttr(frozenset())

    @property
    def registered(self) -> dict[str, str]:
        """The registered editor of each entry of `editors`."""
        return {name: str(settings.get("editor", name)) for name, settings in self.editors.items()}


@dataclasses.dataclass(frozen=True)
class Resolved:
    """An editor or a fine-tune that was asked for by name.

    Attributes:
        name: The name that it was asked for by.
        registered: Its name in the registry.
        settings: What to make it of, see `Registry.make`.
        given_by: Where the settings are from: the suite; the editor or fine-tune itself, which the suite does not
            name; or the name, as in `scaled:0.5:memit`. Overrides go over the first two.
    """

    name: str
    registered: str
    settings: Mapping[str, Any]
    given_by: Literal["suite", "its own defaults", "its name"]


class Suite(_Strict):
    """A whole suite; its local paths are absolute.

    Attributes:
        name: The suite's name, as results carry it.
        notice: What a reader must know about its figures; printed and stored with each of them.
        default_model: The model that is used where none is named.
        models: The models by name.
        facts: The fact pool.
        covariance: The corpus of the covariance of the keys.
        real: The suite to name as the real one to go on to, where this one is a stand-in.
    """

    name: Name
    notice: str
    default_model: str
    models: dict[Name, ModelConfig]
    facts: FactsConfig
    covariance: CovarianceConfig
    real: str | None = None

    _overrides: dict[str, Any] = pydantic.PrivateAttr(default_factory=dict)

    @property
    def overrides(self) -> Mapping[str, Any]:
        """The values that it was loaded with in the place of its file's, by dotted key."""
        return self._overrides

    def model(self, name: str | None) -> tuple[str, ModelConfig]:
        """The model to use: one of the suite's, or a folder or Hub id in the default model's place.

        Args:
            name: A model's name in the suite, a path, a Hub id, or None for the default.

        Returns:
            The name for results and the model's configuration.

        Raises:
            UsageError: The name is none of these.
        """
        if name is None or name in self.models:
            name = name or self.default_model
            return name, self.models[name]
        default = self.models[self.default_model]
        folder = locate(name)
        if folder is not None and folder.is_dir():
            folder = folder.resolve()
            return line(folder.name), default.model_copy(update={"path": str(folder), "revision": None})
        if folder is None and _HUB_ID.fullmatch(name):
            return name.replace("/", "--"), default.model_copy(update={"path": name, "revision": None})
        error = unknown_name("model", name, self.models)
        raise UsageError(f"{error} A folder that exists or a Hub id (owner/name) can be given too.")

    def editor(self, name: str, model: ModelConfig) -> Resolved:
        """An editor and its settings for a model.

        Args:
            name: An entry of the suite; a registered editor, which then has its own defaults; or one of the forms of
                `parse_editor`.
            model: The model.

        Raises:
            UsageError: There is no such editor.
        """
        asked, given = parse_editor(name)
        if given:
            found = self.editor(asked, model)
            return Resolved(name, found.registered, {**found.settings, **given}, "its name")
        if name not in model.editors and name not in EDITORS.names():
            raise unknown_name("editor", name, {*model.editors, *EDITORS.names()})
        registered = model.registered.get(name, name)
        if registered not in EDITORS.names():
            error = unknown_name("editor", registered, EDITORS.names())
            raise UsageError(
                f"The suite {self.name!r}, editors.{name}: {error} An entry that goes by another name than its editor "
                "names that with the key `editor`."
            )
        settings = {key: value for key, value in model.editors.get(name, {}).items() if key != "editor"}
        return Resolved(name, registered, settings, _given_by(model, "editors", name))

    def finetune(self, text: str, model: ModelConfig) -> Resolved:
        """A fine-tune and its settings for a model.

        Args:
            text: A fine-tune's name, or `path:` and a data set, see `parse_finetune`.
            model: The model.

        Raises:
            UsageError: There is no such fine-tune.
        """
        name, given = parse_finetune(text)
        if name not in FINETUNES.names():
            raise unknown_name("fine-tune", name, FINETUNES.names())
        settings = {**model.finetunes.get(name, {}), **given}
        return Resolved(name, name, settings, _given_by(model, "finetunes", name))


def _given_by(model: ModelConfig, section: str, name: str) -> Literal["suite", "its own defaults"]:
    named = name in getattr(model, section) and (section, name) not in model._added
    return "suite" if named else "its own defaults"


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def load_suite(name: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Suite:
    """Read a suite by name, or from a YAML file of one's own.

    Relative paths in the file are seen from the file's folder, those of overrides from the working folder. A path
    begins with `./`, `../`, `~` or `/`, ends like a data file, or is the name of something there; all else is a Hub id.

    Args:
        name: A packaged suite's name, or a path that ends in `.yaml`.
        overrides: Other values for some of its keys: `key=value` texts, or values by key. Keys are dotted:
            `facts.edited`, `models.NAME.path`; `editors.NAME.lr` and `finetunes.NAME.source` go for every model, below
            `models.NAME.` for one. A text is read as YAML.

    Raises:
        UsageError: No such suite, unreadable YAML, an unknown key (with a suggestion) or a value of the wrong kind.
    """
    if name.endswith((".yaml", ".yml")):
        path = find_file(name, "suite file")
    elif name in suite_names():
        path = PACKAGED / f"{name}.yaml"
    else:
        raise unknown_name("suite", name, suite_names())
    parsed = read_yaml(path, "suite file")
    if not isinstance(parsed, dict):
        raise UsageError(
            f"{path} must hold a mapping with the keys {', '.join(_keys(Suite))}, and holds {shortened(parsed)}."
        )
    if "statistics" in parsed:
        if "covariance" in parsed:
            raise UsageError(f"{path}: `statistics` is the old name of `covariance`, and both are there. Remove one.")
        _log.warning("%s", plain(f"{path}: the section `statistics` is now called `covariance`. Rename it."))
        parsed = {"covariance" if key == "statistics" else key: value for key, value in parsed.items()}
    parsed = _located(parsed, functools.partial(_place, path.resolve().parent))
    suite = _validated(parsed, str(path))
    given = parse_overrides(overrides)
    if not given:
        return suite
    # The editor that an entry names is known before its settings are looked at.
    for key in sorted(given, key=lambda key: not key.endswith(".editor")):
        parsed = override(parsed, key, given[key], _keys(Suite), functools.partial(_place, Path.cwd()))
    changed = _validated(parsed, f"suite {suite.name} with --set")
    changed._overrides = given
    for name, model in changed.models.items():
        before = suite.models[name]
        model._added = frozenset(
            [("editors", entry) for entry in model.editors if entry not in before.editors]
            + [("finetunes", entry) for entry in model.finetunes if entry not in before.finetunes]
        )
    return changed


def _validated(parsed: Mapping[str, Any], where: str) -> Suite:
    try:
        suite = Suite.model_validate(parsed)
    except pydantic.ValidationError as error:
        raise UsageError(f"{where}: {_explain(error)}") from error
    if suite.default_model not in suite.models:
        raise UsageError(f"{where}: default_model: {unknown_name('model', suite.default_model, suite.models)}")
    return suite


def _place(folder: Path, text: str) -> str:
    """A path that is seen from a folder made absolute; a Hub id as it is.

    Raises:
        UsageError: No file can have such a name, or it begins with `~` and there is no home folder.
    """
    if text.startswith("~"):
        locate(text)
        return str(Path(text).expanduser())
    there = os.path.join(folder, text)
    if text.startswith(("./", "../")) or text.endswith(SUFFIXES) or (text.strip() and os.path.lexists(there)):
        return os.path.abspath(there)
    return text


def _located(value: Any, place: Callable[[str], str], path: tuple[str, ...] = ()) -> Any:
    """A suite's values, or those below some keys, with their paths made absolute."""
    if isinstance(value, dict):
        return {key: _located(inner, place, (*path, key)) for key, inner in value.items()}
    return place(value) if isinstance(value, str) and is_place(path) else value


_PARTS: dict[str, type[pydantic.BaseModel]] = {
    "facts": FactsConfig,
    "covariance": CovarianceConfig,
    "models": ModelConfig,
}


def _keys(model: type[pydantic.BaseModel]) -> list[str]:
    return list(model.model_fields)


def _explain(error: pydantic.ValidationError) -> str:
    """The first thing wrong, as one sentence that says where it stands."""
    first = error.errors(include_url=False)[0]
    place = cut(".".join(str(part) for part in first["loc"] if part not in ("[key]", _AUTO, _WORDS)))
    if first["type"] != "extra_forbidden":
        given = f"{place}: {first['msg'].removeprefix('Value error, ')}, got {shortened(first['input'])}."
        return f"{given} {_hint(first['type'], first['input'])}".rstrip()
    parent: type[pydantic.BaseModel] = Suite
    for part in first["loc"][:-1]:
        parent = _PARTS.get(str(part), parent)
    given = str(first["loc"][-1])
    near = difflib.get_close_matches(given, _keys(parent), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown key {place!r}.{hint} Allowed here: {', '.join(_keys(parent))}."


def _hint(error: str, given: Any) -> str:
    """How YAML must be written to be read as what is wanted, where that may be all that is wrong."""
    if error == "string_type" and isinstance(given, bool | int | float):
        return "A text that looks like a number or like yes and no stands in quotes."
    if error in ("int_type", "float_type") and isinstance(given, str):
        return "A number stands without quotes, and has a point in front of its exponent, as in 2.0e-5."
    return ""
