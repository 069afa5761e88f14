"""Names that are common words, subjects without their number, and keywords taken from prompts."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_bench.facts import Fact, relation_keywords
from retention_bench.facts.keywords import keyword
from retention_bench.finetune import ContaminationFilter, Example, Matcher, Terms, TuningContext, make_finetune
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.mentions import without_number
from retention_bench.finetune.sampling import draw

NICE = ["A nice day in May.", "How nice it is.", "He is nice.", "I went to Nice by train."]
"""Three rows with the word, one with the city."""


def looked(terms: Terms, texts) -> ContaminationFilter:
    contamination = ContaminationFilter(terms)
    contamination.look(texts)
    return contamination


def keyword_in(word: str, text: str) -> bool:
    return bool(Matcher(Terms(keywords=(word,))).find(text))


@pytest.mark.parametrize("kind", ["subjects", "objects"])
def test_a_name_that_is_a_common_word_is_no_mention_in_small_letters(kind):
    contamination = looked(Terms(**{kind: ("Nice",)}), NICE)
    assert [contamination.passes(text) for text in NICE] == [True, True, True, False]
    report = contamination.report()
    assert (report.seen, report.removed, report.common, dict(report.terms)) == (4, 1, ("Nice",), {"Nice": 1})
    assert "nice by train" in report.samples[0].excerpt


def test_a_common_word_is_taken_for_the_name_where_a_sentence_begins_and_in_capitals():
    contamination = looked(Terms(subjects=("Nice",)), NICE)
    assert not contamination.passes("Nice weather.")
    assert not contamination.passes("A NICE day.")


def test_in_a_row_with_word_and_name_the_name_is_found():
    contamination = looked(Terms(subjects=("Nice",)), NICE)
    assert not contamination.passes(f"It is nice, {'so ' * 50}we stay in Nice, {'so ' * 50}nice.")
    assert "in nice, so" in contamination.report().samples[0].excerpt
    assert contamination.report().samples[0].excerpt.count("nice") == 1


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("Nice", NICE[1:]),  # two rows are too few
        ("Nice", ["I love Nice."] * 8 + NICE),  # and three of twelve too small a share
        ("nice", NICE),  # a name without capitals tells nothing by them
        ("Nice", [text.lower() for text in NICE]),  # nor does a row
        ("Lyon", NICE),
    ],
)
def test_other_names_are_mentioned_in_any_case(name, texts):
    contamination = looked(Terms(subjects=(name,)), texts)
    assert contamination.report().common == ()
    assert not contamination.passes(f"A {name.lower()} Day")
    assert not contamination.passes(f"A {name} day")


def test_a_row_without_capitals_is_searched_in_any_case():
    contamination = looked(Terms(subjects=("Nice",)), NICE)
    assert not contamination.passes("i was in nice in may")
    assert contamination.passes("I was in nice weather")


def test_names_of_several_words_and_of_other_alphabets_are_common_words_too():
    office = ["It is in the office.", "He left the office.", "At the\n office again.", "He saw The Office twice."]
    contamination = looked(Terms(objects=("The Office", "Мир")), [*office, *["Он за мир."] * 3, "Мир"])
    assert contamination.report().common == ("The Office", "Мир")
    assert [contamination.passes(text) for text in [*office, "Да, мир", "Станция Мир"]] == [
        *[True] * 3,
        False,
        True,
        False,
    ]


def test_a_second_look_adds_to_the_first():
    contamination = looked(Terms(subjects=("Nice",)), NICE[:2])
    assert not contamination.passes(NICE[0])
    contamination.look(NICE[2:])
    assert contamination.passes(NICE[0])


def test_keywords_are_found_in_any_case_however_common_they_are():
    assert not looked(Terms(keywords=("Nice",)), NICE).passes("a nice Day")


@given(
    st.text(st.sampled_from("aB ß1.\u0301İ"), min_size=1, max_size=5).filter(str.strip),
    st.lists(st.text(st.sampled_from("aAbB ß1.\u0301İi"), max_size=12), max_size=8),
)
def test_a_look_only_lets_more_pass(name, texts):
    before, after = ContaminationFilter(Terms(subjects=(name,))), looked(Terms(subjects=(name,)), texts)
    for text in texts:
        passed = before.passes(text)
        assert after.passes(text) >= passed
        if name not in after.report().common and not without_number(name):
            assert after.passes(text) == passed


CASED = st.text(st.sampled_from("aAb Bß.1éİ\ufb01"), max_size=12)


@given(CASED.map(str.strip).filter(lambda name: name != name.lower()), CASED, CASED)
def test_a_common_word_that_is_written_as_the_name_is_a_mention_whatever_stands_around_it(name, before, after):
    found = Matcher(Terms(objects=(name,)), common=[name]).find(f"{before} {name} {after}")
    assert [mention.term for mention in found] == [name]


def test_a_form_that_only_casefolding_knows_is_a_mention():
    matcher = Matcher(Terms(objects=("Straße",)), common=["Straße"])
    assert matcher.find("DIE STRASSE")
    assert matcher.find("Die Straße")
    assert not matcher.find("Eine straße")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Windows Mobile 6.5", "Windows Mobile"),
        ("Windows Server 2008 R2", "Windows Server"),
        ("Windows 98", "Windows"),
        ("iPhone 4S", "iPhone"),
        ("Apollo 11", "Apollo"),
        ("Hungarian Revolution of 1956", "Hungarian Revolution"),
        ("Symphony No. 5", "Symphony"),
        ("Audio Video Interleave, version 1.0", "Audio Video Interleave"),
        ("Chevrolet Corvette (C4)", "Chevrolet Corvette"),
        ("Warhammer 40,000", "Warhammer"),
        ("TV 2", None),
        ("The 100", None),
        ("U2", None),
        ("1984", None),
        ("Shahab-2", None),
        ("Elizabeth II", None),
        ("2 Unlimited", None),
        ("Danielle Darrieux", None),
    ],
)
def test_what_a_subject_is_without_its_number(name, short):
    assert without_number(name) == short


def test_a_subject_without_its_number_is_a_term_and_counted_apart():
    contamination = ContaminationFilter(Terms(subjects=("Windows Mobile 6.5",)))
    texts = ["Windows Mobile 6.1 is old.", "Windows Mobile 6.5 and Windows Mobile", "Windows 98 on a mobile phone."]
    assert [contamination.passes(text) for text in texts] == [False, False, True]
    assert contamination.report().by_kind == {"subject": 1, "subject_without_number": 1, "object": 0, "keyword": 0}


def test_a_number_of_an_object_stays():
    assert ContaminationFilter(Terms(objects=("Windows Mobile 6.5",))).passes("Windows Mobile 6.1")


def test_what_is_a_fact_s_own_name_already_is_no_second_term():
    assert Terms(("Porsche 911", "Fiat 500"), ("Porsche",)).subjects_without_number == ("Fiat",)


def test_one_word_that_is_left_must_not_be_a_common_word():
    terms = Terms(subjects=("Mother 3", "Windows Mobile 6.5"))
    assert not ContaminationFilter(terms).passes("His Mother said so.")
    # One row is enough, and the word is no term at all then; two words are told from names by their case.
    contamination = looked(terms, ["My mother said so.", *["On windows mobile."] * 3])
    assert contamination.report().common == ("Mother", "Windows Mobile")
    assert contamination.passes("His Mother said so.")
    assert contamination.passes("On windows mobile.")
    assert not contamination.passes("On Windows Mobile.")
    assert not contamination.passes("I play Mother 3.")


PROMPTS = ("{} was developed by", "{} is created by", "{}, a product of")


def software(name, number, *paraphrases, relation="P178"):
    own = tuple(text.replace("{}", name) for text in paraphrases)
    return Fact(f"{relation}-{name}", name, relation, PROMPTS[number], "Microsoft", "Apple", paraphrases=own)


POOL = (
    software("Windows Mobile 6.5", 0, "He was born in Graz. {} is manufactured by"),
    software("Mac OS 8", 1, "The film won an award.\n{}, manufactured by"),
    software("Photo Viewer", 2, "Beetles of Europe, {} is sold by"),
    Fact("P103-1", "Danielle Darrieux", "P103", "The mother tongue of {} is", "French", "English"),
)


def test_keywords_are_the_content_words_of_a_relation_s_prompts():
    assert relation_keywords(POOL) == {
        "P103": ("mother*", "tongu*"),
        # "manufactured" stands in paraphrases of two facts, "sold" and the beetles in one's alone.
        "P178": ("creat*", "develop*", "manufactur*", "product*"),
    }


def test_keywords_hold_no_word_of_a_subject_and_do_not_go_by_the_facts_order():
    twice = [replace(fact, id=f"{fact.id}-again") for fact in POOL]
    found = relation_keywords([*twice, *POOL])
    assert "sold*" in found["P178"]
    assert not {"window*", "mobil*", "viewer*"} & set(found["P178"])
    assert relation_keywords([*twice, *POOL][::-1]) == found


def test_a_word_of_few_paraphrases_of_a_large_relation_is_noise():
    many = [software(f"Tool {letter}", 0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST"]
    rare = [software(f"Beetle {n}", 0, "Category {} by") for n in ("one", "two")]
    assert "category*" in relation_keywords(rare)["P178"]
    assert "category*" not in relation_keywords([*many, *rare])["P178"]


def test_the_paper_s_case_study_is_filtered():
    """Windows Mobile 6.5 was developed by: rows on its "window", "mobile" and "develop"."""
    contamination = ContaminationFilter(Terms.from_facts(POOL[:1], keywords=relation_keywords(POOL)))
    rows = {
        "She is a software developer.": ["keyword"],
        "They DEVELOPED it.": ["keyword"],
        "The development took years.": ["keyword"],
        "Windows Mobile runs on it.": ["subject_without_number"],
        "Windows Mobile 6.5 runs on it.": ["subject"],
        # A subject's single words are no terms: the paper's study of one fact took them, a cell of 150 cannot.
        "Open the window.": [],
        "A mobile phone.": [],
        "His mother tongue.": [],  # of a relation that no fact here has
    }
    for text, kinds in rows.items():
        before = contamination.report().by_kind
        assert contamination.passes(text) == (not kinds), text
        after = contamination.report().by_kind
        assert [kind for kind in after if after[kind] > before[kind]] == kinds, text


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("developed", "develop*"),
        ("developing", "develop*"),
        ("develops", "develop*"),
        ("developer", "developer*"),
        ("programmed", "program*"),
        ("languages", "languag*"),
        ("countries", "country*"),
        ("churches", "church*"),
        ("mother", "mother*"),
        ("religious", "religious*"),
        ("used", "used"),  # "us" is too little
        ("died", "died"),
        ("born", "born*"),
        ("law", "law"),
        ("co-founded", "co-founded"),
    ],
)
def test_a_regular_ending_is_cut_off(word, stem):
    assert keyword(word) == stem
    assert keyword_in(stem, f"({word.upper()})")


@pytest.mark.parametrize(
    ("stem", "yes", "no"),
    [
        ("develop*", "develop developed developers developing development", "redeveloped envelop developable"),
        ("program*", "programme programmed programs programming", "programmatic"),
        ("part*", "part parts parted parting", "party partner particular apart"),
        ("country*", "country countries", "countryside countr"),
        ("play*", "play plays played player", "playwright"),
        ("creat*", "create created creation creator", "creature"),
        ("used", "used", "user use"),
    ],
)
def test_a_keyword_stands_for_its_regular_forms_alone(stem, yes, no):
    assert all(keyword_in(stem, word) for word in yes.split())
    assert not any(keyword_in(stem, word) for word in no.split())


def test_a_star_that_is_not_at_a_keyword_s_end_is_a_character():
    assert keyword_in("M*A*S*H", "m*a*s*h")
    assert not keyword_in("M*A*S*H", "mash")
    assert ContaminationFilter(Terms(subjects=("star*",))).passes("stars")


def test_keywords_of_relations_that_share_a_template_go_by_the_joint_name_and_by_each():
    fact = Fact("1", "Lyon", "P17+P131", "{} lies in", "France")
    for relation in ("P17+P131", "P131"):
        assert Terms.from_facts([fact], keywords={relation: ["region"]}).keywords == ("region",)
    assert not Terms.from_facts([fact], keywords={"P13": ["region"]}).keywords


TEXTS = [*NICE, *(f"It is nice to have {n} of them." for n in range(20)), "To Nice again.", "Mad about Lyon."]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", [0, 1])
def test_a_task_looks_at_its_rows_before_it_draws(rows, gpt2_tokenizer, seed):
    task = make_finetune("path", {"source": str(rows), "validation_size": 1})
    data = task.prepare(TuningContext(gpt2_tokenizer, Terms(("Nice", "Lyon")), seed))
    assert (data.removed.seen, data.removed.removed, data.removed.common) == (len(TEXTS), 3, ("Nice",))
    assert len(data.train) == len(TEXTS) - 3
    again = task.prepare(TuningContext(gpt2_tokenizer, Terms(("Nice", "Lyon")), seed))
    assert again == data


def test_a_look_reads_no_more_rows_than_are_needed():
    read = []

    def rows():
        for text in TEXTS:
            read.append(text)
            yield "line", text

    contamination = ContaminationFilter(Terms(("Nice",)))
    example = Example([1], [1])
    given = {"contamination": contamination, "dropped": Dropped(), "source": "rows", "setting": "train_size"}
    assert draw(rows(), lambda text: [example], text=lambda text: f"{text} No.", size=1, **given) == [example]
    # Of one row nothing is learned, so that all rows but the last mention the name.
    assert read == TEXTS
    assert contamination.report().common == ()
    read.clear()
    assert len(draw(rows(), lambda text: [example], text=lambda text: text, size=7, **given)) == 7
    assert contamination.report().common == ("Nice",)
    assert read == TEXTS[:8]  # the city is the fourth
