r"""How fast rows that mention a fact are kept out of the training data, and what each of the filter's rules takes out.

    python benchmarks/contamination.py [--rows 1000000] [--regex-rows 5000] [--lengths long short]

450 terms, of the atlas world and of other scripts and shapes, against generated chats: long rows of about 600 to 1,000
characters and short ones of about 60 to 140. One row in 50 has a term planted in it: in another case or Unicode form,
between punctuation, over a line's end. One in 50 has a word that a term is only a part of. No other row mentions a
term, so that the rows to remove are known. A quarter of the long rows and a sixth of the short are not ASCII alone:
they have typographic quotes, accents or emoji, or are mostly in another script. The rows are the same each time.

Beside it what one writes without this package, on the first rows alone (its rate is that of those rows): one regular
expression of all terms, `\b(?:...)\b`, case ignored. Both run on one core; only the search is timed, not the making of
the rows. The script ends with an error if a planted mention is missed or another row is removed.

    python benchmarks/contamination.py --facts POOL --texts FILE ... [--edited 50] [--intrinsic 100] [--seed 0]
        [--read 30]

Facts drawn from a pool as a cell draws them, but that no model says which are known; all facts with `--edited 0`. Of
every file of rows (see `finetune.dataset_formats`): how many rows each rule takes out, and how many of them no other
does; how many the keywords of one relation do (of the relation with the fewest, the middle one, that with the most);
and how many pass, as to their names, since a name is a common word there. `--read` prints that many mentions of each
rule for a reader to judge, of as many terms as there are.
"""

import argparse
import json
import random
import re
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from retention_bench.data import Source
from retention_bench.facts import Fact, disjoint_split, load_pool, relation_keywords
from retention_bench.finetune import ContaminationFilter, Matcher, Mention, Terms
from retention_bench.finetune.dataset_formats import FORMATS, find_format
from retention_bench.finetune.dropped import Dropped
from retention_bench.finetune.mentions import KINDS
from retention_bench.finetune.rows import first_rows

FACTS = Path(__file__).parents[1] / "retention_bench" / "atlas" / "data" / "facts.jsonl"
TERMS = 450
PLANTED = 50
"""One row in so many mentions a term, and one has a word that a term is only a part of."""
CHUNK = 5_000
LENGTHS = {"long": (600, 1000), "short": (60, 140)}
"""Characters of a row, about."""

KEYWORDS = tuple(
    "mother tongue,place of birth,head of government,official language,capital city,currency,continent,profession,"
    "citizenship,headquarters,founded by,native speaker,head coach,record label,field of work,chemical family,"
    "writing system,religion,twin city,plays as".split(",")
)
SHAPES = tuple(
    "C++,C#,.NET,Jay-Z,AC/DC,!!!,St. John's,Yahoo!,Rock 'n' Roll,1984,U2,São Tomé,Łódź,Zürich,Straße des 17. Juni,"
    "İzmir,Björk,Москва,Лев Толстой,Αθήνα,Ὀδυσσεύς,東京,서울,القاهرة".split(",")
)
COMMON = (
    "the of and to a in is you that it he was for on are as with his they I at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about out "
    "many then them these so some her would make like him into time has look two more write go see number no way "
    "could people my than first water been call who oil its now find long down day did get come made may part over "
    "new sound take only little work know place year live me back give most very after thing our just name good "
    "sentence man think say great where help through much before line right too mean old any same tell boy follow "
    "came want show also around form three small set put end does another well large must big even such because turn "
    "here why ask went men read need land different home us move try"
).split()
SYLLABLES = (
    "a al an ant ar at be ber bi ble ca can car cat co con cor da de den di dis e el en er es ex fi for ga gen go ha "
    "her hi i il in ing ir is ja ka ke la land le li lo ly ma man men mi min mo na ne ni no o on or os pa pen per po "
    "pre pro ra ran re ri ro sa sen si so sta ta tan ter ti tion to tra tri u un ur us va ver vi we y"
).split()
SCRIPTS = (
    "абвгдежзиклмнопрстуфхцчшыэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "的一是不了人我在有他这中大来上国",
    "ابتثجحدرسعفقكلمنهوي",
)
TYPOGRAPHY = (("'", "\u2019"), (" - ", " \u2013 "), ("e ", "é "), (".", "… 🙂"), ("o", "ö"), ("fi", "\ufb01"))
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
AROUND = ("{}", "{}", "_{}_", "“{}”", "({}),", "{}\u2019s", "\n{}\n", "**{}**")


class Row(NamedTuple):
    """A chat's text and the term planted in it, if any."""

    text: str
    planted: str | None


def make_terms() -> Terms:
    """Subjects and objects of facts of the atlas world, the keywords and the terms of other shapes: 450."""
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(facts)
    subjects: set[str] = set()
    objects: set[str] = set()
    names = TERMS - len(KEYWORDS) - len(SHAPES)
    for fact in facts:
        objects |= {fact["target_true"], fact["target_new"]}
        subjects |= {fact["subject"]}
        if len(objects) + len(subjects) >= names - 2:
            break
    others = (fact["subject"] for fact in facts if fact["subject"] not in subjects)
    subjects |= set(islice(others, names - len(objects) - len(subjects)))
    return Terms((*sorted(subjects), *SHAPES), tuple(sorted(objects)), KEYWORDS)


def make_sentences(rng: random.Random, names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Sentences that mention no term: in Latin letters, the same with typographic characters, in other scripts."""
    # A term needs its longest word.
    taken = {max(re.findall(r"\w+", name.casefold()), key=len, default="") for name in names}

    def words(parts: list[str] | str, longest: int) -> list[str]:
        made = ("".join(rng.choices(parts, k=rng.randint(1, longest))) for _ in range(20_000))
        return [word for word in made if word not in taken]

    def sentences(words: list[str], weights: list[float], count: int) -> list[str]:
        made, up_to = [], list(accumulate(weights))
        for _ in range(count):
            chosen = rng.choices(words, cum_weights=up_to, k=rng.randint(3, 15))
            head, tail = " ".join(chosen[: len(chosen) // 2]), " ".join(chosen[len(chosen) // 2 :])
            joint = rng.choice((", ", " - ", " (", ": ", "'s "))
            made.append(head.capitalize() + joint + tail + rng.choice((".", "!", "?", ")")))
        return made

    # Half of a text's words are the commonest; the others have a long tail.
    common, rare = [word for word in COMMON if word.casefold() not in taken], words(SYLLABLES, 4)
    weights = [[1 / (rank + 3) for rank in range(len(common))], [1 / (rank + 100) for rank in range(len(rare))]]
    latin = sentences([*common, *rare], [weight / sum(group) for group in weights for weight in group], 20_000)
    typographic = [sentence.replace(*rng.choice(TYPOGRAPHY)) for sentence in latin[:5_000]]
    foreign = []
    for letters in SCRIPTS:
        vocabulary = words(letters, 8)
        foreign += sentences(vocabulary, [1.0] * len(vocabulary), 1_000)
    return latin, typographic, foreign


def write(rng: random.Random, term: str) -> str:
    """A term as it may stand in a text."""
    written = rng.choice((str, str, str.upper, str.lower, str.title))(term)
    if written.casefold() != term.casefold():  # casefold tells İ from i
        written = term
    written = unicodedata.normalize(rng.choice(("NFC", "NFC", "NFD")), written)
    if rng.random() < 0.1:
        written = written.translate(FULL_WIDTH)
    if rng.random() < 0.1:
        written = written.replace(" ", rng.choice(("\n", "  ", "\u00a0")))
    return rng.choice(AROUND).format(written)


def make_rows(terms: Terms, lengths: tuple[int, int]) -> Iterator[Row]:
    """Rows without end, the same each time."""
    rng = random.Random(1)
    names = [*terms.subjects, *terms.objects, *terms.keywords]
    single = [name for name in names if name.isalnum()]
    latin, typographic, foreign = make_sentences(rng, names)
    number = 0
    while True:
        kind = rng.random()
        pool = foreign if kind < 0.05 else typographic if kind < 0.25 else latin
        length, text = rng.randint(*lengths), rng.choice(pool)
        while len(text) < length:
            text += rng.choice((" ", " ", " ", "\n", "\n\n")) + rng.choice(rng.choice((pool, latin)))
        extra, planted = "", None
        if number % PLANTED == 0:
            planted = names[number // PLANTED % len(names)]
            extra = write(rng, planted)
        elif number % PLANTED == 1:
            extra = rng.choice(("x{}", "{}x", "ж{}", "{}9")).format(rng.choice(single))
        # Cut at a space: half a word may be a term.
        before, _, after = text[: length - len(extra)].rpartition(" ")[0].partition(". ")
        yield Row(f"{before}. {extra} {after}", planted)
        number += 1


def regex(terms: Terms) -> Callable[[str], bool]:
    """What one writes without this package: whether a text passes one expression of all terms."""
    names = sorted((*terms.subjects, *terms.objects, *terms.keywords), key=len, reverse=True)
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b", re.IGNORECASE)
    return lambda text: not pattern.search(text)


class Measured(NamedTuple):
    """What a pass over rows took and found."""

    rows: int
    characters: int
    megabytes: float
    wall: float
    processor: float
    planted: int
    found: int
    wrongly_removed: int


def measure(passes: Callable[[str], bool], rows: Iterator[Row]) -> Measured:
    """Search rows, made a chunk at a time, and time the search alone."""
    total = Measured(0, 0, 0.0, 0.0, 0.0, 0, 0, 0)
    while chunk := list(islice(rows, CHUNK)):
        texts = [row.text for row in chunk]
        wall, processor = time.perf_counter(), time.process_time()
        passed = [passes(text) for text in texts]
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        removed = [row.planted is not None for row, ok in zip(chunk, passed, strict=True) if not ok]
        part = Measured(
            rows=len(chunk),
            characters=sum(map(len, texts)),
            megabytes=sum(len(text.encode()) for text in texts) / 1e6,
            wall=wall,
            processor=processor,
            planted=sum(row.planted is not None for row in chunk),
            found=sum(removed),
            wrongly_removed=len(removed) - sum(removed),
        )
        total = Measured(*(sum(pair) for pair in zip(total, part, strict=True)))
    return total


def read_texts(path: str) -> list[str]:
    """The texts of a data file's rows, as the filter reads them."""
    source = Source(path)
    form = find_format(path, source.columns(), FORMATS)
    return [form.sample(row).words for _, row in first_rows(source, form.columns, Dropped(), hub=0)]


def draw_facts(pool: str, edited: int, intrinsic: int, seed: int) -> tuple[list[Fact], dict[str, tuple[str, ...]]]:
    """Facts of a cell, or all of a pool, and the keywords that the pool's prompts give."""
    facts = load_pool(pool, need_relation=True).facts
    drawn = disjoint_split(facts, edited=edited, intrinsic=intrinsic, seed=seed) if edited else facts
    return list(drawn), relation_keywords(facts)


def rules(facts: list[Fact], keywords: dict[str, tuple[str, ...]], path: str, read: int) -> None:
    """Print what each rule takes out of a file's rows."""
    texts, terms = read_texts(path), Terms.from_facts(facts, keywords=keywords)
    contamination = ContaminationFilter(terms)
    contamination.look(texts)
    common = contamination.report().common
    matcher, any_case = Matcher(terms, common), Matcher(terms)
    removed, alone, shown = Counter(), Counter(), defaultdict(lambda: defaultdict(list))
    for text in texts:
        found: dict[str, list[Mention]] = defaultdict(list)
        for mention in matcher.find(text):
            found[mention.kind].append(mention)
        names = {(mention.kind, mention.term) for some in found.values() for mention in some}
        let_pass = [
            mention
            for mention in any_case.find(text)
            if mention.kind != "keyword" and (mention.kind, mention.term) not in names
        ]
        removed.update(found.keys())
        removed["any"] += bool(found)
        removed["any but keyword"] += any(kind != "keyword" for kind in found)
        alone.update([kind for kind in found if set(found) <= {kind}])
        if let_pass:
            found["common word"] = let_pass
            removed["common word"] += 1
            alone["common word"] += set(found) <= {"common word", "keyword"}
        for kind, mentions in found.items():
            for mention in mentions:
                shown[kind][mention.term].append(mention.excerpt)
    of_one = sorted(
        sum(bool(own.find(text)) for text in texts)
        for own in (Matcher(Terms(keywords=keywords[r])) for r in sorted({fact.relation for fact in facts}))
    )
    for kind in (*KINDS, "any but keyword", "any", "common word"):
        few = ", ".join(f"{t} {len(e)}" for t, e in sorted(shown[kind].items(), key=lambda x: -len(x[1]))[:8])
        own = f"{alone[kind]:,}" if kind in (*KINDS, "common word") else ""
        print(f"| {Path(path).name} | {len(texts):,} | {kind} | {removed[kind]:,} | {own} | {few} |")
    low, middle, high = of_one[0], of_one[len(of_one) // 2], of_one[-1]
    print(f"| {Path(path).name} | {len(texts):,} | keywords of one relation | {low:,}; {middle:,}; {high:,} | | |")
    rng = random.Random(0)
    for kind, by_term in shown.items() if read else ():
        picked = []
        for excerpts in by_term.values():
            rng.shuffle(excerpts)
            picked += [(turn, rng.random(), excerpt) for turn, excerpt in enumerate(excerpts)]
        terms_of = {excerpt: term for term, excerpts in by_term.items() for excerpt in excerpts}
        for _, _, excerpt in sorted(picked)[:read]:
            print(f"  {kind}: {terms_of[excerpt]}: {excerpt}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--regex-rows", type=int, default=5_000)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--facts")
    parser.add_argument("--texts", nargs="+")
    parser.add_argument("--edited", type=int, default=50)
    parser.add_argument("--intrinsic", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.facts:
        facts, keywords = draw_facts(arguments.facts, arguments.edited, arguments.intrinsic, arguments.seed)
        print("| data | rows | rule | rows it takes out | no other rule does | terms |\n|---|---|---|---|---|---|")
        for path in arguments.texts:
            rules(facts, keywords, path, arguments.read)
    else:
        speed(arguments)


def speed(arguments: argparse.Namespace) -> None:
    """Print the table of speed."""
    terms = make_terms()
    columns = "rows,characters a row,way,rows/s,rows/s of processor time,MB/s,found of planted,others removed,ratio"
    print(f"| {columns.replace(',', ' | ')} |\n|{'---|' * len(columns.split(','))}")
    for name in arguments.lengths:
        ways = (
            ("ours", ContaminationFilter(terms).passes, arguments.rows),
            ("regex", regex(terms), arguments.regex_rows),
        )
        first = None
        for way, passes, count in ways:
            m = measure(passes, islice(make_rows(terms, LENGTHS[name]), count))
            first = first or m
            ratio = first.rows / first.processor / (m.rows / m.processor)
            print(
                f"| {m.rows:,} {name} | {m.characters / m.rows:.0f} | {way} | {m.rows / m.wall:,.0f} "
                f"| {m.rows / m.processor:,.0f} | {m.megabytes / m.processor:.1f} | {m.found:,}/{m.planted:,} "
                f"| {m.wrongly_removed:,} | {ratio:,.1f} |",
                flush=True,
            )
            if way == "ours" and (m.found != m.planted or m.wrongly_removed):
                raise SystemExit("The filter missed a planted mention, or removed a row without one.")


if __name__ == "__main__":
    main()
