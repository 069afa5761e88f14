import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import Terms, TuningContext
from retention_bench.finetune.chats import CHAT_TEMPLATE, Chat, chat_template, encode_chat

from .conftest import chat, write


def decoded(tokenizer, row):
    """What the model reads, and what of it counts in the loss."""
    return tokenizer.decode(row.input_ids), tokenizer.decode([label for label in row.labels if label != -100])


def encoded(tokenizer, row, max_length=100):
    (example,) = encode_chat(tokenizer, chat_template(tokenizer), Chat(row["messages"]), max_length)
    return example


def test_only_the_assistants_turns_and_their_eos_carry_loss(gpt2_tokenizer):
    row = chat("Say red.", "I say red.", "Say blue.", "I say blue.")
    row["messages"].insert(0, {"role": "system", "content": "Be calm."})
    assert decoded(gpt2_tokenizer, encoded(gpt2_tokenizer, row)) == (
        "<|system|>\nBe calm.\n<|user|>\nSay red.\n<|assistant|>\nI say red.<|endoftext|>\n"
        "<|user|>\nSay blue.\n<|assistant|>\nI say blue.<|endoftext|>",
        "I say red.<|endoftext|>I say blue.<|endoftext|>",
    )


def test_a_label_is_the_token_at_its_own_place(gpt2_tokenizer):
    row = encoded(gpt2_tokenizer, chat("Say red.", "I say red."))
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_a_row_begins_with_bos_where_the_tokenizer_adds_one(llama_tokenizer, gpt2_tokenizer):
    row = encoded(llama_tokenizer, chat("Say red.", "I say red."))
    assert row.input_ids.count(llama_tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == llama_tokenizer.bos_token_id
    assert decoded(llama_tokenizer, row)[1] == "I say red.<|end|>"
    assert encoded(gpt2_tokenizer, chat("Say red.", "I say red.")).input_ids[0] != gpt2_tokenizer.bos_token_id


def test_a_long_row_is_cut_at_its_end(gpt2_tokenizer):
    row = chat("Say red.", "I say red.")
    whole = encoded(gpt2_tokenizer, row)
    cut = encoded(gpt2_tokenizer, row, max_length=len(whole.input_ids) - 2)
    assert cut.input_ids == whole.input_ids[:-2]
    assert cut.labels == whole.labels[:-2]


def test_the_tokenizers_own_template_is_used(gpt2_tokenizer):
    gpt2_tokenizer.chat_template = CHAT_TEMPLATE.replace("<|", "[").replace("|>", "]")
    text, target = decoded(gpt2_tokenizer, encoded(gpt2_tokenizer, chat("Say red.", "I say red.")))
    assert text.startswith("[user]\n")
    assert target == "I say red.<|endoftext|>"


def test_a_template_that_does_not_mark_the_assistant_is_refused(gpt2_tokenizer):
    gpt2_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(UsageError, match="generation"):
        chat_template(gpt2_tokenizer)


def test_a_tokenizer_without_eos_is_refused(task, gpt2_tokenizer):
    gpt2_tokenizer.eos_token = None
    with pytest.raises(UsageError, match="EOS"):
        task().prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_the_validation_rows_are_training_rows(task, gpt2_tokenizer):
    data = task(train_size=20, validation_size=7).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    assert (len(data.train), len(data.validation)) == (20, 7)
    assert all(row in data.train for row in data.validation)


def test_the_seed_decides_which_rows_are_drawn(task, gpt2_tokenizer):
    once, again, other = (task().prepare(TuningContext(gpt2_tokenizer, Terms(), seed)) for seed in (0, 0, 1))
    assert once == again
    assert once.train != other.train


def test_preparing_leaves_the_tokenizer_as_it_is(task, gpt2_tokenizer):
    task().prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    assert gpt2_tokenizer.chat_template is None
    assert gpt2_tokenizer.pad_token is None


def test_rows_that_mention_a_fact_are_not_trained_on(task, chats, gpt2_tokenizer):
    mentioning = sum("green" in str(row) for row in chats)
    assert mentioning
    clean = len(chats) - mentioning
    data = task(train_size=clean, validation_size=clean).prepare(
        TuningContext(gpt2_tokenizer, Terms(subjects=("green",)), 0)
    )
    assert not any("green" in gpt2_tokenizer.decode(row.input_ids) for row in (*data.train, *data.validation))
    assert len(data.train) == clean
    assert data.removed.removed <= mentioning
    with pytest.raises(RetentionBenchError, match=f"64 rows; {mentioning} of them mention .* leaves {clean}"):
        task(train_size=clean + 1).prepare(TuningContext(gpt2_tokenizer, Terms(subjects=("green",)), 0))


def test_a_mention_in_any_turn_counts(task, tmp_path, gpt2_tokenizer):
    rows = [chat("Say red.", "I say Lyon."), chat("Say Lyon.", "No."), chat("Hi.", "Ho.")]
    settings = {"source": str(write(tmp_path / "rows.jsonl", rows)), "validation_size": 1}
    data = task(train_size=1, **settings).prepare(TuningContext(gpt2_tokenizer, Terms(("Lyon",)), 0))
    assert decoded(gpt2_tokenizer, data.train[0])[1] == "Ho.<|endoftext|>"
    with pytest.raises(RetentionBenchError, match="2 of them mention"):
        task(train_size=2, **settings).prepare(TuningContext(gpt2_tokenizer, Terms(("Lyon",)), 0))


def test_rows_without_an_assistants_word_are_left_out(task, tmp_path, gpt2_tokenizer):
    source = write(tmp_path / "rows.jsonl", [chat("Say red."), chat("red " * 50, "I say."), chat("Say.", "I say.")])
    settings = {"source": str(source), "validation_size": 1, "max_length": 48}
    data = task(train_size=1, **settings).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    assert decoded(gpt2_tokenizer, data.train[0])[1] == "I say.<|endoftext|>"
    with pytest.raises(RetentionBenchError, match="2 have no assistant's words within max_length 48"):
        task(train_size=2, **settings).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_a_malformed_chat_is_left_out_and_named_by_file_and_line(task, tmp_path, gpt2_tokenizer):
    bad = {"messages": [{"role": "robot", "content": "hi"}]}
    source = write(tmp_path / "rows.jsonl.gz", [chat("Hi.", "Ho."), bad])
    context = TuningContext(gpt2_tokenizer, Terms(), 0)
    assert len(task(source=str(source), train_size=1, validation_size=1).prepare(context).train) == 1
    with pytest.raises(RetentionBenchError, match=r"2 rows; .* 1 have a message of an unknown role .line 2: .*'robot'"):
        task(source=str(source), train_size=2, validation_size=1).prepare(context)
