"""Start a training script on one or more hosts.

This package builds a launch plan, which ``onecycle launch --dry-run`` prints. To run the plan, the
package starts torchrun on each host with ssh or Slurm, and stops the job on all hosts if a host
fails. On each host, torchrun joins the rendezvous, starts the ranks, and restarts them after a
failure.
"""
