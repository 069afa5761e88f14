"""The formats that editing benchmarks' records come in, told apart by their fields, and how each becomes `RawFact`s.

| format | where | fields that tell it |
|---|---|---|
| MQuAKE's | MQuAKE-CF.json, MQuAKE-T.json | requested_rewrite, a list |
| ROME's | counterfact.json, multi_counterfact.json; `azhx/counterfact` on the Hub | requested_rewrite |
| tracing | `NeelNanda/counterfact-tracing` on the Hub | relation_prefix, relation_suffix |
| EasyEdit's | counterfact-edit.json, most of KnowEdit | ground_truth, target_new, prompt, subject |
| zsRE's | zsre_mend_eval.json and its train file | subject; src or prompt; alt or target_new; answers, or src |
| known facts | known_1000.json | attribute, relation_id, prompt, subject |
| our own | facts.jsonl, see `Fact` | id, relation, prompt, subject, target_true |
| KnowEdit's | the rest of KnowEdit | subject, prompt, target_new; portability or locality |

What a format has besides is not used: unrelated questions (zsRE's `loc`, KnowEdit's `locality`), questions whose answer
follows from the edit in several steps (MQuAKE's `questions`, KnowEdit's `portability`), and a model's own predictions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, StringConstraints

from retention_bench.data import fitted
from retention_bench.facts.fact import MAX_TEXT, Fact

NO_TRUE = "it does not say the true object"


@dataclasses.dataclass(frozen=True)
class RawFact:
    """A fact as its record tells it, before its prompt is a template and its relation has a name.

    Attributes:
        id: The record's id, or None where it has none.
        subject: The subject.
        prompt: The prompt, with `{}` for the subject or with the subject in its place.
        relation: The relation, or None where the record does not name it.
        target_true: The original object, or None where the record does not name it.
        target_new: The counterfactual object, or None.
        paraphrases: Other prompts for the same, subject filled in.
        neighborhood: Prompts about other subjects with the same relation and object.
    """

    id: str | None
    subject: str
    prompt: str
    relation: str | None
    target_true: str | None
    target_new: str | None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it must not be empty")
    return text


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _listed(value: Any) -> Any:
    """One text, a list of them, or nothing; what is null or blank in a list is no prompt."""
    if value is None or isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [text for text in value if text is not None and not (isinstance(text, str) and not text.strip())]


def _first(value: Any) -> Any:
    """The first of several names of an object, as `[["Berlin", "City of Berlin"]]`; None where there is none."""
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return value if not isinstance(value, str) or value.strip() else None


_Short = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
_Text = Annotated[_Short, AfterValidator(_not_blank)]
_Texts = Annotated[tuple[_Text, ...], BeforeValidator(_listed)]
_Id = Annotated[_Text, BeforeValidator(_as_text)] | None


class _Record(pydantic.BaseModel, abc.ABC):
    """A record's fields that are read, by any of the names that they have."""

    model_config = pydantic.ConfigDict(frozen=True)

    @abc.abstractmethod
    def facts(self) -> Iterator[RawFact]:
        """The facts that it holds."""


class _Named(pydantic.BaseModel):
    text: _Text = Field(validation_alias="str")


class _Rewrite(pydantic.BaseModel):
    prompt: _Text
    subject: _Text
    relation_id: _Text | None = None
    target_true: _Named
    target_new: _Named
    question: _Text | None = None

    def fact(self, number: str | None, paraphrases: tuple[str, ...], neighborhood: tuple[str, ...] = ()) -> RawFact:
        return RawFact(
            number,
            self.subject,
            self.prompt,
            self.relation_id,
            self.target_true.text,
            self.target_new.text,
            paraphrases,
            neighborhood,
        )


class _MQuAKE(_Record):
    case_id: _Id = None
    requested_rewrite: tuple[_Rewrite, ...] = Field(min_length=1)

    def facts(self) -> Iterator[RawFact]:
        for number, rewrite in enumerate(self.requested_rewrite):
            name = None if self.case_id is None else f"{self.case_id}-{number}"
            yield rewrite.fact(name, () if rewrite.question is None else (rewrite.question,))


class _ROME(_Record):
    case_id: _Id = None
    requested_rewrite: _Rewrite
    paraphrase_prompts: _Texts = ()
    neighborhood_prompts: _Texts = ()

    def facts(self) -> Iterator[RawFact]:
        yield self.requested_rewrite.fact(self.case_id, self.paraphrase_prompts, self.neighborhood_prompts)


class _Tracing(_Record):
    prompt: _Text
    relation_prefix: _Short
    relation_suffix: _Short
    subject: _Text
    relation_id: _Text | None = None
    target_true: _Text
    target_false: _Text

    def facts(self) -> Iterator[RawFact]:
        # A subject inside the sentence carries the space before it.
        subject = self.subject.strip()
        prompt = self.relation_prefix + self.subject.replace(subject, "{}", 1) + self.relation_suffix
        if prompt.replace("{}", subject) != self.prompt:
            raise ValueError("prefix, subject and suffix do not make up the prompt")
        yield RawFact(None, subject, prompt, self.relation_id, self.target_true, self.target_false)


class _EasyEdit(_Record):
    """EasyEdit's, zsRE's and KnowEdit's: one shape under several names."""

    case_id: _Id = None
    subject: _Text
    prompt: _Text = Field(validation_alias=AliasChoices("prompt", "src"))
    relation_id: _Text | None = None
    target_new: Annotated[_Text, BeforeValidator(_first)] = Field(validation_alias=AliasChoices("target_new", "alt"))
    ground_truth: Annotated[_Text | None, BeforeValidator(_first)] = Field(
        None, validation_alias=AliasChoices("ground_truth", "answers")
    )
    rephrase: _Texts = Field((), validation_alias=AliasChoices("rephrase_prompt", "rephrase"))
    locality_prompt: Any = None
    locality_ground_truth: Any = None

    def facts(self) -> Iterator[RawFact]:
        # The field holds a neighborhood prompt where its object is the same, and an unrelated question elsewhere.
        near = self.locality_prompt if self.locality_ground_truth == self.ground_truth else None
        yield RawFact(
            id=self.case_id,
            subject=self.subject,
            prompt=self.prompt,
            relation=self.relation_id,
            target_true=self.ground_truth,
            target_new=self.target_new,
            paraphrases=self.rephrase,
            neighborhood=fitted(_Texts, near),
        )


class _Known(_Record):
    known_id: _Id = None
    subject: _Text
    # Not the record's `template`: the prompt has more words, and it is the prompt that GPT-2 XL was asked.
    prompt: _Text
    relation_id: _Text | None = None
    attribute: _Text

    def facts(self) -> Iterator[RawFact]:
        yield RawFact(self.known_id, self.subject, self.prompt, self.relation_id, self.attribute, None)


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """A format of records.

    Attributes:
        name: What people call it.
        fields: The fields that tell it from the others; of names with `|` between them one is enough.
        schema: What is read of a record; None for our own, which `Fact` reads.
        several: Whether a record holds several facts.
    """

    name: str
    fields: tuple[str, ...]
    schema: type[_Record] | None
    several: bool = False

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has the fields of this format."""
        if self.several != isinstance(record.get("requested_rewrite"), list):
            return False
        return all(any(name in record for name in names.split("|")) for names in self.fields)

    def read(self, record: Mapping[str, Any]) -> list[RawFact]:
        """The facts of a record.

        Raises:
            ValueError: It is not a record of this format; the field is named.
        """
        assert self.schema is not None
        return list(fitted(self.schema, record).facts())


def find_format(record: Mapping[str, Any]) -> RecordFormat | None:
    """The format that a record has, or None if none of `FORMATS` fits."""
    return next((found for found in FORMATS if found.fits(record)), None)


OWN = RecordFormat("our own", ("id", "relation", "prompt", "subject", "target_true"), None)

FORMATS = (
    RecordFormat("MQuAKE's", ("requested_rewrite",), _MQuAKE, several=True),
    RecordFormat("ROME's", ("requested_rewrite",), _ROME),
    RecordFormat("tracing", ("relation_prefix", "relation_suffix"), _Tracing),
    RecordFormat("EasyEdit's", ("ground_truth", "target_new", "prompt", "subject"), _EasyEdit),
    RecordFormat("zsRE's", ("subject", "src|prompt", "alt|target_new", "answers|src"), _EasyEdit),
    RecordFormat("known facts", ("attribute", "relation_id", "prompt", "subject"), _Known),
    OWN,
    RecordFormat("KnowEdit's", ("subject", "prompt", "target_new", "portability|locality"), _EasyEdit),
)
"""The formats, in the order they are tried."""
assert {field.name for field in dataclasses.fields(Fact)} >= set(OWN.fields)
