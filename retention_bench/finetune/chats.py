"""Chats as token ids, with the assistant's words as targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retention_bench.errors import UsageError
from retention_bench.finetune.base import Example
from retention_bench.finetune.texts import check_tokenizer

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


def parse_messages(cell: Any) -> Messages:
    """Check a cell of the column `messages`.

    Returns:
        The chat's messages with their `role` and `content` alone.

    Raises:
        ValueError: It is not a list of messages with known roles and text.
    """
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"must be a list of messages that is not empty, got {cell!r:.80}")
    messages = []
    for message in cell:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise ValueError(f"a message's content must be text, got {content!r:.80}")
        messages.append({"role": role, "content": content})
    return messages


def chat_text(messages: Messages) -> str:
    """All words of a chat, for the contamination filter."""
    return "\n".join(message["content"] for message in messages)


def chat_template(tokenizer: Any) -> str:
    """The template that chats are rendered with: the tokenizer's own, else `CHAT_TEMPLATE`.

    `CHAT_TEMPLATE` begins with BOS where the tokenizer puts one in front of plain text. Of the tokenizers' own
    templates that lack generation markers, TRL has marked variants of the well-known ones.

    Raises:
        UsageError: The tokenizer is slow, has no EOS token, or a template that does not mark the assistant's words.
    """
    check_tokenizer(tokenizer, fast=True)
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


def encode_chat(tokenizer: Any, template: str, messages: Messages, max_length: int) -> list[Example]:
    """Tokenise a chat; only the assistant's tokens are targets.

    Args:
        tokenizer: A fast tokenizer.
        template: A chat template with generation markers.
        messages: The chat.
        max_length: Tokens to keep, from the front.

    Returns:
        One example; none where no word of the assistant is left.
    """
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"][:max_length], encoded["assistant_masks"][:max_length]
    labels = [token if target else -100 for token, target in zip(ids, mask, strict=True)]
    return [Example(ids, labels)] if any(mask) else []
