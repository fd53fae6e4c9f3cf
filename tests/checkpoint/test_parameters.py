"""Which Hugging Face rows make which Megatron rows, whole and in parts of any size."""

from __future__ import annotations

import pytest
import torch

from megatron_amopo.checkpoint.parameters import Parameter, Part, Rows

WHOLE = 10**9
GROUPS, QUERY_HEADS, HEAD = 2, 4, 8


def qkv(*columns: int, layers: int | None = 3) -> Parameter:
    rows = {"q": GROUPS * QUERY_HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
    pieces = tuple((f"layers.{{layer}}.{letter}", (rows[letter], *columns)) for letter in "qkv")
    return Parameter("linear_qkv", layers, pieces, blocks=GROUPS, padded=False)


def fc1(layers: int | None = 3) -> Parameter:
    pieces = tuple((f"layers.{{layer}}.{half}", (96, 64)) for half in ("gate", "up"))
    return Parameter("linear_fc1", layers, pieces, blocks=1, padded=False)


def random_pieces(parameter: Parameter) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(shape)
        for layer in parameter.layer_numbers
        for name, (_, shape) in zip(parameter.hf_names(layer), parameter.pieces, strict=True)
    }


def joined(parameter: Parameter, pieces: dict[str, torch.Tensor], most_numbers: int) -> torch.Tensor:
    """The stored tensor [L, …] put together from its parts."""
    whole = torch.full(parameter.stored_shape, float("nan"))
    for part in parameter.parts(most_numbers):
        rows = part.join([pieces[r.name][r.first : r.first + r.count] for r in part.pieces])
        assert rows.shape == part.shape
        place = whole[part.layer, part.first_row : part.first_row + part.shape[0]]
        assert place.isnan().all()
        place.copy_(rows)
    assert not whole.isnan().any()
    return whole


@pytest.mark.parametrize("columns", [(64,), ()], ids=["weight", "bias"])
def test_qkv_rows_against_a_plain_reference(columns: tuple[int, ...]) -> None:
    """For each group: its four query heads, its key head, its value head, eight rows each."""
    parameter = qkv(*columns, layers=1)
    pieces = random_pieces(parameter)
    q, k, v = (pieces[f"layers.0.{letter}"] for letter in "qkv")
    rows = []
    for group in range(GROUPS):
        for head in range(QUERY_HEADS):
            for row in range(HEAD):
                rows.append(q[(group * QUERY_HEADS + head) * HEAD + row])
        rows += [k[group * HEAD + row] for row in range(HEAD)]
        rows += [v[group * HEAD + row] for row in range(HEAD)]
    assert torch.equal(joined(parameter, pieces, WHOLE)[0], torch.stack(rows))


def test_gate_stands_before_up_in_parts_of_their_own() -> None:
    gate, up = torch.randn(96, 64), torch.randn(96, 64)
    parameter = fc1(layers=1)
    assert torch.equal(joined(parameter, {"layers.0.gate": gate, "layers.0.up": up}, WHOLE)[0], torch.cat([gate, up]))
    assert [part.pieces for part in parameter.parts(WHOLE)] == [
        (Rows("layers.0.gate", 0, 96),),
        (Rows("layers.0.up", 0, 96),),
    ]


@pytest.mark.parametrize("parameter", [qkv(64), qkv(), fc1()], ids=["qkv", "bias", "fc1"])
@pytest.mark.parametrize("most_numbers", [1, 700, 3000, WHOLE])
def test_parts_of_any_size_make_the_same(parameter: Parameter, most_numbers: int) -> None:
    pieces = random_pieces(parameter)
    whole = joined(parameter, pieces, most_numbers)
    assert torch.equal(whole, joined(parameter, pieces, WHOLE))
    parts = list(parameter.parts(most_numbers))
    unit = 48 * 64 if parameter.blocks > 1 and len(parameter.shape) == 2 else 64
    assert max(part.numbers for part in parts) <= max(most_numbers, unit)
    for part in parts:
        rows = whole[part.layer, part.first_row : part.first_row + part.shape[0]]
        for r, back in zip(part.pieces, part.split(rows), strict=True):
            assert back.is_contiguous()
            assert torch.equal(back, pieces[r.name][r.first : r.first + r.count])


def test_parts_are_as_large_as_they_may_be() -> None:
    """96 rows of 64 numbers, at most 700 numbers: ten rows at a time."""
    heights = [part.shape[0] for part in fc1(layers=1).parts(700)]
    assert heights == 2 * ([10] * 9 + [6])


def test_one_query_group_needs_no_interleaving() -> None:
    """Multi-query attention: query, key and value follow one another."""
    pieces = (("q", (32, 4)), ("k", (8, 4)), ("v", (8, 4)))
    parameter = Parameter("linear_qkv", None, pieces, blocks=1, padded=False)
    assert list(parameter.parts(WHOLE)) == [
        Part(parameter, None, 0, 32, (Rows("q", 0, 32),)),
        Part(parameter, None, 32, 8, (Rows("k", 0, 8),)),
        Part(parameter, None, 40, 8, (Rows("v", 0, 8),)),
    ]
