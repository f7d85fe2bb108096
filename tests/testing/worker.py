"""A rank that says what it got, and then does as it is told."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


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
        total = torch.ones(1)
        dist.all_reduce(total)
        print("sum", int(total), flush=True)  # noqa: T201
        dist.destroy_process_group()
    elif what == "leave":
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 0:
            dist.all_reduce(torch.ones(1))
    elif what == "late":
        first = not Path(f"life.{rank}").exists()
        Path(f"life.{rank}").write_text("")
        if not first and rank == 0:
            time.sleep(4)
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        if first:
            sys.exit(1) if rank else time.sleep(60)
        print("sum", int(total), flush=True)  # noqa: T201
        dist.destroy_process_group()
    elif what == "saves":
        signal.signal(
            signal.SIGTERM, lambda *_: (Path(f"saved.{rank}").write_text(""), sys.exit(0))
        )
        time.sleep(300)
    else:
        time.sleep(300)


if __name__ == "__main__":
    main(*sys.argv[1:])
