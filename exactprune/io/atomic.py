"""Files that are either the old one or the complete new one, never half of one.

POSIX ``rename`` replaces a name atomically within a file system, so the new content is written to a temporary file in
the same folder and moved over the name at the end. After an exception nothing is left behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exactprune.errors import OptionError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of ``path``; what was written there takes its place when the block ends well.

    Raises:
        OptionError: the folder does not exist, is not writable, or ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OptionError(f"{target}: is a folder; name a file to write")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise OptionError(
            f"{target}: cannot write there ({error.strerror}); choose an existing, writable folder"
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _as_other_files(temporary, target)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` as the whole content of ``path``, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8 as the whole content of ``path``, atomically."""
    write_bytes(path, text.encode())


def _as_other_files(temporary: Path, target: Path) -> None:
    """Give the file the permissions that a plain ``open`` would have given (mkstemp makes it private)."""
    if target.exists():
        mode = target.stat().st_mode & 0o777
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    temporary.chmod(mode)
