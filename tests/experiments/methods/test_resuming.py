"""Methods with a state of their own beside values and gates, and tickets of tiles: a run that dies at any write ends
with the same bits."""

import os
from pathlib import Path

import pytest

from rigsa import files
from rigsa.experiments.distributed import join
from rigsa.experiments.experiment import Experiment
from tests.experiments.methods.test_methods import config_of


class Killed(BaseException):
    """As sudden as SIGKILL: nothing in the product may catch it."""


def contents(out: Path) -> dict[str, bytes]:
    found = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "resources.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("method", "options"),
    [("child-f", {}), ("diff-pruning", {}), ("imp", {"tile": "4", "density": 0.2, "prunings": 1, "ranking": "layer"})],
)
def test_death_at_any_write_and_running_again_gives_the_same_bits(
    method, options, small_model_folder, tmp_path, monkeypatch
):
    """Dies before a rename, then before the fifth after it, ... each time in a run that goes on from the last death."""
    config = config_of(method, small_model_folder, **{"drift": False, "max_steps": 8} | options)

    def run(out: Path) -> dict[str, bytes]:
        join(on_cpu=True)
        config.method.run(Experiment.prepare(config, out))
        return contents(out)

    finished, replace, deaths = run(tmp_path / "whole"), os.replace, 0
    while True:
        alive = [4]  # writes that succeed before the next death; a checkpoint makes three

        def dying_replace(source, target, alive=alive):  # type: ignore[no-untyped-def]
            if alive[0] == 0:
                raise Killed
            alive[0] -= 1
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", dying_replace)
        try:
            found = run(tmp_path / "dying")
            break
        except Killed:
            deaths += 1
            assert deaths < 30
        finally:
            monkeypatch.setattr(files.os, "replace", replace)
    assert deaths > 3
    assert found == finished
