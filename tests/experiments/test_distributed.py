"""Two processes on one machine: what a run of one process gives, what is sent, what a kill and a failing process leave.

This file is also what `torchrun` starts (`work`): one launch makes several runs, as a process takes long to start.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from rigsa.errors import RigsaError
from rigsa.experiments import distributed
from rigsa.experiments.presets import smoke
from rigsa.experiments.train import read_log
from rigsa.run import main

ROOT = Path(__file__).resolve().parents[2]
DRAWS_FIGURES = True
"""As the runs in processes of their own do, which are compared with others byte by byte."""
STEPS, LEVELS, GATES = 6, 3, 14
TILES = ["--tile", "5x4", "--prunings", "1"]
"""Tickets of tiles, some of which end at an edge."""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
NOT_SHARED_BY_EQUAL_RUNS = {"resources.json", "report.md", "report.html", "report.csv", "config.json"}


def imp(model: Path, out: Path, *more: str) -> list[str]:
    """Two micro-batches a step, so that two processes take one each; two images are left over in each epoch."""
    return [
        "imp", "--model", str(model), "--preset", "smoke", "--dtype", "float32", "--device", "cpu", "--max-steps",
        str(STEPS), "--prunings", str(LEVELS - 1), "--test-examples", "20", "--train-examples", "10", "--epochs", "3",
        "--alpha-learning-rate", "0.1", "--out", str(out), *more,
    ]  # fmt: skip


def launch(launcher: list[str], *arguments: str) -> subprocess.Popen:  # type: ignore[type-arg]
    """In a session of its own, so that a signal to the tests does not reach it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, *launcher, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(small_model_folder: Path, folder: Path) -> Path:
    """The run of one process."""
    return run_alone(imp(small_model_folder, folder / "alone"), folder / "alone")


@pytest.fixture(scope="module")
def alone_in_tiles(small_model_folder: Path, folder: Path) -> Path:
    """The same with tickets of tiles."""
    out = folder / "alone-tiles"
    return run_alone(imp(small_model_folder, out, *TILES), out)


def run_alone(asked: list[str], out: Path) -> Path:
    """With as many threads as each of two processes gets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(asked) == 0
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def worked(small_model_folder: Path, folder: Path) -> tuple[Path, str]:
    """What `work` left, and what it said while its last run failed."""
    process = launch(TORCHRUN, __file__, str(small_model_folder), str(folder))
    _, error = outputs(process, 480)
    assert process.returncode == 1, error
    assert (folder / "sharded" / "level_2" / "done").exists(), error
    return folder, error


@pytest.fixture(scope="module")
def killed(small_model_folder: Path, folder: Path) -> Path:
    """All processes of a run, killed in the middle of level 1, which trains tiles."""
    out = folder / "killed"
    process = launch(TORCHRUN, "-m", "rigsa.run", *imp(small_model_folder, out, *TILES))
    deadline = time.monotonic() + 120
    while not list(out.glob("level_1/checkpoints/*/done")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    kill(process)
    assert not (out / "level_1" / "done").exists()
    return out


def outputs(process: subprocess.Popen, seconds: float) -> tuple[str, str]:  # type: ignore[type-arg]
    """What it has said when it ends. One that takes longer is killed: it would disturb the tests that follow."""
    try:
        return process.communicate(timeout=seconds)
    except BaseException:
        kill(process)
        raise


def kill(process: subprocess.Popen) -> None:  # type: ignore[type-arg]
    """With its workers, which have sessions of their own."""
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def contents(run: Path) -> dict[str, bytes]:
    """Without figures, which are blank where a run is made in the process of the tests (conftest.py)."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in NOT_SHARED_BY_EQUAL_RUNS and path.suffix != ".png"
    }


def logs(run: Path, name: str) -> list[float]:
    return [line[name] for folder in sorted(run.glob("level_*")) for line in read_log(folder)]


def metrics(run: Path, level: int) -> dict:  # type: ignore[type-arg]
    return json.loads((run / f"level_{level}" / "metrics.json").read_text())


def test_another_number_of_processes_does_not_go_on(killed, small_model_folder, tmp_path, capsys):
    copied = shutil.copytree(killed, tmp_path / "copy")
    assert main(imp(small_model_folder, copied, *TILES)) == 1
    assert "was made by 2 processes; expected as many to go on, got 1" in capsys.readouterr().err


def test_killed_and_run_again_gives_the_bits_of_one_process(killed, alone_in_tiles, small_model_folder):
    """Started by torchrun, gone on with by accelerate; one micro-batch a process, so nothing is summed differently."""
    process = launch(ACCELERATE, "-m", "rigsa.run", *imp(small_model_folder, killed, *TILES))
    out, error = outputs(process, 240)
    assert process.returncode == 0, error
    assert contents(killed) == contents(alone_in_tiles)
    assert out.count("| imp |") == 3, "printed by one process: the base and two levels"
    assert not list(killed.rglob("checkpoints"))
    with safe_open(killed / "level_1" / "mask.safetensors", "pt") as file:
        assert set(json.loads(file.metadata()["rigsa"])["tiles"].values()) == {"5x4"}


def test_tickets_of_entries_have_the_bits_of_one_process(worked, alone):
    assert contents(worked[0] / "entries") == contents(alone)


def test_accumulated_gradients_give_the_same_losses_to_rounding(worked, alone):
    """Four micro-batches, two a process: (a + c) + (b + d) instead of ((a + b) + c) + d."""
    run = worked[0] / "accumulated"
    torch.testing.assert_close(torch.tensor(logs(run, "loss")), torch.tensor(logs(alone, "loss")), rtol=1e-6, atol=0)
    assert logs(run, "learning_rate") == logs(alone, "learning_rate")


def test_every_process_holds_the_same_adapter_and_masks(worked):
    for run, levels in (("accumulated", LEVELS), ("sharded", LEVELS), ("sharded-tiles", 2)):
        first, second = (json.loads((worked[0] / f"{run}-{rank}.json").read_text()) for rank in (0, 1))
        assert first["digests"] == second["digests"]
        assert len(first["digests"]) == levels


def test_what_is_sent_is_proportional_to_the_free_entries(worked):
    sent = json.loads((worked[0] / "accumulated-0.json").read_text())["sent"]
    free = [metrics(worked[0] / "accumulated", level)["free"] for level in range(LEVELS)]
    assert sent == [4 * (entries + GATES) for entries in free for _ in range(STEPS)]
    assert free[2] < free[1] < free[0]


@pytest.mark.parametrize(("name", "whole", "levels"), [("sharded", "alone", 3), ("sharded-tiles", "alone_in_tiles", 2)])
def test_sharded_training_gives_what_one_process_does(worked, name, whole, levels, request):
    """Interrupted in level 1. The bits too, but where PyTorch's AdamW on a CPU rounds the last few values of a tensor,
    shorter than a vector, in another way than the others: a shard ends elsewhere. (With AVX2 it does, with AVX-512 it
    did not. The norm of the gradient, which clips nothing here, is summed in another order everywhere.)"""
    run, alone = worked[0] / name, request.getfixturevalue(whole)
    ours, theirs = contents(run), contents(alone)
    assert ours.keys() == theirs.keys()
    for what in ("loss", "learning_rate", "grad_norm"):
        torch.testing.assert_close(torch.tensor(logs(run, what)), torch.tensor(logs(alone, what)))
    for level in range(levels):
        folders = run / f"level_{level}", alone / f"level_{level}"
        adapters = [load_file(folder / "adapter.safetensors") for folder in folders]
        torch.testing.assert_close(*adapters, rtol=1e-6, atol=1e-7)
        assert metrics(run, level)["test"]["0-shot"]["accuracy"] == metrics(alone, level)["test"]["0-shot"]["accuracy"]
        if level:
            assert ours[f"level_{level}/mask.safetensors"] == theirs[f"level_{level}/mask.safetensors"]


def test_sharded_checkpoints_hold_the_adapter_alone(worked, tmp_path):
    (checkpoint,) = (worked[0] / "kept-sharded").glob("checkpoint-4")
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "adapter.safetensors", "optimizer_0", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth",
        "trainer_state.json", "done",
    }  # fmt: skip
    with safe_open(checkpoint / "adapter.safetensors", framework="pt") as file:
        assert {name.rpartition(".")[2] for name in file.keys()} == {"rigsa_values", "rigsa_alpha"}  # noqa: SIM118
    mask = load_file(worked[0] / "sharded" / "level_1" / "mask.safetensors")
    saved = load_file(checkpoint / "adapter.safetensors")
    free = metrics(worked[0] / "sharded", 1)["free"]
    assert len(saved) == 2 * len(mask)
    assert sum(tensor.numel() for tensor in saved.values()) == free + GATES
    dcp_to_torch_save(checkpoint / "optimizer_0", tmp_path / "optimizer")
    optimizer = torch.load(tmp_path / "optimizer", weights_only=True)["optimizer"]["state"]
    assert sum(state["exp_avg"].numel() for state in optimizer.values()) == free + GATES


def test_shards_keep_half_of_everything(worked):
    """Values, gates, moments, and the frozen weights."""
    shares = [json.loads((worked[0] / f"sharded-{rank}.json").read_text())["share"] for rank in (0, 1)]
    assert sum(shares) == pytest.approx(1)
    assert all(0.45 < share < 0.55 for share in shares)


def test_optimizer_works_on_shards(worked):
    for rank in (0, 1):
        found = json.loads((worked[0] / f"optimizer-{rank}.json").read_text())
        assert found == {state: [True, True] for state in ("float32", "bfloat16", "int8")}


def test_failing_process_ends_the_run_with_its_message(worked):
    assert "rigsa (process 1): training diverged at step 3: " in worked[1]
    assert "first in model.layers.1.mlp.up_proj" in worked[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--batch-size 4 and --micro-batch-size 4 on 2 processes: expected a batch size that 8 divides"),
        ({"step_in_backward": True, "max_grad_norm": 0.0}, "--step-in-backward on 2 processes: expected one process"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(changes, message, monkeypatch):
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    with pytest.raises(RigsaError, match=message):
        distributed.check(dataclasses.replace(smoke(), micro_batch_size=4, **changes))


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({}, {}, "FSDP: expected several processes with a GPU each, got a CPU"),
        ({"FSDP_VERSION": "1"}, {}, "--fsdp_version 1: expected 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "--fsdp_cpu_ram_efficient_loading true: expected false"),
        ({}, {"values_dtype": "bfloat16"}, "--values-dtype bfloat16: expected float32 under FSDP"),
        ({}, {"gate": "model"}, "--gate model: expected layer under FSDP"),
        ({}, {"quantize": "nf4"}, "--quantize nf4: expected none under FSDP"),
    ],
)
def test_what_cannot_be_sharded_is_refused(environment, changes, message, monkeypatch):
    gpus = "FSDP:" not in message
    monkeypatch.setattr(distributed, "on_gpus", lambda: gpus)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RigsaError, match=message):
        distributed.check(dataclasses.replace(smoke(), **changes))


@pytest.mark.parametrize("method", ["rosa", "spiel", "child-f", "diff-pruning", "lora", "qlora", "shira"])
def test_methods_that_need_whole_layers_are_not_sharded(method, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RigsaError, match=f"^{method} under FSDP: .*; use DDP"):
        distributed.check(smoke(method))


# ---- what torchrun starts ----------------------------------------------------------------------------------------


def work(model: Path, folder: Path) -> int:
    """Several runs in one group of processes. Returns the last one's exit code."""
    torch.distributed.init_process_group("gloo")
    distributed.leave = lambda: None
    rank = torch.distributed.get_rank()
    optimizer_on_shards(folder / f"optimizer-{rank}.json")
    accumulated(model, folder, rank)
    sharded(model, folder, rank)
    sharded(model, folder, rank, "sharded-tiles", TILES)
    assert main(imp(model, folder / "entries")) == 0
    return diverging(model, folder, rank)


def digests_of_levels() -> list[str]:
    """Filled, level by level, with a digest of all that a process holds of the adapter and its patterns."""
    from rigsa.experiments.experiment import Experiment
    from rigsa_kernels import gated_linears

    digests, run_level = [], Experiment.run_level

    def digest(self, *arguments):  # type: ignore[no-untyped-def]
        result = run_level(self, *arguments)
        found = hashlib.sha256()
        for layer in gated_linears(self.model).values():
            for tensor in (layer.rigsa_values.detach(), layer.rigsa_alpha.detach(), *layer.pattern.tensors):
                found.update(tensor.numpy().tobytes())
        digests.append(found.hexdigest())
        return result

    Experiment.run_level = digest
    return digests


def accumulated(model: Path, folder: Path, rank: int) -> None:
    """A run with two micro-batches a process, and how many bytes DDP sends in each step."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from rigsa.experiments import train

    sent, digests, prepare = [], digests_of_levels(), train.LevelTrainer._prepare_for_training

    def hook(group, bucket):  # type: ignore[no-untyped-def]
        if bucket.index() == 0:
            sent.append(0)
        sent[-1] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    def counting(self, *args):  # type: ignore[no-untyped-def]
        wrapped, loader = prepare(self, *args)
        wrapped.register_comm_hook(None, hook)
        return wrapped, loader

    train.LevelTrainer._prepare_for_training = counting
    assert main(imp(model, folder / "accumulated", "--micro-batch-size", "1")) == 0
    train.LevelTrainer._prepare_for_training = prepare
    (folder / f"accumulated-{rank}.json").write_text(json.dumps({"sent": sent, "digests": digests}))


class Killed(BaseException):
    """In all processes at once."""


def sharded(model: Path, folder: Path, rank: int, name: str = "sharded", more: list[str] | None = None) -> None:
    """A run under FSDP2, interrupted in level 1 and gone on with.

    Accelerate shards for GPUs only, so it is told that these processes have one each; its device stays the CPU.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from rigsa.experiments import train
    from rigsa_kernels import gated_linears
    from rigsa_kernels.optim import local_part

    before, backend, out = os.environ.copy(), PartialState._prepare_backend, folder / name
    asked = imp(model, out, "--checkpointing", *(more or []))
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState._reset_state()
    os.environ |= {
        "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }  # fmt: skip
    digests, plain, share = digests_of_levels(), train.MarkCheckpoint, []

    class Killing(plain):  # type: ignore[misc,valid-type]
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 5 and "level_1" in args.output_dir:
                tensors = [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]
                held = {local_part(tensor).untyped_storage().data_ptr(): local_part(tensor) for tensor in tensors}
                assert all(layer._origin[0].weight is None for layer in gated_linears(model).values())
                share.append(sum(t.numel() for t in held.values()) / sum(t.numel() for t in tensors))
                raise Killed

    train.MarkCheckpoint = Killing
    with pytest.raises(Killed):
        main(asked)
    if rank == 0:
        shutil.copytree(out / "level_1" / "checkpoints", folder / f"kept-{name}")
    train.MarkCheckpoint = plain
    torch.distributed.barrier()
    assert main(asked) == 0
    (folder / f"{name}-{rank}.json").write_text(json.dumps({"digests": digests, "share": share[0]}))
    PartialState._prepare_backend = backend
    PartialState._reset_state()
    os.environ.clear()
    os.environ.update(before)


def optimizer_on_shards(path: Path) -> None:
    """By the moments' dtype: whether shards are updated as tensors of their own are, and whether a state comes back."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    from rigsa_kernels import GatedSparseLinear, MaskedAdamW, SparsePattern
    from rigsa_kernels.optim import local_part

    def make(state):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        layer = GatedSparseLinear(torch.nn.Linear(70, 33), seed=1, key=2)
        layer.set_pattern(SparsePattern.from_mask(torch.arange(33 * 70).view(33, 70) % 2 == 0))  # 1155: an uneven cut
        fully_shard(layer)
        return layer, MaskedAdamW(layer, lr=1e-2, state_dtype=state)

    def train(layer, optimizer, plain=None):  # type: ignore[no-untyped-def]
        for _ in range(3):
            torch.manual_seed(3)
            layer(torch.randn(5, 70)).square().sum().backward()
            if plain is not None:
                for copy, parameter in zip(plain.param_groups, optimizer.param_groups, strict=True):
                    copy["params"][0].grad = local_part(parameter["params"][0].grad).clone()
                plain.step()
            optimizer.step()
            optimizer.zero_grad()

    def held(optimizer):  # type: ignore[no-untyped-def]
        return [local_part(group["params"][0]).clone() for group in optimizer.param_groups]

    found = {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for state in ("float32", "bfloat16", "int8"):
        layer, optimizer = make(state)
        copies = [torch.nn.Parameter(part) for part in held(optimizer)]
        groups = [{"params": [copy]} | group for copy, group in zip(copies, ({}, {}), strict=True)]
        groups[1] |= {"weight_decay": 0.0, "state_dtype": "float32"}
        plain = MaskedAdamW(groups, lr=1e-2, state_dtype=state)
        train(layer, optimizer, plain)
        rounds_alone = state != "float32" and torch.distributed.get_rank() > 0  # random bits of its own
        close = torch.allclose if rounds_alone else torch.equal
        same = all(
            close(one, other, **({"atol": 1e-2} if rounds_alone else {}))
            for one, other in zip(held(optimizer), copies, strict=True)
        )
        saved = get_optimizer_state_dict(layer, optimizer, options=StateDictOptions(full_state_dict=True))
        again, resumed = make(state)
        for parameter, source in zip(again.parameters(), layer.parameters(), strict=True):
            local_part(parameter).copy_(local_part(source))
        set_optimizer_state_dict(again, resumed, saved, options=options)
        train(layer, optimizer)
        train(again, resumed)
        found[state] = [same, all(map(torch.equal, held(optimizer), held(resumed)))]
    path.write_text(json.dumps(found))


def diverging(model: Path, folder: Path, rank: int) -> int:
    """A gate of process 1 becomes infinite in step 2."""
    from rigsa.experiments import train
    from rigsa_kernels import gated_linears

    class Exploding(train.MarkCheckpoint):
        def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 2 and rank == 1:
                with torch.no_grad():
                    gated_linears(model)["model.layers.1.mlp.up_proj"].rigsa_alpha.fill_(float("inf"))

    train.MarkCheckpoint = Exploding
    return main(imp(model, folder / "diverged"))


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), Path(sys.argv[2])))
