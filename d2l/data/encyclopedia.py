"""Documents and questions about an invented encyclopedia, without an end and without a licence.

A document states facts about one entity (a person, place, organisation, event or artefact) and
about others beside it.  Questions recall a fact, compute with numbers (as DROP does), apply a rule
to a situation (as ROPES does), go over two facts (as 2WikiMultihopQA does), or have no answer.  The
test split shares no invented name, no sentence form and no question form with the training split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .encyclopedia_questions import Draft, Entity, Interviewer, choose
from .lexicon import Attribute, Form, Forms, Lexicon, Rule
from .lexicon_closed import CLOSED
from .lexicon_open import OPEN
from .record import Fact, Record

KINDS = ("recall", "numeric", "situational", "two_hop", "unanswerable")
GROUPS = ("words", "phrases", "numbers", "names")
MAX_FACTS = 40
LEXICONS = {"open": OPEN, "closed": CLOSED}
_SHARE_FRAMES = 0.3
_MOST_PER_ENTITY = 8
_PRONOUNS = {"it": ("It", "Its"), "she": ("She", "Her"), "he": ("He", "His")}


class EncyclopediaGenerator:
    """Draw documents with their questions, from the generator of random numbers that is given.

    ``vocabulary`` is ``open`` (everyday English, names of invented syllables) or ``closed`` (every
    word from `d2l.data.lexicon_closed.closed_words`).  ``values`` restricts what facts are about:
    ``words`` (mostly one token), ``phrases`` of two or three words, ``numbers``, invented
    ``names``.  ``words`` is ``seen``, or ``heldout`` for the sixth of each word list that training
    never uses, or ``all``.  ``forms`` asks for the sentences and questions of another split than
    the names, or of ``all``.  ``distractors`` is the share of a document's facts that concern other
    entities than its first; without ``rivals`` no two entities of a document are of one type, so
    that an attribute alone tells whose fact is asked for, and there are at most as many facts as
    attributes.  ``pronouns`` is how often a sentence says *it* after one about the same entity.

    >>> generator = EncyclopediaGenerator("test", distractors=0.0)
    >>> record = generator.sample(random.Random(0), n_facts=1, n_questions=1)
    >>> record.questions[0].answers[0] in record.document
    True

    Raises ValueError for an option that is not known.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        vocabulary: str = "open",
        values: Sequence[str] = GROUPS,
        words: str = "seen",
        forms: str | None = None,
        distractors: float = 0.25,
        rivals: bool = True,
        pronouns: float | None = None,
    ) -> None:
        _check_among("split", (split,), ("train", "test"))
        _check_among("vocabulary", (vocabulary,), tuple(LEXICONS))
        _check_among("values", values, GROUPS)
        _check_among("words", (words,), ("seen", "heldout", "all"))
        _check_among("forms", (forms or split,), ("train", "test", "all"))
        if not 0.0 <= distractors < 1.0:
            raise ValueError(f"distractors is a share from 0 to below 1, got {distractors}")
        self.split, self.vocabulary, self.words = split, vocabulary, words
        self.forms: str = forms or split
        self.distractors, self.rivals = distractors, rivals
        self.pronouns = (0.25 if vocabulary == "open" else 0.0) if pronouns is None else pronouns
        self.lexicon: Lexicon = LEXICONS[vocabulary]
        self._attributes = {
            of: tuple(a for a in listed if self.lexicon.group(a.kind) in values)
            for of, listed in self.lexicon.attributes.items()
        }
        self._links = {
            of: tuple(a for a in listed if self._attributes.get(a.kind))
            for of, listed in self._attributes.items()
        }
        self._numbers = {
            of: tuple(a for a in listed if self.lexicon.group(a.kind) == "numbers")
            for of, listed in self._attributes.items()
        }

        self._interviewer = Interviewer(self.lexicon, self._attributes, split, self.forms)

    def sample(
        self,
        rng: random.Random,
        n_facts: int,
        n_questions: int,
        kinds: Sequence[str] = ("recall",),
    ) -> Record:
        """Draw a document of ``n_facts`` facts (1 to 40) and ``n_questions`` different questions.

        The kinds take turns; a kind that the document cannot have (two hops over one fact) leaves
        its turn to the others.  Recall goes through the facts before any is asked a second time.
        Raises ValueError for unknown kinds or values out of range, and when the document has no
        ``n_questions`` different questions.
        """
        _check_among("kinds", kinds, KINDS)
        if not 1 <= n_facts <= MAX_FACTS or n_questions < 1:
            raise ValueError(
                f"a document has 1 to {MAX_FACTS} facts and at least one question, "
                f"got {n_facts} and {n_questions}"
            )
        draft = Draft(rng)
        self._plan(draft, n_facts, kinds)
        document, facts = self._write(draft)
        questions = self._interviewer.ask(draft, n_questions, kinds)
        title = draft.entities[0].name
        return Record(document, questions, facts, f"encyclopedia-{self.split}", title)

    def _plan(self, draft: Draft, n_facts: int, kinds: Sequence[str]) -> None:
        """State the facts: first the entity of the title, then others until there are enough."""
        rng = draft.rng
        main_facts = n_facts - int(self.distractors * n_facts + rng.random())
        types = [
            of
            for of, listed in self._attributes.items()
            if listed
            and ("two_hop" not in kinds or n_facts < 2 or self._links[of])
            and ("numeric" not in kinds or self._numbers[of])
        ] or [of for of, listed in self._attributes.items() if listed]
        main = self._entity(draft, types[int(rng.random() * len(types))])
        wanted: list[Attribute | Rule] = []
        if "two_hop" in kinds and n_facts > 1 and self._links[main.of]:
            wanted.append(rng.choice(self._links[main.of]))
        if "numeric" in kinds and self._numbers[main.of]:
            wanted.append(rng.choice(self._numbers[main.of]))
        if "situational" in kinds:
            wanted.append(rng.choice(self.lexicon.rules[main.of]))
        rng.shuffle(wanted)
        self._describe(draft, main, max(1, min(main_facts, n_facts)), wanted)
        linked = [
            (value, what.kind)
            for _, what, value in draft.stated
            if isinstance(what, Attribute) and what in self._links[main.of]
        ]
        rng.shuffle(linked)
        while len(draft.stated) < n_facts:
            to_compare = "numeric" in kinds and len(draft.entities) == 1 + ("two_hop" in kinds)
            if not self.rivals:
                other = self._stranger(draft, linked)
            elif linked and not to_compare and ("two_hop" in kinds or rng.random() < 0.5):
                name, of = linked.pop()
                other = self._entity(draft, of, name)
            else:
                other = self._entity(draft, main.of)
            rest = n_facts - len(draft.stated)
            if self.rivals and rest > 2 and "two_hop" not in kinds:
                rest = min(rest, 1 + int(rng.random() * _MOST_PER_ENTITY))
            self._describe(draft, other, rest, self._confusable(draft, main, other, kinds))

    def _stranger(self, draft: Draft, linked: Sequence[tuple[str, str]]) -> Entity:
        """Add an entity of a type that the document does not have, a linked one before others.

        Raises ValueError when every type is there.
        """
        there = {entity.of for entity in draft.entities}
        named = {of: name for name, of in linked if of not in there}
        absent = [of for of, listed in self._attributes.items() if listed and of not in there]
        if not absent:
            raise ValueError(
                f"without rivals a document has at most {len(draft.stated)} facts, not more"
            )
        of = draft.rng.choice(list(named) or absent)
        return self._entity(draft, of, named.get(of))

    def _entity(self, draft: Draft, of: str, name: str | None = None) -> Entity:
        if name is None:
            name = self._fresh_name(draft, lambda: self.lexicon.name(draft.rng, of, self.split))
        pronoun = ("she", "he")[draft.rng.random() < 0.5] if of == "person" else "it"
        entity = Entity(name, of, pronoun)
        draft.entities.append(entity)
        return entity

    def _confusable(
        self, draft: Draft, main: Entity, other: Entity, kinds: Sequence[str]
    ) -> list[Attribute | Rule]:
        """Return what is said of the title's entity too: a number to compare, or a trap."""
        if other.of != main.of:
            return []
        shared = [a for a in self._attributes[main.of] if a.name in main.facts]
        draft.rng.shuffle(shared)
        if "numeric" in kinds:
            shared.sort(key=lambda a: a not in self._numbers[main.of])
        return list(shared[:1])

    def _describe(
        self, draft: Draft, entity: Entity, n_facts: int, first: Sequence[Attribute | Rule]
    ) -> None:
        """State up to ``n_facts`` facts about an entity, ``first`` before others."""
        rng = draft.rng
        others: list[Attribute | Rule] = [a for a in self._attributes[entity.of] if a not in first]
        rng.shuffle(others)
        for what in [*first, *others][: min(n_facts, max(_MOST_PER_ENTITY, len(first)))]:
            if isinstance(what, Rule):
                value = draft.fresh(f"{what.kind} over another", self._draw_pair(rng, what))
            elif self.lexicon.group(what.kind) == "names":
                value = self._fresh_name(draft, self._draw_value(rng, what))
            else:
                value = draft.fresh(what.kind, self._draw_value(rng, what))
            draft.state(entity, what, value)

    def _fresh_name(self, draft: Draft, draw: Callable[[], str]) -> str:
        """Draw a name for this document; where names are pairs of words, none shares a word."""
        return draft.fresh("name", draw, apart=self.vocabulary == "closed")

    def _draw_value(self, rng: random.Random, what: Attribute) -> Callable[[], str]:
        return lambda: self.lexicon.draw(rng, what.kind, self.split, self.words)

    def _draw_pair(self, rng: random.Random, what: Rule) -> Callable[[], str]:
        def draw() -> str:
            a = b = self.lexicon.draw(rng, what.kind, self.split, self.words)
            while a == b:
                b = self.lexicon.draw(rng, what.kind, self.split, self.words)
            return f"{a} over {b}"

        return draw

    def _write(self, draft: Draft) -> tuple[str, tuple[Fact, ...]]:
        """Put the facts into sentences, one paragraph an entity, in a drawn order."""
        rng, lexicon = draft.rng, self.lexicon
        facts: list[Fact | None] = [None] * len(draft.stated)
        paragraphs: list[str] = []
        order = list(draft.entities)
        rng.shuffle(order)
        for entity in order:
            indices = list(entity.facts.values())
            rng.shuffle(indices)
            lines: list[str] = []
            for i in indices:
                _, what, value = draft.stated[i]
                if isinstance(what, Rule):
                    form = choose(rng, what.sentences.of(self.forms))
                    a, b = value.split(" over ")
                    text = form.text.format(e=entity.name, a=a, b=b)
                else:
                    form = self._form(rng, what, what.sentences, lexicon.sentence_frames)
                    hidden = bool(lines) and rng.random() < self.pronouns
                    article = lexicon.article(what.kind)
                    text = _say(form.text, entity, what.noun, value, article, hidden)
                lines.append(text[0].upper() + text[1:])
                facts[i] = Fact(entity.name, what.name, value, form.name, lines[-1])
            if lines:
                paragraphs.append(" ".join(lines))
        return "\n".join(paragraphs), tuple(fact for fact in facts if fact is not None)

    def _form(self, rng: random.Random, what: Attribute, own: Forms, frames: Forms) -> Form:
        """Draw a form of the attribute, or a frame for its noun."""
        if frames.train and rng.random() < _SHARE_FRAMES:
            frame = choose(rng, frames.of(self.forms))
            return Form(f"{what.name}/{frame.name}", frame.text)
        return choose(rng, own.of(self.forms))


def _say(text: str, entity: Entity, noun: str, value: str, article: str, hidden: bool) -> str:
    """Fill a sentence form; where ``hidden``, a pronoun stands for the entity if it opens it."""
    subject, possessive = _PRONOUNS[entity.pronoun]
    if hidden and text.startswith("{e}'s "):
        text = possessive + text.removeprefix("{e}'s")
    elif hidden and text.startswith("{e} "):
        text = subject + text.removeprefix("{e}")
    return text.format(e=entity.name, n=noun, v=value, art=article)


def _check_among(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise ValueError(
            f"{name} must be among {', '.join(known)}, got {', '.join(unknown) or '-'}"
        )
