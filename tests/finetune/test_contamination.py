import runpy
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
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


def mentioned(term, text):
    """A plain search: at every place of the text, with single spaces."""
    term, text = (
        " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", s).casefold()).split())
        for s in (term, text)
    )
    for start in range(len(text) - len(term) + 1):
        end = start + len(term)
        joined_before = start > 0 and term[0].isalnum() and text[start - 1].isalnum()
        joined_after = end < len(text) and term[-1].isalnum() and text[end].isalnum()
        if text[start:end] == term and not joined_before and not joined_after:
            return True
    return False


# Few characters, so that terms are often in the text, overlap each other and are parts of words: of several scripts, of
# one to four bytes, that casefold to two, that compose, that stand beside words, and a lone surrogate.
alphabet = st.sampled_from([*"aAbßİ1é𐍈中٣ς-_.+!", *"\u0131\u017f\u0301\uff12\ufb01\ud83d \n\u00a0\x85"])
short = st.text(alphabet, min_size=1, max_size=4).filter(lambda term: unicodedata.normalize("NFKC", term).strip())


@settings(max_examples=1000)
@given(st.lists(short, min_size=1, max_size=6), st.text(alphabet, max_size=25), st.data())
def test_agrees_with_a_plain_search(terms, text, data):
    if data.draw(st.booleans()):
        text += data.draw(st.sampled_from(terms)) + data.draw(st.text(alphabet, max_size=3))
    found = [mention.term for mention in Matcher(Terms(keywords=tuple(terms))).find(text)]
    assert found == sorted(term for term in set(terms) if mentioned(term, text))


def test_a_part_of_a_word_hides_no_term_that_overlaps_it():
    found = Matcher(Terms(objects=("Iran", "new York", "York", "York City", "Yorks"))).find("New  York City")
    assert [mention.term for mention in found] == ["York", "York City", "new York"]
    assert [mention.term for mention in Matcher(Terms(objects=("Iran", "Iranian"))).find("Iranian")] == ["Iranian"]


def test_one_term_of_two_kinds_is_a_mention_of_each():
    found = Matcher(Terms(subjects=("Lyon",), objects=("LYON", "Lyon"))).find("lyon")
    assert [(mention.kind, mention.term) for mention in found] == [
        ("object", "LYON"),
        ("object", "Lyon"),
        ("subject", "Lyon"),
    ]


def test_of_rows_as_in_the_benchmark_those_with_a_planted_mention_are_removed_and_no_others():
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "contamination.py"))
    terms = benchmark["make_terms"]()
    assert len({*terms.subjects, *terms.objects, *terms.keywords}) == 450
    matcher, contamination = Matcher(terms), ContaminationFilter(terms)
    planted = 0
    for row in islice(benchmark["make_rows"](terms, (60, 140)), 25_000):
        assert contamination.passes(row.text) == (row.planted is None), row
        if row.planted is not None:
            planted += 1
            assert row.planted in [mention.term for mention in matcher.find(row.text)]
    assert planted == contamination.report().removed == 500


def test_the_benchmark_counts_what_each_rule_takes_out(tmp_path, capsys):
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "contamination.py"))
    texts = ["It lies in Lyon.", "Nice.", *["It is nice."] * 3, "France and Lyon.", "A region", "Bach played the Opus."]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    facts = [Fact("1", "Lyon", "in", "{} lies in", "France", "Nice"), Fact("2", "Opus 5", "by", "{} is by", "Bach")]
    benchmark["rules"](facts, {"in": ("region",), "by": ("lie*", "play*")}, str(path), 30)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:8] == [
        "| rows.jsonl | 8 | subject | 2 | 0 | Lyon 2 |",
        "| rows.jsonl | 8 | subject_without_number | 1 | 0 | Opus 1 |",
        "| rows.jsonl | 8 | object | 3 | 1 | Nice 1, France 1, Bach 1 |",
        "| rows.jsonl | 8 | keyword | 3 | 1 | lie* 1, region 1, play* 1 |",
        "| rows.jsonl | 8 | any but keyword | 4 |  |  |",
        "| rows.jsonl | 8 | any | 5 |  |  |",
        "| rows.jsonl | 8 | common word | 3 | 3 | Nice 3 |",
        "| rows.jsonl | 8 | keywords of one relation | 1; 2; 2 | | |",
    ]
    assert "  object: Nice: nice." in printed
    assert len([line for line in printed if line.startswith("  common word: Nice: it is nice.")]) == 3


def test_terms_of_facts_are_subjects_both_objects_and_the_keywords_of_their_relations():
    edited = Fact("1", "Lyon", "country", "{} lies in", "France", "Iran")
    intrinsic = Fact("2", "Bach", "job+trade", "{} was a", "composer")
    keywords = {"job": ["profession"], "trade": ["craft"], "sport": ["team"]}
    terms = Terms.from_facts([edited, intrinsic], keywords=keywords)
    assert terms == Terms(("Bach", "Lyon"), ("France", "Iran", "composer"), ("craft", "profession"))


def test_the_report_counts_rows_by_kind_and_shows_the_first():
    contamination = ContaminationFilter(Terms(subjects=("Lyon",), objects=("France",), keywords=("country",)))
    texts = ["Lyon is in France, and Lyon is old.", "Which country?", "nothing", *["France"] * 30]
    assert [contamination.passes(text) for text in texts] == [False, False, True, *[False] * 30]
    report = contamination.report().to_json()
    assert (report["seen"], report["removed"]) == (33, 32)
    assert report["by_kind"] == {"subject": 1, "subject_without_number": 0, "object": 31, "keyword": 1}
    assert len(report["samples"]) == 20
    assert report["samples"][1] == {"kind": "keyword", "term": "country", "excerpt": "which country?"}


def test_without_terms_everything_passes():
    assert ContaminationFilter(Terms()).passes("Lyon")
    assert ContaminationFilter(Terms()).passes("")


@pytest.mark.parametrize("term", ["", "  "])
def test_an_empty_term_is_refused(term):
    with pytest.raises(UsageError, match="keywords"):
        Terms(keywords=("country", term))
