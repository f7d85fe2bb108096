"""Start a script on one host or many: a plan that can be printed, agents, and a runner.

torchrun provides ranks, rendezvous and restarts; ssh or Slurm provides the hosts. This package
validates the config first, runs torchrun on each host, and stops all hosts when one fails.
"""
