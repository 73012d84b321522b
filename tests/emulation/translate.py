"""Turns .cu files and headers into C++ for cuda.h: launches, shared memory, CUDA's own headers.

The rest of the language is macros there. Lines stay where they are. `python translate.py TO
FILE...` writes the files below the folder TO, each under its path from the current folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_TOOLKIT = r"^#include <(?:cub/|thrust/|cuda_|cooperative_groups).*$"


def _name_before(text: str, end: int) -> int:
    """Where the kernel's name, with its template arguments, begins that ends before `end`."""
    at = end
    while text[at - 1].isspace():
        at -= 1
    if text[at - 1] == ">":
        depth = 0
        while True:
            at -= 1
            depth += {">": 1, "<": -1}.get(text[at], 0)
            if depth == 0:
                break
    while re.match(r"[\w:]", text[at - 1]):
        at -= 1
    return at


def _closing(text: str, at: int) -> int:
    """The index of the parenthesis that closes the one at `at`."""
    depth = 0
    while True:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
        at += 1


def _configuration_end(text: str, at: int) -> int:
    """The index of the >>> that ends the launch configuration at `at`."""
    depth = 0
    while depth or not text.startswith(">>>", at):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at


def translate(text: str) -> str:
    """`text` of CUDA C++ as C++ on cuda.h."""
    text = re.sub(_TOOLKIT, "", text, flags=re.M)
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];",
        r"\1* \2 = static_cast<\1*>(::emulation::dynamic_shared());",
        text,
    )

    def shared(m: re.Match[str]) -> str:
        indent, kind, name, extents = m.groups()
        line = text[: m.start()].count("\n")
        return (
            f"{indent}typedef {kind} type_of_{name}{extents}; type_of_{name}& {name} = "
            f'::emulation::static_shared<type_of_{name}>("{name}:{line}");'
        )

    variable = r"^(\s*)__shared__ (union \{.*?\}|[\w:<>, ]+?) (\w+)((?:\[[^\]]*\])*);"
    text = re.sub(variable, shared, text, flags=re.S | re.M)
    text = re.sub(
        r"cudaLaunchCooperativeKernel\(\s*([\w:]+(?:<[^<>]*>)?),",
        r'::emulation::launch_cooperative("\1", [](auto... a) { \1(a...); }, \1,',
        text,
    )
    while (at := text.find("<<<")) >= 0:
        begin = _name_before(text, at)
        name = text[begin:at].strip()
        end = _configuration_end(text, at + 3)
        opening = text.index("(", end)
        closing = _closing(text, opening)
        text = (
            f"{text[:begin]}::emulation::launch(::emulation::Launch({text[at + 3 : end]}), "
            f'"{" ".join(name.split())}", '
            f"std::make_tuple({text[opening + 1 : closing]}), "
            f"[](auto... a) {{ {name}(a...); }}){text[closing + 1 :]}"
        )
    return text


def main(to: str, *files: str) -> None:
    for file in files:
        written = f'#line 1 "{file}"\n' + translate(Path(file).read_text())
        target = Path(to, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text() != written:
            target.write_text(written)


if __name__ == "__main__":
    main(*sys.argv[1:])
