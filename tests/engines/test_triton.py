"""Models served by a real Triton server, over the wire: masks, batching, versions, and a link that fails.

What every engine must do is in `test_contract.py`, which runs over this backend too.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from colour_graph import CLASSES, write_colour_model
from faulty_link import FaultyLink
from triton_server import TritonServer

from ddsm_deploy import Segmenter, read_image, resolve
from ddsm_deploy.engines import Engine, EngineOptions, open_engine, usable_backends
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError
from ddsm_deploy.images import Image

FRAMES = Path(__file__).parents[2] / "examples" / "frames"
DELAY = 0.3  # seconds that a request waits for others


def deploy(model: str | Path, server: TritonServer, name: str, **options: object) -> str:
    """Deploys and loads a model; returns its URL."""
    from ddsm_deploy.export.triton.config import TritonOptions
    from ddsm_deploy.export.triton.repository import deploy

    deploy(model, server.repository, TritonOptions(name=name, threads=1, **options))  # type: ignore[arg-type]
    return server.load(name)


def random_images(count: int) -> list[Image]:
    return list(np.random.default_rng(1).integers(0, 256, (count, 1, 8, 12, 3), dtype=np.uint8))


def strongest(image: Image) -> Image:
    """What `colour_graph` answers, by its definition: the strongest of red, green and blue, of equals the first."""
    return image[..., ::-1].argmax(-1).astype(np.uint8)


@pytest.fixture(scope="module")
def colours(triton_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The colour model with an open batch, of which Triton makes batches of up to four."""
    path = write_colour_model(tmp_path_factory.mktemp("colours") / "colours.onnx", dynamic=True)
    return deploy(path, triton_server, "colours", max_batch=4, batch_delay_us=round(DELAY * 1e6))


@pytest.fixture(scope="module")
def engine(colours: str) -> Iterator[Engine]:
    with open_engine(resolve(colours), "triton") as engine:  # type: ignore[attr-defined]
        yield engine


def test_a_served_model_is_a_model_like_any_other(colours: str) -> None:
    artifact = resolve(colours)
    assert (artifact.name, artifact.spec.classes, list(artifact.files)) == ("colours", CLASSES, ["endpoint"])
    (image,) = random_images(1)
    with Segmenter.open(colours) as segmenter:  # auto
        assert (segmenter.backend, segmenter.precision, segmenter.sampling) == ("triton", "fp32", "portable")
        assert segmenter.choice == "triton, where the model is served"
        np.testing.assert_array_equal(segmenter.predict(image[0]).mask, strongest(image)[0])
    with Segmenter.open(artifact.files["endpoint"], backend="triton") as segmenter:
        np.testing.assert_array_equal(segmenter.predict(image[0]).mask, strongest(image)[0])


def test_triton_warms_up_with_one_and_with_the_most(colours: str, triton_server: TritonServer) -> None:
    log = triton_server.log.read_text(errors="replace")
    loaded = log[log.index("loading: colours:1") : log.index("successfully loaded 'colours'")]
    assert [line for line in loaded.splitlines() if line.startswith("ran a batch")] == [
        "ran a batch of 1",
        "ran a batch of 4",
    ]


def test_requests_of_many_threads_become_batches(engine: Engine, triton_server: TritonServer) -> None:
    before = triton_server.batches("colours")
    images = random_images(16)
    with ThreadPoolExecutor(16) as pool:
        masks = list(pool.map(lambda image: engine.run({"image": image})["mask"], images))
    for image, mask in zip(images, masks, strict=True):
        np.testing.assert_array_equal(mask, strongest(image))
    after = triton_server.batches("colours")
    made = {size: after[size] - before.get(size, 0) for size in after}
    assert sum(size * count for size, count in made.items()) == 16
    assert max(size for size, count in made.items() if count) > 1


def test_a_batch_in_one_call(engine: Engine) -> None:
    images = np.concatenate(random_images(3))
    np.testing.assert_array_equal(engine.run({"image": images})["mask"], strongest(images))


def test_the_shipped_model_gives_the_masks_that_it_gives_here(shipped_model: Path, triton_server: TritonServer) -> None:
    url = deploy(shipped_model, triton_server, "street")
    options = EngineOptions(threads=1, sampling="portable")
    with Segmenter.open(url) as served, Segmenter.open(shipped_model, backend="onnxruntime", options=options) as here:
        assert served.spec.replace(provenance={}) == here.spec.replace(provenance={})
        for path in sorted(FRAMES.iterdir())[:2]:
            image = read_image(path)
            np.testing.assert_array_equal(served.predict(image).mask, here.predict(image).mask)


def test_an_int8_file_says_so(shipped_model: Path, triton_server: TritonServer) -> None:
    url = deploy(shipped_model, triton_server, "street-int8", precision="int8")
    with Segmenter.open(url, backend="triton") as segmenter:
        assert (segmenter.precision, segmenter.spec.precision) == ("int8", "int8")
    with pytest.raises(BackendError, match="triton runs street-int8 at int8, as its graph is written, not at fp32"):
        Segmenter.open(url, backend="triton", precision="fp32")


def test_the_commands_take_it(colours: str, tmp_path: Path) -> None:
    def ddsm(*arguments: str | Path) -> str:
        command = [sys.executable, "-W", "error", "-m", "ddsm_deploy", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    frames = sorted(FRAMES.iterdir())[:2]
    said = ddsm("segment", *frames, "-o", tmp_path / "out", "-m", colours)
    assert said.startswith("2 frames: 2 done, 0 failed")
    for frame in frames:
        mask = read_image(tmp_path / "out" / "masks" / f"{frame.stem}.png")[..., 0]
        np.testing.assert_array_equal(mask, strongest(read_image(frame)))
    assert ddsm("segment", *frames, "-o", tmp_path / "out", "-m", colours).startswith(
        "2 frames: 0 done, 0 failed, 2 sk"
    )
    local = write_colour_model(tmp_path / "colours.onnx", dynamic=True)
    assert "colours.endpoint on triton fp32" in ddsm("verify", local, colours, "--data", FRAMES, "--images", "1")


def test_versions(triton_server: TritonServer, tmp_path: Path) -> None:
    path = write_colour_model(tmp_path / "colours.onnx", dynamic=True)
    url = deploy(path, triton_server, "versions")
    assert resolve(f"{url}/1").name == "versions"
    deploy(path, triton_server, "versions", new_version=True)
    (image,) = random_images(1)
    with open_engine(resolve(f"{url}/2"), "triton") as engine:  # type: ignore[attr-defined]
        np.testing.assert_array_equal(engine.run({"image": image})["mask"], strongest(image))
    with pytest.raises(
        BackendError, match="version 1 is not"
    ):  # ready, or found any more: Triton serves the newest alone
        resolve(f"{url}/1")


def test_what_the_server_says_against_it_is_told(engine: Engine, colours: str) -> None:
    with pytest.raises(BackendError, match=r"colours: the server says: .*batch-size must be <= 4 for 'colours'"):
        engine.run({"image": np.concatenate(random_images(5))})
    with pytest.raises(BackendError, match="the server says: Request for unknown model: 'coloursx' is not found"):
        resolve(f"{colours}x")
    for options, error in (
        (EngineOptions(threads=2), ConfigError),
        (EngineOptions(precision="int8"), BackendError),
        (EngineOptions(sampling="fused"), BackendError),
        (EngineOptions(outputs=("mask", "logits")), BackendError),
    ):
        with pytest.raises(error):
            open_engine(resolve(colours), "triton", options)


def test_a_model_that_was_not_deployed_by_us(triton_server: TritonServer, tmp_path: Path) -> None:
    from ddsm_deploy.export.triton.config import config_text, read_config

    model = write_colour_model(tmp_path / "colours.onnx", dynamic=True)
    deploy(model, triton_server, "bare")
    file = triton_server.repository / "bare" / "config.pbtxt"
    config = read_config(file)
    config.parameters.clear()
    file.write_text(config_text(config), encoding="utf-8")
    url = triton_server.load("bare")
    with pytest.raises(ArtifactError, match=r"has no ddsm.spec; .*, or name the model .*/bare\?spec=MODEL"):
        resolve(url)
    (image,) = random_images(1)
    with Segmenter.open(f"{url}?spec={model}") as segmenter:
        np.testing.assert_array_equal(segmenter.predict(image[0]).mask, strongest(image)[0])


@pytest.fixture
def link(triton_server: TritonServer) -> Iterator[FaultyLink]:
    with FaultyLink(triton_server.address) as link:
        yield link


def test_a_link_that_comes_back_is_not_noticed(colours: str, link: FaultyLink) -> None:
    (image,) = random_images(1)
    with open_engine(resolve(f"triton://{link.address}/colours"), "triton") as engine:  # type: ignore[attr-defined]
        engine.run({"image": image})
        taken = link.accepted
        link.cut()
        mending = threading.Timer(0.2, link.mend)
        mending.start()
        np.testing.assert_array_equal(engine.run({"image": image})["mask"], strongest(image))
        mending.join()
        assert link.accepted > taken


def test_a_link_that_stays_away_is_an_error_and_no_more(colours: str, link: FaultyLink) -> None:
    (image,) = random_images(1)
    with open_engine(resolve(f"triton://{link.address}/colours"), "triton") as engine:  # type: ignore[attr-defined]
        link.cut()
        start = time.monotonic()
        with pytest.raises(BackendError, match=r"/colours: not available, retries included \(.*\); are server"):
            engine.run({"image": image})
        assert time.monotonic() - start < 30  # the tries take two seconds, and end
        link.mend()
        np.testing.assert_array_equal(engine.run({"image": image})["mask"], strongest(image))


def test_a_link_that_stalls_is_not_waited_for(colours: str, link: FaultyLink) -> None:
    artifact = resolve(f"triton://{link.address}/colours?timeout=1")
    (image,) = random_images(1)
    with open_engine(artifact, "triton") as engine:  # type: ignore[attr-defined]
        link.stall()
        with pytest.raises(BackendError, match=r"no answer within 1 s; allow more with \?timeout=SECONDS"):
            engine.run({"image": image})


def test_the_state_of_the_backend(need) -> None:
    need("tritonclient")
    status = {entry.backend: entry for entry in usable_backends()}["triton"]
    assert status.available
    assert status.version
