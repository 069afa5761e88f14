import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_bench.facts.relations import ENOUGH, Asked, known_templates, name_relations, templates


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "spelled"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "The mother tongue of {} is", None),
        ("Lyon's twin city is", "Lyon", "{}'s twin city is", None),
        ("Lyon", "Lyon", "{}", None),
        ("The capital of LYON is", "Lyon", "The capital of {} is", "LYON"),
        ("Lyon and lyon lie in", "Lyon", "{} and lyon lie in", None),  # its own case comes first
        ("Lyonnais speak as in Lyon", "Lyon", "Lyonnais speak as in {}", None),  # whole words only
        ("Who was (What's Up?) by", "(What's Up?)", "Who was {} by", None),
        ("Lyon, the city of Lyon, is in", "Lyon", "Lyon, the city of {}, is in", None),  # the last of equal ones
        ("{} is in", "Lyon", "{} is in", None),
    ],
)
def test_a_subject_is_cut_out_of_its_prompt(prompt, subject, template, spelled):
    assert templates([(prompt, subject)]) == [(template, spelled or subject)]


@pytest.mark.parametrize(
    ("prompt", "subject"), [("Lyonnais speak", "Lyon"), ("It is in", "Lyon"), ("Ünlyon is", "LYON")]
)
def test_a_subject_that_is_not_there_has_no_template(prompt, subject):
    assert templates([(prompt, subject)]) == [None]


def test_of_several_places_the_one_that_other_prompts_share_is_cut():
    found = templates(
        [("In In, people speak", "In"), ("In Peru, people speak", "Peru"), ("In Oslo, people speak", "Oslo")]
    )
    assert found[0] == ("In {}, people speak", "In")
    found = templates([("Is Is in", "Is"), ("Oslo Is in", "Oslo")])
    assert found[0] == ("{} Is in", "Is")


words = st.lists(st.sampled_from(["is", "in", "the", "Oslo", "oslo", "o"]), max_size=4).map(" ".join)


@given(words, st.sampled_from(["Oslo", "is", "New Oslo", "O'Is"]), words)
def test_filling_a_template_in_gives_the_prompt(before, subject, after):
    prompt = f"{before} {subject} {after}".strip()
    [(template, spelled)] = templates([(prompt, subject)])
    assert template.replace("{}", spelled) == prompt
    assert template.count("{}") == 1
    assert spelled == subject


def asked(template, number, objects=("o", "n"), *neighborhood):
    return Asked(template, tuple(f"{o}{number}" for o in objects), neighborhood)


def test_a_neighbours_words_tie_two_templates_and_the_longest_fits():
    facts = [
        *(asked("{} speaks", i, ("a", "b"), "Ann was born to speak French, and speaks") for i in range(3)),
        *(asked("{} was born to speak French, and speaks", i, ("c", "d")) for i in range(2)),
        *(asked("Who is {}? A speaker of", i, ("e", "f"), "Bob speaks") for i in range(2)),
        *(asked("{} sings", i, ("g", "h"), "Bob dances") for i in range(2)),
    ]
    names = name_relations(facts, {})
    assert names["{} sings"] == "{} sings"
    assert {names[t] for t in names if t != "{} sings"} == {"{} speaks"}
    del facts[:3]
    facts += [asked("{} speaks", i, ("a", "b")) for i in range(3)]
    assert len(set(name_relations(facts, {}).values())) == 3  # born to speak is on its own now


def test_ids_tie_templates_and_name_the_group():
    facts = [asked(t, f"{t}{i}") for t in ("{} was made by", "{} was built by", "{} is of", "{} sings") for i in (1, 2)]
    known = {"{} was made by": ("P178", "P176"), "{} was built by": ("P176",), "{} is of": ("P1000",), "{} x": ("P1",)}
    names = name_relations(facts, known)
    assert names["{} was made by"] == names["{} was built by"] == "P176+P178"
    assert names["{} is of"] == "P1000"
    assert names["{} sings"] == "{} sings"


def test_shared_objects_tie_what_too_few_neighbours_speak_for():
    music = [Asked("{} plays", ("Jazz", f"x{i}"), ()) for i in range(3)] + [Asked("{} plays", ("Blues", "Soul"), ())]
    few = [Asked("{} performs", ("jazz", "blues"), ()), Asked("{} performs", ("Fado", "Polka"), ())]
    one = [Asked("{} records for", ("Jazz", "Stax"), ())]  # one object in common says nothing
    names = name_relations([*music, *few, *one], {})
    assert names == {"{} plays": "{} plays", "{} performs": "{} plays", "{} records for": None}
    # With enough neighbours of their own the two stand for themselves.
    neighbours = lambda facts, text: [f._replace(neighborhood=(text,) * ENOUGH) for f in facts]  # noqa: E731
    names = name_relations([*neighbours(music, "Ann plays"), *neighbours(few, "Ann performs")], {})
    assert names == {"{} plays": "{} plays", "{} performs": "{} performs"}


def test_the_table_is_what_the_known_facts_say(real_data):
    found = defaultdict(set)
    for row in json.loads(real_data("known_1000.json").read_text()):
        found[row["template"]].add(row["relation_id"])
    assert {template: set(ids) for template, ids in known_templates().items()} == found


def groups_by_relation(names):
    """In how many groups the templates of each relation in the table are."""
    groups = defaultdict(set)
    for template, ids in known_templates().items():
        for relation in ids if template in names else ():
            groups[relation].add(names[template])
    return {relation: len(found) for relation, found in groups.items()}


@pytest.fixture
def edits(real_data):
    rows = json.loads(real_data("counterfact_edit.json").read_text())
    found = templates([(row["prompt"], row["subject"]) for row in rows])
    return [
        Asked(cut[0], (row["ground_truth"], row["target_new"]), (row["locality_prompt"],))
        for row, cut in zip(rows, found, strict=True)
    ]


def test_neighbours_alone_find_the_relations_that_the_table_names(edits):
    without_table = name_relations(edits, {})
    assert set(groups_by_relation(without_table).values()) == {1}
    assert len(set(without_table.values())) == 24
    grouped = lambda names: {frozenset(t for t in names if names[t] == name) for name in names.values()}  # noqa: E731
    assert grouped(without_table) == grouped(name_relations(edits))


def test_shared_objects_alone_keep_relations_whole(edits):
    """What the constant `OVERLAP` says of itself."""
    bare = [fact._replace(neighborhood=()) for fact in edits]
    names, whole = name_relations(bare, {}), name_relations(edits)
    assert len(set(names.values()) - {None}) == 9
    assert sum(name is None for name in names.values()) == 1
    assert set(groups_by_relation(names).values()) == {1}
    split = {name: {names[t] for t in whole if whole[t] == name} - {None} for name in whole.values()}
    assert all(len(found) == 1 for found in split.values())
