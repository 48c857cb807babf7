"""Generation and prefill speed on a CPU against llama.cpp, transformers and vLLM: same weights, same prompts, in turn.

    python -m benchmarks.engine_speed MODEL.gguf [--rounds 3] [--sides int8 q8_0 ...] [--cases n8 ...] [--out FILE]

Cases: n1, n8 and n32 are that many concurrent greedy requests of 16 prompt and 64 new tokens, prefill is one prompt of
512 tokens and 1 new one, edit is one request that writes a piece of code again with a name changed (llama.cpp decodes
plainly; of ours, "lookup" drafts by prompt lookup). Speed is new tokens (of prefill: prompt tokens) by wall time.

Sides: int8, float16 and fp32 are ours, with packed weights (fp32 loses nothing by it); plain is ours as it is trained;
q4_k_m is llama.cpp on MODEL itself, q8_0 llama.cpp on MODEL's weights written
as Q8_0; transformers has them in fp32; vllm too, in its own interpreter (--vllm-python PATH), for vLLM brings its own
torch. All sides of a case run in turn, every round with fresh prompts; medians of per-round ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
import xllamacpp

from twofold.base.files import write_json
from twofold.base.gguf_file import read_metadata
from twofold.base.records import Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.engine.request import EngineOptions
from twofold.model.gguf_read import load_gguf, open_gguf
from twofold.model.gguf_write import save_gguf
from twofold.model.hf_config import config_to_hf
from twofold.model.quantised import load_quantised
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import save_weights, to_hf
from twofold.text.gguf_tokenizer import tokenizer_from_gguf
from twofold.text.tokenizer import Tokenizer

RESULT = Path(__file__).parent / "results" / "engine-speed.json"
PROMPT, NEW, LONG, EDITED = 16, 64, 512, 192
CONCURRENT = {"n1": 1, "n8": 8, "n32": 32}
CASES = (*CONCURRENT, "prefill", "edit")
SIDES = ("int8", "float16", "fp32", "plain", "lookup", "q4_k_m", "q8_0", "transformers", "vllm")
# Which pairs of sides are compared, and in which cases; others are only timed.
PAIRS = [(ours, peer) for ours in ("int8", "float16") for peer in ("q4_k_m", "q8_0", "vllm")]
PAIRS += [("fp32", "transformers"), ("fp32", "vllm"), ("fp32", "plain"), ("lookup", "q8_0"), ("lookup", "int8")]

ONLY = {"lookup": "edit", "transformers": "n8"}  # the one case that a side is for

Generate = Callable[[list[list[int]], int], None]  # prompts, new tokens of each

_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=1024, max_num_seqs=32,
          enable_prefix_caching=False, gpu_memory_utilization=0.25)  # of a CPU's memory, whatever its name
print("ready", flush=True)
for line in sys.stdin:
    prompts, new = json.loads(line)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    print("done", flush=True)
"""


def ours(model: Qwen3, speculate: int = 0) -> Generate:
    """Our engine on ``model``."""
    engine = Engine(model, (0,), options=EngineOptions(entropies=False, replay_after=0))  # recorded while warming up

    def generate(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, speculate=speculate)
        made = engine.generate([Request(tuple(prompt), params) for prompt in prompts])
        assert all(len(completion.token_ids) == new for completion in made)

    return generate


def llama_cpp(path: Path, threads: int) -> Generate:
    """llama.cpp's server on a GGUF file, through HTTP on this machine."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 32 * 1024, 32
    params.warmup, params.fit_params, params.verbosity = True, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def post(prompt: list[int], new: int) -> None:
        body = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            assert json.load(answer)["tokens_predicted"] == new

    def generate(prompts: list[list[int]], new: int) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: post(prompt, new), prompts))

    return generate


def theirs(model: Qwen3) -> Generate:
    """transformers on the same fp32 tensors."""
    values = config_to_hf(model.config, torch.float32)
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        block = transformers.AutoModelForCausalLM.from_config(config)
    block.load_state_dict(to_hf(model), strict=False, assign=True)
    block.tie_weights()
    for module in block.modules():  # angles are no part of the state
        if hasattr(module, "inv_freq"):
            module.__init__(config=config)
    block.eval()

    @torch.no_grad()
    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        out = block.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        assert out.shape[1] == ids.shape[1] + new

    return generate


def vllm(python: Path, model: Qwen3, folder: Path, threads: int) -> Generate:
    """vLLM in its own interpreter, kept running."""
    save_weights(model, folder)
    process = subprocess.Popen(
        [python, "-c", _VLLM, folder],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "OMP_NUM_THREADS": str(threads),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def wait(word: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == word:
                return
        raise RuntimeError("vLLM has ended; run it by hand to see why")

    wait("ready")

    def generate(prompts: list[list[int]], new: int) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps([prompts, new]) + "\n")
        process.stdin.flush()
        wait("done")

    return generate


def build(path: Path, names: Sequence[str], work: Path, vllm_python: Path | None) -> dict[str, Generate]:
    """The sides asked for, each ready to run."""
    sides: dict[str, Generate] = {}
    kinds = {"int8": "int8", "lookup": "int8", "float16": "float16", "fp32": "float32"}
    small = {kind: load_quantised(*open_gguf(path), kind) for kind in {kinds[name] for name in names if name in kinds}}
    plain = load_gguf(path) if {"plain", "q8_0", "transformers", "vllm"} & {*names} else None
    for name in names:
        if name in kinds:
            sides[name] = ours(small[kinds[name]], speculate=8 if name == "lookup" else 0)
        elif name == "q4_k_m":
            sides[name] = llama_cpp(path, torch.get_num_threads())
        elif plain is not None and name == "plain":
            sides[name] = ours(plain)
        elif plain is not None and name == "transformers":
            sides[name] = theirs(plain)
        elif plain is not None and name == "vllm" and vllm_python is not None:
            sides[name] = vllm(vllm_python, plain, work, torch.get_num_threads())
        elif plain is not None and name == "q8_0":
            save_gguf(plain, tokenizer(path), work / "q8_0.gguf", "q8_0", "", "benchmark")
            sides[name] = llama_cpp(work / "q8_0.gguf", torch.get_num_threads())
    return sides


def tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file."""
    return tokenizer_from_gguf(read_metadata(path), str(path))


def prompts_of(case: str, tokens: list[int], coder: Tokenizer, rng: random.Random) -> tuple[list[list[int]], int]:
    """Fresh prompts of a case, and how many tokens each is continued by."""
    if case == "edit":
        code = textwrap.dedent(f"""\
            def total_{rng.randrange(10**6)}(items):
                result = 0
                for item in items:
                    if item.price is None:
                        continue
                    result = result + item.price * item.count
                if result < 0:
                    raise ValueError("the total is negative")
                return result
            """)
        text = f"The function:\n```python\n{code}```\nThe same function, with result renamed to amount:\n```python\n"
        return [coder.encode_with_special(text)], EDITED // 2
    length, count = (LONG, 1) if case == "prefill" else (PROMPT, CONCURRENT[case])
    starts = [rng.randrange(len(tokens) - length) for _ in range(count)]
    return [tokens[start : start + length] for start in starts], 1 if case == "prefill" else NEW


def measure(
    path: Path, sides: dict[str, Generate], cases: Sequence[str], rounds: int
) -> dict[str, dict[str, dict[str, float | list[float]]]]:
    """Tokens a second of every side in every case, and ratios of the pairs."""
    coder, rng = tokenizer(path), random.Random(0)
    tokens = coder.encode_with_special(Path(argparse.__file__).read_text())
    results: dict[str, dict[str, dict[str, float | list[float]]]] = {}
    for case in cases:
        rates: dict[str, list[float]] = {name: [] for name in sides if ONLY.get(name, case) == case}
        for round_ in range(rounds + 1):  # the first warms up
            for name in rates:
                prompts, new = prompts_of(case, tokens, coder, rng)
                start = time.perf_counter()
                sides[name](prompts, new)
                seconds = time.perf_counter() - start
                if round_:
                    rates[name].append((len(prompts[0]) if case == "prefill" else len(prompts) * new) / seconds)
        results[case] = {
            "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
            "ratios": {},
        }
        for mine, peer in PAIRS:
            if rates.get(mine) and rates.get(peer):
                ratios = [a / b for a, b in zip(rates[mine], rates[peer], strict=True)]
                middle, low, high = (round(f(ratios), 2) for f in (statistics.median, min, max))
                results[case]["ratios"][f"{mine} by {peer}"] = [middle, low, high]
        print(case, json.dumps(results[case]), flush=True)
    return results


def main() -> None:
    """Run the comparisons and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--threads", type=int, help="of every side; all cores unless given")
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vLLM; without it that side is left out")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        sides = build(arguments.model, arguments.sides, Path(work), arguments.vllm_python)
        results = measure(arguments.model, sides, arguments.cases, arguments.rounds)
    facts = {
        "machine": platform.processor() or platform.machine(),
        "model": arguments.model.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "xllamacpp": xllamacpp.__version__,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
    }
    write_json(arguments.out, {**facts, **results})


if __name__ == "__main__":
    main()
