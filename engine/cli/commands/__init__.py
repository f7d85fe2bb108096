"""The commands of ``onecycle``, one file each: its arguments in `add`, its work in `run`."""
