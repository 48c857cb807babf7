"""Names instead of paths, against a small server that answers the hub's API and its files as the real one does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import constants

from twofold.base.gguf_file import name_of
from twofold.base.hub import checkpoint_name, hub_name, local
from twofold.base.records import InputError

OLD, NEW = "a" * 40, "b" * 40  # commits of the model
WEIGHTS = bytes(range(256)) * 4096
USED = {
    name: f'{{"": "{name}"}}'.encode()
    for name in ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "model.safetensors.index.json")
} | {"model-00001-of-00001.safetensors": WEIGHTS}
UNUSED = dict.fromkeys(
    ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "onnx/config.json", "figure.png"),
    b"for others",
)
GGUFS = {"README.md": b"", "Small-Q8_0.gguf": b"GGUF" + bytes(9), "Small-Q4_0.gguf": b"GGUF"}


class Hub(ThreadingHTTPServer):
    """A stand-in of the hub. files: repository -> commit -> path -> content. cut: GETs of weights to break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        whole = USED | UNUSED
        self.files = {"Qwen/Small": {NEW: whole, OLD: whole | {"config.json": b'{"old": 1}'}}}
        self.files |= {"Qwen/Small-GGUF": {NEW: GGUFS}, "Qwen/Private": {NEW: whole}, "Qwen/Gated": {NEW: whole}}
        self.branches = {"main": NEW, "v1": OLD, "refs/pr/1": OLD}
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: set[str | None] = set()
        self.cut = 0

    def fetched(self) -> set[str]:
        """Paths of the files whose content was asked for."""
        return {p.split("/resolve/")[1].split("/", 1)[1] for m, p, _ in self.seen if m == "GET" and "/resolve/" in p}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0].replace("%2F", "/")
        token = self.headers.get("Authorization")
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        self.server.tokens.add(token)
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/(.+))?", path)
        repo, kind, rest = match.groups() if match else ("", None, None)
        commits = self.server.files.get(repo)
        if commits is None or (repo == "Qwen/Private" and token != "Bearer hf_right"):
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
        if repo == "Qwen/Gated" and kind != "revision":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        revision, _, file = (rest or "main").partition("/") if kind == "resolve" else (rest or "main", "", "")
        commit = self.server.branches.get(revision, revision)
        if commit not in commits:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if kind == "tree":
            blobs = [{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in commits[commit].items()]
            return self.send(200, json.dumps(blobs).encode())
        if kind != "resolve":
            about = {"id": repo, "sha": commit, "siblings": [{"rfilename": p} for p in commits[commit]]}
            return self.send(200, json.dumps(about).encode())
        if file not in commits[commit]:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self.send_file(commits[commit][file], commit)

    def send_file(self, content: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        broken = self.command == "GET" and content == WEIGHTS and self.server.cut > 0
        self.server.cut -= broken
        self.send(206 if start else 200, content[start:], headers, half=broken)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, half: bool = False) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = half


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, an empty cache, no token, and an empty folder to stand in."""
    running.seen.clear()
    running.tokens.clear()
    monkeypatch.setattr(constants, "ENDPOINT", running.address)
    resolve = running.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "USE_MODELSCOPE_HUB", "VLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return running


def refusal(name: str) -> str:
    with pytest.raises(InputError) as caught:
        local(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_the_files_that_are_read_are_fetched(hub: Hub) -> None:
    folder = local("Qwen/Small", weights=False)
    assert hub.fetched() == {name for name in USED if "safetensors" not in name}
    assert local(Path("Qwen/Small")) == folder and hub.fetched() == USED.keys()
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == USED.keys()
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    hub.seen.clear()
    assert local("Qwen/Small") == folder and hub.fetched() == set(), "a second time nothing is fetched"
    assert hub_name(folder) == checkpoint_name(folder) == "Qwen/Small"


def test_revisions(hub: Hub) -> None:
    old = [local(f"Qwen/Small@{name}") for name in ("v1", "refs/pr/1", OLD)]
    assert old[0] == old[1] == old[2] != local("Qwen/Small@main") == local("Qwen/Small")
    assert (old[0] / "config.json").read_bytes() == b'{"old": 1}'
    assert "has no revision 'v9'; give a branch, a tag or a commit" in refusal("Qwen/Small@v9")


def test_what_lies_here_comes_first_and_paths_are_no_names(hub: Hub, tmp_path: Path) -> None:
    for name in ("Qwen/Small", "Qwen/Small@v1"):
        Path(name).mkdir(parents=True)
        assert local(name) == Path(name)
    for path in ("runs/tiny", "a/b/c", "./Qwen/Other", "../a/b", "gpt2", "Qwen/m.gguf", "a/data.json", tmp_path / "x"):
        assert local(path) == Path(path)
    assert hub.seen == []


def test_a_file_of_a_repository_of_gguf_files(hub: Hub) -> None:
    assert "has no .safetensors weights" in (said := refusal("Qwen/Small-GGUF")) and "Qwen/Small-GGUF/FILE.gguf" in said
    hub.seen.clear()
    path = local("Qwen/Small-GGUF/Small-Q8_0.gguf@main")
    assert path.read_bytes() == GGUFS["Small-Q8_0.gguf"] and hub.fetched() == {"Small-Q8_0.gguf"}
    assert name_of(path) == checkpoint_name(path) == "Small-Q8_0", "not the hash that the cache's link leads to"
    assert "has no file Small-Q9.gguf" in refusal("Qwen/Small-GGUF/Small-Q9.gguf")


def test_a_broken_download_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cut", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", len(WEIGHTS) // 8)
    folder = local("Qwen/Small")
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    ranges = {r for method, path, r in hub.seen if method == "GET" and path.endswith("00001.safetensors")}
    assert ranges == {None, f"bytes={len(WEIGHTS) // 2}-"}


def test_tokens_and_models_that_one_may_not_see(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Qwen/Private", "Qwen/Smal"):
        assert f"{name} does not exist here, and {name} is no model at {hub.address}" in (said := refusal(name))
        assert "HF_TOKEN" in said
    assert f"asks for consent: give it at {hub.address}/Qwen/Gated" in refusal("Qwen/Gated")
    assert hub.tokens == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert (local("Qwen/Private") / "config.json").is_file()
    assert "is no name of a model" in refusal("Qwen/a--b")


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refusal("Qwen/Small")
    assert "Qwen/Small does not exist here" in said and constants.HF_HUB_CACHE in said and "HF_HUB_OFFLINE" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    text_alone = local("Qwen/Small", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert local("Qwen/Small", weights=False) == text_alone
    assert refusal("Qwen/Small") and hub.seen == [], "without the weights the copy is not whole"


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local("Qwen/Small")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert local("Qwen/Small") == folder, "the copy is used"
    assert "http://127.0.0.1:9 cannot be reached" in refusal("Qwen/Other")


def test_the_environment_is_honoured_and_start_up_stays_light(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from twofold.base.hub import local; assert 'huggingface_hub' not in sys.modules; "
        "print(local('Qwen/Small@v1'))"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.address, "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "home" / "hub")) and OLD in done.stdout
    assert "Fetching" in done.stderr or "Downloading" in done.stderr, "progress"
    code = "import twofold.base.hub as hub; hub.local('Qwen/Other')"
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    failed = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    assert "HF_HUB_OFFLINE forbids a download" in failed.stderr.splitlines()[-1]


def test_modelscope_where_it_is_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "USE_MODELSCOPE_HUB asks for ModelScope" in (said := refusal("Qwen/Small@v1")) and "pip install" in said
    calls: list[tuple[str, dict[str, Any]]] = []
    folder = tmp_path / "modelscope" / "hub" / "models" / "Qwen" / "Small-0___6B"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()

    def snapshot_download(model: str, **options: Any) -> str:
        calls.append((model, options))
        if model == "Qwen/Other":
            raise ValueError("no such\nmodel")
        return str(folder)

    package = ModuleType("modelscope")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    assert local("Qwen/Small-0.6B") == folder and "revision" not in calls[-1][1]
    assert local("Qwen/Small-0.6B@v1") == folder and calls[-1][1]["revision"] == "v1"
    assert "*.safetensors" in calls[-1][1]["allow_patterns"] and calls[-1][1]["local_files_only"] is False
    assert hub_name(folder) == "Qwen/Small-0.6B"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "could not be fetched from ModelScope: no such model" in refusal("Qwen/Other")
    assert calls[-1][1]["local_files_only"] is True and hub.seen == []
