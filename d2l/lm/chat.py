"""Chat templates as token ids: a prompt around a user's text, for any tokenizer.

The text is inert: special tokens spelled out in it become ordinary pieces.  The system message is
empty, as in the published data (spec section 9).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.exceptions import TemplateError

_USER = "zqUserTextqz"
_SYSTEM = "zqSystemTextqz"
_PROBES = ("a", "7 zebras?", "Who. x")
_BLOCK = 16_384


def render_chat(tokenizer: Any, user_text: str, system: str = "") -> list[int]:
    """Return the ids of [system, user text] with the generation prompt.

    Equals ``apply_chat_template`` for a text without special tokens.  A template that refuses or
    drops a system message gets it in front of the user's text, a blank line between.  Without a
    template: the text behind the tokenizer's own opening tokens.  The text is stripped.

    >>> from d2l.lm.tiny import build_tokenizer
    >>> tokenizer = build_tokenizer()
    >>> tokenizer.decode(render_chat(tokenizer, "Here we go."))
    '<s> <system> <end> <user> Here we go. <end> <assistant>'
    """
    return [i for ids in stream_chat(tokenizer, [user_text.strip()], system) for i in ids]


def stream_chat(tokenizer: Any, blocks: Iterable[str], system: str = "") -> Iterator[list[int]]:
    """Yield the ids of `render_chat`, a block of the user's text at a time.

    ``blocks`` are the stripped text in pieces, as `blocks_of` makes them.  Where two meet, the ids
    may differ from those of the whole text by a token or two.
    """
    left, right = _frame(tokenizer, system)
    control, held = _control_tokens(tokenizer, left + right), None
    for block in blocks:
        if held is not None:
            yield _encode_around(tokenizer, left, held, "", control)
            left = ""
        held = block
    yield _encode_around(tokenizer, left, held or "", right, control)


def blocks_of(texts: Iterable[str]) -> Iterator[str]:
    """Strip a text that comes in pieces and yield it in blocks that end before white space.

    The blocks joined are the stripped text.  A block but the last has at most 16,384 characters.

    >>> list(blocks_of(["  Here ", "we", " go. \\n"]))
    ['Here we go.']
    """
    held = ""
    pieces = (t[i : i + _BLOCK] for t in texts for i in range(0, len(t), _BLOCK))
    for text in pieces:
        held = (held + text) if held else text.lstrip()
        while len(held) > 2 * _BLOCK:
            ends = [m.end() for m in re.finditer(r"\S(?=\s)", held[: _BLOCK + 1])]
            at = ends[-1] if ends else _BLOCK
            yield held[:at]
            held = held[at:]
    if held.rstrip():
        yield held.rstrip()


def chat_affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids around a user's text: ``(prefix, suffix)`` of a chunk (spec section 9, T16).

    What stays the same in the ids when the text changes.  Spaces that end the template are
    dropped, as the published constants do (T17).  Without a template: (opening tokens, []).

    >>> from d2l.lm.tiny import build_tokenizer
    >>> chat_affixes(build_tokenizer())
    ([2, 4, 3, 5], [3, 6])
    """
    left, right = _frame(tokenizer, "")
    right = right.rstrip(" ")
    control = _control_tokens(tokenizer, left + right)
    rendered = [_encode_around(tokenizer, left, probe, right, control) for probe in _PROBES]
    prefix = _common(rendered)
    suffix = _common([ids[len(prefix) :][::-1] for ids in rendered])[::-1]
    return prefix, suffix


def _frame(tokenizer: Any, system: str) -> tuple[str, str]:
    """Return the template's text before and after the user's."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        before, after = _opening(tokenizer)
        return before + (f"{system}\n\n" if system else ""), after
    return _framed(tokenizer, system, str(template))


@functools.lru_cache(maxsize=16)
def _framed(tokenizer: Any, system: str, _template: str) -> tuple[str, str]:
    """Render the frame, once for a tokenizer as long as it keeps its template."""
    user = {"role": "user", "content": _USER}
    if _takes_system(tokenizer, user):
        rendered = _render(tokenizer, [{"role": "system", "content": system}, user])
        before, _, after = rendered.partition(_USER)
    else:
        before, _, after = _render(tokenizer, [user]).partition(_USER)
        before += f"{system}\n\n"
    return before, after


def _takes_system(tokenizer: Any, user: dict[str, str]) -> bool:
    try:
        rendered = _render(tokenizer, [{"role": "system", "content": _SYSTEM}, user])
    except TemplateError:
        return False
    return _SYSTEM in rendered and _USER in rendered


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _opening(tokenizer: Any) -> tuple[str, str]:
    """Return the tokens, spelled out, that a tokenizer without a template puts in front."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    added = full[: len(full) - len(plain)] if full[-len(plain) :] == plain else full[:1]
    added = [i for i in added if i == tokenizer.bos_token_id]
    return "".join(tokenizer.convert_ids_to_tokens(added)), ""


def _encode_around(
    tokenizer: Any, left: str, text: str, right: str, control: dict[str, None]
) -> list[int]:
    """Tokenize ``left + text + right`` with ``control`` tokens active outside ``text`` only."""
    pattern = re.compile("|".join(map(re.escape, control)) or "(?!)")
    if not pattern.search(text):
        return _encode(tokenizer, left + text + right)
    opened = list(pattern.finditer(left))
    closed = pattern.search(right)
    cut = opened[-1].end() if opened else 0
    end = closed.start() if closed else len(right)
    inner = left[cut:] + text + right[:end]
    ids = tokenizer(inner, add_special_tokens=False, split_special_tokens=True).input_ids
    if not control.keys().isdisjoint(map(tokenizer.convert_ids_to_tokens, ids)):
        # Added, not flagged special, and yet used by the template: break each spelling in two.
        cuts = [m.start() + 1 for m in pattern.finditer(inner)]
        parts = [inner[a:b] for a, b in zip([0, *cuts], [*cuts, len(inner)], strict=True)]
        ids = [i for part in parts for i in _encode(tokenizer, part)]
    return _encode(tokenizer, left[:cut]) + ids + _encode(tokenizer, right[end:])


def _control_tokens(tokenizer: Any, frame: str) -> dict[str, None]:
    """List the special tokens, and other added ones that the template uses, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    spelled = {t.content for t in added if t.special or (t.content.strip() and t.content in frame)}
    return dict.fromkeys(sorted(spelled, key=len, reverse=True))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def _common(lists: list[list[int]]) -> list[int]:
    out: list[int] = []
    for column in zip(*lists, strict=False):
        if len(set(column)) > 1:
            break
        out.append(column[0])
    return out
