import copy
import weakref

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from rigsa_kernels import GatedSparseLinear, SparsePattern, uniform_init
from rigsa_kernels.dispatch import GENERATION_TOKENS
from rigsa_kernels.linear import SETTINGS

NUMERICS = ("auto", "exact", "composed")


def make_layer(dtype: torch.dtype = torch.float32, n: int = 12, k: int = 40, **options: object) -> GatedSparseLinear:
    torch.manual_seed(0)
    return GatedSparseLinear(nn.Linear(k, n, dtype=dtype), **({"seed": 3, "key": 5, "alpha_init": 0.1} | options))


def half_mask(layer: GatedSparseLinear) -> torch.Tensor:
    return torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5


def expected(layer: GatedSparseLinear, x: torch.Tensor) -> torch.Tensor:
    """Made from scratch, so a stale kept matrix shows."""
    weight = layer.frozen_matrix().double() + layer.rigsa_alpha.double() * layer.delta().double()
    return nn.functional.linear(x.double(), weight, layer.bias.double()).detach()


def test_starts_at_the_base_layer_with_regenerable_values():
    linear = nn.Linear(40, 12)
    layer = GatedSparseLinear(linear, seed=3, key=5)
    assert layer.weight is linear.weight
    assert layer.rigsa_alpha.item() == pytest.approx(1e-6)
    assert layer.rigsa_alpha.shape == (1,)
    assert torch.equal(layer.rigsa_values, uniform_init((12, 40), 40**-0.5, seed=3, key=5))
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {"rigsa_values", "rigsa_alpha"}


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_closed_gate_is_the_linear_layer_bit_for_bit(dtype, numerics):
    layer = make_layer(dtype, numerics=numerics, alpha_init=0.0)
    x = torch.randn(5, 40).to(dtype)
    want = nn.functional.linear(x, layer.frozen_matrix(), layer.bias)
    assert torch.equal(layer(x), want)
    layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
    assert torch.equal(layer(x), want)


def test_adopting_a_pattern_rewinds_exactly():
    layer = make_layer()
    with torch.no_grad():
        layer.rigsa_values.add_(1)
        layer.rigsa_alpha.fill_(2)
    mask = half_mask(layer)
    layer.set_pattern(SparsePattern.from_mask(mask))
    assert torch.equal(layer.rigsa_values, uniform_init((12, 40), 40**-0.5, seed=3, key=5)[mask])
    assert torch.equal(layer.delta()[~mask], torch.zeros(int((~mask).sum())))
    assert layer.rigsa_alpha.item() == pytest.approx(0.1)


def sgd(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), 0.1)


def adamw(**options: bool):  # type: ignore[no-untyped-def]
    return lambda layer: torch.optim.AdamW(layer.parameters(), 0.1, **options)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "make_optimizer", [sgd, adamw(fused=True), adamw(foreach=True)], ids=["sgd", "adamw-fused", "adamw-foreach"]
)
def test_kept_matrix_follows_any_optimiser(make_optimizer, packed, numerics):
    layer = make_layer(numerics=numerics)
    if packed:
        layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
    optimizer, x = make_optimizer(layer), torch.randn(5, 40)
    for _ in range(3):
        torch.testing.assert_close(layer(x).double(), expected(layer, x), atol=1e-5, rtol=1e-5)
        layer(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer(x).double(), expected(layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_kept_matrix_follows_writes_loads_moves_and_copies(numerics):
    layer, x = make_layer(numerics=numerics), torch.randn(5, 40)
    layer(x)
    with torch.no_grad():
        layer.rigsa_values.mul_(2)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), atol=1e-5, rtol=1e-5)
    other = make_layer(key=6)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x).double(), expected(other, x), atol=1e-5, rtol=1e-5)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.rigsa_alpha.fill_(1)
    torch.testing.assert_close(twin(x).double(), expected(twin, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), atol=1e-5, rtol=1e-5)
    assert layer.double()(x.double()).dtype == torch.float64


def test_matrix_is_made_once_a_step(monkeypatch):
    """Micro-batches of one step share it."""
    made = []
    compose = torch.ops.rigsa.compose
    monkeypatch.setattr(torch.ops.rigsa, "compose", lambda *args: made.append(1) or compose(*args))
    layer, x = make_layer(numerics="composed"), torch.randn(5, 40)
    optimizer = sgd(layer)
    for _ in range(2):
        for _ in range(4):
            layer(x).sum().backward()
        optimizer.step()
    assert len(made) == 2


def fresh(layer: GatedSparseLinear) -> GatedSparseLinear:
    """The same layer, which has kept nothing."""
    return copy.deepcopy(layer)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_have_the_same_bits_and_training_goes_on(mode, packed, numerics):
    layer, x = make_layer(torch.bfloat16, numerics=numerics), torch.randn(5, 40).bfloat16()
    if packed:
        layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
    with mode():
        y = layer(x)
    z = layer(x)
    assert torch.equal(y, z)
    z.sum().backward()
    sgd(layer).step()
    for change in ({"enabled": True}, {"enabled": False}, {"enabled": True, "numerics": "exact"}):
        vars(layer).update(change)
        for batch in (x, x[:2], x.float()):
            with mode():
                twice = layer(batch), layer(batch)
            assert all(torch.equal(y, fresh(layer)(batch)) for y in twice)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_passes_without_gradients_follow_autocast(numerics):
    """At this gate float32 is composed, and `auto` exact in bfloat16, where composing would lose the adapter."""
    layer, x = make_layer(numerics=numerics, alpha_init=1e-3), torch.randn(5, 40)
    want = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            want[enabled] = fresh(layer)(x).detach()
    for enabled in (False, False, True, True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(layer(x), want[enabled])


def test_passes_without_gradients_leave_one_matrix_behind():
    layer, x = make_layer(torch.bfloat16, numerics="composed"), torch.randn(5, 40).bfloat16()
    with torch.no_grad():
        layer(x)
        matrix = weakref.ref(layer._way.operand)
        layer.rigsa_values.mul_(2)
    layer(x)
    assert matrix() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replica_without_parameters_computes_the_same(dtype):
    """nn.DataParallel's, which transformers.Trainer takes on several GPUs."""
    layer, x = make_layer(dtype), torch.randn(5, 40).to(dtype)
    replica = layer._replicate_for_data_parallel()
    vars(replica).update(layer.named_parameters())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert torch.equal(replica(x), layer(x))


def test_auto_switches_with_the_gate_in_bfloat16_only():
    layer = make_layer(torch.bfloat16)
    for alpha, exact in ((1e-4, True), (1.0, False)):
        with torch.no_grad():
            layer.rigsa_alpha.fill_(alpha)
        assert layer._is_exact(torch.bfloat16) is exact
    assert make_layer(alpha_init=1e-6)._is_exact(torch.float32) is False


def test_pattern_is_part_of_the_state_and_survives_casts():
    layer = make_layer()
    layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
    assert "rigsa_words" in layer.state_dict()
    layer.bfloat16()
    assert torch.equal(layer.pattern.to_mask(), half_mask(layer))


def test_state_brings_its_pattern_along():
    ticket, other = make_layer(), make_layer(key=6)
    ticket.set_pattern(SparsePattern.from_mask(half_mask(ticket)))
    dense_state, x = make_layer(key=7).state_dict(), torch.randn(5, 40)
    other.load_state_dict(ticket.state_dict())
    assert torch.equal(other.pattern.to_mask(), half_mask(ticket))
    assert torch.equal(other(x), ticket(x))
    values = other.rigsa_values
    other.load_state_dict(ticket.state_dict())
    assert other.rigsa_values is values, "an optimiser that holds the parameter must not lose it"
    other.load_state_dict(dense_state)
    assert other.pattern.is_dense
    assert torch.equal(other.rigsa_values, dense_state["rigsa_values"])


@pytest.mark.parametrize("numerics", NUMERICS)
def test_autocast_runs_in_its_dtype_and_trains(numerics):
    layer, x = make_layer(numerics=numerics), torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.rigsa_values.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected(layer, x), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_takes_the_dtype_that_a_linear_layer_takes(dtype, packed, numerics):
    """It leaves float64 alone."""
    layer, x = make_layer(dtype, numerics=numerics), torch.randn(5, 40).to(dtype)
    if packed:
        layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), layer.restored()(x)
    assert y.dtype == plain.dtype
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(y.double(), expected(layer, x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_made_in_inference_mode_computes_as_any_other(dtype, packed, numerics):
    with torch.inference_mode():
        layer, x = make_layer(dtype, numerics=numerics), torch.randn(5, 40).to(dtype)
        if packed:
            layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
        for trained in (None, layer.rigsa_values, layer.rigsa_alpha):
            if trained is not None:
                trained.mul_(3)
            y = layer(x)
            assert torch.equal(y, layer(x))
            torch.testing.assert_close(y.double(), expected(layer, x), atol=0.05, rtol=0.02)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_a_layer_adapted_in_inference_mode_can_be_trained():
    linear, mask = nn.Linear(40, 12), torch.rand(12, 40) < 0.5
    with torch.inference_mode():
        layer = GatedSparseLinear(linear, seed=3, key=5, pattern=SparsePattern.from_mask(mask), alpha_init=0.1)
        layer(torch.randn(5, 40))
    x = torch.randn(5, 40)
    layer(x).sum().backward()
    sgd(layer).step()
    torch.testing.assert_close(layer(x), expected(layer, x).float())


def test_switching_is_logged(caplog):
    layer, x = make_layer(torch.bfloat16), torch.randn(5, 40)
    with caplog.at_level("INFO", "rigsa_kernels"):
        for alpha in (1e-4, 1.0, 2.0):
            with torch.no_grad():
                layer.rigsa_alpha.fill_(alpha)
            layer(x)
    assert [record.message for record in caplog.records] == ["12 x 40 layer: composed from here on"]


@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_gate_that_is_not_finite_is_named(numerics):
    layer = make_layer(numerics=numerics)
    with torch.no_grad():
        layer.rigsa_alpha.fill_(float("nan"))
    with pytest.raises(ValueError, match="alpha: expected a finite gate, got nan"):
        layer(torch.randn(5, 40))
    with pytest.raises(ValueError, match="rigsa_alpha: expected a finite gate, got nan"):
        make_layer().load_state_dict(layer.state_dict())


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing_changes_no_bit(packed, numerics):
    gradients = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        layer = make_layer(torch.bfloat16, numerics=numerics)
        if packed:
            layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
        x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        run(layer, x).float().pow(2).sum().backward()
        gradients.append([x.grad, layer.rigsa_values.grad, layer.rigsa_alpha.grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiles_without_a_graph_break():
    layer, x = make_layer(), torch.randn(5, 40)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def assert_frozen_alone(layer: GatedSparseLinear, linear: nn.Module, x: torch.Tensor) -> None:
    """Switched off, `layer` is `linear` bit for bit; switched on again, it is what it was."""
    want, adapted, state = linear(x), layer(x), copy.deepcopy(layer.state_dict())
    layer.enabled = False
    assert torch.equal(layer(x), want)
    assert layer(x).dtype == want.dtype
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    layer.enabled = True
    assert torch.equal(layer(x), adapted)
    assert not torch.equal(adapted, want)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_switched_off_it_is_the_frozen_layer_bit_for_bit(dtype, packed, numerics):
    layer = make_layer(dtype, numerics=numerics, alpha_init=0.5)
    if packed:
        layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
    linear, x = copy.deepcopy(layer.restored()), torch.randn(5, 40).to(dtype)  # a copy: the layer writes into its own
    assert_frozen_alone(layer, linear, x)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert_frozen_alone(layer, linear, x)


def test_switched_off_it_passes_gradients_to_its_input_only():
    layer, x = make_layer(alpha_init=0.5), torch.randn(5, 40, requires_grad=True)
    layer.enabled = False
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.frozen_matrix().sum(0).expand(5, 40))
    assert layer.rigsa_values.grad is None
    assert layer.rigsa_alpha.grad is None


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_switched_off_on_a_4_bit_base(double):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4")
    linear = linear.to(torch.bfloat16).to("cpu")  # bitsandbytes quantises when a layer moves
    layer = GatedSparseLinear(linear, seed=3, key=5, alpha_init=0.5)
    assert_frozen_alone(layer, linear, torch.randn(7, 64).bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"force": "fast"}, "force: expected one of fused, gemm or None, got 'fast'"),
        ({"numerics": "fast"}, "numerics: expected one of auto, exact, composed, got 'fast'"),
        ({"alpha_init": float("nan")}, "alpha_init: expected a finite number"),
        ({"pattern": SparsePattern.dense(3, 3)}, r"pattern: expected \[12, 40\], got \[3, 3\]"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


def test_a_layer_that_is_not_what_it_says_is_refused():
    class Packed(nn.Linear):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x

    with pytest.raises(ValueError, match=r"expected an nn\.Linear with a floating-point or NF4 weight"):
        GatedSparseLinear(Packed(4, 4), seed=0, key=0)


@pytest.mark.parametrize("numerics", ["exact", "composed"])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_a_write_to_the_frozen_weight_before_backward_is_an_error(numerics, density):
    """As for any layer: its products would be those of another weight."""
    torch.manual_seed(0)
    layer = GatedSparseLinear(nn.Linear(12, 8), seed=0, key=1, alpha_init=0.5, numerics=numerics, in_place=False)
    if density < 1:
        layer.set_pattern(SparsePattern.from_mask(torch.rand(8, 12) < density))
    x = torch.randn(3, 12, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    if numerics == "exact":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:  # a composed matrix is one of its own
        y.sum().backward()


def test_second_derivatives_are_refused():
    layer = GatedSparseLinear(nn.Linear(12, 8), seed=0, key=1, alpha_init=0.5)
    x = torch.randn(3, 12, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_setting_that_changes_ends_the_way_and_one_that_is_set_again_does_not(name):
    others = {"numerics": "exact", "force": "gemm"}
    layer, x = make_layer(numerics="composed").eval(), torch.randn(5, 40)
    with torch.no_grad():
        layer(x)
        for value, kept in ((getattr(layer, name), True), (others.get(name, not getattr(layer, name)), False)):
            way = layer._way
            setattr(layer, name, value)
            found = layer(x)
            assert (layer._way is way) == kept
            frozen = nn.functional.linear(x, layer.frozen_matrix(), layer.bias)
            want = expected(layer, x).float() if layer.enabled else frozen
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_prompt_and_the_tokens_after_it_go_one_way_where_their_number_does_not_matter(monkeypatch):
    """On a CPU, a dense layer would make its matrix twice for each text."""
    layer = make_layer(numerics="composed")
    prompt, token = torch.randn(GENERATION_TOKENS + 1, 40), torch.randn(1, 40)
    with torch.no_grad():
        layer(prompt)
        way = layer._way
        layer(token)
        assert layer._way is way
        monkeypatch.setattr("rigsa_kernels.linear.kernels_win", lambda *_: True)
        layer.exact_in_training = not layer.exact_in_training
        layer(prompt)
        assert not layer._way.serves(token, *layer._trio())
        layer(token)
        assert not layer._way.serves(prompt, *layer._trio())


class OnCuda(torch.Tensor):
    """A CPU's tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_capture_that_is_refused_prepares_nothing(packed, training, numerics, monkeypatch):
    """What runs in a capture is recorded and not done: a weight composed there would hold W0 ever after."""
    layer = make_layer(numerics=numerics).train(training)
    if packed:
        layer.set_pattern(SparsePattern.from_mask(half_mask(layer)))
        layer.rigsa_alpha.data.fill_(0.5)
    plain = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    x = plain.as_subclass(OnCuda)
    for change in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            before = layer.weight.clone(), layer._way
            with pytest.raises(RuntimeError, match=r"^CUDA graph: .*(cannot be captured|expected a pass)"):
                layer(x)
            assert torch.equal(layer.weight, before[0])
            assert layer._way is before[1]
        torch.testing.assert_close(layer(plain).detach(), expected(layer, plain).float(), rtol=1e-5, atol=1e-5)
        with monkeypatch.context() as patch, torch.set_grad_enabled(training):
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            if training and not (packed and numerics == "exact"):  # the pass before helps only who keeps no matrix
                with pytest.raises(RuntimeError, match="a layer in training cannot be captured"):
                    layer(x)
            else:
                assert torch.equal(layer(x), layer(plain))
        with torch.no_grad():
            layer.rigsa_values.mul_(2 + change)
