"""Start a training script on one or more hosts.

This package builds a launch plan, which ``onecycle launch --dry-run`` prints. To run the plan, the
package starts torchrun on each host, over ssh or through Slurm if necessary. It stops the job on
all hosts if the job fails on one of them, or if too many hosts are lost. On each host, torchrun
joins the rendezvous, starts the ranks and, with ``--max-restarts``, restarts them after a failure.
"""
