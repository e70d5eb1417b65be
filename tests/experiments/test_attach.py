"""What the rig puts on a model, and what it says meanwhile."""

import dataclasses
import logging

import torch

from conftest import make_llama
from rigsa.experiments.attach import attach
from rigsa.experiments.presets import smoke
from rigsa_kernels import replace_linears


def test_the_rig_does_not_warn_of_what_a_preset_has_on_purpose_and_the_library_warns_after_it(caplog):
    closed = dataclasses.replace(smoke("imp", "cpu"), numerics="composed", alpha_init=1e-6)
    with caplog.at_level(logging.INFO, "rigsa_kernels"):
        attach(make_llama().to(torch.bfloat16), closed)
    assert [record.levelname for record in caplog.records if record.name == "rigsa_kernels.replace"] == ["INFO"] * 2
    replace_linears(make_llama().to(torch.bfloat16), numerics="composed", alpha_init=1e-6)
    assert caplog.records[-1].message.startswith("composed: ")
