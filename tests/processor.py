"""What the processor under the tests can do."""

from __future__ import annotations

from pathlib import Path


def _weight_bits() -> int:
    """7 on x86 without VNNI: sums of two uint8 × int8 products there saturate at 16 bits, as `ddsm quantize` warns."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return 8
    return 7 if "avx2" in words and not words & {"avx512_vnni", "avx_vnni"} else 8


WEIGHT_BITS = _weight_bits()
