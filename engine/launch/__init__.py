"""Start a script on one host or several, from a plan that can be printed first.

torchrun provides ranks, rendezvous and restarts; ssh or Slurm provides the hosts. This package
validates the config first, runs torchrun on each host, and stops all hosts if one fails.
"""
