"""Process groups: nothing happens on one process, and a wrong environment is one clear error."""

from __future__ import annotations

import pytest
import torch

from twofold.base import dist
from twofold.base.dist import ALONE, Ranks
from twofold.base.records import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_has_no_group_and_every_helper_is_the_identity(
    size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with dist.session() as ranks:
        assert ranks == ALONE == dist.world() == Ranks(0, 1)
        assert not torch.distributed.is_initialized()
        tensor = torch.arange(6.0).view(2, 3)
        assert ranks.sum(tensor) is tensor and ranks.max(tensor) is tensor
        assert dist.local(tensor) is tensor and dist.whole(tensor) is tensor
        assert dist.piece(tensor, torch.zeros(2, 3)) is tensor and dist.copies(tensor) == 1
        target = torch.zeros(2, 3, requires_grad=True)
        dist.fill(target, tensor)
        assert torch.equal(target.detach(), tensor)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set; start with torchrun --nproc-per-node 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is outside a WORLD_SIZE of 2"),
        ({"WORLD_SIZE": "2", "RANK": "a"}, "RANK='a' and WORLD_SIZE='2' must be whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "http"}, "did not meet at 127.0.0.1:http"),
    ],
)
def test_a_wrong_environment_is_named(given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "is not set" not in words:
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | given
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words), dist.session():
        pass
    assert not torch.distributed.is_initialized()


def test_a_rank_that_nobody_meets_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "TIMEOUT", dist.timedelta(seconds=1))
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"did not meet at 127.0.0.1:9 .*; start all with torchrun"), dist.session():
        pass


def test_a_mesh_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="a=2, b=3 needs 6 processes, 1 run"):
        dist.mesh((2, 3), ("a", "b"))
