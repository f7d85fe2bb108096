"""The ``onecycle`` command-line interface. Each subcommand has a module in ``commands``."""
