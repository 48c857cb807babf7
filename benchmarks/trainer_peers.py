"""Training by Hugging Face's Trainer or TRL's SFTTrainer, for ``trainer_speed``, which starts it as a process.

Needs torch, transformers and trl, and nothing of Twofold, so that it runs in an environment of their own. Settings are
their defaults (padding to the longest of a batch, cross entropy on all logits) but for those that make the work equal:
the same documents in the same order, fp32, fused AdamW, one constant rate, no saving.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import datasets
import torch
import transformers

os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Times(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    """Train as the JSON on standard input says; print the seconds of each step, losses and peak memory."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**job["config"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
    common = {
        "output_dir": job["work"], "per_device_train_batch_size": job["documents_per_step"],
        "max_steps": job["steps"], "learning_rate": job["rate"], "lr_scheduler_type": "constant", "warmup_steps": 0,
        "optim": "adamw_torch_fused", "weight_decay": 0.0, "max_grad_norm": 1.0, "save_strategy": "no",
        "report_to": "none", "logging_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    times = Times()
    rows = datasets.Dataset.from_dict({"input_ids": job["documents"]})
    trainer: Any
    if job["side"] == "transformers":
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        arguments = transformers.TrainingArguments(**common, train_sampling_strategy="sequential")
        trainer = transformers.Trainer(model, arguments, collator, rows, callbacks=[times])
    else:
        import trl

        arguments = trl.SFTConfig(
            **common, train_sampling_strategy="sequential", max_length=None, gradient_checkpointing=False,
            packing=job["side"] == "trl packed",
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[times]
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.train()
    found = {
        "step_seconds": [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)],
        "losses": times.losses,
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "before_bytes": 1024 * before,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    print("result", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
