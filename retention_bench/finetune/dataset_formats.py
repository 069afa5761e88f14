"""The formats that rows come in, told apart by their columns, and what is trained on in each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from retention_bench.errors import UsageError
from retention_bench.finetune.base import Example
from retention_bench.finetune.chats import Chat, Messages, chat_template, encode_chat, parse_messages
from retention_bench.finetune.dropped import Unusable, shown
from retention_bench.finetune.rows import Columns, Row, parse_text
from retention_bench.finetune.texts import check_tokenizer, encode_class, encode_completion, encode_text, parse_class


class Completion(NamedTuple):
    """A prompt, and the text behind it that is the target."""

    prompt: str
    completion: str

    @property
    def words(self) -> str:
        """All its words."""
        return self.prompt + self.completion


class Text(NamedTuple):
    """A text, every token of which is a target."""

    words: str


class Labelled(NamedTuple):
    """A text, and the class that it has."""

    words: str
    label: int


Sample = Chat | Completion | Text | Labelled
"""What is trained on in a row."""


class DatasetFormat(NamedTuple):
    """A format of rows.

    Attributes:
        reads: What is read as what, in words.
        columns: The columns that it has.
        sample: What is trained on in a row.
        optional: Columns that it may have.
    """

    reads: str
    columns: Columns
    sample: Callable[[Row], Sample]
    optional: Columns = MappingProxyType({})


def _optional_text(cell: Any) -> str:
    if cell is not None and not isinstance(cell, str):
        raise ValueError(f"must be a text, got {shown(cell)}")
    return cell if cell and cell.strip() else ""


def _history(cell: Any) -> Messages:
    """Earlier turns: pairs of what was asked and answered."""
    messages = []
    for pair in [] if cell is None else cell if isinstance(cell, list) else [cell]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) and t.strip() for t in pair):
            raise Unusable(
                "have a history that cannot be read", f"must be a list of pairs of texts, and one is {shown(pair)}"
            )
        messages += [*_said("user", pair[0]), *_said("assistant", pair[1])]
    return messages


def _said(role: str, text: str) -> Messages:
    return [{"role": role, "content": text}] if text else []


def _sharegpt(row: Row) -> Chat:
    chat = row["conversations"]
    return Chat(chat if chat and chat[0]["role"] == "system" else [*_said("system", row["system"]), *chat])


def _alpaca(instruction: str, given: str, answer: str) -> DatasetFormat:
    def sample(row: Row) -> Chat:
        asked = "\n\n".join(part for part in (row[instruction], row[given]) if part)
        earlier = [*_said("system", row["system"]), *row["history"]]
        return Chat([*earlier, *_said("user", asked), *_said("assistant", row[answer])])

    return DatasetFormat(
        f"{instruction} and {given} are read as a user's message, {answer} as the assistant's",
        {instruction: parse_text, answer: parse_text},
        sample,
        {given: _optional_text, "system": _optional_text, "history": _history},
    )


def _side(cell: Any) -> str | Messages:
    return parse_messages(cell) if isinstance(cell, list) else parse_text(cell)


def _completion(row: Row) -> Sample:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise Unusable(
            "have a text and messages in one row", "prompt and completion must be both texts or both messages"
        )
    return Chat([*prompt, *completion], len(prompt))


MESSAGES = DatasetFormat(
    "messages (role, content) are read as chats", {"messages": parse_messages}, lambda row: Chat(row["messages"])
)
SHAREGPT = DatasetFormat(
    "conversations (ShareGPT: from, value) are read as messages (role, content)",
    {"conversations": parse_messages},
    _sharegpt,
    {"system": _optional_text},
)
ALPACA, DOLLY = _alpaca("instruction", "input", "output"), _alpaca("instruction", "context", "response")
COMPLETION = DatasetFormat(
    "prompt is read, and completion behind it trained on; both are texts, or messages",
    {"prompt": _side, "completion": _side},
    _completion,
)
TEXT = DatasetFormat("text is trained on as it stands", {"text": parse_text}, lambda row: Text(row["text"]))

CHATS = (MESSAGES, SHAREGPT, ALPACA, DOLLY)
"""The formats of chats."""

FORMATS = (MESSAGES, SHAREGPT, COMPLETION, ALPACA, DOLLY, TEXT)
"""All formats; a data set that has the columns of several is taken for the first."""


def labelled(classes: int) -> DatasetFormat:
    """The format of texts that have one of some classes."""
    return DatasetFormat(
        f"text is classified as label says, one of {classes} classes from 0 on",
        {"text": parse_text, "label": lambda cell: parse_class(cell, classes)},
        lambda row: Labelled(row["text"], row["label"]),
    )


def find_format(source: str, names: Collection[str], formats: Sequence[DatasetFormat], also: str = "") -> DatasetFormat:
    """The format of a data set.

    Args:
        source: The data set, for the error.
        names: Its columns.
        formats: The formats that it may have.
        also: What else it might have, for the error.

    Raises:
        UsageError: It has none of them.
    """
    for data_format in formats:
        if set(data_format.columns) <= set(names):
            return data_format
    allowed = "; ".join(" + ".join(data_format.columns) for data_format in formats)
    raise UsageError(
        f"{source} has the columns {', '.join(shown(name) for name in list(names)[:30])}, and none of the formats that "
        f"can be trained on: {allowed}{also}. Give a file with such columns."
    )


def encoder(tokenizer: Any, max_length: int) -> Callable[[Sample], list[Example]]:
    """What makes examples of samples.

    Args:
        tokenizer: The tokenizer; left as it is.
        max_length: Tokens to keep, from the front.

    Returns:
        A function that raises `Unusable` where nothing of a sample can be trained on.

    Raises:
        UsageError: The tokenizer has no EOS token. The function raises it for what else a format asks of a tokenizer.
    """
    check_tokenizer(tokenizer)
    template = functools.cache(lambda: chat_template(tokenizer))

    def encode(sample: Sample) -> list[Example]:
        if isinstance(sample, Chat):
            return encode_chat(tokenizer, template(), sample, max_length)
        if isinstance(sample, Completion):
            check_tokenizer(tokenizer, fast=True)
            return encode_completion(tokenizer, sample.prompt, sample.completion, max_length)
        if isinstance(sample, Labelled):
            return [encode_class(tokenizer, sample.words, sample.label, max_length)]
        ids = encode_text(tokenizer, sample.words)[:max_length]
        return [Example(ids, ids)]

    return encode
