"""A suite: models, facts, covariance, the settings of editors and fine-tunes; read from YAML and checked once."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from retention_bench.data import find_file, locate, shortened
from retention_bench.data.yaml_files import read_yaml
from retention_bench.display import cut, line
from retention_bench.errors import UsageError, unknown_name

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
Count = Annotated[int, pydantic.Field(strict=True, ge=1, le=2**31 - 1)]
Facts = Annotated[int, pydantic.Field(strict=True, ge=1, le=MOST_FACTS)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where rows come from: a local file or a Hub data set.

    Attributes:
        source: A path (absolute, or starting with `./` or `../`: seen from the suite's file), or a Hub data set id.
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
        intrinsic: Facts to leave alone.
        keywords: Relation keywords for the contamination filter, by relation.
    """

    margin: float = pydantic.Field(0.1, strict=True, ge=0, lt=1)
    edited: Facts = 50
    intrinsic: Facts = 100
    keywords: dict[str, tuple[Filled, ...]] = {}


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
        path: A local folder (as in `Source`) or a Hub model id.
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

    @property
    def registered(self) -> dict[str, str]:
        """The registered editor of each entry of `editors`."""
        return {name: str(settings.get("editor", name)) for name, settings in self.editors.items()}


class Suite(_Strict):
    """A whole suite.

    Attributes:
        name: The suite's name, as results carry it.
        notice: What a reader must know about its figures; printed and stored with each of them.
        default_model: The model that is used where none is named.
        models: The models by name.
        facts: The fact pool.
        covariance: The corpus of the covariance of the keys.
        real: The suite to name as the real one to go on to, where this one is a stand-in.
        directory: The folder of the suite's file; relative paths are seen from it. Not part of the YAML.
    """

    name: Name
    notice: str
    default_model: str
    models: dict[Name, ModelConfig]
    facts: FactsConfig
    covariance: CovarianceConfig
    real: str | None = None
    directory: Path = pydantic.Field(exclude=True)

    def locate(self, source: str) -> str:
        """A path seen from the suite's file made absolute; a Hub id as it is.

        Raises:
            UsageError: No file can have such a name, or it begins with `~` and there is no home folder.
        """
        if source.startswith("~"):
            locate(source)
            return str(Path(source).expanduser())
        if source.startswith(("./", "../")):
            return os.path.realpath(self.directory / source)  # unlike Path.resolve, also where links go in circles
        return source

    def model(self, name: str | None) -> tuple[str, ModelConfig]:
        """The model to use: one of the suite's, or a folder or Hub id in the default model's place.

        Args:
            name: A model's name in the suite, a path, a Hub id, or None for the default.

        Returns:
            The name for results and the model's configuration with its path made absolute.

        Raises:
            UsageError: The name is none of these.
        """
        if name is None or name in self.models:
            name = name or self.default_model
            config = self.models[name]
            return name, config.model_copy(update={"path": self.locate(config.path)})
        default = self.models[self.default_model]
        folder = locate(name)
        if folder is not None and folder.is_dir():
            folder = folder.resolve()
            return line(folder.name), default.model_copy(update={"path": str(folder), "revision": None})
        if folder is None and _HUB_ID.fullmatch(name):
            return name.replace("/", "--"), default.model_copy(update={"path": name, "revision": None})
        error = unknown_name("model", name, self.models)
        raise UsageError(f"{error} A folder that exists or a Hub id (owner/name) can be given too.")


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a suite by name, or from a YAML file of one's own.

    Args:
        name: A packaged suite's name, or a path that ends in `.yaml`.

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
        raise UsageError(f"{path}: the section `statistics` is now called `covariance`. Rename it.")
    if "directory" in parsed:
        raise UsageError(f"{path}: unknown key 'directory'. Allowed here: {', '.join(_keys(Suite))}.")
    try:
        suite = Suite.model_validate({**parsed, "directory": path.resolve().parent})
    except pydantic.ValidationError as error:
        raise UsageError(f"{path}: {_explain(error)}") from error
    if suite.default_model not in suite.models:
        raise UsageError(f"{path}: default_model: {unknown_name('model', suite.default_model, suite.models)}")
    return suite


_PARTS: dict[str, type[pydantic.BaseModel]] = {
    "facts": FactsConfig,
    "covariance": CovarianceConfig,
    "models": ModelConfig,
}


def _keys(model: type[pydantic.BaseModel]) -> list[str]:
    return [name for name in model.model_fields if name != "directory"]


def _explain(error: pydantic.ValidationError) -> str:
    """The first thing wrong, as one sentence that says where it stands."""
    first = error.errors(include_url=False)[0]
    place = cut(".".join(str(part) for part in first["loc"] if part != "[key]"))
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
