"""The forms that CounterFact's records come in, told apart by their fields, and how each becomes a `Draft`.

| form | where | fields that tell it |
|---|---|---|
| ROME's | counterfact.json, multi_counterfact.json; `azhx/counterfact` on the Hub | requested_rewrite |
| tracing | `NeelNanda/counterfact-tracing` on the Hub | relation_prefix, relation_suffix |
| EasyEdit's | counterfact-edit.json and its train and val files | ground_truth, target_new, prompt, subject |
| known facts | known_1000.json | attribute, relation_id, prompt, subject |
| our own | facts.jsonl, see `Fact` | id, relation, prompt, subject, target_true |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from retention_bench.facts.fact import Fact

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Draft:
    """A record's fact, before its prompt is a template and its relation has a name.

    Attributes:
        id: The record's id, or None where it has none.
        subject: The subject.
        prompt: The prompt, with `{}` for the subject or with the subject in its place.
        relation: The relation, or None where the record does not name it.
        target_true: The original object.
        target_new: The counterfactual object, or None.
        paraphrases: Other prompts for the same, subject filled in.
        neighborhood: Prompts about other subjects with the same relation and object.
    """

    id: str | None
    subject: str
    prompt: str
    relation: str | None
    target_true: str
    target_new: str | None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of records.

    Attributes:
        name: What people call it.
        fields: The fields that tell it from the others.
        read: Makes a draft of a record; KeyError names a missing field, ValueError says what is wrong with one.
    """

    name: str
    fields: frozenset[str]
    read: Callable[[Record], Draft]


def find_form(record: Any) -> Form | None:
    """The form that a record has, or None if none of `FORMS` fits."""
    if not isinstance(record, Mapping):
        return None
    return next((form for form in FORMS if form.fields <= record.keys()), None)


def _rome(record: Record) -> Draft:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise ValueError(f"'requested_rewrite' must be an object, got {type(rewrite).__name__}")
    prompt = _text(rewrite, "prompt")
    if prompt.count("{}") != 1:
        raise ValueError(f"prompt must contain '{{}}' exactly once, got {prompt!r}")
    return Draft(
        id=_id(record, "case_id"),
        subject=_text(rewrite, "subject"),
        prompt=prompt,
        relation=_text(rewrite, "relation_id"),
        target_true=_object(rewrite, "target_true"),
        target_new=_object(rewrite, "target_new"),
        paraphrases=_texts(record, "paraphrase_prompts"),
        neighborhood=_texts(record, "neighborhood_prompts"),
    )


def _tracing(record: Record) -> Draft:
    # A subject inside the sentence carries the space before it.
    given = _text(record, "subject")
    subject = given.strip()
    before, after = (_text(record, f"relation_{end}", empty=True) for end in ("prefix", "suffix"))
    prompt = before + given.replace(subject, "{}", 1) + after
    if prompt.replace("{}", subject) != _text(record, "prompt"):
        raise ValueError(f"prefix, subject and suffix do not make up the prompt {record['prompt']!r}")
    return Draft(
        id=None,
        subject=subject,
        prompt=prompt,
        relation=_text(record, "relation_id"),
        target_true=_text(record, "target_true"),
        target_new=_text(record, "target_false"),
    )


def _easyedit(record: Record) -> Draft:
    true = _text(record, "ground_truth")
    # A neighbour is one only where it has the same object; elsewhere the field holds unrelated questions.
    near = _texts(record, "locality_prompt") if record.get("locality_ground_truth") == true else ()
    return Draft(
        id=_id(record, "case_id"),
        subject=_text(record, "subject"),
        prompt=_text(record, "prompt"),
        relation=_text(record, "relation_id") if "relation_id" in record else None,
        target_true=true,
        target_new=_text(record, "target_new"),
        paraphrases=_texts(record, "rephrase_prompt"),
        neighborhood=near,
    )


def _known(record: Record) -> Draft:
    return Draft(
        id=_id(record, "known_id"),
        subject=_text(record, "subject"),
        # Not the record's `template`: the prompt has more words, and it is the prompt that GPT-2 XL was asked.
        prompt=_text(record, "prompt"),
        relation=_text(record, "relation_id"),
        target_true=_text(record, "attribute"),
        target_new=None,
    )


def _own(record: Record) -> Draft:
    fact = Fact.from_json(record)
    return Draft(
        fact.id,
        fact.subject,
        fact.prompt,
        fact.relation,
        fact.target_true,
        fact.target_new,
        fact.paraphrases,
        fact.neighborhood,
    )


def _id(record: Record, name: str) -> str | None:
    """A number or a text; None where there is none."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{name!r} must be a number or a text, got {value!r}")
    return str(value)


def _text(record: Record, name: str, *, empty: bool = False) -> str:
    value = record[name]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{name!r} must be a text{'' if empty else ' that is not empty'}, got {value!r}")
    return value


def _texts(record: Record, name: str) -> tuple[str, ...]:
    """One text, a list of them, or nothing."""
    value = record.get(name)
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"{name!r} must be a text or a list of texts that are not empty, got {value!r}")
    return tuple(found)


def _object(rewrite: Record, name: str) -> str:
    value = rewrite[name]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name!r} must be an object with 'str', got {value!r}")
    return _text(value, "str")


FORMS = (
    Form("ROME's", frozenset({"requested_rewrite"}), _rome),
    Form("tracing", frozenset({"relation_prefix", "relation_suffix"}), _tracing),
    Form("EasyEdit's", frozenset({"ground_truth", "target_new", "prompt", "subject"}), _easyedit),
    Form("known facts", frozenset({"attribute", "relation_id", "prompt", "subject"}), _known),
    Form("our own", frozenset({"id", "relation", "prompt", "subject", "target_true"}), _own),
)
"""The forms, in the order they are tried."""
