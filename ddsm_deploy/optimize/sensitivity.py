"""Which layers INT8 harms: measured one by one, and the fewest left out that keep the masks within a budget."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.export.onnxgraph import Graph, save_graph
from ddsm_deploy.export.qdq import Layer, Range, Scheme, insert_qdq
from ddsm_deploy.images import Labels
from ddsm_deploy.optimize.material import Material
from ddsm_deploy.parity import ParityBudget, ParityMeter, ParityResult
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec

MOST_PUT_BACK = 12
"""Left-out layers that are tried once more, the least sensitive first: each costs a run over all frames."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What quantizing one layer alone costs.

    Attributes:
        layer: the layer.
        changed: per cent of the pixels whose class changes.
        miou_drop: points of mIoU lost (negative: gained); None without labels.
    """

    layer: Layer
    changed: float
    miou_drop: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What the search found.

    Attributes:
        quantized: names of the layers to quantize, in the graph's order.
        kept: those left in float, the most sensitive first.
        costs: of each layer by itself, in the graph's order; empty where nothing had to be left out and nobody asked.
        all_quantized: all layers quantized against the float model, on the search's frames.
        result: likewise the choice made; it is false where even that misses the budget.
        runs: graphs that were tried.
    """

    quantized: tuple[str, ...]
    kept: tuple[Layer, ...]
    costs: tuple[Cost, ...]
    all_quantized: ParityResult
    result: ParityResult
    runs: int


class Judge:
    """Runs forms of one model over the same frames, and compares their masks with the float model's.

    Args:
        material: to run on; at least one image.
        segmenter: of the float model.

    Attributes:
        precision: what the file that was judged last really ran at.
    """

    precision = ""

    def __init__(self, material: Material, segmenter: Segmenter) -> None:
        self._material = material
        self._segmenter = segmenter
        self._reference = [self._mask(segmenter.infer(image)["mask"], i) for i, image in enumerate(material.inputs)]

    def file(
        self,
        artifact: Artifact,
        backend: str,
        *,
        precision: str | None = None,
        threads: int | None = None,
        budget: ParityBudget | None = None,
    ) -> ParityResult:
        """One artefact on a backend against the reference.

        Raises:
            BackendError: it can't run there.
        """
        meter = ParityMeter(self._segmenter.spec.classes)
        engine = open_engine(artifact, backend, EngineOptions(threads=threads, precision=precision, outputs=("mask",)))
        self.precision = engine.precision
        try:
            name = engine.inputs[0].name
            for index, image in enumerate(self._material.inputs):
                mask = self._mask(engine.run({name: image})["mask"], index)
                truth = self._material.labels[index] if self._material.labels else None
                meter.update(self._reference[index], mask, truth=truth, name=self._material.names[index])
        finally:
            engine.close()
        return meter.result(budget)

    def graph(
        self, graph: Graph, spec: ModelSpec, backend: str, *, threads: int | None, budget: ParityBudget
    ) -> ParityResult:
        """Likewise a graph in memory."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tried.onnx"
            save_graph(graph, file, spec)
            return self.file(Artifact("tried", spec, {"onnx": file}), backend, threads=threads, budget=budget)

    def _mask(self, raw: np.ndarray, index: int) -> Labels:
        """At the size of the labels, where there are any: that is where accuracy is counted."""
        if not self._material.labels:
            return np.asarray(raw[0], dtype=np.uint8)
        return self._segmenter.finish({"mask": raw}, self._material.labels[index].shape).mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searcher:
    """Everything that a search needs but the budget.

    Attributes:
        graph: float32, a `plain_graph`.
        spec: of the quantized model.
        layers: all that may be quantized.
        ranges: see `insert_qdq`.
        scheme: likewise.
        weight_bits: likewise.
        judge: compares.
        backend: on which graphs are tried.
        threads: of one inference.
    """

    graph: Graph
    spec: ModelSpec
    layers: Sequence[Layer]
    ranges: Mapping[str, Range]
    scheme: Scheme
    weight_bits: int
    judge: Judge
    backend: str
    threads: int | None

    def quantized(self, names: Collection[str]) -> Graph:
        """The graph with the named layers quantized."""
        return insert_qdq(self.graph, self.ranges, names, self.scheme, weight_bits=self.weight_bits)

    def tried(self, names: Collection[str], budget: ParityBudget) -> ParityResult:
        """That graph against the float model."""
        return self.judge.graph(self.quantized(names), self.spec, self.backend, threads=self.threads, budget=budget)


def search(
    searcher: Searcher,
    budget: ParityBudget,
    *,
    always: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Search:
    """Finds the fewest layers to leave in float so that the rest, quantized together, stays within a budget.

    All layers together are tried first. If that exceeds the budget, each layer is quantized by itself and the layers
    are ordered by what that costs; the shortest beginning of that order whose leaving out suffices is found by halving;
    then the least sensitive of those left out are put back one by one where the budget allows it.

    Args:
        searcher: the model, and how to try it.
        budget: on the masks.
        always: measure each layer even where nothing has to be left out.
        progress: called with what is going on, how much of it is done, and how much there is.
    """
    report = progress or (lambda text, done, planned: None)
    layers = {layer.name: layer for layer in searcher.layers}
    report("all layers", 0, 1)
    everything = searcher.tried(layers, budget)
    if everything and not always:
        return Search(quantized=tuple(layers), kept=(), costs=(), all_quantized=everything, result=everything, runs=1)
    costs = []
    for done, layer in enumerate(searcher.layers):
        report("layer by layer", done, len(layers))
        alone = searcher.tried([layer.name], budget)
        costs.append(Cost(layer=layer, changed=alone.changed, miou_drop=alone.miou_drop))
    order = [cost.layer.name for cost in sorted(costs, key=lambda cost: -cost.changed)]
    chosen = _Chosen(searcher, budget, order, everything, report)
    kept = chosen.put_back(chosen.shortest()) if not everything else []
    return Search(
        quantized=tuple(name for name in layers if name not in kept),
        kept=tuple(layers[name] for name in kept),
        costs=tuple(costs),
        all_quantized=everything,
        result=chosen.results[frozenset(kept)],
        runs=len(costs) + len(chosen.results),
    )


class _Chosen:
    """The second half of a search: results of what was left out, none tried twice."""

    def __init__(
        self,
        searcher: Searcher,
        budget: ParityBudget,
        order: list[str],
        everything: ParityResult,
        report: Callable[[str, int, int], None],
    ) -> None:
        self.searcher = searcher
        self.budget = budget
        self.order = order
        self.report = report
        self.results: dict[frozenset[str], ParityResult] = {frozenset(): everything}

    def fits(self, kept: Sequence[str]) -> bool:
        key = frozenset(kept)
        if key not in self.results:
            most = len(self.order).bit_length() + MOST_PUT_BACK + 1
            self.report(f"without {len(kept)} layers", min(len(self.results), most), most)
            rest = [name for name in self.order if name not in key]
            self.results[key] = self.searcher.tried(rest, self.budget)
        return bool(self.results[key])

    def shortest(self) -> list[str]:
        """Length of the shortest beginning of the order that suffices, by halving: noise makes it nearly, not strictly,
        monotonous, so what is found does suffice, and one a little shorter might."""
        low, high = 0, len(self.order)
        while high - low > 1:
            middle = (low + high) // 2
            if self.fits(self.order[:middle]):
                high = middle
            else:
                low = middle
        self.fits(self.order[:high])
        return self.order[:high]

    def put_back(self, kept: list[str]) -> list[str]:
        for name in list(reversed(kept))[:MOST_PUT_BACK]:
            fewer = [other for other in kept if other != name]
            if self.fits(fewer):
                kept = fewer
        return kept
