"""The registry of editors and fine-tunes: the built-in ones, and those of installed packages (entry points).

A module is imported when something is made of it, not before. Built-in names go before those of packages.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

import pydantic

from retention_bench.data import shortened
from retention_bench.display import cut
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name


@dataclasses.dataclass(frozen=True)
class Entry:
    """A name in a registry, as `list` shows it.

    Attributes:
        name: The name.
        package: The package that registers it, with its version; None for a built-in one.
        error: Why it cannot be used; None if it can.
    """

    name: str
    package: str | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Registry:
    """Classes by name; each is a frozen dataclass.

    Attributes:
        kind: What one of them is, for errors.
        section: The section of a suite that holds their settings. The entry points' group is named after it.
        built_in: Where the built-in classes are, as `module:class`.
        members: What every object must have.
        settings: Whether the settings are the fields of the class, or those of a dataclass that is its one field.
    """

    kind: str
    section: str
    built_in: Mapping[str, str]
    members: Sequence[str]
    settings: Literal["its fields", "its field settings"] = "its fields"

    @property
    def group(self) -> str:
        """The group of the entry points."""
        return f"retention_bench.{self.section}"

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported, so some may turn out to be broken."""
        return sorted({*self.built_in, *(point.name for point in entry_points(group=self.group))})

    def entries(self) -> list[Entry]:
        """All names, sorted, with what is wrong with those that cannot be used; imports the packages' modules."""
        found = [Entry(name) for name in self.built_in]
        for point in entry_points(group=self.group):
            error = None
            if point.name in self.built_in:
                error = (
                    f"The {self.kind} {point.name!r} is built in, so {point.value} is not used. Give it another name."
                )
            else:
                try:
                    self._load(point.name)
                except RetentionBenchError as broken:
                    error = str(broken)
            found.append(Entry(point.name, _package(point), error))
        return sorted(found, key=lambda entry: (entry.name, entry.package or ""))

    def fields(self, name: str) -> list[str]:
        """Names of the settings of a class.

        Raises:
            UsageError: There is no such name.
            RetentionBenchError: The package that registers it is broken.
        """
        return _fields(self._load(name)[1])

    def make(self, name: str, settings: Mapping[str, Any], *, entry: str | None = None) -> Any:
        """Make an object of its settings.

        Args:
            name: One of `names()`.
            settings: The settings, as they stand in a suite; those with a default may be left out.
            entry: The name in the suite that the settings stand under, for the errors; None for the name itself.

        Raises:
            UsageError: An unknown name or setting, a missing one, or a value of the wrong kind or out of range.
            RetentionBenchError: The package that registers the name is broken.
        """
        found, fields = self._load(name)
        for given in settings:
            if given not in _fields(fields):
                raise unknown_name(f"setting of the {self.kind} {name!r}:", str(given), _fields(fields))
        try:
            made: Any = pydantic.TypeAdapter(fields).validate_python(dict(settings))
        except pydantic.ValidationError as error:
            raise UsageError(self._explain(entry or name, error)) from error
        except (pydantic.errors.PydanticUserError, NameError) as error:  # an annotation that says nothing
            raise self._broken(name, f"{type(error).__name__}: {error}") from error
        if self.settings == "its field settings":
            made = found(made)
        for member in self.members:
            if not hasattr(made, member):
                raise self._broken(name, f"{found.__name__} has no {member!r}")
        return made

    def _load(self, name: str) -> tuple[type, type]:
        """A class, and the dataclass that has its settings as fields: itself, or that of its field `settings`."""
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            found: Any = getattr(importlib.import_module(module), attribute)
        else:
            points = list(entry_points(group=self.group, name=name))
            if not points:
                raise unknown_name(self.kind, name, self.names())
            if len(points) > 1:
                packages = " and ".join(sorted(_package(point) for point in points))
                raise RetentionBenchError(
                    f"The {self.kind} {name!r} is registered by {packages}. Uninstall all but one of them."
                )
            try:
                found = points[0].load()
            except (Exception, SystemExit) as error:  # a module may do anything when it is imported
                raise self._broken(name, f"{type(error).__name__}: {error}") from error
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise self._broken(name, f"it is no dataclass but {shortened(found)}")
        if self.settings == "its fields":
            return found, found
        try:
            hints = typing.get_type_hints(found)
        except Exception as error:  # an annotation may be any expression
            raise self._broken(name, f"{type(error).__name__}: {error}") from error
        fields: Any = hints.get("settings")
        if _fields(found) != ["settings"] or not dataclasses.is_dataclass(fields):
            raise self._broken(name, "it must have one field, 'settings', that is a dataclass")
        return found, typing.cast(type, fields)

    def _broken(self, name: str, why: str) -> RetentionBenchError:
        where = self.built_in.get(name) or next(point.value for point in entry_points(group=self.group, name=name))
        return RetentionBenchError(
            f"The {self.kind} {name!r} ({where}) cannot be used: {cut(' '.join(why.split())).rstrip('.')}. Repair or "
            "uninstall the package that registers it."
        )

    def _explain(self, entry: str, error: pydantic.ValidationError) -> str:
        """What is wrong with settings: all that are missing, or the first wrong one."""
        errors = error.errors()
        missing = [str(one["loc"][0]) for one in errors if one["type"] in ("missing", "missing_argument")]
        if missing:
            named, several = ", ".join(map(repr, missing)), len(missing) > 1
            options = " ".join(f"--set {self.section}.{entry}.{setting}=VALUE" for setting in missing)
            return (
                f"The {self.kind} {entry!r} needs the setting{'s' if several else ''} {named}, which "
                f"{'have no defaults' if several else 'has no default'}. Give {options}, or add "
                f"{'them' if several else 'it'} to a suite of your own."
            )
        first = errors[0]
        reason, given = first["msg"].removeprefix("Value error, "), first["input"]
        if not first["loc"]:
            return f"Settings of the {self.kind} {entry!r}: {reason}."
        place = ".".join(map(str, first["loc"]))
        hint = ""
        if first["type"] in ("float_type", "int_type") and isinstance(given, str) and _with_exponent(given):
            hint = f" YAML reads {given:.40} as text; write the number with a point, as in 2.0e-5."
        return f"The {self.kind} {entry!r}, setting {place!r}: {reason}, got {shortened(given)}.{hint}"


def _fields(found: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(found) if field.init]


def _package(point: EntryPoint) -> str:
    """The package of an entry point, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _with_exponent(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "e" in text.lower()


# One line registers an editor or a fine-tune.

EDITORS = Registry(
    "editor",
    "editors",
    {
        "alphaedit": "retention_bench.editors.alphaedit:AlphaEdit",
        "ft": "retention_bench.editors.ft:FT",
        "lora": "retention_bench.editors.lora:LoRA",
        "malmen": "retention_bench.editors.malmen:MALMEN",
        "memit": "retention_bench.editors.memit:MEMIT",
        "none": "retention_bench.editors.placebo:NoEdit",
        "random": "retention_bench.editors.placebo:RandomEdit",
        "rome": "retention_bench.editors.rome:ROME",
        "scaled": "retention_bench.editors.placebo:ScaledEdit",
    },
    members=("name", "edits_per_model", "covariance_layers", "template_lengths", "edit"),
)

FINETUNES = Registry(
    "fine-tune",
    "finetunes",
    {
        "commoncrawl": "retention_bench.finetune.tasks.commoncrawl:CommonCrawl",
        "counterfact": "retention_bench.finetune.tasks.counterfact:CounterFact",
        "imdb": "retention_bench.finetune.tasks.imdb:IMDB",
        "path": "retention_bench.finetune.tasks.custom:Custom",
        "tulu3": "retention_bench.finetune.tasks.tulu3:Tulu3",
    },
    members=("name", "settings", "prepare"),
    settings="its field settings",
)
