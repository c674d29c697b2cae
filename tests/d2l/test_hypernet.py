"""Initialisation, first gradients and options of the hypernetwork."""

import dataclasses
import math

import pytest
import torch
from d2l_kernels import Segments
from tiny_models import SMALL, adapters, doc_to_lora, hypernet_config, language_model

from d2l.config import LoraConfig
from d2l.hypernet import CopyPath, Hypernet, TargetShapes
from d2l.meter import LiveTensors
from d2l.ridge import apart

TARGETS = TargetShapes(
    (0, 1, 2), {"down_proj": 40, "up_proj": 30}, {"down_proj": 30, "up_proj": 50}
)


def hypernet(**changes) -> Hypernet:
    torch.manual_seed(0)
    changes = {"target_modules": ("down_proj", "up_proj"), "rank": 4} | changes
    return Hypernet(hypernet_config(**changes), TARGETS, 16)


@pytest.mark.parametrize("kind", ["per_layer_activations", "early_exit", "embed_only"])
@pytest.mark.parametrize("chunk_gate", [False, True])
def test_delta_W_is_exactly_zero_at_the_start(kind, chunk_gate):
    loras = adapters(doc_to_lora(trained=False, kind=kind, chunk_gate=chunk_gate), [1, 2])
    for doc in range(2):
        for layer in range(3):
            assert not loras.delta_W(doc, layer, "down_proj").any()
    assert loras.A["down_proj"].any()


def test_initial_values():
    built = hypernet(perceiver=type(SMALL)(d_latent=64, n_latents=300, n_blocks=1))
    d, r, F = 64, 4, 80
    std = {
        "head": 0.5 / math.sqrt(d + F * r),
        "perceiver.encoder.latents": 1.0,
        "bias_A.down_proj": 0.2 / math.sqrt(40 * r),
        "bias_A.up_proj": 0.2 / math.sqrt(30 * r),
    }
    named = dict(built.named_parameters())
    for name, expected in std.items():
        n = named[name].numel()
        assert named[name].std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * n)), name
        assert abs(named[name].mean().item()) < 4 * expected / math.sqrt(n), name
    bounds = {
        "mlps.0.W1": math.sqrt(3 / d),
        "mlps.0.W2": math.sqrt(3 / (4 * d)),
        "mlps.0.b1": math.sqrt(1 / d),
        "mlps.0.b2": math.sqrt(1 / (4 * d)),
        "perceiver.projection.gate.weight": math.sqrt(1 / 16),
        "perceiver.encoder.blocks.0.q.weight": math.sqrt(1 / d),
    }
    for name, bound in bounds.items():
        largest = named[name].abs().max().item()
        assert 0.95 * bound < largest <= bound, name
        uniform = bound / math.sqrt(3)
        assert named[name].std().item() == pytest.approx(uniform, rel=0.1), name
    for name, value in named.items():
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        if name.startswith(("scaler_B", "bias_B")) or (".norm_" in name and name.endswith("bias")):
            assert not value.any(), name
        if name.startswith("scaler_A"):
            assert (value == 1).all(), name


def test_shared_pre_head_mlps_start_like_linear_layers():
    named = dict(hypernet(per_layer_processing=False).named_parameters())
    assert named["mlps.0.W1"].shape == (1, 8, 32)
    assert named["mlps.0.W1"].abs().max() <= math.sqrt(1 / 8)
    assert named["mlps.0.W2"].abs().max() <= math.sqrt(1 / 32)


def test_only_scaler_B_and_bias_B_learn_in_the_first_step():
    built = hypernet()
    features = [torch.randn(9, 16) for _ in range(3)]
    loras = built.compose(built(features, Segments((4, 5))), [2])
    x = torch.randn(6, 40)
    delta = sum(loras.delta_W(0, layer, "down_proj") for layer in range(3))
    other = sum(loras.delta_W(0, layer, "up_proj") for layer in range(3))
    ((x @ delta.T - 1).square().sum() + (x[:, :30] @ other.T - 1).square().sum()).backward()
    moved = {
        name
        for name, p in built.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    expected = {f"{part}.{m}" for part in ("scaler_B", "bias_B") for m in TARGETS.modules}
    assert moved == expected


def test_shared_weights_are_one_module_and_block_0_keeps_its_own_cross_layer():
    perceiver = type(SMALL)(
        **{**vars(SMALL), "n_blocks": 4, "n_self_attn_per_block": 1, "shared_weights": True}
    )
    blocks = hypernet(perceiver=perceiver).perceiver.encoder.blocks
    cross, own = blocks[0::2], blocks[1::2]
    assert len(blocks) == 8
    assert cross[1] is cross[2] is cross[3] is not cross[0]
    assert len(set(map(id, own))) == 1
    assert all(b.norm_context is not None for b in cross)
    assert all(b.norm_context is None for b in own)


@pytest.mark.parametrize("kind", ["per_layer_activations", "early_exit"])
def test_embeddings_are_ordered_by_layer_module_and_rank(kind):
    built = hypernet(kind=kind)
    n_out = (1 if kind == "per_layer_activations" else 3) * 2 * 4
    numbers = torch.arange(float(n_out))[None, :, None].expand(2, -1, 8)
    if kind == "early_exit":
        found = built.assemble([numbers])
        expected = torch.arange(24.0).view(3, 2, 4)
    else:
        found = built.assemble([numbers + 100 * layer for layer in range(3)])
        expected = torch.arange(8.0).view(2, 4) + 100 * torch.arange(3.0)[:, None, None]
    assert found.shape == (2, 3, 2, 4, 8)
    assert torch.equal(found[1, ..., 5], expected)


def test_features_and_layers_must_match():
    with pytest.raises(ValueError, match=r"gave 2 layers' features.*layer 2"):
        hypernet().assemble([torch.zeros(1, 8, 8)] * 2)
    with pytest.raises(ValueError, match="nothing to adapt"):
        Hypernet(hypernet_config(), TargetShapes((), {}, {}), 16)


def test_features_of_layers_that_are_not_adapted_are_not_read(monkeypatch):
    model = doc_to_lora(layers=(1,))
    chunks = [[1, 2, 3, 4], [5, 6, 7]]
    every = []
    segments = model.encoder([torch.tensor(c) for c in chunks], every.append)
    expected = model.hypernet.generate(
        model.hypernet.assemble([model.hypernet.read(f, segments) for f in every])
    )
    calls, read = [], model.hypernet.read
    monkeypatch.setattr(model.hypernet, "read", lambda *a: calls.append(0) or read(*a))
    found = model.encode(chunks)
    assert (len(every), len(calls)) == (3, 1)
    assert torch.allclose(found.A["down_proj"], expected.A["down_proj"], atol=1e-6)
    assert torch.allclose(found.B["down_proj"], expected.B["down_proj"], atol=1e-6)


def test_the_gate_scales_a_chunks_delta_W():
    built = hypernet(chunk_gate=True)
    for m in TARGETS.modules:
        torch.nn.init.ones_(built.scaler_B[m])
    features = [torch.randn(4, 16) for _ in range(3)]
    with torch.no_grad():
        built.gate_bias.fill_(30.0)
        opened = built(features, Segments((4,)))
        built.gate_bias.fill_(-30.0)
        shut = built(features, Segments((4,)))
    assert shut.B["down_proj"].abs().max() < 1e-9 < opened.B["down_proj"].abs().max()
    assert torch.equal(shut.A["down_proj"], opened.A["down_proj"])


def test_modules_and_layers_that_the_base_lacks_are_refused():
    with pytest.raises(ValueError, match=r"no linear 'fc2'; it has .*down_proj"):
        doc_to_lora(target_modules=("fc2",))
    for layers in ((0, 3), (-1,), ()):
        with pytest.raises(ValueError, match="do not fit a base of 3 layers"):
            doc_to_lora(language_model(), layers=layers)


def test_the_multiplier_is_two_r_to_the_three_halves():
    assert LoraConfig(rank=8).multiplier == pytest.approx(45.2548, abs=1e-4)
    assert LoraConfig(rank=4, scale=3.5).multiplier == 3.5


def test_mlp_dropout_acts_in_training_only():
    built = hypernet(mlp_dropout=0.5)
    x = torch.randn(1, 3, 2, 4, 8)
    mlp = built.mlps[0]
    assert not torch.equal(mlp.train()(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))


def test_the_copy_path_reads_one_place_of_its_own_chunk():
    """Against attention written out in float64, one row at a time."""
    torch.manual_seed(0)
    path = CopyPath(6, 5, 4).double()
    features, latents = torch.randn(7, 6).double(), torch.randn(3, 2, 5).double()
    segments = Segments((4, 1, 2))
    found = path(latents, features, segments)
    eps = path.norm_features.eps
    for seg, start, end in ((0, 0, 4), (1, 4, 5), (2, 5, 7)):
        f = features[start:end]
        f = f / (f.square().mean(1, keepdim=True) + eps).sqrt() * path.norm_features.weight
        for row in range(2):
            z = latents[seg, row]
            z = z / (z.square().mean() + eps).sqrt() * path.norm_latents.weight
            scores = torch.stack([path.k.weight @ x @ (path.q.weight @ z) for x in f]) / 2
            expected = sum(
                p * (path.v.weight @ x) for p, x in zip(scores.softmax(0), f, strict=True)
            )
            torch.testing.assert_close(found[seg, row], expected, rtol=1e-9, atol=1e-9)


def test_the_copy_path_adds_to_both_factors_and_starts_at_zero():
    built = hypernet(d_copy=6)
    with torch.no_grad():
        for p in built.scaler_B.values():
            p.fill_(1.0)
    features, segments = [torch.randn(5, 16) for _ in range(3)], Segments((2, 3))
    before = built(features, segments)
    with torch.no_grad():
        built.copy_A.zero_()
        built.copy_B.zero_()
    after = built(features, segments)
    for m in ("down_proj", "up_proj"):
        assert (before.A[m] - after.A[m]).abs().max() > 1e-3
        assert (before.B[m] - after.B[m]).abs().max() > 1e-3
    loras = adapters(doc_to_lora(trained=False, d_copy=6), [1, 2])
    assert not loras.delta_W(1, 2, "down_proj").any()


def test_factors_are_written_in_less_than_twice_their_memory():
    config = hypernet_config(target_modules=("down_proj",), rank=4, d_copy=6)
    built = Hypernet(config, TargetShapes((0, 1, 2), {"down_proj": 400}, {"down_proj": 100}), 16)
    embeddings = torch.randn(32, 3, 1, 4, SMALL.d_latent + 6)
    with torch.no_grad(), LiveTensors() as live:
        factors = built.generate(embeddings)
    written = sum(t.nbytes for t in (*factors.A.values(), *factors.B.values()))
    assert written == 32 * 3 * 4 * 500 * 4
    assert written < live.peak < 2 * written


def saying(d_copy=6) -> tuple[Hypernet, torch.Tensor, Segments]:
    """A hypernetwork of three layers whose features are a state and the embedding after it."""
    torch.manual_seed(0)
    config = hypernet_config(
        kind="early_exit", target_modules=("down_proj",), rank=4, d_copy=d_copy, use_bias=False
    )
    encoder = dataclasses.replace(config.encoder, next_token=True)
    config = dataclasses.replace(config, encoder=encoder, say_next=True)
    built = Hypernet(config, TargetShapes((0, 1, 2), {"down_proj": 9}, {"down_proj": 8}), 16)
    with torch.no_grad():
        built.scaler_B["down_proj"].fill_(1.0)
        built.copy_gain.normal_()
    return built, torch.randn(5, 16), Segments((2, 3))


@pytest.mark.parametrize("d_copy", [6, 8, 3])  # the embedding's width is no multiple of it, or is
def test_a_row_says_the_token_after_the_place_that_it_reads(d_copy):
    built, features, segments = saying(d_copy)
    found = built([features], segments).B["down_proj"]
    gain = built.copy_gain.detach().clone()
    with torch.no_grad():
        built.copy_gain.zero_()
    said = found - built([features], segments).B["down_proj"]
    latents, copy = built.perceiver(features, segments).double(), built.copy.double()
    for chunk, rows in enumerate((features[:2].double(), features[2:].double())):
        q = latents[chunk] / (latents[chunk].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        f = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        score = (q @ copy.q.weight.T) @ (f @ copy.k.weight.T).T / math.sqrt(d_copy)
        read = score.softmax(-1) @ rows[:, 8:]
        unit = read / read.norm(dim=-1, keepdim=True)
        expected = unit.unflatten(0, (3, 4)) * gain[:, 0].double()
        torch.testing.assert_close(said[chunk].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"d_copy": 0}, {"next_token": False}, {"d_out": 9}], ids=lambda c: next(iter(c))
)
def test_saying_needs_a_next_token_and_targets_as_wide_as_an_embedding(changes):
    config = hypernet_config(target_modules=("down_proj",), d_copy=changes.get("d_copy", 6))
    encoder = dataclasses.replace(config.encoder, next_token=changes.get("next_token", True))
    config = dataclasses.replace(config, encoder=encoder, say_next=True)
    targets = TargetShapes((0, 1, 2), {"down_proj": 9}, {"down_proj": changes.get("d_out", 8)})
    with pytest.raises(ValueError, match="say_next needs"):
        Hypernet(config, targets, 16)


def test_a_projection_without_hidden_units_is_one_matrix():
    built = hypernet(perceiver=dataclasses.replace(SMALL, projection_factor=0))
    projection = built.perceiver.projection
    assert [tuple(p.shape) for p in projection.parameters()] == [(SMALL.d_latent, 16)]
    x = torch.randn(3, 16)
    torch.testing.assert_close(projection(x), x @ projection.weight.T)


def test_ridge_sets_a_documents_rows_apart_in_float32_and_learns_the_penalty():
    built, features, segments = saying()
    config = dataclasses.replace(built.config, ridge=True)
    other = Hypernet(config, built.targets, 16)
    missing = other.load_state_dict(built.state_dict(), strict=False).missing_keys
    assert missing == ["scaler_ridge"]
    n = len(segments)
    before, after = (h.compose(h([features], segments), [n]) for h in (built, other))
    rows = n * built.config.lora.rank
    given = before.A["down_proj"][:, :rows]
    expected = apart(given.double(), torch.full((3,), built.config.ridge_start).double())
    torch.testing.assert_close(
        after.A["down_proj"][:, :rows].double(), expected, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(after.A["down_proj"][:, rows:], before.A["down_proj"][:, rows:])
    torch.testing.assert_close(after.B["down_proj"], before.B["down_proj"])
    with torch.autocast("cpu", torch.bfloat16):
        half = other.compose(other([features], segments), [n]).A["down_proj"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, after.A["down_proj"], rtol=0.2, atol=0.2)
    after.A["down_proj"].square().sum().backward()
    assert other.scaler_ridge.grad.abs().min() > 0
    done = other.compose(other([features], segments), [n], apart=True)
    torch.testing.assert_close(done.A["down_proj"], before.A["down_proj"])
