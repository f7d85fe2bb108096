#!/usr/bin/env bash
# Two processes on this machine. Compared with torchrun, onecycle validates the config first, shows
# the output and exit status of the first failing rank, and leaves no process running.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --nproc 2 examples/fashion_mnist/train.py \
  --config examples/fashion_mnist/ds_config.json "$@"
