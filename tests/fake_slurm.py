"""Fake SLURM commands sbatch, srun and sacct, with the options that submitit uses.

A job is a process on this machine; the folder $CLUSTER has a file with the state of each job.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

STATES = Path(os.environ["CLUSTER"])


def sbatch(script: str) -> None:
    """Starts the jobs of an array."""
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", Path(script).read_text()))
    tasks, number = options["ntasks-per-node"], os.getpid()
    STATES.mkdir(exist_ok=True)
    for k in range(int(re.search(r"0-(\d+)", options["array"])[1]) + 1):
        variables = {
            "SLURM_JOB_ID": number + k, "SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": k,
            "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": tasks, "SLURM_JOB_NUM_NODES": 1,
            "SLURM_NNODES": 1, "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost",
            "SLURM_JOB_NAME": options["job-name"],
        }  # fmt: skip
        state = STATES / f"{number}_{k}"
        state.write_text("RUNNING")
        subprocess.Popen(
            ["sh", "-c", f"bash {script}; printf COMPLETED > {state}"],
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(f"Submitted batch job {number}")


def srun(*words: str) -> None:
    """Starts the tasks of a job."""
    output, error = (words[words.index(name) + 1] for name in ("--output", "--error"))
    job, k = os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]

    def opened(name: str, task: int) -> object:
        for mark, text in (("%A", job), ("%a", k), ("%t", str(task))):
            name = name.replace(mark, text)
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        return open(name, "a")

    tasks = [
        subprocess.Popen(
            words[words.index("--error") + 2 :],
            env={**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task),
                 "SLURM_NODEID": "0"},
            stdout=opened(output, task), stderr=opened(error, task),
        )
        for task in range(int(os.environ["SLURM_NTASKS"]))
    ]  # fmt: skip
    sys.exit(max(task.wait() for task in tasks))


def sacct(*_: str) -> None:
    """Prints the states of the jobs."""
    print("JobID|State|NodeList")
    for path in STATES.iterdir():
        print(f"{path.name}|{path.read_text()}|localhost")


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct}[Path(sys.argv[0]).name](*sys.argv[1:])
