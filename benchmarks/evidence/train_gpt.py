"""Train a small GPT on Python's documentation, using SambaFlow's command-line argument names.

    python benchmarks/evidence/train_gpt.py --lr_schedule cosine_schedule_with_warmup \\
        --learning_rate 0.003 --warmup_steps 20 --max_steps 200 --end_lr_ratio 0.1

The text comes from the module ``pydoc_data.topics`` of Python's standard library. The script prints
the loss on held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import engine

CONFIG = Path(__file__).parent / "configs" / "command_line" / "gpt.json"
CONTEXT, WIDTH, HEADS, LAYERS, CHARACTERS = 64, 64, 4, 2, 128


class GPT(nn.Module):
    """A character-level language model for ASCII text."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(CHARACTERS, WIDTH)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CHARACTERS)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, windows: Tensor) -> Tensor:
        """Return the mean loss of the next-character predictions.

        Args:
            windows: character codes of shape (batch, CONTEXT + 1).
        """
        hidden = self.tokens(windows[:, :-1]) + self.positions
        hidden = self.layers(hidden, mask=self.mask, is_causal=True)
        return cross_entropy(self.head(hidden).flatten(0, 1), windows[:, 1:].flatten())


class Windows(Dataset[Tensor]):
    """Overlapping windows of a text. Each starts half a window after the previous one."""

    def __init__(self, text: str) -> None:
        self.codes = torch.tensor(list(text.encode("ascii", "replace")))

    def __len__(self) -> int:
        return (len(self.codes) - CONTEXT - 1) // (CONTEXT // 2)

    def __getitem__(self, index: int) -> Tensor:
        start = index * (CONTEXT // 2)
        return self.codes[start : start + CONTEXT + 1]


def build_datasets() -> tuple[Windows, Windows]:
    """Return the training windows (the first nine tenths of the text) and the held-out windows."""
    text = "".join(topics[name] for name in sorted(topics))
    split = len(text) * 9 // 10
    return Windows(text[:split]), Windows(text[split:])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train a GPT, and return its learning rates, training losses and held-out loss.

    Args:
        argv: command-line arguments; None for ``sys.argv[1:]``.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--checkpoints", metavar="DIR", help="save checkpoints in DIR, and resume from the newest"
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=640,
        help="maximum number of held-out windows to evaluate (default: 640)",
    )
    engine.add_schedule_arguments(parser)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    train, held_out = build_datasets()
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    if args.checkpoints:
        config["engine"]["checkpoint"] = {"dir": args.checkpoints, "every": 1000}
    trainer, *_ = engine.initialize(args=args, config=config, model=GPT(), training_data=train)
    lrs, losses = [], []
    for windows in trainer.batches():
        lrs.append(trainer.get_lr()[0])
        loss = trainer(windows)
        trainer.backward(loss)
        trainer.step()
        losses.append(loss.item())
    windows = torch.stack([held_out[index] for index in range(min(args.windows, len(held_out)))])
    held_out_loss = trainer.evaluate(windows.split(64), trainer)
    print(f"step {trainer.global_steps}: held-out loss {held_out_loss:.3f}")
    trainer.destroy()
    return {"lr": lrs, "loss": losses, "held_out_loss": held_out_loss}


if __name__ == "__main__":
    main()
