"""The script that ranks run in launch tests. The first argument selects the behavior of the rank.

By default, the rank waits.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main(mode, *rest):
    rank = int(os.environ["RANK"])
    Path(f"pid.{rank}").write_text(str(os.getpid()))
    if mode == "print":
        print(json.dumps({"rank": rank, "argv": rest, "odd": os.environ.get("ODD")}), flush=True)  # noqa: T201
    elif mode == "fail" and rank == 1:
        print("about to fail", flush=True)  # noqa: T201
        sys.exit(7)
    elif mode == "sum":
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        print("sum", int(total), flush=True)  # noqa: T201
        dist.destroy_process_group()
    elif mode == "leave":
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 0:
            dist.all_reduce(torch.ones(1))
    elif mode == "late":
        is_first = not Path(f"started.{rank}").exists()
        Path(f"started.{rank}").write_text("")
        if not is_first and rank == 0:
            time.sleep(4)
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        if is_first:
            sys.exit(1) if rank else time.sleep(60)
        print("sum", int(total), flush=True)  # noqa: T201
        dist.destroy_process_group()
    elif mode == "save":
        signal.signal(
            signal.SIGTERM, lambda *_: (Path(f"saved.{rank}").write_text(""), sys.exit(0))
        )
        time.sleep(300)
    else:
        time.sleep(300)


if __name__ == "__main__":
    main(*sys.argv[1:])
