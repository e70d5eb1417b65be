"""What an adapter of PEFT is loaded from: a file of safetensors that is whole and holds what its configuration says.

PEFT and transformers each have a loader of their own, which reads ``adapter_model.bin``, a pickle, where a folder has
one. Both read the configuration first. So a folder is looked into when its configuration is read, which is before a
model is touched.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from rigsa.errors import RigsaError
from rigsa.peft_format import CONTAINER, PREFIX
from rigsa.peft_tuner.config import RigsaConfig

ALWAYS = ("values", "alpha", "ticket")
"""The tensors that every layer has in a file, without the prefix."""


def watch_configurations() -> None:
    """Have `check_source` called wherever PEFT or transformers reads a `RigsaConfig`.

    transformers calls `PeftConfig.from_pretrained` itself, so an override in `RigsaConfig` would not be asked.
    """
    of_peft: Any = PeftConfig
    own = of_peft.from_pretrained

    @functools.wraps(own.__func__)
    def from_pretrained(cls: type, source: Any, subfolder: str | None = None, **options: Any) -> Any:
        config = own.__func__(cls, source, subfolder, **options)
        if isinstance(config, RigsaConfig):
            check_source(config, source, subfolder, options)
        return config

    of_peft.from_pretrained = classmethod(from_pretrained)


def check_source(config: RigsaConfig, source: Any, subfolder: str | None, options: dict[str, Any]) -> None:
    """Look into the files beside a configuration.

    Args:
        config: what was read.
        source, subfolder: a folder, or a hub id and a folder in it.
        options: as `huggingface_hub.hf_hub_download` takes them.

    Raises:
        RigsaError: there is a pickle, or the file of safetensors is cut or has the tensors of other layers. A folder
            without tensors passes, as only its configuration may be wanted.
    """
    folder = Path(source, subfolder or "")
    is_here = folder.is_dir()
    where = folder if is_here else f"{source}/{subfolder}" if subfolder else source
    if (folder / WEIGHTS_NAME).exists() if is_here else _is_on_the_hub(str(source), subfolder, options):
        raise RigsaError(
            f"{where}/{WEIGHTS_NAME}: expected {SAFETENSORS_WEIGHTS_NAME} alone, got a pickle; pickles are never read, "
            "so save the adapter as PEFT does by default, with safe_serialization=True, and delete the pickle"
        )
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if is_here and path.exists():
        _check_tensors(config, path)


def _is_on_the_hub(repo: str, subfolder: str | None, options: dict[str, Any]) -> bool:
    """Whether a repository, or what is cached of it, has a pickle."""
    from huggingface_hub import constants, file_exists, try_to_load_from_cache

    name = f"{subfolder}/{WEIGHTS_NAME}" if subfolder else WEIGHTS_NAME
    revision = options.get("revision")
    if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return isinstance(try_to_load_from_cache(repo, name, options.get("cache_dir"), revision), str)
    return file_exists(repo, name, revision=revision, token=options.get("token"))


def _check_tensors(config: RigsaConfig, path: Path) -> None:
    """Raises RigsaError where the file's header is damaged, or names other layers than the configuration."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise RigsaError(
            f"{path}: expected a whole file of safetensors, got one that is cut or damaged ({error})"
        ) from error
    parts: dict[str, set[str]] = {}
    for name in names:
        owner, _, part = name.rpartition(".")
        if owner.endswith(f".{CONTAINER}"):
            parts.setdefault(owner, set()).add(part.removeprefix(PREFIX))
    for owner, found in parts.items():
        missing = [part for part in ALWAYS if part not in found]
        if missing:
            raise RigsaError(f"{path}: {owner} has no {PREFIX}{missing[0]}; the file is damaged")
    layers = config.layers or {}
    if len(parts) != len(layers):
        raise RigsaError(
            f"{path}: expected the tensors of the {len(layers)} layers that the configuration beside it names, got "
            f"those of {len(parts)}; the two files are not of one adapter"
        )
