import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rigsa_kernels import SparsePattern
from rigsa_kernels.format import MAX_IN_FEATURES, WORD_BITS


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 100))
    density = draw(st.sampled_from([0.0, 0.03, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(rows, columns, generator=generator) < density


def position(pattern: SparsePattern, row: int, column: int) -> int:
    """Where the value at (row, column) lies, as a kernel finds it."""
    word, bit = divmod(column, WORD_BITS)
    below = int(pattern.words[word, row]) & ((1 << bit) - 1)
    return int(pattern.row_base[row]) + (int(pattern.word_offsets[word, row]) & 0xFFFF) + below.bit_count()


def test_worked_example_of_the_docstring():
    pattern = SparsePattern.from_mask(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool())
    assert pattern.words.tolist() == [[0b0101, 0b0000, 0b1110]]
    assert pattern.word_offsets.tolist() == [[0, 0, 0]]
    assert pattern.row_base.tolist() == [0, 2, 2]
    assert pattern.nnz == 5
    assert pattern.density == 5 / 12


@given(masks())
def test_packing_loses_nothing(mask):
    pattern = SparsePattern.from_mask(mask)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == mask.sum()
    matrix = torch.arange(1.0, mask.numel() + 1).view(mask.shape)
    values = pattern.gather(matrix)
    assert torch.equal(values, matrix[mask])
    assert torch.equal(pattern.scatter(values), matrix * mask)
    again = SparsePattern.from_words(pattern.words, mask.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, pattern.tensors, strict=True))


@given(masks())
def test_every_entry_is_found_by_population_count(mask):
    pattern = SparsePattern.from_mask(mask)
    found = [position(pattern, row, column) for row, column in mask.nonzero().tolist()]
    assert found == list(range(pattern.nnz))


def test_columns_and_offsets_beyond_signed_16_bits():
    mask = torch.ones(2, 50_000, dtype=torch.bool)
    pattern = SparsePattern.from_mask(mask)
    assert position(pattern, 1, 40_000) == 90_000
    assert torch.equal(pattern.to_mask(), mask)


def test_dense_is_a_case_of_the_format():
    pattern, matrix = SparsePattern.dense(3, 5), torch.randn(3, 5)
    assert pattern.is_dense
    assert pattern.values_shape == (3, 5)
    assert pattern.density == 1
    assert pattern.tensors == []
    assert torch.equal(pattern.scatter(pattern.gather(matrix)), matrix)
    assert pattern.to_mask().all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"mask: expected a boolean \[N, K\] tensor, got torch.float32"),
        (torch.ones(3, dtype=torch.bool), r"got torch.bool \[3\]"),
        (torch.ones(1, 70_000, dtype=torch.bool), "at most 65536 columns, got 70000"),
    ],
)
def test_bad_masks_are_named(mask, message):
    with pytest.raises(ValueError, match=message):
        SparsePattern.from_mask(mask)


def test_bad_words_and_values_are_named():
    pattern = SparsePattern.from_mask(torch.ones(2, 33, dtype=torch.bool))
    with pytest.raises(ValueError, match="words: expected int32"):
        SparsePattern.from_words(pattern.words, 65)
    with pytest.raises(ValueError, match="a bit beyond column 30 is set"):
        SparsePattern.from_words(torch.full((2, 2), -1, dtype=torch.int32)[:1], 31)
    with pytest.raises(ValueError, match=r"values: expected \[66\], got \[65\]"):
        pattern.scatter(torch.zeros(65))
    with pytest.raises(ValueError, match=r"matrix: expected \[2, 33\]"):
        pattern.gather(torch.zeros(33, 2))


def full_words(columns: int) -> torch.Tensor:
    return torch.full((-(-columns // WORD_BITS), 1), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    "make",
    [
        lambda columns: SparsePattern.dense(2, columns),
        lambda columns: SparsePattern.from_mask(torch.ones(1, columns, dtype=torch.bool)),
        lambda columns: SparsePattern.from_words(full_words(columns), columns),
        lambda columns: SparsePattern(1, columns, 0, full_words(columns), full_words(columns).to(torch.int16)),
    ],
    ids=["dense", "from_mask", "from_words", "constructor"],
)
def test_no_constructor_takes_more_columns_than_offsets_can_count(make):
    assert make(MAX_IN_FEATURES).in_features == MAX_IN_FEATURES
    for columns in (MAX_IN_FEATURES + WORD_BITS, MAX_IN_FEATURES + 2 * WORD_BITS):
        with pytest.raises(ValueError, match=f"expected at most 65536 columns, got {columns}"):
            make(columns)


def test_the_last_offset_of_the_widest_row():
    pattern = SparsePattern.from_words(full_words(MAX_IN_FEATURES), MAX_IN_FEATURES)
    assert position(pattern, 0, MAX_IN_FEATURES - 1) == MAX_IN_FEATURES - 1


@given(masks())
def test_a_pattern_keeps_its_mask_when_the_words_it_was_made_from_change(mask):
    words = SparsePattern.from_mask(mask).words.clone()
    pattern = SparsePattern.from_words(words, mask.shape[1])
    words.bitwise_not_()
    assert torch.equal(pattern.to_mask(), mask)


@given(masks())
def test_mapping_reaches_every_index_tensor(mask):
    pattern = SparsePattern.from_mask(mask)
    copied = pattern.map(torch.clone)
    assert copied.shape == pattern.shape
    assert copied.nnz == pattern.nnz
    for one, other in zip(copied.tensors, pattern.tensors, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr() or not one.numel()
    assert SparsePattern.dense(2, 3).map(torch.clone).is_dense
