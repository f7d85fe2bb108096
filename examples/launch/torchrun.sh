#!/usr/bin/env bash
# Training with torchrun instead of `onecycle launch`. The script does not need to be changed.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc_per_node 2 examples/fashion_mnist/train.py "$@"
