import pytest
import torch

from rigsa_kernels import SparsePattern, layer_key, uniform_init
from rigsa_kernels.init import CHUNK, initial_values, philox, random_words


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, seed, expected):
    """The vectors that come with Random123."""
    assert tuple(int(word) for word in philox(seed, words(*counter))) == expected


@pytest.mark.parametrize("start", [0, 5, 2**32 - 6, 2**34 - 6])
def test_words_are_numbered_through(start):
    """Word i is lane i % 4 at counter (i // 4 modulo 2**32, key, i // 2**34, stream)."""
    got = random_words(7, 3, 1, start, 12, torch.device("cpu")).tolist()
    for i, word in enumerate(got, start):
        group = i // 4
        assert word == int(philox(7, words(group % 2**32, 3, group // 2**32, 1))[i % 4])


def test_uniform_within_the_bound_and_never_zero():
    values = uniform_init((1000, 100), 0.5, seed=3, key=1)
    assert values.abs().max() < 0.5
    assert (values != 0).all()
    # standard errors of mean and variance of a uniform variable over 100,000 draws, five of them
    assert abs(values.mean()) < 5 * 0.5 / (3 * 100_000) ** 0.5
    assert abs(values.var() - 1 / 12) < 5 * (1 / 180 / 100_000) ** 0.5


def test_chunks_do_not_show():
    whole = uniform_init((CHUNK + 7,), 1.0, seed=5, key=9)
    assert torch.equal(whole[:CHUNK], uniform_init((CHUNK,), 1.0, seed=5, key=9))
    assert len(whole.unique()) > 0.9 * len(whole)


def test_a_bound_of_zero_gives_positive_zeros():
    assert uniform_init((3, 5), 0.0, seed=0, key=0).view(torch.int32).count_nonzero() == 0


def test_initial_values_at_a_pattern_are_those_of_the_matrix():
    options = {"seed": 5, "key": 9}
    mask = torch.rand(60, 97, generator=torch.Generator().manual_seed(0)) < 0.1
    for pattern in (SparsePattern.from_mask(mask), SparsePattern.dense(7, 9), SparsePattern.from_mask(mask & False)):
        matrix = uniform_init(pattern.shape, 0.3, **options)
        assert torch.equal(initial_values(pattern, 0.3, **options), pattern.gather(matrix))


def test_shape_is_only_a_shape():
    flat = uniform_init((24,), 1.0, seed=1, key=2)
    for shape in ((4, 6), (2, 3, 4), (24, 1), (1, 24)):
        assert torch.equal(uniform_init(shape, 1.0, seed=1, key=2), flat.view(shape))
    assert torch.equal(uniform_init((), 1.0, seed=1, key=2), flat[0])
    assert uniform_init((0, 3), 1.0, seed=1, key=2).shape == (0, 3)
    assert uniform_init((2, 3), 1.0, seed=1, key=2, device="meta").is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_the_float32_value(dtype):
    expected = uniform_init((64,), 0.1, seed=1, key=2).to(dtype)
    assert torch.equal(uniform_init((64,), 0.1, seed=1, key=2, dtype=dtype), expected)


def test_streams_differ_between_layers_and_seeds_and_repeat():
    draw = {
        (seed, name): uniform_init((4096,), 1.0, seed=seed, key=layer_key(name))
        for seed in (0, 1)
        for name in ("a", "b")
    }
    assert torch.equal(draw[0, "a"], uniform_init((4096,), 1.0, seed=0, key=layer_key("a")))
    for one, other in [((0, "a"), (0, "b")), ((0, "a"), (1, "a")), ((0, "b"), (1, "b"))]:
        assert abs(torch.corrcoef(torch.stack([draw[one], draw[other]]))[0, 1]) < 5 / 4096**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: expected 0 to"),
        ({"key": 2**32}, "key: expected 0 to"),
        ({"bound": -1.0}, "bound: expected a finite number, 0 or more, got -1.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        uniform_init((2,), **({"bound": 1.0, "seed": 0, "key": 0} | options))
