"""What comes before the blocks, filled with the rows of a text's tokens alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bitfold.calibration.embedded import Filled
from bitfold.errors import ModelError


class Rows:
    """Tensors of a model, whole or by rows."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        return self.tensors[name][rows]


class Follower(nn.Module):
    """Sends its inputs to where the weights are, as Llama 4 does with token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8, padding_idx=3)
        self.norm = nn.LayerNorm(8)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor, norm: bool = False) -> Tensor:
        x: Tensor = self.embed(ids.to(self.embed.weight.device))
        return self.norm(x.to(self.norm.weight.device)) if norm else x


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_ids_may_follow_the_embedding(poisoned):
    weight = torch.randn(50, 8)
    ids = torch.tensor([[7, 3, 41, 7]])
    with torch.device("meta"):
        model = Follower()
    with Filled(model, Rows(embed__weight=weight), ids, skip="blocks."):
        for _ in range(2):
            assert torch.equal(model(ids), weight[ids])
    assert model.embed.weight.is_meta
    assert model.embed.padding_idx == 3


def test_values_that_were_left_behind_are_an_error(poisoned):
    ids = torch.tensor([[1, 2]])
    with torch.device("meta"):
        model = Follower()
    source = Rows(embed__weight=torch.randn(50, 8), norm__weight=torch.ones(8), norm__bias=torch.zeros(8))
    with Filled(model, source, ids, skip="blocks."), pytest.raises(ModelError, match="without values"):
        model(ids, norm=True)
