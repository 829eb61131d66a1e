"""Pages of mapped files go, and what they hold stays: nothing that was ever written is lost."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from quire.engine import resident_memory
from quire.engine.resident_memory import release_file_pages, return_unused_memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc of this kind")

PAGES = 64
CONTENT = bytes(range(256)) * (mmap.PAGESIZE * PAGES // 256)
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapped:
    """A file in memory of this process alone, all of it touched, as a library's constants are."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(CONTENT)
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.name = str(path)
        assert self.memory[:] == CONTENT

    def seal(self) -> None:
        """Read-only from here, as the dynamic linker leaves what it relocated."""
        assert LIBC.mprotect(self.address, len(CONTENT), mmap.PROT_READ) == 0

    def resident_bytes(self) -> int:
        text = Path("/proc/self/smaps").read_text()
        return sum(each.resident for each in resident_memory._mappings(text) if each.path == self.name)


@pytest.fixture
def mapped(tmp_path: Path) -> Mapped:
    return Mapped(tmp_path / "library.so")


def test_clean_pages_are_released_and_hold_the_same_afterwards(mapped: Mapped) -> None:
    mapped.seal()
    assert mapped.resident_bytes() == len(CONTENT)
    assert release_file_pages() >= len(CONTENT)
    assert mapped.resident_bytes() == 0
    assert mapped.memory[:] == CONTENT


@pytest.mark.parametrize("place", [0, 17 * mmap.PAGESIZE + 5, len(CONTENT) - 1], ids=["first", "middle", "last"])
def test_what_was_written_before_it_was_sealed_stays(mapped: Mapped, place: int) -> None:
    mapped.memory[place] = 1 ^ CONTENT[place]
    mapped.seal()
    release_file_pages()
    assert mapped.memory[place] == 1 ^ CONTENT[place]


def test_what_may_still_be_written_stays_resident(mapped: Mapped) -> None:
    release_file_pages()
    assert mapped.resident_bytes() == len(CONTENT)


def test_the_tests_above_see_a_release_that_looks_at_nothing(mapped: Mapped) -> None:
    mapped.memory[5] = 1 ^ CONTENT[5]
    mapped.seal()
    assert LIBC.madvise(mapped.address, len(CONTENT), mmap.MADV_DONTNEED) == 0
    assert mapped.memory[5] == CONTENT[5]


HEAD = "7f0000000000-7f0000001000 r-xp 00000000 fe:00 12                         /lib/with space.so"


@pytest.mark.parametrize(
    ("head", "fields", "released"),
    [
        (HEAD, {}, True),
        (HEAD.replace("r-xp", "r--p"), {}, True),
        (HEAD, {"Anonymous": 4}, False),
        (HEAD, {"Swap": 4}, False),
        (HEAD, {"Rss": 0}, False),
        (HEAD.replace("r-xp", "rw-p"), {}, False),
        (HEAD.replace("r-xp", "r--s"), {}, False),
        (HEAD.replace("/lib", "/dev"), {}, False),
        (HEAD[: HEAD.index("/")], {}, False),
        (HEAD[: HEAD.index("/")] + "[vdso]", {}, False),
    ],
    ids=["code", "constants", "changed", "swapped", "absent", "writable", "shared", "device", "no file", "special"],
)
def test_only_clean_files_are_chosen(head: str, fields: dict[str, int], released: bool) -> None:
    numbers = {"Size": 4, "Rss": 4, "Anonymous": 0, "Swap": 0, **fields}
    lines = [head, *(f"{name}: {value:>15} kB" for name, value in numbers.items()), "THPeligible:    0"]
    smaps = "\n".join([*lines, "VmFlags: rd ex mr mw me sd", ""])
    twice = list(resident_memory._mappings(smaps * 2))
    assert [each.is_clean_file for each in twice] == [released] * 2
    assert (twice[0].start, twice[0].size) == (0x7F0000000000, 0x1000)


@pytest.mark.parametrize(
    "text", ["", "no such lines at all", f"{HEAD}\nVmFlags: rd\n"], ids=["empty", "other", "short"]
)
def test_another_proc_releases_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_memory, "_SMAPS", tmp_path / "smaps")
    assert release_file_pages() == 0
    (tmp_path / "smaps").write_text(text)
    assert release_file_pages() == 0
    return_unused_memory()


def test_torch_computes_the_same_without_its_pages() -> None:
    """Code, constants and relocations of its libraries, in a process of its own; threads among them."""
    code = (
        "import torch\n"
        "from quire.engine.resident_memory import release_file_pages\n"
        "x = torch.arange(1 << 20, dtype=torch.float32).view(1024, 1024) / 2**20\n"
        "def results(): return [x @ x, x.softmax(-1), torch.linalg.inv(x[:64, :64] + torch.eye(64)), x.sort(-1)[0]]\n"
        "before = results()\n"
        "released = release_file_pages()\n"
        "assert released > 32 * 2**20\n"
        "assert all(torch.equal(*pair) for pair in zip(before, results()))\n"
        "assert release_file_pages() < released / 2, 'more came back than that took'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
