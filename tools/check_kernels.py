"""Runs made-up calls of the CPU kernels under sanitizers, checks the results, and fuzzes their arguments.

    python tools/check_kernels.py [--only address thread memory fuzz] [--cases 5000] [--runs 1000000] [--jobs 2]

`address` is AddressSanitizer with UBSan, `thread` is ThreadSanitizer, with several callers at once as well, `memory` is
MemorySanitizer (clang alone has it), `fuzz` is libFuzzer (clang too) with AddressSanitizer and UBSan. Results must be
those of plain loops in double. All instruction sets that this processor runs take part. Exit code: 0 clean, 1 finding,
2 something does not compile, 77 a part could not be run here.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import dataclasses
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
SOURCES = REPO / "ddsm_deploy" / "kernels" / "src"
CHECKS = REPO / "tests" / "kernels"
NOT_RUN = 77
WORTH_THREADS = 20000
"""Multiply-adds of a call from which on it is cut into tasks: far less than elsewhere, so that most calls here are."""
LARGE_MAP = 4000
"""Numbers in a map from which on it may be packed as bfloat16: far less than elsewhere, so that many maps here are."""

ADDRESS = ["-fsanitize=address,undefined,float-cast-overflow"]


class Unavailable(Exception):
    """No compiler here that can build such a thing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One way to build and run the checks.

    Attributes:
        compilers: those that can, the preferred first.
        kernels: flags of the kernels' files, and of the linker.
        checks: flags of the program that calls them.
        loops, driver: flags besides, of the inner loops and of the kernels' other files.
        link: flags of the linker besides.
        program: the file in tests/kernels that calls the kernels.
        callers: threads that call at once, one entry a run.
    """

    compilers: tuple[str, ...] = ("g++", "clang++")
    kernels: list[str]
    checks: list[str] = dataclasses.field(default_factory=list)
    loops: list[str] = dataclasses.field(default_factory=list)
    driver: list[str] = dataclasses.field(default_factory=list)
    link: list[str] = dataclasses.field(default_factory=list)
    program: str = "check_main"
    callers: tuple[int, ...] = (1,)


PARTS = {
    "address": Part(kernels=ADDRESS, callers=(1, 3)),
    "thread": Part(kernels=["-fsanitize=thread"], checks=["-fsanitize=thread"], callers=(1, 3)),
    "memory": Part(compilers=("clang++",), kernels=["-fsanitize=memory"], checks=["-fsanitize=memory"]),
    "fuzz": Part(
        compilers=("clang++",),
        kernels=ADDRESS,
        # without the tracing of comparisons that `fuzzer-no-link` adds: in inner loops it takes most of the time
        loops=["-fsanitize-coverage=inline-8bit-counters,pc-table"],
        driver=["-fsanitize=fuzzer-no-link"],
        link=["-fsanitize=fuzzer"],
        program="check_fuzz",
    ),
}


def package_flags() -> tuple[list[str], dict[str, list[str]]]:
    """FLAGS and FLAGS_OF of hatch_build.py, read without importing it: hatchling is there only while building."""
    tree = ast.parse((REPO / "hatch_build.py").read_text(encoding="utf-8"))
    names = ("FLAGS", "FLAGS_OF")
    wanted = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names
    ]
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, type_ignores=[]), "hatch_build.py", "exec"), scope)
    return scope["FLAGS"], scope["FLAGS_OF"]


def flags_of(source: Path) -> list[str]:
    """The package's own flags for one of its kernel files: those of its instruction set included."""
    always, special = package_flags()
    if platform.machine() not in ("x86_64", "AMD64"):
        return always
    return [*always, *next((flags for end, flags in special.items() if source.stem.endswith(end)), [])]


def compile_all(commands: list[list[str]]) -> None:
    """Runs compilers side by side; a failing one ends the program, with code 2."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            if done.returncode:
                print(done.stderr[:4000], file=sys.stderr)
                sys.exit(2)


def find_compiler(part: Part, folder: Path) -> str:
    """The first compiler whose programs with these sanitizers run.

    Raises:
        Unavailable: there is none.
    """
    probe = folder / "probe.cpp"
    entry = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    probe.write_text(entry if part.program == "check_fuzz" else "int main() { return 0; }", encoding="utf-8")
    reasons = []
    for name in part.compilers:
        if shutil.which(name) is None:
            reasons.append(f"there is no {name}")
            continue
        command = [name, *part.kernels, *part.link, str(probe), "-o", str(folder / "probe")]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode:
            done = subprocess.run([folder / "probe", "-runs=1"], capture_output=True, text=True)
        if not done.returncode:
            return name
        reasons.append(f"{name} can't: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
    raise Unavailable("; ".join(reasons))


def build(part: Part, folder: Path, level: int) -> Path:
    """Kernels and checks as one program, compiled at -O`level`.

    Raises:
        Unavailable: no compiler has these sanitizers.
    """
    compiler = find_compiler(part, folder)
    common = [f"-O{level}", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    checks = ["-std=c++17", "-Wall", "-Wextra", f"-I{SOURCES}", *part.checks, "-c", f"{CHECKS / part.program}.cpp"]
    commands = [[compiler, *common, *checks]]
    thresholds = [f"-DDDSM_SMALL={WORTH_THREADS}", f"-DDDSM_HALF={LARGE_MAP}"]
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.stem != "ort":  # ONNX Runtime's entry: nothing calls it here
            extra = part.loops if source.stem.startswith("loops_") else part.driver
            flags = [*flags_of(source), *common, *part.kernels, *extra, *thresholds]
            commands.append([compiler, *flags, "-c", str(source)])
    objects = [folder / f"{Path(command[-1]).stem}.o" for command in commands]
    compile_all([[*command, "-o", str(output)] for command, output in zip(commands, objects, strict=True)])
    program = folder / part.program
    compile_all([[compiler, *part.kernels, *part.link, "-pthread", *map(str, objects), "-o", str(program)]])
    return program


def run(name: str, part: Part, program: Path, options: argparse.Namespace) -> bool:
    """Whether a part's checks found nothing; prints what they did."""
    if part.program == "check_fuzz":
        share = -(-options.runs // options.jobs)
        arguments = [[f"-runs={share}", f"-seed={options.seed + job}", "-max_len=400"] for job in range(options.jobs)]
        arguments = [[*line, "-print_final_stats=1", f"-artifact_prefix={program.parent}/"] for line in arguments]
    else:
        arguments = [[str(options.cases), str(options.seed), str(callers)] for callers in part.callers]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        calls = pool.map(lambda line: subprocess.run([program, *line], capture_output=True, text=True), arguments)
        results = list(calls)
    for line, done in zip(arguments, results, strict=True):
        if done.returncode:
            print(f"{name}: {program.name} {' '.join(line)} ended with {done.returncode}\n{_finding(done.stderr)}")
            return False
        print(f"{name}: {_summary(done)}", flush=True)
    print(f"{name}: clean, {time.monotonic() - start:.0f} s", flush=True)
    return True


def _summary(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says how much was run."""
    stats = [line.split("::")[1] for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed")]
    return done.stdout.strip() or (stats or ["nothing said"])[0]


def _finding(text: str) -> str:
    """What a sanitizer, or the checks themselves, say of a fault: from the line that names it on."""
    signs = ("ERROR: ", "WARNING: ThreadS", "WARNING: MemoryS", "runtime error: ", "check failed: ")
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if any(sign in line for sign in signs)), 0)
    return "\n".join(lines[first : first + 60])


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--cases", type=int, default=5000, help="made-up cases a run, each forward and backward")
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions of the fuzzer")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--level", type=int, default=1, choices=range(4), help="of the compiler's optimisation")
    options = parser.parse_args()
    code = 0
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            try:
                program = build(PARTS[name], Path(folder), options.level)
            except Unavailable as exc:
                print(f"{name}: not run: {exc}")
                code = code or NOT_RUN
                continue
            if not run(name, PARTS[name], program, options):
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
