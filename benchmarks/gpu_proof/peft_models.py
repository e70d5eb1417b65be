"""PEFT's model with a RIGSA adapter: trained, switched off, saved and loaded, merged, and taken away again.

Each check is on the small model of the tests, in each dtype, with a ticket and with a dense difference. The tests of
`tests/library` ask far more, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from benchmarks.gpu_proof.from_tests import load
from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import Setting
from rigsa import MaskedAdamW, RigsaConfig

STEPS = 5
DENSITIES = (0.25, 1.0)
TOKENS = 24
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative difference of logits that another order of sums, and rounding a merged weight, may make."""
Question = Callable[[Any, Tensor], dict[str, object]]


def run(setting: Setting, journal: Journal) -> None:
    for dtype, density in product(CLOSE, DENSITIES):
        for name, question in QUESTIONS.items():
            with journal.guarded(check=name, dtype=str(dtype), density=density) as row:
                model, ids = _adapted(setting, dtype, density), _ids(setting)
                row |= question(model, ids)


def _base(device: torch.device, dtype: torch.dtype) -> Any:
    return load("conftest").make_llama(hidden_size=64, intermediate_size=96).to(device, dtype)


def _ids(setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 16, (4, TOKENS), generator=generator).to(setting.device)


def _adapted(setting: Setting, dtype: torch.dtype, density: float) -> Any:
    """A model whose gates are open, so that what the adapter adds cannot be overlooked."""
    config = RigsaConfig(density=density, alpha_init=0.5, numerics="composed", task_type="CAUSAL_LM")
    return get_peft_model(_base(setting.device, dtype), config)


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def _train(model: Any, ids: Tensor) -> list[float]:
    optimizer, losses = MaskedAdamW(model, lr=1e-2), []
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _close(want: Tensor, got: Tensor, dtype: torch.dtype) -> dict[str, object]:
    difference = float((got - want).norm() / want.norm())
    return {"ok": difference <= CLOSE[dtype], "difference": difference, "allowed": CLOSE[dtype]}


def trains(model: Any, ids: Tensor) -> dict[str, object]:
    losses = _train(model, ids)
    return {"ok": losses[-1] < losses[0], "losses": losses}


def switched_off(model: Any, ids: Tensor) -> dict[str, object]:
    """Off, it is the base to the bit, in the midst of training, too."""
    _train(model, ids)
    adapted = _logits(model, ids)
    with model.disable_adapter():
        off = _logits(model, ids)
    base = _logits(_base(ids.device, model.dtype), ids)
    return {"ok": torch.equal(off, base) and not torch.equal(adapted, base)}


def saved_and_loaded(model: Any, ids: Tensor) -> dict[str, object]:
    _train(model, ids)
    want = _logits(model, ids)
    with TemporaryDirectory() as name:
        model.save_pretrained(Path(name))
        again = PeftModel.from_pretrained(_base(ids.device, model.dtype), Path(name))
    return {"ok": torch.equal(_logits(again, ids), want)}


def merged(model: Any, ids: Tensor) -> dict[str, object]:
    _train(model, ids)
    want, dtype = _logits(model, ids), model.dtype
    return _close(want, _logits(model.merge_and_unload(), ids), dtype)


def unloaded(model: Any, ids: Tensor) -> dict[str, object]:
    """Taken away, it leaves the base to the bit."""
    _train(model, ids)
    left, base = model.unload(), _base(ids.device, model.dtype)
    same = [torch.equal(one, other) for one, other in zip(left.parameters(), base.parameters(), strict=True)]
    return {"ok": all(same), "differ": same.count(False)}


QUESTIONS: dict[str, Question] = {
    "trains": trains,
    "switched off": switched_off,
    "saved and loaded": saved_and_loaded,
    "merged": merged,
    "unloaded": unloaded,
}
