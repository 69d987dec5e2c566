"""Latency against accuracy on this CPU: the shipped models in each precision, and public architectures beside them.

    python benchmarks/latency_accuracy.py --data CAMVID [--plain CHECKPOINT] [--threads 2] [--runs 60]
        [--judged-by NAME=BUNDLE …] [--peers plain-pyramid deeplabv3plus segformer-b0 yolo26n-sem]
        [--json FILE] [--plot docs/images/latency_accuracy.png]
    python benchmarks/latency_accuracy.py --data CAMVID --rescore FILE [--judged-by NAME=BUNDLE …] [--json FILE]
    python benchmarks/latency_accuracy.py --redraw FILE --plot docs/images/latency_accuracy.png

Every model runs at 360×480, image bytes to class ids, one image at a time; of each precision the faster backend counts.
mIoU is that of the same files on CamVid val. Peers are built untrained from packages of their own
(``pip install segmentation-models-pytorch transformers ultralytics``), exported and run the same way: their speed is
real, and they have no accuracy here, so they are marks on the time axis. ``--plain`` is the plain pyramid, as trained
by `ddsm train --variant fpn-lite0`. A shipped model that has learnt from val is scored by ``--judged-by``, the bundle
of the same network before it did. ``--rescore`` keeps an earlier run's times, and scores the shipped models anew: for
new weights in the same network. Rounds of runs alternate over the backends of one model. Let nothing else run
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddsm_deploy.artifact import shipped_models
from ddsm_deploy.datasets import camvid_classes, open_dataset
from ddsm_deploy.evaluate.accuracy import evaluate
from ddsm_deploy.evaluate.benchmark import BenchOptions, bench
from ddsm_deploy.export import ExportOptions, export_onnx
from ddsm_deploy.export.graph import trace
from ddsm_deploy.export.onnxgraph import save_graph
from ddsm_deploy.model.deploy import DeployModule
from ddsm_deploy.model.network import build_network
from ddsm_deploy.model.variants import VARIANTS
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec

SIZE = (360, 480)
BACKENDS = ("onnxruntime", "openvino")


class Sized(nn.Module):
    """Calls a network on an image padded to a multiple of 32, and gives its logits at the image's own size."""

    def __init__(self, network: nn.Module, logits: Callable[[Any], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.network, self.logits = network, logits

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image B×3×H×W -> logits B×classes×H×W."""
        height, width = image.shape[-2:]
        padded = nn.functional.pad(image, (0, -width % 32, 0, -height % 32))
        logits = self.logits(self.network(padded))
        logits = nn.functional.interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


def deeplabv3plus(classes: int) -> nn.Module:
    """DeepLabV3+ on the backbone of ddsm-lite0."""
    import segmentation_models_pytorch as smp

    return Sized(smp.DeepLabV3Plus("tu-efficientnet_lite0", encoder_weights=None, classes=classes))


def segformer_b0(classes: int) -> nn.Module:
    """SegFormer-B0."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes, decoder_hidden_size=256))
    return Sized(network, lambda output: output.logits)


def yolo26n_sem(classes: int) -> nn.Module:
    """YOLO26n's semantic segmentation network."""
    from ultralytics.nn.tasks import SemanticSegmentationModel

    return Sized(
        SemanticSegmentationModel("yolo26n-sem.yaml", nc=classes, verbose=False),
        lambda x: x[0] if isinstance(x, tuple) else x,
    )


def plain_pyramid(classes: int) -> nn.Module:
    """The pyramid of ddsm-lite0 without its branches; trained alike, both stand in docs/experiments.md."""
    return build_network(VARIANTS["fpn-lite0"], classes)


PEERS: dict[str, Callable[[int], nn.Module]] = {
    "plain-pyramid": plain_pyramid,
    "deeplabv3plus": deeplabv3plus,
    "segformer-b0": segformer_b0,
    "yolo26n-sem": yolo26n_sem,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CamVid's folder")
    parser.add_argument("--plain", type=Path, help="checkpoint of the plain pyramid")
    parser.add_argument(
        "--judged-by", nargs="*", default=[], metavar="NAME=BUNDLE", help="whose masks to score instead"
    )
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--redraw", type=Path, help="the JSON of an earlier run, to draw and not to measure")
    parser.add_argument("--rescore", type=Path, help="the JSON of an earlier run, whose times are kept")
    args = parser.parse_args()
    if args.redraw:
        result = json.loads(args.redraw.read_text(encoding="utf-8"))
    elif args.rescore and args.data:
        result = rescored(args)
    elif args.data:
        result = measure(args)
    else:
        parser.error("--data or --redraw is needed")
    for row in result["rows"]:
        miou = "speed alone" if row["miou"] is None else f"{row['miou']:.2f} mIoU"
        print(f"{row['model']:16} {row['precision']:10} {row['backend']:12} p50 {row['p50_ms']:7.1f} ms  {miou}")
    if args.json and not args.redraw:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw(result, args.plot)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times and scores all models; the machine as `ddsm bench` describes it."""
    rows: list[dict[str, Any]] = []
    judges = dict(given.split("=", 1) for given in args.judged_by)
    with tempfile.TemporaryDirectory() as temporary:
        models: list[tuple[str, str | Path, bool]] = [(name, name, True) for name in shipped_models()]
        if args.plain:
            export_onnx(args.plain, Path(temporary) / "plain.onnx", ExportOptions())
            models.append(("plain pyramid", Path(temporary) / "plain.onnx", True))
        models.extend((name, export_peer(name, Path(temporary)), False) for name in args.peers)
        for name, model, trained in models:
            options = BenchOptions(backends=BACKENDS, threads=args.threads, runs=args.runs, images=args.data / "val")
            result = json.loads(bench(str(model), options).to_json())
            timed = [
                row for row in result["rows"] if "p50_ms" in row and (row["sampling"] != "portable" or not trained)
            ]
            for precision in dict.fromkeys(row["precision"] for row in timed):
                best = min((r for r in timed if r["precision"] == precision), key=lambda r: r["p50_ms"])
                rows.append({key: best[key] for key in ("backend", "precision", "p50_ms", "p99_ms")} | {"model": name})
                rows[-1]["miou"] = score(judges.get(name, model), best, args.data) if trained else None
    return {"machine": result["machine"], "threads": args.threads, "size": SIZE, "rows": rows}


def rescored(args: argparse.Namespace) -> dict[str, Any]:
    """An earlier run's result, with the accuracy that the shipped models have now."""
    result: dict[str, Any] = json.loads(args.rescore.read_text(encoding="utf-8"))
    judges = dict(given.split("=", 1) for given in args.judged_by)
    for row in result["rows"]:
        if row["model"] in shipped_models():
            row["miou"] = score(judges.get(row["model"], row["model"]), row, args.data)
    return result


def score(model: str | Path, row: dict[str, Any], data: Path) -> float:
    """mIoU of what was timed, on val, percent."""
    with Segmenter.open(model, backend=row["backend"], precision=row["precision"]) as segmenter:
        return evaluate(segmenter, open_dataset("camvid", data, "val")).miou


def export_peer(name: str, folder: Path) -> Path:
    """An untrained peer as an ONNX file like ours."""
    torch.manual_seed(0)
    classes = camvid_classes()
    spec = ModelSpec(name=name, classes=classes.names, palette=classes.palette, height=SIZE[0], width=SIZE[1])
    module = DeployModule(PEERS[name](len(classes.names)).eval(), spec).eval()
    path = folder / f"{name}.onnx"
    save_graph(trace(module, SIZE, dynamic="none", sampling="portable", outputs=("mask",)), path, spec)
    return path


def draw(result: dict[str, Any], path: Path) -> None:
    """The plot: a line for each model through its precisions; below, on the same axis, those without accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(result["rows"], key=lambda row: row["p50_ms"])
    scored = [row for row in rows if row["miou"] is not None]
    others = [row for row in rows if row["miou"] is None]
    names = list(dict.fromkeys(row["model"] for row in others))
    longest = max(row["p50_ms"] for row in rows)
    figure, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), layout="constrained", height_ratios=(3, max(1, len(names) / 3))
    )
    for name in dict.fromkeys(row["model"] for row in scored):
        points = [row for row in scored if row["model"] == name]
        upper.plot([row["p50_ms"] for row in points], [row["miou"] for row in points], "o-", label=name)
        for index, row in enumerate(points):
            offset = ((-6, 3), (-3, -15), (6, -15))[index] if index < 3 else (0, 7)  # the first three are close
            upper.annotate(
                row["precision"], (row["p50_ms"], row["miou"]), offset, textcoords="offset points",
                fontsize=8, ha="center" if index else "right",
            )  # fmt: skip
    upper.margins(y=0.15)
    upper.set_ylabel("mIoU on CamVid val, %")
    upper.legend(loc="center right")
    for row in others:
        same = [other["p50_ms"] for other in others if other["model"] == row["model"]]
        crowded = any(0 < ms - row["p50_ms"] < longest / 10 for ms in same)
        lower.plot(
            row["p50_ms"], names.index(row["model"]), "|", ms=14, mew=2, color=f"C{2 + names.index(row['model'])}"
        )
        lower.annotate(
            row["precision"],
            (row["p50_ms"], names.index(row["model"])),
            (-5 if crowded else 5, -3),
            textcoords="offset points",
            fontsize=8,
            ha="right" if crowded else "left",
        )
    lower.set_yticks(range(len(names)), [f"{name}\n(speed alone)" for name in names], fontsize=8)
    lower.margins(y=0.2)
    lower.set_xlim(left=0)
    machine = result["machine"]["cpu"]
    lower.set_xlabel(f"median latency of one 360×480 image, ms ({machine}, {result['threads']} threads)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
