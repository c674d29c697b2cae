"""Internalise a corpus into a store, on as many processes as ``accelerate launch`` starts.

Stopped, it goes on where it was; several machines share a store on a shared disk:

    accelerate launch -m d2l.cli.corpus MODEL STORE FILE...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..model import DocToLoRA
from ..store import AdapterStore


def internalize_corpus(
    model: DocToLoRA, files: Iterable[str | Path], store: AdapterStore
) -> list[tuple[Path, str]]:
    """Put the adapters of many files into ``store``, this process's share; stored ones are skipped.

    A file that cannot be read does not stop the others; returns failures with their reasons.
    """
    state, failed = PartialState(), []
    mine = sorted(map(Path, files))[state.process_index :: state.num_processes]
    for path in tqdm(mine, desc="internalize", unit="doc", disable=not state.is_main_process):
        try:
            store.get_or_internalize(model, path)
        except (OSError, ValueError) as error:
            failed.append((path, str(error)))
    return failed


def main() -> int:
    """Internalise the files named on the command line; return 1 if any failed."""
    parser = argparse.ArgumentParser("d2l.cli.corpus", description="internalise files into a store")
    parser.add_argument("model", help="hypernetwork, as DocToLoRA.from_pretrained takes it")
    parser.add_argument("store", help="folder of the adapters")
    parser.add_argument("files", nargs="+", help="documents")
    asked = parser.parse_args()
    state = PartialState(cpu=not torch.cuda.is_available())
    model = DocToLoRA.from_pretrained(asked.model, device=str(state.device))
    failed = internalize_corpus(model, asked.files, AdapterStore(asked.store))
    print(*(f"{path}: {reason}" for path, reason in failed), sep="\n", end="", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
