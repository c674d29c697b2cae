"""The page on the kernels: their error by dtype, their speed by size, and a GPU's floor on paper.

Errors are measured when the page runs, speed is read from ``kernels/bench/results.csv``, which
`just bench kernels` writes, and the floors are arithmetic; what an H200
took stands in kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from d2l_kernels import (
    Segments,
    cross_attention,
    latent_attention,
    segmented_lora,
    topk_distill,
    use_backend,
)
from torch import Tensor

from ..figures import PaperFigure, draw_kernels
from ..home import repo_root

H100_TBPS, H100_TFLOPS = 3.0, 790.0


def speed() -> pd.DataFrame:
    """Return the newest row of each op, size, direction and form that was measured on a CPU.

    Raises FileNotFoundError where nothing was measured yet.
    """
    path = repo_root() / "kernels/bench/results.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `just bench kernels`")
    keys = ["op", "size", "direction", "form"]
    return pd.read_csv(path).drop_duplicates(keys, keep="last").reset_index(drop=True)


def errors(seed: int = 0) -> pd.DataFrame:
    """Measure each op's error relative to float64 on the same rounded inputs, by dtype."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for op, (fn, inputs) in _cases(seed).items():
            given = [t.to(dtype) for t in inputs]
            with use_backend("reference"):
                exact = fn(*(t.double() for t in given))
            for backend in ("torch", "reference"):
                with use_backend(backend):
                    error = fn(*given).double() - exact
                relative = float(error.norm() / exact.norm())
                name = str(dtype).removeprefix("torch.")
                rows.append({"op": op, "dtype": name, "form": backend, "error": relative})
    return pd.DataFrame(rows)


def floors() -> pd.DataFrame:
    """Compute the least time of gemma-2-2b's work, 4096 tokens in bfloat16, on an H100.

    The larger of bytes moved over 3.0 TB/s and operations over 790 TFLOP/s.  An absorbed block
    costs 32768 operations a latent and token: 16 heads of width 512, scores and sums, 2 each.
    """
    tok, d, ff, vocab, labels, rank, latent = 4096, 2304, 9216, 256000, 1024, 16, 512
    work = {
        "segmented_lora, rank 16, forward": (2 * tok * rank * (ff + d), 2 * tok * (ff + d)),
        "latent_attention, 8 latents, 26 layers": (26 * tok * 32768 * 8, 2 * 26 * tok * latent),
        "topk_distill, 1024 labels, with gradient": (
            4 * labels * d * vocab,
            2 * (2 * d * vocab + 4 * labels * vocab),
        ),
    }
    rows = [
        {
            "work": name,
            "GFLOP": flop / 1e9,
            "MB": moved / 1e6,
            "floor_us": 1e6 * max(flop / (H100_TFLOPS * 1e12), moved / (H100_TBPS * 1e12)),
        }
        for name, (flop, moved) in work.items()
    ]
    return pd.DataFrame(rows)


def figure(seed: int = 0) -> PaperFigure:
    """Draw error by dtype and speed against the written form by size."""
    return draw_kernels(errors(seed), speed())


def _cases(seed: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    g = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tok, rank = Segments((70, 130)), Segments((8, 24))
    target = torch.randint(500, (200, 8), generator=g)
    head, logprob = make(500, 64) / 8, make(200, 8).log_softmax(-1)
    return {
        "segmented_lora": (
            lambda x, A, B: segmented_lora(x, A, B, tok, rank),
            [make(200, 96), make(32, 96), make(32, 64)],
        ),
        "cross_attention": (
            lambda q, k, v: cross_attention(q, k, v, tok),
            [make(2, 8, 4, 32), make(200, 2, 32), make(200, 2, 32)],
        ),
        "latent_attention": (
            lambda q, x, norm, W_k, W_v: latent_attention(q, x, norm, W_k, W_v, tok),
            [make(2, 4, 4, 32), make(200, 64), make(64), make(64, 64) / 8, make(64, 64) / 8],
        ),
        "topk_distill": (
            lambda h: topk_distill(h, head.to(h), logprob, target, 30.0)[0],
            [make(200, 64)],
        ),
    }
