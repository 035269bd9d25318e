"""Reads machine code: how many instructions a loop of a kernel has for each element."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers, such as MUFU.EX2
    operands: str
    predicated: bool = False

    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if self.name.startswith("BRA") and found else None


def instructions(text: str) -> list[Instruction]:
    """Those of one kernel, in cuobjdump's notation."""
    found = _LINE.findall(text)
    return [Instruction(int(a, 16), n, o, bool(p)) for a, p, n, o in found]


def functions(cuobjdump: Path, cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name."""
    command = [str(cuobjdump), "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"Function : (\w+)", text)
    return {name: instructions(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """From a backward branch's target to the branch."""
    ends = [(i.target(), i.address) for i in code]
    # A kernel ends with a branch to itself.
    return [(begin, end) for begin, end in ends if begin is not None and begin < end]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops that contain no other loop."""
    ends = loops(code)
    return [
        [i for i in code if begin <= i.address <= end]
        for begin, end in ends
        if not any(b >= begin and e <= end and (b, e) != (begin, end) for b, e in ends)
    ]


def on_the_way(code: list[Instruction], element: str, passed_by: str) -> float:
    """Instructions for each one called ``element`` on the way through the loop with most of them.

    The way takes no conditional branch, except around code without branches that contains an
    instruction ``passed_by``.
    """
    at = {i.address: n for n, i in enumerate(code)}
    counts = {
        (begin, end): sum(i.name.startswith(element) for i in code[at[begin] : at[end]])
        for begin, end in loops(code)
    }
    begin, end = max(counts, key=lambda loop: (counts[loop], loop[0] - loop[1]))
    way, n = [], at[begin]
    while code[n].address != end:
        instruction, target = code[n], code[n].target()
        way.append(instruction)
        n += 1
        if target is None or target < instruction.address:
            continue
        between = code[n : at[target]]
        passed = any(i.name.startswith(passed_by) for i in between)
        if not instruction.predicated or (passed and all(i.target() is None for i in between)):
            n = at[target]
    return (len(way) + 1) / sum(i.name.startswith(element) for i in way)


def per_element(code: list[Instruction], element: str, shortest: bool = False) -> float:
    """Instructions for each one called ``element``, in the innermost loop with most of these.

    With ``shortest``, in the one with the fewest instructions for each.
    """
    counts = [
        (sum(i.name.startswith(element) for i in loop), len(loop)) for loop in innermost_loops(code)
    ]
    counts = [(elements, length) for elements, length in counts if elements]
    assert counts, f"no loop with {element}"
    if shortest:
        return min(length / elements for elements, length in counts)
    elements, length = max(counts)
    return length / elements
