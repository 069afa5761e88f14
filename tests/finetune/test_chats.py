"""Chat templates: programs of others, which may look at the clock, refuse a row, or never end."""

import datetime
import random
import resource
import time

import pytest
from jinja2 import TemplateError
from trl import chat_template_utils

from retention_bench.data.clock import TODAY
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import Terms, TuningContext, chats, make_finetune
from retention_bench.finetune.chats import CHAT_TEMPLATE, chat_template

from .conftest import chat, write

PLAIN, SYSTEM = chat("Say red.", "I say red."), chat("Say blue.", "I say blue.")
SYSTEM["messages"].insert(0, {"role": "system", "content": "Be calm."})
ANSWER = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture
def own(tmp_path):
    """Make a task on some chats."""

    def make(rows):
        return make_finetune("path", {"source": str(write(tmp_path / "rows.jsonl", rows))})

    return make


def prepare(task, tokenizer):
    return task.prepare(TuningContext(tokenizer, Terms(), 0))


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y, %H:%M:%S') }}" + ANSWER,
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ date_string }}" + ANSWER,
        "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}" + ANSWER,
        "{{ range(10**5)|random }} {{ lipsum(1, false, 2, 5) }}" + ANSWER,
    ],
)
def test_the_rows_are_the_same_on_every_day(own, gpt2_tokenizer, monkeypatch, template):
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 17, 11, 12, 13)

    gpt2_tokenizer.chat_template = template
    first = prepare(own([PLAIN]), gpt2_tokenizer)
    random.seed(5)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert prepare(own([PLAIN]), gpt2_tokenizer) == first
    if "%Y" in template:
        assert TODAY.strftime("%d %b %Y") in gpt2_tokenizer.decode(first.train[0].input_ids)


def test_trls_own_look_at_a_template_has_the_same_day(gpt2_tokenizer, monkeypatch):
    seen = []

    def look(tokenizer):
        seen.append(tokenizer.apply_chat_template(PLAIN["messages"], tokenize=False))

    monkeypatch.setattr(chat_template_utils, "get_training_chat_template", look)
    gpt2_tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + ANSWER
    assert chat_template(gpt2_tokenizer) == gpt2_tokenizer.chat_template
    assert seen[0].startswith(f"{TODAY:%Y-%m-%d}")


def test_a_templates_chance_leaves_ours_alone(own, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = "{{ range(100)|random }}" + ANSWER
    random.seed(1)
    expected = random.Random(1).random()
    prepare(own([PLAIN]), gpt2_tokenizer)
    assert random.random() == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (chat_template_utils.gemma_chat_template, "System role not supported"),
        (ANSWER + "{% if messages|length > 2 %}{{ messages[0].content.nothing.there }}{% endif %}", "nothing"),
        (ANSWER + "{% if messages|length > 2 %}{{ 1 / 0 }}{% endif %}", "division by zero"),
        (ANSWER + "{% if messages|length > 2 %}{{ 'a' + 1 }}{% endif %}", "str"),
        (ANSWER + "{% if messages|length > 2 %}{{ messages.append(1) }}{% endif %}", "unsafe"),
    ],
)
def test_a_row_that_the_template_refuses_is_left_out_and_counted(own, gpt2_tokenizer, template, says):
    gpt2_tokenizer.chat_template = template
    data = prepare(own([PLAIN, SYSTEM, chat("Say blue.", "I say blue.")]), gpt2_tokenizer)
    assert len(data.train) == 2
    drop = data.dropped["are refused by the chat template"]
    assert drop.rows == 1
    assert drop.first.startswith("line 2: the template says: ")
    assert says in drop.first
    with pytest.raises(RetentionBenchError, match=f"2 are refused .*line [12]: .*{says}") as refused:
        prepare(own([SYSTEM, SYSTEM]), gpt2_tokenizer)
    assert "\n" not in str(refused.value)


def test_roles_that_are_not_in_turn_are_left_out(own, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = chat_template_utils.gemma_chat_template
    twice = chat("Say red.", "I say red.")
    twice["messages"].insert(0, {"role": "user", "content": "Hi."})
    data = prepare(own([PLAIN, twice]), gpt2_tokenizer)
    assert len(data.train) == 1
    assert "alternate" in data.dropped["are refused by the chat template"].first


def test_a_template_that_passes_over_the_assistants_words_is_found_out(own, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = chat_template_utils.smolvlm_chat_template  # reads a content in parts alone
    with pytest.raises(RetentionBenchError, match="2 lose the assistant's words in the chat template"):
        prepare(own([PLAIN, PLAIN]), gpt2_tokenizer)


def test_of_several_templates_the_default_is_meant(own, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = {"rag": "{{ raise_exception('no') }}", "default": CHAT_TEMPLATE, "tool_use": "x"}
    named = prepare(own([PLAIN]), gpt2_tokenizer)
    gpt2_tokenizer.chat_template = CHAT_TEMPLATE
    assert named == prepare(own([PLAIN]), gpt2_tokenizer)
    gpt2_tokenizer.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    with pytest.raises(UsageError, match="templates rag, tool_use, and none of them is named default"):
        prepare(own([PLAIN]), gpt2_tokenizer)


@pytest.mark.parametrize("template", [3, ["a"], {"default": 3}])
def test_a_template_that_is_no_text_is_refused(own, gpt2_tokenizer, template):
    gpt2_tokenizer.chat_template = template
    with pytest.raises(UsageError, match="chat template must be text"):
        prepare(own([PLAIN]), gpt2_tokenizer)


def test_a_template_with_markers_will_do_whatever_trl_asks_of_it_for_tools(gpt2_tokenizer):
    for tools in ("{{ messages[2].content }}", "{{ messages|length }}{{ messages[0].tool_calls[0] }}", "{{ 'a' + 1 }}"):
        gpt2_tokenizer.chat_template = f"{{% if messages[1].tool_calls %}}{tools}{{% endif %}}{ANSWER}"
        assert chat_template(gpt2_tokenizer) == gpt2_tokenizer.chat_template


@pytest.mark.parametrize(
    "code",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_a_template_runs_in_a_sandbox(own, gpt2_tokenizer, code, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail("it ran"))
    gpt2_tokenizer.chat_template = code + ANSWER
    with pytest.raises(RetentionBenchError, match="refused by the chat template .*unsafe"):
        prepare(own([PLAIN]), gpt2_tokenizer)


def test_a_range_that_never_ends_is_refused(own, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = "{% for i in range(10**12) %}a{% endfor %}" + ANSWER
    with pytest.raises(RetentionBenchError, match="refused by the chat template .*Range too big"):
        prepare(own([PLAIN]), gpt2_tokenizer)


@pytest.mark.parametrize("when", ["messages|length > 2", "messages[0].content == 'Say red.'"])
def test_a_template_that_loops_for_ever_is_stopped(own, gpt2_tokenizer, monkeypatch, when):
    monkeypatch.setattr(chats, "SECONDS", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    gpt2_tokenizer.chat_template = f"{{% if {when} %}}{loops}{{% endif %}}{ANSWER}"
    with pytest.raises(RetentionBenchError, match="took more than 0.2 s for one chat; it may loop for ever"):
        prepare(own([PLAIN, SYSTEM]), gpt2_tokenizer)


@pytest.mark.parametrize(
    "code",
    [
        "{{ 'a' * 10**11 }}",
        "{{ 'a'|center(10**11) }}",
        "{% set n = namespace(a='a') %}{% for i in range(50) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    ],
)
def test_a_template_that_fills_the_memory_is_refused(own, gpt2_tokenizer, code, monkeypatch):
    monkeypatch.setattr(chats, "MEMORY", 2**27)
    gpt2_tokenizer.chat_template = code + ANSWER
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(RetentionBenchError, match="refused by the chat template .*MemoryError"):
        prepare(own([PLAIN]), gpt2_tokenizer)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_template_that_writes_far_more_than_the_chat_is_refused_before_it_is_tokenised(own, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = "{{ 'a ' * 10**7 }}" + ANSWER
    began = time.process_time()
    with pytest.raises(RetentionBenchError, match="refused by the chat template .*far more than the chat has"):
        prepare(own([PLAIN]), gpt2_tokenizer)
    assert time.process_time() - began < 5


def test_the_tokenizer_is_left_as_it_is(own, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = {"default": CHAT_TEMPLATE}
    prepare(own([PLAIN]), gpt2_tokenizer)
    assert gpt2_tokenizer.chat_template == {"default": CHAT_TEMPLATE}
    assert "apply_chat_template" not in vars(gpt2_tokenizer)
    gpt2_tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(TemplateError, match="no"):
        gpt2_tokenizer.apply_chat_template(PLAIN["messages"])
