"""The tensors of a checkpoint as a tree of names with columns beside it; layers that are alike are one branch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text
from rich.tree import Tree

from checkpoints_tools.comparison_tables import number_text
from checkpoints_tools.description import Listed
from checkpoints_tools.printing import dtype_text, shape_text, size_text, visible
from checkpoints_tools.regions import WEIGHT, Key
from checkpoints_tools.tensor_statistics import Statistics, joined

_GUIDE = 4  # columns that rich indents a level by
_LAYER = re.compile(r"(model\.layers)\.(\d+)\.(.+)")
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass
class _Node:
    """A line of the tree: a name, the tensors that it stands for, and what is below it."""

    name: str
    tensors: list[Listed] = field(default_factory=list)
    children: list["_Node"] = field(default_factory=list)

    def every_tensor(self) -> list[Listed]:
        """Those of the line and of all lines below it."""
        return self.tensors + [one for child in self.children for one in child.every_tensor()]


def tensor_tree(
    title: str, tensors: Sequence[Listed], statistics: Mapping[Key, Statistics] | None = None, *, unfold: bool = False
) -> Tree:
    """The tree.

    Args:
        title: of the root.
        tensors: in the order of the layers.
        statistics: of every tensor, to be shown beside it; those of layers that are one branch are taken together.
        unfold: whether every layer is a branch of its own.
    """
    kinds = list(dict.fromkeys(one.key.kind for one in tensors))
    roots = [_Node(kind, children=_branches([o for o in tensors if o.key.kind == kind], unfold)) for kind in kinds]
    tree = Tree(Text(visible(title), style="bold"), guide_style="dim")
    width = max(_width(root, 1 if len(roots) > 1 else 0) for root in roots)
    for root in roots:
        if len(roots) == 1:
            _hang(tree, root.children, width, statistics)
        else:
            root.name = "weights" if root.name == WEIGHT else root.name
            _hang(tree, [root], width, statistics)
    return tree


def _branches(tensors: Sequence[Listed], unfold: bool) -> list[_Node]:
    """Lines of one kind: tensors outside the layers where they stand, runs of layers that are alike between them."""
    nodes: list[_Node] = []
    layers: dict[int, list[tuple[str, Listed]]] = {}
    for one in tensors:
        match = _LAYER.fullmatch(one.key.name)
        if match is None:
            nodes += [*_runs(layers, unfold), _Node(one.key.name, [one])]
            layers = {}
        else:
            layers.setdefault(int(match[2]), []).append((match[3], one))
    return nodes + _runs(layers, unfold)


def _runs(layers: Mapping[int, list[tuple[str, Listed]]], unfold: bool) -> list[_Node]:
    runs: list[list[int]] = []
    for number, parts in layers.items():
        looks = [(name, one.shape, one.dtype) for name, one in parts]
        before = [(name, one.shape, one.dtype) for name, one in layers[runs[-1][-1]]] if runs else None
        if looks == before and not unfold:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [_run(run, layers) for run in runs]


def _run(run: Sequence[int], layers: Mapping[int, list[tuple[str, Listed]]]) -> _Node:
    name = f"model.layers.{run[0]}" + (f" to {run[-1]}, alike" if len(run) > 1 else "")
    columns = zip(*(layers[number] for number in run), strict=True)
    return _Node(name, children=[_Node(alike[0][0], [one for _, one in alike]) for alike in columns])


def _width(node: _Node, depth: int) -> int:
    """Columns that the names of a node and of those below it take, guides included."""
    own = _GUIDE * depth + len(node.name) if depth else 0
    return max([own, *(_width(child, depth + 1) for child in node.children)])


def _hang(
    tree: Tree, nodes: Sequence[_Node], width: int, statistics: Mapping[Key, Statistics] | None, depth: int = 1
) -> None:
    for node in nodes:
        line = Text(node.name.ljust(width - _GUIDE * depth), no_wrap=True, overflow="ignore")
        line.append(_columns(node), style="cyan" if node.tensors else "dim")
        if statistics is not None and node.tensors:
            line.append_text(_statistics(joined(statistics[one.key] for one in node.tensors)))
        _hang(tree.add(line), node.children, width, statistics, depth + 1)


def _columns(node: _Node) -> str:
    if node.tensors:
        first = node.tensors[0]
        dtype = dtype_text(first.dtype)
        return f"  {shape_text(first.shape):>14}  {_SHORT.get(dtype, dtype):>4}  {size_text(first.bytes):>9}"
    one = sum(child.tensors[0].bytes for child in node.children if child.tensors)
    count = max((len(child.tensors) for child in node.children), default=1)
    times = f"{count} × {size_text(one)}" if count > 1 else size_text(sum(one.bytes for one in node.every_tensor()))
    return f"  {times:>31}"


def _statistics(one: Statistics) -> Text:
    columns = [
        f"norm {number_text(one.norm):>9}",
        f"mean {number_text(one.mean):>10}",
        f"from {number_text(one.minimum):>9} to {number_text(one.maximum):>9}" if one.finite else "no number",
    ]
    line = Text("   " + "  ".join(columns))
    for count, what in ((one.nans, "NaN"), (one.infinities, "Inf")):
        if count:
            line.append(f"  {count:,} {what}", style="bold red")
    return line
