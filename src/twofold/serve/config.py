"""Settings of the server: names, keys, limits and times, with their defaults.

Everything can be set on the command line with ``--set``. Not here: what the limits are applied to (``app.py``,
``engine_loop.py``).
"""

from __future__ import annotations

from pydantic import Field

from twofold.base.config import Config


class ServeConfig(Config):
    """How a model is served.

    name: what requests call the model (empty: the name of its folder). api_keys: any of them opens the API; none
    leaves it open. cors_origins: web origins that may call it from a browser ("*" for all).
    max_body_bytes: largest request. max_queue: requests that may wait for the engine before others are refused with
    429. max_choices: largest ``n``. max_samples: most prompts times ``n`` of a completion, and most inputs to embed.
    first_token_seconds: longest wait for the first token, and request_seconds for the whole reply, after which a
    request fails with 503 (0: no limit). grace_seconds: how long running requests may go on after the server was told
    to stop. comment_seconds: a stream that has nothing to say for so long sends a comment line, so that no proxy takes
    it for dead (0: never). metrics_prefix: begins the names of metrics that other engines have too.
    """

    name: str = ""
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    max_queue: int = Field(default=256, ge=1)
    max_choices: int = Field(default=128, ge=1)
    max_samples: int = Field(default=2048, ge=1)
    first_token_seconds: float = Field(default=0.0, ge=0)
    request_seconds: float = Field(default=0.0, ge=0)
    grace_seconds: float = Field(default=20.0, ge=0)
    comment_seconds: float = Field(default=0.0, ge=0)
    metrics_prefix: str = Field(default="vllm:", pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")
