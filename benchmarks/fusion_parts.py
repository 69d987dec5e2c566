"""Which nodes of an exported network belong to its sampling branches, and what each is there for."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import onnx

WEIGHT = re.compile(r"fusions\.(\d+)\.(spatial|channel)\.([A-Za-z_]+)")
TRUNK = re.compile(r"(backbone|context|laterals|merge|head)\.\S*weight")
SAMPLERS = ("DynamicSampleAttention", "GridSample")
JOINS = ("Add", "Resize")
PREPARES = ("Concat", "Unsqueeze")  # of an input of the sampling


def branch_parts(path: Path) -> dict[str, str]:
    """Names of a file's nodes and of the tensors that they make -> ``fusions.0.spatial.query`` and the like.

    What belongs to no branch has an empty text. The trunk is what is reached from the answer, backwards, without
    entering a branch, and what is resized with no convolution of a branch before it, as in the plain pyramid. A node
    depends on a branch where that branch's weights or its sampling lie upstream of it, nearer than any convolution of
    the trunk; of such nodes the trunk owns only those that add a branch's result to something of its own, and those
    that resize the sum.
    """
    nodes = list(onnx.load(str(path)).graph.node)
    makes = {name: node for node in nodes for name in node.output}
    tainted: set[str] = set()
    own: set[str] = set()  # tensors that the trunk may own, if they are reached from the answer
    for node in nodes:
        branch = bool(WEIGHT.search(" ".join(node.input))) or node.op_type in SAMPLERS
        if (branch or tainted.intersection(node.input)) and not TRUNK.search(" ".join(node.input)):
            tainted.update(node.output)
        if not tainted.intersection(node.output) or (node.op_type in JOINS and own.intersection(node.input)):
            own.update(node.output)
    trunk: set[str] = set()
    waiting = list(nodes[-1].output)
    waiting += [node.output[0] for node in nodes if node.op_type == "Resize" and node.output[0] in own]
    while waiting:
        name = waiting.pop()
        if name in makes and name in own and name not in trunk:
            trunk.update(makes[name].output)
            waiting.extend(makes[name].input)

    parts = {name: "" for node in nodes for name in (node.name, *node.output)}
    for members in _components([node for node in nodes if not trunk.intersection(node.output)]):
        found = [WEIGHT.search(" ".join(node.input)) for node in members]
        branch = next((f"fusions.{match[1]}.{match[2]}" for match in found if match), "unnamed")
        for names, role in _roles(members).items():
            parts |= dict.fromkeys(names, f"{branch}.{role}")
    return parts


def _components(nodes: list[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
    """Groups of nodes that hang together, each in the graph's order."""
    groups: list[tuple[set[str], list[onnx.NodeProto]]] = []
    made = {name for node in nodes for name in node.output}
    for node in nodes:
        names = made.intersection(node.input) | set(node.output)
        touching = [group for group in groups if group[0] & names]
        members = [member for group in touching for member in group[1]]
        groups = [group for group in groups if group not in touching]
        groups.append((names.union(*(group[0] for group in touching)), [*members, node]))
    order = {node.output[0]: index for index, node in enumerate(nodes)}
    return [sorted(members, key=lambda node: order[node.output[0]]) for _, members in groups]


def _roles(members: list[onnx.NodeProto]) -> dict[tuple[str, ...], str]:
    """A branch's nodes in order -> what each is there for: a convolution's own name, ``sampling``, or ``between``."""
    roles: dict[tuple[str, ...], str] = {}
    moved: set[str] = set()  # tensors that depend on the offsets: from there to the operator's result it is sampling
    ended = False
    readers = collections.Counter(name for node in members for name in node.input)
    for node in members:
        match = WEIGHT.search(" ".join(node.input))
        role = match[3] if match and "norm" not in match[3] else "between"
        if node.op_type == SAMPLERS[0] or (not ended and moved.intersection(node.input)):
            role = "sampling"
            moved.update(node.output)
            ended = node.op_type == SAMPLERS[0] or node.name.startswith("node_dynamic_sample_attention")
        elif role == "offset":
            moved.update(node.output)
        roles[(node.name, *node.output)] = role
    sampled = {name for node in members if roles[(node.name, *node.output)] == "sampling" for name in node.input}
    for node in members:
        alone = readers[node.output[0]] == 1 and node.output[0] in sampled
        if roles[(node.name, *node.output)] == "between" and node.op_type in PREPARES and alone:
            roles[(node.name, *node.output)] = "sampling"
    return roles
