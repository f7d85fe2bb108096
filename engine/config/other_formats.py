"""Detect configs that are not DeepSpeed JSON configs, such as YAML files and Accelerate configs."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["is_utf_16", "recognize_keys", "recognize_text"]

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
_TRAINING_ARGUMENTS = {
    "eval_steps",
    "eval_strategy",
    "evaluation_strategy",
    "learning_rate",
    "logging_steps",
    "lr_scheduler_type",
    "max_grad_norm",
    "num_train_epochs",
    "output_dir",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "report_to",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "warmup_ratio",
    "weight_decay",
}
_ONLY_TRAINING_ARGUMENTS = {"num_train_epochs", "output_dir", "per_device_train_batch_size"}
"""Training arguments that a user of DeepSpeed is unlikely to add to a ds_config.json."""
_DEEPSPEED_KEYS = {
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_optimization",
}
"""Keys of DeepSpeed that other programs do not have at the top level of their files."""
_NESTING_KEYS = ("deepspeed", "deepspeed_config", "ds_config")
"""Keys under which other programs store a whole DeepSpeed config."""
_KEY_OF_YAML = re.compile(r"^([A-Za-z_]\w*):(?:\s|$)", re.MULTILINE)
# A value in braces is excluded, because `config = {"a": 1}` is Python.
_KEY_OF_TOML = re.compile(r"^[ \t]*([A-Za-z_][\w.-]*)[ \t]*=[ \t]*[^\s={]", re.MULTILINE)
_SECTION_OF_TOML = re.compile(r"\[{1,2}[A-Za-z_][\w.-]*\]{1,2}[ \t]*(?:#[^\n]*)?\n")
_BEFORE_TEXT = re.compile(r"(?:\s|#[^\n]*|---[^\n]*)*")


def is_utf_16(data: bytes) -> bool:
    """Return whether bytes look like UTF-16 text, with or without a byte order mark.

    >>> is_utf_16('{"a": 1}'.encode("utf-16")), is_utf_16(b'{"a": 1}')
    (True, False)
    """
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]


def recognize_text(text: str) -> tuple[str, str] | None:
    """Return an error message and a hint if a text looks like YAML or TOML.

    Otherwise, return None.

    >>> recognize_text("# comment\\ntrain_batch_size: 8\\n")[0]
    'The config must be a JSON object in braces, but it looks like YAML.'
    >>> recognize_text("train_batch_size = 8\\n")[0]
    'The config must be a JSON object in braces, but it looks like TOML.'
    """
    begin = _BEFORE_TEXT.match(text)
    start = begin.end() if begin else 0
    section = _SECTION_OF_TOML.match(text, start)
    if _KEY_OF_YAML.match(text, start):
        name, keys = "YAML", _KEY_OF_YAML.findall(text)
    elif _KEY_OF_TOML.match(text, start) or (section and _KEY_OF_TOML.search(text, section.end())):
        name, keys = "TOML", _KEY_OF_TOML.findall(text)
    else:
        return None
    message = f"The config must be a JSON object in braces, but it looks like {name}."
    return recognize_keys(keys) or (message, "Convert the file to JSON.")


def recognize_keys(config: Collection[str] | Mapping[str, Any]) -> tuple[str, str] | None:
    """Return an error message and a hint for a file of another program.

    The file can be an Accelerate config, the training arguments of Hugging Face, or a file that
    contains a DeepSpeed config under a key such as ``deepspeed``. Return None for any other config.

    Args:
        config: config, or its top-level keys.
    """
    if len(_ACCELERATE_KEYS.intersection(config)) >= 2:
        message = "The config must be a DeepSpeed config, got an Accelerate config."
        hint = "Pass the file that `deepspeed_config_file` names, or write a ds_config.json."
        return message, hint
    if _DEEPSPEED_KEYS.intersection(config):
        return None
    for key in _NESTING_KEYS:
        nested = config.get(key) if isinstance(config, Mapping) else None
        if isinstance(nested, Mapping) and _DEEPSPEED_KEYS.intersection(nested):
            message = (
                "The config must be a DeepSpeed config, got the config of another program that "
                f"contains a DeepSpeed config in `{key}`."
            )
            return message, f"Pass only the value of `{key}`, for example in a separate file."
    found = _TRAINING_ARGUMENTS.intersection(config)
    if len(found) >= 2 and found & _ONLY_TRAINING_ARGUMENTS:
        message = "The config must be a DeepSpeed config, got Hugging Face TrainingArguments."
        hint = "Pass the file that the argument `deepspeed` names, or write a ds_config.json."
        return message, hint
    return None
