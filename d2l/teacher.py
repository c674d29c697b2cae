"""A language model as a teacher: its replies with the log-probabilities of its best tokens.

`HfTeacher` runs a loaded base, `VllmTeacher` an engine of vLLM where that is installed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .lm.base import KNOWN_BASES, LanguageModel, load_base


@dataclass(frozen=True)
class Taught:
    """A reply: its token ids, and for each the ``k`` best log-probabilities and their ids.

    ``finished`` tells whether the model ended the reply itself, with a token that is kept.
    """

    ids: tuple[int, ...]
    logprob: tuple[tuple[float, ...], ...]
    idx: tuple[tuple[int, ...], ...]
    finished: bool


@runtime_checkable
class Teacher(Protocol):
    """An engine that replies; ``identity`` names its model and weights."""

    tokenizer: Any
    identity: str

    def reply(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, k: int) -> list[Taught]:
        """Reply greedily to templated prompts, in their order."""
        ...


class HfTeacher:
    """A base that replies through HF ``generate``, ``batch`` prompts of similar length at once.

    With ``top_p`` tokens are drawn from the likeliest that make up that probability.
    """

    def __init__(self, base: LanguageModel, batch: int = 16, top_p: float | None = None) -> None:
        self.base, self.batch, self.tokenizer = base, batch, base.tokenizer
        self.identity = f"{base.name} {base.fingerprint[:16]}"
        self.choosing: dict[str, Any] = {"do_sample": False}
        if top_p is not None:
            self.choosing = {"do_sample": True, "top_p": top_p, "top_k": 0}
            self.identity += f" top-p {top_p}"

    @torch.no_grad()
    def reply(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, k: int) -> list[Taught]:
        """Reply; ``k`` 0 leaves the log-probabilities out."""
        replies: dict[int, Taught] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            taught = self._generate([prompts[i] for i in part], max_new_tokens, k)
            replies |= dict(zip(part, taught, strict=True))
        return [replies[i] for i in range(len(prompts))]

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, k: int
    ) -> list[Taught]:
        model, device = self.base.model, self.base.device
        pad = self.tokenizer.pad_token_id
        pad = 0 if pad is None else pad
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        recorder = _TopK(k)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            **self.choosing,
            pad_token_id=pad,
            logits_processor=[recorder] if k else [],
        )
        stops = stop_ids(model, self.tokenizer)
        replies = []
        for row, new in enumerate(out[:, width:].tolist()):
            end = next((i + 1 for i, token in enumerate(new) if token in stops), None)
            kept = new[:end]
            logprob, idx = recorder.rows(row, len(kept)) if k else ((), ())
            replies.append(Taught(tuple(kept), logprob, idx, end is not None))
        return replies


class VllmTeacher:
    """A model served by vLLM in this process; ``options`` go to ``vllm.LLM``.

    Raises ImportError where vLLM is not installed.
    """

    def __init__(self, model: str, *, max_k: int = 20, **options: Any) -> None:
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "vLLM is not installed: pip install 'd2l-core[serve]' on a machine with a GPU, or "
                "use HfTeacher"
            ) from error
        self._engine = LLM(model=model, max_logprobs=max_k, **options)
        self.tokenizer = self._engine.get_tokenizer()
        self.identity = f"{model} served by vLLM"

    def reply(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, k: int) -> list[Taught]:
        """Reply greedily; vLLM schedules the batches."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        wanted = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, logprobs=k or None)
        asked = [{"prompt_token_ids": list(p)} for p in prompts]
        replies = []
        for answered in self._engine.generate(asked, wanted, use_tqdm=False):
            out = answered.outputs[0]
            rows = [
                sorted(best.items(), key=lambda item: -item[1].logprob)[:k]
                for best in out.logprobs or ()
            ]
            logprob = tuple(tuple(b.logprob for _, b in row) for row in rows)
            idx = tuple(tuple(token for token, _ in row) for row in rows)
            replies.append(Taught(tuple(out.token_ids), logprob, idx, out.finish_reason == "stop"))
        return replies


def load_teacher(name: str, **options: Any) -> Teacher:
    """Return vLLM's engine where it is installed and there is a GPU, else a base with `HfTeacher`.

    ``options`` go to vLLM alone.  A base of ours by name (`d2l.lm.base.KNOWN_BASES`) is never given
    to vLLM.  Raises what `d2l.lm.base.load_base` raises.
    """
    served = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
    if served and name not in KNOWN_BASES:
        return VllmTeacher(name, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HfTeacher(load_base(name, device=device))


class _TopK:
    """Record the best tokens of every step of ``generate``; change nothing."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float().log_softmax(-1).topk(min(self.k, scores.shape[-1]), -1)
        self.steps.append((best.values.cpu(), best.indices.cpu()))
        return scores

    def rows(
        self, row: int, n: int
    ) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[int, ...], ...]]:
        """Return log-probabilities and ids of the first ``n`` tokens of one row."""
        logprob = tuple(tuple(values[row].tolist()) for values, _ in self.steps[:n])
        return logprob, tuple(tuple(indices[row].tolist()) for _, indices in self.steps[:n])


def check_finite(taught: Taught, about: str) -> None:
    """Raise FloatingPointError naming ``about`` when a log-probability is not a number."""
    bad = [x for row in taught.logprob for x in row if math.isnan(x) or x == math.inf]
    if bad:
        raise FloatingPointError(
            f"the teacher gave the log-probability {bad[0]} for {about}: run it in float32 or "
            "bfloat16, and check its weights"
        )


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that end a reply."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {i for i in (*listed, tokenizer.eos_token_id) if i is not None}
