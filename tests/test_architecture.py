"""The rules of the house, checked on the sources: layers, sizes, heavy imports, recipes, documents.

Each failure names the file and line and what to do. Exceptions stand in the lists at the top, with their reason.
Not here: behaviour; tests/unit mirrors the package for that.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twofold import cli
from twofold.base.config import Config

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "twofold"
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = {
    "base": 0,
    "ops": 1,
    "text": 1,
    "optim": 1,
    "model": 2,
    "data": 2,
    "tasks": 2,
    "engine": 3,
    "train": 3,
    "quant": 3,
    "llm": 4,
    "episodes": 4,
    "post": 5,
    "eval": 5,
    "serve": 5,
    "report": 5,
    "recipes": 6,
    "cli": 7,
    "chat_cli": 7,
    "chat_view": 6,
    "model_cli": 7,
    "plan_cli": 7,
    "serve_cli": 7,
}
TORCH_FREE = (
    "text",
    "tasks",
    "base.config",
    "base.records",
    "base.files",
    "base.hub",
    "base.progress",
    "eval.stats",
    "report",
    "recipes.chain",
    "recipes.claims",
    "cli",
)
HEAVY = (
    "huggingface_hub",
    "modelscope",
    "reasoning_gym",
    "matplotlib",
    "transformers",
    "fastapi",
    "llguidance",
    "lm_eval",
    "prometheus_client",
    "triton",
    "uvicorn",
    "datatrove",
    "fsspec",
    "gguf",
    "peft",
    "tiktoken",
    "tensorboard",
    "trackio",
    "wandb",
)
# Where a heavy package may be named at all.
HEAVY_HOMES = {
    "huggingface_hub": "base/hub.py",
    "modelscope": "base/hub.py",
    "reasoning_gym": "tasks/gym.py",
    "matplotlib": "report/plots.py",
    "gguf": "model/gguf_read.py",
    "fastapi": "serve/app.py",
    "fsspec": "data/remote.py",
    "llguidance": "engine/grammar.py",
    "prometheus_client": "serve/metrics.py",
    "pyarrow": "text/data_files.py",
    "uvicorn": "serve/server.py",
    "tensorboard": "train/trackers.py",
    "trackio": "train/trackers.py",
    "wandb": "train/trackers.py",
}

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_FIELDS = 500, 70, 8, 20
# Longer or wider than the rule, and why: {"path": reason}, {"path:function": reason}, {"Class": reason}.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
WIDE_FUNCTIONS: dict[str, str] = {
    f"cli.py:{name}": "each parameter is an option of the command line" for name in ("run", "chat", "serve")
}
LARGE_CONFIGS: dict[str, str] = {"ModelConfig": "its fields are the keys of config.json"}


def module_name(path: Path) -> str:
    """``base.files`` for src/twofold/base/files.py; a package's own name for its __init__."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MODULES = {module_name(path): path for path in FILES}


def where(path: Path, line: int = 0) -> str:
    """A path as the reader's editor takes it."""
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def imported(node: ast.AST, path: Path) -> list[str]:
    """Absolute names an import statement may load (``from a import b``: both a and a.b)."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.relative_to(SOURCE.parent).parts[: -node.level]
            base = ".".join([*package, *([node.module] if node.module else [])])
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return []


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """All (name, line) that a file imports, wherever in the file."""
    for node in ast.walk(TREES[path]):
        for name in imported(node, path):
            yield name, getattr(node, "lineno", 0)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of our own modules that a file imports, without the ``twofold.`` in front."""
    for name, line in imports(path):
        short = name.removeprefix("twofold.")
        if short != name and short in MODULES:
            yield short, line


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def report(problems: list[str], advice: str) -> None:
    """Fail with all problems at once."""
    assert not problems, advice + "\n  " + "\n  ".join(problems)


def test_every_package_has_a_layer() -> None:
    rooms = {module.split(".")[0] for module in MODULES if module}
    assert rooms <= LAYERS.keys(), f"give {sorted(rooms - LAYERS.keys())} a layer here and in docs/structure.md"


def test_imports_go_to_lower_layers() -> None:
    """Also keeps engine and train apart, and data from model: packages of one layer never import each other."""
    problems = []
    for path in FILES:
        room = module_name(path).split(".")[0]
        for module, line in own_imports(path):
            target = module.split(".")[0]
            if room and target != room and LAYERS[target] >= LAYERS[room]:
                problems.append(f"{where(path, line)} imports twofold.{module}: {room} is not above {target}")
    report(problems, "a module imports only from lower layers and its own package")


def test_the_package_itself_imports_nothing_of_ours() -> None:
    """Its public names load when they are used; a type checker may know them before."""
    path = SOURCE / "__init__.py"
    blocks = [
        node for node in TREES[path].body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    for_types = {line for block in blocks for line in range(block.lineno, (block.end_lineno or 0) + 1)}
    assert [module for module, line in own_imports(path) if line not in for_types] == []


def test_no_import_cycles() -> None:
    graph = {name: {module for module, _ in own_imports(path)} - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_own_modules_are_imported_at_the_top() -> None:
    problems = [
        f"{where(path, node.lineno)} in {function.name}"
        for path in FILES
        for function in functions(path)
        for node in ast.walk(function)
        if any(name.split(".")[0] == "twofold" for name in imported(node, path))
    ]
    report(problems, "import our own modules at the top of the file, not inside functions")


def test_only_the_command_line_loads_modules_by_name() -> None:
    """``importlib`` would get round the layers; cli.py uses it so that ``--help`` does not wait for torch."""
    problems = [
        where(path)
        for path in FILES
        if module_name(path) not in ("cli", "chat_cli") and "twofold" in _dynamic_targets(path)
    ]
    report(problems, "import our own modules by an import statement")


def _dynamic_targets(path: Path) -> str:
    """First arguments of ``import_module`` calls, as source text."""
    calls = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call) and node.args]
    return " ".join(ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func).endswith("import_module"))


@pytest.mark.parametrize("room", TORCH_FREE)
def test_torch_free_rooms(room: str) -> None:
    """Follows our own imports to the end: nothing reachable may import torch."""
    waiting = [name for name in MODULES if name == room or name.startswith(room + ".")]
    seen = set(waiting)
    problems = []
    while waiting:
        path = MODULES[waiting.pop()]
        problems += [
            f"{where(path, line)} imports {name}"
            for name, line in imports(path)
            if name.split(".")[0] in ("torch", "safetensors")
        ]
        parents = {module.rsplit(".", 1)[0] for module, _ in own_imports(path) if "." in module}
        new = ({module for module, _ in own_imports(path)} | parents) - seen
        seen |= new
        waiting += new
    report(problems, f"twofold.{room} must load without torch")


def test_ops_know_no_process_groups() -> None:
    problems = [
        f"{where(path, line)} imports {name}"
        for path in FILES
        if module_name(path).startswith("ops")
        for name, line in imports(path)
        if name.startswith("torch.distributed")
    ]
    report(problems, "ops are pure functions on tensors")


def test_heavy_packages_stay_at_home() -> None:
    problems = [
        f"{where(path, line)} imports {name}"
        for path in FILES
        for name, line in imports(path)
        if name.split(".")[0] in HEAVY
        and path.relative_to(SOURCE).as_posix() != HEAVY_HOMES.get(name.split(".")[0], "nowhere")
    ]
    report(problems, "a heavy optional package is imported only in the one module that needs it (HEAVY_HOMES)")


@pytest.mark.parametrize("module", ["twofold", "twofold.cli"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({(*HEAVY, 'torch')!r}) & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [], f"import {module} loads these; load them where they are used"


def test_file_sizes() -> None:
    problems = []
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE and path.relative_to(SOURCE).as_posix() not in LONG_FILES:
            problems.append(f"{where(path)}: {lines} lines")
    report(problems, f"a file has at most {MAX_FILE} lines; split it, or give a reason in LONG_FILES")


def test_function_sizes() -> None:
    problems = []
    for path in FILES:
        for function in functions(path):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            key = f"{path.relative_to(SOURCE).as_posix()}:{function.name}"
            if lines > MAX_FUNCTION and key not in LONG_FUNCTIONS:
                problems.append(f"{where(path, function.lineno)} {function.name}: {lines} lines")
    report(problems, f"a function has at most {MAX_FUNCTION} lines; split it, or give a reason in LONG_FUNCTIONS")


def test_parameter_counts() -> None:
    problems = []
    for path in FILES:
        for function in functions(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            key = f"{path.relative_to(SOURCE).as_posix()}:{function.name}"
            if count > MAX_PARAMETERS and key not in WIDE_FUNCTIONS:
                problems.append(f"{where(path, function.lineno)} {function.name}: {count} parameters")
    report(problems, f"at most {MAX_PARAMETERS} parameters; group them, or give a reason in WIDE_FUNCTIONS")


def test_config_sizes() -> None:
    for name in MODULES:
        if name:
            importlib.import_module(f"twofold.{name}")
    problems, classes = [], list(Config.__subclasses__())
    while classes:
        config = classes.pop()
        classes += config.__subclasses__()
        count = len(config.model_fields)
        if config.__module__.startswith("twofold.") and count > MAX_FIELDS and config.__name__ not in LARGE_CONFIGS:
            problems.append(f"{config.__module__}.{config.__name__}: {count} fields")
    report(problems, f"a configuration has at most {MAX_FIELDS} fields; group them, or give a reason in LARGE_CONFIGS")


def test_exceptions_are_still_needed() -> None:
    listed = {**LONG_FILES, **LONG_FUNCTIONS, **WIDE_FUNCTIONS}
    gone = [key for key in listed if not (SOURCE / key.split(":")[0]).exists()]
    assert gone == [], "these exceptions name files that no longer exist"
    assert all(len(reason) > 10 for reason in [*listed.values(), *LARGE_CONFIGS.values()])


def test_modules_open_with_a_docstring() -> None:
    problems = []
    for path in FILES:
        text = ast.get_docstring(TREES[path]) or ""
        if not text:
            problems.append(where(path))
        elif len(text.splitlines()) > 12:
            problems.append(f"{where(path)}: {len(text.splitlines())} lines of docstring, at most 12")
    report(problems, "a module opens by saying what it is, and what it is not")


def test_nothing_is_left_unfinished() -> None:
    marks = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]))
    report(list(_matches(marks, FILES)), "finish it, or leave it out and say so in the docstring")


def test_no_local_paths() -> None:
    """A path of somebody's machine in a file that others read."""
    local = re.compile(r"(?<![\w.})*~])/(?:work|root|home/\w+|Users/\w+)/")
    tests = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__).resolve()]
    report(list(_matches(local, [*FILES, *tests, *documents()])), "name no path of one machine")


def documents() -> list[Path]:
    """Files for people and tools at the root and in docs/."""
    names = ["Makefile", "pyproject.toml", ".ci/run"]
    return [*(ROOT / name for name in names), *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def _matches(pattern: re.Pattern[str], paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := pattern.search(line):
                yield f"{where(path, number)}: {found[0]}"


# Settings that a recipe cannot do without, and its variants.
VARIANTS: dict[str, list[list[str]]] = {
    "tiny": [[], ["controls=true"]],
    "sft": [["init={tmp}", "data={tmp}/rows.jsonl"], ["init={tmp}", "data={tmp}/rows.jsonl", "train.method=lora"]],
    "scaling": [[], ["proxy.optimizer=adamw", "widths=[16,24]"]],
}


@pytest.mark.parametrize(("name", "overrides"), [(name, given) for name in cli.RECIPES for given in VARIANTS[name]])
def test_every_recipe_builds_and_dry_runs(name: str, overrides: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("{}", encoding="utf-8")
    overrides = [override.format(tmp=tmp_path) for override in overrides]
    chain = cli.build_chain(name, overrides, 0)
    plan = chain.plan(folder)
    assert [line.stage.name for line in plan] == [stage.name for stage in chain.stages]
    assert {line.status for line in plan} == {"run"}
    arguments = [argument for override in overrides for argument in ("--set", override)]
    shown = CliRunner().invoke(cli.app, ["run", name, "--dry-run", "--out", str(folder), *arguments])
    assert shown.exit_code == 0, shown.output
    assert all(stage.name in shown.output for stage in chain.stages)
    assert not folder.exists(), "a dry run writes nothing"


def test_dependencies_are_declared_and_used() -> None:
    """What src imports is declared; what is declared is imported (base) and explained in docs/dependencies.md (all)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    base = {_package(line) for line in project["dependencies"]}
    optional = {_package(line) for lines in extras.values() for line in lines} - {"twofold"}
    known = {*sys.stdlib_module_names, "twofold"}
    found = {name.split(".")[0] for path in FILES for name, _ in imports(path)} - known
    assert base <= found, f"declared but never imported: {sorted(base - found)}"
    assert found - base <= {_package(line) for name in extras if name != "dev" for line in extras[name]}, "declare it"
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").replace("-", "_")
    missing = sorted(name for name in base | optional if f"`{name}`" not in text)
    assert missing == [], "docs/dependencies.md does not say why these are here"


def _package(requirement: str) -> str:
    """Import name of a requirement (our dependencies differ only by the hyphen)."""
    return re.split(r"[\s\[<>=!~;]", requirement.strip(), maxsplit=1)[0].replace("-", "_").lower()


def test_structure_document_matches_the_disk() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    block = re.search(r"```text\nsrc/twofold/\n(.*?)```", text, re.DOTALL)
    assert block, "docs/structure.md has no tree that begins with src/twofold/"
    folders: list[str] = []
    listed = {}
    for line in block[1].splitlines():
        match = re.match(r"( +)(\S+)\s+(\S.*)", line)
        assert match, f"docs/structure.md: {line!r} is not `name  what it is`"
        depth, name = len(match[1]) // 2 - 1, match[2]
        listed["/".join([*folders[:depth], name.rstrip("/")])] = match[3]
        folders[depth:] = [name.rstrip("/")] if name.endswith("/") else []
    files = [path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file()]
    disk = {path.as_posix() for path in files if path.name != "__init__.py" and path.suffix in (".py", ".jinja")}
    disk |= {path.parent.as_posix() for path in files if path.name == "__init__.py"} - {"."}
    assert sorted(disk - listed.keys()) == [], "add a line for these to the tree in docs/structure.md"
    assert sorted(listed.keys() - disk) == [], "the tree in docs/structure.md has these, the disk has not"


def test_structure_document_gives_the_layers_checked_here() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    stated = {
        room.strip().removesuffix(".py"): int(layer)
        for layer, rooms in re.findall(r"^\| (\d) \| ([^|]+) \|", text, re.MULTILINE)
        for room in rooms.replace("`", "").split(",")
    }
    assert stated == LAYERS


HEADING = re.compile(r"^(#+) ", re.MULTILINE)
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_readmes_go_in_step() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert CODE.findall(english) == CODE.findall(chinese), "code blocks are the same in both"
    outlines = [HEADING.findall(CODE.sub("", text)) for text in (english, chinese)]
    assert outlines[0] == outlines[1], "headings are the same in number and level"
    for mark in ("<!-- results -->", "<!-- /results -->"):
        assert english.count(mark) == chinese.count(mark) == 1
    assert english.count("\n| ") == chinese.count("\n| "), "tables have the same rows"


def test_links_between_documents_lead_somewhere() -> None:
    problems = []
    for path in documents():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", CODE.sub("", path.read_text(encoding="utf-8"))):
                if not (path.parent / target).exists():
                    problems.append(f"{where(path)} -> {target}")
    report(problems, "mend the link")


def test_make_targets_named_in_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    problems = []
    for path in [ROOT / ".ci" / "run", *(document for document in documents() if document.suffix == ".md")]:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if target not in targets:
                problems.append(f"{where(path)}: make {target}")
    report(problems, "no such target in the Makefile")
