"""Which kernel instances ran: `python tests/emulation/coverage.py FILE`.

FILE is what SK_EMULATION_COUNTS named while tests ran: pytest appends the counts at its end. Fails
where an instance never ran.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from pathlib import Path


def demangled(types: list[str]) -> list[str]:
    """The names of kernels as they were typed, without namespaces."""
    given = "\n".join(name.lstrip("*") for name in types)
    command = ["c++filt", "-t"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    noise = r"segkernels::|\(anonymous namespace\)::|cuda::|pooling::|std::integral_constant|^void "
    return [re.sub(noise, "", text) for text in done.stdout.splitlines()]


def main(counts: str) -> int:
    """Print a line for each kind of kernel, and the instances that never ran."""
    launches: collections.Counter[str] = collections.Counter()
    blocks: collections.Counter[str] = collections.Counter()
    for line in Path(counts).read_text().splitlines():
        times, most, kind = line.split("\t")
        launches[kind] += int(times)
        blocks[kind] = max(blocks[kind], int(most))
    kinds: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0, 0])
    missed = []
    for kind, name in zip(launches, demangled(list(launches)), strict=True):
        called = name.split("(")[0]
        functor = re.search(r"<(\w+)", called)
        k = kinds[re.sub(r"<.*", "", called) + (f" of {functor[1]}" if functor else "")]
        k[0] += launches[kind] > 0
        k[1] += 1
        k[2] += launches[kind]
        k[3] = max(k[3], blocks[kind])
        missed += [] if launches[kind] else [name]
    for what, (ran, known, times, most) in sorted(kinds.items()):
        print(
            f"{ran:3} of {known:3} instances, {times:8} launches of up to {most:5} blocks: {what}"
        )
    ran = sum(count > 0 for count in launches.values())
    print(f"{ran} of {len(launches)} kernel instances ran")
    print("".join(f"never ran: {name}\n" for name in missed), end="")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
