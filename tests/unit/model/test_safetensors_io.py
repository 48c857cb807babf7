"""Safetensors files: the same bytes as the library writes, read into given memory, and damage named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from twofold.base.records import InputError
from twofold.model import safetensors_io

Shapes = list[tuple[str, torch.dtype, list[int]]]
SHAPES = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=6),
        st.sampled_from(list(safetensors_io.NAMES)),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    max_size=6,
    unique_by=lambda item: item[0],
)


def tensors_of(shapes: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, dtype, shape in shapes}


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "x.safetensors"


@given(SHAPES)
def test_bytes_are_the_librarys(scratch: Path, shapes: Shapes) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(shapes).items() if name != "__metadata__"}
    safetensors_io.write(scratch, tensors)
    assert scratch.read_bytes() == save(tensors, metadata={"format": "pt"})


@given(SHAPES, st.sampled_from(list(safetensors_io.NAMES)), st.sampled_from([8, 1 << 24]))
def test_reading_fills_given_memory_in_its_type(scratch: Path, shapes: Shapes, dtype: torch.dtype, chunk: int) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(shapes).items() if name != "__metadata__"}
    safetensors_io.write(scratch, tensors)
    header = safetensors_io.read_header(scratch)
    assert header.keys() == tensors.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "CHUNK_BYTES", chunk)  # several chunks for a tensor of a few elements
        for name, entry in header.items():
            around = torch.full((entry_size := tensors[name].numel() + 2,), 7.0, dtype=dtype)
            safetensors_io.read_into(scratch, entry, around[1:-1].view(entry.shape))
            assert torch.equal(around[1:-1].view(entry.shape), tensors[name].to(dtype)), name
            assert around[0] == 7 and around[entry_size - 1] == 7, "neighbours are left alone"


def test_a_view_that_is_not_contiguous_is_written_right(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    safetensors_io.write(tmp_path / "x", {"a": tensor})
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)


def change_header(path: Path, change: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["b"].update(data_offsets=[20, 36]), "'b' does not begin where the one before ends"),
        (lambda h: h["b"].update(shape=[5]), "'b' is not as long as its shape says"),
        (lambda h: h["b"].update(data_offsets=[16, 20], shape=[1]), "12 bytes too many at its end"),
        (lambda h: h["b"].pop("dtype"), "does not describe tensors"),
        (lambda h: h.update(b=[]), "does not describe tensors"),
        (lambda h: h["b"].update(data_offsets=[16, "x"]), "does not describe tensors"),
        (lambda h: h["b"].update(data_offsets=[16, math.inf]), "does not describe tensors"),
    ],
)
def test_headers_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[dict], None], words: str) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_io.write(path, {"a": torch.zeros(4), "b": torch.zeros(4)})
    change_header(path, change)
    with pytest.raises(InputError, match=rf"^{path} is damaged: .*{words}.*; copy or download the file again$"):
        safetensors_io.read_header(path)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "no whole header in its 0 bytes"),
        (5, "no whole header"),
        (30, "no whole header"),
        (-3, "3 bytes are missing"),
    ],
)
def test_truncated_files_are_named(tmp_path: Path, keep: int, words: str) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_io.write(path, {"a": torch.zeros(4)})
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep >= 0 else len(data) + keep])
    with pytest.raises(InputError, match=rf"^{path} is damaged: .*{words}"):
        safetensors_io.read_header(path)
    with pytest.raises(InputError, match=r"nowhere cannot be read: No such file"):
        safetensors_io.read_header(tmp_path / "nowhere")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_io.write(path, {"a": torch.zeros(4)})
    entry = safetensors_io.read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="became shorter"):
        safetensors_io.read_into(path, entry, torch.empty(4))


def test_types_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float8_e4m3fn)}))
    with pytest.raises(InputError, match=r"tensor 'b' is stored as F8_E4M3; .* give the original checkpoint"):
        safetensors_io.check_dtypes(path, safetensors_io.read_header(path))
    with pytest.raises(InputError, match=r"tensor 'b' is torch.int8"):
        safetensors_io.write(path, {"b": torch.zeros(2, dtype=torch.int8)})
