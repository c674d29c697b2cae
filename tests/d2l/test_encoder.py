"""Encoder features against `output_hidden_states` of the whole model, in several families."""

import pytest
import torch
from tiny_models import FAMILIES, FINAL_NORM, chunks, language_model

from d2l.config import EncoderConfig
from d2l.lm.encoder import ContextEncoder
from d2l.lm.hooks import decoder_of

LENGTHS = (5, 2, 7)


def features(model, config, ids, layout="padded"):
    found = []
    segments = ContextEncoder(model, config)(ids, found.append, layout=layout)
    assert segments.lengths == tuple(map(len, ids))
    return found


@torch.no_grad()
def reference(model, family, kind, ids, n_run):
    """One chunk at a time through the whole model, hidden states stored."""
    decoder, _ = decoder_of(model)
    norm = getattr(decoder, FINAL_NORM.get(family, "norm"))
    states = [model(input_ids=c[None], output_hidden_states=True).hidden_states for c in ids]
    joined = [torch.cat([s[i][0] for s in states]) for i in range(len(states[0]))]
    if kind == "embed_only":
        return [joined[0]]
    last = joined[-1] if n_run == len(joined) - 1 else norm(joined[n_run])
    return [*joined[:n_run], last] if kind == "per_layer_activations" else [last]


CONFIGS = [
    (EncoderConfig(), 2),
    (EncoderConfig(last_layer=2), 1),
    (EncoderConfig(last_layer=4), 3),
    (EncoderConfig("early_exit", layer_idx=1), 1),
    (EncoderConfig("early_exit"), 3),
    (EncoderConfig("embed_only"), 0),
]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("config", "n_run"), CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_stored_hidden_states(family, config, n_run, layout):
    model, ids = language_model(family).model, chunks(*LENGTHS)
    found = features(model, config, ids, layout)
    expected = reference(model, family, config.kind, ids, n_run)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("config", "n_run"), CONFIGS)
def test_it_stops_at_the_last_layer_that_it_needs(config, n_run):
    model, ran = language_model().model, []
    decoder, name = decoder_of(model)
    for i, layer in enumerate(getattr(decoder, name)):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    features(model, config, chunks(3))
    assert ran == list(range(n_run))
    assert len(getattr(decoder, name)) == 3


def test_chunks_of_equal_length_need_no_mask():
    model, ids = language_model().model, chunks(4, 4)
    together = features(model, EncoderConfig(), ids)
    apart = [features(model, EncoderConfig(), [c]) for c in ids]
    for a, b, c in zip(together, *apart, strict=True):
        torch.testing.assert_close(a, torch.cat([b, c]), rtol=1e-5, atol=1e-5)


def test_the_model_runs_without_gradient_and_the_consumer_with_it():
    model, scale = language_model().model, torch.ones((), requires_grad=True)
    model.requires_grad_(True)
    seen = []

    def consume(feature):
        assert torch.is_grad_enabled()
        assert not feature.requires_grad
        seen.append((feature * scale).sum())

    ContextEncoder(model, EncoderConfig())(chunks(3, 4), consume)
    sum(seen).backward()
    assert scale.grad is not None
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        ContextEncoder(model, EncoderConfig())(
            chunks(3), lambda f: seen.append(torch.is_grad_enabled())
        )
    assert seen[-1] is False


@pytest.mark.parametrize(
    "config",
    [EncoderConfig(last_layer=5), EncoderConfig(last_layer=0), EncoderConfig("early_exit", 4)],
)
def test_layers_that_are_not_there_are_refused(config):
    with pytest.raises(ValueError, match="the encoder has 3 layers"):
        ContextEncoder(language_model().model, config)


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_empty_chunks_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        ContextEncoder(language_model().model, EncoderConfig())(chunks(*lengths), print)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_features_are_joined_with_the_next_token(layout):
    model, ids = language_model().model, chunks(*LENGTHS, 1)
    config = EncoderConfig("early_exit", layer_idx=1, next_token=True)
    (found,) = features(model, config, ids, layout)
    (plain,) = features(model, EncoderConfig("early_exit", layer_idx=1), ids, layout)
    assert found.shape[1] == ContextEncoder(model, config).d_model == 2 * plain.shape[1]
    torch.testing.assert_close(found[:, : plain.shape[1]], plain)
    table, row = model.get_input_embeddings().weight, 0
    for chunk in ids:
        for after in [*chunk[1:].tolist(), None]:
            expected = torch.zeros(table.shape[1])
            if after is not None:
                expected = table[after] / table[after].square().mean().sqrt()
            torch.testing.assert_close(found[row, plain.shape[1] :], expected, rtol=1e-3, atol=1e-3)
            row += 1


def test_states_of_unit_scale_have_a_mean_square_of_one():
    model, ids = language_model().model, chunks(*LENGTHS, 1)
    config = EncoderConfig("per_layer_activations", next_token=True, unit_scale=True)
    plain = features(model, EncoderConfig("per_layer_activations"), ids)
    for own, state in zip(features(model, config, ids), plain, strict=True):
        scaled = state / state.square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(own[:, : state.shape[1]], scaled, rtol=1e-3, atol=1e-3)


def nested_chunks(vocab=50):
    """Chunks that begin alike, in lexical order, the last two alone: 4 + 1 + 1 of them a row."""
    a, b, c = (x.tolist() for x in chunks(9, 4, 6, vocab=vocab))
    return [torch.tensor(x) for x in (a[:6], a, [*a[:7], *b], [*a[:7], *b[:2]], c, [7])], (4, 1, 1)


@pytest.mark.parametrize(("config", "n_run"), CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_in_one_row_do_not_see_each_other(family, config, n_run):
    model, (ids, per_row) = language_model(family).model, nested_chunks()
    encoder, found = ContextEncoder(model, config), []
    assert encoder.shares(longest=11)
    segments = encoder(ids, found.append, layout="padded", per_row=per_row)
    assert segments.lengths == tuple(map(len, ids))
    expected = reference(model, family, config.kind, ids, n_run)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_chunks_share_is_computed_once():
    model, (ids, per_row) = language_model().model, nested_chunks()
    n_tok = []
    decoder, name = decoder_of(model)
    getattr(decoder, name)[0].register_forward_hook(
        lambda _, args, out: n_tok.append(out.shape[:2])
    )
    ContextEncoder(model, EncoderConfig())(ids, lambda _: None, per_row=per_row)
    assert n_tok == [(3, 9 + 4)]  # of 6 + 9 + 11 + 9 tokens of the first row


def test_rows_are_shared_only_where_that_changes_nothing():
    hybrid = language_model("lfm2", layer_types=["conv", "full_attention", "conv"]).model
    assert not ContextEncoder(hybrid, EncoderConfig()).shares(8)
    assert not ContextEncoder(hybrid, EncoderConfig())._branches
    assert not ContextEncoder(hybrid.bfloat16(), EncoderConfig())._branches
    types = [[["global", "local"], 1], [["local"], 1]]
    local = language_model("gpt_neo", attention_types=types, num_layers=3, window_size=6)
    assert not ContextEncoder(local.model, EncoderConfig()).shares(6)
    eager = language_model().model
    eager.set_attn_implementation("eager")
    assert ContextEncoder(eager, EncoderConfig()).shares(8)
    short = language_model("mistral", sliding_window=10).model
    assert ContextEncoder(short, EncoderConfig()).shares(10)
    assert not ContextEncoder(short, EncoderConfig()).shares(11)
    flash = ContextEncoder(language_model().model, EncoderConfig())
    flash.layout = "packed"
    assert not flash.shares(8)
    assert ContextEncoder(language_model().model.bfloat16(), EncoderConfig()).shares(8)
