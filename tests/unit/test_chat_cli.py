"""The chat in the terminal, with piped lines: a real tiny model, and written replies for what must be shown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from twofold import chat_cli, cli
from twofold.base.files import write_json, write_text
from twofold.base.records import InputError, Message, Request, ToolCall
from twofold.chat_cli import Chat, is_command, note, sampling_from
from twofold.chat_view import Input, call_text, history_file
from twofold.llm import LLM
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.recipes.models import find_model
from twofold.recipes.pretrain import save_model
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer

END = "<|im_end|>"
THOUGHT = f"<think>\n E0+1=1\n</think>\n\n6{END}"
CALL = '<tool_call>\n{"name": "calc", "arguments": {"expression": "37*48"}}\n</tool_call>' + END


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["sum mod 10: E1 B5 user assistant calc 37*48 0123456789 /think /no_think"] * 4, 330)


@pytest.fixture(scope="module")
def run_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = Qwen3(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            max_position_embeddings=160,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
    )
    model.init_weights(0)
    for stage in ("cold_start", "fusion"):
        save_model(model, tokenizer, folder / stage)
    return folder


def invoke(folder: Path, lines: list[str], *options: str) -> Result:
    return CliRunner().invoke(cli.app, ["chat", str(folder), *options], input="".join(line + "\n" for line in lines))


class ScriptedEngine:
    """Streams written turns token by token; a turn None is Ctrl-C after two tokens."""

    def __init__(self, tokenizer: Tokenizer, turns: list[str | None], forced: str = "") -> None:
        self.tokenizer, self.turns, self.forced = tokenizer, turns, set(tokenizer.encode_with_special(forced))
        self.requests: list[Request] = []
        self.closed = 0

    def stream(self, request: Request) -> Iterator[tuple[int, bool]]:
        self.requests.append(request)
        turn = self.turns.pop(0)
        tokens = self.tokenizer.encode_with_special("<think>\n a b c" if turn is None else turn)
        try:
            for number, token in enumerate(tokens):
                if turn is None and number == 2:
                    raise KeyboardInterrupt
                yield token, token in self.forced
        finally:
            self.closed += 1


def scripted(tokenizer: Tokenizer, engine: Any, context: int = 2000) -> LLM:
    """An LLM that is real but for its engine."""
    llm = LLM.__new__(LLM)
    config = ModelConfig.model_construct(max_position_embeddings=context, vocab_size=tokenizer.vocab_size, context=None)
    object.__setattr__(config, "num_parameters", lambda: 1234)
    llm.path, llm.engine, llm._tokenizer = Path("scripted"), engine, tokenizer
    llm._renderer, llm._generation = Renderer(tokenizer), {}
    llm.model = SimpleNamespace(config=config)  # type: ignore[assignment]
    return llm


@pytest.fixture
def talk(
    tokenizer: Tokenizer, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, ScriptedEngine]]:
    """(lines, turns, *options) -> output and engine, with written replies."""

    def run(
        lines: list[str], turns: list[str | None], *options: str, forced: str = "", context: int = 2000
    ) -> tuple[str, ScriptedEngine]:
        engine = ScriptedEngine(tokenizer, turns, forced)
        policy = scripted(tokenizer, engine, context)
        monkeypatch.setattr(chat_cli, "LLM", lambda folder, **_: policy)
        result = invoke(run_folder, lines, *options)
        assert result.exit_code == 0, result.output
        return result.output, engine

    return run


def asked(engine: ScriptedEngine, number: int = -1) -> str:
    return engine.tokenizer.decode(engine.requests[number].prompt_ids)


def test_a_real_model_answers_and_the_seed_decides(run_folder: Path) -> None:
    first, again, other = (
        invoke(run_folder, ["hi", "", "again"], "--set", "max_tokens=12", "--set", f"seed={seed}", "--budget", "3")
        for seed in ("1", "1", "2")
    )
    assert first.exit_code == 0, first.output
    speed = re.compile(r"\d+ tok/s")
    assert speed.sub("", first.output) == speed.sub("", again.output) != speed.sub("", other.output)
    assert len(speed.findall(first.output)) == 2 and "fusion, " in first.output
    assert first.output.count("you> ") == 2 and chat_cli.NO_NOTE in first.output


def test_an_unknown_template_is_refused_before_the_first_prompt(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "cold_start", folder)
    (folder / "chat_policy.json").unlink()
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    refused = invoke(folder, ["hi"])
    assert refused.exit_code == 1 and "--family NAME" in refused.output and "you>" not in refused.output
    assert "use one of hybrid" in invoke(folder, ["hi"], "--family", "llama").output
    told = invoke(folder, ["hi"], "--family", "chatml", "--set", "max_tokens=3")
    assert told.exit_code == 0 and "3 tokens" in told.output


def test_greedy_on_a_model_folder(run_folder: Path) -> None:
    result = invoke(run_folder / "cold_start", ["hi"], "--set", "temperature=0", "--set", "max_tokens=5", "--no-think")
    assert result.exit_code == 0 and re.search(r"\d tokens, 0 thinking", result.output)


def test_thinking_is_apart_from_the_answer(talk: Any) -> None:
    output, engine = talk(["sum mod 10: E1 B5"], [THOUGHT])
    assert re.search(r"thinking ─+\n E0\+1=1\n─+\n6\n\d+ tokens, \d+ thinking · \d+ tok/s\n", output)
    thinking = int(re.search(r"(\d+) thinking", output).group(1))  # type: ignore[union-attr]
    assert thinking == len(engine.tokenizer.encode("\n E0+1=1\n"))
    assert asked(engine) == f"<|im_start|>user\nsum mod 10: E1 B5{END}\n<|im_start|>assistant\n"


def test_replies_without_thinking_have_no_rule(talk: Any) -> None:
    output, engine = talk(["a", "b /no_think"], [f"5{END}", f"<think>\n\n</think>\n\n7{END}"], "--no-think")
    assert "─" not in output and "\n5\n" in output and "\n7\n" in output
    assert all(asked(engine, i).endswith("<think>\n\n</think>\n\n") for i in (0, 1))


def test_the_conversation_goes_on_without_old_thoughts(talk: Any) -> None:
    _, engine = talk(["one", "/think two"], [THOUGHT, f"7{END}"], "--system", "be short")
    assert asked(engine) == (
        f"<|im_start|>system\nbe short{END}\n<|im_start|>user\none{END}\n<|im_start|>assistant\n6{END}\n"
        f"<|im_start|>user\n/think two{END}\n<|im_start|>assistant\n"
    )
    assert [r.params.seed for r in engine.requests] == [0, 1]


def test_commands(talk: Any) -> None:
    lines = [
        "one",
        "/system new rules",
        "/budget 7",
        "two",
        "/reset",
        "/budget off",
        "three",
        "/system",
        "four",
        "/quit",
        "x",
    ]
    output, engine = talk(lines, [f"{n}{END}" for n in range(4)])
    assert [r.params.thinking_budget for r in engine.requests] == [None, 7, None, None]
    assert asked(engine, 1).startswith(f"<|im_start|>system\nnew rules{END}\n<|im_start|>user\none{END}")
    assert "one" not in asked(engine, 2) and "new rules" in asked(engine, 2)
    assert "new rules" not in asked(engine, 3) and "three" in asked(engine, 3)
    assert "thinking budget: 7" in output and "a new conversation" in output and "you> x" not in output


def test_mistakes_are_one_line_and_the_chat_goes_on(talk: Any) -> None:
    output, engine = talk(
        ["/bugdet 3", "/budget x", "/set top_p=7", "/set heat=1", "/thoughts off", "/help", "hi"], [f"5{END}"]
    )
    assert "error: unknown command /bugdet; /help lists them" in output
    assert "error: /budget takes a number of tokens or off, got 'x'" in output
    assert "error: top_p must be in (0, 1], got 7" in output and "/reset        forget" in output
    assert "error: sampling is set as KEY=VALUE, got 'heat=1'; there are temperature" in output
    assert "error: /thoughts takes fold, show or nothing, got 'off'" in output
    assert engine.requests[0].params.thinking_budget is None and engine.requests[0].params.top_p != 7


def test_control_c_stops_the_reply_and_keeps_the_chat(talk: Any) -> None:
    output, engine = talk(["one", "two"], [None, f"5{END}"])
    assert "stopped; this exchange is not kept" in output and "\n5\n" in output and "one" not in asked(engine)
    assert engine.closed == 2  # the engine was told


def test_what_is_out_of_the_ordinary_is_said(talk: Any) -> None:
    stop = "\n</think>\n\n"
    output, _ = talk(["a", "b", "c"], [f"<think>\n a{stop}6{END}", "6", f"6</think>{END}"], forced=stop)
    assert "budget spent, the stop text was forced" in output
    assert "cut off: max_tokens or the context is used up" in output
    assert "</think> without an open think block" in output


def test_tools_run_and_their_results_are_appended(talk: Any) -> None:
    output, engine = talk(["calc 37*48"], [CALL, f"1776{END}"], "--tools", "calc")
    assert 'calls calc(expression="37*48")\n' in output and "result 1776\n" in output and "\n1776\n" in output
    first, second = (list(r.prompt_ids) for r in engine.requests)
    assert second[: len(first)] == first and "<tool_response>\n1776\n</tool_response>" in asked(engine)
    assert '"name": "calc"' in asked(engine, 0)


def test_calls_that_are_not_run_are_not_kept(talk: Any) -> None:
    output, engine = talk(["a", "b"], [CALL, f"5{END}"])
    assert "the call was not run: start with --tools calc" in output and "<tool_call>" not in asked(engine)
    output, _ = talk(["a"], [CALL] * 3, "--tools", "calc")
    assert "the call was not run: too many" in output and output.count("result 1776") == 2


def test_a_full_context_is_an_error_that_names_the_way_out(talk: Any) -> None:
    output, engine = talk(["hi", "0" * 250, "there"], [f"5{END}", f"6{END}"], context=200)
    assert re.search(
        r"error: the conversation has \d+ tokens and this model's maximum context length is 200 tokens; /reset", output
    )
    assert len(engine.requests) == 2 and "000" not in asked(engine)
    assert engine.requests[0].params.max_tokens == 200 - len(engine.requests[0].prompt_ids)


def test_a_reply_cannot_steer_the_terminal_or_the_markup(talk: Any) -> None:
    output, _ = talk(["\x1b[2Jhi"], [f"\x1b[31m[bold]x[/bold] :smile:\x07{END}"])
    assert "\x1b" not in output and "\x07" not in output and "[bold]x[/bold] :smile:" in output
    assert call_text(ToolCall("a\n\ud800", {"x\x1b": ["\ud800"]})) == r'a\n\ud800(x\u001b=["\ud800"])'


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tools", "shell"], 1, "unknown tool 'shell'; there is: calc"),
        (["--budget", "-1"], 2, "--budget"),
        (["--set", "max_tokens=0"], 1, "max_tokens must be >= 1"),
        (["--set", "heat=1"], 1, "there are temperature"),
    ],
)
def test_bad_options(options: list[str], code: int, words: str, run_folder: Path) -> None:
    result = invoke(run_folder, [], *options)
    assert result.exit_code == code and words in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)


def test_folders(run_folder: Path, tmp_path: Path) -> None:
    assert find_model(run_folder) == run_folder / "fusion"
    assert find_model(run_folder / "cold_start") == run_folder / "cold_start"
    for folder, words in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no model that can chat")):
        result = invoke(folder, [])
        line = result.stderr.strip()
        assert result.exit_code == 1 and line.startswith("error: ") and words in line and "twofold run tiny" in line
        assert "\n" not in line


def test_the_note_of_a_model_folder(tmp_path: Path) -> None:
    assert note(tmp_path) == [chat_cli.NO_NOTE]
    write_json(tmp_path / "about.json", {"can": ["sum mod 10: E1 B5 I6"], "cannot": "hold a general conversation"})
    lines = note(tmp_path)
    assert "  sum mod 10: E1 B5 I6" in lines and lines[-1] == "It cannot: hold a general conversation"
    for damaged in ("{", "[]", '{"can": 3}'):
        write_text(tmp_path / "about.json", damaged)
        assert "is damaged" in note(tmp_path)[-1]


def test_what_counts_as_a_command() -> None:
    assert [is_command(s) for s in ("/reset", "  /x y", "/think a", "/no_think", "a /reset", "/thinking")] == [
        True, True, False, False, False, True,
    ]  # fmt: skip


def test_a_chat_can_be_driven_from_python(tokenizer: Tokenizer) -> None:
    engine: Any = ScriptedEngine(tokenizer, [THOUGHT])
    chat = Chat(scripted(tokenizer, engine, 99), chat_cli.Console(quiet=True), {})
    chat.respond("sum")
    assert chat.messages == [Message("user", "sum"), Message("assistant", "6", " E0+1=1")]
    assert chat.command("/set") == "nothing is set" and chat.command("/set top_k=3") == "top_k=3"
    assert (engine.requests[0].params.temperature, engine.requests[0].params.top_p) == (0.6, 0.95)


def test_as_a_process_with_bytes_that_are_not_text(run_folder: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-m", "twofold.cli", "chat", str(run_folder), "--set", "max_tokens=3"]
    done = subprocess.run(command, input=b"hi\n\xff\xfe\n", capture_output=True, env=environment, check=False)
    assert done.returncode == 1 and b"the input is not UTF-8 text" in done.stderr and b"Traceback" not in done.stderr


def test_thoughts_can_be_folded_and_shown_afterwards(talk: Any) -> None:
    lines = ["/thoughts", "/thoughts fold", "one", "/thoughts", "/thoughts show", "two"]
    output, _ = talk(lines, [THOUGHT, THOUGHT])
    folded, shown = output.split("you> /thoughts show")
    assert "there was no thought" in folded and "─" not in folded
    assert re.search(r"you> one\nthought for \d+\.\d s; /thoughts shows it\n6\n", folded)
    assert "you> /thoughts\n E0+1=1\n" in folded and "thinking ─" in shown


def test_messages_of_several_lines(talk: Any) -> None:
    output, engine = talk(["a\\", "b\\", "c", '"""d', "", "/quit", 'e"""'], [f"5{END}", f"6{END}"])
    assert "user\na\nb\nc<|im_end|>" in asked(engine, 0) and "user\nd\n\n/quit\ne<|im_end|>" in asked(engine, 1)
    assert "...> b" in output
    output, engine = talk(["a\\"], [f"5{END}"])
    assert "user\na<|im_end|>" in asked(engine)  # the input ended instead


def test_a_block_that_does_not_end_is_an_error(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(['"""a', "b"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, None) or (_ for _ in ()).throw(EOFError))
    with pytest.raises(InputError, match="ended inside a block"):
        Input(chat_cli.Console(quiet=True)).read()


def test_sampling_can_be_set_and_a_stop_string_ends_the_reply(talk: Any) -> None:
    lines = ["/set", "/set temperature=0", "/set stop=B", "/set", "one", "/set stop=null", "two"]
    output, engine = talk(lines, [f"A 5 B 6{END}", f"B{END}"])
    first, second = (request.params for request in engine.requests)
    assert first.temperature == 0 and first.stop == ("B",) and second.stop == ()
    assert "temperature=0" in output and "stop=('B',)" in output
    assert "\nA 5 \n" in output and "B 6" not in output
    assert sampling_from(["max_tokens=5", "stop_token_ids=[1, 2]", "stop=[\"x\"]"]) == {
        "max_tokens": 5, "stop_token_ids": (1, 2), "stop": ("x",),
    }  # fmt: skip


def test_what_is_not_set_follows_the_mode(talk: Any) -> None:
    _, engine = talk(["one"], [f"5{END}"], "--no-think")
    assert asked(engine).endswith("</think>\n\n")


def test_the_history_is_kept_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    lines = Input(chat_cli.Console(quiet=True))
    lines.close()
    assert history_file() == tmp_path / "twofold" / "chat_history"
    assert history_file().stat().st_mode & 0o777 == 0o600
    history_file().unlink()
    Input(chat_cli.Console(quiet=True), history=False).close()
    assert not history_file().exists()
