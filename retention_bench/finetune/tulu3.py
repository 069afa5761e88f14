"""Instruction tuning on chats in the form of the Tulu-3 SFT mixture (`allenai/tulu-3-sft-mixture`)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

import pydantic

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune.base import Example, Metric, TuningContext, TuningData
from retention_bench.finetune.contamination import ContaminationFilter
from retention_bench.finetune.rows import open_rows
from retention_bench.finetune.settings import Count, Settings, check_sampled_validation

ROLES = ("system", "user", "assistant")

# The chat format of Tulu 3, with its role markers as plain text, for tokenizers without a template of their own. The
# loss counts what stands between the generation markers: the assistant's words and the EOS that ends its turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)

Messages = list[dict[str, str]]
"""A chat: `{"role": ..., "content": ...}` in order."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class Tulu3(Settings):
    """Chat SFT; the loss is on the assistant's turns alone, as in open-instruct, Tulu 3's own training code.

    The validation rows are sampled from the training rows and stay among them, as in the paper ("10,000 / 1,000 (from
    train)"): the stop rule says how well the model has learned its task, not how well it generalises.

    Attributes:
        source: A `.jsonl`, `.jsonl.gz` or `.parquet` file or a Hub data set id, with a column `messages`.
    """

    name: ClassVar[str] = "tulu3"
    metric: ClassVar[Metric] = "validation_loss"
    classes: ClassVar[int | None] = None
    asks_base: ClassVar[bool] = False

    batch_size: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampled_validation(self)

    def prepare(self, context: TuningContext) -> TuningData:
        """Sample, filter and tokenise the chats.

        Raises:
            UsageError: The source does not exist, or the tokenizer cannot be used.
            RetentionBenchError: A row is malformed, or fewer than `train_size` rows are left after filtering.
        """
        tokenizer = context.tokenizer
        template = chat_template(tokenizer)
        rows = open_rows(self.source, self.revision, "messages", parse_messages)
        rng = random.Random(context.seed)
        contamination = ContaminationFilter(context.terms)
        train: list[Example] = []
        untaught = 0
        for index in rng.sample(range(len(rows)), len(rows)):
            messages = rows[index]
            if not contamination.passes("\n".join(message["content"] for message in messages)):
                continue
            example = encode(tokenizer, template, messages, self.max_length)
            if all(label == -100 for label in example.labels):
                untaught += 1
                continue
            train.append(example)
            if len(train) == self.train_size:
                break
        removed = contamination.report()
        if len(train) < self.train_size:
            raise RetentionBenchError(
                f"{self.source} holds {len(rows)} rows; {removed.removed} of them mention an edited or intrinsic fact "
                f"and {untaught} have no assistant's words within max_length {self.max_length}. That leaves "
                f"{len(train)}, and train_size is {self.train_size}. Lower train_size, or give more rows."
            )
        return TuningData(train, rng.sample(train, self.validation_size), removed)


def parse_messages(cell: Any) -> Messages:
    """Check a cell of the column `messages`.

    Returns:
        The chat's messages with their `role` and `content` alone.

    Raises:
        ValueError: It is not a list of messages with known roles and text.
    """
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"`messages` must be a list of messages that is not empty, got {cell!r:.80}")
    messages = []
    for message in cell:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise ValueError(f"a message's content must be text, got {content!r:.80}")
        messages.append({"role": role, "content": content})
    return messages


def chat_template(tokenizer: Any) -> str:
    """The template that chats are rendered with: the tokenizer's own, else `CHAT_TEMPLATE`.

    `CHAT_TEMPLATE` begins with BOS where the tokenizer puts one in front of plain text. Of the tokenizers' own
    templates that lack generation markers, TRL has marked variants of the well-known ones.

    Raises:
        UsageError: The tokenizer is slow, has no EOS token, or a template that does not mark the assistant's words.
    """
    if not tokenizer.is_fast:
        raise UsageError("Chat fine-tuning needs a fast tokenizer (tokenizer.json); the model comes with a slow one.")
    if tokenizer.eos_token is None:
        raise UsageError("The tokenizer has no EOS token, which ends a turn of a chat. Set `eos_token` in its config.")
    if tokenizer.chat_template is None:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        return "{{ bos_token }}" * adds_bos + CHAT_TEMPLATE
    from trl import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError as error:
        raise UsageError(
            "The tokenizer's chat template does not mark the assistant's words. Put {% generation %} and "
            "{% endgeneration %} around them in chat_template.jinja, or remove the template to use Tulu 3's."
        ) from error


def encode(tokenizer: Any, template: str, messages: Messages, max_length: int) -> Example:
    """Tokenise a chat; only the assistant's tokens are targets.

    Args:
        tokenizer: A fast tokenizer.
        template: A chat template with generation markers.
        messages: The chat.
        max_length: Tokens to keep, from the front.
    """
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"][:max_length], encoded["assistant_masks"][:max_length]
    return Example(ids, [token if target else -100 for token, target in zip(ids, mask, strict=True)])
