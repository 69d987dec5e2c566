"""Whether every frame of a camera gets its own mask, in order and in time, for minutes on end.

    python benchmarks/paced_stream.py --rate 30 --seconds 180 --json paced.json [--data CAMVID/val] [--plot paced.png]

Frames come on an absolute schedule and never wait for the segmenter; latency counts from the moment a frame was due to
its mask at the image's size. Each mask is compared with the one that its frame got before the run, so that masks that
are out of order or another frame's are counted, not assumed away. What is measured and how: docs/deadlines.md. Let
nothing else run meanwhile; `--load N` starts N busy processes on purpose.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ddsm_deploy.evaluate.paced import PacedOptions, PacedResult, bench_paced
from ddsm_deploy.evaluate.pacedplot import new_figure, plot_paced

FRAMES = Path(__file__).parent.parent / "examples" / "frames"

QUIET = 0.3
"""Load average a core above which other work shares the figures."""


def main() -> None:
    args = _arguments()
    if args.plot:
        new_figure()  # a missing package is told before the run
    options = PacedOptions(
        rate=args.rate,
        deadline_ms=args.deadline_ms,
        duration=args.seconds,
        policy=args.policy,
        load=args.load,
        images=args.data,
        backend=args.backend,
        precision=args.precision,
        threads=args.threads,
    )
    result = bench_paced(args.model, options, progress=lambda text: print(text, file=sys.stderr))
    _print(result)
    if args.json:
        args.json.write_text(result.to_json(per_frame=args.per_frame) + "\n", encoding="utf-8")
    if args.plot:
        plot_paced(result, args.plot)
    if result.record.interrupted:
        raise KeyboardInterrupt


def _print(result: PacedResult) -> None:
    fields, machine = result.fields(), result.machine
    average = (machine["load_average"] or [0])[0]
    if average > QUIET * machine["cores_usable"]:
        print(f"warning: the load average was {average:.1f}, so other work shares these figures", file=sys.stderr)
    ran = " ".join(str(result.settings[key]) for key in ("model", "backend", "precision", "sampling"))
    print(f"{ran} ({result.choice}); images: {result.settings['images']}")
    for key in ("frames", "deadline_misses", "dropped", "reordered", "mixed_up", "distinct_masks"):
        print(f"  {key:20} {fields[key]}")
    for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms", "jitter_ms", "camera_late_max_ms", "rss_mb", "rss_growth_mb"):
        print(f"  {key:20} {'–' if fields[key] is None else format(fields[key], '.2f')}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=30.0, help="frames a second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=180.0, help="default: %(default)s")
    parser.add_argument("--deadline-ms", type=float, help="default: one frame's period")
    parser.add_argument("--policy", choices=("latest", "every"), default="latest", help="frames that wait")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="busy processes meanwhile")
    parser.add_argument("--data", type=Path, default=FRAMES, help="folder of frames (default: examples/frames)")
    parser.add_argument("--model", default="ddsm-lite0", help="file, bundle or shipped name")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", help="int8, bf16, fp32…")
    parser.add_argument("--threads", type=int, help="of one inference; else the runtime's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--per-frame", action="store_true", help="put every frame's latency into it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies into this PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
