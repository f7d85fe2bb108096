"""The subcommands of ``onecycle``, one per module.

Each module defines ``add_arguments(parser)``, which adds the subcommand's arguments to a parser,
and ``run(args, out)``, which runs the subcommand and returns its exit status.
"""
