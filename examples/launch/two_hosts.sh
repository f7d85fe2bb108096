#!/usr/bin/env bash
# Runs on the hosts of a hostfile. They need ssh without a password, and this directory, shared or
# as a copy.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec onecycle launch --hostfile "${HOSTFILE:-examples/launch/hostfile}" \
  examples/fashion_mnist/train.py --config examples/fashion_mnist/ds_config.json "$@"
