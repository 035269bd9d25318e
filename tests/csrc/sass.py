"""Reads machine code: how many instructions a loop of a kernel has for each element."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers, such as MUFU.EX2
    operands: str


def functions(cuobjdump: Path, cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name."""
    command = [str(cuobjdump), "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"Function : (\w+)", text)
    return {
        name: [Instruction(int(a, 16), n, o) for a, n, o in _LINE.findall(code)]
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops that contain no other loop: from a backward branch's target to the branch."""
    ends = []
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        if instruction.name.startswith("BRA") and target is not None:
            begin = int(target.group(1), 16)
            if begin < instruction.address:  # a kernel ends with a branch to itself
                ends.append((begin, instruction.address))
    return [
        [i for i in code if begin <= i.address <= end]
        for begin, end in ends
        if not any(b >= begin and e <= end and (b, e) != (begin, end) for b, e in ends)
    ]


def per_element(code: list[Instruction], element: str, shortest: bool = False) -> float:
    """Instructions for each one called ``element``, in the innermost loop with most of these.

    With ``shortest``, in the one with the fewest instructions for each.
    """
    loops = innermost_loops(code)
    counts = [(sum(i.name.startswith(element) for i in loop), len(loop)) for loop in loops]
    counts = [(elements, length) for elements, length in counts if elements]
    assert counts, f"no loop with {element}"
    if shortest:
        return min(length / elements for elements, length in counts)
    elements, length = max(counts)
    return length / elements
