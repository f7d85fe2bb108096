"""The `onecycle` command. Each subcommand is a module of ``commands``."""
