"""As much of an ELF reader as the ABI test needs: the dynamic symbols and the needed libraries of a 64-bit library."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

SHT_DYNAMIC, SHT_DYNSYM = 6, 11
DT_NULL, DT_NEEDED = 0, 1


class _Elf:
    def __init__(self, data: mmap.mmap) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        (table,) = struct.unpack_from("<Q", data, 0x28)
        entry, count = struct.unpack_from("<HH", data, 0x3A)
        # type, offset, size and link (the string table) of each section
        self.sections = [struct.unpack_from("<4xI16xQQI", data, table + i * entry) for i in range(count)]
        self.data = data

    def entries(self, kind: int, layout: str) -> Iterator[tuple[int, ...]]:
        """The records of the sections of one kind, each with the offset of its string table in front."""
        for section_kind, offset, size, link in self.sections:
            if section_kind == kind:
                strings = self.sections[link][1]
                for record in struct.iter_unpack(layout, self.data[offset : offset + size]):
                    yield strings, *record

    def string(self, at: int) -> str:
        return self.data[at : self.data.find(b"\0", at)].decode()


def _open(path: Path) -> _Elf:
    with path.open("rb") as file:
        return _Elf(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def dynamic_symbols(path: Path) -> set[str]:
    """Names of all dynamic symbols, imported and exported."""
    elf = _open(path)
    names = {elf.string(strings + name) for strings, name, *_ in elf.entries(SHT_DYNSYM, "<IBBHQQ")}
    return names - {""}


def needed_libraries(path: Path) -> list[str]:
    """File names of the libraries it asks the loader for."""
    elf = _open(path)
    needed = []
    for strings, tag, value in elf.entries(SHT_DYNAMIC, "<qQ"):
        if tag == DT_NULL:
            break
        if tag == DT_NEEDED:
            needed.append(elf.string(strings + value))
    return needed
