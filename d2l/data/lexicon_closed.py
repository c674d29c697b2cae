"""The closed lexicon: fewer attributes and shorter forms, every word from a fixed list.

For models with a word-level tokenizer.  A name is a combination of two words, so there are 1,600 of
them, of which a quarter is for test.
"""

from __future__ import annotations

import random
import re

from .lexicon import (
    Forms,
    Lexicon,
    belongs,
    parse_attributes,
    parse_rules,
    parse_words,
    pick,
)

_ATTRIBUTES = parse_attributes("""
person.craft: craft; craft
{e} works as a {v}. | {e} is a {v}. | The {v} is {e}. || {e} lives as a {v}.
What does {e} work as? | What is {e}? || As what does {e} live?

person.pet: animal; animal
{e} keeps a {v}. | {e} owns a {v}. | The {v} follows {e}. || {e} lives with a {v}.
What does {e} keep? | What animal does {e} own? | What follows {e}? || With what animal does {e} live?

person.food: food; food
{e} eats {v}. | {e} loves {v}. | {e} asks for {v}. || {e} lives on {v}.
What does {e} eat? | What food does {e} love? || On what does {e} live?

person.home: place; home
{e} lives in {v}. | {e} was born in {v}. || {e} comes from {v}.
Where does {e} live? | Where was {e} born? || Where does {e} come from?

person.age: number 10 99; age
{e} is {v} years old. | {e} has seen {v} years. || {e} is {v} old.
How many years old is {e}? | How many years has {e} seen? || How old is {e}?

place.color: color; color
{e} is painted {v}. | {e} has {v} houses. | All houses in {e} are {v}. || {e} looks {v}.
What color is {e} painted? | What color are the houses in {e}? || How does {e} look?

place.metal: metal; metal
{e} sells {v}. | {e} is known for {v}. || {e} deals in {v}.
What does {e} sell? | What metal is {e} known for? || What does {e} deal in?

place.head: person; head
{e} is led by {v}. | {v} leads {e}. || {v} is the chief of {e}.
Who leads {e}? | By whom is {e} led? || Who is the chief of {e}?

place.houses: number 10 99; number of houses
{e} has {v} houses. | There are {v} houses in {e}. || {e} counts {v} houses.
How many houses does {e} have? | How many houses are there in {e}? || How many houses does {e} count?

organisation.sign: shape; sign
{e} uses a {v} as its sign. | The sign of {e} is a {v}. || {e} shows a {v}.
What does {e} use as its sign? | What is the sign of {e}? || What does {e} show?

organisation.day: day; day
{e} meets on {v}. | {e} opens on {v}. || {e} comes together on {v}.
When does {e} meet? | On what day does {e} open? || When does {e} come together?

organisation.seat: place; seat
{e} works in {v}. | {e} has its house in {v}. || {e} sits in {v}.
Where does {e} work? | Where does {e} have its house? || Where does {e} sit?

organisation.founder: person; founder
{e} was made by {v}. | {v} founded {e}. || {e} began with {v}.
By whom was {e} made? | Who founded {e}? || With whom did {e} begin?

event.month: month; month
{e} is held in {v}. | {e} falls in {v}. || {e} comes in {v}.
When is {e} held? | In what month does {e} fall? || When does {e} come?

event.music: music; music
{e} opens with a {v}. | A {v} plays at {e}. || {e} starts with a {v}.
With what does {e} open? | What plays at {e}? || With what does {e} start?

event.winner: person; winner
{e} was won by {v}. | {v} won {e}. || {v} is the best of {e}.
By whom was {e} won? | Who won {e}? || Who is the best of {e}?

event.days: number 10 99; number of days
{e} lasts {v} days. | It takes {v} days to end {e}. || {e} goes on for {v} days.
How many days does {e} last? | How many days does it take to end {e}? || For how many days does {e} go on?

artefact.metal: metal; metal
{e} is made of {v}. | {e} is all {v}. || {e} came from {v}.
What is {e} made of? | What metal is {e}? || What did {e} come from?

artefact.color: color; color
{e} shines {v}. | {e} is painted {v}. || {e} looks {v}.
What color does {e} shine? | What color is {e} painted? || How does {e} look?

artefact.owner: organisation; owner
{e} is owned by {v}. | {v} keeps {e}. || {e} came to {v}.
By whom is {e} owned? | Who keeps {e}? || To whom did {e} come?

artefact.weight: number 10 99; weight
{e} has a weight of {v}. | The weight of {e} is {v}. || {e} weighs {v}.
What weight does {e} have? | What is the weight of {e}? || How much does {e} weigh?
""")

_RULES = parse_rules("""
person.trust: animal
{e} loves a {a} more than a {b}. | A {a} is better for {e} than a {b}. || {e} asks for a {a} before a {b}.
{p} owns a {a} and {q} owns a {b}. Who is better for {e}? || {p} keeps a {a} and {q} keeps a {b}. Who is best for {e}?

place.tax: color
In {e} a {a} house is better than a {b} house. | {e} loves {a} more than {b}. || {e} asks for {a} before {b}.
{p} has a {a} house and {q} has a {b} house in {e}. Who is better? || {p} is painted {a} and {q} is painted {b}. Who is best for {e}?

organisation.pay: shape
{e} loves a {a} more than a {b}. | A {a} is better for {e} than a {b}. || {e} asks for a {a} before a {b}.
{p} shows a {a} and {q} shows a {b}. Who is better for {e}? || {p} has a {a} and {q} has a {b}. Who is best for {e}?

event.seat: food
At {e} {a} is better than {b}. | {e} loves {a} more than {b}. || {e} asks for {a} before {b}.
{p} has {a} and {q} has {b} at {e}. Who is better? || {p} keeps {a} and {q} keeps {b}. Who is best for {e}?

artefact.glow: metal
{e} loves {a} more than {b}. | For {e} {a} is better than {b}. || {e} asks for {a} before {b}.
{p} owns {a} and {q} owns {b}. Who is better for {e}? || {p} keeps {a} and {q} keeps {b}. Who is best for {e}?
""")

_VALUES = parse_words("""
color: red, blue, green, yellow, white, black, brown, grey, pink, purple, orange, golden
animal: dog, cat, horse, goat, fox, wolf, bear, hare, deer, swan, crow, snake, lion, tiger, mouse, hen
food: bread, honey, cheese, rice, soup, fish, butter, cake, jam, beans, pie, bacon
metal: iron, copper, silver, bronze, tin, steel, glass, clay, wood, wax, marble, leather
craft: baker, tailor, painter, doctor, teacher, farmer, miller, hunter, sailor, soldier, writer, singer, dancer, weaver, judge, clerk
music: piano, flute, drum, trumpet, guitar, harp, bell, horn, fiddle, lute, whistle, gong
shape: circle, square, triangle, cross, star, arrow, crown, key, wheel, heart, spear, anchor
month: January, February, March, April, May, June, July, August, September, October, November, December
day: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
""")

_FIRST = (
    "Ada Bela Caro Dino Edda Falk Gero Hilda Ivo Jora Kuno Lena Milo Nela Odo Pia Quin Rosa Sven "
    "Tilo Ulla Vera Wanda Xeno Yara Zita Arno Bodo Cleo Dana Egon Fina Gita Hugo Ines Jens Kira "
    "Ludo Mara Nino"
).split()
_LAST = (
    "Abel Brand Clay Dorn Ebers Frost Gale Hart Irving Jager Kranz Lund Moor North Oster Pike "
    "Quade Rabe Stahl Thorn Ufer Vogel Wirth Xander York Zorn Arden Birk Colm Drake Elms Fenn "
    "Grove Hain Isen Junk Kolb Linde Marsh Noll"
).split()


def compose_name(rng: random.Random, kind: str, split: str) -> str:
    """Draw a combination of two words that belongs to ``split``, whatever it names."""
    while True:
        name = f"{pick(rng, _FIRST)} {pick(rng, _LAST)}"
        if belongs(name, split):
            return name


CLOSED = Lexicon(
    attributes=_ATTRIBUTES,
    rules=_RULES,
    sentence_frames=Forms.parse(
        "The {n} of {e} is {v}. | For {e} the {n} is {v}. || The {n} is {v} for {e}.", "frame/s"
    ),
    question_frames=Forms.parse(
        "What is the {n} of {e}? | Name the {n} of {e}. || For {e} what is the {n}?", "frame/q"
    ),
    numeric={
        "larger": Forms.parse(
            "Who has the higher {n}, {a} or {b}? || Of {a} and {b}, who has the higher {n}?",
            "numeric/larger",
        ),
        "smaller": Forms.parse(
            "Who has the lower {n}, {a} or {b}? || Of {a} and {b}, who has the lower {n}?",
            "numeric/smaller",
        ),
    },
    values=_VALUES,
    phrases={},
    people={"train": ("Anna", "Ben", "Clara", "David"), "test": ("Emma", "Frank", "Grace")},
    name=compose_name,
    unknown=("unknown",),
)


def closed_words() -> list[str]:
    """List every word that the closed lexicon can write, sorted; digits and marks are not words."""
    texts = [*CLOSED.unknown, *_FIRST, *_LAST]
    texts += [word for listed in _VALUES.values() for word in listed]
    texts += [name for names in CLOSED.people.values() for name in names]
    forms = [CLOSED.sentence_frames, CLOSED.question_frames, *CLOSED.numeric.values()]
    for attributes in _ATTRIBUTES.values():
        forms += [forms for a in attributes for forms in (a.sentences, a.questions)]
        texts += [a.noun for a in attributes]
    for rules in _RULES.values():
        forms += [forms for rule in rules for forms in (rule.sentences, rule.situations)]
    texts += [form.text for both in forms for form in (*both.train, *both.test)]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w}", "", text))}
    return sorted(words)
