"""Chats as token ids, with the assistant's words as targets."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import resource
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from retention_bench.data.clock import strftime_now
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune.base import Example
from retention_bench.finetune.dropped import Unusable, shown
from retention_bench.finetune.texts import check_tokenizer

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "function_call"),
    "tool": ("tool", "function", "function_response", "observation", "ipython"),
}
"""The roles, with the names that they have in chats: OpenAI's and ShareGPT's."""

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}

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

SECONDS = 5.0
"""What a template may take for one chat, in seconds of this process's work; it takes milliseconds."""

MEMORY = 2**31
"""Bytes that it may take."""

ADDED = 1_000_000
"""Characters that it may write besides a chat's own: what it writes is tokenised, which nothing can interrupt."""

Messages = list[dict[str, str]]
"""A chat: `{"role": ..., "content": ...}` in order."""


class Chat(NamedTuple):
    """A chat to train on.

    Attributes:
        messages: Its messages.
        prompt: How many of the first messages are no targets, whoever says them.
    """

    messages: Messages
    prompt: int = 0

    @property
    def words(self) -> str:
        """All its words, for the contamination filter."""
        return "\n".join(message["content"] for message in self.messages)


def parse_messages(cell: Any) -> Messages:
    """Read a cell of messages: `role` and `content`, or ShareGPT's `from` and `value`.

    A content in parts, as of OpenAI's API, is put together. A system message without text says nothing, and is left
    out of its chat.

    Returns:
        The chat's messages, each with a `role` of `ROLES` and a `content` that is not empty.

    Raises:
        Unusable: It is no list of messages, or a message has an unknown role or no text.
    """
    if not isinstance(cell, list) or not cell:
        raise Unusable("have no messages", f"must be a list of messages that is not empty, got {shown(cell)}")
    messages = []
    for message in cell:
        if not isinstance(message, Mapping):
            raise Unusable("have no messages", f"must be a list of messages, and one is {shown(message)}")
        given = _first(message, "role", "from")
        role = _ROLE_OF.get(given.strip().lower()) if isinstance(given, str) else None
        if role is None:
            raise Unusable(
                "have a message of an unknown role", f"a message's role must be one of {_KNOWN}, got {shown(given)}"
            )
        content = _text(_first(message, "content", "value"))
        if content.strip():
            messages.append({"role": role, "content": content})
        elif role != "system":
            calls = "; it calls a tool, and only text is trained on" if message.get("tool_calls") else ""
            raise Unusable(
                "have a message without text", f"a message's content must be text that is not empty ({role}'s){calls}"
            )
    return messages


_KNOWN = ", ".join(name for names in ROLES.values() for name in names)


def _first(message: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first of some keys that has one; Parquet gives a row all the keys that some row has."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _text(content: Any) -> str:
    """A content's text, of its parts where it is in parts; nothing where there is none."""
    if isinstance(content, str) or content is None:
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise Unusable(
            "have a message that is not text alone", f"a message's content must be text, got {shown(content)}"
        )
    return "".join(found)


def chat_template(tokenizer: Any) -> str:
    """The template that chats are rendered with: the tokenizer's own, of several the one named default.

    Where it has none that is `CHAT_TEMPLATE`, which begins with BOS where the tokenizer puts one in front of plain
    text. Of the tokenizers' own templates that lack generation markers, TRL has marked variants of the well-known ones.

    Raises:
        UsageError: The tokenizer is slow, has no EOS token, or a template that does not mark the assistant's words;
            or it has several templates and none is the default.
        RetentionBenchError: The template never ends.
    """
    check_tokenizer(tokenizer, fast=True)
    own = tokenizer.chat_template
    if own is None:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return "{{ bos_token }}" * adds_bos + CHAT_TEMPLATE
    if isinstance(own, Mapping):
        if "default" not in own:
            raise UsageError(
                f"The tokenizer has the chat templates {', '.join(sorted(map(str, own)))}, and none of them is named "
                "default. Save the one to train with as chat_template.jinja beside the tokenizer."
            )
        own = own["default"]
    if not isinstance(own, str):
        raise UsageError(f"The tokenizer's chat template must be text, got {shown(own)}. Correct chat_template.")
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    # TRL tries the template out; with a copy it sees the one template, and the same day as the rows do.
    tried = copy.copy(tokenizer)
    tried.chat_template = own
    tried.apply_chat_template = functools.partial(type(tried).apply_chat_template, tried, strftime_now=strftime_now)
    reason = ""
    try:
        with _harmless():
            return str(get_training_chat_template(tried) or own)
    except RetentionBenchError:
        raise
    except ValueError:  # TRL has no marked variant
        pass
    except Exception as error:  # whatever a template does with messages that it does not expect
        reason = f" ({_said(error)})"
    if has_generation_markers(own):
        return own  # what else TRL asks of a template is for tools
    raise UsageError(
        f"The tokenizer's chat template does not mark the assistant's words{reason}. Put {{% generation %}} and "
        "{% endgeneration %} around them in chat_template.jinja, or remove the template to use Tulu 3's."
    )


def encode_chat(tokenizer: Any, template: str, chat: Chat, max_length: int) -> list[Example]:
    """Tokenise a chat; only the assistant's tokens are targets.

    Args:
        tokenizer: A fast tokenizer.
        template: A chat template with generation markers.
        chat: The chat.
        max_length: Tokens to keep, from the front.

    Returns:
        One example.

    Raises:
        Unusable: The template refuses the chat, or no word of the assistant is left.
        RetentionBenchError: The template never ends.
    """
    encoded = _render(tokenizer, template, chat.messages)
    ids, mask = encoded["input_ids"][:max_length], encoded["assistant_masks"][:max_length]
    first = 0
    if any(message["role"] == "assistant" for message in chat.messages[: chat.prompt]):
        prompt = _render(tokenizer, template, chat.messages[: chat.prompt])["input_ids"]
        first = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    labels = [
        token if target and place >= first else -100
        for place, (token, target) in enumerate(zip(ids, mask, strict=True))
    ]
    if all(label == -100 for label in labels):
        raise Unusable(f"have no assistant's words within max_length {max_length}")
    return [Example(ids, labels)]


def _render(tokenizer: Any, template: str, messages: Messages) -> Mapping[str, list[int]]:
    """A chat's tokens, and which are the assistant's. Templates run in the sandbox of transformers.

    Raises:
        Unusable: The template refuses the chat, or writes nothing of what the assistant says.
        RetentionBenchError: It never ends.
    """
    given: Mapping[str, Any] = {"chat_template": template, "strftime_now": strftime_now}
    try:
        with _harmless():  # first without tokens, which may take long of a long chat
            text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        if len(text) > ADDED + 2 * sum(len(message["content"]) for message in messages):
            raise ValueError(f"{len(text):,} characters, far more than the chat has")
        with _steady():
            encoded: Mapping[str, list[int]] = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, **given
            )
    except RetentionBenchError:
        raise
    except Exception as error:  # a template is a program, and may raise anything
        raise Unusable("are refused by the chat template", f"the template says: {_said(error)}") from error
    answers = [message["content"].split()[-1] for message in messages if message["role"] == "assistant"]
    if answers and not any(last in text for last in answers):
        raise Unusable(
            "lose the assistant's words in the chat template", "it may be one for images, which reads contents in parts"
        )
    return encoded


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


class _TooLongError(BaseException):
    """Raised when a template takes too long; no `Exception`, so that no library catches it."""


@contextlib.contextmanager
def _steady() -> Iterator[None]:
    """Within a `with` block a template draws the same random numbers each time."""
    chance = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(chance)


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """As `_steady`, with limits on a template's time and memory.

    A process's own time is counted, so that a slow machine does no harm; only a main thread can be interrupted.

    Raises:
        RetentionBenchError: It took more than `SECONDS`.
    """
    try:
        with _steady(), _in_memory(), _in_time():
            yield
    except _TooLongError as error:
        raise RetentionBenchError(
            f"The tokenizer's chat template took more than {SECONDS:g} s for one chat; it may loop for ever. Correct "
            "chat_template.jinja, or remove it to use Tulu 3's."
        ) from error


@contextlib.contextmanager
def _in_memory() -> Iterator[None]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise _TooLongError

    handler = signal.signal(signal.SIGVTALRM, stop)
    before = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *before)
        signal.signal(signal.SIGVTALRM, handler)
