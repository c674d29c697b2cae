import itertools
import random
import time

import pytest

from d2l.data.needle import N_DEPTHS, NeedleConfig, NeedleGenerator, needle_words
from d2l.data.prose import prose_line
from d2l.lm import vocabulary
from d2l.lm.tiny import build_tokenizer

FORMS = list(itertools.product(("repeat", "prose"), ("digits", "word")))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(("filler", "needle"), FORMS)
def test_sample_keeps_the_bin_and_its_ids_are_the_text(tokenizer, filler, needle):
    generator, rng = NeedleGenerator(tokenizer, filler, needle), random.Random(0)
    for low in (40, 100, 900):
        sample = generator.sample(rng, low, low + 40)
        assert sample.document_ids == tokenizer(sample.document).input_ids
        assert low <= sample.n_tok == len(sample.document_ids) <= low + 40
        lines = sample.document.split("\n")
        assert [sample.answer in line for line in lines].count(True) == 1
        assert len(lines) >= 2


def test_repeat_is_the_noise_block(tokenizer):
    document = NeedleGenerator(tokenizer).sample(random.Random(0), 100, 130).document
    rest = [line for line in document.split("\n") if "magic" not in line]
    assert set(rest) == {vocabulary.REPEAT_BLOCK}


@pytest.mark.parametrize(("filler", "needle"), FORMS)
def test_depths_are_balanced_and_where_they_say(tokenizer, filler, needle):
    samples = NeedleGenerator(tokenizer, filler, needle).stratified(20, 1000, 1200, seed=3)
    assert [s.depth for s in samples] == [i % N_DEPTHS for i in range(20)]
    for sample in samples:
        lines = sample.document.split("\n")
        place = next(i for i, line in enumerate(lines) if "magic" in line)
        assert sample.depth == place * N_DEPTHS // len(lines)


def test_few_blocks_take_the_nearest_depth(tokenizer):
    generator = NeedleGenerator(tokenizer)
    for depth, place in ((0, 0), (4, 0), (9, 1)):
        lines = generator.sample(random.Random(0), 35, 35, depth).document.split("\n")
        assert "magic" in lines[place]


def test_stratified_depends_on_the_seed_alone(tokenizer):
    first, again, other = (
        NeedleGenerator(tokenizer, "prose").stratified(5, 60, 90, seed) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(("filler", "needle"), FORMS)
def test_train_and_test_documents_are_disjoint(tokenizer, filler, needle):
    drawn = []
    for split in ("train", "test"):
        generator, rng = NeedleGenerator(tokenizer, filler, needle, split), random.Random(0)
        drawn.append({generator.sample(rng, 36, 90).document for _ in range(60)})
    assert not drawn[0] & drawn[1]


@pytest.mark.parametrize("words", ["seen", "heldout", "all"])
def test_every_small_word_document_has_both_splits(tokenizer, words):
    for split, depth in itertools.product(("train", "test"), (0, 4, 9)):
        generator = NeedleGenerator(tokenizer, "repeat", "word", split, words)
        for n in range(1, 9):
            assert generator.sample(random.Random(0), 25 * n + 6, 25 * n + 8, depth)


def test_heldout_words_are_not_seen(tokenizer):
    seen, heldout = set(needle_words("seen")), set(needle_words("heldout"))
    assert not seen & heldout
    assert seen | heldout == set(needle_words("all")) == set(vocabulary.NEEDLE_WORDS)
    generator, rng = NeedleGenerator(tokenizer, "repeat", "word"), random.Random(0)
    assert {generator.sample(rng, 36, 90).answer for _ in range(400)} <= seen


def test_digits_have_leading_zeros_and_cover_the_range(tokenizer):
    generator, rng = NeedleGenerator(tokenizer), random.Random(0)
    answers = [generator.sample(rng, 36, 90).answer for _ in range(500)]
    assert all(len(a) == 4 and a.isdigit() for a in answers)
    assert {a[0] for a in answers} == set("0123456789")


def test_prose_is_closed_varied_and_free_of_needles(tokenizer):
    rng = random.Random(0)
    lines = ["".join(prose_line(rng)) for _ in range(200)]
    used = {word.lower() for line in lines for word in line.replace(",", "").rstrip(".").split()}
    used = {word.rstrip(".") for word in used}
    assert used <= {word.lower() for word in vocabulary.PROSE_WORDS}
    assert len(vocabulary.PROSE_WORDS) <= 150
    assert not used & {*vocabulary.NEEDLE_WORDS, "special", "magic"}
    assert not any(ch.isdigit() for line in lines for ch in line)
    assert len(set(lines)) > 195


def test_vocabularies_do_not_overlap():
    assert len(set(vocabulary.NEEDLE_WORDS)) == 64
    assert len(set(vocabulary.PROSE_WORDS)) == len(vocabulary.PROSE_WORDS)


def test_non_additive_tokenizer_is_measured_exactly(tokenizer):
    class Merging:
        """Counts two words as one across line breaks, so that lines do not add up."""

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            return type("Out", (), {"input_ids": ids[: len(ids) - text.count("\n")]})

    for filler in ("repeat", "prose"):
        generator = NeedleGenerator(Merging(), filler)
        sample = generator.sample(random.Random(0), 200, 260)
        assert sample.document_ids == Merging()(sample.document).input_ids
        assert 200 <= sample.n_tok <= 260


def test_a_long_document_takes_no_quadratic_work(tokenizer):
    generator, rng = NeedleGenerator(tokenizer), random.Random(0)
    start = time.process_time()
    assert generator.sample(rng, 130_000, 131_072).n_tok >= 130_000
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    ("bin_", "message"),
    [((40, 38), r"min_tok \(40\) is larger"), ((70, 72), "nearest lengths: 60, 85")],
)
def test_infeasible_bins_say_so(tokenizer, bin_, message):
    with pytest.raises(ValueError, match=message):
        NeedleGenerator(tokenizer).sample(random.Random(0), *bin_)
    with pytest.raises(ValueError, match="nearest length"):
        NeedleGenerator(tokenizer, "prose").sample(random.Random(0), 3, 6)


def test_unknown_options_are_refused(tokenizer):
    for field in ("filler", "needle", "words"):
        with pytest.raises(ValueError, match=f"{field} must be one of .*'no'"):
            NeedleConfig(**{field: "no"})
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        NeedleGenerator(tokenizer, split="val")
    with pytest.raises(ValueError, match="depth must lie in"):
        NeedleGenerator(tokenizer).sample(random.Random(0), 100, 130, depth=10)
