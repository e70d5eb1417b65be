"""Adapted models in a script of one's own, or under a Trainer, on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from conftest import make_llama
from rigsa import (
    AdapterCheckpoints,
    MaskedAdamW,
    PruningLevels,
    RigsaConfig,
    gated_linears,
    load_adapter,
    prune,
    replace_linears,
    save_adapter,
)
from rigsa.processes import check_same_patterns, is_main, renew_ddp

IDS = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
STEPS, LEVELS = 3, 2
PRUNED = {"ddp": {}, "renewed": {}, "tiles": {"tile": 4}}
SHARDED = {
    "dense": {},
    "ticket": {"density": 0.3},
    "rows": {"density": 0.3, "tile": "rows"},
    "columns": {"density": 0.1, "tile": "columns"},
    "tiles": {"density": 0.3, "tile": "5x4"},
}
"""What `adapted` takes. The few whole columns are all of x that their layers save; tiles of 5 x 4 leave edges."""


def adapted(**options):
    return replace_linears(make_llama(), alpha_init=0.1, **options)


def adapted_by_peft():
    from peft import get_peft_model

    return get_peft_model(make_llama(), RigsaConfig(density=0.3, alpha_init=0.1))


def train(model, ids, steps=STEPS):
    optimizer = MaskedAdamW(model, lr=0.02)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def own_part(ids):
    """Of a batch, by process."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ids[rank * len(ids) // count : (rank + 1) * len(ids) // count]


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, place):
        ids = (torch.arange(8) * (place + 1)) % 20
        return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, batch, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=2 * STEPS, per_device_train_batch_size=batch, learning_rate=0.02, use_cpu=True,
        report_to=[], disable_tqdm=True, save_steps=STEPS, max_grad_norm=1.0, **options,
    )  # fmt: skip
    levels = PruningLevels(prunings=LEVELS - 1, keep_fraction=0.5)
    return Trainer(model, arguments, train_dataset=Sentences(), callbacks=[AdapterCheckpoints(), levels])


# ---- what torchrun starts ----------------------------------------------------------------------------------------


def own_script_under_ddp(folder):
    """A level loop: each level has its own DistributedDataParallel, or the one before is renewed."""
    for name, renewing in (("ddp", False), ("renewed", True), ("tiles", True)):
        model = adapted()
        wrapped = nn.parallel.DistributedDataParallel(model)
        for level in range(LEVELS):
            if level:
                prune(wrapped, 0.5, **PRUNED[name])
                check_same_patterns({name: layer.pattern for name, layer in gated_linears(model).items()})
                if renewing:
                    wrapped.train(False)
                    renew_ddp(model)
                    assert not wrapped.training
                else:
                    wrapped = nn.parallel.DistributedDataParallel(model)
            train(wrapped, own_part(IDS))
        if is_main():
            save_adapter(wrapped, folder / name)


def own_script_under_fsdp2(folder):
    from torch.distributed.fsdp import fully_shard

    for name, options in SHARDED.items():
        model = adapted(**options)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        train(model, own_part(IDS))
        save_adapter(model, folder / f"fsdp2-{name}")
        train(model, own_part(IDS), 1)  # saving has left the shards in their places


def under_peft(folder):
    model = nn.parallel.DistributedDataParallel(adapted_by_peft())
    train(model, own_part(IDS))
    if is_main():
        model.module.save_pretrained(folder / "peft")


def levels_under_a_trainer(folder):
    for steps in (1, 2):
        model = adapted()
        trainer = trainer_of(model, folder / f"run-{steps}", 4 // steps, gradient_accumulation_steps=steps)
        trainer.train()
        found = {name: layer.rigsa_values.tolist() for name, layer in gated_linears(model).items()}
        (folder / f"values-{steps}-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


def other_masks():
    model = adapted()
    prune(model, 0.5)
    if not is_main():
        prune(model, 0.9)
    check_same_patterns({name: layer.pattern for name, layer in gated_linears(model).items()})


def work(folder):
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    own_script_under_ddp(folder)
    own_script_under_fsdp2(folder)
    under_peft(folder)
    levels_under_a_trainer(folder)
    with pytest.raises(RuntimeError, match="the processes have pruned to other patterns"):
        other_masks()
    torch.distributed.destroy_process_group()


# ---- what is made of it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root / "tests"), str(root)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def assert_close(folder, expected):
    model = make_llama()
    load_adapter(model, folder)
    for (name, one), other in zip(gated_linears(model).items(), gated_linears(expected).values(), strict=True):
        assert one.pattern.equals(other.pattern), name
        torch.testing.assert_close(one.rigsa_values, other.rigsa_values, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.rigsa_alpha, other.rigsa_alpha, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PRUNED)
def test_a_level_loop_under_ddp_is_that_of_one_process(worked, name):
    model = adapted()
    for level in range(LEVELS):
        if level:
            prune(model, 0.5, **PRUNED[name])
        train(model, IDS)
    assert_close(worked / name, model)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_trains_and_saves_as_a_whole_one(worked, name):
    model = adapted(**SHARDED[name])
    train(model, IDS)
    assert_close(worked / f"fsdp2-{name}", model)


@pytest.mark.parametrize("steps", [1, 2])
def test_levels_under_a_trainer_are_those_of_one_process_and_the_same_in_all(worked, steps, tmp_path):
    one, other = ((worked / f"values-{steps}-{rank}.json").read_text() for rank in (0, 1))
    assert one == other
    model = adapted()
    trainer_of(model, tmp_path, 8).train()
    assert_close(worked / f"run-{steps}" / "checkpoint-6", model)
    assert {layer.pattern.density for layer in gated_linears(model).values()} != {1.0}


def test_a_model_of_peft_under_ddp_is_that_of_one_process(worked):
    from peft import PeftModel

    model = adapted_by_peft()
    train(model, IDS)
    found = gated_linears(PeftModel.from_pretrained(make_llama(), worked / "peft"))
    for name, layer in gated_linears(model).items():
        torch.testing.assert_close(found[name].rigsa_values, layer.rigsa_values, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[name].rigsa_alpha, layer.rigsa_alpha, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
