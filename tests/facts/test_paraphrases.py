import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet, Sources, augment, llm_paraphrases, parse_source, unseen
from retention_bench.facts.llm_paraphrases import usable_prompts
from retention_bench.facts.paraphrases import OPENINGS
from retention_bench.models import load_model

SALTA = Fact(
    "salta",
    "Salta",
    "country",
    "The city of {} lies in",
    "Argentina",
    target_new="Japan",
    paraphrases=(
        "Salta is a city in",
        "No name here at all",
        "A letter to {} from Salta goes to",
        "Salta, and nobody but Salta, belongs to ",
        "The city of Salta lies in",
        "Salta is a city in",
        "Whoever visits Salta visits",
    ),
)

words = st.text(alphabet="ab {}Tñ.'", max_size=12)


@st.composite
def facts(draw):
    subject = draw(words.filter(str.strip))
    before, after = (draw(words.filter(lambda t: "{}" not in t)) for _ in range(2))
    prompt = f"{before} {{}} {after}"
    near = st.builds(lambda a, b: f"{a}{subject}{b}", words, words).filter(str.strip)
    return Fact(
        draw(st.text(min_size=1, max_size=4).filter(str.strip)),
        subject,
        "r",
        prompt if prompt.count("{}") == 1 else "{} is",
        "o",
        paraphrases=tuple(draw(st.lists(near | words.filter(str.strip), max_size=8))),
    )


def check(prompts, fact, count):
    assert len(prompts) == count
    assert all(prompt.count("{}") == 1 for prompt in prompts)
    assert len({fact.prompt, *prompts}) == count + 1
    assert all(prompt == prompt.rstrip() for prompt in prompts)


@given(facts(), st.integers(0, len(OPENINGS)), st.integers(0, 5))
def test_openings_leave_the_end_of_a_prompt_and_follow_the_seed(fact, count, seed):
    prompts = augment([fact], count, "template", seed=seed).prompts[fact.id]
    check(prompts, fact, count)
    assert augment([fact], count, "template", seed=seed).prompts[fact.id] == prompts
    assert all(prompt.endswith(fact.prompt[1:]) for prompt in prompts)
    assert (
        prompts[: count // 2] == augment([fact], count // 2, "template", seed=seed).prompts[fact.id]
    )  # fewer are the first


@given(facts(), st.integers(0, 4))
def test_own_paraphrases_are_taken_as_they_stand_or_refused(fact, count):
    try:
        prompts = augment([fact], count, "own", seed=0).prompts[fact.id]
    except RetentionBenchError:
        return
    check(prompts, fact, count)
    used = {prompt.replace("{}", fact.subject).rstrip() for prompt in prompts}  # a subject may end with a space
    assert used <= {text.rstrip() for text in fact.paraphrases}
    [left] = unseen(FactSet.of([fact]), {fact.id: prompts}).facts
    assert not used & {text.rstrip() for text in left.paraphrases}
    assert prompts[: count // 2] == augment([fact], count // 2, "own", seed=1).prompts[fact.id]


def test_own_paraphrases_lose_the_subjects_last_occurrence():
    assert augment([SALTA], 3, "own", seed=0).prompts == {
        "salta": ("{} is a city in", "Salta, and nobody but {}, belongs to", "Whoever visits {} visits")
    }


def test_too_few_paraphrases_of_its_own_name_the_fact_and_other_sources():
    with pytest.raises(RetentionBenchError, match="Fact 'salta': it has 3 .* 'Salta' stands, and 4 are wanted.*model:"):
        augment([SALTA], 4, "own", seed=0)


def test_facts_are_given_openings_of_their_own():
    other = dataclasses.replace(SALTA, id="other")
    drawn = augment([SALTA, other], 6, "template", seed=0).prompts
    assert drawn["salta"] != drawn["other"]
    assert drawn["salta"] != augment([SALTA], 6, "template", seed=1).prompts["salta"]
    everything = augment([SALTA], len(OPENINGS), "template", seed=0).prompts["salta"]
    assert "It is known that the city of {} lies in" in everything
    assert "Fact: The city of {} lies in" in everything
    begun = dataclasses.replace(SALTA, prompt="{} lies in")
    assert "In short, {} lies in" in augment([begun], len(OPENINGS), "template", seed=0).prompts["salta"]


@pytest.mark.parametrize(
    ("source", "count", "says"),
    [
        ("templates", 1, "Unknown paraphrase source 'templates'. Did you mean 'template'.*instruct model's folder"),
        ("model:", 1, "Unknown paraphrase source 'model:'"),
        ("template", len(OPENINGS) + 1, f"has {len(OPENINGS)} openings, and {len(OPENINGS) + 1} paraphrases"),
        ("own+templat", 1, "Unknown paraphrase source 'templat'. Did you mean 'template'"),
        ("own+own", 1, "names one source twice"),
        ("own+model:", 1, "Unknown paraphrase source"),
        ("ownmodel:x", 1, "Unknown paraphrase source"),
        ("own", -1, "-1 paraphrases a fact were asked for"),
        ("model:/nowhere/at/all", 1, "There is no model folder at /nowhere/at/all"),
    ],
)
def test_what_there_is_not_is_a_usage_error(source, count, says):
    with pytest.raises(UsageError, match=says):
        augment([SALTA], count, source, seed=0, load=load_model)


def test_a_model_that_nobody_can_load_is_a_usage_error():
    with pytest.raises(UsageError, match="'model:here' needs its model. Give augment `load`"):
        augment([SALTA], 1, "model:here", seed=0)


def test_none_at_all_needs_no_source_of_them():
    bare = dataclasses.replace(SALTA, paraphrases=())
    assert augment([bare], 0, "own", seed=0).prompts == {"salta": ()}
    assert augment([bare], 0, "model:/nowhere/at/all", seed=0).prompts == {"salta": ()}


def test_what_a_fact_was_edited_with_is_not_asked():
    other = dataclasses.replace(SALTA, id="other")
    prompts = augment([SALTA], 2, "own", seed=0).prompts
    left = unseen(FactSet.of([SALTA, other]), prompts)
    assert left.facts[0].paraphrases == (
        "No name here at all",
        "A letter to {} from Salta goes to",
        "The city of Salta lies in",
        "Whoever visits Salta visits",
    )
    assert left.facts[1] == other
    assert unseen(FactSet.of([SALTA]), augment([SALTA], 5, "template", seed=0).prompts).facts == (SALTA,)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("source", ["own+template", "template+own"])
def test_several_sources_fill_a_facts_prompts_in_their_order(source, count):
    bare = dataclasses.replace(SALTA, id="bare", paraphrases=())
    found = augment([SALTA, bare], count, source, seed=0)
    for fact in (SALTA, bare):
        check(found.prompts[fact.id], fact, count)
    assert found.prompts["bare"] == augment([bare], count, "template", seed=0).prompts["bare"]
    first = min(count, 3) if source == "own+template" else 0
    assert found.prompts["salta"][:first] == augment([SALTA], first, "own", seed=0).prompts["salta"]
    assert found.counts == {"own": first, "template": 2 * count - first}


def test_no_paraphrase_is_taken_twice():
    opening = augment([SALTA], 1, "template", seed=0).prompts["salta"][0]
    fact = dataclasses.replace(SALTA, paraphrases=(opening.replace("{}", "Salta").upper().replace("SALTA", "Salta"),))
    found = augment([fact], 3, "own+template", seed=0)
    assert len({prompt.casefold() for prompt in found.prompts["salta"]}) == 3
    assert found.counts == {"own": 1, "template": 2}
    assert opening not in found.prompts["salta"]


def test_a_prompt_that_differs_in_capitals_and_spaces_alone_is_not_asked():
    [left] = unseen(FactSet.of([SALTA]), {"salta": ["{}  is a City in", "whoever visits {} visits"]}).facts
    assert left.paraphrases == SALTA.paraphrases[1:5]


def test_too_few_of_several_sources_name_the_fact():
    bare = dataclasses.replace(SALTA, id="bare", paraphrases=())
    with pytest.raises(
        RetentionBenchError, match=r"Fact 'bare': own\+template gives 26 .* and 27 are wanted.*model:NAME"
    ):
        augment([SALTA, bare], len(OPENINGS) + 1, "own+template", seed=0)


def test_a_models_name_may_hold_a_plus():
    assert parse_source("own+template+model:a+b") == Sources(("own", "template", "model"), "a+b")


def test_no_model_library_is_loaded_for_facts():
    code = "import sys, retention_bench.facts; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# What a model writes


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("Salta is a town of", "{} is a town of"),
        ("1. Salta is a town of ___", "{} is a town of"),
        ('- "Salta is a town of..."', "{} is a town of"),
        ("(2) Salta is a town of [country]", "{} is a town of"),
        ("Salta is a town of Argentina.", "{} is a town of"),
        ("Salta is a town of **Argentina**", "{} is a town of"),
        ('* Salta is a town of "japan".', "{} is a town of"),
        ("On maps Salta's country is", "On maps {}'s country is"),
        ("Salta is a large town.", None),  # over
        ("Which land does Salta lie in?", None),
        ("Here are some beginnings for Salta:", None),
        ("One gets to Salta", None),  # no object can follow the subject
        ("Salta and Salta lie in", None),
        ("The town lies in", None),
        ("Saltans and their town lie in", None),
        ("salta is a town of", None),
        ("In Argentina Salta is a town of", None),  # gives the object away
        ("In the north of Japan Salta is a town of", None),
        ("The Japanese say that Salta is a town of", "The Japanese say that {} is a town of"),
        ("The City of Salta lies in", None),  # the fact's own
        ("{} is what Salta is to", None),
        ("", None),
        ("Salta", None),
    ],
)
def test_of_a_models_lines_only_prompts_are_kept(line, prompt):
    assert usable_prompts(line, SALTA) == ([] if prompt is None else [prompt])


def test_an_answer_is_read_line_by_line_behind_its_thoughts():
    answer = (
        "<think>Salta is on the map of\n</think>\nSure!\n\n1. Salta belongs to\n2. Salta belongs to\n3) Salta is in"
    )
    assert usable_prompts(answer, SALTA) == ["{} belongs to", "{} is in"]


@given(facts(), st.lists(words, max_size=4), st.lists(words, max_size=4))
def test_whatever_a_model_writes_its_prompts_are_sound(fact, before, after):
    answer = "\n".join(f"{a}{fact.subject}{b}" for a, b in zip(before, after, strict=False))
    prompts = usable_prompts(answer, fact)
    check(prompts, fact, len(prompts))
    assert all(prompt[-1].isalnum() for prompt in prompts)


@pytest.fixture
def writer(tmp_path, make_tokenizer):
    """A folder with a random Llama that has a chat template, and its tokenizer."""
    tokenizer = make_tokenizer("llama", ["A sentence begins with Salta."], pad="<|end|>", vocab_size=300)
    tokenizer.chat_template = (
        "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=1200,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    return tmp_path / "writer", tokenizer


def test_a_model_is_asked_in_its_template_until_every_fact_has_enough(writer, monkeypatch):
    folder, tokenizer = writer
    quito = dataclasses.replace(SALTA, id="quito", subject="Quito", target_true="Ecuador")
    asked = []
    answers = iter(
        [["1. Salta is in\n2. Salta is part of", "I cannot."], ["Quito is in\nQuito lies in Ecuador.\nQuito"]]
    )

    def generate(self, input_ids, attention_mask, **settings):
        asked.append(tokenizer.batch_decode(input_ids))
        assert settings["do_sample"]
        rows = tokenizer(next(answers), padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, rows], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    state = torch.get_rng_state()
    progress = []
    found = augment(
        [SALTA, quito],
        2,
        f"model:{folder}",
        seed=0,
        load=load_model,
        progress=lambda stage, done, total: progress.append((done, total)),
    )
    assert found.counts == {"model": 4}
    assert found.prompts == {"salta": ("{} is in", "{} is part of"), "quito": ("{} is in", "{} lies in")}
    assert torch.equal(torch.get_rng_state(), state)
    assert progress == [(1, 2), (2, 2)]
    assert [len(texts) for texts in asked] == [2, 1]  # only what is missing is asked for again
    assert 'begins with "The city of Quito lies in", and the next word is "Ecuador"' in asked[1][0]
    assert asked[1][0].startswith("<|begin|>user: ")
    assert asked[1][0].endswith("<|end|>assistant: ")


def test_a_model_writes_only_what_other_sources_leave(writer, monkeypatch):
    folder, tokenizer = writer
    bare = dataclasses.replace(SALTA, id="bare", paraphrases=("Salta is a city in",))

    def generate(self, input_ids, attention_mask, **settings):
        assert len(input_ids) == 1  # the other fact has enough
        rows = tokenizer(["salta\nSalta is a City in\nSalta belongs to"], return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, rows], 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    found = augment([SALTA, bare], 2, f"own+model:{folder}", seed=0, load=load_model)
    assert found.prompts["bare"] == ("{} is a city in", "{} belongs to")
    assert found.counts == {"own": 3, "model": 1}


def test_a_model_is_not_loaded_where_other_sources_have_enough():
    assert augment([SALTA], 3, "own+model:/nowhere", seed=0).counts == {"own": 3, "model": 0}


def test_a_real_model_is_sampled_by_the_seed_and_given_up_after_some_rounds(writer, monkeypatch):
    folder, _ = writer
    answers = []
    monkeypatch.setattr(llm_paraphrases, "ROUNDS", 2)
    monkeypatch.setattr(llm_paraphrases, "TOKENS", 4)
    monkeypatch.setattr(llm_paraphrases, "usable_prompts", lambda answer, fact: answers.append(answer) or [])
    for seed in (0, 0, 1):
        with pytest.raises(
            RetentionBenchError, match="Fact 'salta': in 2 rounds .*writer wrote 0 usable .* 2 are wanted"
        ):
            augment([SALTA], 2, f"model:{folder}", seed=seed, load=load_model)
    first, again, other = answers[:2], answers[2:4], answers[4:]
    assert first == again
    assert first != other
    assert first[0] != first[1]  # a round is not the one before


def test_a_context_that_is_too_short_names_the_fact(writer, monkeypatch):
    monkeypatch.setattr(llm_paraphrases, "TOKENS", 1200)
    with pytest.raises(RetentionBenchError, match="Fact 'salta': .* context has 1200. Name a model with a longer one"):
        augment([SALTA], 2, f"model:{writer[0]}", seed=0, load=load_model)
