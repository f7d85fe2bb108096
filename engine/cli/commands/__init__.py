"""One module per subcommand of ``onecycle``: `add` defines its arguments, `run` executes it."""
