"""The versions of a model as a tree that a person can read, however long its line is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text
from rich.tree import Tree

from fsu_ray import console
from fsu_ray.records import AliasMove, Behaviour, Model, ModelVersion


def version_tree(
    model: Model,
    versions: Sequence[ModelVersion],
    gone: Mapping[int, Sequence[Behaviour]],
    aliases: Mapping[str, AliasMove],
) -> Tree:
    """The versions of a model, sorted by number, as a `rich` tree.

    A line of versions stands flat, one below the other. Where a version has several children, the line goes on with
    the one that leads to the newest version, and each of the others begins a line of its own below that version.
    `gone` holds what each version has lost, by its number; `aliases` is `Ledger.models.aliases`.
    """
    names: dict[int, list[str]] = {}
    for alias, move in aliases.items():
        names.setdefault(move.version, []).append(alias)
    follows = _follows(versions)
    spec = model.spec
    size = "x".join(map(str, spec.shape))
    tree = Tree(Text(f"{model.name}: {spec.arch}, {size}, {spec.classes} classes, mean {spec.mean}, std {spec.std}"))
    lines: dict[int, Tree] = {}  # the line that each version stands in
    nodes: dict[int, Tree] = {}
    for version in versions:
        parent = version.parent
        on = parent is not None and follows[parent] == version.number  # in the line of its parent
        line = tree if parent is None else lines[parent] if on else nodes[parent]
        lines[version.number] = line
        label = _label(version, gone.get(version.number, ()), names.get(version.number, ()))
        nodes[version.number] = line.add(label)
    return tree


def plain_lines(tree: Tree) -> Iterator[str]:
    """What `rich` would print of such a tree, without colours, at a hundredth of the time."""
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
    """Of each version with children the one that leads to the newest version."""
    newest = {version.number: version.number for version in versions}
    follows: dict[int, int] = {}
    for version in reversed(versions):  # children before their parents
        parent, reached = version.parent, newest[version.number]
        if parent is not None and (parent not in follows or reached > newest[parent]):
            follows[parent] = version.number
            newest[parent] = reached
    return follows


def _label(version: ModelVersion, gone: Sequence[Behaviour], aliases: Sequence[str]) -> Text:
    label = Text(f"version {version.number}", style="bold")
    if version.parent is not None:
        label.append(f"  parent {version.parent}", style="not bold")
    label.append(f"  {console.when(version.created_at)}  ", style="not bold")
    if version.request is None:
        label.append("registered" if version.parent is None else "from outside", style="not bold yellow")
    else:
        label.append("erased " + "; ".join(map(_said, gone)), style="not bold")
    if aliases:
        label.append(f"  <- {', '.join(aliases)}", style="not bold green")
    return label


def _said(behaviour: Behaviour) -> str:
    targets = " ".join(map(str, behaviour.targets))
    return f"{behaviour.name} ({behaviour.kind} {targets})"
