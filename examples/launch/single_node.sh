#!/usr/bin/env bash
# Training with two processes on this machine. Unlike torchrun, `onecycle launch` validates the
# config first, shows the output and exit status of the first failed rank, and leaves no process
# running.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --nproc 2 examples/fashion_mnist/train.py \
  --config examples/fashion_mnist/ds_config.json "$@"
