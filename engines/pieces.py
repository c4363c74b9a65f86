"""A decoder that is too much to build at once → pieces, which are built apart and run one after another.

TensorRT 8.6 takes two to seven times the weights' bytes while it builds, in one thread (docs/experiments.md). A cut
goes where the fewest tensors cross it, which is between two layers; what follows from positions and lengths alone, as
masks and angles do, crosses none: every piece works it out for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import onnx_ir as ir

SMALL = 1 << 24  # bytes of tables that several pieces may have
INTEGERS = (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL)
NOWHERE = 1 << 20  # as many crossing tensors as one of unknown shape counts


def cut(model: ir.Model, most: float) -> list[ir.Model]:
    """Models that have up to `most` bytes of constants each, or no place to be cut, in the order in which they run;
    the model itself where one is enough. A tensor that crosses has the same name as an output of the one that makes it
    and an input of those that read it; the model's own inputs and outputs are those of the pieces that have to do with
    them, and an input that nothing reads is the last one's. The pieces share the model's constants."""
    graph, shared = model.graph, _Shared(model.graph)
    own = [node for node in graph if not shared.has(node)]
    made = {value: place for place, node in enumerate(own) for value in node.outputs}
    places = {node: place for place, node in enumerate(own)}
    read = {value: max((places[use.node] for use in value.uses()), default=-1) for value in made}
    widths = _widths(made, read, {dim for value in graph.inputs for dim in _names(value)}, len(own))
    bounds = [0, *_bounds([shared.constants(node) for node in own], widths, most), len(own)]
    if len(bounds) == 2:
        return [model]
    pieces = []
    for start, end in pairwise(bounds):
        crossing = [value for value in made if start <= made[value] < end <= read[value]]
        outputs = [value for value in graph.outputs if start <= made.get(value, len(own) - 1) < end]
        outputs += [value for value in crossing if value not in outputs]
        earlier = [value for value in made if made[value] < start]
        pieces.append(_piece(model, earlier, outputs, end == len(own)))
    return pieces


def constant_bytes(model: ir.Model) -> int:
    """Of all of them, as they would be written."""
    return sum(map(_bytes, model.graph.initializers.values()))


class _Shared:
    """What every piece may have: nodes that compute from integers and small tables, from constants alone, or a size."""

    def __init__(self, graph: ir.Graph) -> None:
        # By value, the constants that it is computed from.
        self._light = {value: frozenset[ir.Value]() for value in graph.inputs if value.dtype in INTEGERS}
        self._light |= {value: frozenset([value]) for value in graph.initializers.values()}
        fixed = set(graph.initializers.values())
        for node in graph:
            inputs = [value for value in node.inputs if value is not None]
            if node.op_type == "Shape" and inputs[0].is_graph_input():
                self._light[node.outputs[0]] = frozenset()
            elif self._light.keys() >= set(inputs):
                needs = self.constants(node)
                if fixed.issuperset(inputs):
                    fixed.update(node.outputs)
                elif sum(map(_bytes, needs)) > SMALL:
                    continue
                self._light |= dict.fromkeys(node.outputs, needs)

    def has(self, node: ir.Node) -> bool:
        return node.outputs[0] in self._light

    def constants(self, node: ir.Node) -> frozenset[ir.Value]:
        """Those that a piece with the node has for its sake."""
        return frozenset[ir.Value]().union(*(self._light.get(value, ()) for value in node.inputs if value is not None))


def _widths(made: dict[ir.Value, int], read: dict[ir.Value, int], known: set[str], count: int) -> list[int]:
    """How many tensors cross a cut before each node; one whose sizes are no names of an input's is as bad as many."""
    change = [0] * (count + 2)
    for value, place in made.items():
        if read[value] > place:
            typed = value.shape is not None and value.dtype is not None and known.issuperset(_names(value))
            change[place + 1] += 1 if typed else NOWHERE
            change[read[value] + 1] -= 1 if typed else NOWHERE
    return list(accumulate(change))


def _bounds(needs: Sequence[Iterable[ir.Value]], widths: Sequence[int], most: float) -> Iterator[int]:
    """Places to cut, each the narrowest of those at which a piece is at least half full, and of these the last."""
    start = 0
    while True:
        held: set[ir.Value] = set()
        size = 0
        found: list[tuple[bool, int, int]] = []
        for end in range(start + 1, len(needs) + 1):
            new = set(needs[end - 1]) - held
            held |= new
            size += sum(map(_bytes, new))
            if size > most and found:
                break
            if end == len(needs):
                return
            if widths[end] < NOWHERE:
                found.append((2 * size < most, widths[end], -end))
        start = -min(found)[2]
        yield start


def _piece(model: ir.Model, earlier: list[ir.Value], outputs: list[ir.Value], last: bool) -> ir.Model:
    """The nodes that the outputs follow from, back to what earlier pieces made; `last` takes unread inputs along."""
    graph, known, reached = model.graph, set(earlier), set()
    waiting = list(outputs)
    while waiting:
        value = waiting.pop()
        if value not in reached:
            reached.add(value)
            node = value.producer()
            if node is not None and value not in known:
                waiting += [given for given in node.inputs if given is not None]
    inputs = [value for value in graph.inputs if value in reached or (last and not value.uses())]
    inputs += [value for value in earlier if value in reached]
    extracted = ir.convenience.extract(graph, inputs, outputs)
    return ir.Model(extracted, ir_version=model.ir_version, producer_name=model.producer_name)


def _names(value: ir.Value) -> set[str]:
    """Of its free sizes; an unnamed one is the empty name."""
    return {str(dim.value or "") for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}


def _bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0
