"""Tasks that need a tool, and the tool itself: a calculator that never calls ``eval``.

``calc 37*48`` is hopeless to answer directly for a tiny model and easy with one call. Errors of the tool are text
for the model to read, never exceptions. Not here: the conversation loop, call parsing or rendering. No torch.
"""

from __future__ import annotations

import ast
import math
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from twofold.base.records import InputError, ToolCall
from twofold.tasks.base import Item, Task, draw_size, exact_match

CALC_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Compute.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}

_MAX_CHARS = 200
_MAX_DRAWS = 10_000
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class ToolTask(Task, Protocol):
    """A task whose items are solved by calling tools."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Function schemas in the OpenAI form."""
        ...

    def execute(self, call: ToolCall) -> str:
        """Result of a call as text; bad calls give a text that starts with ``error:``."""
        ...

    def solution_call(self, item: Item) -> ToolCall:
        """The call that solves the item."""
        ...


@dataclass(frozen=True)
class Calc:
    """``calc 38*52`` -> ``1976``: products of two numbers of up to two digits, with a calculator at hand.

    No digit occurs twice in the factors or twice in the product, so that a copy has one key for every digit.
    """

    low: int = 10
    high: int = 99
    name: str = "calc"
    version: int = 2
    step_by_step: bool = True
    licence: str = "CC0-1.0"

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The calculator alone."""
        return [CALC_TOOL]

    def generate(self, rng: random.Random, level: float) -> Item:
        """Draw two factors; at level 0 they are 10 to 39.

        Raises:
            InputError: no such product between ``low`` and ``high``.
        """
        top = draw_size(rng, min(self.low + 29, self.high), self.high, level)
        pairs = ((rng.randint(self.low, top), rng.randint(self.low, top)) for _ in range(_MAX_DRAWS))
        distinct = (pair for pair in pairs if _digits_differ(*pair))
        pair = next(distinct, None)
        if pair is None:
            raise InputError(f"no product without a repeated digit between {self.low} and {self.high}; widen the range")
        a, b = pair
        expression = f"{a}*{b}"
        key = f"calc {min(a, b)}*{max(a, b)}"  # the order of the factors is no new item
        meta = {"expression": expression}
        return Item(self.name, f"calc {expression}", str(a * b), (f" calc {expression}",), key, meta)

    def verify(self, item: Item, answer: str) -> float:
        """Exact match of the final answer."""
        return exact_match(item, answer)

    def solution_call(self, item: Item) -> ToolCall:
        """One calculator call with the item's expression."""
        return ToolCall("calc", {"expression": item.meta["expression"]})

    def execute(self, call: ToolCall) -> str:
        """Run the calculator; never raises."""
        if call.name != "calc":
            return f"error: unknown tool {call.name!r}, use calc"
        arguments = call.arguments
        if not isinstance(arguments, dict) or set(arguments) != {"expression"}:
            return "error: calc takes one argument, expression"
        if not isinstance(arguments["expression"], str):
            return "error: expression must be a string"
        return calculate(arguments["expression"])


def _digits_differ(a: int, b: int) -> bool:
    return all(len(set(text)) == len(text) for text in (f"{a}{b}", str(a * b)))


def calculate(expression: str) -> str:
    """Value of an arithmetic expression (+ - * / // %, brackets, signs) as text, or ``error: …``."""
    if len(expression) > _MAX_CHARS:
        return f"error: expression is longer than {_MAX_CHARS} characters"
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: number too large"
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return "error: not an arithmetic expression"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "error: number too large"
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
    return str(value)


def _evaluate(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number: int | float = node.value  # type: ignore[assignment]  # narrowed by the type test above
        return number
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        result: int | float = _BINARY[type(node.op)](_evaluate(node.left), _evaluate(node.right))
        return result
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        signed: int | float = _UNARY[type(node.op)](_evaluate(node.operand))
        return signed
    raise ValueError("not arithmetic")
