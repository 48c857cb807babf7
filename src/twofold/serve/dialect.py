"""A chat's reply in blocks, for protocols that have thoughts, texts and calls as items beside each other.

``Dialect`` reads the chunks of the one internal reply. A block opens, grows and is shut when another kind begins or the
reply ends. Events of a stream and the whole reply come from the same blocks. Not here: any protocol's own words
(``responses_reply.py``, ``anthropic_reply.py``), and what was asked (``asked.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from twofold.serve.asked import Asked
from twofold.serve.errors import ApiError
from twofold.serve.prepare import Prepared
from twofold.serve.service import Reply, Service

Json = dict[str, Any]
Kind = Literal["thought", "text", "call"]
Status = Literal["in_progress", "completed", "incomplete"]


@dataclass(slots=True)
class Block:
    """One part of a reply. id and name: of a call. text: of a call, its arguments as JSON."""

    kind: Kind
    index: int
    id: str = ""
    name: str = ""
    text: str = ""
    status: Status = "in_progress"


class Dialect(ABC):
    """A reply on its way in the words of another protocol; what a server needs of it is what it needs of ``Reply``."""

    ending = b""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.blocks: list[Block] = []
        self.usage: Json = {}
        self.warnings: list[str] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    @property
    def prepared(self) -> Prepared:
        """The request."""
        return self.reply.prepared

    def close(self) -> None:
        """Abort what still runs."""
        self.reply.close()

    async def whole(self) -> Json:
        """The reply in one piece."""
        made = await self.reply.whole()
        [choice] = made["choices"]
        for _ in self._read(made | {"choices": [choice | {"delta": choice["message"]}]}):
            pass
        for _ in self._shut():
            pass
        return self.body()

    async def chunks(self) -> AsyncIterator[Json]:
        """The reply as events; each has its name under ``type``."""
        for event in self.opening():
            yield event
        async for chunk in self.reply.chunks():
            for event in self._read(chunk):
                yield event
        for event in [*self._shut(), *self.closing()]:
            yield event

    @abstractmethod
    def opening(self) -> Iterator[Json]:
        """Events before the first block; nothing is known then but the request and its warnings."""

    @abstractmethod
    def begin(self, block: Block) -> Iterator[Json]:
        """Events for a block that opens; its text is empty."""

    @abstractmethod
    def more(self, block: Block, text: str) -> Json:
        """The event for a piece of text that was added to a block."""

    @abstractmethod
    def end(self, block: Block) -> Iterator[Json]:
        """Events for a block that is shut."""

    @abstractmethod
    def closing(self) -> Iterator[Json]:
        """Events after the last block."""

    @abstractmethod
    def body(self) -> Json:
        """The whole reply, once everything was read."""

    @abstractmethod
    def failure(self, error: ApiError) -> Json:
        """The event of a stream that breaks off."""

    def _read(self, chunk: Mapping[str, Any]) -> Iterator[Json]:
        self.warnings += chunk.get("warnings", [])
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            for piece in _pieces(choice["delta"]):
                yield from self._add(piece)
            if choice["finish_reason"] is not None:
                self.finish_reason, self.stop_reason = choice["finish_reason"], choice["stop_reason"]

    def _add(self, piece: Block) -> Iterator[Json]:
        """Grow the open block by a piece, or begin another: a piece with a name is the beginning of a call."""
        last = self.blocks[-1] if self.blocks else None
        if last is None or piece.name or piece.kind != last.kind:
            yield from self._shut()
            last = Block(piece.kind, len(self.blocks), piece.id, piece.name)
            self.blocks.append(last)
            yield from self.begin(last)
        if piece.text:
            last.text += piece.text
            yield self.more(last, piece.text)

    def _shut(self) -> Iterator[Json]:
        if self.blocks and self.blocks[-1].status == "in_progress":
            last = self.blocks[-1]
            last.status = "incomplete" if self.finish_reason == "length" else "completed"
            yield from self.end(last)


def _pieces(delta: Mapping[str, Any]) -> list[Block]:
    """What a delta adds: the rest of a call that has begun, then a thought, text, and calls that begin."""
    calls = [
        Block("call", 0, call.get("id") or "", call["function"].get("name") or "", call["function"]["arguments"])
        for call in delta.get("tool_calls") or ()
    ]
    thought = Block("thought", 0, text=delta.get("reasoning_content") or "")
    said = Block("text", 0, text=delta.get("content") or "")
    texts = [piece for piece in (thought, said) if piece.text]
    return [*(c for c in calls if not c.name), *texts, *(c for c in calls if c.name)]


async def start(service: Service, asked: Asked) -> Reply:
    """The chat, started.

    Raises:
        ApiError: it cannot be honoured; places are those of the caller.
    """
    try:
        return await service.converse(asked.chat, asked.controls, asked.warnings)
    except ApiError as error:
        raise asked.located(error) from None
