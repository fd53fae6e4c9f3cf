"""How the parameters of Hugging Face and of Megatron correspond: names, shapes, and the order of rows.

One rule covers every parameter of a decoder. A Megatron tensor is made of one or several Hugging Face tensors, its
*pieces*. All are cut along their rows into the same number of *blocks*; Megatron's rows are block 0 of every piece,
then block 1 of every piece, and so on:

    linear_qkv  = q, k, v     blocks = query groups: [q heads of group 0, k 0, v 0, q heads of group 1, k 1, v 1, ...]
    linear_fc1  = gate, up    blocks = 1:            [gate, up]
    all others  = themselves  blocks = 1

Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is [L, H, F], as Megatron's `torch_dist` checkpoints hold it,
and the norms in front of linear_qkv and linear_fc1 carry the names that Transformer Engine's fused layers give them,
whichever layer specification runs.

A *part* is what is read, converted and written at a time: some rows of one layer's Megatron tensor. Pieces that merely
follow one another are cut apart, as Megatron itself stores gate and up; query, key and value are cut between groups.
So a part is as small as one wants, whatever the size of the model.

Which rules a model has is in `families.py`. Nothing here touches a file or a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_amopo.checkpoint.memory import empty


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor: its name, with `{layer}` where it repeats, and the dimension that its rows run over."""

    name: str
    rows: str


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the pieces that it is made of; dimensions by name, see `_dimensions`."""

    megatron: str
    pieces: tuple[Piece, ...]
    columns: str | None = None
    """Dimension of the columns; None for a vector."""
    blocks: str = "one"
    """Dimension that counts the blocks into which the rows of all pieces are cut."""
    untied_only: bool = False
    """Absent where the output layer is the embedding."""


@dataclass(frozen=True)
class Parameter:
    """A Rule with numbers: one parameter of one model."""

    megatron: str
    layers: int | None
    """L where Megatron stacks the parameter over layers, None where it exists once."""
    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    """Hugging Face name (with `{layer}` where stacked) and shape, in Megatron's order."""
    blocks: int
    padded: bool
    """Whether Megatron may have appended rows: those of the vocabulary, up to a multiple of 128 x TP."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one layer's tensor in Megatron: [rows of all pieces, columns] or [rows]."""
        return (sum(shape[0] for _, shape in self.pieces), *self.pieces[0][1][1:])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the Megatron checkpoint: with the layers in front where stacked."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def layer_numbers(self) -> Sequence[int | None]:
        """What `hf_names` is asked with: every layer, or only None for a parameter that exists once."""
        return (None,) if self.layers is None else range(self.layers)

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        """Names of the pieces in `layer` (None for a parameter that exists once)."""
        return tuple(name.format(layer=layer) for name, _ in self.pieces)

    def parts(self, most_numbers: int) -> Iterator[Part]:
        """All layers' rows, in order, in parts of at most `most_numbers` numbers, or of one row or group."""
        together = [self.pieces] if self.blocks > 1 else [(piece,) for piece in self.pieces]
        row_size = torch.Size(self.shape[1:]).numel()
        for layer in self.layer_numbers:
            first_row = 0
            for pieces in together:
                # What isn't cut: a group with the rows of all its pieces; a row, where there is one piece.
                units = self.blocks if len(pieces) > 1 else pieces[0][1][0]
                unit_rows = [shape[0] // units for _, shape in pieces]
                step = max(1, most_numbers // (sum(unit_rows) * row_size))
                for start in range(0, units, step):
                    count = min(step, units - start)
                    rows = tuple(
                        Rows(name.format(layer=layer), start * height, count * height)
                        for (name, _), height in zip(pieces, unit_rows, strict=True)
                    )
                    yield Part(self, layer, first_row, count, rows)
                    first_row += count * sum(unit_rows)


@dataclass(frozen=True)
class Rows:
    """Some rows of one Hugging Face tensor."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Part:
    """Some rows of one layer's Megatron tensor, and the Hugging Face rows that they are made of."""

    parameter: Parameter
    layer: int | None
    first_row: int
    """In the layer's Megatron tensor."""
    blocks: int
    """Blocks into which the rows of each piece are cut."""
    pieces: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the Megatron rows: [rows, columns] or [rows]."""
        return (sum(piece.count for piece in self.pieces), *self.parameter.shape[1:])

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The Megatron rows, `shape`, from the rows of the Hugging Face tensors."""
        if len(pieces) == 1:
            return pieces[0]
        blocks = [piece.reshape(self.blocks, -1, *self.shape[1:]) for piece in pieces]
        joined = empty(self.shape, pieces[0].dtype)
        torch.cat(blocks, dim=1, out=joined.view(self.blocks, -1, *self.shape[1:]))
        return joined

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The Hugging Face rows, contiguous, from the Megatron rows: the inverse of `join`."""
        if len(self.pieces) == 1:
            return (tensor.contiguous(),)
        heights = [piece.count // self.blocks for piece in self.pieces]
        pieces = []
        for blocks in tensor.reshape(self.blocks, -1, *self.shape[1:]).split(heights, dim=1):
            piece = empty(blocks.shape, tensor.dtype).copy_(blocks)
            pieces.append(piece.view(-1, *self.shape[1:]))
        return tuple(pieces)


def hf_shapes(table: Sequence[Parameter]) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its shape, in the order of transformers' state dictionary."""
    shapes = {
        name: shape
        for parameter in table
        for layer in parameter.layer_numbers
        for name, (_, shape) in zip(parameter.hf_names(layer), parameter.pieces, strict=True)
    }
    # Modules in the table's order, with all of a layer's together; a module's weight comes before its bias.
    modules = list(dict.fromkeys(name.rpartition(".")[0] for parameter in table for name, _ in parameter.pieces))
    inside = [module for module in modules if "{layer}" in module]
    before = modules[: modules.index(inside[0])]
    after = [module for module in modules if module not in {*before, *inside}]
    layers = max(parameter.layers or 0 for parameter in table)
    repeated = [module.format(layer=layer) for layer in range(layers) for module in inside]
    names = [f"{module}.{kind}" for module in (*before, *repeated, *after) for kind in ("weight", "bias")]
    return {name: shapes[name] for name in names if name in shapes}
