"""Composition of chunks and application of many adapters to one batch."""

import copy
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from d2l_kernels import Segments
from ridge_reference import regressed
from tiny_models import adapters, chunks, doc_to_lora, language_model

from d2l.lm.hooks import applied, decoder_of, linears_of
from d2l.lora import ChunkLora, LoraBatch, compose, route_packed, route_rows

LAYERS, R, D_IN, D_OUT = 2, 3, 5, 4


def chunk_lora(n, seed=0, modules=("down_proj", "o_proj")):
    g = torch.Generator().manual_seed(seed)

    def draw(d):
        return torch.randn(n, LAYERS, R, d, generator=g, dtype=torch.float64)

    return ChunkLora({m: draw(D_IN) for m in modules}, {m: draw(D_OUT) for m in modules})


def bias(seed=9):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        {
            m: torch.randn(LAYERS, R, d, generator=g, dtype=torch.float64)
            for m in ("down_proj", "o_proj")
        }
        for d in (D_IN, D_OUT)
    )


@pytest.mark.parametrize("times", [None, [1.0, 3.0, 1.0, 2.0]])
def test_all_rows_of_a_document_and_no_others_are_set_apart_together(times):
    """Chunks that occur several times are as many equal ones; the bias comes on top."""
    parts, learned = chunk_lora(4), bias()
    penalties = {
        m: torch.tensor(p, dtype=torch.float64)
        for m, p in {"down_proj": [0.02, 0.3], "o_proj": [2.0, 0.1]}.items()
    }
    weights = None if times is None else torch.tensor(times)
    loras = compose(
        parts, [1, 3], layers=(0, 1), multiplier=2.0, bias=learned, weights=weights,
        penalties=penalties,
    )  # fmt: skip
    copies = [int(n) for n in times or [1] * 4]
    for doc, chunks_of in enumerate(([0], [1, 2, 3])):
        rows = [c for c in chunks_of for _ in range(copies[c])]
        for layer, m in itertools.product(range(LAYERS), penalties):
            A, B = (torch.cat([f[m][c, layer] for c in rows]) for f in (parts.A, parts.B))
            said = regressed(A.numpy(), B.numpy(), penalties[m][layer].item())
            always = learned[1][m][layer].mT @ learned[0][m][layer]
            found = loras.delta_W(doc, layer, m)
            torch.testing.assert_close(found, 2 * (torch.tensor(said) + always))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.0, 2.0, 0.5]])
def test_delta_W_is_the_weighted_sum_over_chunks_plus_the_bias_once(with_bias, weights):
    parts, learned, n_chunks = chunk_lora(5), bias(), [2, 3]
    loras = compose(
        parts, n_chunks, layers=(1, 4), multiplier=0.7, bias=learned if with_bias else None,
        weights=None if weights is None else torch.tensor(weights),
    )  # fmt: skip
    assert loras.rank.lengths == tuple((n + with_bias) * R for n in n_chunks)
    for doc, module, row in itertools.product(range(2), parts.A, range(LAYERS)):
        expected = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
        for c in ((0, 1), (2, 3, 4))[doc]:
            w = 1.0 if weights is None else weights[c]
            for r in range(R):
                expected += w * torch.outer(parts.B[module][c, row, r], parts.A[module][c, row, r])
        if with_bias:
            expected += learned[1][module][row].T @ learned[0][module][row]
        found = loras.delta_W(doc, (1, 4)[row], module)
        torch.testing.assert_close(found, 0.7 * expected, rtol=0, atol=1e-12)


def test_chunks_stay_in_order_and_the_bias_comes_last():
    parts, learned = chunk_lora(3), bias()
    loras = compose(parts, [1, 2], layers=(0, 1), multiplier=1.0, bias=learned)
    rows = loras.A["o_proj"].split(R, 1)
    expected = [
        parts.A["o_proj"][0],
        learned[0]["o_proj"],
        *parts.A["o_proj"][1:],
        learned[0]["o_proj"],
    ]
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))


@pytest.mark.parametrize("n_chunks", [[1, 1], [3, 0], [4], []])
def test_counts_that_do_not_add_up_are_refused(n_chunks):
    with pytest.raises(ValueError, match="must be >= 1 each and add up to 3"):
        compose(chunk_lora(3), n_chunks, layers=(0, 1), multiplier=1.0)


def test_documents_alone_and_side_by_side():
    loras = compose(chunk_lora(4), [1, 3], layers=(0, 1), multiplier=2.0, bias=bias())
    again = LoraBatch.cat([loras[0], loras[1]])
    assert again.rank == loras.rank
    assert all(torch.equal(again.A[m], loras.A[m]) for m in loras.A)
    assert all(torch.equal(again.B[m], loras.B[m]) for m in loras.B)
    for wrong in (2, -1):
        with pytest.raises(IndexError, match=str(wrong)):
            loras[wrong]
    other = compose(chunk_lora(1), [1], layers=(0, 1), multiplier=3.0)
    with pytest.raises(ValueError, match="different hypernetworks"):
        LoraBatch.cat([loras, other])


def test_picking_from_parts_and_taking():
    parts = [chunk_lora(2, seed=1), chunk_lora(3, seed=2)]
    picked = ChunkLora.pick(parts, [(1, 2), (0, 0), (1, 2)])
    assert torch.equal(picked.B["o_proj"][0], parts[1].B["o_proj"][2])
    assert torch.equal(picked.A["o_proj"][1], parts[0].A["o_proj"][0])
    taken = parts[1].take(torch.tensor([2, 0]))
    assert torch.equal(taken.A["down_proj"], parts[1].A["down_proj"][[2, 0]])


# application to a model

MODULES = ("down_proj", "q_proj")


@pytest.fixture(scope="module")
def model():
    return doc_to_lora(target_modules=MODULES)


@pytest.fixture(scope="module")
def loras(model):
    return adapters(model, [1, 3, 2])


def merged(model, loras, doc):
    """A copy of the base with one document's delta W inside its weights."""
    lm = copy.deepcopy(model.base.model)
    decoder, name = decoder_of(lm)
    with torch.no_grad():
        for index, layer in enumerate(getattr(decoder, name)):
            for module in MODULES:
                linears_of(layer)[module].weight += loras.delta_W(doc, index, module)
    return lm


@torch.no_grad()
def alone(model, loras, doc, ids):
    lm = model.base.model if doc < 0 else merged(model, loras, doc)
    return lm(input_ids=ids[None]).logits[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "docs", [[0, 1, 2], [2, 0, 1], [1, 1, 0, 2], [-1, 2, -1, 0], [-1, -1], [1], [2, 2, 0]]
)
def test_rows_equal_merged_weights_in_any_order(model, loras, docs):
    rows = torch.stack(chunks(*[6] * len(docs), seed=3))
    with applied(model.base.model, route_rows(loras, docs)):
        found = model.base.model(input_ids=rows).logits
    for row, doc, ids in zip(found, docs, rows, strict=True):
        torch.testing.assert_close(row, alone(model, loras, doc, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("docs", [[0, 2], [2, 0], [-1, 1]])
def test_rows_that_generate_has_expanded(model, loras, docs):
    rows = torch.stack(chunks(6, 6, seed=3))
    with applied(model.base.model, route_rows(loras, docs)):
        once = model.base.model(input_ids=rows).logits
        thrice = model.base.model(input_ids=rows.repeat_interleave(3, 0)).logits
    torch.testing.assert_close(thrice, once.repeat_interleave(3, 0), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_beams_of_generate_keep_their_document(model, loras):
    lm, rows = model.base.model, torch.stack(chunks(4, 4, seed=5))
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with applied(lm, route_rows(loras, [2, 0])):
        both = lm.generate(rows, attention_mask=torch.ones_like(rows), **options)
    for i, doc in enumerate((2, 0)):
        one = merged(model, loras, doc).generate(
            rows[i : i + 1], attention_mask=torch.ones_like(rows[:1]), **options
        )
        assert both[i].tolist() == one[0].tolist()


@torch.no_grad()
def test_one_packed_row(model, loras):
    pieces = chunks(4, 3, 5, seed=6)
    positions = torch.cat([torch.arange(len(p)) for p in pieces])[None]
    with applied(model.base.model, route_packed(loras, [4, 3, 5])):
        found = model.base.model(
            input_ids=torch.cat(pieces)[None], position_ids=positions, use_cache=False
        ).logits[0]
    for doc, (logits, ids) in enumerate(zip(found.split([4, 3, 5]), pieces, strict=True)):
        torch.testing.assert_close(logits, alone(model, loras, doc, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threads_never_see_each_others_adapters(model, loras):
    rows = torch.stack(chunks(8, seed=7))
    expected = [alone(model, loras, doc, rows[0]) for doc in range(3)]
    start, wrong = threading.Barrier(3), []

    def work(doc):
        start.wait()
        for _ in range(25):
            with torch.no_grad(), applied(model.base.model, route_rows(loras, [doc])):
                found = model.base.model(input_ids=rows).logits[0]
            if not torch.allclose(found, expected[doc], atol=1e-4):
                wrong.append(doc)

    threads = [threading.Thread(target=work, args=(doc,)) for doc in range(3)]
    with applied(model.base.model, route_rows(loras, [0])):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_wrong_routes_are_refused(model, loras):
    for docs in ([3], [0, -2]):
        with pytest.raises(ValueError, match="is not among the 3 adapters"):
            route_rows(loras, docs)
    rows = torch.stack(chunks(4, 4, 4))
    with (
        applied(model.base.model, route_rows(loras, [0, 1])),
        pytest.raises(ValueError, match="does not fit 2 routed rows"),
    ):
        model.base.model(input_ids=rows)


def test_dropout_acts_in_training_only(loras):
    noisy = LoraBatch(**{**vars(loras), "dropout": 0.5})
    x = torch.randn(1, 6, loras.A["q_proj"].shape[2])
    plain = route_rows(loras, [0])(0, "q_proj", x)
    assert torch.equal(route_rows(noisy, [0])(0, "q_proj", x), plain)
    assert not torch.allclose(route_rows(noisy, [0], training=True)(0, "q_proj", x), plain)
    torch.manual_seed(0)
    dropped = route_rows(noisy, [0], training=True)(0, "q_proj", x)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, route_rows(loras, [0])(0, "q_proj", F.dropout(x, 0.5)))


def test_modules_and_layers_that_are_not_adapted_get_nothing(loras):
    delta = route_rows(loras, [0])
    assert delta(0, "up_proj", torch.zeros(1, 2, 16)) is None
    assert delta(7, "q_proj", torch.zeros(1, 2, 16)) is None


def test_some_layers_only():
    model = doc_to_lora(language_model(), layers=(0, 2))
    loras = adapters(model, [1, 2])
    assert loras.layers == (0, 2)
    assert loras.A["down_proj"].shape[0] == 2
    assert isinstance(loras.rank, Segments)
    assert route_rows(loras, [0])(1, "down_proj", torch.zeros(1, 2, 32)) is None
    assert route_rows(loras, [0])(2, "down_proj", torch.ones(1, 2, 32)).abs().max() > 0
