import pytest
import torch

from rigsa_kernels import layer_key, uniform_init
from rigsa_kernels.init import _CHUNK, philox


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


def test_uniform_within_the_bound_and_never_zero():
    values = uniform_init((1000, 100), 0.5, seed=3, key=1)
    assert values.abs().max() < 0.5
    assert (values != 0).all()
    # standard errors of mean and variance of a uniform variable over 100,000 draws, five of them
    assert abs(values.mean()) < 5 * 0.5 / (3 * 100_000) ** 0.5
    assert abs(values.var() - 1 / 12) < 5 * (1 / 180 / 100_000) ** 0.5


def test_chunks_do_not_show():
    whole = uniform_init((_CHUNK + 7,), 1.0, seed=5, key=9)
    assert torch.equal(whole[:_CHUNK], uniform_init((_CHUNK,), 1.0, seed=5, key=9))
    assert len(whole.unique()) > 0.9 * len(whole)


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
        ({"bound": 0.0}, "bound: expected a positive finite number, got 0.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        uniform_init((2,), **({"bound": 1.0, "seed": 0, "key": 0} | options))
