"""Proxy runs: one small model trained at one setting, many of them side by side, each on one thread.

One thread a run, so that the number of workers changes no number. A finished run is a row on disk; one that was
interrupted goes on from its last saved state. Not here: which settings are run (``scaling``), what they say
(``scaling_fit``).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from twofold.base.config import Config
from twofold.base.files import read_json, write_json
from twofold.data.packing import MixtureEntry, PackedSource, eval_windows
from twofold.data.shards import Shard
from twofold.eval.language import bits_per_byte
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.recipes.pretrain import ModelShape, token_byte_table
from twofold.text.tokenizer import Tokenizer
from twofold.train.loop import OptimConfig, Trainer, TrainError
from twofold.train.objectives import CrossEntropy

Row = dict[str, Any]
WIDTH_UNIT = 8  # widths are multiples of it: four heads of an even dimension


class ProxyConfig(Config):
    """What all proxy runs share.

    optimizer: "muon" sweeps the rate of the matrices inside layers and ties AdamW's, for the rest, to it by
    ``adam_ratio``; "adamw" sweeps one rate for everything. warmup: share of the steps. The rate then falls to 0.
    context: tokens of a sequence, in training and in measuring.
    """

    layers: int = 2
    optimizer: Literal["muon", "adamw"] = "muon"
    adam_ratio: float = 0.15
    warmup: float = 0.05
    context: int = 64
    eval_windows: int = 64

    def optim(self, rate: float, steps: int) -> OptimConfig:
        """Optimiser settings at a swept rate."""
        muon = self.optimizer == "muon"
        return OptimConfig(
            muon_lr=rate if muon else 0.0,
            adam_lr=rate * self.adam_ratio if muon else rate,
            warmup=max(1, round(self.warmup * steps)),
            decay="linear",
            end=0.0,
        )

    def model(self, width: int, vocab_size: int) -> ModelConfig:
        """The model of a width: four query heads, two of keys and values, MLP of 8/3 the width."""
        unit = WIDTH_UNIT
        shape = ModelShape(
            hidden_size=width,
            intermediate_size=max(unit, round(width * 8 / 3 / unit) * unit),
            layers=self.layers,
            head_dim=width // 4,
        )
        return shape.build(vocab_size, 1e4, self.context)


class Setting(NamedTuple):
    """One run: width of the model, tokens trained, peak rate, tokens a step, seed."""

    width: int
    tokens: int
    rate: float
    batch: int
    seed: int

    @property
    def name(self) -> str:
        """Unique among settings that differ visibly."""
        return f"w{self.width}-d{self.tokens}-b{self.batch}-r{self.rate:.6g}-s{self.seed}"


def body_parameters(config: ModelConfig) -> int:
    """Parameters without the (tied) embedding: the N of the laws."""
    return config.num_parameters() - config.vocab_size * config.hidden_size


def train_proxy(setting: Setting, proxy: ProxyConfig, data: Path, work: Path) -> Row:
    """Train one model, or go on with it, and measure it on held-out text; kept as ``work/rows/<name>.json``.

    Returns:
        The setting with ``parameters``, ``steps``, ``flops`` and ``loss`` in bits a byte; loss None, with ``error``,
        where training stopped by name.
    """
    path = work / "rows" / f"{setting.name}.json"
    if path.is_file():
        row: Row = read_json(path)
        return row
    tokenizer = Tokenizer.from_folder(data / "tokenizer")
    config = proxy.model(setting.width, tokenizer.vocab_size)
    model = Qwen3(config)
    model.init_weights(setting.seed)
    length = ((1.0, proxy.context, proxy.context),)
    text = MixtureEntry("text", Shard.open(data / "text", verify="quick"), 1.0)
    source = PackedSource([text], setting.batch, length, seed=setting.seed)
    steps = max(1, round(setting.tokens / setting.batch))
    folder = work / setting.name
    trainer = Trainer(model, source, CrossEntropy(), proxy.optim(setting.rate, steps), steps, folder)
    row = {**setting._asdict(), "parameters": body_parameters(config), "steps": steps, "loss": None}
    try:
        trainer.fit()
    except TrainError as error:
        row["error"] = str(error)
    else:
        table = token_byte_table(tokenizer)
        held_out = Shard.open(data / "held_out", verify="quick")
        windows, _ = eval_windows(held_out, proxy.context, proxy.eval_windows, table.numpy())
        row["loss"] = bits_per_byte(model, windows, table, ((0, proxy.context),))[0][0].value
    row["flops"] = trainer.tokens * config.flops_per_token(context=proxy.context / 2, backward=True)
    write_json(path, row)
    shutil.rmtree(folder)
    return row


def train_all(
    settings: Sequence[Setting],
    proxy: ProxyConfig,
    data: Path,
    work: Path,
    pool: Executor | None,
    done: Callable[[Row], None],
) -> list[Row]:
    """Rows of all settings, in their order; the longest runs begin first. ``done`` is told every row as it comes.

    Args:
        pool: what ``worker_pool`` gave; None trains in this process.
    """
    found: dict[Setting, Row] = {}
    longest_first = sorted(settings, key=lambda s: (-s.tokens * s.width, s.batch, s.rate, s.seed))
    if pool is None:
        with _one_thread():
            for setting in longest_first:
                found[setting] = train_proxy(setting, proxy, data, work)
                done(found[setting])
    else:
        waiting = {pool.submit(train_proxy, setting, proxy, data, work): setting for setting in longest_first}
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            done(found[waiting[future]])
    return [found[setting] for setting in settings]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """Processes to train in, None for one worker.

    They live as long as this process holds its end of a pipe. So when it stops, by whatever means, they stop within a
    moment, and each run goes on later from its last saved state.
    """
    if workers < 2:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(theirs,))
    try:
        yield pool
    except BaseException:
        ours.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()
        theirs.close()


def _begin_worker(alive: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_leave_with_parent, args=(alive,), daemon=True).start()


def _leave_with_parent(alive: Connection) -> None:
    with suppress(EOFError, OSError):
        alive.recv()  # nothing is ever sent: this ends when the other end is closed
    os._exit(1)
