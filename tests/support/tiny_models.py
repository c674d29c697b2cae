"""Tiny random language models of many families, made in milliseconds."""

from types import SimpleNamespace

import torch
from d2l_kernels import Segments
from transformers import AutoConfig, AutoModelForCausalLM

from d2l.config import (
    ChunkConfig,
    EncoderConfig,
    HypernetConfig,
    LoraConfig,
    PerceiverConfig,
)
from d2l.lm.base import LanguageModel
from d2l.lm.tiny import build_tokenizer
from d2l.model import DocToLoRA

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "phi", "gpt_neox")
MLP_OUT = {"phi": "fc2", "gpt_neox": "dense_4h_to_h"}
FINAL_NORM = {"phi": "final_layernorm", "gpt_neox": "final_layer_norm"}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = PerceiverConfig(d_latent=8, n_latents=3, n_blocks=2, n_heads=4, n_kv_heads=2, d_head=4)


def language_model(family: str = "llama", seed: int = 0, **sizes) -> LanguageModel:
    """Make a random base in float32, with weights large enough to matter."""
    options = {**SIZES, **sizes}
    if family in ("phi", "gpt_neox"):
        del options["head_dim"]
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if "gemma" in family else 1.0, std=0.2)
    return LanguageModel(model, SimpleNamespace(pad_token_id=0), f"random-{family}")


def speaking(family: str = "llama", seed: int = 0, dtype=torch.float32, **sizes) -> LanguageModel:
    """Make a random base with the tiny word-level tokenizer: it can read and answer."""
    tokenizer = build_tokenizer()
    base = language_model(family, seed, vocab_size=len(tokenizer), **sizes)
    base.model.generation_config.eos_token_id = None
    return LanguageModel(base.model.to(dtype), tokenizer, base.name)


def hypernet_config(**changes) -> HypernetConfig:
    """Make a small configuration; keywords replace fields of `HypernetConfig` or `LoraConfig`."""
    lora = {
        k: changes.pop(k) for k in ("rank", "scale", "target_modules", "layers") if k in changes
    }
    lora = LoraConfig(**{"rank": 2, "target_modules": ("down_proj",), **lora})
    kind = changes.pop("kind", "per_layer_activations")
    return HypernetConfig(
        **{"perceiver": SMALL, "lora": lora, "encoder": EncoderConfig(kind=kind), **changes}
    )


def doc_to_lora(
    base: LanguageModel | None = None, *, seed: int = 1, trained: bool = True, **changes
) -> DocToLoRA:
    """Make a small model; ``trained`` moves it off its initial delta W = 0."""
    base = base or language_model()
    torch.manual_seed(seed)
    model = DocToLoRA(base, hypernet_config(**changes), ChunkConfig(max_tok=8, min_tok=2))
    if trained:
        for name, parameter in model.hypernet.named_parameters():
            if "scaler" in name or "bias_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.hypernet.eval()
    return model


def chunks(*lengths: int, seed: int = 0, vocab: int = 50) -> list[torch.Tensor]:
    """Draw token ids of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def adapters(model: DocToLoRA, n_chunks: list[int], seed: int = 0, n_tok: int = 5):
    """Internalise random chunks: one adapter for every entry of ``n_chunks``."""
    ids = chunks(*[n_tok] * sum(n_chunks), seed=seed)
    features: list[torch.Tensor] = []
    with torch.no_grad():
        model.encoder(ids, features.append)
        factors = model.hypernet(features, Segments.of(map(len, ids)))
        return model.hypernet.compose(factors, n_chunks)
