"""A run on rendered scenes: it learns, logs, keeps its best, survives a kill, and refuses to overwrite."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch
from forked import ddsm
from safetensors.torch import load_file

from ddsm_deploy import kernels
from ddsm_deploy.datasets import open_dataset
from ddsm_deploy.errors import ConfigError
from ddsm_deploy.evaluate.accuracy import evaluate
from ddsm_deploy.interrupt import first_interrupt_asks
from ddsm_deploy.model.checkpoint import load_checkpoint, read_spec
from ddsm_deploy.model.network import build_network, synchronise_norms
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import NetworkConfig
from ddsm_deploy.train.config import TrainConfig
from ddsm_deploy.train.data import EvalImages, TrainImages
from ddsm_deploy.train.files import open_run
from ddsm_deploy.train.loop import Loaders, StopBetweenBatches
from ddsm_deploy.train.module import SegmentationTask, Teacher


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a network gains nothing by a second one, which would wait for the other process' tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def scenes(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rendered scenes as *train*, and some of them as *val*."""
    root = tmp_path_factory.mktemp("splits")
    shutil.copyfile(scenes / "classes.json", root / "classes.json")
    for folder in ("images", "labels"):
        (root / "val" / folder).mkdir(parents=True)
        (root / "train").mkdir(exist_ok=True)
        (root / "train" / folder).symlink_to(scenes / folder)
        for path in sorted((scenes / folder).iterdir())[:3]:
            shutil.copyfile(path, root / "val" / folder / path.name)
    return root


def options(scenes: Path, output: Path, *extra: str) -> list[str]:
    """A training of a tiny network, as the command's arguments."""
    network = ["--backbone", "test_efficientnet", "--no-pretrained", "--size", "64x96"]
    base = ["train", "--data", str(scenes), "--dataset", "folder", "-o", str(output), *network]
    return [*base, "--batch", "4", "--workers", "0", "--accelerator", "cpu", "--ema", "0.9", *extra]


def command(scenes: Path, output: Path, *extra: str) -> list[str]:
    """The same as a whole command line, for a process begun anew."""
    return [sys.executable, "-m", "ddsm_deploy", *options(scenes, output, *extra)]


def metrics(output: Path) -> list[dict[str, str]]:
    with (output / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six epochs, every second of them validated."""
    output = tmp_path_factory.mktemp("train") / "run"
    done = ddsm(*options(scenes, output, "--epochs", "6", "--validate-every", "2"))
    assert done.returncode == 0, done.stderr
    assert "best:" in done.stdout
    return output


def test_it_learns_and_logs(finished: Path) -> None:
    losses = [float(r["train/loss"]) for r in metrics(finished) if r["train/loss"]]
    mious = [float(r["val/miou"]) for r in metrics(finished) if r["val/miou"]]
    assert (len(losses), len(mious)) == (6, 3)
    assert losses[-1] < 0.8 * losses[0]
    assert mious[-1] > mious[0]
    assert list((finished / "logs").glob("events.out.tfevents.*"))


def test_the_best_checkpoint_bears_its_record(finished: Path) -> None:
    spec = read_spec(finished / "best.safetensors")
    best = max(float(r["val/miou"]) for r in metrics(finished) if r["val/miou"])
    assert spec.classes[0] == "sky" and (spec.height, spec.width) == (64, 96)
    assert float(spec.provenance["val_miou"]) == pytest.approx(best, abs=0.006)


def test_validation_every_second_epoch(finished: Path) -> None:
    assert [int(row["epoch"]) for row in metrics(finished) if row["val/miou"]] == [1, 3, 5]
    assert [int(row["epoch"]) for row in metrics(finished) if row["train/loss"]] == list(range(6))
    assert read_spec(finished / "final.safetensors").provenance["epoch"] == "5"


def test_the_last_epoch_has_to_be_validated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divisor"):
        TrainConfig(data=tmp_path, output=tmp_path, epochs=5, validate_every=2)


def test_a_finished_run_is_not_overwritten(finished: Path, scenes: Path) -> None:
    before = (finished / "best.safetensors").read_bytes()
    again = ddsm(*options(scenes, finished, "--epochs", "1"))
    assert again.returncode == 1 and "--resume" in again.stderr and "Traceback" not in again.stderr
    assert (finished / "best.safetensors").read_bytes() == before


def test_a_killed_run_goes_on_where_it_was(scenes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        command(scenes, output, "--epochs", "40"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    wanted = (output / "last.ckpt", output / "logs" / "metrics.csv")
    while not all(path.exists() for path in wanted) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    seen = [int(r["epoch"]) for r in metrics(output) if r["val/miou"]]
    epochs = max(seen, default=0) + 4
    resumed = ddsm(*options(scenes, output, "--epochs", str(epochs), "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    after = [int(r["epoch"]) for r in metrics(output) if r["val/miou"]]
    assert after[-1] == epochs - 1
    assert after == sorted(set(after)), "an epoch was trained or logged twice"
    assert set(seen) <= set(after), "what was logged before is lost"


def test_a_run_is_not_gone_on_with_as_another(finished: Path, scenes: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in ("config.json", "last.ckpt", "best.safetensors")}
    other = ddsm(*options(scenes, finished, "--epochs", "7", "--enlarge", "1.5", "--seed", "3", "--resume"))
    assert other.returncode == 1
    assert "begun with enlarge 1.0 (now 1.5), seed 0 (now 3); --resume takes the same" in other.stderr
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_what_an_older_run_had_not_is_no_default(finished: Path, scenes: Path, tmp_path: Path) -> None:
    begun = json.loads((finished / "config.json").read_text())
    del begun["strong_photometric"]
    (tmp_path / "config.json").write_text(json.dumps(begun))
    (tmp_path / "last.ckpt").touch()
    there = {key: value for key, value in begun.items() if key not in ("data", "output", "network", "resume")}
    there["crop"], there["scale"] = tuple(there["crop"]), tuple(there["scale"])
    config = TrainConfig(data=scenes, output=tmp_path, network=NetworkConfig(**begun["network"]), resume=True, **there)
    with pytest.raises(ConfigError, match=r"begun with strong_photometric 0\.0 \(now 0\.5\)"):
        open_run(config)


def test_a_run_that_goes_on_draws_other_crops(finished: Path, scenes: Path) -> None:
    from ddsm_deploy.train.loop import seed_of

    afresh = TrainConfig(data=scenes, output=finished, seed=5)
    seeds = [seed_of(dataclasses.replace(afresh, seed=seed, resume=True)) for seed in (5, 5, 6)]
    assert seed_of(afresh) == 5
    assert 5 != seeds[0] == seeds[1] != seeds[2]


def test_slow_sampling_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddsm_deploy.train.loop import slow_sampling

    config = TrainConfig(data=tmp_path, output=tmp_path)
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    kernels._library.cache_clear()
    try:
        assert "samples by standard operators: the fused kernels were not built" in slow_sampling(config, "cpu")
        assert slow_sampling(config, "cuda") == ""  # where there are no better
        plain = dataclasses.replace(config, network=NetworkConfig(fusion="add"))
        assert slow_sampling(plain, "cpu") == ""
    finally:
        kernels._library.cache_clear()
    monkeypatch.undo()
    assert bool(slow_sampling(config, "cpu")) != kernels.status().available


def test_it_starts_from_another_network(finished: Path, scenes: Path, tmp_path: Path) -> None:
    start = finished / "final.safetensors"
    extra = ["--init", str(start), "--fusion", "spatial", "--samples", "4", "--epochs", "1", "--lr", "1e-6"]
    done = ddsm(*options(scenes, tmp_path / "run", *extra))
    assert done.returncode == 0, done.stderr
    assert "start afresh (fusions.0.spatial, fusions.1.spatial, fusions.2.spatial)" in done.stderr
    # at that rate the weights are still those it started from
    before, after = load_file(start), load_file(tmp_path / "run" / "final.safetensors")
    for name in ("backbone.conv_stem.weight", "fusions.0.spatial.query.0.weight", "head.1.weight"):
        assert (before[name] - after[name]).abs().max() < 1e-4
    assert after["fusions.0.spatial.offset.weight"].shape[0] == 2 * 4


def test_it_learns_from_a_teacher(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """From its answers where no label says anything: all of a class' pixels are void, and are learnt all the same."""
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    classes = json.loads((data / "classes.json").read_text())
    teacher, spec = load_checkpoint(finished / "final.safetensors")
    images = EvalImages(
        open_dataset("folder", data, "val"), TrainConfig(data=data, output=tmp_path, height=64, width=96)
    )
    image = torch.stack([torch.as_tensor(images[index][0]) for index in range(len(images))])
    answers = Teacher(teacher, spec)(image).argmax(1)
    taken = int(answers.flatten().bincount().argmax())  # what it answers most
    for path in (data / "train" / "labels").iterdir():
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        labels[labels == classes[taken].get("value", taken)] = 255
        cv2.imwrite(str(path), labels)
    shares = []
    for name, extra in (("alone", []), ("taught", ["--teacher", str(finished / "final.safetensors")])):
        done = ddsm(*options(data, tmp_path / name, "--epochs", "6", "--validate-every", "6", "--distill", "8", *extra))
        assert done.returncode == 0, done.stderr
        network, own = load_checkpoint(tmp_path / name / "final.safetensors")
        shares.append(float((Teacher(network, own)(image).argmax(1) == taken).float().mean()))
    assert shares[0] < 0.05 < 0.2 < shares[1]


def test_a_teacher_is_no_part_of_the_task(finished: Path, scenes: Path, tmp_path: Path) -> None:
    network, spec = load_checkpoint(finished / "final.safetensors")
    config = TrainConfig(data=scenes, output=tmp_path)
    alone = SegmentationTask(build_network(spec.network, len(spec.classes)), spec, config, torch.ones(11))
    teacher = Teacher(network, spec)
    taught = SegmentationTask(alone.network, spec, config, torch.ones(11), teacher)
    assert list(taught.state_dict()) == list(alone.state_dict())
    assert len(list(taught.parameters())) == len(list(alone.parameters()))
    assert copy.deepcopy(taught).teacher is teacher  # what averages the weights copies the task
    taught.train()
    assert not teacher.network.training
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert not teacher(image).requires_grad


def test_a_teacher_has_the_same_classes(finished: Path, scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    classes = json.loads((data / "classes.json").read_text())
    classes[0]["name"] = "another"
    (data / "classes.json").write_text(json.dumps(classes))
    failed = ddsm(*options(data, tmp_path / "run", "--teacher", str(finished / "final.safetensors")))
    assert failed.returncode == 1
    assert "a teacher of other classes" in failed.stderr and len(failed.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_with_130_and_keeps_the_last_epoch(scenes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        command(scenes, output, "--epochs", "200", "--workers", "1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not (output / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: those that load images get it, too
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # one that does not end would go on beside the tests to come
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert (output / "best.safetensors").exists() and (output / "last.ckpt").exists()


def test_an_interrupt_waits_for_the_next_batch() -> None:
    """Raised at once, it can come while a lock is held that a logger's thread waits for, and the run never ends."""
    stopping = StopBetweenBatches()
    stopping.on_train_batch_start()
    before = signal.getsignal(signal.SIGINT)
    with first_interrupt_asks() as stopping.stop:
        signal.raise_signal(signal.SIGINT)
        for hook in (stopping.on_train_batch_start, stopping.on_validation_batch_start):
            with pytest.raises(KeyboardInterrupt):
                hook()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_hears_of_no_interrupt() -> None:
    events = []

    def listen() -> None:
        with first_interrupt_asks() as stop:
            events.append(stop.is_set())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert events == [False]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_devices_share_the_images_out(
    world: int, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded to the same number for training, whose devices go in step, and each once for validation."""
    config = TrainConfig(data=scenes, output=tmp_path, dataset="folder", height=64, width=96, batch=2, workers=0)
    training, validation = (open_dataset("folder", scenes, split) for split in ("train", "val"))
    data = Loaders(TrainImages(training, config), EvalImages(validation, config), config)
    batches, labels = [], []
    for rank in range(world):
        monkeypatch.setattr(data, "_place", lambda rank=rank: (world, rank))
        batches.append(len(data.train_dataloader()))
        labels += [picture for _, batch in data.val_dataloader() for picture in batch.numpy()]
    assert len(set(batches)) == 1 and batches[0] >= 1
    want = sorted(data.validation[index][1].numpy().tobytes() for index in range(len(validation.samples)))
    assert sorted(picture.tobytes() for picture in labels) == want


def test_a_run_on_two_devices(scenes: Path, tmp_path: Path) -> None:
    extra = ("--devices", "2", "--precision", "fp32", "--batch", "2", "--epochs", "6", "--validate-every", "6")
    whole = command(scenes, tmp_path / "run", *extra, "--lr", "0.01")  # Lightning starts the second by the same line
    done = subprocess.run(whole, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last:") == 1
    final = tmp_path / "run" / "final.safetensors"
    with Segmenter.open(final, backend="torch", precision="fp32") as segmenter:
        score = evaluate(segmenter, open_dataset("folder", scenes, "val"))
    assert score.miou > 1
    # on CPUs each process has batch statistics of its own in its last step
    assert float(read_spec(final).provenance["val_miou"]) == pytest.approx(score.miou, abs=0.5)


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet10t"])
def test_norms_over_devices_compute_the_same(backbone: str) -> None:
    """timm's norms hold activations, which PyTorch's own conversion loses."""
    network = build_network(NetworkConfig(backbone=backbone, channels=16), 3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = network(x)
        names = list(network.state_dict())
        synchronise_norms(network)
        assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules()) > 20
        torch.testing.assert_close(network(x), want)
    assert list(network.state_dict()) == names


def test_the_best_network_outlives_a_kill_before_the_checkpoint(finished: Path, scenes: Path, tmp_path: Path) -> None:
    from ddsm_deploy.train.loop import KeepBest

    shutil.copy(finished / "best.safetensors", tmp_path)
    there = read_spec(tmp_path / "best.safetensors").provenance
    keeper = KeepBest(tmp_path)
    keeper.load_state_dict({"miou": 0.0, "epoch": 0, "newest": 0.0})
    assert (keeper.miou, keeper.epoch) == (float(there["val_miou"]), int(there["epoch"]))


def test_damage_is_one_line(finished: Path, scenes: Path, tmp_path: Path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(finished, broken)
    (broken / "last.ckpt").write_bytes((finished / "last.ckpt").read_bytes()[:5000])
    failed = ddsm(*options(scenes, broken, "--epochs", "8", "--validate-every", "2", "--resume"))
    assert failed.returncode == 1
    assert "last.ckpt: damaged" in failed.stderr and len(failed.stderr.strip().splitlines()) == 1
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    image = min((data / "train" / "images").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    failed = ddsm(*options(data, tmp_path / "other", "--epochs", "1", "--workers", "1"))
    assert failed.returncode == 1
    assert image.name in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--variant", "nope"], "ddsm-lite0"),
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--precision", "int3"], "precision"),
        (["--dataset", "voc"], "camvid"),
        (["--resume"], "nothing to resume"),
        (["--precision", "fp16"], "no training in fp16 on a CPU"),
        (["--workers", "-1"], "workers is -1"),
        (["--distill", "0"], "distill is 0.0"),
        (["--teacher", "no_such_model"], "no_such_model"),
        (["--accelerator", "abacus"], "accelerator abacus"),
        (["--val-split", "train"], "the splits train and train are the same images"),
    ],
)
def test_bad_options_are_one_line(scenes: Path, tmp_path: Path, extra: list[str], says: str) -> None:
    failed = ddsm(*options(scenes, tmp_path / "run", *extra))
    assert failed.returncode == 1
    assert says in failed.stderr and len(failed.stderr.strip().splitlines()) == 1
