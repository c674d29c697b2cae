"""Questions about a drafted document of the encyclopedia, by kind."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from .lexicon import Attribute, Form, Lexicon, Rule
from .record import Question


@dataclasses.dataclass
class Entity:
    """Someone or something, with the index of each fact that is stated about it."""

    name: str
    of: str
    pronoun: str
    facts: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Draft:
    """A document in the making: what is said of whom, before and after it is put into words."""

    rng: random.Random
    entities: list[Entity] = dataclasses.field(default_factory=list)
    stated: list[tuple[Entity, Attribute | Rule, str]] = dataclasses.field(default_factory=list)
    used: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def state(self, entity: Entity, what: Attribute | Rule, value: str) -> None:
        """Add a fact."""
        entity.facts[what.name] = len(self.stated)
        self.stated.append((entity, what, value))

    def fresh(self, key: str, draw: Callable[[], str], *, apart: bool = False) -> str:
        """Draw a value that this document has not used under ``key``, where there is one left.

        With ``apart`` no word of it has been used there either.
        """
        used = self.used.setdefault(key, set())
        value = draw()
        for _ in range(50 if apart else 20):
            if used.isdisjoint(value.split() if apart else (value,)):
                break
            value = draw()
        used.update(value.split() if apart else (value,))
        return value


@dataclasses.dataclass(frozen=True)
class Interviewer:
    """Asks about what a draft states, with names of ``split`` and question forms of ``forms``."""

    lexicon: Lexicon
    attributes: Mapping[str, tuple[Attribute, ...]]
    split: str
    forms: str

    def text(self, form: Form, about: Attribute, entity: str) -> str:
        """Fill a question form."""
        who = "Who" if about.kind == "person" else "What"
        return form.text.format(e=entity, n=about.noun, who=who)

    def _question_forms(self, what: Attribute) -> list[Form]:
        frames = self.lexicon.question_frames.of(self.forms)
        own = what.questions.of(self.forms)
        return [*own, *(Form(f"{what.name}/{f.name}", f.text) for f in frames)]

    def ask(self, draft: Draft, n_questions: int, kinds: Sequence[str]) -> tuple[Question, ...]:
        """Return different questions, the kinds in turn; ValueError where there are too few."""
        makers: dict[str, Callable[[Draft], Iterator[Question]]] = {
            "recall": self._recall,
            "numeric": self._numeric,
            "situational": self._situational,
            "two_hop": self._two_hop,
            "unanswerable": self._unanswerable,
        }
        turns = list(dict.fromkeys(kinds))
        draft.rng.shuffle(turns)
        running = [makers[kind](draft) for kind in turns]
        asked: dict[str, Question] = {}
        while running and len(asked) < n_questions:
            source = running.pop(0)
            question = next((q for q in source if q.text not in asked), None)
            if question is not None:
                asked[question.text] = question
                running.append(source)
        if len(asked) < n_questions:
            raise ValueError(
                f"a document of {len(draft.stated)} facts has only {len(asked)} different "
                f"questions of the kinds {', '.join(kinds)}, not {n_questions}"
            )
        return tuple(asked.values())

    def _recall(self, draft: Draft) -> Iterator[Question]:
        rng = draft.rng
        asked = [
            (i, entity, what, value, _shuffled(rng, self._question_forms(what)))
            for i, (entity, what, value) in enumerate(draft.stated)
            if isinstance(what, Attribute)
        ]
        rng.shuffle(asked)
        for turn in itertools.count():
            left = [row for row in asked if turn < len(row[-1])]
            if not left:
                return
            for i, entity, what, value, forms in left:
                text = self.text(forms[turn], what, entity.name)
                yield Question(text, _accepted(value), "recall", (i,), forms[turn].name)

    def _numeric(self, draft: Draft) -> Iterator[Question]:
        rng, numeric = draft.rng, self.lexicon.numeric
        numbers = [
            (i, entity, what, int(value))
            for i, (entity, what, value) in enumerate(draft.stated)
            if isinstance(what, Attribute) and self.lexicon.group(what.kind) == "numbers"
        ]
        pairs = [
            (one, other)
            for one, other in itertools.permutations(numbers, 2)
            if one[2].name == other[2].name and one[3] != other[3]
        ]
        operations = [(op, form) for op, forms in numeric.items() for form in forms.of(self.forms)]
        rng.shuffle(numbers)
        rng.shuffle(pairs)
        rng.shuffle(operations)
        for op, form in operations * 4:
            if op in ("add", "subtract"):
                if not numbers:
                    continue
                i, entity, what, value = numbers[0]
                numbers.append(numbers.pop(0))
                k = 1 + int(rng.random() * min(9, max(1, value - 1)))
                result = value + k if op == "add" else value - k
                text = form.text.format(n=what.noun, a=entity.name, k=k)
                yield Question(text, (str(result),), "numeric", (i,), form.name)
            elif pairs:
                (i, one, what, x), (j, other, _, y) = pairs[0]
                pairs.append(pairs.pop(0))
                text = form.text.format(n=what.noun, a=one.name, b=other.name)
                largest, smallest = (one, other) if x > y else (other, one)
                answer = {
                    "difference": str(abs(x - y)),
                    "larger": largest.name,
                    "smaller": smallest.name,
                }[op]
                yield Question(text, _accepted(answer), "numeric", (i, j), form.name)

    def _situational(self, draft: Draft) -> Iterator[Question]:
        rng, people = draft.rng, self.lexicon.people[self.split]
        rules = [
            (i, entity, what, value)
            for i, (entity, what, value) in enumerate(draft.stated)
            if isinstance(what, Rule)
        ]
        for _ in range(8):
            for i, entity, what, value in rules:
                a, b = value.split(" over ")
                p, q = rng.sample(people, 2)
                form = choose(rng, what.situations.of(self.forms))
                favoured = p
                if rng.random() < 0.5:
                    a, b, favoured = b, a, q
                text = form.text.format(e=entity.name, a=a, b=b, p=p, q=q)
                yield Question(text, (favoured,), "situational", (i,), form.name)

    def _two_hop(self, draft: Draft) -> Iterator[Question]:
        rng = draft.rng
        by_name = {entity.name: entity for entity in draft.entities}
        paths = [
            (i, entity, link, by_name[value], attribute, j)
            for i, (entity, link, value) in enumerate(draft.stated)
            if isinstance(link, Attribute) and value in by_name
            for attribute in self.attributes[by_name[value].of]
            if (j := by_name[value].facts.get(attribute.name)) is not None
        ]
        hops = [(path, form) for path in paths for form in self._question_forms(path[4])]
        rng.shuffle(hops)
        for (i, entity, link, _, attribute, j), form in hops:
            if "{e}'s" in form.text:
                continue
            between = f"the {link.noun} of {entity.name}"
            text = self.text(form, attribute, between)
            answers = _accepted(draft.stated[j][2])
            name = f"{link.name}/{form.name}"
            yield Question(text, answers, "two_hop", (i, j), name)

    def _unanswerable(self, draft: Draft) -> Iterator[Question]:
        rng = draft.rng
        missing = [
            (entity, attribute)
            for entity in draft.entities
            for attribute in self.attributes[entity.of]
            if attribute.name not in entity.facts
        ]
        for entity in list(draft.entities):
            stranger = self.lexicon.name(rng, entity.of, self.split)
            if stranger not in {e.name for e in draft.entities}:
                other = Entity(stranger, entity.of, "it")
                missing += [(other, a) for a in self.attributes[entity.of][:2]]
        rng.shuffle(missing)
        for entity, attribute in missing:
            form = choose(rng, self._question_forms(attribute))
            text = self.text(form, attribute, entity.name)
            yield Question(text, self.lexicon.unknown, "unanswerable", (), form.name)


def _accepted(value: str) -> tuple[str, ...]:
    """List the answers that count for a value."""
    return (value, value.removeprefix("the ")) if value.startswith("the ") else (value,)


def choose(rng: random.Random, forms: Sequence[Form]) -> Form:
    """Draw a form."""
    return forms[int(rng.random() * len(forms))]


def _shuffled(rng: random.Random, forms: list[Form]) -> list[Form]:
    rng.shuffle(forms)
    return forms
