"""`Adapter`: one or several documents as LoRA factors, with their provenance and their algebra.

An adapter is a value: every operation returns a new one.  Making adapters is `d2l.model`'s work,
other formats are `d2l.export`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from d2l_kernels import Segments
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .home import replacing
from .lm.hooks import Site
from .lora import Factors, LoraBatch

_FORMAT = "d2l-adapter-1"


@dataclass(frozen=True)
class Source:
    """A document inside an adapter.

    ``sha256`` is of its stripped text (UTF-8), or of its token ids; ``chunk_tok`` holds the tokens
    of each chunk, template included; ``rows`` counts its rows of the rank axis.  A document whose
    rank reached that of a full matrix is ``folded``: its chunks are summed, their map is gone.
    """

    sha256: str
    title: str
    chunk_tok: tuple[int, ...]
    rows: int
    weight: float = 1.0
    folded: bool = False


class Chunk(NamedTuple):
    """A chunk of an adapter: its document, its number there, its tokens, its rank rows."""

    document: Source
    index: int
    n_tok: int
    rows: slice


@dataclass(frozen=True, eq=False)
class Adapter:
    """Documents as a LoRA adapter of one base model.

    ``delta W = multiplier * strength * (sum_d w_d sum_c B_dc^T A_dc + bias_B^T bias_A)``
    over documents d with weight ``w_d`` and their chunks c.  The hypernetwork's learned bias, which
    belongs to no document, counts once per composition, as it does for one long document: ``a + b``
    is what one document made of both texts' chunks would be.  Strength scales all of delta W,
    bias included, so strength 0 is the base; a weight scales one document alone.

    ``A[module]`` is (layer, rank, d_in) and ``B[module]`` (layer, rank, d_out), the rank axis
    document after document, the bias last; a layer with narrower linears uses leading columns.
    """

    A: Factors = field(repr=False)
    B: Factors = field(repr=False)
    sources: tuple[Source, ...]
    sites: tuple[Site, ...] = field(repr=False)
    multiplier: float
    base_name: str
    base_fingerprint: str
    hypernet_id: str
    bias_rows: int = 0
    strength: float = 1.0
    _ready: dict[Any, LoraBatch] = field(default_factory=dict, init=False, repr=False)

    @property
    def rank(self) -> int:
        """Rows of the rank axis: all documents and the bias."""
        return sum(s.rows for s in self.sources) + self.bias_rows

    @property
    def layers(self) -> tuple[int, ...]:
        """The base's layer index of each slice of ``A`` and ``B``."""
        return tuple(sorted({s.layer for s in self.sites}))

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.nbytes for t in (*self.A.values(), *self.B.values()))

    @property
    def chunks(self) -> list[Chunk]:
        """Map chunks to rank rows, in order; a folded document has none."""
        found, start = [], 0
        for source in self.sources:
            n = len(source.chunk_tok)
            for i, n_tok in enumerate(() if source.folded else source.chunk_tok):
                rows = slice(start + i * source.rows // n, start + (i + 1) * source.rows // n)
                found.append(Chunk(source, i, n_tok, rows))
            start += source.rows
        return found

    def __add__(self, other: Adapter) -> Adapter:
        """Compose with another adapter of the same hypernetwork.

        Weights are kept.  Where the strengths differ the sum has the greater one, and the documents
        of the other get smaller weights, so each keeps its share of delta W.

        Raises ValueError for another base or hypernetwork, and for a document that is in both.
        """
        if not isinstance(other, Adapter):
            return NotImplemented
        if (self.hypernet_id, self.base_fingerprint) != (other.hypernet_id, other.base_fingerprint):
            raise ValueError(
                f"cannot add adapters of different hypernetworks: {self.hypernet_id[:12]} of base "
                f"{self.base_name!r} and {other.hypernet_id[:12]} of {other.base_name!r}"
            )
        both = {s.sha256 for s in self.sources} & {s.sha256 for s in other.sources}
        if both:
            twice = next(s for s in self.sources if s.sha256 in both)
            raise ValueError(
                f"{_name(twice)} is in both adapters; to count it more, use weighted(doc, weight)"
            )
        strength = max(self.strength, other.strength, key=abs)
        sources = tuple(
            replace(s, weight=s.weight * part.strength / strength) if strength else s
            for part in (self, other)
            for s in part.sources
        )
        n = self.rank - self.bias_rows

        def join(a: Tensor, b: Tensor) -> Tensor:
            b = b.to(a)
            return torch.cat([a[:, :n], b], 1)

        return replace(
            self,
            A={m: join(t, other.A[m]) for m, t in self.A.items()},
            B={m: join(t, other.B[m]) for m, t in self.B.items()},
            sources=sources,
            strength=strength,
        )

    def find(self, document: str | Source) -> int:
        """Return the position of a document: by `Source`, sha256 (or its start), or title.

        Raises ValueError when none or several match.
        """
        names = [(s.sha256, s.title) for s in self.sources]
        key = document.sha256 if isinstance(document, Source) else document
        at = [i for i, (sha, title) in enumerate(names) if key in (sha, title)]
        at = at or [i for i, (sha, _) in enumerate(names) if len(key) >= 6 and sha.startswith(key)]
        if len(at) != 1:
            held = ", ".join(map(_name, self.sources))
            problem = "several documents match" if at else "no document is"
            raise ValueError(f"{problem} {key!r}; the adapter holds {held}")
        return at[0]

    def without(self, document: str | Source) -> Adapter:
        """Remove a document (found as by `find`); what remains is as if it had never been there.

        Raises ValueError for an unknown document, and for the only one: ask without an adapter.
        """
        index = self.find(document)
        if len(self.sources) == 1:
            raise ValueError(
                f"{_name(self.sources[0])} is the only document; ask without an adapter instead"
            )
        return self._rearranged([i for i in range(len(self.sources)) if i != index])

    def replace(self, document: str | Source, new: Adapter) -> Adapter:
        """Put ``new`` in the place of a document, e.g. after its text has changed.

        It takes this adapter's strength and keeps its own weights.  Raises ValueError for an
        unknown document and as ``+`` does.
        """
        index, n = self.find(document), len(self.sources) - 1
        others = self._rearranged([*range(index), *range(index + 1, n + 1)])
        joined = others + replace(new, strength=self.strength)
        return joined._rearranged([*range(index), *range(n, len(joined.sources)), *range(index, n)])

    def weighted(self, document: str | Source, weight: float) -> Adapter:
        """Set the weight of one document; 1 is as it was read, 0 silences it."""
        index = self.find(document)
        changed = replace(self.sources[index], weight=_finite("weight", weight))
        return replace(self, sources=(*self.sources[:index], changed, *self.sources[index + 1 :]))

    def scaled(self, factor: float) -> Adapter:
        """Multiply ``strength``, and with it all of delta W, by ``factor``."""
        return replace(self, strength=self.strength * _finite("factor", factor))

    def muted(self, chunks: Iterable[int]) -> Adapter:
        """Silence chunks by their positions in `chunks`, e.g. to see what each contributes."""
        known = self.chunks
        B = {m: t.clone() for m, t in self.B.items()}
        for i in chunks:
            for t in B.values():
                t[:, known[i].rows] = 0
        return replace(self, B=B)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Adapter:
        """Move or convert the factors."""
        return self._map(lambda t: t.to(device=device, dtype=dtype))

    def delta_W(self, layer: int, module: str) -> Float[Tensor, "d_out d_in"]:
        """Return what the adapter adds to a linear's weight, in float32.

        Raises ValueError for a linear that the adapter does not change.
        """
        site = next((s for s in self.sites if (s.layer, s.module) == (layer, module)), None)
        if site is None:
            raise ValueError(f"the adapter does not change {module!r} of layer {layer}")
        row = self.layers.index(layer)
        A = self.A[module][row, :, : site.d_in].float()
        B = self.B[module][row, :, : site.d_out].float()
        return (B * self.gain(B.device)[:, None]).mT @ A

    def gain(self, device: Any) -> Float[Tensor, " rank"]:
        """Return the factor of every rank row on delta W: multiplier, strength and weight."""
        rows = [s.rows for s in self.sources] + [self.bias_rows]
        weights = [s.weight for s in self.sources] + [1.0]
        gain = torch.tensor(weights, device=device) * (self.multiplier * self.strength)
        return gain.repeat_interleave(torch.tensor(rows, device=device))

    def batch(self, device: Any, dtype: torch.dtype) -> LoraBatch:
        """Return the factors as a batch of one, strength and weights in B; kept for later calls."""
        key = (torch.device(device), dtype)
        if key not in self._ready:
            gain = self.gain(device)[:, None]
            self._ready[key] = LoraBatch(
                A={m: t.to(device, dtype) for m, t in self.A.items()},
                B={m: (t.to(device).float() * gain).to(dtype) for m, t in self.B.items()},
                rank=Segments((self.rank,)),
                layers=self.layers,
                multiplier=1.0,
            )
        return self._ready[key]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; provenance stands in its metadata.

        Raises OSError when it cannot be written; an older file at ``path`` is then untouched.
        """
        tensors = {f"{n}.{m}": t.cpu().contiguous() for n, m, t in self._tensors()}
        record = {
            "format": _FORMAT,
            "sha256": _digest(tensors),
            "sources": [asdict(s) for s in self.sources],
            "sites": [asdict(s) for s in self.sites],
            **{name: getattr(self, name) for name in _PLAIN},
        }
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"d2l": json.dumps(record)})
            except SafetensorError as error:
                raise OSError(0, str(error)) from error
        return Path(path)

    @staticmethod
    def load(path: str | Path, device: Any = "cpu") -> Adapter:
        """Read a file that `save` wrote.  Nothing but tensors and JSON is read; no pickle ever.

        Raises FileNotFoundError; ValueError for any other file, and for a damaged one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give a file that Adapter.save wrote")
        try:
            with safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {}).get("d2l", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is no adapter of ours, or is damaged: {error}") from error
        if record.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is no adapter of ours (its format is {record.get('format')!r}, expected "
                f"{_FORMAT!r}); d2l.from_peft reads folders written by PEFT"
            )
        if record.get("sha256") != _digest(tensors):
            raise ValueError(f"{path} is damaged: its tensors are not those that were saved")
        try:
            factors: dict[str, Factors] = {"A": {}, "B": {}}
            for key, tensor in tensors.items():
                factors[key[0]][key[2:]] = tensor.to(device)
            sources = (
                Source(**{**s, "chunk_tok": tuple(s["chunk_tok"])}) for s in record["sources"]
            )
            adapter = Adapter(
                **factors,
                sources=tuple(sources),
                sites=tuple(Site(**s) for s in record["sites"]),
                **{name: record[name] for name in _PLAIN},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no adapter of ours: {error}") from error
        wrong = [
            k for k, t in tensors.items() if t.shape[:2] != (len(adapter.layers), adapter.rank)
        ]
        if wrong:
            raise ValueError(f"{path} is damaged: {wrong[0]} does not fit its documents")
        return adapter

    def to_peft(self, folder: str | Path, rank: int | None = None) -> Any:
        """Write a PEFT adapter; see `d2l.export.to_peft`."""
        from .export import to_peft

        return to_peft(self, folder, rank)

    def merge_into(self, model: Any) -> Any:
        """Add delta W to a model's weights; see `d2l.export.merge`."""
        from .export import merge

        return merge(self, model)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Adapter:
        A, B = ({m: fn(t) for m, t in f.items()} for f in (self.A, self.B))
        return replace(self, A=A, B=B)

    def _rearranged(self, documents: Sequence[int]) -> Adapter:
        """Keep these documents, in this order, and the bias."""
        starts = Segments.of(s.rows for s in self.sources).offsets
        spans = [(starts[i], starts[i + 1]) for i in documents]
        spans.append((starts[-1], starts[-1] + self.bias_rows))
        kept = self._map(lambda t: torch.cat([t[:, a:b] for a, b in spans], 1))
        return replace(kept, sources=tuple(self.sources[i] for i in documents))

    def _tensors(self) -> Iterable[tuple[str, str, Tensor]]:
        for name, factors in (("A", self.A), ("B", self.B)):
            for module, tensor in factors.items():
                yield name, module, tensor


_PLAIN = ("multiplier", "base_name", "base_fingerprint", "hypernet_id", "bias_rows", "strength")


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def _name(source: Source) -> str:
    return f"{source.title!r} ({source.sha256[:12]})"


def _digest(tensors: Factors) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
