"""What a process gives back once it has started: memory that it freed, and pages of libraries that it will not miss."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")


def return_unused_memory() -> None:
    """Give the system back what the start used for a moment. For a process of ours: see `release_file_pages`.

    The allocator of GNU's C library keeps what was freed, and mapped files stay resident, as long as nobody asks.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    release_file_pages()


def release_file_pages() -> int:
    """Take out of the resident set the pages of mapped files that hold nothing but the file.

    Imports touch libraries all over, and each touch maps 15 pages beside it: 150 MiB of torch, and of a compiler that
    is not needed once all kernels are loaded. Released, they are in the system's page cache like those of any file;
    one that is needed again is mapped again, 16 at a time in about a microsecond. No other thread may unload a library
    meanwhile.

    Returns:
        Bytes released; 0 where /proc does not tell.
    """
    try:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        # Listed before the first is released: the list must not change while it is read.
        droppable = [each for each in _mappings(_SMAPS.read_text(errors="replace")) if each.is_clean_file]
        return sum(each.resident for each in droppable if madvise(each.start, each.size, mmap.MADV_DONTNEED) == 0)
    except (OSError, AttributeError, ValueError, KeyError):  # another system, or a sandbox with a /proc of its own
        return 0


@dataclass(frozen=True, slots=True)
class _Mapping:
    start: int
    size: int
    permissions: str
    path: str
    resident: int
    changed: int
    """Bytes that are this process's own copy, in memory or in swap."""

    @property
    def is_clean_file(self) -> bool:
        """What was written into a private mapping, such as the dynamic linker's relocations, would be lost: it must
        have no changed page, and nobody may be able to change one just now.
        """
        is_file = self.path.startswith("/") and not self.path.startswith("/dev/")
        return is_file and self.permissions in ("r--p", "r-xp") and not self.changed and self.resident > 0


def _mappings(smaps: str) -> Iterator[_Mapping]:
    """Read proc(5), /proc/pid/smaps: a line `start-end permissions offset device inode path` and then `Field: n kB`."""
    head: list[str] = []
    fields: dict[str, int] = {}
    for line in smaps.splitlines():
        words = line.split(maxsplit=5)
        if words[0].endswith(":"):
            if words[-1] == "kB":
                fields[words[0]] = int(words[1]) * 1024
            elif words[0] == "VmFlags:":  # the last line of each
                start, end = (int(address, 16) for address in head[0].split("-"))
                path = head[5] if len(head) > 5 else ""
                changed = fields["Anonymous:"] + fields["Swap:"]
                yield _Mapping(start, end - start, head[1], path, fields["Rss:"], changed)
        else:
            head, fields = words, {}
