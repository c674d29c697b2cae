"""Released checkpoints: every live option against a naive implementation, and what is refused."""

import copy
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import naive
import pytest
import torch
from d2l_kernels import Segments
from published_files import write

from d2l.checkpoint import load_hypernet
from d2l.hypernet import Hypernet
from d2l.published import convert, read_published, shapes, to_published

GOLDEN = os.environ.get("D2L_GOLDEN_DIR")
needs_golden = pytest.mark.skipif(not GOLDEN, reason="D2L_GOLDEN_DIR is not set")
LENGTHS = (4, 2, 3)

VARIANTS = {
    "plain": {},
    "self attention": {"self_blocks": 2, "blocks": 3},
    "shared": {"shared": True, "blocks": 4},
    "shared self attention": {"shared": True, "blocks": 3, "self_blocks": 1},
    "one block": {"blocks": 1, "self_blocks": 1, "shared": True},
    "early exit": {"kind": "early_exit"},
    "embeddings": {"kind": "embed_only"},
    "three modules": {"modules": ("up_proj", "down_proj", "q_proj")},
    "early exit, two modules": {"kind": "early_exit", "modules": ("q_proj", "down_proj")},
    "shared mlp": {"per_layer": False},
    "two shared mlps, two modules": {
        "per_layer": False,
        "mlps": 2,
        "modules": ("q_proj", "up_proj"),
    },
    "three mlps": {"mlps": 3},
    "no mlp": {"mlps": 0},
    "no bias": {"bias": False},
    "no bias, early exit": {"bias": False, "kind": "early_exit", "mlps": 2},
}


def build(config, state) -> Hypernet:
    ours, renamed = convert(state, config)
    built = Hypernet(ours, shapes(config), config["aggregator"]["feature_size"])
    built.load_state_dict(renamed)
    return built.eval()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_equal_a_naive_implementation(variant):
    config = naive.options(**VARIANTS[variant])
    state = naive.state(config)
    n_features = config["aggregator"]["num_layers"]
    if not config["aggregator"]["layer_to_layer_ctx_encoder"]:
        n_features = 1
    torch.manual_seed(0)
    features = [[torch.randn(n, 10).double() for _ in range(n_features)] for n in LENGTHS]
    packed = [torch.cat([chunk[i] for chunk in features]) for i in range(n_features)]
    built = build(config, state).double()
    found = built(packed, Segments(LENGTHS))
    expected = naive.factors(config, state, features)
    assert found.A.keys() == expected.keys()
    for m, (A, B) in expected.items():
        torch.testing.assert_close(found.A[m], A, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.B[m], B, rtol=0, atol=1e-10)
    loras = built.compose(found, [1, 2])
    assert loras.multiplier == config["lora_alpha"]
    r, m = config["lora_r"], config["target_modules_sorted"][-1]
    assert loras.rank.lengths == tuple((n + config["use_bias"]) * r for n in (1, 2))
    delta = sum(torch.outer(expected[m][1][0, 1, i], expected[m][0][0, 1, i]) for i in range(r))
    if config["use_bias"]:
        delta = delta + (state[f"bias_B.{m}"][1].T @ state[f"bias_A.{m}"][1]).double()
    torch.testing.assert_close(
        loras.delta_W(0, 1, m), loras.multiplier * delta, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layout_survives_the_way_back(variant):
    config = naive.options(**VARIANTS[variant])
    state = naive.state(config)
    back = to_published(build(config, state), build(config, state).state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_options_reach_the_configuration():
    config = naive.options(kind="early_exit", r=4) | {
        "lora_dropout": 0.25,
        "layer_indices": [1, 3, 4],
    }
    config |= {"dropout_rate": 0.5, "per_layer_processing": False}
    config["ctx_encoder_args"] |= {
        "layer_idx": 2, "ctx_encoder_last_layer": 3, "ctx_encoder_model_name_or_path": "org/other",
    }  # fmt: skip
    ours, _ = convert(naive.state(config), config)
    assert (ours.encoder.kind, ours.encoder.layer_idx, ours.encoder.last_layer) == (
        "early_exit",
        2,
        3,
    )
    assert ours.encoder.model == "org/other"
    assert (ours.lora.rank, ours.lora.multiplier, ours.lora.dropout) == (4, 16.0, 0.25)
    assert ours.lora.layers == shapes(config).layers == (1, 3, 4)
    assert ours.mlp_dropout == 0.5


def test_options_without_effect_are_ignored():
    config = naive.options()
    dead = {
        "use_light_weight_lora": True, "light_weight_latent_size": 3, "use_token_mixing": True,
        "use_per_rank_bias": True, "dropout_rate": 0.9, "extra_modules": None,
    }  # fmt: skip
    plain = convert(naive.state(config), config)[0]
    config["aggregator"] |= {"pooling_type": "max", "num_latent_factor": 99}
    assert convert(naive.state(config), config | dead)[0] == plain


def test_older_files_have_four_mlps_and_a_bias():
    config = naive.options(mlps=4)
    state = {f"_orig_mod.{k}": t for k, t in naive.state(config).items()}
    del config["num_pre_head_layers"], config["use_bias"]
    ours, _ = convert(state, config)
    assert ours.n_pre_head_layers == 4
    assert ours.use_bias


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        (None, {"per_rank_gen": False}, "published code itself fails"),
        ("aggregator", {"per_rank_gen": False}, "published code itself fails"),
        ("aggregator", {"aggregator_type": "pooler"}, "aggregator_type='pooler'"),
        ("aggregator", {"num_extra_modules": 1}, "num_extra_modules=1"),
        (None, {"extra_modules": ["lm_head"]}, "lm_head"),
        ("aggregator", {"output_size": 7}, "output_size=7"),
        ("aggregator", {"lora_r": 9}, "lora_r=9"),
        ("aggregator", {"layer_to_layer_ctx_encoder": False}, "layer_to_layer_ctx_encoder=False"),
        ("aggregator", {"num_layers": 4}, "head.weight|layers"),
        (None, {"target_modules_sorted": ["q_proj"]}, "contradicts itself"),
        (None, {"layer_indices": [0, 1]}, "contradicts itself"),
        (None, {"latent_size": "6"}, "output_size=6"),
        ("ctx_encoder_args", {"ctx_encoder_type": "pooled"}, "'pooled'|layer_to_layer"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(where, change, message):
    config = naive.options()
    state = naive.state(config)
    (config if where is None else config[where]).update(change)
    with pytest.raises(ValueError, match=message):
        convert(state, config)


def test_a_configuration_that_lacks_something_is_refused():
    for key in ("lora_alpha", "aggregator", "feature_sizes"):
        config = naive.options()
        state = naive.state(config)
        del config[key]
        with pytest.raises(ValueError, match=f"lacks '{key}'"):
            convert(state, config)


KEY = "aggregator.perceiver.encoder.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda s: s.pop(KEY), f"missing '{KEY}'"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected 'extra'"),
        (lambda s: s.update({KEY: torch.zeros(512, 7)}), r"k_proj.weight' has shape \(512, 7\)"),
        (lambda s: s.update({"head.weight": torch.zeros(3, 1, 6, 19)}), "'head.weight' has shape"),
        (lambda s: s[KEY].fill_(float("nan")), "k_proj.weight' holds values that are not finite"),
        (lambda s: s.update({KEY: s[KEY].long()}), "floating-point"),
        (lambda s: s.update({KEY: "text"}), "got str"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tamper, message):
    config = naive.options()
    state = naive.state(config)
    tamper(state)
    with pytest.raises(ValueError, match=message):
        convert(state, config)


def test_shared_tensors_that_differ_are_refused():
    config = naive.options(shared=True, blocks=4)
    state = naive.state(config)
    state["aggregator.perceiver.encoder.layers.3.mlp.up_proj.weight"][0, 0] += 1
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp.*layers\.3\.mlp.*share weights but differ"
    ):
        convert(state, config)


def test_a_file_written_in_the_released_format(tmp_path):
    config = naive.options(modules=("q_proj", "down_proj"), bias=False)
    config["ctx_encoder_args"]["ctx_encoder_model_name_or_path"] = "org/base"
    state = naive.state(config)
    found = read_published(write(tmp_path / "model.bin", config, state))
    expected, renamed = convert(state, config)
    assert found.base_name == "org/base"
    assert found.config.encoder.model is None
    assert found.config.lora == expected.lora
    assert found.targets == shapes(config)
    assert all(torch.equal(found.state[k], renamed[k]) for k in renamed)
    assert found.hypernet().training is False


def test_an_encoder_of_another_name_is_kept(tmp_path):
    config = naive.options()
    config["ctx_encoder_args"]["ctx_encoder_model_name_or_path"] = "org/reader"
    found = read_published(write(tmp_path / "model.bin", config, naive.state(config)))
    assert found.config.encoder.model == "org/reader"


def test_an_older_file(tmp_path):
    config = naive.options(mlps=4)
    state = {f"_orig_mod.{k}": t for k, t in naive.state(config).items()}
    path = write(tmp_path / "old.bin", config, state, drop=("num_pre_head_layers", "use_bias"))
    assert read_published(path).config.n_pre_head_layers == 4


class Foreign:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (Foreign(), "posix.system"),
        (Path("x"), "pathlib"),
        (pickle.Pickler, "pickle.Pickler"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_a_foreign_class_in_the_pickle_is_refused_and_named(tmp_path, extra, named):
    config = naive.options()
    path = write(tmp_path / "foreign.bin", config, naive.state(config), extra=extra)
    with pytest.raises(ValueError, match=rf"foreign\.bin names .*{named}.*refused"):
        read_published(path)


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.bin does not exist"):
        read_published(tmp_path / "none.bin")
    path = write(tmp_path / "whole.bin", naive.options(), naive.state(naive.options()))
    whole = path.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_published(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list")
    with pytest.raises(ValueError, match="holds a list"):
        read_published(tmp_path / "list")
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="it lacks 'hypernet_config'"):
        read_published(tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match="zip cannot be read"):
        read_published(tmp_path / "zip")


@needs_golden
def test_golden_file_is_converted_to_our_format(tmp_path):
    source = Path(GOLDEN or "") / "checkpoint_ab" / "pytorch_model.bin"
    published = read_published(source)
    published.saved(source.name).save(tmp_path / "ours")
    saved = load_hypernet(tmp_path / "ours")
    assert saved.config == published.config
    assert (saved.base_name, saved.base_fingerprint) == ("gemma2-tiny", None)
    assert (saved.chunk.max_tok, saved.chunk.min_tok, saved.trained_chunks) == (512, 25, 8)
    assert saved.metadata["imported_from"] == "pytorch_model.bin"
    state = saved.hypernet.state_dict()
    assert all(torch.equal(state[k], published.state[k]) for k in state)


@needs_golden
def test_neither_peft_nor_the_published_package_is_imported():
    source = Path(GOLDEN or "") / "checkpoint_ab" / "pytorch_model.bin"
    code = (
        "import sys; sys.modules['peft'] = None; sys.modules['ctx_to_lora'] = None; "
        "from d2l.published import read_published; "
        f"print(read_published({str(source)!r}).base_name)"
    )
    root = Path(naive.__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "gemma2-tiny", done.stderr


def test_the_input_is_left_alone():
    config = naive.options()
    state = naive.state(config)
    before, options = dict(state), copy.deepcopy(config)
    convert(state, config)
    assert state.keys() == before.keys()
    assert config == options
