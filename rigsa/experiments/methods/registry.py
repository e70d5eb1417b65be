"""Every method by its name (`rigsa.experiments.config.METHODS` has a line on each)."""

from __future__ import annotations

from collections.abc import Callable

from rigsa.experiments.experiment import Experiment
from rigsa.experiments.methods.baselines import run_baseline
from rigsa.experiments.methods.gradient_masks import run_gradient_mask
from rigsa.experiments.methods.imp import run_imp
from rigsa.experiments.methods.lt_sft import run_lt_sft
from rigsa.experiments.methods.random_mask import run_random_mask
from rigsa.experiments.methods.spiel import run_spiel
from rigsa.experiments.methods.super_mask import run_super

RUNNERS: dict[str, Callable[[Experiment], None]] = {
    "imp": run_imp,
    "random-mask": run_random_mask,
    "lt-sft": run_lt_sft,
    "sift": run_gradient_mask,
    "fisher": run_gradient_mask,
    "sam": run_gradient_mask,
    "super": run_super,
    "rosa": run_gradient_mask,
    "spiel": run_spiel,
    "full": run_baseline,
    "lora": run_baseline,
    "qlora": run_baseline,
    "shira": run_baseline,
}
