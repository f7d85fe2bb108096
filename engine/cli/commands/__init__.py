"""The subcommands of ``onecycle``, one per module.

In each module, `add_arguments` adds the arguments to a parser, and `run` executes the subcommand.
"""
