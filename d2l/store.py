"""`AdapterStore`: a folder of adapters keyed by document and model, shared by any processes.

Run as a program it internalises a corpus into such a folder, on as many processes as
``accelerate launch`` starts; stopped, it goes on where it was:

    accelerate launch -m d2l.store MODEL STORE FILE...
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from .adapter import Adapter
from .model import DocToLoRA
from .reading import Document, Reading, sha256_of, text_of


class AdapterStore:
    """Adapters in a folder, one file per document and model.

    The key is the document's sha256 with the model's: its hypernetwork, its base and its chunk
    lengths.  Files appear whole or not at all; two processes that want the same document at once
    compute it once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def path(self, model: DocToLoRA, sha256: str) -> Path:
        """Return where the adapter of a document lies, whether it is there or not."""
        made_by = f"{model.hypernet_id} {model.base.fingerprint} {model.chunk}"
        return (
            self.folder / hashlib.sha256(made_by.encode()).hexdigest()[:16] / f"{sha256}{_SUFFIX}"
        )

    def get(self, model: DocToLoRA, sha256: str) -> Adapter | None:
        """Load a stored adapter to the model's device, or return None.

        Raises ValueError when the file is damaged.
        """
        path = self.path(model, sha256)
        return Adapter.load(path, model.base.device) if path.exists() else None

    def put(self, model: DocToLoRA, adapter: Adapter) -> Path:
        """Store the adapter of one document that ``model`` made; return its file.

        Raises ValueError for a composition or an adapter of another model, OSError when it cannot
        be written (nothing of it is then left).
        """
        made_here = adapter.hypernet_id == model.hypernet_id
        if len(adapter.sources) != 1 or not made_here:
            raise ValueError(
                "the store keeps single documents of the model that they are asked for with: save "
                "a composition with Adapter.save"
            )
        return adapter.save(self.path(model, adapter.sources[0].sha256))

    def remove(self, model: DocToLoRA, sha256: str) -> None:
        """Forget a document; one that is not there is no error."""
        self.path(model, sha256).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Path]:
        """List the files of all models."""
        return iter(sorted(self.folder.glob(f"*/*{_SUFFIX}")))

    def get_or_internalize(
        self,
        model: DocToLoRA,
        document: Document,
        *,
        title: str | None = None,
        watch: Callable[[Reading], Iterable[int]] = iter,
    ) -> Adapter:
        """Return the stored adapter of a document, reading it if it is not there.

        A damaged file is read again and replaced; where the adapter cannot be stored (a full disk)
        it is returned all the same: both with a warning.  An iterator can be consumed only once, so
        it is always read.  ``watch`` gets the reading and iterates over it, e.g. a progress bar.

        Raises ValueError as `DocToLoRA.read` does.
        """
        if isinstance(document, Iterator):
            return self._read(model, document, title, watch)
        content: Any = document
        if isinstance(document, Path):
            title, content = title or document.name, text_of(document)
            document = content if isinstance(content, str) else document
        sha256 = sha256_of(content.tolist() if isinstance(content, Tensor) else content)
        path = self.path(model, sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            try:
                found = self.get(model, sha256)
            except ValueError as error:
                warnings.warn(f"{error}; the document is read again", UserWarning, stacklevel=2)
                found = None
            if found is None:
                found = self._read(model, document, title, watch)
        return found

    def _read(
        self,
        model: DocToLoRA,
        document: Document,
        title: str | None,
        watch: Callable[[Reading], Iterable[int]],
    ) -> Adapter:
        reading = model.read(document, title=title)
        for _ in watch(reading):
            pass
        self._try_put(model, reading.adapter)
        return reading.adapter

    def _try_put(self, model: DocToLoRA, adapter: Adapter) -> None:
        try:
            self.put(model, adapter)
        except OSError as error:
            text = error.strerror or str(error)
            warnings.warn(f"the adapter was not stored: {text}", UserWarning, stacklevel=4)


def internalize_corpus(
    model: DocToLoRA, files: Iterable[str | Path], store: AdapterStore
) -> list[tuple[Path, str]]:
    """Put the adapters of many files into ``store``; stored ones are skipped.

    Under ``accelerate launch`` every process takes its share.  A file that cannot be read does not
    stop the others; returns this process's failures with their reasons.
    """
    state = PartialState()
    mine = sorted(map(Path, files))[state.process_index :: state.num_processes]
    failed = []
    for path in tqdm(mine, desc="internalize", unit="doc", disable=not state.is_main_process):
        try:
            store.get_or_internalize(model, path)
        except (OSError, ValueError) as error:
            failed.append((path, str(error)))
    return failed


def main() -> int:
    """Internalise the files named on the command line; return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="d2l.store", description=__doc__)
    parser.add_argument("model", help="hypernetwork, as DocToLoRA.from_pretrained takes it")
    parser.add_argument("store", help="folder of the adapters")
    parser.add_argument("files", nargs="+", help="documents")
    asked = parser.parse_args()
    state = PartialState(cpu=not torch.cuda.is_available())
    model = DocToLoRA.from_pretrained(asked.model, device=str(state.device))
    failed = internalize_corpus(model, asked.files, AdapterStore(asked.store))
    for path, reason in failed:
        print(f"{path}: {reason}", file=sys.stderr)
    return bool(failed)


_SUFFIX = ".safetensors"

if __name__ == "__main__":
    sys.exit(main())
