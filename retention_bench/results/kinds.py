"""What is asked: the kinds of question, and the stages of a model at which they are.

Whoever asks, counts, prints or reads answers takes names and labels from here. A kind of question is one entry in
`KINDS` and a task file in `tasks/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from retention_bench.errors import unknown_name

if TYPE_CHECKING:
    from retention_bench.facts import Fact, FactSet

FORMS: dict[str, str] = {
    "cloze": "{}",
    "qa": "Question: {} what?\nAnswer:",
    "chat": "Complete the sentence with the missing words only: {} ...",
}
"""The forms of a question, with what is put around a prompt. That of a chat is what the user says."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: Its name in samples, in rates and, behind `retention_`, in lm-eval.
        label: What tables call it.
        about: Which facts are asked: `"edited"`, those with a `target_new`, `"intrinsic"`, those without, or
            `"intrinsic_matched"`, those without whose relations edited facts have too.
        prompts: The attribute of a `Fact` that holds its prompt or prompts.
        target: The attribute of a `Fact` that holds the object to be answered.
        form: One of `FORMS`: how the prompt is put.
    """

    name: str
    label: str
    about: Literal["edited", "intrinsic", "intrinsic_matched"]
    prompts: Literal["question", "paraphrases", "neighborhood"]
    target: Literal["target_true", "target_new"]
    form: Literal["cloze", "qa", "chat"] = "cloze"

    @property
    def task(self) -> str:
        """The lm-eval task that asks it."""
        return f"retention_{self.name}"

    def questions(self, facts: FactSet) -> list[tuple[Fact, str, str]]:
        """Its questions: the fact, what is asked and the object to be answered, in the order of the facts."""
        found = []
        for fact in getattr(facts, self.about):
            prompts = getattr(fact, self.prompts)
            for prompt in (prompts,) if isinstance(prompts, str) else prompts:
                found.append((fact, FORMS[self.form].replace("{}", prompt), getattr(fact, self.target)))
        return found


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("edited", "edited", "edited", "question", "target_new"),
        Kind("edited_true", "edited, true object", "edited", "question", "target_true"),
        Kind("intrinsic", "intrinsic", "intrinsic", "question", "target_true"),
        Kind("intrinsic_matched", "intrinsic, matched", "intrinsic_matched", "question", "target_true"),
        Kind("paraphrase", "paraphrase", "edited", "paraphrases", "target_new"),
        Kind("locality", "locality", "edited", "neighborhood", "target_true"),
        Kind("edited_qa", "edited, as a question", "edited", "question", "target_new", "qa"),
        Kind("intrinsic_qa", "intrinsic, as a question", "intrinsic", "question", "target_true", "qa"),
        Kind("edited_chat", "edited, in a chat", "edited", "question", "target_new", "chat"),
        Kind("intrinsic_chat", "intrinsic, in a chat", "intrinsic", "question", "target_true", "chat"),
    )
}
"""All kinds of question, in the order in which they are asked."""

GROUPS: dict[str, tuple[str, ...]] = {
    f"retention{end}": tuple(name for name, kind in KINDS.items() if kind.form == form)
    for end, form in (("", "cloze"), ("_qa", "qa"), ("_chat", "chat"))
}
"""The groups of lm-eval tasks, with the kinds in each."""

STAGES: dict[str, str] = {
    "base": "base model",
    "post_edit": "after the edit",
    "post_finetune": "after the fine-tune",
    "control_finetune": "unedited, after the fine-tune",
}
"""The stages at which models are scored, each with its label."""


def _known(what: str, allowed: Mapping[str, Any]) -> Any:
    def check(name: str) -> str:
        if name not in allowed:
            raise ValueError(str(unknown_name(what, name, allowed)).removesuffix("."))
        return name

    return pydantic.AfterValidator(check)


KindName = Annotated[str, _known("kind of question", KINDS)]

StageName = Annotated[str, _known("stage", STAGES)]
