"""The `onecycle` command: one module per subcommand in ``commands``."""
