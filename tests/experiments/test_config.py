import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rigsa.errors import RigsaError
from rigsa.experiments import hardware, run_plan
from rigsa.experiments.comparison import equal_budget
from rigsa.experiments.config import (
    OPTIONS,
    Base,
    Choosing,
    Config,
    Gates,
    Identity,
    LowRank,
    Measuring,
    Pruning,
    Tickets,
    Training,
    fields_of,
)
from rigsa.experiments.config_file import check_folder, load, save
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.methods.ticket import PAPER_DENSITY
from rigsa.experiments.presets import PRESETS, arguments_of, paper
from rigsa.experiments.sweep_plan import plan_sweep
from rigsa.experiments.train import steps_per_level
from rigsa.run import build_parser, configure, main, resolve


def parse(*arguments: str) -> Config:
    return resolve(build_parser().parse_args(arguments))


def test_paper_preset_is_the_papers_configuration_field_for_field():
    assert paper().record() == {
        "method": "imp", "seed": 0,
        "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct", "data": "mnist", "format": "auto", "validation_share": 0.1,
        "max_length": 0, "include": "*", "exclude": "", "device": "auto", "dtype": "bfloat16",
        "quantize": "none", "attention": "sdpa", "system_prompt": "default",
        "gate": "layer", "alpha_init": 1e-6, "init_scale": 1.0, "values_dtype": "bfloat16", "state_dtype": "bfloat16",
        "numerics": "auto",
        "prunings": 4, "keep_fraction": 0.8, "criterion": "rigsa", "rewind": "init",
        "rewind_step": 0, "early_bird_steps": 0, "early_bird_distance": 0.1, "ranking": "layer",
        "scale_rates": False, "ticket_learning_rate": 0.0, "ticket_alpha_learning_rate": 0.0,
        "match": "", "match_level": 0, "init_seed": -1, "density": 0.0, "gradient_share": 0.3, "l0_penalty": 1.25e-7,
        "mask_examples": 64, "tile": "", "super_rank": "largest", "reselect_steps": 20, "reselect_share": 0.2,
        "rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.0,
        "keep_trainable": "", "loss": "answer", "group_by_length": False, "packing": False,
        "epochs": 1, "max_steps": 0, "batch_size": 16, "micro_batch_size": 1,
        "checkpointing": False, "step_in_backward": False,
        "learning_rate": 2e-3, "alpha_learning_rate": 2e-3, "warmup_steps": 1000,
        "weight_decay": 1.0, "alpha_weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "max_grad_norm": 1.0,
        "train_examples": 0, "test_examples": 0, "eval_shots": "0,5", "eval_batch_size": 16,
        "score": "none", "answer_tokens": 256,
        "drift": True, "drift_prompts": 24, "source_tasks": "piqa,hellaswag,gsm8k", "data_dir": "", "limit": 0,
        "logging_steps": 10, "checkpoint_steps": 100,
    }  # fmt: skip


def test_low_rank_paper_preset_is_table_4():
    config = paper("qlora")
    table = {"quantize": "nf4", "rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "learning_rate": 2e-4}
    table |= {"warmup_steps": 1000, "weight_decay": 0.1, "batch_size": 16, "epochs": 4}
    assert {name: getattr(config, name) for name in table} == table
    assert dataclasses.replace(config, method=METHODS["lora"], quantize="none") == paper("lora")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_every_preset_and_its_options(method, preset):
    config = parse(method, "--preset", preset, *(["--match", "runs/x"] if METHODS[method].matches else []))
    assert config.method.name == method
    for name in OPTIONS:
        if not config.method.reads(name):
            assert getattr(config, name) == getattr(PRESETS[preset](method), name)
    from_zero = method in (
        "lt-sft",
        "diff-pruning",
        "sift",
        "fisher",
        "child-d",
        "child-f",
        "sam",
        "super",
        "smt",
        "spruft",
        "rosa",
        "spiel",
        "full",
    )
    assert (config.gate == "none") == (config.init_scale == 0) == from_zero


def test_every_field_is_in_one_group_and_read_by_a_method():
    groups = [
        set(fields_of(group))
        for group in (Identity, Base, Gates, Pruning, Tickets, Choosing, LowRank, Training, Measuring)
    ]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(OPTIONS)
    for name in OPTIONS:
        assert any(method.reads(name) for method in METHODS.values()), name
    for method in METHODS.values():
        assert set(method.options) <= OPTIONS.keys()
        assert set(method.usual) | set(method.quickstart) <= {name for name in OPTIONS if method.reads(name)}, method


def test_paper_preset_makes_the_papers_steps():
    """59,400 images in batches of 16 (PAPER, 4.4)."""
    assert steps_per_level(paper(), 59_400) == 3_712


def test_paper_preset_prints_without_a_model(capsys):
    assert main(["imp", "--preset", "paper", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == paper().record()


def test_bare_command_is_the_quickstart():
    assert parse("imp") == PRESETS["quickstart"]("imp")


@pytest.mark.parametrize("fast", [True, False])
def test_quickstart_takes_the_faster_dtype_of_its_device(fast, monkeypatch):
    monkeypatch.setattr(hardware.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast, raising=False)
    monkeypatch.setattr(hardware.torch.backends.mkldnn, "is_available", lambda: True)
    usual = "bfloat16" if fast else "float32"
    for preset in ("quickstart", "smoke"):
        assert parse("imp", "--preset", preset, "--device", "cpu").dtype == usual
        assert PRESETS[preset]("imp", "cuda").dtype == "bfloat16"
    assert parse("imp", "--device", "cpu", "--dtype", "bfloat16").dtype == "bfloat16"
    assert parse("imp", "--preset", "paper", "--device", "cpu").dtype == "bfloat16"
    for options in ({}, {"device": "cuda"}):
        monkeypatch.setattr(hardware.torch.cuda, "is_available", lambda: True)
        (job,) = plan_sweep("imp", "0", [], preset="smoke", options=options, out=Path("runs/x")).jobs
        assert job.config.dtype == "bfloat16"
    (job,) = plan_sweep("imp", "0", [], preset="smoke", options={"device": "cpu"}, out=Path("runs/x")).jobs
    assert job.config.dtype == usual
    assert arguments_of(job.config, "smoke") == ["--device=cpu"]


@pytest.mark.parametrize(
    ("given", "dtype"), [([], "bfloat16"), (["--device", "auto"], "bfloat16"), (["--device", "cpu"], "float32")]
)
def test_a_plan_for_a_gpu_has_its_dtype_wherever_it_is_made(given, dtype, monkeypatch):
    monkeypatch.setattr(hardware, "has_bfloat16_products", lambda device: device == "cuda")
    options = build_parser().parse_args(["plan", "--preset", "quickstart", *given])
    assert configure(options, device="cuda").dtype == dtype


@pytest.mark.parametrize("fast", [True, False])
def test_who_asks_for_slow_products_is_told(fast, monkeypatch):
    monkeypatch.setattr(run_plan, "has_bfloat16_products", lambda device: fast)
    for dtype in ("bfloat16", "float32"):
        experiment = SimpleNamespace(
            config=dataclasses.replace(paper(), dtype=dtype), model=SimpleNamespace(device=torch.device("cpu"))
        )
        assert ("--dtype float32" in run_plan._slow(experiment)) == (dtype == "bfloat16" and not fast)


@pytest.mark.parametrize("field", OPTIONS.values(), ids=OPTIONS)
def test_every_field_can_be_overridden(field):
    other = {"float32": "bfloat16", "bfloat16": "float32", "auto": "exact", "layer": "global", "answer": "all"}
    other |= {"largest": "smallest", "rigsa": "movement", "init": "random_reinit"}
    value = {str: other.get(field.default, "0,1,2"), int: 10, float: 0.5, bool: True}[type(field.default)]
    value = {
        "micro_batch_size": 8,
        "device": "cpu",
        "gate": "model",
        "quantize": "nf4",
        "format": "text",
        "tile": "16x32",
        "validation_share": 0.2,
        "score": "exact",
    }.get(field.name, value)
    needs = {"step_in_backward": ["--max-grad-norm", "0", "--micro-batch-size", "16"]}.get(field.name, [])
    method = next(method.name for method in METHODS.values() if method.reads(field.name))
    option = f"--{field.name.replace('_', '-')}"
    value = not field.default if type(field.default) is bool else value
    given = [option if value else f"--no-{option[2:]}"] if type(value) is bool else [option, str(value)]
    config = parse(method, "--preset", "paper", *given, *needs)
    assert getattr(config, field.name) == value


def test_numbers_of_steps_are_capped_and_need_a_batch():
    assert steps_per_level(dataclasses.replace(paper(), max_steps=7), 59_400) == 7
    assert steps_per_level(dataclasses.replace(paper(), epochs=2), 40) == 4
    with pytest.raises(RigsaError, match="--batch-size 16: there are only 15 training examples"):
        steps_per_level(paper(), 15)


@pytest.mark.parametrize(
    ("command", "argument", "hint"),
    [
        (["imp"], "--learning-rat=1", " (did you mean --learning-rate?)"),
        (["imp"], "--dryrun", " (did you mean --dry-run?)"),
        (["imp"], "--turbo", ""),
        (["imp"], "--levels=3", ""),
        (["chat", "RUN"], "--modell=x", ""),  # it has no --model
        (["chat", "RUN"], "--levels=3", " (did you mean --level?)"),
    ],
)
def test_unknown_options_are_refused_and_a_close_one_of_the_command_is_named(command, argument, hint, capsys):
    assert main([*command, argument]) == 1
    expected = f"rigsa: unrecognized arguments: {argument}{hint}; see rigsa {command[0]} --help\n"
    assert capsys.readouterr().err == expected


def test_the_help_of_a_command_opens_with_its_line_in_the_list_of_commands(capsys):
    with pytest.raises(SystemExit):
        main(["lora", "--help"])
    assert "\nLow-rank adapters of PEFT on the same layers (Hu et al. 2022).\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("imp", ["--match=runs/x"], "--match: imp does not read it; it is for random-mask, reinit"),
        ("spiel", ["--tile", "32"], "--tile: spiel does not read it; it is for imp, random-mask, erk, snip, "),
        ("lora", ["--rank", "4", "--density", "0.1"], "--density: lora does not read it; it is for imp, "),
    ],
)
def test_an_option_of_other_methods_is_one_sentence(method, given, message, capsys):
    assert main([method, *given]) == 1
    assert message in capsys.readouterr().err
    if given[0] != "--match=runs/x":  # which no plan has
        assert main(["plan", "--method", method, *given]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imp", "--preset", "quickstrat"], "--preset: expected one of paper, quickstart, smoke, got 'quickstrat'"),
        (["imp", "--dtype", "float23"], "--dtype: expected one of float32, bfloat16, got 'float23'"),
        (["imp", "--seed", "one"], "--seed: expected a whole number, 0 to 2**63 - 1, got 'one'"),
        (["imp", "--seed"], "--seed: expected one argument; see rigsa imp --help"),
        (["plan", "--method", "shira"], "--method: expected one of imp, random-mask, "),
        (["sweep"], "the following arguments are required: --methods; see rigsa sweep --help"),
        (["compare", "--methods", "imp", "--equal", "x"], "--equal: expected one of steps, parameters, got 'x'"),
        (["imq"], "COMMAND: invalid choice: 'imq' (choose from "),
        ([], "the following arguments are required: COMMAND; see rigsa --help"),
        (["export", "nothere", "--to", "merged"], "nothere: no such run folder"),
        (["export", "nothere", "--to", "pickle"], "--to: expected one of supertuning, "),
        (["chat", "nothere"], "nothere: no such run folder"),
        (["merge", "nothere", "--out", "there"], "nothere: no such run folder"),
        (["report", "nothere"], "nothere: no such run folder"),
        (["inspect", "nothere"], "nothere: no such folder"),
    ],
)
def test_a_mistyped_command_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"rigsa: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-fraction", "1.5"], "--keep-fraction: expected 0 to 1, got 1.5"),
        (["--micro-batch-size", "5"], "--micro-batch-size: expected a divisor of the batch size 8, got 5"),
        (["--learning-rate", "nan"], "--learning-rate: expected more than 0 and at most 1,000, got nan"),
        (["--checkpoint-steps", "15"], "--checkpoint-steps: expected a multiple of the 10 logging steps, got 15"),
        (["--eval-shots", "0;5"], "--eval-shots: expected numbers from 0 to 999,999 separated by commas, got 0;5"),
        (["--seed", "-1"], "--seed: expected 0 to"),
        (["--step-in-backward"], "--step-in-backward: no whole gradient ever exists to be clipped or added to"),
        (
            ["--step-in-backward", "--max-grad-norm", "0", "--micro-batch-size", "4"],
            "and --micro-batch-size 8 (the batch",
        ),
        (["--init-scale", "0", "--alpha-init", "0"], "--init-scale 0 and --alpha-init 0: no gradient ever leaves zero"),
        (["--beta2", "1"], "--beta2: expected 0 or more and less than 1, got 1.0"),
    ],
)
def test_values_out_of_range_are_named(arguments, message, capsys):
    assert main(["imp", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("sift", ["--density", "0"], "--density: expected more than 0 for sift, got 0.0"),
        ("qlora", ["--quantize", "none"], "--quantize: expected nf4 for qlora, got none"),
        ("lora", ["--quantize", "nf4"], "--quantize: expected none for lora, got nf4"),
        ("full", ["--quantize", "nf4"], "--quantize: expected none for full, got nf4"),
        ("imp", ["--density", "0.1", "--prunings", "0"], "--density: expected 0 with --prunings 0, as only"),
        ("snip", ["--init-scale", "0"], "--init-scale 0: every score of snip would be 0"),
        ("grasp", ["--alpha-init", "0"], "--alpha-init 0: every score of grasp would be 0"),
        ("erk", ["--density", "0"], "--density: expected more than 0 for erk, got 0.0"),
        ("reinit", ["--init-seed", "-2"], "--init-seed: expected -1 to 2**63 - 1, got -2"),
        ("child-f", ["--gradient-share", "0"], "--gradient-share: expected more than 0 and at most 1, got 0.0"),
        ("child-f", ["--step-in-backward", "--max-grad-norm", "0"], "--step-in-backward: expected no for child-f"),
        ("diff-pruning", ["--step-in-backward", "--max-grad-norm", "0"], "--step-in-backward: expected no for diff-pr"),
        ("lora", ["--rank", "0"], "--rank: expected 1 to 65,536, got 0"),
        ("lora", ["--lora-dropout", "1"], "--lora-dropout: expected 0 or more and less than 1, got 1.0"),
        ("spiel", ["--reselect-share", "1"], "--reselect-share: expected more than 0 and less than 1, got 1.0"),
    ],
)
def test_what_a_method_needs_is_named(method, arguments, message, capsys):
    assert main([method, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_folder_of_another_configuration_is_refused_with_the_difference(tmp_path):
    config = paper()
    check_folder(config, tmp_path / "new")
    save(config, tmp_path)
    check_folder(config, tmp_path)
    assert load(tmp_path) == config
    with pytest.raises(RigsaError, match=r"another configuration(.|\n)*--seed: 0 there, 1 now"):
        check_folder(dataclasses.replace(config, seed=1), tmp_path)


def test_folders_that_are_no_run_are_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RigsaError, match="is not a run folder and not empty"):
        check_folder(paper(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RigsaError, match=r"config.json is damaged \(not JSON"):
        check_folder(paper(), tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    for read in (load, lambda folder: check_folder(paper(), folder)):
        with pytest.raises(RigsaError, match=r"config.json is damaged \(expected a JSON object, got \[1\]\)"):
            read(tmp_path)
    (tmp_path / "config.json").write_text('{"method": "imp", "eval_shots": 5}')
    with pytest.raises(RigsaError, match="--eval-shots: expected a str, got 5"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"method": "imp", "turbo": 1}')
    with pytest.raises(RigsaError, match="does not fit this version of rigsa"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # the folder of a model
    with pytest.raises(RigsaError, match=r"config\.json is not the configuration of a run: it names no method"):
        load(tmp_path)
    for name in ('"turbo"', "[]", "null"):
        (tmp_path / "config.json").write_text(f'{{"method": {name}}}')
        with pytest.raises(
            RigsaError, match=r"does not fit this version of rigsa: method: expected one of imp, .*, got"
        ):
            load(tmp_path)


def test_initial_values_of_the_control_have_another_seed():
    assert parse("reinit", "--seed", "3").values_seed == 1_000_003
    assert parse("reinit", "--seed", "3", "--init-seed", "0").values_seed == 0
    assert parse("imp", "--seed", "3").values_seed == 3
    assert parse("reinit", "--seed", "3").match == "runs/imp-quickstart-seed3"
    with pytest.raises(RigsaError, match="--match-level and --density: give one of them"):
        parse("random-mask", "--density", "0.1", "--match-level", "1")


def rates(config: Config, level: int, density: float) -> tuple[float, float]:
    found = config.at_level(level, density)
    assert dataclasses.replace(
        found, learning_rate=config.learning_rate, alpha_learning_rate=config.alpha_learning_rate
    ) == config  # fmt: skip
    return found.learning_rate, found.alpha_learning_rate


def test_a_ticket_trains_by_rates_of_its_own_where_it_has_some():
    options = ["--learning-rate", "0.1", "--alpha-learning-rate", "0.2", "--no-scale-rates"]
    assert rates(parse("imp", *options), 1, 0.25) == (0.1, 0.2)
    assert rates(parse("imp", *options, "--ticket-learning-rate", "0.3"), 1, 0.25) == (0.3, 0.2)
    assert rates(parse("imp", *options, "--ticket-alpha-learning-rate", "0.3", "--scale-rates"), 1, 0.25) == (0.2, 0.3)


def test_the_rates_of_a_ticket_grow_with_the_square_root_of_what_is_pruned():
    options = ["--learning-rate", "0.1", "--alpha-learning-rate", "0.2"]
    config = parse("imp", *options)
    assert rates(config, 0, 1.0) == (0.1, 0.2)
    assert rates(config, 1, 0.25) == (0.2, 0.4)
    assert rates(config, 2, 0.01) == pytest.approx((1.0, 2.0))
    assert rates(parse("imp", "--preset", "paper", *options), 2, 0.01) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["imp"], "0.002 for values, 0.02 for gates; a ticket's are divided by the square root of its density"),
        (["imp", "--no-scale-rates", "--ticket-learning-rate", "0.1"],
         "0.002 for values, 0.02 for gates; given for tickets: 0.1 for values"),
        (["lora"], "0.001 for values"),
        (["sift"], "0.0002 for values; a ticket's are divided by the square root of its density"),
    ],
)  # fmt: skip
def test_a_run_says_its_rates(arguments, text):
    assert run_plan._rates(parse(*arguments)) == text


@pytest.mark.parametrize("control", ["random-mask", "reinit", "erk", "snip", "grasp"])
def test_the_quickstarts_ticket_is_the_papers_and_its_controls_are_trained_as_it_is(control):
    assert parse("imp").density == PAPER_DENSITY
    assert rates(parse("imp"), 0, 1.0) == (2e-3, 2e-2)
    assert rates(parse(control), 1, PAPER_DENSITY) == rates(parse("imp"), 1, PAPER_DENSITY)
    assert rates(parse("imp"), 1, PAPER_DENSITY) == pytest.approx((1.075e-2, 1.075e-1), rel=1e-3)


def test_the_density_of_a_preset_yields_to_what_is_given_for_the_prunings():
    assert parse("imp", "--keep-fraction", "0.5").density == 0
    assert parse("imp", "--prunings", "0").density == 0
    assert parse("imp", "--prunings", "2").density == PAPER_DENSITY
    assert parse("imp", "--preset", "paper", "--density", "0.1").keep_fraction == 0
    assert parse("imp", "--density", "0").keep_fraction == 0.8
    (job,) = plan_sweep("imp", "0", [], preset="quickstart", options={"prunings": 0}, out=Path("runs/x")).jobs
    assert job.config.density == 0
    assert arguments_of(job.config, "quickstart") == ["--prunings=0", "--density=0.0"]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_prunings_keep_is_said_in_one_way(preset):
    both = "--keep-fraction 0.8 and --density 0.1: both say how much prunings keep; give one of them"
    with pytest.raises(RigsaError, match=both):
        parse("imp", "--preset", preset, "--keep-fraction", "0.8", "--density", "0.1")
    with pytest.raises(RigsaError, match=both):
        plan_sweep("imp", "0", ["density=0.1"], preset=preset, options={"keep_fraction": 0.8}, out=Path("runs/x"))
    with pytest.raises(RigsaError, match="--keep-fraction and --equal parameters: both say how many entries"):
        equal_budget(["imp", "lora"], preset, {"keep_fraction": 0.8}, "parameters")
    with pytest.raises(RigsaError, match=r"--keep-fraction: expected more than 0, or a --density, got 0\.0"):
        parse("imp", "--preset", preset, "--keep-fraction", "0", "--density", "0")
    for keep_fraction, density, prunings in ((0.0, 0.1, 2), (0.5, 0.0, 2), (0.8, 0.0, 1), (0.0, 0.0, 0)):
        values = {"keep_fraction": keep_fraction, "density": density, "prunings": prunings}
        config = dataclasses.replace(PRESETS[preset]("imp"), **values)
        assert parse("imp", "--preset", preset, *arguments_of(config, preset)) == config


def test_a_run_of_an_earlier_version_goes_on_by_its_density_and_its_rates(tmp_path):
    config = parse("imp", "--no-scale-rates", "--ticket-learning-rate", "0.02")
    record = config.record() | {"keep_fraction": 0.8}
    del record["scale_rates"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    check_folder(config, tmp_path)
    assert load(tmp_path) == config
    with pytest.raises(RigsaError, match="--scale-rates: False there, True now"):
        check_folder(parse("imp"), tmp_path)


def test_random_mask_matches_the_imp_run_of_its_preset_and_seed():
    assert parse("random-mask", "--seed", "3").match == "runs/imp-quickstart-seed3"
    assert parse("random-mask", "--density", "0.1").match == ""
    with pytest.raises(RigsaError, match="give one of them"):
        parse("random-mask", "--density", "0.1", "--match", "x")
