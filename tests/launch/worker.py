"""A rank that says what it got, and then does as it is told."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

TIMEOUT = 20


def main(what, *rest):
    rank = int(os.environ["RANK"])
    Path(f"pid.{rank}").write_text(str(os.getpid()))
    if what == "say":
        print(json.dumps({"rank": rank, "argv": rest, "odd": os.environ.get("ODD")}), flush=True)  # noqa: T201
    elif what == "fail" and rank == 1:
        print("about to fail", flush=True)  # noqa: T201
        sys.exit(7)
    elif what == "sum":
        dist.init_process_group("gloo")
        total = __import__("torch").ones(1)
        dist.all_reduce(total)
        print("sum", int(total), flush=True)  # noqa: T201
        dist.destroy_process_group()
    elif what == "leave":
        sys.exit(0 if rank else time.sleep(2))
    elif what == "saves":
        signal.signal(
            signal.SIGTERM, lambda *_: (Path(f"saved.{rank}").write_text(""), sys.exit(0))
        )
        time.sleep(300)
    else:
        time.sleep(300)


if __name__ == "__main__":
    main(*sys.argv[1:])
