"""Every method by its name, in the order of help texts, tables and figures."""

from __future__ import annotations

from rigsa.experiments.config import Method
from rigsa.experiments.methods.baselines import FULL, LORA, QLORA, SHIRA
from rigsa.experiments.methods.child_tuning import CHILD_D, CHILD_F
from rigsa.experiments.methods.diff_pruning import DIFF_PRUNING
from rigsa.experiments.methods.erk import ERK
from rigsa.experiments.methods.gradient_masks import FISHER, GRASP, ROSA, SAM, SIFT, SNIP
from rigsa.experiments.methods.imp import IMP
from rigsa.experiments.methods.lt_sft import LT_SFT
from rigsa.experiments.methods.random_mask import RANDOM_MASK
from rigsa.experiments.methods.reinit import REINIT
from rigsa.experiments.methods.spiel import SPIEL
from rigsa.experiments.methods.super_mask import SUPER
from rigsa.experiments.methods.tile_masks import SMT, SPRUFT

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        IMP, RANDOM_MASK, REINIT, ERK, SNIP, GRASP, LT_SFT, DIFF_PRUNING, SIFT, FISHER, SAM, SUPER, SMT, SPRUFT, ROSA,
        SPIEL, CHILD_D, CHILD_F, FULL, LORA, QLORA, SHIRA,
    )
}  # fmt: skip
