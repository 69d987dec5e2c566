"""What versions of TensorRT are known to misread, in one table, each row with its source.

A row is about a graph that NVIDIA's parser takes without a word, and for which the engine then computes something else.
What the parser itself refuses needs no row. Of GridSample's new names the rows tell for every version what is known, be
it that nothing is: a file that one version misreads is refused for all.
"""

from __future__ import annotations

import dataclasses

REFUSE, WARN = "refuse", "warn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownBad:
    """One operator that a range of versions does not read as written.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        first: oldest version of the range, as many parts as count; empty for no limit.
        last: its newest, likewise.
        op: the operator.
        opset: the range of opsets, both included.
        typing: ``strong``, or ``any``. All networks built here are strongly typed.
        modes: only a node with one of these values of ``mode``; empty for all.
        action: `REFUSE` the graph, or `WARN` in the engine's record.
        effect: what happens, said of the version.
        source: where that is told.
    """

    target: str
    first: str
    last: str
    op: str
    opset: tuple[int, int]
    typing: str
    modes: tuple[str, ...]
    action: str
    effect: str
    source: str

    def covers(self, target: str, version: str) -> bool:
        """Whether a version of a target is in the row's range."""
        return self.target == target and _at_least(version, self.first) and not _beyond(version, self.last)


_ANY = (1, 10_000)
_FROM_20 = (20, 10_000)
_SMOOTH = ("linear", "cubic")  # opset 20 renamed these two; `nearest` kept its name
_GRID = {"op": "GridSample", "opset": _FROM_20, "typing": "any", "modes": _SMOOTH, "action": REFUSE}
_NEAREST = "it samples nearest where the graph says linear or cubic, in silence"
_ISSUE = "https://github.com/NVIDIA/TensorRT/issues/4646"
_FIX = "https://github.com/onnx/onnx-tensorrt/pull/1060"

KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(target="tensorrt", first="10.13", last="10.13", effect=_NEAREST, source=_ISSUE, **_GRID),
    KnownBad(target="tensorrt", first="11.1", last="11.1", effect=_NEAREST, source=_FIX, **_GRID),
    KnownBad(target="tensorrt-rtx", first="1.5", last="1.5", effect=_NEAREST, source=_FIX, **_GRID),
    KnownBad(
        target="tensorrt-rtx",
        first="1.7.1",
        last="1.7.1",
        effect="it reads the new names rightly, but the same file would be misread by others",
        source="tests/export/tensorrt/test_guard.py reads the modes back from its parser",
        **_GRID,
    ),
    # the rows above come first; for every other version nobody has said, and the fix was still open in July 2026
    KnownBad(
        target="tensorrt",
        first="",
        last="",
        effect="versions before and after it sample nearest where the graph says linear, and nobody has tried this one",
        source=_FIX,
        **_GRID,
    ),
    KnownBad(
        target="tensorrt-rtx",
        first="",
        last="",
        effect="version 1.5 samples nearest where the graph says linear, and nobody has tried this one",
        source=_FIX,
        **_GRID,
    ),
    KnownBad(
        target="tensorrt",
        first="10.14.1",
        last="",
        op="GridSample",
        opset=_ANY,
        typing="strong",
        modes=(),
        action=WARN,
        effect="wrong results of it were reported for strongly typed networks from 10.14.1 on, and NVIDIA could not "
        "reproduce them; compare the engine with the reference on the target",
        source="https://github.com/pytorch/TensorRT/issues/4074",
    ),
)


def known_bad(target: str, version: str, *, op: str, opset: int, mode: str, action: str) -> KnownBad | None:
    """The first row of that action for an operator at an opset, as a version of a target reads it."""
    for row in KNOWN_BAD:
        fits = row.op == op and row.opset[0] <= opset <= row.opset[1] and row.action == action
        if fits and (not row.modes or mode in row.modes) and row.covers(target, version):
            return row
    return None


def parts(version: str) -> tuple[int, ...]:
    """A version's leading numbers: ``1.7.1.116`` is (1, 7, 1, 116)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _at_least(version: str, bound: str) -> bool:
    return not bound or parts(version) >= parts(bound)


def _beyond(version: str, bound: str) -> bool:
    return bool(bound) and parts(version)[: len(parts(bound))] > parts(bound)
