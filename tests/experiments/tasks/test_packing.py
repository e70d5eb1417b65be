"""Several texts in one row: where they stand, that none sees another, and that nothing else is learned."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import FAMILIES, SIZES, family
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig

from rigsa.errors import RigsaError
from rigsa.experiments.presets import smoke
from rigsa.experiments.tasks.evaluation import training_loss
from rigsa.experiments.tasks.packing import check_packing, pack, rows_of
from rigsa.experiments.tasks.registry import load_task
from rigsa.experiments.tasks.task import IGNORED, Sample, collate

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=9)


def samples_of(lengths: list[int]) -> list[Sample]:
    """Of these lengths; the last half of each is learned, but for one token in it."""
    draw = torch.Generator().manual_seed(0)
    samples: list[Sample] = []
    for length in lengths:
        ids = torch.randint(1, 280, (length + 1,), generator=draw).tolist()
        targets = ids[1:][length // 2 :]
        targets[len(targets) // 2] = IGNORED if len(targets) > 2 else targets[len(targets) // 2]
        samples.append({"input_ids": ids[:-1], "targets": targets})
    return samples


@given(LENGTHS)
def test_every_text_stands_once_and_no_row_is_wider_than_the_longest(lengths):
    rows = rows_of(lengths)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert max(sum(lengths[number] for number in row) for row in rows) == max(lengths)
    assert len(rows) <= len(lengths)
    filled = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > max(lengths)  # two rows would have been one


@given(LENGTHS)
def test_a_packed_batch_has_the_tokens_and_targets_of_its_texts(lengths):
    samples = samples_of(lengths)
    batch = pack(samples, 0)
    assert batch.keys() == {"input_ids", "targets", "position_ids"}
    for row, numbers in enumerate(rows_of(lengths)):
        at = 0
        for number in numbers:
            end = at + lengths[number]
            learned = [IGNORED] * (lengths[number] - len(samples[number]["targets"])) + samples[number]["targets"]
            assert batch["input_ids"][row, at:end].tolist() == samples[number]["input_ids"]
            assert batch["targets"][row, at:end].tolist() == learned
            assert batch["position_ids"][row, at:end].tolist() == list(range(lengths[number]))
            at = end
        assert (batch["targets"][row, at:] == IGNORED).all()
    assert (batch["targets"] != IGNORED).sum() == (collate(samples, 0)["targets"] != IGNORED).sum()


def gradient(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    training_loss(model, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_the_texts_apart(name, attention):
    model = family(name)
    model.set_attn_implementation(attention)
    check_packing(model, attention)
    samples = samples_of([23, 5, 9, 17, 3, 23, 1, 8])
    packed = pack(samples, 0)
    assert len(packed["input_ids"]) == 4
    assert_equal_but_for_rounding(gradient(model, packed), gradient(model, collate(samples, 0)))


def assert_equal_but_for_rounding(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, expected in other.items():
        assert (one[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_learned_positions_begin_anew_with_each_text(attention):
    shape = GPT2Config(vocab_size=280, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation=attention).eval()
    check_packing(model, attention)
    samples = samples_of([11, 5, 6])
    assert_equal_but_for_rounding(gradient(model, pack(samples, 0)), gradient(model, collate(samples, 0)))


def ignores_the_mask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> Any:
    """A causal attention that knows nothing of texts, as a user may register one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, is_causal=True)


def test_a_model_that_does_not_keep_texts_apart_is_refused():
    from transformers import AttentionInterface

    AttentionInterface.register("careless", ignores_the_mask)
    shape = LlamaConfig(**SIZES, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="careless").eval()
    message = r"--packing: LlamaForCausalLM with --attention careless lets a text depend on what stands before it"
    with pytest.raises(RigsaError, match=message):
        check_packing(model, "careless")
    scan = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=280, hidden_size=16, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(RigsaError, match=r"--packing: MambaForCausalLM"):
        check_packing(scan.eval(), "eager")


def test_a_model_that_goes_by_other_positions_is_refused():
    class Shifted(nn.Module):
        """Reads every text as if it began three positions later, if it does not stand alone."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModelForCausalLM.from_config(
                GPT2Config(vocab_size=280, n_positions=64, n_embd=32, n_layer=1, n_head=4, initializer_range=0.3)
            )

        def forward(self, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
            shift = 3 * (input_ids.shape[1] > 7)
            return self.inner(input_ids=input_ids, position_ids=position_ids + shift, **options)

    with pytest.raises(RigsaError, match="lets a text depend on what stands before it"):
        check_packing(Shifted().eval(), "eager")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("packing", True, "False"),
        ("group_by_length", True, "False"),
        ("score", "number", "none"),
        ("max_length", 100, "0"),
        ("validation_share", 0.2, "0.1"),
    ],
)
def test_what_only_texts_have_is_refused_for_images(name, value, expected):
    option = name.replace("_", "-")
    with pytest.raises(RigsaError, match=f"--{option}: expected {expected} for images of digits, .* got {value}"):
        load_task(dataclasses.replace(smoke("imp", "cpu"), **{name: value}))
