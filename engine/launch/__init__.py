"""Start a training script on one host or on several hosts.

This package builds a launch plan, which ``--dry-run`` prints. To run the plan, the package starts
torchrun on each host with ssh or Slurm, and stops the job on all hosts if one host fails. torchrun
joins the rendezvous, starts the ranks of its host, and restarts them after a failure.
"""
