"""Where things lie on disk: the checkout, the weights that ship, the cache; and safe writing.

Standard library only, so that every layer may ask.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def repo_root() -> Path:
    """Return the checkout with `papers/` and `notebooks/`: `D2L_HOME`, else this package's own.

    Raises FileNotFoundError where there is none (a package installed without its checkout).
    """
    named = os.environ.get("D2L_HOME")
    root = Path(named).expanduser() if named else Path(__file__).resolve().parents[1]
    if not (root / "papers").is_dir():
        where = f"D2L_HOME={named}" if named else str(root)
        raise FileNotFoundError(
            f"{where} holds no papers/ folder; set D2L_HOME to a checkout of the repository, "
            "or install it from there with `pip install -e .`"
        )
    return root.resolve()


def weights_home() -> Path:
    """Return the folder of the weights that ship with the checkout."""
    return repo_root() / "papers" / "doc-to-lora" / "weights"


def shipped() -> list[str]:
    """List the names of the hypernetworks that ship with the repository.

    >>> "fig2/tiny" in shipped()
    True
    """
    found = (p.parents[1] for p in weights_home().glob("*/*/seed0/config.json"))
    return sorted(str(folder.relative_to(weights_home())) for folder in found)


def cache_dir() -> Path:
    """Return the folder for fetched and derived files: `D2L_CACHE`, else `~/.cache/d2l`."""
    named = os.environ.get("D2L_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "d2l"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it becomes `path` in one rename.

    A reader sees the old file or the new one, whatever else writes at the same time.
    On any error the temporary file goes away and `path` stays as it was.  Raises OSError with the
    path and the way out.

    >>> with replacing("weights.bin") as temporary:  # doctest: +SKIP
    ...     temporary.write_bytes(b"...")
    """
    target = Path(path)
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = target.with_name(f".{target.stem}.{writer}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot write {target}: {reason}; nothing was changed, free space or choose another "
            "folder",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
