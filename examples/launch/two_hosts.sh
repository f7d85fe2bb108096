#!/usr/bin/env bash
# The hosts of a file, by ssh without a password; they share this folder, or have a copy of it.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --hostfile "${HOSTFILE:-examples/launch/hostfile}" \
  examples/fashion_mnist/train.py --config examples/fashion_mnist/ds_config.json "$@"
