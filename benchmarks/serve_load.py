"""How `ddsm serve` holds up under many clients, some of them bad, and what HTTP costs against direct calls.

    python benchmarks/serve_load.py --json serve.json

The service runs in a process of its own. Each round measures in turn, over the same images and with as many threads:

    direct   from an image's bytes to the mask's bytes in threads of this process, without any service
    calm     a few clients that behave, on connections that they keep
    storm    200 clients at once; of their requests some are garbage, some too large, some trickle in and are never
             finished, and some clients go before their answer

A client that is told 503 waits as Retry-After says. Latency is that of requests answered with 200, from the first byte
sent to the last one received. The service's memory is read ten times a second. Every status that a kind of request may
not get, and an end of the service by anything but exit code 0, makes this program fail.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve_clients import MAX_BYTES, SHARES, UPLOAD_SECONDS, Tally, run_clients

from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.images import decode_image
from ddsm_deploy.runtime.outputs import mask_png
from ddsm_deploy.runtime.pipeline import calm_opencv, open_for_batch
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sources import find_sources

REPO = Path(__file__).parent.parent
FRAMES = REPO / "examples" / "frames"

Curve = list[tuple[float, float]]
"""Seconds, and megabytes resident then."""


def _direct(segmenter: Segmenter, images: list[bytes], threads: int, seconds: float) -> Tally:
    tally = Tally()

    def work(number: int) -> None:
        chosen = random.Random(number)
        while time.perf_counter() < end:
            begun = time.perf_counter()
            mask_png(segmenter.predict(decode_image(chosen.choice(images))))
            tally.latencies.append(time.perf_counter() - begun)

    begun, cpu = time.perf_counter(), time.process_time()
    end = begun + seconds
    with calm_opencv(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    tally.seconds, tally.cpu = time.perf_counter() - begun, time.process_time() - cpu
    return tally


class Service:
    """The process under test."""

    def __init__(self, options: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "ddsm_deploy", "serve", "--port", "0", "--max-bytes", str(MAX_BYTES)]
        command += ["--upload-timeout", str(UPLOAD_SECONDS), "--queue", str(options.queue)]
        command += ["--workers", str(options.workers), "--backend", options.backend]
        command += ["--model", options.model] if options.model else []
        command += ["--precision", options.precision] if options.precision else []
        # decoders complain of garbage on stderr
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        listening, self.ready = self.process.stdout.readline(), self.process.stdout.readline().strip()
        found = re.search(r":(\d+)$", listening)
        if found is None or not self.ready:
            raise SystemExit(f"the service did not start: {' '.join(command)}")
        self.port = int(found[1])

    def resident(self) -> int:
        """Bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) * 1024

    def cpu_seconds(self) -> float:
        """So far, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, see proc(5)

    async def watch(self, curve: Curve) -> None:
        """Adds seconds and megabytes, ten times a second."""
        begun = time.perf_counter()
        while self.process.poll() is None:
            curve.append((round(time.perf_counter() - begun, 1), self.resident() / 1e6))
            await asyncio.sleep(0.1)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


@contextlib.contextmanager
def _service(options: argparse.Namespace) -> Iterator[Service]:
    service = Service(options)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.wait()


def _storm(service: Service, images: list[bytes], options: argparse.Namespace, curve: Curve) -> Tally:
    async def watched() -> Tally:
        watch = asyncio.create_task(service.watch(curve))
        tally = await run_clients(service.port, images, SHARES, options.clients, options.seconds)
        watch.cancel()
        return tally

    before = service.cpu_seconds()
    tally = asyncio.run(watched())
    tally.cpu = service.cpu_seconds() - before
    return tally


def _calm(service: Service, images: list[bytes], options: argparse.Namespace) -> Tally:
    before = service.cpu_seconds()
    tally = asyncio.run(run_clients(service.port, images, {"good": 1}, 2 * options.workers, options.seconds))
    tally.cpu = service.cpu_seconds() - before
    return tally


def main() -> None:
    options = _arguments()
    random.seed(0)
    images = [Path(source.path).read_bytes() for source in find_sources([options.data], REPO / "none")]
    totals = {phase: Tally() for phase in ("direct", "calm", "storm")}
    curves: list[Curve] = []
    machine = machine_facts()
    wanted = {"backend": options.backend, "precision": options.precision, "workers": options.workers}
    with open_for_batch(options.model, **wanted) as segmenter, _service(options) as service:
        ran, start = segmenter.label, service.resident() / 1e6
        for number in range(1, options.rounds + 1):
            curves.append([])
            measured = {"direct": _direct(segmenter, images, options.workers, options.seconds)}
            measured["calm"] = _calm(service, images, options)
            measured["storm"] = _storm(service, images, options, curves[-1])
            for phase, tally in measured.items():
                totals[phase].add(tally)
            print(f"round {number}: " + ", ".join(f"{phase} {t.rate:.1f} images/s" for phase, t in measured.items()))
        code = service.stop()
    result = {
        "model": segmenter.spec.name,
        "ran": ran,
        "service": service.ready,
        "options": {key: str(value) for key, value in vars(options).items()},
        **{phase: tally.to_json() for phase, tally in totals.items()},
        "calm_of_direct": totals["calm"].rate / totals["direct"].rate,
        "storm_of_direct": totals["storm"].rate / totals["direct"].rate,
        "resident_mb": {
            "start": start,
            "peak_of_each_storm": [max(mb for _, mb in curve) for curve in curves],
            "end_of_each_storm": [curve[-1][1] for curve in curves],
            "curves": curves,
        },
        "exit_code": code,
        "wrong": [*totals["calm"].wrong(), *totals["storm"].wrong()],
        "machine": machine,
    }
    _print(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if result["wrong"] or code:
        raise SystemExit(1)


def _print(result: dict[str, Any]) -> None:
    print(f"{result['model']} on {result['ran']}")
    for phase in ("direct", "calm", "storm"):
        row = result[phase]
        print(
            f"  {phase:7} {row['images_a_second']:7.1f} images/s  p50 {row['p50_ms'] or 0:7.1f} ms  "
            f"p99 {row['p99_ms'] or 0:7.1f} ms  CPU {row['cpu_ms_an_image']:6.1f} ms an image"
        )
    for kind, answers in result["storm"]["answers"].items():
        print(f"  {kind:17} " + ", ".join(f"{count} x {got}" for got, count in answers.items()))
    memory = result["resident_mb"]
    peaks = ", ".join(f"{peak:.0f}" for peak in memory["peak_of_each_storm"])
    print(f"  memory {memory['start']:.0f} MB at the start; peaks {peaks} MB; exit code {result['exit_code']}")
    for line in result["wrong"]:
        print(f"  WRONG: {line}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--data", type=Path, default=FRAMES, help="folder of images (default: the example frames)")
    parser.add_argument("--model", help="file, bundle or shipped name (default: ddsm-lite0)")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase of a round")
    return parser.parse_args()


if __name__ == "__main__":
    main()
