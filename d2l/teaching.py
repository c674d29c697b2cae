"""Give training examples the answers and beliefs of a teacher that reads the document.

The data know what a good teacher says, so a base is not asked token by token: it reads the prompt
with the expected answer behind it, and only where it would have said something else it is asked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .data.example import Example, Query
from .data.record import Record
from .lm.base import LanguageModel, render_chat
from .lm.hooks import decoder_of
from .lm.rows import n_shared
from .teacher import HfTeacher, Taught, Teacher, stop_ids

TOP_K, MAX_ANSWER_TOK = 16, 32
_BATCH = 16
Ids = Sequence[int]
TopK = tuple[tuple[Any, ...], ...]


def taught(
    examples: Sequence[Example], records: Sequence[Record], teacher: Teacher
) -> list[Example]:
    """Replace the answers by those of a teacher that reads the document, with its top 16."""
    texts = [f"{r.document}\n\n{q.text}" for r in records for q in r.questions]
    prompts = [render_chat(teacher.tokenizer, text) for text in texts]
    replies: dict[int, Taught] = {}
    if isinstance(teacher, HfTeacher):
        expected = [q.answer[:MAX_ANSWER_TOK] for e in examples for q in e.queries]
        replies = confirmed(teacher.base, prompts, expected, TOP_K)
    rest = [i for i in range(len(prompts)) if i not in replies]
    asked = teacher.reply([prompts[i] for i in rest], MAX_ANSWER_TOK, TOP_K)
    replies |= dict(zip(rest, asked, strict=True))
    ordered = (replies[i] for i in range(len(prompts)))
    return [
        dataclasses.replace(
            e,
            queries=tuple(
                Query(q.prompt, reply.ids, reply.logprob, reply.idx)
                for q, reply in zip(e.queries, ordered, strict=False)
            ),
        )
        for e in examples
    ]


@torch.no_grad()
def confirmed(
    base: LanguageModel, prompts: Sequence[Ids], expected: Sequence[Ids], k: int
) -> dict[int, Taught]:
    """Return, by index, the greedy replies to those prompts where they are what is ``expected``.

    An expected reply holds the token that ends it; one that the base would go on from, or would
    end sooner, is left out.  What neighbours share (see `families`) is read once, so prompts about
    one document should stand together.  Nothing is confirmed past the end of a sliding window, nor
    by an attention that takes no mask of ours (flash attention).
    """
    found: dict[int, Taught] = {}
    stops = stop_ids(base.model, base.tokenizer)
    reach = getattr(base.model.config.get_text_config(), "sliding_window", None) or math.inf
    longest = max((len(p) + len(e) for p, e in zip(prompts, expected, strict=True)), default=0)
    if base.model.config._attn_implementation not in ("sdpa", "eager") or longest > reach:
        return found
    alike = sorted(families(prompts), key=lambda family: family[0])
    for start in range(0, len(alike), _BATCH):
        for i, logprob, idx in _read(base, alike[start : start + _BATCH], prompts, expected, k):
            best = tuple(row[0] for row in idx)
            ended = [token in stops for token in best]
            if best == tuple(expected[i]) and ended == [False] * (len(ended) - 1) + [True]:
                found[i] = Taught(best, logprob, idx, finished=True)
    return found


def families(prompts: Sequence[Ids]) -> list[tuple[int, list[int]]]:
    """Group neighbours that begin alike: how many tokens they share, and their indices.

    What they share is more than half of each prompt, and never its last token.

    >>> families([[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8]])
    [(3, [0, 1]), (1, [2])]
    """
    found: list[tuple[int, list[int]]] = []
    for i, prompt in enumerate(prompts):
        if found:
            n, members = found[-1]
            shared = n_shared(prompts[i - 1][:n], prompt[:-1])
            if 2 * shared > max(len(prompts[j]) for j in (*members, i)):
                found[-1] = shared, [*members, i]
                continue
        found.append((len(prompt) - 1, [i]))
    return found


def _read(
    base: LanguageModel,
    alike: Sequence[tuple[int, list[int]]],
    prompts: Sequence[Ids],
    expected: Sequence[Ids],
    k: int,
) -> Iterator[tuple[int, TopK, TopK]]:
    """Yield, prompt by prompt, what the base believes at each token of the expected reply.

    One row a family: what it shares, then the rest of each prompt with its reply.  Those have the
    positions that they have alone, and see what is shared and themselves.
    """
    ids, turns, positions, spots = [], [], [], []
    for row, (n, members) in enumerate(alike):
        line, turn, position = list(prompts[members[0]][:n]), [0] * n, [*range(n)]
        for t, i in enumerate(members, start=1):
            rest = [*prompts[i][n:], *expected[i][:-1]]
            line, turn = line + rest, turn + [t] * len(rest)
            position += range(n, n + len(rest))
            spots += [(row, len(line) - j) for j in range(len(expected[i]), 0, -1)]
        ids, turns, positions = [*ids, line], [*turns, turn], [*positions, position]
    decoder, _ = decoder_of(base.model)
    hidden = decoder(
        input_ids=_padded(ids, base.device),
        attention_mask=_branches(_padded(turns, base.device), base.model.dtype),
        position_ids=_padded(positions, base.device),
        use_cache=False,
    ).last_hidden_state
    rows, columns = torch.tensor(spots, device=base.device).T
    logits = base.model.get_output_embeddings()(hidden[rows, columns]).float()
    softcap = getattr(base.model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    best = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), -1)
    asked = [i for _, members in alike for i in members]
    lengths = [len(expected[i]) for i in asked]
    both = (x.split(lengths) for x in (best.values, best.indices))
    for i, values, indices in zip(asked, *both, strict=True):
        logprob, idx = (tuple(map(tuple, x.tolist())) for x in (values, indices))
        yield i, logprob, idx


def _branches(turns: Int[Tensor, "row pos"], dtype: torch.dtype) -> Float[Tensor, "row 1 pos pos"]:
    """Return what attention adds so that each turn sees turn 0 and itself, up to its place."""
    same = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
    hidden = ~same.tril()
    mask = torch.zeros(hidden.shape, dtype=dtype, device=turns.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "row pos"]:
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True).to(device)
