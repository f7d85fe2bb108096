"""Start a training script on one host or on several hosts.

This package builds a plan, which the user can print before launch. It starts torchrun on each host
by ssh or Slurm, and stops all hosts if one fails. torchrun starts the ranks, connects them
(rendezvous) and restarts them.
"""
