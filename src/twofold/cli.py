"""The ``twofold`` command: chooses a recipe, overrides leaves of its configuration and runs its chain.

Errors that a user can mend are one line on stderr: exit code 2 for a wrong command line or configuration, 1 for a
run that failed, 130 after Ctrl-C. ``--debug`` shows the traceback. Not here: any work; commands hand over to recipes.
Recipes load when they are chosen, so that ``--version``, ``--help`` and typing errors do not wait for torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

import twofold
from twofold.base.config import ConfigError
from twofold.base.log import usable_processors
from twofold.base.malloc import MALLOC_SETTINGS, ensure_malloc_settings
from twofold.base.progress import duration_text
from twofold.base.records import InputError
from twofold.base.streams import ensure_utf8_paths, forgiving_streams
from twofold.recipes.chain import Chain, ChainError
from twofold.text.policy import by_name

BuildRecipe = Callable[[list[str], int], Chain]

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
HEAVY_COMMANDS = {"run", "chat", "serve", "quality"}
OPTIONAL_PACKAGES = {
    "matplotlib": "plots in the report",
    "reasoning_gym": "procedural tasks",
    "gguf": "GGUF files",
    "fastapi": "the server",
    "llguidance": "replies that keep to a grammar",
    "transformers": "parity tests against the reference implementation",
}


def recipe(module: str) -> BuildRecipe:
    """A recipe's ``build``, imported at the first call (it brings torch with it)."""

    def build(overrides: list[str], seed: int) -> Chain:
        chain: Chain = importlib.import_module(module).build(overrides, seed)
        return chain

    return build


Family = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A chat format (hybrid, thinking, instruct, coder, chatml, ...) in place of the model's template.",
    ),
]
RECIPES: dict[str, BuildRecipe] = {name: recipe(f"twofold.recipes.{name}") for name in ("tiny", "sft", "scaling")}

app = typer.Typer(
    name="twofold",
    help="One model, two modes: train it, talk to it, see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point of the ``twofold`` command."""
    ensure_utf8_paths()
    if HEAVY_COMMANDS & set(sys.argv[1:3]):
        ensure_malloc_settings()
    forgiving_streams()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


@contextmanager
def one_line_errors(debug: bool, interrupted: str = "stopped") -> Iterator[None]:
    """Turn errors that a user can mend, and Ctrl-C, into one line on stderr and an exit code."""
    try:
        yield
    except (ConfigError, InputError, ChainError) as error:
        if debug:
            raise
        fail(str(error), EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)
    except KeyboardInterrupt:
        if debug:
            raise
        Console(stderr=True).print(f"\n{escape(interrupted)}", style="yellow", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def fail(message: str, code: int) -> NoReturn:
    """Print ``error: message`` on stderr and leave with the exit code."""
    line = " ".join(message.split())
    Console(stderr=True).print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.", is_eager=True)] = False,
) -> None:
    """One model, two modes: train it, talk to it, see what it cost."""
    if version:
        typer.echo(f"twofold {twofold.__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe_name: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of: {', '.join(RECIPES)}.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration value; repeatable.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Run this stage and what it needs, nothing else.")
    ] = None,
    redo: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="Make this stage afresh; repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole run.")] = 0,
    family: Family = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder; runs/RECIPE unless given, runs/RECIPE-seedN with a seed."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show configuration and plan; do nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Run a recipe, or go on with it: what is finished is kept, what was interrupted resumes."""
    go_on = "the same command without --redo" if redo else "the same command"
    with one_line_errors(debug, interrupted=f"stopped; run {go_on} to go on"):
        chain = build_chain(recipe_name, with_family(overrides, family), seed)
        folder = out or default_folder(recipe_name, seed)
        console = Console()
        if dry_run:
            show_plan(console, chain, folder, only, redo or [])
        else:
            run_chain(console, chain, folder, only, redo or [])


@app.command("plan")
def plan_run(
    recipe_name: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of: {', '.join(RECIPES)}.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration value; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole run.")] = 0,
    family: Family = None,
    price: Annotated[float | None, typer.Option(min=0, metavar="N", help="What an hour of this machine costs.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Estimate memory, time and cost of a recipe's stages from a few real steps of each."""
    with one_line_errors(debug):
        settings = with_family(overrides, family)
        chain = build_chain(recipe_name, settings, seed)
        importlib.import_module("twofold.plan_cli").plan(recipe_name, chain, settings, price, Console())


@app.command()
def chat(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model or run folder, a .gguf file, or a name: Qwen/Qwen3-0.6B.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Sampling: temperature, top_p, max_tokens, seed, stop, ..."),
    ] = None,
    budget: Annotated[int | None, typer.Option(min=0, metavar="N", help="Most thinking tokens a reply.")] = None,
    no_think: Annotated[bool, typer.Option("--no-think", help="Answer without thinking (the hard switch).")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.")] = None,
    tools: Annotated[str | None, typer.Option(metavar="calc", help="Offer a tool to the model.")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Show each thought as one line.")] = False,
    quantize: Annotated[str | None, typer.Option(metavar="int8", help="Pack the weights for speed on a CPU.")] = None,
    family: Family = None,
) -> None:
    """Talk to a model; its thinking is shown apart from its answer."""
    with one_line_errors(debug=False):
        command = importlib.import_module("twofold.chat_cli")
        sampling = command.sampling_from(settings or []) | ({} if budget is None else {"thinking_budget": budget})
        loading = {"quantize": quantize, "policy": by_name(family)}
        command.chat(model, sampling, not no_think, system, tools, fold, loading)


@app.command()
def serve(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model or run folder, a .gguf file, or a name: Qwen/Qwen3-0.6B.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine unless given.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Ask for a key; repeatable.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the server; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...")] = "cpu",
    quantize: Annotated[str | None, typer.Option(metavar="int8", help="Pack the weights for speed on a CPU.")] = None,
    family: Family = None,
) -> None:
    """Serve a model: an OpenAI-compatible API under /v1, and a web chat at /."""
    with one_line_errors(debug=False):
        command = importlib.import_module("twofold.serve_cli")
        loading = {"dtype": dtype, "device": device, "quantize": quantize, "policy": by_name(family)}
        command.serve(model, host, port, api_key or [], settings or [], loading)


@app.command()
def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model or run folder, a .gguf file, or a name: Qwen/Qwen3-0.6B.")
    ],
    context: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of a sequence; all it is made for unless given.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences kept in memory at once.")] = 1,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Show what a checkpoint is and what memory it needs, without loading its weights."""
    with one_line_errors(debug=False):
        importlib.import_module("twofold.model_cli").inspect(model, context, batch, dtype, Console())


@app.command()
def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model or run folder, a .gguf file, or a name: Qwen/Qwen3-0.6B.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a file that ends in .gguf.")],
    kind: Annotated[str, typer.Option("--type", help="f32, f16, bf16; for GGUF also q8_0, q4_0.")] = "bf16",
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A PEFT adapter to merge first.")] = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="Merge it though trained on other weights.")] = False,
    family: Family = None,
) -> None:
    """Write a model as a Hugging Face folder or as a GGUF file."""
    with one_line_errors(debug=False):
        importlib.import_module("twofold.model_cli").export(model, out, kind, adapter, any_base, Console(), family)


@app.command()
def quality(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model or run folder, a .gguf file, or a name: Qwen/Qwen3-0.6B.")
    ],
    quantize: Annotated[str, typer.Option(metavar="int8", help="How the weights are packed.")] = "int8",
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to compare on; Python's own if none.")] = None,
    length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=2, metavar="N", help="Most windows.")] = 16,
) -> None:
    """Show what packing a model's weights costs: KL divergence and agreement with fp32."""
    with one_line_errors(debug=False):
        importlib.import_module("twofold.model_cli").quality(model, quantize, text, length, windows, Console())


@data_app.command("view")
def data_view(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Conversations as JSON Lines, in any known format.")],
    model: Annotated[Path, typer.Option(metavar="MODEL", help="Whose tokenizer and chat format to use.")],
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Write a page instead of printing.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Most conversations shown.")] = 20,
    family: Family = None,
) -> None:
    """Show conversations token by token, coloured by role and loss weight, exactly as they will be trained."""
    with one_line_errors(debug=False):
        importlib.import_module("twofold.model_cli").view(file, model, html, limit, Console(), family)


@app.command()
def doctor() -> None:
    """Show what Twofold finds on this machine and what it makes of it."""
    console = Console()
    for name, value in machine_facts().items():
        console.print(f"[bold]{name:<18}[/] {escape(value)}", highlight=False, soft_wrap=True)


def build_chain(recipe_name: str, overrides: list[str], seed: int) -> Chain:
    """The chain of a recipe by name.

    Raises:
        ConfigError: unknown recipe (with the nearest name) or override.
    """
    if recipe_name not in RECIPES:
        near = difflib.get_close_matches(recipe_name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(RECIPES)}"
        raise ConfigError(f"unknown recipe {recipe_name!r}; {hint}")
    return RECIPES[recipe_name](overrides, seed)


def with_family(overrides: list[str] | None, family: str | None) -> list[str]:
    """The overrides of a recipe, with the chat format that ``--family`` names."""
    return [*(overrides or []), *([f"family={family}"] if family else [])]


def default_folder(recipe_name: str, seed: int) -> Path:
    """``runs/<recipe>`` for seed 0, ``runs/<recipe>-seed<N>`` otherwise."""
    return Path("runs") / (recipe_name if seed == 0 else f"{recipe_name}-seed{seed}")


def run_chain(console: Console, chain: Chain, folder: Path, only: str | None, redo: list[str]) -> None:
    """Run a chain and say in one line what came of it."""
    results = chain.run(folder, only=only, redo=redo, console=console)
    ran = [result for result in results if result.status == "ran"]
    total = duration_text(sum(result.seconds for result in results))
    what = f"{len(ran)} of {len(results)} stages ran" if ran else "nothing to do"
    console.print(escape(f"{what}; {total} in all; folder: {folder}"), style="bold", highlight=False, soft_wrap=True)
    if (folder / "report" / "report.json").exists():
        report = importlib.import_module("twofold.recipes.report")
        report.publish(folder)
        for line in report.print_summary(folder / "report.json"):
            console.print(line, highlight=False, soft_wrap=True)


def show_plan(console: Console, chain: Chain, folder: Path, only: str | None, redo: list[str]) -> None:
    """Print the resolved configuration as a tree and what a run would do with each stage."""
    plan = chain.plan(folder, only=only, redo=redo)
    tree = Tree(f"[bold]{escape(chain.name)}[/]  seed {chain.seed}  folder {escape(str(folder))}")
    if chain.config is not None:
        add_branches(tree, chain.config.model_dump(mode="json"))
    else:
        for line in plan:
            add_branches(tree.add(f"[bold]{line.stage.name}[/]"), line.stage.config.model_dump(mode="json"))
    console.print(tree, highlight=False, soft_wrap=True)
    colours = {"done": "green", "run": "yellow", "resume": "magenta"}
    for line in plan:
        status = f"[{colours[line.status]}]{line.status:<7}[/]"
        key = line.key or "-" * 16
        console.print(
            f"{status} {key}  {line.stage.name:<18} {escape(line.stage.title)}", highlight=False, soft_wrap=True
        )


def add_branches(tree: Tree, values: dict[str, object]) -> None:
    """Add nested values to a tree, one leaf ``key = value`` a line."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            add_branches(tree.add(escape(str(name))), value)
        else:
            tree.add(f"{escape(str(name))} = [cyan]{escape(repr(value))}[/]")


def machine_facts() -> dict[str, str]:
    """Versions, processors, memory, numerics and optional packages, as lines for people."""
    facts = {
        "twofold": twofold.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "processors": f"{usable_processors()} usable",
        "memory": memory_text(),
        **torch_facts(),
    }
    tuned = all(os.environ.get(name) for name in MALLOC_SETTINGS)
    facts["allocator"] = "tuned" if tuned else "tuned at the start of every heavy command (Linux with glibc)"
    for package, use in OPTIONAL_PACKAGES.items():
        present = metadata.version(package) if util.find_spec(package) else f"missing; needed for {use}"
        facts[package] = present
    return facts


def torch_facts() -> dict[str, str]:
    """Version of torch, its devices, and the compute type Twofold takes on them with the reason."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return {"torch": f"missing ({error}); install it from pytorch.org"}
    facts = {"torch": str(torch.__version__), "torch threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["device"] = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        bf16 = torch.cuda.is_bf16_supported()
        facts["compute type"] = "bfloat16 (the GPU has it)" if bf16 else "float32 (the GPU lacks bfloat16)"
    else:
        facts["device"] = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
        facts["compute type"] = "float32 (bfloat16 products are slow on most CPUs)"
    return facts


def memory_text() -> str:
    """Physical memory in GiB."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


if __name__ == "__main__":
    main()
