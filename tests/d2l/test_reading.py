"""Reading a document: what it may be, how it streams, and what its adapter is meanwhile."""

import io
import itertools
import random
import tracemalloc

import pytest
import torch
from d2l_kernels import Segments
from tiny_models import doc_to_lora, speaking

from d2l.chunking import cut, split
from d2l.config import ChunkConfig
from d2l.data.example import Batch, Example, Query
from d2l.lm.chat import blocks_of, render_chat, stream_chat
from d2l.lm.vocabulary import PROSE_WORDS
from d2l.model import DocToLoRA
from d2l.reading import sha256_of
from d2l.train import Objective, TrainConfig

MODULES = ("down_proj", "q_proj")


@pytest.fixture(scope="module", params=[False, True], ids=["sums", "ridge"])
def model(request):
    return doc_to_lora(speaking(), target_modules=MODULES, ridge=request.param)


def prose(n_words, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choice(PROSE_WORDS) for _ in range(n_words)) + "."


def pieces(text, seed=0):
    """Cut a text anywhere, as a network would."""
    rng, at = random.Random(seed), 0
    while at < len(text):
        n = rng.randint(1, 40)
        yield text[at : at + n]
        at += n


def weights(adapter):
    return torch.cat([adapter.delta_W(s.layer, s.module).flatten() for s in adapter.sites])


def of_chunks(model, chunks):
    """The delta W of these chunks, by the hypernetwork alone."""
    with torch.no_grad():
        lora = model.hypernet.compose(model.encode(chunks), [len(chunks)])
    pairs = itertools.product(lora.layers, sorted(lora.A))
    return torch.cat([lora.delta_W(0, i, m).flatten() for i, m in pairs])


def test_every_kind_of_document(model, tmp_path):
    text = prose(30)
    whole = model.internalize(text)
    assert whole.sources[0].title == text[:59] + "…"
    assert whole.sources[0].sha256 == sha256_of(text)
    torch.testing.assert_close(weights(whole), of_chunks(model, model.chunks(text)))
    path = tmp_path / "story.txt"
    path.write_text(f"\n{text}  \n")
    file = model.internalize(path)
    assert file.sources[0].title == "story.txt"
    assert file.sources[0].sha256 == whole.sources[0].sha256
    assert torch.equal(weights(file), weights(whole))
    ids = model.base.tokenizer(text, add_special_tokens=False).input_ids
    for given in (ids, tuple(ids), torch.tensor(ids)):
        read = model.internalize(given, title="ids")
        torch.testing.assert_close(weights(read), weights(whole))
        assert read.sources[0].sha256 == sha256_of(ids)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "document is empty"),
        (" \n\t", "document is empty"),
        ([], "document is empty"),
        (iter([]), "document is empty"),
        (iter(["", " ", "\n"]), "document is empty"),
        ([3, -1], "token id -1 is not in 0"),
        ([3, 10**6], "token id 1000000 is not in 0"),
    ],
)
def test_what_is_no_document(model, document, message):
    with pytest.raises(ValueError, match=message):
        model.internalize(document)


@pytest.mark.parametrize("document", [["one", "two"], b"bytes", None, 3.5, {"a": 1}, [True]])
def test_other_types_are_named(model, document):
    """Below the signature, which the tests' type checker guards before our own check."""
    reading = model.read("The sky is blue.")
    with pytest.raises(ValueError, match=f"not a {type(document).__name__}; internalize_batch"):
        reading._open(document)


def test_a_document_below_the_minimum(model):
    strict = DocToLoRA(model.base, model.config, ChunkConfig(max_tok=64, min_tok=40))
    for short in ("The sky is blue.", iter(["The sky ", "is blue."]), [9, 9, 9]):
        with pytest.raises(ValueError, match=r"needs at least 40.*longer document"):
            strict.internalize(short)


def test_special_tokens_are_inert_in_a_stream_too(model):
    tok = model.base.tokenizer
    hostile = "The <end> is <assistant> green <s> <system>. " * 3
    for document in (hostile, iter([hostile]), iter(pieces(hostile))):
        reading = model.read(document)
        ids = [i for chunk in reading._chunks for i in chunk]
        n = sum(ids.count(tok.convert_tokens_to_ids(t)) for t in ("<end>", "<assistant>", "<s>"))
        chunks = len(list(cut([ids], 8, [], [])))
        plain = [i for c in model.read(iter(["The sky is blue. " * 3]))._chunks for i in c]
        of_frame = sum(
            plain.count(tok.convert_tokens_to_ids(t)) for t in ("<end>", "<assistant>", "<s>")
        )
        assert n % 4 == of_frame % 4
        assert chunks


@pytest.mark.parametrize("n_words", [1, 5, 40, 300])
def test_a_stream_is_cut_at_full_length(model, n_words):
    """However the pieces fall, a stream gives the chunks of the templated text at full length."""
    text, tokenizer = prose(n_words), model.base.tokenizer
    whole = render_chat(tokenizer, text)
    prefix, suffix = [2, 4, 3, 5], [3, 6]
    expected = list(cut([whole], model.chunk.max_tok, prefix, suffix))
    for seed in range(3):
        reading = model.read(pieces(f" {text}\n", seed), chunks_at_once=1)
        steps = list(reading)
        assert steps == list(itertools.accumulate(map(len, expected)))
        assert reading.adapter.sources[0].sha256 == sha256_of(text)
        torch.testing.assert_close(
            weights(reading.adapter), of_chunks(model, expected), rtol=1e-4, atol=1e-4
        )


def test_splitting_is_cutting_a_single_piece():
    ids = list(range(23))
    for n in (1, 2, 3, 7, 23):
        size = -(-23 // n)
        assert split(ids, n, [97], [98]) == list(cut([ids], size, [97], [98]))
        assert split(ids, n, [97], [98]) == list(cut(([i] for i in ids), size, [97], [98]))


def test_the_adapter_can_be_used_while_reading_goes_on(model):
    text = prose(42)
    chunks = model.chunks(text)
    reading = model.read(text, title="story", chunks_at_once=3)
    with pytest.raises(ValueError, match="nothing has been read yet"):
        _ = reading.adapter
    assert reading.total_chunks == len(chunks) > 6
    for n, _ in enumerate(reading, 1):
        so_far = min(3 * n, len(chunks))
        assert reading.n_chunks == so_far == len(reading.adapter.chunks)
        torch.testing.assert_close(
            weights(reading.adapter), of_chunks(model, chunks[:so_far]), rtol=1e-4, atol=1e-4
        )
        assert model.ask("Where is the baker?", reading.adapter, max_new_tokens=2)
    assert [n for _, n, _ in reading.adapter.chunks] == [len(c) for c in chunks]


def test_a_long_document_is_folded_without_loss(model):
    """Beyond the rank of a full matrix the chunks are summed; the document can still be removed."""
    text = prose(200)
    chunks = model.chunks(text)
    targets = model.hypernet.targets
    full = max(min(targets.d_in[m], targets.d_out[m]) for m in MODULES)
    assert len(chunks) * model.config.lora.rank > 2 * full
    folded = model.internalize(text, title="long")
    assert folded.sources[0].folded
    assert folded.sources[0].chunk_tok == tuple(map(len, chunks))
    assert folded.rank == full + model.config.lora.rank
    assert not folded.chunks
    expected = of_chunks(model, chunks)
    torch.testing.assert_close(weights(folded), expected, rtol=1e-4, atol=1e-4)
    other = model.internalize(prose(10, seed=1), title="short")
    both = folded + other
    assert len(both.chunks) == len(other.chunks)
    assert both.chunks[0][2].start == full
    torch.testing.assert_close(weights(both.without("long")), weights(other))
    (kept,) = model.internalize_batch([text])
    assert len(kept.chunks) == len(chunks)
    torch.testing.assert_close(weights(kept), expected, rtol=1e-4, atol=1e-4)


def test_the_memory_of_a_stream_does_not_grow(model):
    def words(n):
        for i in range(n):
            yield prose(64, seed=i % 7) + " "

    def peak(n):
        sizes = []
        reading = model.read(words(n), chunks_at_once=16)
        tracemalloc.start()
        for _ in reading:
            held = [t for p in reading._parts for t in (*p.A.values(), *p.B.values())]
            held += [*reading._dense.values(), *reading._grams.values()]
            sizes.append(sum(t.nbytes for t in held))
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return max(sizes), python, reading.n_chunks

    short, long = peak(20), peak(160)
    assert long[2] > 7 * short[2]
    assert long[0] < 1.5 * short[0]
    per_chunk = (long[1] - short[1]) / (long[2] - short[2])
    assert per_chunk < 512, (
        "a chunk leaves its place in the map behind, not its tokens or its graph"
    )


def test_a_stream_reads_no_further_than_it_must(model):
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield prose(300, seed=i) + "\n"

    steps = iter(model.read(endless(), chunks_at_once=2))
    first = next(steps)
    assert first < 100
    assert len(taken) < 40, "a stream is read ahead of what the chunks need"


def test_a_file_object_is_a_stream(model):
    text = "\n".join(prose(9, seed=i) for i in range(6))
    a, b = model.internalize(io.StringIO(text)), model.internalize(iter([text]))
    assert torch.equal(weights(a), weights(b))


def test_more_chunks_than_trained_are_warned_about(model):
    known = DocToLoRA(model.base, model.config, model.chunk, trained_chunks=3)
    short, long = prose(8), prose(40)
    assert len(known.chunks(short)) <= 3 < len(known.chunks(long))
    known.internalize(short)
    with pytest.warns(UserWarning, match=r"more than the 3 chunks of 8 tokens") as seen:
        known.internalize(long)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="more than the 3 chunks") as seen:
        known.internalize(iter([long]))
    assert len(seen) == 1


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_the_stripped_text(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(["word ", "\n\n", "  ", "x" * 300, "é", "。"], k=30_000))
    blocks = list(blocks_of(pieces(text, seed)))
    assert "".join(blocks) == text.strip()
    assert len(blocks) > 10
    assert max(map(len, blocks)) <= 2 * 16_384
    assert not any(b != b.rstrip() for b in blocks)
    assert not list(blocks_of(["", " \n"]))


def test_streamed_ids_are_those_of_the_whole_text(model):
    tokenizer, text = model.base.tokenizer, prose(20_000)
    streamed = [i for ids in stream_chat(tokenizer, blocks_of([text])) for i in ids]
    assert streamed == render_chat(tokenizer, text)


SENTENCES = ("The grass is green.", " The sky is blue and yellow.", " Here. The sun is yellow.")


@pytest.fixture
def by_sentence(model, monkeypatch):
    """Reads sentences apart; each ends with a full stop, for white space is no token here."""
    (stop,) = ids_of(model, ".")

    def ends_of(_, least):
        return lambda piece, i: len(piece) >= least and piece[-1] == stop

    monkeypatch.setattr("d2l.model.ends_of", ends_of)
    found = DocToLoRA(model.base, model.config, ChunkConfig(64, 6, sentences=True))
    found.hypernet.load_state_dict(model.hypernet.state_dict())
    return found


def ids_of(model, text):
    return model.base.tokenizer(text, add_special_tokens=False).input_ids


def test_sentences_are_encoded_together_and_read_apart(model, by_sentence):
    """Against the encoder and the Perceiver by hand, with the sentences found in the text."""
    (chunk,) = by_sentence.chunks("".join(SENTENCES))
    assert chunk == render_chat(model.base.tokenizer, "".join(SENTENCES))
    sizes = [len(ids_of(model, s)) for s in SENTENCES]
    sizes[0] += chunk.index(ids_of(model, SENTENCES[0])[0])
    sizes[-1] += len(chunk) - sum(sizes)
    assert list(map(len, by_sentence.sentences(chunk))) == sizes
    assert model.sentences(chunk) == [chunk]
    features = []
    with torch.no_grad():
        by_sentence.encoder([torch.tensor(chunk)], features.append)
        factors = model.hypernet(features, Segments(tuple(sizes)))
        expected = model.hypernet.compose(factors, [3])
    pairs = itertools.product(expected.layers, sorted(expected.A))
    by_hand = torch.cat([expected.delta_W(0, i, m).flatten() for i, m in pairs])
    found = by_sentence.internalize("".join(SENTENCES))
    assert found.sources[0].chunk_tok == tuple(sizes)
    assert [n for _, n, _ in found.chunks] == sizes
    torch.testing.assert_close(weights(found), by_hand)
    apart = of_chunks(model, by_sentence.sentences(chunk))
    assert (apart - by_hand).norm() > 0.01 * by_hand.norm(), "a sentence sees those before it"


def test_sentences_of_several_documents_in_any_way_of_reading(by_sentence):
    """One by one, in a batch with repeats, as a stream, as ids, in training: the same adapter."""
    texts = ["".join(SENTENCES[i:j]).strip() for i, j in ((0, 3), (0, 1), (1, 3), (0, 3))]
    texts.append("".join(SENTENCES) + " " + prose(70))  # beyond one chunk
    batched = by_sentence.internalize_batch(texts)
    counts = [len(a.chunks) for a in batched]
    assert counts[:4] == [3, 1, 2, 3]
    assert counts[4] > 3
    examples = []
    for text, own in zip(texts, batched, strict=True):
        alone = by_sentence.internalize(text)
        assert alone.sources == own.sources
        torch.testing.assert_close(weights(alone), weights(own))
        examples.append(Example(tuple(map(tuple, by_sentence.chunks(text))), (Query((1,), (2,)),)))
    for i in (0, 2):
        ids = by_sentence.internalize(ids_of(by_sentence, texts[i]))
        stream = by_sentence.internalize(pieces(texts[i]))
        for other in (ids, stream):
            assert other.sources[0].chunk_tok == batched[i].sources[0].chunk_tok
            torch.testing.assert_close(weights(other), weights(batched[i]))
    trained = Objective(by_sentence, TrainConfig()).adapters(Batch.of(examples))
    pairs = list(itertools.product(trained.layers, sorted(trained.A)))
    for i, own in enumerate(batched):
        composed = torch.cat([trained.delta_W(i, *pair).flatten() for pair in pairs])
        torch.testing.assert_close(composed, weights(own))


def test_a_document_of_several_chunks_is_cut_where_sentences_end(by_sentence):
    *several, last = by_sentence.chunks(" ".join(SENTENCES * 7))
    assert len(several) > 1
    for chunk in several:
        assert "." in by_sentence.reader.tokenizer.convert_ids_to_tokens(chunk)[-3:]
        assert 48 <= len(chunk) <= 70
    assert 12 <= len(last) < 70
    for n in range(40, 90):
        pieces = by_sentence.cut_whole([*ids_of(by_sentence, prose(n)), 3])
        assert min(map(len, pieces)) >= 12, "no rest of a chunk stands alone"
    with pytest.raises(ValueError, match=r"needs at least 6"):
        by_sentence.cut_whole([1, 2, 3])


def test_more_sentences_than_trained_are_warned_about(by_sentence):
    by_sentence.trained_chunks = 2
    reading = None
    with pytest.warns(UserWarning, match="more than the 2 sentences that"):
        reading = by_sentence.read("".join(SENTENCES))
    assert (reading.n_chunks, reading.total_chunks) == (0, 3)
    assert len(list(reading)) == 1
    assert (reading.n_chunks, len(reading.adapter.chunks)) == (3, 3)


@pytest.mark.slow
def test_a_document_is_read_sentence_by_sentence():
    try:
        model = DocToLoRA.from_pretrained("fig3/small")
    except OSError as error:
        pytest.skip(str(error))
    model.chunk = ChunkConfig(max_tok=512, min_tok=16, sentences=True)
    sentences = [
        'Marta Quill was born in Port Ellery, at 5 p.m. on a Monday in 1874, they say: "No!"',
        "Émile kept a tame heron in the harbour of the town until the winter of that year.",
        "Yes.",  # too short for a chunk of its own
        "7 boats of the harbour were sold to a merchant from the north for very little.",
    ]
    text = " ".join(sentences)
    (chunk,) = model.chunks(text)
    read = [model.reader.tokenizer.decode(sentence) for sentence in model.sentences(chunk)]
    expected = [*sentences[:2], " ".join(sentences[2:])]
    assert len(read) == 3
    assert all(e in r for e, r in zip(expected, read, strict=True))
    model.trained_chunks = None
    whole, streamed = model.internalize(text), model.internalize(iter([text[:50], text[50:]]))
    assert whole.sources == streamed.sources
    assert whole.sources[0].chunk_tok == tuple(map(len, model.sentences(chunk)))
