"""The tiny base: a real Llama configuration and a word-level tokenizer, small enough for any CPU.

Every word of the closed vocabulary is a token, as are each digit, each punctuation mark and the
line break.  Training it is `d2l.tiny_training`'s work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import vocabulary

WINDOW_TOK = 512
_SPECIALS = ("<pad>", "<unk>", "<s>", "<end>", "<system>", "<user>", "<assistant>")
_TEMPLATE = (
    "<s>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def needle_vocabulary() -> list[str]:
    """List the words of the needle task, sorted."""
    sentences = [
        vocabulary.REPEAT_BLOCK,
        vocabulary.DIGITS_LINE,
        vocabulary.DIGITS_QUESTION,
        vocabulary.WORD_LINE,
        vocabulary.WORD_QUESTION,
        *(word.capitalize() for word in vocabulary.DETERMINERS),
        *vocabulary.PROSE_WORDS,
        *vocabulary.NEEDLE_WORDS,
    ]
    words = sorted({word for text in sentences for word in re.findall(r"[A-Za-z]+", text)})
    return words


def build_tokenizer(words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer; words outside the vocabulary become ``<unk>``.

    The ids go through specials, marks, digits and then ``words``; by default the needle's.

    Decoding puts spaces between words and none inside numbers or before marks.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.decode(tokenizer("The number is 4829.").input_ids)
    'The number is 4829.'
    """
    listed = needle_vocabulary() if words is None else words
    tokens = [*_SPECIALS, "\n", *".,?!", *"0123456789", *listed]
    ids = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|[0-9]|[^\s\w]"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
        ]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])| (?=[.,?!\n])|(?<=\n) "), ""),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<end>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def build_config(
    tokenizer: PreTrainedTokenizerFast,
    width: int,
    n_layers: int,
    n_heads: int | None = None,
    rope_theta: float = 10_000.0,
) -> LlamaConfig:
    """Return the configuration: heads of 32, feed-forward of 3 widths, a window of 512 tokens.

    There are ``width / 32`` heads unless ``n_heads`` says otherwise.  The usual initial spread of
    0.02 is too small for such widths: retrieval then takes three times as many steps to appear.
    """
    special: dict[str, Any] = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "<end>"))
    }
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads or width // 32,
        num_key_value_heads=n_heads or width // 32,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        max_position_embeddings=WINDOW_TOK,
        initializer_range=0.06,
        tie_word_embeddings=True,
        **special,
    )


def build_model(
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    width: int = 128,
    n_layers: int = 4,
    n_heads: int | None = None,
    rope_theta: float = 10_000.0,
) -> LlamaForCausalLM:
    """Return the untrained model; the same seed gives the same weights."""
    config = build_config(tokenizer or build_tokenizer(), width, n_layers, n_heads, rope_theta)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@torch.no_grad()
def look_back(model: Any, distances: Sequence[int], sharpness: float = 8.0) -> None:
    """Let head i of the first layer start out attending to the token ``distances[i]`` before.

    What an induction head needs first, and what takes the longest to appear.  Dimension 0 of every
    embedding becomes one constant, which the output's softmax does not see; queries and keys that
    see nothing else differ by their rotations alone, so that the score of a token d before is
    ``sharpness sum_j cos((distance - d) theta_j)`` over some of the rotation's frequencies, the
    higher ones for near tokens.  Branches into the stream start smaller than usual, so that they do
    not drown it.
    """
    embedding = model.get_input_embeddings().weight
    spread = float(embedding.std())
    constant = 3 * spread
    embedding[:, 0] = constant
    seen = constant / float(embedding.square().mean().sqrt())
    first = model.model.layers[0].self_attn
    half = first.head_dim // 2
    theta = model.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    size = (sharpness * first.head_dim**0.5) ** 0.5 / seen
    for head, distance in enumerate(distances):
        slow = distance // 4
        for weight, turned in ((first.q_proj.weight, 0), (first.k_proj.weight, distance)):
            rows = weight[head * 2 * half : (head + 1) * 2 * half]
            rows *= 0.3
            rows[:, 0] = 0
            for j in range(slow, slow + 3 + slow):
                rows[j, 0] = size * (turned * theta[j]).cos()
                rows[j + half, 0] = size * (turned * theta[j]).sin()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.5
        layer.mlp.down_proj.weight *= 0.2
