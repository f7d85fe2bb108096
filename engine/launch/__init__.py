"""Start a training script on one host or on several hosts.

This package builds a launch plan, which the user can print with a dry run. It starts torchrun on
each host with ssh or Slurm, and stops the job on all hosts if one host fails. torchrun starts the
ranks, connects them (rendezvous) and restarts them after a failure.
"""
