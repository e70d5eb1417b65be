"""What the rig writes down about a model does not depend on when it is asked."""

from __future__ import annotations

import torch

from conftest import make_llama
from rigsa.experiments.adapter import base_fingerprint
from rigsa_kernels import replace_linears


def test_the_base_has_one_fingerprint_before_and_after_a_pass():
    """A ticket composes into its weights for a pass."""
    model = replace_linears(make_llama(), density=0.3, alpha_init=0.5)
    before = base_fingerprint(model)
    model(torch.tensor([[1, 2, 3]]))
    assert base_fingerprint(model) == before
