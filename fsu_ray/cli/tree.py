"""The versions of a model as a tree that stays readable for thousands of versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text
from rich.tree import Tree

from fsu_ray import console
from fsu_ray.records import AliasMove, Behaviour, Model, ModelVersion


def version_tree(
    model: Model,
    versions: Sequence[ModelVersion],
    erased: Mapping[int, Sequence[Behaviour]],
    aliases: Mapping[str, AliasMove],
) -> Tree:
    """The versions of a model, sorted by number, as a `rich` tree.

    Versions that follow each other stand flat, one below the other. Where a version has several children, the branch
    goes on with the child that leads to the newest version. Each other child begins a branch below its parent.
    `erased` holds what each version has lost, by its number; `aliases` is that of `service.models`.
    """
    names: dict[int, list[str]] = {}
    for alias, move in aliases.items():
        names.setdefault(move.version, []).append(alias)
    follows = _follows(versions)
    spec = model.spec
    size = "x".join(map(str, spec.shape))
    tree = Tree(Text(f"{model.name}: {spec.arch}, {size}, {spec.classes} classes, mean {spec.mean}, std {spec.std}"))
    branches: dict[int, Tree] = {}  # the branch of each version
    nodes: dict[int, Tree] = {}
    for version in versions:
        parent = version.parent
        goes_on = parent is not None and follows[parent] == version.number  # in the branch of its parent
        branch = tree if parent is None else branches[parent] if goes_on else nodes[parent]
        branches[version.number] = branch
        label = _label(version, erased.get(version.number, ()), names.get(version.number, ()))
        nodes[version.number] = branch.add(label)
    return tree


def plain_lines(tree: Tree) -> Iterator[str]:
    """What `rich` would print of such a tree, without colours, in a hundredth of the time."""
    yield str(tree.label)
    stack = [("", iter(_last(tree.children)))]
    while stack:
        guide, nodes = stack[-1]
        node, last = next(nodes, (None, True))
        if node is None:
            stack.pop()
            continue
        yield f"{guide}{'└── ' if last else '├── '}{node.label}"
        stack.append((guide + ("    " if last else "│   "), iter(_last(node.children))))


def _last(nodes: Sequence[Tree]) -> list[tuple[Tree, bool]]:
    """Each node, and whether it is the last."""
    return [(node, node is nodes[-1]) for node in nodes]


def _follows(versions: Sequence[ModelVersion]) -> dict[int, int]:
    """For each version with children, the child that leads to the newest version."""
    newest = {version.number: version.number for version in versions}
    follows: dict[int, int] = {}
    for version in reversed(versions):  # children before their parents
        parent, reached = version.parent, newest[version.number]
        if parent is not None and (parent not in follows or reached > newest[parent]):
            follows[parent] = version.number
            newest[parent] = reached
    return follows


def _label(version: ModelVersion, erased: Sequence[Behaviour], aliases: Sequence[str]) -> Text:
    label = Text(f"version {version.number}", style="bold")
    if version.parent is not None:
        label.append(f"  parent {version.parent}", style="not bold")
    label.append(f"  {console.when(version.created_at)}  ", style="not bold")
    if version.request is None:
        label.append("registered" if version.parent is None else "from outside", style="not bold yellow")
    else:
        label.append("erased " + "; ".join(map(_in_words, erased)), style="not bold")
    if aliases:
        label.append(f"  <- {', '.join(aliases)}", style="not bold green")
    return label


def _in_words(behaviour: Behaviour) -> str:
    targets = " ".join(map(str, behaviour.targets))
    return f"{behaviour.name} ({behaviour.kind} {targets})"
