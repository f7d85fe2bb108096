"""Detect configs that are not DeepSpeed JSON configs, such as YAML files."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection

__all__ = ["is_utf_16", "recognize_keys", "recognize_yaml"]

_ACCELERATE_KEYS = {
    "compute_environment",
    "deepspeed_config",
    "distributed_type",
    "downcast_bf16",
    "fsdp_config",
    "machine_rank",
    "main_training_function",
    "num_machines",
    "num_processes",
}
_KEY_OF_YAML = re.compile(r"^([A-Za-z_]\w*):(?:\s|$)", re.MULTILINE)
_BEFORE_YAML = re.compile(r"(?:\s|#[^\n]*|---[^\n]*)*")


def is_utf_16(data: bytes) -> bool:
    """Return whether bytes look like UTF-16 text, with or without a byte order mark.

    >>> is_utf_16('{"a": 1}'.encode("utf-16")), is_utf_16(b'{"a": 1}')
    (True, False)
    """
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]


def recognize_yaml(text: str) -> tuple[str, str] | None:
    """Return an error message and a hint if a text looks like YAML; otherwise, return None.

    >>> recognize_yaml("# comment\\ntrain_batch_size: 8\\n")[0]
    'The config must be a JSON object in braces, but it looks like YAML.'
    """
    begin = _BEFORE_YAML.match(text)
    if begin is None or not _KEY_OF_YAML.match(text, begin.end()):
        return None
    keys = _KEY_OF_YAML.findall(text)
    message = "The config must be a JSON object in braces, but it looks like YAML."
    return recognize_keys(keys) or (message, "Convert the file to JSON.")


def recognize_keys(keys: Collection[str]) -> tuple[str, str] | None:
    """Return an error message and a hint for an Accelerate config.

    Return None if the keys are not those of an Accelerate config.

    Args:
        keys: top-level keys of the config.
    """
    if len(_ACCELERATE_KEYS.intersection(keys)) < 2:
        return None
    message = "The config must be a DeepSpeed config, got an Accelerate config."
    hint = "Pass the file that `deepspeed_config_file` names, or write a ds_config.json."
    return message, hint
