"""Finding a decoder's linears and adding to them, in several families of models."""

import pytest
import torch
from tiny_models import FAMILIES, MLP_OUT, chunks, language_model

from d2l.lm.hooks import applied, decoder_of, instrument, linears_of, widths_of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_linear_of_the_mlp_is_found(family):
    model = language_model(family).model
    decoder, name = decoder_of(model)
    layers = getattr(decoder, name)
    assert len(layers) == 3
    linear = linears_of(layers[0])[MLP_OUT.get(family, "down_proj")]
    assert widths_of(linear) == (32, 16)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_equals_a_changed_weight_and_leaves_no_trace(family):
    model = language_model(family).model
    decoder, name = decoder_of(model)
    module = MLP_OUT.get(family, "down_proj")
    extra = 0.1 * torch.randn(16, 32)
    ids = torch.stack(chunks(5))
    before = model(input_ids=ids).logits
    instrument(model)

    def delta(layer, which, x):
        return x @ extra.T if (layer, which) == (1, module) else None

    with applied(model, delta):
        found = model(input_ids=ids).logits
        with applied(model, None):
            assert torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(model(input_ids=ids).logits, found)
    assert torch.equal(model(input_ids=ids).logits, before)
    linears_of(getattr(decoder, name)[1])[module].weight += extra
    torch.testing.assert_close(model(input_ids=ids).logits, found, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-3


def test_hooks_are_registered_once_and_an_error_resets_them():
    model = language_model().model
    instrument(model)
    instrument(model)
    calls = []

    def delta(layer, module, x):
        calls.append((layer, module))
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), applied(model, delta):
        model(input_ids=torch.stack(chunks(3)))
    assert calls == [(0, "q_proj")]
    model(input_ids=torch.stack(chunks(3)))
    assert len(calls) == 1


def test_the_output_embedding_gets_its_rows_contiguous():
    model = language_model().model
    instrument(model)
    ids, seen = torch.stack(chunks(5, 5)), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, out: seen.append(args[0].is_contiguous()))
    last = model(input_ids=ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, model(input_ids=ids).logits[:, -1:])
    assert seen == [True, True]


def test_another_models_update_is_not_applied():
    one, other = language_model(seed=0).model, language_model(seed=1).model
    instrument(one)
    instrument(other)
    ids = torch.stack(chunks(3))
    with torch.no_grad():
        before = other(input_ids=ids).logits
        with applied(one, lambda layer, module, x: 1e9 * torch.ones(())):
            assert torch.equal(other(input_ids=ids).logits, before)


def test_repeated_names_are_told_apart():
    layer = torch.nn.ModuleDict(
        {"a": torch.nn.ModuleDict({"w": torch.nn.Linear(2, 3)}),
         "b": torch.nn.ModuleDict({"w": torch.nn.Linear(3, 2), "v": torch.nn.Linear(2, 2)})}
    )  # fmt: skip
    assert sorted(linears_of(layer)) == ["a-w", "b-w", "v"]


def test_a_model_without_layers_is_refused():
    model = language_model().model
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 decoder layers"):
        decoder_of(model)
