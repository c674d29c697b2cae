"""The closed vocabulary: every word that the generators write and the tiny model knows.

Word lists only.  ``d2l.data`` combines them into documents; ``d2l.lm.tiny`` makes a tokenizer
of them.  They live here because the tokenizer stands below the data.
"""

from __future__ import annotations

REPEAT_BLOCK = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
DIGITS_LINE = "The special magic number is {}."
DIGITS_QUESTION = "What is the special magic number? Reply with only the number."
WORD_LINE = "The special magic word is {}."
WORD_QUESTION = "What is the special magic word? Reply with only the word."


def _split(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


NEEDLE_WORDS = _split(
    "anchor apple arrow atom band berry camera carbon castle clock cloud coin delta doctor "
    "dust echo engine fiber film flag flower fox fruit glass gold grain guard ice ink iron "
    "lake lion mask metal moon mouse museum ocean orange orbit owl oxygen paper planet radio "
    "rain robot rose salt sand shell ship signal snake soup stamp storm sugar summer tower "
    "wave winter wolf zone"
)

DETERMINERS = ("the", "a", "this", "that", "every", "her", "his", "our", "their")
ADJECTIVES = _split(
    "big brave bright brown busy calm cold dear friendly gentle happy heavy kind little lonely "
    "lost merry new proud quiet rich small strange tall tired warm wise young"
)
PEOPLE = _split(
    "baker boy brother child cousin driver farmer girl man mother neighbor painter singer sister "
    "tailor teacher traveler woman"
)
THINGS = _split(
    "basket blanket book box candle chair cup drum hat jar ladder lamp letter map pot rope "
    "stick wheel"
)
PLACES = _split(
    "barn bridge field forest garden gate harbor hill house kitchen market river road village "
    "window yard"
)
TRANSITIVE = _split(
    "bought brought carried dropped found held hid kept moved painted saw sold took watched"
)
INTRANSITIVE = _split("danced laughed rested sang sat slept stood waited walked worked")
PREPOSITIONS = _split("behind below beside by near past toward")
ADVERBS = _split("alone gladly quickly quietly slowly softly together twice")
OPENERS = _split("Later Now Often Soon Sometimes Then Today Yesterday")
CONJUNCTIONS = ("and", "because", "but", "so", "while")

PROSE_WORDS = (
    DETERMINERS
    + ADJECTIVES
    + PEOPLE
    + THINGS
    + PLACES
    + TRANSITIVE
    + INTRANSITIVE
    + PREPOSITIONS
    + ADVERBS
    + OPENERS
    + CONJUNCTIONS
)
