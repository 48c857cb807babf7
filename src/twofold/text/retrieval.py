"""Token ids of queries, documents and relevance questions in the form Qwen3-Embedding and Qwen3-Reranker expect.

Queries carry an instruction, documents none. What comes from outside is data: a document that spells a control token
cannot close its turn. Not here: the model's side (``engine/embed.py``), splitting of long documents. Imports no torch.
"""

from __future__ import annotations

from twofold.base.records import InputError
from twofold.text.tokenizer import Tokenizer

DEFAULT_TASK = "Given a web search query, retrieve relevant passages that answer the query"
_JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def query_text(query: str, task: str = DEFAULT_TASK) -> str:
    """A query with its instruction, to be embedded; there is no space after ``Query:``."""
    return f"Instruct: {task}\nQuery:{query}"


def embedding_ids(tokenizer: Tokenizer, text: str, max_tokens: int = 8192, truncate: bool = False) -> list[int]:
    """Ids of ``text`` and ``<|endoftext|>``, the token whose state is the vector.

    Raises:
        InputError: more than ``max_tokens`` ids, unless ``truncate`` allows the end of the text to be cut off.
    """
    return [*_fit(tokenizer.encode(text), 1, max_tokens, truncate, "the text"), tokenizer.endoftext]


def rerank_ids(
    tokenizer: Tokenizer,
    query: str,
    document: str,
    task: str = DEFAULT_TASK,
    max_tokens: int = 8192,
    truncate: bool = False,
) -> list[int]:
    """Ids of the question whether ``document`` answers ``query``; the next token is the answer.

    Raises:
        InputError: more than ``max_tokens`` ids, unless ``truncate`` allows the end of the document to be cut off.
    """
    before, after = tokenizer.encode_with_special(_JUDGE), tokenizer.encode_with_special(_ANSWER)
    body = tokenizer.encode(f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}")
    around = len(before) + len(after)
    return [*before, *_fit(body, around, max_tokens, truncate, "the question about the document"), *after]


def yes_no_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of the answers "yes" and "no".

    Raises:
        InputError: the tokenizer does not have each as one token.
    """
    ids = [tokenizer.encode(answer) for answer in ("yes", "no")]
    if any(len(one) != 1 for one in ids):
        raise InputError('the tokenizer has no single tokens "yes" and "no"; reranking needs the tokenizer of Qwen3')
    return ids[0][0], ids[1][0]


def _fit(ids: list[int], around: int, limit: int, truncate: bool, what: str) -> list[int]:
    """The ids, with ``around`` more ids no more than ``limit``."""
    if len(ids) + around > limit and not truncate:
        raise InputError.overflow(what, len(ids) + around, limit, "shorten it, or have it truncated")
    return ids[: max(limit - around, 0)]
