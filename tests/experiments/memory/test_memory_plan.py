"""The memory plan: against the allocator's own count of real steps, against itself, and the paper's run in 24 GB."""

import copy
import dataclasses
import gc
import json
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from texts import byte_tokenizer, write_jsonl
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from conftest import make_llama, make_tokenizer
from rigsa.errors import RigsaError
from rigsa.experiments.attach import attach
from rigsa.experiments.config import Config
from rigsa.experiments.kept import start_of_kept
from rigsa.experiments.memory.live_memory import LiveMemory
from rigsa.experiments.memory.plan import (
    GIB,
    SAME_SIGN_SHARE,
    Target,
    choices,
    expected_densities,
    plan_choosing,
    plan_levels,
    require_fit,
    usable,
)
from rigsa.experiments.memory.simulate import SimulatedModel
from rigsa.experiments.methods.gradient_masks import examples_at_a_time, score_entries
from rigsa.experiments.methods.hard_concrete import DiffGates
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.methods.ticket import PAPER_DENSITY
from rigsa.experiments.model import EMBEDDED, load_model, model_shape, quantize_linears, spare_the_head
from rigsa.experiments.presets import PRESETS, paper, quickstart
from rigsa.experiments.tasks.evaluation import training_loss
from rigsa.experiments.tasks.packing import pack
from rigsa.experiments.tasks.registry import load_task
from rigsa.experiments.tasks.task import Batch, Size, collate
from rigsa.experiments.train import make_optimizer, stepping_in_backward
from rigsa.masks import random_patterns
from rigsa.run import main, planned_densities
from rigsa_kernels import gated_linears
from rigsa_kernels.selection import adaptable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
SMOLLM2 = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
TICKET = 0.0346


def small_model(config: Config, shape: PretrainedConfig = SMALL) -> PreTrainedModel:
    dtype = getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation=config.attention, dtype=dtype)
    model.requires_grad_(False)
    spare_the_head(model)
    if config.quantize == "nf4":
        quantize_linears(model, CPU)
    return model


def train_two_steps(
    model: PreTrainedModel,
    config: Config,
    density: float,
    data: Size | Batch,
    accumulates: bool,
    attached: Callable[[], None] = lambda: None,
) -> None:
    """Marks the last micro-batch of the second step. `attached` is called once the adapter is on the model."""
    attach(model, config)
    attached()
    layers = gated_linears(model)
    if density < 1:
        shapes = {name: layer.pattern.shape for name, layer in layers.items()}
        counts = {name: round(density * layer.num_weights) for name, layer in layers.items()}
        patterns = random_patterns(shapes, counts, seed=0)
        while patterns:
            name, pattern = patterns.popitem()
            layers[name].set_pattern(pattern)
        del pattern
    optimizer = make_optimizer(model, config)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    batch = batch_of(data, config.micro_batch_size) if isinstance(data, Size) else data
    model.train()

    def update() -> None:
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()

    with stepping_in_backward(optimizer) if config.step_in_backward else nullcontext():
        training_loss(model, batch).backward()
        update()
        optimizer.zero_grad()
        if accumulates:
            training_loss(model, batch).backward()
        mark()
        training_loss(model, batch).backward()
        update()


def batch_of(size: Size, rows: int) -> Batch:
    """Rows of which the first is as long as `size` says and the others, if it says so, shorter."""
    lengths = [size.tokens - 3 * row if size.padded else size.tokens for row in range(rows)]
    return collate([{"input_ids": [0] * length, "targets": [0] * size.targets} for length in lengths], 0)


def mark() -> None:
    with record_function("measured from here"):
        pass


def allocated_peak(run: Callable[[], None]) -> int:
    """The most bytes that PyTorch's CPU allocator had given out after the mark, by its own count."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "measured from here")
    live = peak = 0
    for time, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        peak = max(peak, live) if time > start else 0
    return peak


@pytest.mark.parametrize("micro_batch", [1, 6])
def test_planned_peak_of_factors_that_learn_to_be_zero(micro_batch):
    """Where the update takes most, and where activations do. What one layer takes for the chain rule is not planned."""
    config = dataclasses.replace(paper("diff-pruning"), numerics="composed", micro_batch_size=micro_batch, batch_size=6)
    batch = {
        "input_ids": torch.zeros(micro_batch, 200, dtype=torch.int64),
        "targets": torch.zeros(micro_batch, 1).long(),
    }

    def two_steps() -> None:
        model, gates = small_model(config), DiffGates(config)
        attach(model, config)
        gates.put_on(model.train())
        optimizer = make_optimizer(model, config)
        for number in range(2):
            gates.draw(model, number)
            if number == 1:
                mark()
            training_loss(model, batch).backward()
            gates.hand_on(model, number)
            optimizer.step()
            optimizer.zero_grad()

    planned = SimulatedModel(SMALL, config, CPU, 1).training_step(Size(200), micro_batch, accumulates=False)
    assert planned.peak == pytest.approx(allocated_peak(two_steps), rel=0.05)


FLOAT32 = {"dtype": "float32", "values_dtype": "float32", "state_dtype": "float32"}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", FLOAT32),
        ("lora", {"checkpointing": True, "values_dtype": "bfloat16"}),
        ("qlora", {"attention": "eager"}),
        ("rosa", {"quantize": "nf4"}),
        ("rosa", {"loss": "all"}),
        ("full", {"step_in_backward": True, "max_grad_norm": 0.0, "batch_size": 4}),
        ("spiel", {"state_dtype": "int8"}),
        ("child-f", {}),
    ],
)
def test_planned_peak_of_every_kind_of_method(method, options):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    config = dataclasses.replace(paper(method), numerics="composed", micro_batch_size=4, **options)
    density, size = config.density or 1, Size(200, 200 if config.loss == "all" else 1)
    measured = allocated_peak(lambda: train_two_steps(small_model(config), config, density, size, False))
    planned = SimulatedModel(SMALL, config, CPU, density).training_step(size, 4, accumulates=False)
    assert planned.peak == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["imp", "lora"])
@pytest.mark.parametrize("size", [Size(200, 60, padded=True), Size(400, 390, padded=True)], ids=str)
def test_planned_peak_of_texts_of_unequal_length(size, method, attention):
    """Rows are filled up, so that there is an attention mask, and logits are those of the targets."""
    pytest.importorskip("peft")
    config = dataclasses.replace(paper(method), numerics="composed", micro_batch_size=4, attention=attention, **FLOAT32)
    measured = allocated_peak(lambda: train_two_steps(small_model(config), config, 1, size, True))
    planned = SimulatedModel(SMALL, config, CPU, 1).training_step(size, 4, accumulates=True)
    assert planned.peak == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_planned_peak_of_packed_rows(attention):
    """Every row holds two texts, so that as many rows as there may be have a mask of blocks."""
    config = dataclasses.replace(
        paper("imp"), numerics="composed", micro_batch_size=4, attention=attention, packing=True, **FLOAT32
    )
    texts = [{"input_ids": [0] * length, "targets": [0] * 9} for length in (250, 130, 130, 130, 120, 120, 110)]
    batch = pack(texts, 0)
    assert batch["input_ids"].shape == (4, 250)
    measured = allocated_peak(lambda: train_two_steps(small_model(config), config, 1, batch, True))
    size = Size(250, 60, padded=True, packed=True)
    planned = SimulatedModel(SMALL, config, CPU, 1).training_step(size, 4, accumulates=True)
    assert planned.peak == pytest.approx(measured, rel=0.03)


def test_a_plan_refuses_patterns_that_name_nothing():
    config = dataclasses.replace(paper("imp"), keep_trainable="model.nrm")
    with pytest.raises(RigsaError, match=r"--keep-trainable: 'model.nrm' names no parameter and no module"):
        SimulatedModel(SMALL, config, CPU, 1)


def test_planned_peak_for_a_file(tmp_path):
    """What `plan --data FILE` goes by is the largest batch that the file can make."""
    lines = [{"prompt": f"{n} " * 60, "completion": "so " * (10 + n)} for n in range(100, 150)]
    config = dataclasses.replace(
        paper("imp"), numerics="composed", micro_batch_size=4, data=str(write_jsonl(tmp_path / "texts.jsonl", lines)),
        **FLOAT32,
    )  # fmt: skip
    task = load_task(config)
    task.meet(byte_tokenizer(), None)
    samples = task.training()
    longest = sorted(samples, key=lambda sample: len(sample["input_ids"]))[-4:]
    batch = samples.collate(longest)
    assert "attention_mask" in batch
    shape = copy.deepcopy(SMALL)
    shape.vocab_size = 280
    measured = allocated_peak(lambda: train_two_steps(small_model(config, shape), config, 1, batch, True))
    planned = SimulatedModel(shape, config, CPU, 1).training_step(task.size(), 4, accumulates=True)
    assert planned.peak == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("method", ["imp", "lora"])
def test_planned_peak_with_parameters_that_are_kept_trainable(method):
    pytest.importorskip("peft")
    config = dataclasses.replace(
        paper(method), numerics="composed", micro_batch_size=4, keep_trainable="model.embed_tokens,*norm*", **FLOAT32
    )
    size, held = Size(100), []

    def two_steps() -> None:
        model = small_model(config)
        train_two_steps(model, config, 1, size, False, lambda: held.append(start_of_kept(model)))

    measured = allocated_peak(two_steps)
    planned = SimulatedModel(SMALL, config, CPU, 1).training_step(size, 4, accumulates=False)
    assert planned.peak == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("method", "options"), [
    ("sift", FLOAT32), ("sam", {"checkpointing": True}), ("rosa", {}), ("snip", {}), ("spruft", {}), ("grasp", FLOAT32),
    ("grasp", {"checkpointing": True, "attention": "eager"}),
])  # fmt: skip
def test_planned_peak_of_choosing_a_mask(method, options):
    pytest.importorskip("peft")
    config = dataclasses.replace(paper(method), micro_batch_size=4, numerics="composed", **options)
    score = METHODS[method].score
    images = examples_at_a_time(score, config)

    def choose() -> None:
        model = small_model(config)
        attach(model, config)
        batch = {"input_ids": torch.zeros(images, 200, dtype=torch.int64), "targets": torch.zeros(images, 1).long()}
        score_entries(model, score, [batch], len(batch["input_ids"]))
        mark()
        score_entries(model, score, [batch], len(batch["input_ids"]))

    planned = SimulatedModel(SMALL, config, CPU, 1).scoring_pass(score, Size(200))
    assert planned.peak == pytest.approx(allocated_peak(choose), rel=0.03)


MIXTRAL = MixtralConfig(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=256, n_embd=128, n_layer=2, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=None
)


@pytest.mark.parametrize(
    ("shape", "density", "options"), [(GPT2, 1, FLOAT32), (GPT2, 0.05, {}), (MIXTRAL, 1, FLOAT32), (MIXTRAL, 0.05, {})]
)
def test_planned_peak_of_weights_that_code_reads(shape, density, options):
    """Experts that are one parameter, and Conv1D: their composed weights are kept, and their whole gradients made."""
    config = dataclasses.replace(paper(), numerics="composed", micro_batch_size=4, **options)
    planned = SimulatedModel(shape, config, CPU, density)
    peak = planned.training_step(Size(200), 4, accumulates=False).peak
    model = small_model(config, shape)
    assert planned.num_weights == sum(adaptable(model).values())
    del model
    measured = allocated_peak(lambda: train_two_steps(small_model(config, shape), config, density, Size(200), False))
    assert peak == pytest.approx(measured, rel=0.03)


def test_a_mask_that_cannot_be_chosen_is_refused_with_options_that_help():
    target = Target(SMALL, dataclasses.replace(paper("sift"), micro_batch_size=16), CUDA, Size(200))
    choosing, training = plan_choosing(target), plan_levels(target, {1: TICKET})[0].peak
    assert choosing > training
    assert require_fit(target, {1: TICKET}, choosing / usable(1))
    with pytest.raises(RigsaError, match=r"choosing the mask is planned to need .* fit in .* --micro-batch-size 1\.$"):
        require_fit(target, {1: TICKET}, 0.99 * choosing / usable(1))
    narrow = dataclasses.replace(target, config=dataclasses.replace(target.config, micro_batch_size=1))
    with pytest.raises(RigsaError, match="--micro-batch-size 1 --checkpointing"):
        require_fit(narrow, {1: TICKET}, 0.99 * plan_choosing(narrow) / usable(1))
    least = dataclasses.replace(target, size=Size(20), config=dataclasses.replace(target.config, micro_batch_size=1))
    limit = (plan_levels(least, {1: TICKET})[0].peak + 1) / usable(1)  # a byte more, for what division rounds away
    with pytest.raises(RigsaError, match=r"choosing the mask .* Nothing that a run can choose makes it fit"):
        require_fit(least, {1: TICKET}, limit)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_planned_density_of_a_low_rank_adapter(method):
    pytest.importorskip("peft")
    weights = 3 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 384)
    sides = 3 * ((128 + 128) * 2 + (64 + 128) * 2 + 3 * (128 + 384))
    assert expected_densities(SMALL, paper(method)) == {0: pytest.approx(16 * sides / weights, rel=1e-12)}


@pytest.mark.parametrize(
    ("density", "accumulates", "options"),
    [
        (1, False, FLOAT32 | {"attention": "eager"}),
        (0.64, True, FLOAT32 | {"loss": "all"}),
        (1, True, {"values_dtype": "float32", "state_dtype": "float32", "attention": "eager"}),
        (1, False, {"checkpointing": True}),
        (1, False, {"step_in_backward": True, "max_grad_norm": 0.0, "batch_size": 4}),
        (0.64, True, {"quantize": "nf4"}),
        (TICKET, False, {"checkpointing": True}),
        (0.005, False, {"checkpointing": True}),
        (0.05, False, FLOAT32 | {"checkpointing": True}),
        (TICKET, True, {"state_dtype": "int8"}),
    ],
    ids=str,
)
def test_planned_peak_is_the_allocators_within_three_per_cent(density, accumulates, options):
    config = dataclasses.replace(paper(), numerics="composed", micro_batch_size=4, **options)
    if config.quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    measured = allocated_peak(lambda: train_two_steps(small_model(config), config, density, Size(200), accumulates))
    planned = SimulatedModel(SMALL, config, CPU, density).training_step(Size(200), 4, accumulates=accumulates)
    assert planned.peak == pytest.approx(measured, rel=0.03)
    assert sum(planned.by_part.values()) == planned.peak


@pytest.mark.model
def test_planned_peak_of_the_quickstart_is_the_allocators_within_three_per_cent():
    config = dataclasses.replace(quickstart(device="cpu"), device="cpu")
    loaded, _ = load_model(config, CPU)
    # A copy, as float32 weights lie where the GGUF reader put them, which the allocator does not count.
    measured = allocated_peak(lambda: train_two_steps(copy.deepcopy(loaded), config, 1, Size(93), False))
    planned = SimulatedModel(model_shape(EMBEDDED), config, CPU, 1).training_step(Size(93), 8, accumulates=False)
    assert planned.peak == pytest.approx(measured, rel=0.03)


def test_live_memory_counts_what_lives_and_names_it_afterwards():
    held = torch.zeros(1024)
    memory = LiveMemory()
    memory.hold("weights", [held])
    with memory:
        first = held + 1
        second = first * 2  # 3 * 4096 bytes are live
        memory.hold("adapter", [second])
        del first
        third = second + 1  # and again
        view = third[10:]
        memory.hold_rest("activations")
    del second
    usage = memory.usage()
    assert usage.curves.sum(axis=0).tolist() == [4096, 8192, 12288, 12288]
    assert usage.curves[:, -1].tolist() == [4096, 4096, 0, 0, 4096, 0]
    assert usage.peak == 12288
    assert view.numel() == 1014


def test_live_memory_counts_what_an_operator_takes_and_gives_back():
    """Before its result is there, and for that moment alone."""
    memory = LiveMemory(lambda operator, arguments: 1000 if operator is torch.ops.aten.mul.Tensor else 0)
    with memory:
        first = torch.zeros(1024)
        second = first * 2
        third = second + 1
    assert memory.usage().by_part["workspace"] == memory.usage().peak == 3 * 4096
    assert memory.usage().curves.sum(axis=0).tolist() == [4096, 4096 + 1000, 2 * 4096, 3 * 4096]
    del first, second, third


def test_growth_tells_every_micro_batch_from_two():
    config = dataclasses.replace(paper(), checkpointing=True)
    target = Target(SMALL, config, CUDA, Size(200))
    found = {
        (choice.state_dtype, choice.quantize): choice for choice in choices(target, {0: 1.0}) if choice.checkpointing
    }
    for options in (("bfloat16", "none"), ("int8", "nf4")):
        growth = found[options].growth[0]
        model = target.model(1.0, state_dtype=options[0], quantize=options[1])
        for prompts in (1, 7):
            assert growth.at(prompts).peak == pytest.approx(
                model.training_step(Size(200), prompts, accumulates=True).peak, rel=1e-3
            )
        limit = growth.at(40).peak
        assert growth.largest(limit) == 40
        assert growth.largest(limit - 1) == 39
        assert growth.largest(growth.at(1).peak - 1) == 0


def test_a_method_is_offered_only_the_bases_that_it_takes():
    found = {
        method: {choice.quantize for choice in choices(Target(SMALL, paper(method), CUDA, Size(200)), {0: 1.0})}
        for method in ("imp", "full")
    }
    assert found == {"imp": {"none", "nf4"}, "full": {"none"}}


def test_a_gpu_keeps_no_matrix_and_no_index_lists():
    """The fused kernels need none at level 0; the gemm path keeps one. A ticket keeps W0 at the free entries, and
    PyTorch on a CPU lists of positions."""

    def adapter(device: torch.device, density: float, **options: str) -> int:
        config = dataclasses.replace(paper(), numerics="composed", **options)
        usage = SimulatedModel(SMALL, config, device, density).training_step(Size(200), 2, accumulates=False)
        return usage.by_part["adapter"]

    weights = 3 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 384)
    gates = 21 * 512
    assert adapter(CUDA, 1) == 2 * weights + gates
    assert adapter(CPU, 1) == 4 * weights + gates
    assert adapter(CUDA, 1, **FLOAT32) == 8 * weights + gates
    packed = adapter(CUDA, 0.25)
    assert packed == pytest.approx((0.25 * (2 + 2) + 6 / 32) * weights, rel=0.1)
    assert adapter(CPU, 0.25) == pytest.approx(packed + 0.25 * 8 * weights, rel=0.01)


@pytest.fixture(scope="module")
def smollm2() -> PretrainedConfig:
    return model_shape(SMOLLM2)


def peak_gib(shape: PretrainedConfig, density: float, prompts: int, **options: object) -> float:
    model = SimulatedModel(shape, dataclasses.replace(paper(), **options), CUDA, density)
    return model.training_step(Size(860), prompts, accumulates=True).peak / GIB


def test_the_papers_run_fits_24_gb_with_room(smollm2):
    """SmolLM2-1.7B, prompts of 860 tokens (the paper fitted one at a time). Planned, not measured on a GPU."""
    assert peak_gib(smollm2, 1, 1) < 18
    assert peak_gib(smollm2, 1, 4, checkpointing=True) < 20
    assert peak_gib(smollm2, 1, 16, checkpointing=True, state_dtype="int8") < 20
    assert peak_gib(smollm2, TICKET, 8) < 22
    assert peak_gib(smollm2, TICKET, 32, checkpointing=True) < 22
    assert peak_gib(smollm2, TICKET, 1, checkpointing=True) < 5


def test_gradients_consumed_in_backward_take_one_layer(smollm2):
    options = {"max_grad_norm": 0.0, "micro_batch_size": 16, "checkpointing": True}
    config = dataclasses.replace(paper(), **options)
    kept, consumed = (
        SimulatedModel(smollm2, dataclasses.replace(config, step_in_backward=flag), CUDA, 1)
        .training_step(Size(860), 2, accumulates=False)
        .curves.sum(axis=0)
        .max()
        for flag in (False, True)
    )
    assert kept - consumed > 0.9 * 2 * 1_610_612_736


def test_smollm2_is_known_without_a_network():
    weights = {}
    for size in ("135M", "360M", "1.7B"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_shape(f"HuggingFaceTB/SmolLM2-{size}-Instruct"))
        weights[size] = sum(parameter.numel() for parameter in model.parameters())
    assert weights == {"135M": 134_515_008, "360M": 361_821_120, "1.7B": 1_711_376_384}


def test_densities_fall_as_the_paper_has_it():
    densities = expected_densities(SMALL, paper())
    assert list(densities) == [0, 1, 2, 3, 4]
    assert densities[4] == pytest.approx(0.0346, abs=1e-4)
    assert list(expected_densities(SMALL, paper("random-mask")).items()) == [(4, densities[4])]
    asked = expected_densities(SMALL, dataclasses.replace(paper(), density=0.0625, keep_fraction=0.0))
    assert list(asked.items()) == [(0, 1), (1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]


def test_a_plan_that_cannot_fit_is_refused_with_one_that_would():
    target = Target(SMALL, dataclasses.replace(paper(), micro_batch_size=16), CUDA, Size(200))
    need = plan_levels(target, {0: 1.0})[0].peak
    assert require_fit(target, {0: 1.0}, need / usable(1))[0].peak == need
    with pytest.raises(RigsaError, match=r"level 0 is planned to need .* GiB; expected at most .*It would fit in "):
        require_fit(target, {0: 1.0}, 0.9 * need)
    with pytest.raises(RigsaError, match="--micro-batch-size 8"):
        require_fit(target, {0: 1.0}, 0.99 * need)
    with pytest.raises(RigsaError, match="Nothing that a run can choose makes it fit"):
        require_fit(target, {0: 1.0}, 1000)


@pytest.fixture
def run_options(small_model_folder) -> list[str]:  # type: ignore[no-untyped-def]
    return [
        "--model", str(small_model_folder), "--preset", "smoke", "--dtype", "float32", "--device", "cpu",
        "--prunings", "1", "--test-examples", "20", "--train-examples", "40", "--values-dtype", "bfloat16",
        "--state-dtype", "int8", "--max-grad-norm", "0", "--micro-batch-size", "4", "--alpha-learning-rate", "0.1",
    ]  # fmt: skip


def test_a_run_that_cannot_fit_writes_nothing(run_options, tmp_path, capsys):
    assert main(["imp", *run_options, "--gpu-memory", "0.0001", "--out", str(tmp_path / "run")]) == 1
    assert "is planned to need" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_checkpointing_and_stepping_in_backward_change_no_bit(run_options, tmp_path):
    results = {}
    for name in ("ordinary", "checkpointing", "step-in-backward"):
        run = tmp_path / name
        flags = [] if name == "ordinary" else [f"--{name}"]
        assert main(["imp", *run_options, *flags, "--out", str(run)]) == 0
        lines = [(run / f"level_{level}" / "log.jsonl").read_text().splitlines() for level in (0, 1)]
        losses = [json.loads(line)["loss"] for level in lines for line in level]
        adapters = [(run / f"level_{level}" / "adapter.safetensors").read_bytes() for level in (0, 1)]
        results[name] = losses, adapters
    assert results["checkpointing"] == results["ordinary"]
    assert results["step-in-backward"] == results["ordinary"]


def test_plan_command_prints_and_writes_the_plan(small_model_folder, tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = ["plan", "--model", str(small_model_folder), "--gpu-memory", "2", "--tokens", "100", "--prunings", "2"]
    assert main([*command, "--method", "imp", "--json", str(file)]) == 0
    text, record = capsys.readouterr().out, json.loads(file.read_text())
    assert "planned, not measured" in text
    assert "Largest micro-batch" in text
    assert [level["level"] for level in record["levels"]] == [0, 1, 2]
    assert all(sum(level["bytes"].values()) == level["peak_bytes"] for level in record["levels"])
    assert len(record["largest_micro_batch"]) == 2 * 6  # NF4 cannot hold rows of 48 weights


@pytest.mark.parametrize("preset", ["paper", "quickstart"])
@pytest.mark.parametrize("control", ["random-mask", "reinit"])
def test_a_control_is_planned_as_dense_as_the_ticket_of_its_preset(control, preset, small_model_folder, capsys):
    def planned(method: str, **options: int) -> list[tuple[int, float]]:
        config = dataclasses.replace(PRESETS[preset](method, "cuda"), **options)
        return list(planned_densities(Target(SMALL, config, CUDA, Size(20)), preset, SAME_SIGN_SHARE).items())

    _, *tickets = planned("imp")
    assert tickets[-1][1] == pytest.approx(PAPER_DENSITY, rel=1e-3)
    assert planned(control) == tickets[-1:]
    assert planned(control, match_level=1) == tickets[:1]
    shape = ["plan", "--preset", preset, "--model", str(small_model_folder), "--tokens", "20"]
    assert main([*shape, "--method", control, "--match-level", f"{len(tickets) + 1}"]) == 1
    expected = f"--match-level: expected at most {len(tickets)}, the last ticket of preset {preset}, got"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: expected 1 to 1,000,000, got 0"),
        (["--gpu-memory", "nan"], "--gpu-memory: expected more than 0 and at most 1,000,000, got nan"),
        (["--same-sign-share", "2"], "--same-sign-share: expected more than 0 and at most 1, got 2.0"),
        (["--model", "nobody/nothing"], "--model nobody/nothing: its configuration cannot be loaded"),
    ],
)
def test_a_plan_of_nonsense_is_refused(arguments, message, capsys):
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trained", "level"), [(["imp", "--prunings", "0"], 0), (["random-mask", "--density", "0.2", "--tile", "5x4"], 1)]
)
def test_nf4_base_trains_and_resumes(trained, level, tmp_path):
    """Half a byte a weight; what is trained, all entries or a ticket of tiles, is saved and loaded beside it."""
    pytest.importorskip("bitsandbytes")
    make_llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    command = [
        *trained, "--model", str(tmp_path / "model"), "--preset", "smoke", "--device", "cpu", "--quantize", "nf4",
        "--test-examples", "10", "--train-examples", "20", "--max-steps", "2", "--out",
        str(tmp_path / "run"), "--numerics", "auto",
    ]  # fmt: skip
    assert main(command) == 0
    finished = (tmp_path / "run" / f"level_{level}" / "adapter.safetensors").read_bytes()
    (tmp_path / "run" / f"level_{level}" / "done").unlink()
    assert main(command) == 0
    assert (tmp_path / "run" / f"level_{level}" / "adapter.safetensors").read_bytes() == finished


def test_nf4_refuses_a_layer_it_cannot_hold(small_model_folder, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    command = ["imp", "--model", str(small_model_folder), "--preset", "smoke", "--device", "cpu", "--quantize", "nf4"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 1
    assert "--quantize nf4: model.layers.0.mlp.down_proj cannot be kept in 4 bits" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
