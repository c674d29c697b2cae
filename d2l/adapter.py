"""`Adapter`: one or several documents as LoRA factors, with their provenance and their algebra.

An adapter is a value: every operation returns a new one.  Making adapters is `d2l.model`'s work,
other formats are `d2l.export`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from d2l_kernels import Segments
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .home import replacing
from .lm.hooks import Site
from .lora import Factors, LoraBatch

_FORMAT = "d2l-adapter-1"
_PLAIN = ("multiplier", "base_name", "base_fingerprint", "hypernet_id", "bias_rows", "strength")


@dataclass(frozen=True)
class Source:
    """A document inside an adapter.

    ``sha256`` is of its stripped text (UTF-8), or of its token ids; ``chunk_tok`` holds the tokens
    of each chunk (or sentence read apart), template included; ``rows`` counts its rows of the rank
    axis.  A document whose rank reached that of a full matrix is ``folded``: its chunks are summed,
    their map is gone.
    """

    sha256: str
    title: str
    chunk_tok: tuple[int, ...]
    rows: int
    weight: float = 1.0
    folded: bool = False

    def __str__(self) -> str:
        return f"{self.title!r} ({self.sha256[:12]})"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Documents as a LoRA adapter of one base model.

    ``delta W = multiplier * strength * (sum_d w_d sum_c B_dc^T A_dc + bias_B^T bias_A)``
    over documents d with weight ``w_d`` and their chunks c.  The hypernetwork's learned bias, which
    belongs to no document, counts once per composition, as it does for one long document: ``a + b``
    is what one document of both texts' chunks would be.  Strength scales all of delta W, bias
    included, so strength 0 is the base; a weight scales one document alone.

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
    def chunks(self) -> list[tuple[Source, int, slice]]:
        """List ``(document, tokens, rank rows)`` of every chunk; a folded document has none."""
        found, start = [], 0
        for source in self.sources:
            tok = () if source.folded else source.chunk_tok
            r = source.rows // max(1, len(tok))
            found += [
                (source, n, slice(start + i * r, start + (i + 1) * r)) for i, n in enumerate(tok)
            ]
            start += source.rows
        return found

    def __add__(self, other: Adapter) -> Adapter:
        """Compose with another adapter of the same hypernetwork.

        Where strengths differ the sum has the greater one, and the other's documents get smaller
        weights, so that each keeps its share of delta W.

        Raises ValueError for another base or hypernetwork, and for a document that is in both.
        """
        if (self.hypernet_id, self.base_fingerprint) != (other.hypernet_id, other.base_fingerprint):
            raise ValueError(
                f"cannot add adapters of different hypernetworks: {self.hypernet_id[:12]} of base "
                f"{self.base_name!r} and {other.hypernet_id[:12]} of {other.base_name!r}"
            )
        known = {s.sha256 for s in self.sources}
        for twice in (s for s in other.sources if s.sha256 in known):
            raise ValueError(f"{twice} is in both adapters; to count it more, give it a weight")
        strength = max(self.strength, other.strength, key=abs)
        n = self.rank - self.bias_rows
        return replace(
            self,
            A={m: torch.cat([t[:, :n], other.A[m].to(t)], 1) for m, t in self.A.items()},
            B={m: torch.cat([t[:, :n], other.B[m].to(t)], 1) for m, t in self.B.items()},
            sources=tuple(
                replace(s, weight=s.weight * part.strength / (strength or 1.0))
                for part in (self, other)
                for s in part.sources
            ),
            strength=strength,
        )

    def find(self, document: str) -> int:
        """Return the position of a document, by its title or its sha256 (six digits are enough).

        Raises ValueError when none or several match.
        """
        exact = [i for i, s in enumerate(self.sources) if document in (s.sha256, s.title)]
        begun = [i for i, s in enumerate(self.sources) if s.sha256.startswith(document)]
        at = exact or (begun if len(document) >= 6 else [])
        if len(at) != 1:
            held = ", ".join(map(str, self.sources))
            problem = "several documents are" if at else "no document is"
            raise ValueError(f"{problem} {document!r}; the adapter holds {held}")
        return at[0]

    def split(self) -> list[Adapter]:
        """Return an adapter for each document, which added up are this one."""
        return [self._arranged([i]) for i in range(len(self.sources))]

    def without(self, document: str) -> Adapter:
        """Remove a document (as `find` finds it), as if it had never been there.

        Raises ValueError for an unknown document, and for the only one: ask without an adapter.
        """
        index, n = self.find(document), len(self.sources)
        if n == 1:
            raise ValueError(f"{self.sources[0]} is the only document; ask without an adapter")
        return self._arranged([*range(index), *range(index + 1, n)])

    def replace(self, document: str, new: Adapter) -> Adapter:
        """Put ``new`` in the place of a document, e.g. after its text has changed.

        It takes this adapter's strength.  Raises ValueError for an unknown document and as ``+``.
        """
        index, n = self.find(document), len(self.sources) - 1
        others = self._arranged([*range(index), *range(index + 1, n + 1)])
        joined = others + replace(new, strength=self.strength)
        return joined._arranged([*range(index), *range(n, len(joined.sources)), *range(index, n)])

    def weighted(self, document: str, weight: float) -> Adapter:
        """Set the weight of one document; 1 is as it was read, 0 silences it."""
        sources = list(self.sources)
        index = self.find(document)
        sources[index] = replace(sources[index], weight=_finite(weight))
        return replace(self, sources=tuple(sources))

    def scaled(self, factor: float) -> Adapter:
        """Multiply ``strength``, and with it all of delta W, by ``factor``."""
        return replace(self, strength=self.strength * _finite(factor))

    def muted(self, chunks: Iterable[int]) -> Adapter:
        """Silence chunks by their positions in `chunks`, e.g. to see what each contributes."""
        known, silent = self.chunks, list(chunks)

        def mute(t: Tensor) -> Tensor:
            t = t.clone()
            for i in silent:
                t[:, known[i][2]] = 0
            return t

        return replace(self, B={m: mute(t) for m, t in self.B.items()})

    def factors(
        self,
    ) -> Iterator[tuple[Site, Float[Tensor, "rank d_in"], Float[Tensor, "rank d_out"]]]:
        """Yield every linear's own A and B, all scales in B, float32 or more: delta W = B^T A."""
        for site in self.sites:
            row = self.layers.index(site.layer)
            A, B = self.A[site.module][row], self.B[site.module][row]
            gain = self._gain(B.device)[:, None]
            yield site, _wide(A[:, : site.d_in]), _wide(B[:, : site.d_out]) * gain

    def delta_W(self, layer: int, module: str) -> Float[Tensor, "d_out d_in"]:
        """Return what the adapter adds to a linear's weight, in float32 or more.

        Raises ValueError for a linear that the adapter does not change.
        """
        for site, A, B in self.factors():
            if (site.layer, site.module) == (layer, module):
                return B.mT @ A
        raise ValueError(f"the adapter does not change {module!r} of layer {layer}")

    def batch(self, device: Any, dtype: torch.dtype) -> LoraBatch:
        """Return the factors as a batch of one, all scales in B; kept for later calls."""
        key = (torch.device(device), dtype)
        if key not in self._ready:
            gain = self._gain(device)[:, None]
            self._ready[key] = LoraBatch(
                A={m: t.to(device, dtype) for m, t in self.A.items()},
                B={m: (_wide(t.to(device)) * gain).to(dtype) for m, t in self.B.items()},
                rank=Segments((self.rank,)),
                layers=self.layers,
                multiplier=1.0,
            )
        return self._ready[key]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; provenance stands in its metadata.

        Raises OSError when it cannot be written; an older file at ``path`` is then untouched.
        """
        tensors = {f"A.{m}": t.cpu().contiguous() for m, t in self.A.items()}
        tensors |= {f"B.{m}": t.cpu().contiguous() for m, t in self.B.items()}
        record = {"format": _FORMAT, "sha256": _digest(tensors)}
        record |= {name: [asdict(x) for x in getattr(self, name)] for name in ("sources", "sites")}
        record |= {name: getattr(self, name) for name in _PLAIN}
        save_tensors(path, tensors, {"d2l": json.dumps(record)})
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
            data = path.read_bytes()  # in one go: safe_open opens twice, a writer may come between
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            record = json.loads(header.get("__metadata__", {}).get("d2l", "{}"))
            if record.get("format") != _FORMAT:
                raise ValueError(f"its format is {record.get('format')!r}, not {_FORMAT!r}")
            if record["sha256"] != _digest(tensors):
                raise ValueError("its tensors are not those that were saved")
            factors = [
                {k[2:]: t.to(device) for k, t in tensors.items() if k[0] == name} for name in "AB"
            ]
            sources = [
                Source(**s | {"chunk_tok": tuple(s["chunk_tok"])}) for s in record["sources"]
            ]
            sites = [Site(**s) for s in record["sites"]]
            plain = {name: record[name] for name in _PLAIN}
            return Adapter(*factors, sources=tuple(sources), sites=tuple(sites), **plain)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no adapter of ours, or is damaged: {error}") from error

    def to_peft(self, folder: str | Path, rank: int | None = None) -> Any:
        """Write a PEFT adapter; see `d2l.export.to_peft`."""
        from .export import to_peft

        return to_peft(self, folder, rank)

    def merge_into(self, model: Any) -> Any:
        """Add delta W to a model's weights; see `d2l.export.merge`."""
        from .export import merge

        return merge(self, model)

    def _gain(self, device: Any) -> Float[Tensor, " rank"]:
        rows = [s.rows for s in self.sources] + [self.bias_rows]
        weights = torch.tensor([s.weight for s in self.sources] + [1.0], device=device)
        gain = weights * (self.multiplier * self.strength)
        return gain.repeat_interleave(torch.tensor(rows, device=device))

    def _arranged(self, documents: Sequence[int]) -> Adapter:
        """Keep these documents, in this order, and the bias."""
        starts = Segments.of(s.rows for s in self.sources).offsets
        spans = [(starts[i], starts[i + 1]) for i in documents]
        spans.append((starts[-1], starts[-1] + self.bias_rows))

        def pick(t: Tensor) -> Tensor:
            return torch.cat([t[:, a:b] for a, b in spans], 1)

        A, B = ({m: pick(t) for m, t in f.items()} for f in (self.A, self.B))
        return replace(self, A=A, B=B, sources=tuple(self.sources[i] for i in documents))


def save_tensors(path: str | Path, tensors: Factors, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.  Raises OSError when it cannot be written."""
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(0, str(error)) from error


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a weight or strength must be a finite number, got {value}")
    return float(value)


def _digest(tensors: Factors) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
