"""Inputs for every kernel op, small and ragged, and the op as a function of its tensors alone."""

from dataclasses import dataclass
from functools import partial

import torch
from d2l_kernels import (
    Segments,
    cross_attention,
    latent_attention,
    segmented_lora,
    topk_distill,
)

RAGGED = {
    "equal": (4, 4),
    "ragged": (5, 1, 7),
    "empty segment": (0, 3, 0, 2),
    "one token": (1,),
    "long": (70, 130),
}


@dataclass
class Case:
    """Tensors that may require gradients, and ``fn(*tensors)``."""

    tensors: list[torch.Tensor]
    fn: object


def lora(lengths, g, make, ranks=(3, 0, 2, 5), d_in=6, d_out=5):
    rank = Segments.of(ranks[i % 4] for i in range(len(lengths)))
    if len(set(lengths)) == 1:
        rank = Segments((ranks[0],) * len(lengths))
    tok = Segments(lengths)
    tensors = [make(tok.total, d_in), make(rank.total, d_in), make(rank.total, d_out)]
    return Case(tensors, lambda x, A, B: segmented_lora(x, A, B, tok, rank, 1.7))


def cross(lengths, g, make, n_latents=3, d_head=8):
    tok = Segments(lengths)
    tensors = [make(len(lengths), n_latents, 4, d_head)]
    tensors += [make(tok.total, 2, d_head), make(tok.total, 2, d_head)]
    return Case(tensors, lambda q, k, v: cross_attention(q, k, v, tok))


def latent(lengths, g, make, n_latents=3, d_latent=12):
    tok = Segments(lengths)
    tensors = [
        make(len(lengths), n_latents, 4, 8), make(tok.total, d_latent), make(d_latent) + 1,
        make(16, d_latent), make(16, d_latent),
    ]  # fmt: skip
    return Case(tensors, lambda *t: latent_attention(*t, tok, 1e-5))


def distill(lengths, g, make, softcap=None, vocab=17, k=4):
    n = sum(lengths)
    order = torch.rand(n, vocab, generator=g).argsort(-1)[:, :k]
    logprob = (torch.randn(n, k, generator=g, dtype=torch.float64).log_softmax(-1) - 0.1).float()
    weight = torch.rand(n, generator=g, dtype=torch.float64).float()
    head = make(vocab, 6)

    def fn(hidden):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        teacher_logprob, weights = (t.to(hidden.device, wide) for t in (logprob, weight))
        args = (teacher_logprob, order.to(hidden.device), softcap, weights)
        return topk_distill(hidden, head.to(hidden), *args)[0]

    return Case([make(n, 6)], fn)


OPS = {
    "segmented_lora": lora,
    "cross_attention": cross,
    "latent_attention": latent,
    "latent_attention, many": partial(latent, n_latents=40),
    "topk_distill": distill,
    "topk_distill, softcap": partial(distill, softcap=2.0),
}

# more than one tile every way, and no whole number of them, with the lengths to run each at
WIDE = {
    "segmented_lora, wide": partial(lora, ranks=(70, 0, 9, 33), d_in=1030, d_out=70),
    "cross_attention, wide": partial(cross, n_latents=37, d_head=40),
    "latent_attention, wide": partial(latent, n_latents=19, d_latent=70),
    "topk_distill, wide": partial(distill, softcap=2.0, vocab=4300, k=37),
}
WIDE_LENGTHS = {
    "segmented_lora, wide": (67, 0, 1, 3),
    "cross_attention, wide": (600, 0, 1, 70),
    "latent_attention, wide": (600, 0, 1, 70),
    "topk_distill, wide": (4, 0, 3),
}


def case(op, lengths, dtype=torch.float64, seed=0):
    """Build the case of an op; float64 inputs are rounded to ``dtype``, so all dtypes compare."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return (OPS | WIDE)[op](lengths, g, make)


def run(one, d_out=None):
    """Return the output and the gradient of every tensor, for a fixed output gradient."""
    tensors = [t.detach().clone().requires_grad_() for t in one.tensors]
    out = one.fn(*tensors)
    g = torch.Generator().manual_seed(1)
    d_out = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out)
    grads = torch.autograd.grad((out * d_out).sum(), tensors)
    return out.detach(), *grads
