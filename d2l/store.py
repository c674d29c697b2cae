"""`AdapterStore`: a folder of adapters keyed by document and model, shared by any processes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from .adapter import Adapter
from .model import DocToLoRA
from .reading import Document, Reading, sha256_of, text_of

Watch = Callable[[Reading], Iterable[int]]


class AdapterStore:
    """Adapters in a folder, one file per document and model.

    A document's file is named by its sha256, in a folder named by that of the hypernetwork, its
    base and its chunk lengths.  Files appear whole or not at all; of processes that want the same
    document at once, one reads it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def path(self, model: DocToLoRA, sha256: str) -> Path:
        """Return where the adapter of a document lies, whether it is there or not."""
        made_by = f"{model.hypernet_id} {model.base.fingerprint} {model.chunk}"
        name = hashlib.sha256(made_by.encode()).hexdigest()[:16]
        return self.folder / name / f"{sha256}.safetensors"

    def get(self, model: DocToLoRA, sha256: str) -> Adapter | None:
        """Load a document's adapter to the model's device, or return None.

        Raises ValueError when the file is damaged.
        """
        path = self.path(model, sha256)
        return Adapter.load(path, model.base.device) if path.exists() else None

    def put(self, model: DocToLoRA, adapter: Adapter) -> Path:
        """Store the adapter of one document that ``model`` made; return its file.

        Raises ValueError for any other adapter, OSError when it cannot be written.
        """
        if len(adapter.sources) != 1 or adapter.hypernet_id != model.hypernet_id:
            raise ValueError("the store keeps single documents that this model has read")
        return adapter.save(self.path(model, adapter.sources[0].sha256))

    def get_or_internalize(
        self, model: DocToLoRA, document: Document, *, title: str | None = None, watch: Watch = iter
    ) -> Adapter:
        """Return the stored adapter of a document; read the document if there is none.

        A damaged file is read again and replaced; an adapter that cannot be stored (a full disk) is
        returned all the same: both with a warning.  An iterator is always read.
        ``watch`` gets the `Reading` and iterates over it, e.g. under a progress bar.

        Raises ValueError as `DocToLoRA.read` does.
        """
        content: Any = document.tolist() if isinstance(document, Tensor) else document
        if isinstance(document, Path):
            title, content = title or document.name, text_of(document)
            document = content if isinstance(content, str) else document
        elif isinstance(document, Iterator):
            return self._read(model, document, title, watch)
        sha256 = sha256_of(content)
        path = self.path(model, sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            try:
                found = self.get(model, sha256)
            except ValueError as error:
                warnings.warn(f"{error}; the document is read again", UserWarning, stacklevel=2)
                found = None
            return found or self._read(model, document, title, watch)

    def _read(
        self, model: DocToLoRA, document: Document, title: str | None, watch: Watch
    ) -> Adapter:
        reading = model.read(document, title=title)
        for _ in watch(reading):
            pass
        adapter = reading.adapter
        try:
            self.put(model, adapter)
        except OSError as error:
            text = error.strerror or str(error)
            warnings.warn(f"the adapter was not stored: {text}", UserWarning, stacklevel=3)
        return adapter
