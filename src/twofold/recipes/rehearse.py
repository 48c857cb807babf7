"""A stage of a recipe rehearsed: the real stage function on a few steps, in a process of its own, measured.

``python -m twofold.recipes.rehearse`` reads a job as JSON on stdin and prints what it measured as the last line: so the
peak of memory is that of the stage alone, with its imports, its allocator, its loading, saving and measuring. Stand-in
data of like shape replaces the tiny recipe's data stage, which takes longer than what is asked of a rehearsal. Not
here: what follows from the measurements (``plan.py``).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from twofold.base.files import read_json, read_jsonl, write_jsonl
from twofold.base.log import memory_bytes, peak_memory_bytes
from twofold.data.corpus import pydoc_topic_documents
from twofold.data.shards import write_shard
from twofold.data.tasktext import task_documents
from twofold.eval.language import ProbeDocument
from twofold.recipes import sft, tiny
from twofold.recipes.artefacts import VOLATILE
from twofold.recipes.chain import Chain, Stage, StageContext, read_manifest
from twofold.recipes.corpus import DataConfig
from twofold.recipes.pretrain import PretrainConfig
from twofold.tasks.families import default_families
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.tokenizer import Tokenizer

BUILD = {"sft": sft.build, "tiny": tiny.build}
LONG = ("text", "held_out", "notes_long")  # of the tiny recipe's shards, those of long documents
_TASK_DOCUMENTS = 1500
_PROBE_TOKENS = 1000


def rehearsal(recipe: str, overrides: list[str], seed: int, steps: int) -> Chain:
    """The recipe's chain with stand-in data and pre-training of ``steps`` steps, each stage from scratch."""
    stages = []
    chain = BUILD[recipe](overrides, seed)
    for stage in chain.stages:
        if isinstance(stage.config, DataConfig):
            stage = replace(stage, run=stand_in_data)
        elif isinstance(stage.config, PretrainConfig):
            changes = {"tokens": steps * stage.config.tokens_per_step, "head_start": {}}
            stage = replace(stage, config=stage.config.model_copy(update=changes))
        stages.append(stage)
    return Chain(recipe, stages, seed)


def stand_in_data(context: StageContext) -> None:
    """Write what pre-training reads: a tokenizer of the right size, shards of long and of short documents, probes."""
    config: DataConfig = context.config
    texts = [document.text for document in pydoc_topic_documents()]
    tasks = list(task_documents(default_families(), _TASK_DOCUMENTS, context.seed, config.think_share, curriculum=True))
    tokenizer = Tokenizer.train([*texts, *tasks], config.vocab_size)
    tokenizer.save(context.out / "tokenizer", CHAT_TEMPLATE)
    ids = {
        long: [[*tokens, tokenizer.endoftext] for tokens in tokenizer.encode_batch(texts if long else tasks)]
        for long in (True, False)
    }
    for name in ("text", "held_out", "tasks_general", "tasks_reasoning", "gym", "copying", "notes_short", "notes_long"):
        write_shard(context.out / name, ids[name in LONG], {}, vocab_size=tokenizer.vocab_size, text_bytes=1)
    stream = [token for document in ids[True] for token in document]
    starts = range(0, config.probe_documents * 7, 7)
    probes = [
        ProbeDocument(stream[start : start + _PROBE_TOKENS], [_PROBE_TOKENS - 1], [_PROBE_TOKENS - 1])
        for start in starts
    ]
    write_jsonl(context.out / "probes.jsonl", [asdict(probe) for probe in probes])


def measured(folder: Path, stage: Stage) -> dict[str, Any]:
    """What a finished stage left about its cost: seconds of the whole, rows of its steps, memory by name."""
    manifest, volatile = read_manifest(folder / stage.name), folder / stage.name / VOLATILE
    if manifest is None:
        raise FileNotFoundError(folder / stage.name)
    steps = read_jsonl(volatile / "speed.jsonl") if (volatile / "speed.jsonl").is_file() else []
    parts = read_json(volatile / "memory.json") if (volatile / "memory.json").is_file() else {}
    return {"seconds": manifest.cost.seconds, "steps": steps, "parts": parts}


def main() -> None:
    """Run one job: {"recipe", "overrides", "seed", "steps", "stage", "folder"}."""
    job = json.load(sys.stdin)
    process = memory_bytes()
    chain = rehearsal(job["recipe"], job["overrides"], job["seed"], job["steps"])
    stage = next(stage for stage in chain.stages if stage.name == job["stage"])
    folder = Path(job["folder"])
    chain.run(folder, only=stage.name)
    print(json.dumps({**measured(folder, stage), "process": process, "peak": peak_memory_bytes()}))


if __name__ == "__main__":
    main()
