"""`twofold run scaling`: learning rate and batch by scaling law, from sweeps of small models, checked on a larger one.

A stage for every width sweeps rate and batch (tokens a step) at several lengths of training until the best setting is
enclosed; ``fit`` turns the optima into laws and predicts the setting of a size that was not swept; ``check`` sweeps
that size around the prediction. Qwen3 sets its rates and batches by such laws without publishing them (report, 3.2).
Not here: training one model (``scaling_runs``), the laws (``scaling_fit``, ``scaling_predict``), the pages
(``scaling_report``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from twofold.base.config import Config, ConfigError
from twofold.base.files import read_json, write_json, write_jsonl
from twofold.base.log import usable_processors
from twofold.base.records import InputError
from twofold.data import corpus, dedup
from twofold.data.card import CardEntry, data_card
from twofold.data.shards import Shard, write_shard
from twofold.recipes.chain import Chain, Stage, StageContext, command_line
from twofold.recipes.scaling_fit import (
    Cell,
    Grid,
    batch_interval,
    best_rates,
    best_setting,
    losses_of,
    next_settings,
)
from twofold.recipes.scaling_predict import FitConfig, fit_and_predict
from twofold.recipes.scaling_report import ScalingReportConfig, write_scaling_report
from twofold.recipes.scaling_runs import WIDTH_UNIT, ProxyConfig, Row, Setting, train_all, worker_pool
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.tokenizer import Tokenizer

_RATES = {
    "muon": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28),
    "adamw": (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
}
_LEAST_STEPS = 8


class TextConfig(Config):
    """The standard library's sources, cleaned and split.

    passage: tokens of the pieces that files are cut into, so that a short run reads from many files. tokenizer_chars:
    of every file, to learn the tokens.
    """

    vocab_size: int = 512
    passage: int = 512
    tokenizer_chars: int = 3000


class SweepConfig(Config):
    """Sweeps of one width, one for every length of training in ``tokens``.

    rates, batches: the grid; runs begin at its middle and go on until the best is enclosed. tolerance: percent that the
    best batch may cost. noise_seeds: seeds that the two best rates of the middle length are run with, to know what
    chance does to a comparison.
    """

    width: int
    tokens: tuple[int, ...]
    rates: tuple[float, ...]
    batches: tuple[int, ...]
    tolerance: float
    noise_seeds: int
    proxy: ProxyConfig


class CheckConfig(Config):
    """The sweep around the prediction: factors of the predicted rate and batch, the grid of ``SweepConfig``.

    seeds: of the settings that are compared. draws: bootstrap draws for the best batch's interval.
    """

    factors: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    seeds: int
    draws: int
    tolerance: float
    proxy: ProxyConfig


class ScalingRecipe(Config):
    """widths: of the models swept. tokens: lengths of training. rates: of the grid; empty takes the optimiser's own.

    batches: tokens a step. tolerance: percent of loss that the best batch may cost against smaller ones. next_width,
    next_tokens: the size that is predicted and then trained. limit: percent that the loss at the predicted rate may be
    above the best. workers: runs side by side, one thread each; 0 takes one for every processor.
    """

    text: TextConfig = TextConfig()
    proxy: ProxyConfig = ProxyConfig()
    widths: tuple[int, ...] = (40, 56, 80)
    tokens: tuple[int, ...] = (40_000, 80_000, 160_000)
    rates: tuple[float, ...] = ()
    batches: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    tolerance: float = 1.0
    noise_seeds: int = 3
    next_width: int = 112
    next_tokens: int = 240_000
    check_seeds: int = 3
    draws: int = 400
    limit: float = 1.0
    workers: int = 0


class Prediction(NamedTuple):
    """The setting that the laws give for one size."""

    width: int
    tokens: int
    rate: float
    batch: int


def build(overrides: Sequence[str] = (), seed: int = 0) -> Chain:
    """The recipe's chain with overrides applied.

    Raises:
        ConfigError: a ladder that determines no law, or a grid that does not fit it.
    """
    config = ScalingRecipe().override(overrides)
    rates = config.rates or _RATES[config.proxy.optimizer]
    _check(config, rates)
    workers = config.workers or usable_processors()
    stages = [Stage("text", "Text: clean, split, tokenise", config.text, (), prepare_text)]
    for width in config.widths:
        swept = SweepConfig(
            width=width,
            tokens=config.tokens,
            rates=rates,
            batches=config.batches,
            tolerance=config.tolerance,
            noise_seeds=config.noise_seeds,
            proxy=config.proxy,
        )
        title = f"Sweep rate and batch, width {width}"
        stages.append(Stage(f"sweep_{width}", title, swept, ("text",), partial(train_with, workers, sweep)))
    sweeps = tuple(stage.name for stage in stages[1:])
    shared: dict[str, Any] = {"tolerance": config.tolerance, "draws": config.draws, "proxy": config.proxy}
    fit = FitConfig(width=config.next_width, tokens=config.next_tokens, **shared)
    check_config = CheckConfig(seeds=config.check_seeds, **shared)
    stages += [
        Stage("fit", "Fit the laws, predict the next size", fit, ("text", *sweeps), fit_and_predict),
        Stage(
            "check",
            "Train the next size",
            check_config,
            ("text", "fit"),
            partial(train_with, workers, check),
        ),
    ]
    titles = {stage.name: stage.title for stage in stages}
    report = ScalingReportConfig(
        command=command_line("scaling", overrides, seed), limit=config.limit, tolerance=config.tolerance, titles=titles
    )
    stages.append(Stage("report", "Report", report, tuple(titles), write_scaling_report))
    return Chain("scaling", stages, seed, config)


def _check(config: ScalingRecipe, rates: Sequence[float]) -> None:
    for name, values, least in (
        ("widths", config.widths, 2),
        ("tokens", config.tokens, 2),
        ("rates", rates, 3),
        ("batches", config.batches, 3),
    ):
        if len(values) < least or list(values) != sorted(set(values)) or values[0] <= 0:
            raise ConfigError(f"{name} needs {least} or more rising values above 0, got {list(values)}")
    if len(config.widths) * len(config.tokens) < 4:
        raise ConfigError("a law in size and tokens needs 4 or more sweeps; add widths or tokens")
    odd = [width for width in (*config.widths, config.next_width) if width % WIDTH_UNIT]
    if odd:
        raise ConfigError(f"a width must be a multiple of {WIDTH_UNIT}, got {odd[0]}")
    if config.next_width in config.widths:
        raise ConfigError(f"next_width {config.next_width} is one of widths; predict a size that is not swept")
    if config.batches[0] < config.proxy.context:
        raise ConfigError(f"batches must be proxy.context={config.proxy.context} tokens or more")
    if config.tokens[0] // config.batches[-1] < _LEAST_STEPS:
        raise ConfigError(
            f"{config.tokens[0]} tokens in steps of {config.batches[-1]} are fewer than {_LEAST_STEPS} steps; "
            "raise tokens or lower batches"
        )
    if not 0 < config.tolerance < 50:
        raise ConfigError(f"tolerance is in percent, above 0 and below 50, got {config.tolerance}")
    if config.noise_seeds < 2 or config.check_seeds < 1 or config.draws < 20:
        raise ConfigError("noise_seeds must be 2 or more, check_seeds 1 or more, draws 20 or more")


def prepare_text(context: StageContext) -> None:
    """Tokenizer, a shard to train on, one held out by file, and the data card."""
    config: TextConfig = context.config
    context.progress.start(3, "part")
    train, held_out = corpus.split_documents(corpus.python_stdlib_documents())
    train, dropped = dedup.deduplicate(train)
    context.progress.update(1)
    tokenizer = Tokenizer.train([document.text[: config.tokenizer_chars] for document in train], config.vocab_size)
    tokenizer.save(context.out / "tokenizer", CHAT_TEMPLATE)
    context.progress.update(2)
    entries = []
    for name, documents in (("text", train), ("held_out", held_out)):
        ids = [
            whole[start : start + config.passage]
            for tokens in tokenizer.encode_batch([document.text for document in documents])
            for whole in ([*tokens, tokenizer.endoftext],)
            for start in range(0, len(whole), config.passage)
        ]
        size = sum(len(document.text.encode()) for document in documents)
        write_shard(context.out / name, ids, {}, vocab_size=tokenizer.vocab_size, text_bytes=size)
        shard = Shard.open(context.out / name)
        entries.append(
            CardEntry(
                name=name,
                licence=corpus.LICENCE,
                documents=len(documents),
                tokens=shard.num_tokens,
                bytes=size,
                share=0.0,
                held_out=len(held_out) if name == "text" else 0,
                dropped=tuple(dropped) if name == "text" else (),
                sha256=shard.sha256,
            )
        )
    write_jsonl(context.out / "dropped.jsonl", [row._asdict() for row in dropped])
    write_json(context.out / "card.json", data_card(entries))
    context.progress.finish()


class Runner:
    """Trains settings of one stage and remembers their rows.

    Raises:
        InputError: a run longer than the text, which would see it twice.
    """

    def __init__(self, context: StageContext, tokens: int, pool: Executor | None) -> None:
        self.context, self.pool = context, pool
        self.proxy: ProxyConfig = context.config.proxy
        self.tolerance: float = context.config.tolerance / 100
        self.rows: dict[Setting, Row] = {}
        held = Shard.open(context.inputs["text"] / "text", verify="quick").num_tokens
        if tokens > held:
            raise InputError(f"a run of {tokens} tokens needs more text than the {held} there are; lower tokens")

    def train(self, settings: Sequence[Setting]) -> None:
        """Train those that are not known yet."""
        new = [setting for setting in dict.fromkeys(settings) if setting not in self.rows]
        progress, before = self.context.progress, len(self.rows)
        progress.start(before + len(new), "run")
        count = before

        def done(row: Row) -> None:
            nonlocal count
            count += 1
            shown = {"loss": row["loss"]} if row["loss"] is not None else {}
            progress.update(count, **shown)

        rows = train_all(new, self.proxy, self.context.inputs["text"], self.context.work, self.pool, done)
        self.rows |= dict(zip(new, rows, strict=True))

    def cell(self, width: int, tokens: int) -> dict[tuple[float, int], float]:
        """Losses by rate and batch at this stage's own seed."""
        return losses_of(
            [
                row
                for setting, row in self.rows.items()
                if (setting.width, setting.tokens, setting.seed) == (width, tokens, self.context.seed)
            ]
        )

    def enclose(self, width: int, tokens: Sequence[int], grid: Grid) -> None:
        """Run every length's sweep until its best setting is enclosed, or the grid ends."""
        while True:
            new = [
                Setting(width, length, rate, batch, self.context.seed)
                for length in tokens
                for rate, batch in next_settings(grid, self.cell(width, length), self.tolerance)
            ]
            if not new:
                return
            self.train(new)

    def write(self, result: dict[str, Any]) -> None:
        """The artefact: every run as a row, and the result with what all of them cost."""
        rows = [self.rows[setting] for setting in sorted(self.rows)]
        write_jsonl(self.context.out / "runs.jsonl", rows)
        result |= {"runs": len(rows), "steps": sum(row["steps"] for row in rows)}
        result |= {"tokens": sum(row["tokens"] for row in rows), "flops": sum(row["flops"] for row in rows)}
        write_json(self.context.out / "result.json", {**result, "rows": rows})
        self.context.progress.finish()


def train_with(workers: int, stage: Callable[[StageContext, Executor | None], None], context: StageContext) -> None:
    """Run a stage that trains in ``workers`` processes."""
    with worker_pool(workers) as pool:
        stage(context, pool)


def sweep(context: StageContext, pool: Executor | None) -> None:
    """All sweeps of one width, and the two best rates of the middle one with more seeds, for the noise of a run."""
    config: SweepConfig = context.config
    runner = Runner(context, max(config.tokens), pool)
    start = config.rates[len(config.rates) // 2], config.batches[len(config.batches) // 2]
    runner.enclose(config.width, config.tokens, Grid(config.rates, config.batches, start))
    middle = config.tokens[len(config.tokens) // 2]
    losses = runner.cell(config.width, middle)
    _, batch = min(losses, key=lambda key: losses[key])
    best = sorted((key for key in losses if key[1] == batch), key=lambda key: losses[key])[:2]
    runner.train(
        [Setting(config.width, middle, *key, context.seed + more) for key in best for more in range(config.noise_seeds)]
    )
    runner.write({"width": config.width})


def check(context: StageContext, pool: Executor | None) -> None:
    """Sweep the next size around the prediction, and run the settings to be compared again with more seeds.

    These are the predicted one, that with the best rate at the predicted batch, that with the least loss of all, and
    the one carried over from the ladder's largest sweep, which is what one would take without a law.
    """
    config: CheckConfig = context.config
    fit = read_json(context.inputs["fit"] / "result.json")
    told = fit["prediction"]
    size = Prediction(told["width"], told["tokens"], told["rate"]["value"], _batch(told["batch"]["value"], config))
    runner = Runner(context, size.tokens, pool)
    rates = [size.rate * factor for factor in config.factors]
    batches = [round(size.batch * factor) for factor in config.factors]
    most = max(size.batch, size.tokens // _LEAST_STEPS)
    batches = [batch for batch in batches if config.proxy.context <= batch <= most]
    runner.enclose(size.width, (size.tokens,), Grid(rates, batches, (size.rate, size.batch)))
    losses = runner.cell(size.width, size.tokens)
    cell = Cell(told["parameters"], size.tokens, losses)
    tolerance, largest = config.tolerance / 100, fit["cells"][-1]
    named = {
        "predicted": (size.rate, size.batch),
        "best": min((key for key in losses if key[1] == size.batch), key=lambda key: losses[key]),
        "least": min(losses, key=lambda key: losses[key]),
        "carried": (largest["rate"], _batch(largest["batch"], config)),
    }
    repeated = {
        name: [Setting(size.width, size.tokens, *chosen, context.seed + more) for more in range(config.seeds)]
        for name, chosen in named.items()
    }
    runner.train([setting for settings in repeated.values() for setting in settings])
    runner.write({
        "prediction": size._asdict(),
        "settings": {name: {"rate": rate, "batch": batch} for name, (rate, batch) in named.items()},
        "losses": {name: [runner.rows[setting]["loss"] for setting in group] for name, group in repeated.items()},
        "sweep": [{"rate": rate, "batch": batch, "loss": finite(loss)} for (rate, batch), loss in losses.items()],
        "rate": best_rates(losses)[size.batch]._asdict(),
        "optimum": best_setting(losses, tolerance)._asdict(),
        "batch": asdict(batch_interval(cell, tolerance, fit["noise"], config.draws, context.seed)),
    })  # fmt: skip


def finite(loss: float) -> float | None:
    """A loss as JSON has it: None where training failed."""
    return loss if math.isfinite(loss) else None


def _batch(value: float, config: CheckConfig) -> int:
    """A batch that can be trained: whole tokens, one sequence or more."""
    return max(config.proxy.context, round(value))
