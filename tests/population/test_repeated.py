"""Repeated calls: equal to those of ``each``, to the bit, at less cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forwards import Several, population
from helpers import NEEDS_COMPILER, network
from torch import Tensor, nn

from eggroll_trainer.population import forward


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 5)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return state.sum(-1), state


@NEEDS_COMPILER
class TestRepeated:
    @pytest.mark.parametrize("compile", [False, True])
    def test_calls_are_those_of_each_to_the_bit(self, compile: bool, eager_backend: list[Any]) -> None:
        members = population(Recurrent(), 6, compile=compile)
        xs = torch.randn(5, 6, 3, 4)
        state = expected_state = torch.zeros(6, 3, 5)
        with members.repeated() as each:
            for x in xs:
                y, state = each(x, state)
                expected, expected_state = members.each(x, expected_state)
                assert torch.equal(y, expected) and torch.equal(state, expected_state)

    @pytest.mark.parametrize("compile", [False, True])
    @pytest.mark.parametrize("chosen", [range(2, 5), (0, 3, 4), (5,), range(6)])
    def test_some_members(self, compile: bool, chosen: Any, eager_backend: list[Any]) -> None:
        members = population(Several().double(), 6, compile=compile)
        xs = torch.randn(3, 6, 5, 4, dtype=torch.float64)
        with members.repeated() as each:
            for x in xs:
                got, expected = each(x[list(chosen)], members=chosen), members.each(x)
                torch.testing.assert_close(got["y"], expected["y"][list(chosen)])
                torch.testing.assert_close(got["rest"][2][0], expected["rest"][2][0][list(chosen)])

    def test_only_the_graph_runs_again(self, eager_backend: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        members = population(network(), 6, compile=True)
        x, count = torch.randn(2, 6, 3, 4), []
        run = forward.Forwards.run
        monkeypatch.setattr(forward.Forwards, "run", lambda self, call: count.append(call) or run(self, call))  # type: ignore[func-returns-value]
        expected = members.each(x[1])
        with members.repeated() as each:
            count.clear()
            for _ in range(3):
                each(x[0])
            assert torch.equal(each(x[1]), expected) and len(count) == 1
            # Of another shape, and of other strides.
            each(x[0, :, :2])
            each(x.transpose(2, 3).contiguous()[0].mT)
            assert len(count) == 3
        with members.repeated() as each:
            each(x[0])
        # What a block knows is of that block alone.
        assert len(count) == 4

    def test_a_graph_that_fails_is_called_in_full(self, eager_backend: list[Any]) -> None:
        members = population(network(), 6, compile=True)
        x = torch.randn(6, 3, 4)
        with members.repeated() as each:
            expected = each(x)
            fails = [True]
            for graph in eager_backend:
                inner = graph.forward

                def forward_once(*args: Any, inner: Any = inner) -> Any:
                    if fails.pop() if fails else False:
                        raise RuntimeError("not enough")
                    return inner(*args)

                graph.forward = forward_once
            assert torch.equal(each(x), expected)

    def test_another_number_of_inputs(self) -> None:
        with (
            pytest.raises(ValueError, match=r"one input for each of 2 members, got shape \[6, 3, 4\]"),
            population(network(), 6).repeated() as each,
        ):
            each(torch.randn(6, 3, 4), members=range(2))

    @pytest.mark.parametrize("compile", [False, True])
    def test_a_change_of_the_model_is_reported_and_undone(self, compile: bool, eager_backend: list[Any]) -> None:
        members = population(Several(), 6, compile=compile)
        x = torch.randn(6, 3, 4)
        with pytest.raises(ValueError, match="changes buffer offset"), members.repeated() as each:
            each(x)
            members.model.get_buffer("offset").add_(1)
            each(x)
        assert torch.equal(members.model.get_buffer("offset"), torch.arange(3.0))

    def test_models_that_are_not_batched(self) -> None:
        class Branches(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum() > 0 else -super().forward(x)

        members = population(Branches(4, 3), 6)
        x = torch.randn(6, 3, 4).abs() * torch.tensor([1.0, -1.0] * 3)[:, None, None]
        with members.repeated() as each:
            with pytest.warns(RuntimeWarning, match="not batched"):
                first = each(x[:2], members=(4, 1))
            assert torch.equal(each(x[:2], members=(4, 1)), first)
        torch.testing.assert_close(first[0], members.member(4)(x[0]))
        torch.testing.assert_close(first[1], members.member(1)(x[1]))
