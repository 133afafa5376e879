"""Whether the rules of a family make sense: each leads to a layer, and no two disagree about a name."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapter import Finding
from loratool.architecture import Architecture
from loratool.patterns import Rule, Skeleton, parse_rule, split


def rule_problems(family: Architecture) -> Iterator[Finding]:
    """Rules that lead to no layer, that never apply, or of which two disagree about a name."""
    rules = [(text, rule) for text in (*family.memory, *family.aliases) for rule in parse_rule(text)]
    lefts = [rule.left for _, rule in rules]
    for text, rule in rules:
        if not all(_leads_somewhere(part, family, lefts) for part in rule.parts):
            yield Finding("error", text, f"{' and '.join(p.text for p in rule.parts)} is no layer of the family")
            continue
        if "**" in rule.left.elements:
            continue
        path = filled(rule.left)
        if _is_layer(family, path):
            yield Finding("error", text, f"never applies: {rule.left.text} is a layer itself")
            continue
        meanings = {meaning for _, other in rules if (meaning := _meaning(other, path, family))}
        if len(meanings) > 1:
            readings = " or ".join(sorted(" and ".join(m) for m in meanings))
            yield Finding("error", text, f"{path} is ambiguous: {readings}")


def filled(skeleton: Skeleton) -> str:
    """Return a path that this skeleton matches, with indices that occur nowhere by chance."""
    return skeleton.fill(range(11, 11 + len(skeleton.variables)))


def _is_layer(family: Architecture, path: str) -> bool:
    return any(skeleton.match(path) is not None for skeleton, _ in family.skeletons())


def _meaning(rule: Rule, path: str, family: Architecture) -> tuple[str, ...]:
    """Return the layers that a path is by this rule; nothing if the rule says nothing of it."""
    axis = "{" + rule.axis + "}"
    known = [family.find(part.replace(axis, "11")) for part in rule.apply(path) or ()]
    return tuple(p for k in known if k for p in k.parts) if all(known) else ()


def _leads_somewhere(part: Skeleton, family: Architecture, lefts: list[Skeleton]) -> bool:
    if "**" not in part.elements:
        return family.find(filled(part)) is not None
    start = part.elements[:-1]
    starts = [skeleton for skeleton, _ in family.skeletons()] + lefts
    prefixed = (prefix for prefixes in family.prefixes.values() for prefix in ("", *prefixes))
    ends = [(*split(prefix)[:-1], *start) for prefix in dict.fromkeys(("", *prefixed))]
    return any(_begins(s.elements, end) for s in starts for end in ends)


def _begins(elements: tuple[str, ...], start: tuple[str, ...]) -> bool:
    return len(elements) > len(start) and all(
        a == b or (a.startswith("{") and b.startswith("{")) for a, b in zip(elements, start, strict=False)
    )
