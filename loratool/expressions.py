"""Sizes and conditions that depend on a model's config, written as data: `num_attention_heads*head_dim`.

Closed arithmetic over config keys: names (dotted for nested configs), integers, `+ - * /`, comparisons, `not`, `and`,
`or`, parentheses, and `a | b` for the first of them that the config has. A name that the config lacks is looked for in
its `text_config` (vision-language models nest). Division must come out even. Nothing is ever handed to eval.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from loratool.errors import MismatchError, UsageError

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
}
_COMPARISON: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.Gt: lambda a, b: a > b,
    ast.LtE: lambda a, b: a <= b,
    ast.GtE: lambda a, b: a >= b,
}


_DEEPEST = 64  # levels of an expression, and of text_configs in a config: both may come from strangers
_LARGEST = 2**63  # no size is beyond it, and Python neither multiplies nor prints without end


class AbsentError(MismatchError):
    """A name in an expression that the config does not have."""


def size(expression: str | int, values: Mapping[str, Any]) -> int:
    """Return the whole number that `expression` comes to; MismatchError where it does not."""
    value = evaluate(expression, values)
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise MismatchError(f"{expression!r} is too large", where="config")
    if isinstance(value, bool) or not isinstance(value, int):
        raise MismatchError(f"{expression!r} is {value!r}, which is no size", where="config")
    return value


def holds(expression: str, values: Mapping[str, Any]) -> bool:
    """Whether a condition is true of a config; a key that is absent counts as false. No condition holds always."""
    return not expression or bool(_value(_parse(expression), values, missing=False))


def evaluate(expression: str | int, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression; AbsentError (a MismatchError) names the key that is missing."""
    return expression if isinstance(expression, int) else _value(_parse(expression), values, missing=None)


def check(expression: str | int) -> None:
    """Raise UsageError where an expression is malformed, whatever the config."""
    if isinstance(expression, str) and expression:
        _parse(expression)


@lru_cache(maxsize=1024)
def _parse(expression: str) -> ast.expr:
    try:
        node = ast.parse(expression, mode="eval").body
        for part in ast.walk(node):
            if not isinstance(part, _ALLOWED) or (isinstance(part, ast.Constant) and not _plain(part.value)):
                raise SyntaxError(type(part).__name__)
            if isinstance(part, ast.Compare) and len(part.ops) > 1:
                raise SyntaxError("a chain of comparisons")
        level: list[ast.AST] = [node]
        for _ in range(_DEEPEST):
            level = [child for part in level for child in ast.iter_child_nodes(part)]
        if level:
            raise SyntaxError("too deep")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hint = "config keys, numbers, + - * /, comparisons, not/and/or, a | b"
        raise UsageError(f"the expression {expression!r} is malformed", hint=hint) from None
    return node


_ALLOWED = (
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Attribute, ast.Constant, ast.Load, ast.Add, ast.Sub,
    ast.Mult, ast.Div, ast.BitOr, ast.Not, ast.And, ast.Or, *_COMPARISON,
)  # fmt: skip


def _plain(value: object) -> bool:
    return isinstance(value, (int, str, bool))


def _value(node: ast.expr, values: Mapping[str, Any], missing: Any) -> Any:
    """Evaluate a checked tree. `missing` False makes absent keys false; None makes them raise AbsentError."""

    def visit(part: ast.expr) -> Any:
        return _value(part, values, missing)

    match node:
        case ast.Constant():
            return node.value
        case ast.Name() | ast.Attribute():
            found = _lookup(ast.unparse(node), values)
            if found is None and missing is None:
                raise AbsentError(f"the config has no {ast.unparse(node)}", where="config")
            return missing if found is None else found
        case ast.UnaryOp():
            return not visit(node.operand)
        case ast.BoolOp(op=ast.And()):
            return all(visit(part) for part in node.values)
        case ast.BoolOp():
            return any(visit(part) for part in node.values)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _compared(op, visit(left), visit(right), ast.unparse(node))
        case ast.BinOp(op=ast.BitOr()):
            try:
                return _value(node.left, values, missing=None)  # what is there and false is there
            except AbsentError:
                return visit(node.right)
        case ast.BinOp():
            return _arithmetic(node.op, visit(node.left), visit(node.right), ast.unparse(node))
    raise UsageError(f"the expression {ast.unparse(node)!r} is malformed")


def _compared(op: ast.cmpop, left: Any, right: Any, text: str) -> bool:
    try:
        return _COMPARISON[type(op)](left, right)
    except TypeError:
        raise MismatchError(f"{text}: a {type(left).__name__} and a {type(right).__name__}", where="config") from None


def _arithmetic(op: ast.operator, left: Any, right: Any, text: str) -> int:
    if not isinstance(left, int) or not isinstance(right, int):
        raise MismatchError(f"{text}: {left!r} and {right!r} are no numbers", where="config")
    if max(abs(left), abs(right)) >= _LARGEST:
        raise MismatchError(f"{text}: a number is too large", where="config")
    if not isinstance(op, ast.Div):
        return _ARITHMETIC[type(op)](left, right)
    if not right or left % right:
        raise MismatchError(f"{text}: {left} does not divide by {right}", where="config")
    return left // right


def _lookup(name: str, values: Mapping[str, Any]) -> Any:
    nested: Any = values
    for _ in range(_DEEPEST):
        found = nested
        for key in name.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        nested = nested.get("text_config")
        if found is not None or not isinstance(nested, Mapping):
            return found
    return None
