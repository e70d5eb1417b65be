"""One training step of a configuration on tensors that have sizes and no data: the real modules, loss and optimiser.

Fake tensors say they are on the CPU, as PyTorch needs a GPU to pretend to be on one; layers and operators then do what
they would do on the device that is planned for. Nothing here was compared with a GPU's own count.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import moe

from rigsa.experiments.adapter import trained_parameters
from rigsa.experiments.attach import attach_adapter, attach_peft, checkpoint_activations
from rigsa.experiments.config import Base, Config
from rigsa.experiments.kept import check_kept, keep, kept_parameters, names_to_keep
from rigsa.experiments.memory.live_memory import LiveMemory, Usage
from rigsa.experiments.methods.gradient_masks import examples_at_a_time, score_entries
from rigsa.experiments.methods.hard_concrete import DiffGates
from rigsa.experiments.model import spare_the_head
from rigsa.experiments.tasks.evaluation import target_logits, training_loss
from rigsa.experiments.tasks.task import Batch, Size
from rigsa.experiments.train import is_set_by_hand, make_optimizer, stepping_in_backward
from rigsa.scores import GradientScore
from rigsa_kernels import GatedSparseLinear, GatedSparseWeight, MaskedAdamW, gated_linears
from rigsa_kernels.dispatch import kernels_win, multiplies_tiles
from rigsa_kernels.format import WORD_BITS, SparsePattern
from rigsa_kernels.nf4 import RUN, nf4_base
from rigsa_kernels.optim import StateDtype
from rigsa_kernels.reference import sampled_grad_bytes, samples, tiled_grad_bytes
from rigsa_kernels.selection import adaptable, select_linears
from rigsa_kernels.tiles import Tile, assume_columns, grid_shape, is_tiled, is_whole_lines, tile_size

NF4_BLOCK = 64
"""Weights that share a scale, as bitsandbytes has it by default."""


class SimulatedNF4Linear(nn.Linear):
    """A frozen layer whose weight has the sizes of bitsandbytes' NF4: it is decoded whole for each product."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _NF4Product.apply(x, self.out_features))


class _NF4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out_features):  # type: ignore[no-untyped-def]
        ctx.shape = (out_features, x.shape[-1])
        return x @ x.new_empty(ctx.shape).t()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy @ dy.new_empty(ctx.shape), None


class SimulatedModel:
    """The model of a configuration at one density, ready to train, with sizes and no data.

    Args:
        shape: the base model's configuration (`rigsa.experiments.model.model_shape`).
        config: of the run.
        device: that is planned for.
        density: of every gated layer; 1 for the dense level.
    """

    def __init__(self, shape: PretrainedConfig, config: Config, device: torch.device, density: float) -> None:
        self.config, self.device = config, device
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = _on_meta(shape, config)
        layers = select_linears(model, config.included, config.excluded)[0].values()
        sizes = adaptable(model, config.included, config.excluded)
        check_kept(model, config, sizes)
        self.num_weights = sum(sizes.values())
        model.requires_grad_(False)
        names = names_to_keep(model, config)
        if config.method.peft:
            attach_peft(model, config)  # here, as PEFT moves modules, which fake tensors do not allow
        with self._fake:
            self.model = cast(PreTrainedModel, model.to_empty(device="cpu"))
            self.model.tie_weights()
            spare_the_head(self.model)
            if config.quantize == "nf4":
                for linear in layers:
                    _quantize(linear)
            if config.method.gated:
                # "composed", and weights that code reads, would ask the values whether it is wise: zeros are not asked
                attach_adapter(self.model, config, numerics="auto", init_scale=0.0)
            keep(self.model, names)
            checkpoint_activations(self.model, config)
            kept = kept_parameters(self.model).values()
            # A run holds what they were before training in the memory of the CPU.
            self._lists = [torch.empty_like(parameter) for parameter in kept] if device.type == "cpu" else []
            for layer in gated_linears(self.model).values():
                _simulate(layer, config, device, density)
                self._lists += _position_lists(layer, device)
            if density == 1 and config.method.reads("l0_penalty"):
                DiffGates(config).put_on(self.model)
                # w, while the values are the difference of a step
                self._lists += [torch.empty_like(layer.rigsa_values) for layer in gated_linears(self.model).values()]

    def trained_share(self) -> float:
        """Numbers that the adapter trains, as a share of the weights of the layers that have an adapter."""
        kept = kept_parameters(self.model)
        trained = [one.numel() for name, one in trained_parameters(self.model).items() if name not in kept]
        return sum(trained) / self.num_weights

    def training_step(self, size: Size, micro_batch: int, *, accumulates: bool) -> Usage:
        """The last micro-batch of a step after the first: forward, backward, clipping, update.

        Args:
            size: of a row of the batch.
            micro_batch: rows.
            accumulates: the step has micro-batches before this one, so gradients are there from the start.
        """
        model, config = self.model.train(), self.config
        with self._fake:
            optimizer = self._optimizer(config)
            by_hand = [p for p in _parameters(optimizer) if is_set_by_hand(p)]
            parameters = [p for p in _parameters(optimizer) if not is_set_by_hand(p)]
            if accumulates:
                _fill_gradients(parameters)
            memory = self._hold(optimizer)
            hooks = [
                parameter.register_post_accumulate_grad_hook(lambda p: memory.hold("gradients", [p.grad]))
                for parameter in parameters
            ]
            stepping = stepping_in_backward(optimizer) if config.step_in_backward else nullcontext()
            batch = _batch(size, micro_batch)
            with memory, stepping, _told_to_transformers(batch):
                loss = training_loss(model, batch, micro_batch)
                self._hold_kept(memory)
                memory.hold_rest("activations")
                loss.backward()
                if config.max_grad_norm:
                    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                _fill_gradients(by_hand)
                memory.hold("gradients", [p.grad for p in by_hand if p.grad is not None])
                optimizer.step()
            for hook in hooks:
                hook.remove()
            optimizer.zero_grad()
        return memory.usage()

    def scoring_pass(self, score: GradientScore, size: Size) -> Usage:
        """One gradient of as many examples as the score takes at a time, and the scores of entries from it."""
        with self._fake:
            memory = self._hold(None)
            number = examples_at_a_time(score, self.config)
            batch = _batch(dataclasses.replace(size, packed=False), number)
            with memory, _told_to_transformers(batch):
                score_entries(self.model, score, [batch], number)
        return memory.usage()

    def test_pass(self, size: Size, rows: int) -> Usage:
        """One batch of prompts through the trained adapter, without gradients."""
        with self._fake, torch.no_grad():
            memory = self._hold(None)
            batch = _batch(dataclasses.replace(size, packed=False), rows)
            with memory, _told_to_transformers(batch):
                target_logits(self.model.eval(), batch)
                self._hold_kept(memory)
        return memory.usage()

    def moment_bytes(self, state_dtype: StateDtype) -> int:
        """The bytes that the optimiser would hold with moments of that dtype."""
        with self._fake:
            memory = LiveMemory()
            memory.hold("optimiser", _state(self._optimizer(dataclasses.replace(self.config, state_dtype=state_dtype))))
        return memory.usage().peak

    def _optimizer(self, config: Config) -> MaskedAdamW:
        """An optimiser that has its moments already, as every step but the first finds it."""
        optimizer = make_optimizer(self.model, config)
        _fill_gradients(_parameters(optimizer))
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def _hold(self, optimizer: MaskedAdamW | None) -> LiveMemory:
        """Start a record with everything that is there before the forward pass, part by part."""
        memory = LiveMemory(partial(_temporary_bytes, self.device))
        memory.hold("weights", (*self.model.parameters(), *self.model.buffers()))
        memory.hold("adapter", trained_parameters(self.model).values())
        for layer in gated_linears(self.model).values():
            memory.hold("adapter", (layer.rigsa_alpha, *layer.pattern.tensors))  # a gate that is not trained, too
            if layer.is_nf4:
                memory.hold("weights", nf4_base(layer.weight))
        memory.hold("adapter", self._lists)
        if optimizer is not None:
            memory.hold("optimiser", _state(optimizer))
            memory.hold("gradients", [p.grad for p in _parameters(optimizer) if p.grad is not None])
        return memory

    def _hold_kept(self, memory: LiveMemory) -> None:
        """Count what layers keep over a step on the gemm path: a matrix, or W0 at the free entries."""
        for layer in gated_linears(self.model).values():
            memory.hold("adapter", layer.kept_tensors())


def nf4_holds(shape: PretrainedConfig, config: Base) -> bool:
    """Whether every layer to adapt has rows that NF4 kernels can decode."""
    layers, _ = select_linears(_on_meta(shape, config), config.included, config.excluded)
    return all(layer.in_features % RUN == 0 for layer in layers.values())


def _on_meta(shape: PretrainedConfig, config: Base) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(shape), attn_implementation=config.attention, dtype=getattr(torch, config.dtype)
        )


@contextmanager
def _told_to_transformers(batch: Batch) -> Iterator[None]:
    """Tells transformers what it cannot find out of fake tensors.

    First, whether rows are padded or packed: left to itself it would take all of them for the general case and make
    attention masks of T * T entries, which no other batch has. Second, that experts in other dtypes than
    bfloat16 take its own product, which gives and keeps the same tensors: PyTorch knows the sizes of its product of
    experts in bfloat16 only.
    """
    has_padding = "attention_mask" in batch
    is_packed = "position_ids" in batch and not has_padding
    about_masks = mock.patch.multiple(
        masking_utils,
        is_tracing=lambda tensor=None: False,
        find_packed_sequence_indices=lambda position_ids: position_ids if is_packed else None,
        fast_all=lambda mask: not has_padding,
    )
    in_bfloat16 = mock.patch.object(
        moe, "_can_use_grouped_mm", lambda input, weight, offs: weight.dtype == torch.bfloat16
    )
    with about_masks, in_bfloat16:
        yield


def _parameters(optimizer: MaskedAdamW) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(optimizer: MaskedAdamW) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _fill_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def _batch(size: Size, rows: int) -> Batch:
    """Rows of that size; a lone one is never padded."""
    columns = {"input_ids": size.tokens, "targets": size.tokens if size.packed else size.targets}
    if rows > 1 and size.packed:
        columns["position_ids"] = size.tokens
    elif rows > 1 and size.padded:
        columns |= {"attention_mask": size.tokens, "position_ids": size.tokens}
    return {name: torch.empty(rows, width, dtype=torch.int64) for name, width in columns.items()}


def _quantize(linear: nn.Linear) -> None:
    """Give `linear` a weight with the sizes of bitsandbytes' NF4."""
    shape, dtype = tuple(linear.weight.shape), linear.weight.dtype
    linear.__class__ = SimulatedNF4Linear
    codes = torch.empty(linear.weight.numel() // 2, 1, dtype=torch.uint8)
    linear.weight = nn.Parameter(codes, requires_grad=False)
    linear.weight.quant_state = types.SimpleNamespace(  # type: ignore[attr-defined]
        quant_type="nf4", shape=shape, dtype=dtype, blocksize=NF4_BLOCK, nested=False,
        absmax=torch.empty(codes.numel() * 2 // NF4_BLOCK), code=torch.empty(16),
    )  # fmt: skip


def _simulate(layer: GatedSparseLinear, config: Config, device: torch.device, density: float) -> None:
    """Have a dense layer of fake tensors go the way that it would go on `device`, with a pattern of that density."""
    layer.rule_device = device
    # `auto` would ask the values. Composing keeps the larger matrices.
    if not isinstance(layer, GatedSparseWeight):  # which always composes
        layer.numerics = "composed" if config.numerics == "auto" else config.numerics
    if density < 1:
        layer.bound = 0.0  # values without data need not be drawn
        layer.set_pattern(_pattern(layer.pattern.shape, density, config))


def _pattern(shape: tuple[int, int], density: float, config: Config) -> SparsePattern:
    """A pattern without data: of tiles where the method takes any, else packed."""
    n, k = shape
    if config.method.reads("tile") and config.tile:
        return _tile_pattern(shape, density, tile_size(config.tile, shape))
    return _packed_pattern(shape, max(round(density * n * k), 1))


def _packed_pattern(shape: tuple[int, int], free: int) -> SparsePattern:
    n, k = shape
    words = torch.empty(-(-k // WORD_BITS), n, dtype=torch.int32)
    offsets, row_base = torch.empty_like(words, dtype=torch.int16), torch.empty(n, dtype=torch.int32)
    return SparsePattern(n, k, free, words, offsets, row_base)


def _tile_pattern(shape: tuple[int, int], density: float, tile: Tile) -> SparsePattern:
    """Tiles are taken to stand in as many columns of the grid as they can: then most of x is kept for backward."""
    (n, k), (rows, columns) = shape, grid_shape(shape, tile)
    tiles = max(round(density * rows * columns), 1)
    free = min(tiles * tile[0] * tile[1], n * k)
    index = torch.empty(tiles, dtype=torch.int32), torch.empty(2, tiles, dtype=torch.int32)
    pattern = SparsePattern(n, k, free, None, None, None, *index, torch.empty(0, *tile, dtype=torch.int8))
    touched = min(min(tiles, columns) * tile[1], k)
    assume_columns(pattern.tensors, None if touched == k else torch.empty(touched, dtype=torch.int64))
    return pattern


def _position_lists(layer: GatedSparseLinear, device: torch.device) -> Iterator[Tensor]:
    """The lists that operators in PyTorch on a CPU keep while a pattern lives (`rigsa_kernels.format`).

    A kernel on a GPU finds entries without lists, but for those that decode the bit mask of tiles.
    """
    n, k, nnz = layer.out_features, layer.in_features, layer.rigsa_values.numel()
    if device.type == "cuda" and layer.is_nf4 and layer.pattern.tiles is not None:
        yield from _packed_pattern((n, k), nnz).tensors
    if device.type == "cpu" and not layer.pattern.is_dense and not is_whole_lines(layer.pattern.tile, (n, k)):
        yield torch.empty(nnz, dtype=torch.int64)
        by_tiles = layer.pattern.tiles is not None and multiplies_tiles(nnz, layer.pattern.tile or (1, 1), (n, k))
        if samples(nnz, (n, k), layer.dtype) and not by_tiles:
            yield torch.empty(n + 1, dtype=torch.int32)
            yield torch.empty(nnz, dtype=torch.int32)


def _temporary_bytes(device: torch.device, operator: Any, arguments: tuple[Any, ...]) -> int:
    """What an operator takes and gives back: the copies and the product of a values' gradient."""
    if operator is not torch.ops.rigsa.linear_dvalues.default:
        return 0
    dy, x, values, _, pattern = arguments[:5]
    n, k = dy.shape[-1], x.shape[-1]
    if is_tiled(pattern):
        tile = (pattern[2].shape[1], pattern[2].shape[2])
        return tiled_grad_bytes(x.numel() // k, (n, k), x.dtype, values.numel(), tile, device)
    if device.type == "cuda":
        return 0 if kernels_win(device, x.dtype) else n * k * x.dtype.itemsize
    return sampled_grad_bytes(x.numel() // k, (n, k), x.dtype, values.numel() if pattern else None)
