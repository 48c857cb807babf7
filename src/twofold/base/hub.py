"""Names instead of paths: a model of the Hugging Face hub, or of ModelScope, as a local folder.

What lies on the disk is taken as it is. A name that does not, OWNER/MODEL[@REVISION], is fetched by ``huggingface_hub``
into its cache: only the files that are read here, resumed where a download broke off, with bars on stderr. That library
honours HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and a stored token. Where USE_MODELSCOPE_HUB or
VLLM_USE_MODELSCOPE is set the package ``modelscope`` does the same. A file of a repository of GGUF files is
OWNER/MODEL/FILE.gguf[@REVISION]. Neither package is imported before a name has to be fetched. Not here: what the files
mean.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from twofold.base.gguf_file import name_of
from twofold.base.records import InputError

_NAME = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>[\w./ -]+\.gguf))?(?:@(?P<revision>[^\s@]+))?", re.ASCII
)
_FILES = (".gguf", ".safetensors", ".bin", ".json", ".jsonl", ".txt")  # endings of files, never of models
_RUNS = "runs/"  # where recipes write: a missing folder there is a run that was not made, and nobody's model
_MODELSCOPE = ("USE_MODELSCOPE_HUB", "VLLM_USE_MODELSCOPE")
# Files that are read here, at the top of a repository; not the same weights for other programs.
_TEXT = (
    "config.json", "generation_config.json", "about.json", "chat_policy.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "*.tiktoken", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_OTHERS = ("*/*", "consolidated*")
_CACHED = re.compile(
    r"/models--(?P<hf_owner>[^/]+?)--(?P<hf_model>[^/]+)/snapshots/[^/]+$"
    r"|/modelscope/hub/(?:models/)?(?P<ms_owner>[^/]+)/(?P<ms_model>[^/]+(?<!\.gguf))$"
)


@dataclass(frozen=True, slots=True)
class _Name:
    """A model by name. given: as it was written. file: the one .gguf file that is meant. revision: None: the newest."""

    given: str
    repo: str
    file: str | None
    revision: str | None

    def patterns(self, weights: bool) -> tuple[list[str], list[str]]:
        """Patterns of the files to fetch, and of those to leave out all the same."""
        if self.file is not None:
            return [self.file], []
        return [*_TEXT, *(_WEIGHTS if weights else ())], list(_OTHERS)

    def place(self, folder: str) -> Path:
        """What was asked for inside the downloaded folder."""
        return Path(folder, self.file) if self.file is not None else Path(folder)


def local(model: str | Path, weights: bool = True) -> Path:
    """The file or folder that is meant; a name of the hub is fetched first where no such path exists.

    Args:
        model: a path, or OWNER/MODEL[@REVISION], or OWNER/MODEL/FILE.gguf[@REVISION]. weights: fetch them too; without
            them there are configuration, tokenizer and chat template.

    Returns:
        the path itself, also where there is nothing and it cannot be a name; else a folder or file of the hub's cache.

    Raises:
        InputError: no such model or revision, no right to it, no copy while offline, or a download that failed.
    """
    path = Path(model)
    name = None if os.path.exists(path) else _name(str(model))
    if name is None:
        return path
    found = _from_modelscope(name, weights) if _uses_modelscope() else _from_hugging_face(name, weights)
    if name.file is not None and not found.exists():
        raise InputError(f"{name.repo} has no file {name.file}; look for its files on the model's page")
    if weights and name.file is None and not any(found.glob("*.safetensors")):
        raise InputError(
            f"{name.repo} has no .safetensors weights; choose a model that has, or name one of its GGUF files: "
            f"{name.repo}/FILE.gguf"
        )
    return found


def hub_name(path: Path) -> str | None:
    """OWNER/MODEL of a folder that lies in the cache of the hub or of ModelScope; None for any other path."""
    if match := _CACHED.search(path.absolute().as_posix()):
        owner, model = match.group("hf_owner", "hf_model") if match["hf_owner"] else match.group("ms_owner", "ms_model")
        return f"{owner}/{model.replace('___', '.')}"  # ModelScope writes a dot so
    return None


def checkpoint_name(path: Path) -> str:
    """What a checkpoint calls itself: its name on the hub it came from, or else that of its file or folder."""
    return hub_name(path) or name_of(path)


def _name(text: str) -> _Name | None:
    """A name of the hub, None for what can only be a path."""
    text = text.replace(os.sep, "/")
    match = _NAME.fullmatch(text)
    if match is None or text.startswith(_RUNS) or match["repo"].lower().endswith(_FILES):
        return None
    return _Name(text, match["repo"], match["file"], match["revision"])


def _uses_modelscope() -> bool:
    return any(map(_is_set, _MODELSCOPE))


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _from_hugging_face(name: _Name, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download, utils

    wanted, others = name.patterns(weights)
    site = constants.ENDPOINT
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        return name.place(
            snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted, ignore_patterns=others)
        )
    except utils.GatedRepoError:
        raise InputError(f"{name.repo} asks for consent: give it at {site}/{name.repo}, then {login}") from None
    except utils.RepositoryNotFoundError:
        raise InputError(
            f"{name.given} does not exist here, and {name.repo} is no model at {site} that you may see; check the "
            f"spelling or, if it is private, {login}"
        ) from None
    except utils.RevisionNotFoundError:
        raise InputError(f"{name.repo} has no revision {name.revision!r}; give a branch, a tag or a commit") from None
    except utils.HFValidationError as error:
        raise InputError(f"{name.given} does not exist, and is no name of a model: {_line(error)}") from None
    except utils.LocalEntryNotFoundError as error:
        nowhere = f"{name.given} does not exist here, and there is no whole copy in {constants.HF_HUB_CACHE}"
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{nowhere}; HF_HUB_OFFLINE forbids a download, unset it to fetch the model") from None
        raise InputError(f"{nowhere}; {site} cannot be reached or refuses: {_line(error)}") from None
    except Exception as error:  # of the network libraries, which change from version to version, and of the disk
        raise InputError(_broken(name, site, error)) from error


def _from_modelscope(name: _Name, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        setting = next(filter(_is_set, _MODELSCOPE))
        raise InputError(
            f"{setting} asks for ModelScope, which needs its package: pip install modelscope; or unset it"
        ) from None
    wanted, others = name.patterns(weights)
    offline = _is_set("HF_HUB_OFFLINE")
    revision = {} if name.revision is None else {"revision": name.revision}
    try:
        folder = snapshot_download(
            name.repo, allow_patterns=wanted, ignore_patterns=others, local_files_only=offline, **revision
        )
    except Exception as error:  # it has no common base for what can go wrong
        raise InputError(_broken(name, "ModelScope", error)) from error
    return name.place(folder)


def _broken(name: _Name, site: str, error: Exception) -> str:
    return (
        f"{name.repo} could not be fetched from {site}: {_line(error)}; the same command goes on where the download "
        "broke off"
    )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
