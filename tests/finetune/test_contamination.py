import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_bench.errors import UsageError
from retention_bench.facts import Fact
from retention_bench.finetune import ContaminationFilter, Matcher, Terms


def mentions(term: str, text: str) -> bool:
    return bool(Matcher(Terms(subjects=(term,))).find(text))


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("Iran", "the capital of iran."),
        ("Iran", "IRAN's capital"),
        ("Iran", "_Iran_ and **Iraq**"),
        ("Iran", "oil-rich Iran-backed"),
        ("New York", "in new\n  york today"),
        ("C++", "I write C++, not C"),
        (".NET", "ASP and .net"),
        ("Jay-Z", "JAY-Z!"),
        ("!!!", "the band !!! played"),
        ("Straße", "STRASSE 7"),
        ("Café", unicodedata.normalize("NFD", "le CAFÉ noir")),
        ("fi", "ﬁ"),  # a ligature
        ("İzmir", "i̇zmir"),
        ("10", "ten (10) men"),
        ("Ὀδυσσεύς", "ὈΔΥΣΣΕΎΣ"),
    ],
)
def test_a_mention_is_found_whatever_its_case_and_form(term, text):
    assert mentions(term, text)


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("Iran", "Iranian"),
        ("Iran", "Tirana, Tiran, Iran2"),
        ("Iran", "Irań"),
        ("C++", "C is not C#"),
        (".NET", "a net"),
        ("New York", "New Yorkshire, newyork, York is new"),
        ("New York", "anew York"),
        ("Jay-Z", "Jay Z"),
        ("10", "2010, 101"),
    ],
)
def test_a_part_of_a_word_is_no_mention(term, text):
    assert not mentions(term, text)


# Letters, digits and punctuation of any script. A mark at a term's beginning would melt into the character before it.
characters = st.characters(categories=("Lu", "Ll", "Lo", "Nd", "Po", "Pd", "Sm"))
words = st.text(characters, min_size=1, max_size=8).filter(lambda word: unicodedata.normalize("NFKC", word).strip())
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join)
forms = st.sampled_from([str, str.upper, str.lower, str.casefold, str.swapcase])


@given(phrases, st.lists(phrases, max_size=5), st.text(max_size=20), st.text(max_size=20), st.data())
def test_a_planted_mention_is_always_found(term, others, before, after, data):
    # Upper case does not always match caselessly (of the dotless i it does not): the caseless form decides.
    form = data.draw(forms.filter(lambda form: form(term).casefold() == term.casefold()))
    planted = data.draw(st.sampled_from(["NFC", "NFD", "NFKC"]).map(lambda n: unicodedata.normalize(n, form(term))))
    found = Matcher(Terms(objects=(term, *others))).find(f"{before} {planted} {after}")
    assert ("object", term) in [(mention.kind, mention.term) for mention in found]


@given(st.lists(st.sampled_from(["iran", "iranian", "iraq", "new", "york", "ran", "an"]), max_size=8), phrases)
def test_agrees_with_a_search_word_by_word(text, other):
    terms = ["iran", "new york", "an"]
    found = {mention.term for mention in Matcher(Terms(keywords=(*terms, other))).find(" ".join(text))}
    expected = {t for t in terms for i in range(len(text)) if text[i : i + len(t.split())] == t.split()}
    assert found - {other} == expected - {other}


def test_terms_of_facts_are_subjects_both_objects_and_the_keywords_of_their_relations():
    edited = Fact("1", "Lyon", "country", "{} lies in", "France", "Iran")
    intrinsic = Fact("2", "Bach", "job", "{} was a", "composer")
    terms = Terms.from_facts([edited, intrinsic], keywords={"job": ["profession"], "sport": ["team"]})
    assert terms == Terms(("Bach", "Lyon"), ("France", "Iran", "composer"), ("profession",))


def test_the_report_counts_rows_by_kind_and_shows_the_first():
    contamination = ContaminationFilter(Terms(subjects=("Lyon",), objects=("France",), keywords=("country",)))
    texts = ["Lyon is in France, and Lyon is old.", "Which country?", "nothing", *["France"] * 30]
    assert [contamination.passes(text) for text in texts] == [False, False, True, *[False] * 30]
    report = contamination.report().to_json()
    assert (report["seen"], report["removed"]) == (33, 32)
    assert report["by_kind"] == {"subject": 1, "object": 31, "keyword": 1}
    assert len(report["samples"]) == 20
    assert report["samples"][1] == {"kind": "keyword", "term": "country", "excerpt": "which country?"}


def test_without_terms_everything_passes():
    assert ContaminationFilter(Terms()).passes("Lyon")
    assert ContaminationFilter(Terms()).passes("")


@pytest.mark.parametrize("term", ["", "  "])
def test_an_empty_term_is_refused(term):
    with pytest.raises(UsageError, match="keywords"):
        Terms(keywords=("country", term))
