"""Train on all machines of a Ray cluster that have GPUs: `python scripts/launch_ray.py config.yaml [--resume ...]`.

Config, data and output_dir lie where all of them see them.
"""

import subprocess
import sys

import ray


@ray.remote  # type: ignore[untyped-decorator]
def start(command: list[str]) -> int:
    """Run torchrun, which supervises the processes of its machine, on the machine that this task was sent to."""
    return subprocess.run(command, check=False).returncode


ray.init(address="auto")
nodes = [(node["NodeManagerAddress"], int(node["Resources"].get("GPU", 0))) for node in ray.nodes() if node["Alive"]]
nodes = [node for node in nodes if node[1]] or nodes
meet = ["--rdzv-backend", "c10d", "--rdzv-id", "loratune", "--rdzv-endpoint", f"{nodes[0][0]}:29500"]
tasks = []
for number, (address, gpus) in enumerate(nodes):
    here = ["--local-addr", address, "--rdzv-conf", f"is_host={int(number == 0)}"]
    command = ["torchrun", "--nnodes", str(len(nodes)), "--nproc-per-node", str(max(gpus, 1)), *meet, *here]
    there = start.options(num_gpus=gpus, resources={f"node:{address}": 0.01})
    tasks.append(there.remote([*command, "-m", "loratune", "train", *sys.argv[1:]]))
sys.exit(max(ray.get(tasks)))
