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

Which rules a model has is in `families.py`. Nothing here touches a file or a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """One layer's Megatron tensor, `shape`, from its Hugging Face pieces."""
        if len(pieces) == 1:
            return pieces[0].contiguous()
        columns = self.shape[1:]
        blocks = [piece.reshape(self.blocks, -1, *columns) for piece in pieces]
        return torch.cat(blocks, dim=1).reshape(self.shape)

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The Hugging Face pieces, contiguous, of one layer's Megatron tensor: the inverse of `join`."""
        rows = [shape[0] // self.blocks for _, shape in self.pieces]
        parts = tensor.reshape(self.blocks, sum(rows), *self.shape[1:]).split(rows, dim=1)
        return tuple(part.reshape(shape).contiguous() for part, (_, shape) in zip(parts, self.pieces, strict=True))


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
