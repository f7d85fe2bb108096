"""Starting a script on one machine or many: a plan that can be printed, agents, and who watches.

Ranks, rendezvous and restarts are torchrun's, placement is ssh's or Slurm's. What is here proves
the config first, tells torchrun what it has to know on each host, and stops everything when one
part of it fails.
"""
