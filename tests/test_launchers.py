"""Launchers: start of the jobs of a sweep, and the processes of one job."""

import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import TINY, Command
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from diffusion_lab.command import launcher
from diffusion_lab.command.process import exit_with_parent
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.report.sweep_report import read_jobs
from diffusion_lab.runs import hydra_plugins as plugins
from diffusion_lab.runs import ranks as rank_info
from diffusion_lab.runs.compose import CONFIG_PATH, register_resolvers

TRAIN = Path(__file__).parent.parent / "train.py"
JOBS = [*TINY, "trainer.max_steps=2", "schedule=linear,cosine", "hydra.sweep.dir=s"]
SMALL = [text for text in JOBS if not text.startswith("data.batch_size")] + ["data.batch_size=4"]


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return hydra.compose("train", list(overrides), return_hydra_config=True)


def sweep(*overrides: str, **environment: str) -> None:
    """Runs a sweep in a separate process, because launchers leave processes behind."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, str(TRAIN), "-m", *overrides],
        capture_output=True, text=True, env=variables, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    jobs = read_jobs(Path("s"))
    assert [(job.overrides["schedule"], job.status) for job in jobs] == [
        ("linear", "finished"), ("cosine", "finished")
    ]  # fmt: skip
    assert jobs[0].figures["val/loss_ema"] != jobs[1].figures["val/loss_ema"]
    assert "2 jobs, 2 finished" in result.stdout


# --- plugins ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "plugin", "extra"),
    [
        ("launcher=joblib", "hydra-joblib-launcher", "joblib"),
        ("launcher=submitit_local", "hydra-submitit-launcher", "slurm"),
        ("launcher=slurm", "hydra-submitit-launcher", "slurm"),
        ("launcher=ray", "hydra-ray-launcher", "ray"),
        ("sweep=optuna", "hydra-optuna-sweeper", "optuna"),
    ],
)
def test_missing_plugin_is_an_error_that_names_its_extra(
    choice: str, plugin: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration composes without plugins; placeholders replace the installed ones."""
    Plugins.instance()  # plugins register in the original repository, not in the temporary copy
    repo = ConfigStore.instance().repo
    monkeypatch.setattr(ConfigStore.instance(), "repo", {**repo, "hydra": _copy(repo["hydra"])})
    monkeypatch.setattr(plugins, "installed", lambda package: False)
    config = composed(choice, "trainer.devices=2")
    node = config.hydra.launcher if "launcher" in choice else config.hydra.sweeper
    assert node._target_ == f"hydra_plugins.{plugin.replace('-', '_')}"
    with pytest.raises(ConfigError) as error:
        plugins.check_plugins(config.hydra)
    assert str(error.value) == f"{choice} needs {plugin}; pip install 'diffusion-lab[{extra}]'"
    plugins.check_plugins(composed("trainer.devices=2").hydra)


def _copy(tree: dict) -> dict:
    return {key: _copy(node) if isinstance(node, dict) else node for key, node in tree.items()}


@pytest.mark.skipif(plugins.installed("hydra_ray_launcher"), reason="Ray is installed")
def test_sweep_with_a_missing_plugin_is_refused(tiny: Command) -> None:
    result = tiny("-m", "launcher=ray", "seed=0,1", "hydra.sweep.dir=s")
    assert result.code == 1
    assert "launcher=ray needs hydra-ray-launcher; pip install 'diffusion-lab[ray]'" in result.text
    assert "Traceback" not in result.text and not Path("s").exists()


def test_slurm_starts_one_task_per_device(tiny: Command) -> None:
    for overrides, tasks, gpus in (
        (["trainer=ddp", "trainer.devices=4"], 4, 4),
        (["trainer=ddp_sim"], 2, 0),
        (["trainer=gpu"], 1, 1),
    ):
        node = composed("launcher=slurm", *overrides).hydra.launcher
        assert (node.tasks_per_node, node.gpus_per_node) == (tasks, gpus)
    result = tiny("-m", "launcher=slurm", "trainer=ddp", "seed=0,1", "hydra.sweep.dir=s")
    assert result.code == 1
    assert "trainer.devices=4" in result.text and "Traceback" not in result.text


# --- the processes of one job -------------------------------------------------------------------


def launched(monkeypatch: pytest.MonkeyPatch, code: str, count: int = 2) -> None:
    """Launches ranks that execute `code`; in it, k is the rank and folder a shared directory."""
    head = (
        "import os, signal, sys, time; k = int(os.environ['LOCAL_RANK']); folder = sys.argv[2]\n"
    )
    monkeypatch.setattr(launcher, "PROGRAM", [sys.executable, "-c", head + code])
    logs = OmegaConf.create({"job_logging": {}})
    monkeypatch.setattr(launcher.HydraConfig, "get", lambda: logs)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / ".ranks").mkdir()  # of a command that was killed
        config = {"paths": {"output_dir": directory}, "a": 1, "b": "${a}"}
        try:
            launcher.launch("train", OmegaConf.create(config), count)
        finally:
            assert os.listdir(directory) == []


def test_each_rank_has_the_environment_variables_of_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "LOCAL_RANK NODE_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    before = dict(os.environ)
    launched(
        monkeypatch,
        f"text = ' '.join(os.environ[n] for n in {names}) + open(folder + '/config.yaml').read()\n"
        f"open(f'{tmp_path}/{{k}}', 'w').write(text)",
        count=3,
    )
    assert dict(os.environ) == before
    texts = [(tmp_path / str(k)).read_text() for k in range(3)]
    ports = {text.splitlines()[0].split()[4].removesuffix("paths:") for text in texts}
    assert len(ports) == 1
    for k, text in enumerate(texts):
        assert text.startswith(f"{k} 0 3 127.0.0.1 ")
        assert text.endswith("a: 1\nb: 1\n")


def test_killed_rank_ends_the_ranks_that_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "TERMINATE_TIMEOUT", 0.2)
    code = "time.sleep(600) if k == 0 else os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RunError, match="device 1 of 2 was killed by SIGKILL; is the memory full"):
        launched(monkeypatch, code)


def test_first_error_message_of_a_rank_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "time.sleep(0 if k else 0.3)\n"
        "open(f'{folder}/error-{k}', 'w').write(f'reason {k}')\nsys.exit(1)"
    )
    with pytest.raises(RunError, match=r"^reason 1$"):
        launched(monkeypatch, code)
    with pytest.raises(RunError, match="device 0 of 2 ended with code 3"):
        launched(monkeypatch, "sys.exit(3)")


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGINT", 130)])
def test_signal_is_sent_to_every_rank(
    number: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        f"def note(*_): open(f'{tmp_path}/{{k}}.got', 'w'); sys.exit(0)\n"
        f"signal.signal(signal.{number}, note)\n"
        f"open(f'{tmp_path}/{{k}}.ready', 'w')\ntime.sleep(600)"
    )

    def send() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.Signals[number])

    threading.Thread(target=send).start()
    handler = signal.getsignal(signal.Signals[number])
    with pytest.raises(SystemExit) as stop:
        launched(monkeypatch, script)
    assert stop.value.code == code
    assert {p.name for p in tmp_path.glob("*.got")} == {"0.got", "1.got"}
    assert signal.getsignal(signal.Signals[number]) is handler


def _child(pid: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_with_parent(pid)
    time.sleep(600)


def test_job_ends_when_its_parent_process_ends() -> None:
    context = multiprocessing.get_context("fork")
    parent = subprocess.Popen(["sleep", "600"])
    child = context.Process(target=_child, args=(parent.pid,))
    child.start()
    time.sleep(0.2)
    assert child.is_alive()
    parent.kill()
    parent.wait()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM


def listening(port: int) -> set[str]:
    """The addresses at which this machine listens at a port, as the kernel writes them."""
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return {line[1][:-5] for line in lines if line[3] == "0A" and int(line[1][-4:], 16) == port}


def test_the_store_of_one_machine_listens_on_loopback_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    store = rank_info.serve_store("127.0.0.1", port, rank_info._bound("127.0.0.1", port))
    assert listening(port) == {"0100007F"}
    again = TCPStore("127.0.0.1", port, is_master=True, multi_tenant=True, wait_for_workers=False)
    again.set("key", "value")  # as the process group does
    assert store.get("key") == b"value" and listening(port) == {"0100007F"}
    for elsewhere in ("node1.cluster", "192.0.2.1"):  # a name, and an address of documentation
        assert rank_info._bound(elsewhere, port) is None


def test_ranks_of_one_machine_use_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    launched(
        monkeypatch,
        f"import socket; text = ' '.join(os.environ[n] for n in {names})\n"
        "fd = int(os.environ['DIFFUSION_LAB_LISTENER'])\n"
        "if k == 0: text += ' %s %s' % socket.socket(fileno=fd).getsockname()\n"
        f"open(f'{tmp_path}/{{k}}', 'w').write(text + ' ' + os.environ['MASTER_PORT'])",
    )
    lo, chosen, address, port, expected = (tmp_path / "0").read_text().split()
    assert (lo, chosen, address, port) == ("lo", "chosen", "127.0.0.1", expected)
    assert (tmp_path / "1").read_text() == f"lo chosen {expected}"


def _broadcast(k: int, variables: dict[str, str], queue: Any, barrier: Any) -> None:
    os.environ.update({name: value.format(k=k) for name, value in variables.items()})
    rank_zero_only.rank = k
    rank_info._store.cache_clear()
    queue.put((k, rank_info.broadcast_from_rank_zero(f"directory of {k}")))
    barrier.wait()  # rank 0 must not exit before the others have read


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": "{k}", "RANK": "{k}", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"},
        {"SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "3", "SLURM_PROCID": "{k}",
         "SLURM_LOCALID": "{k}", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"},
    ],
    ids=["variables", "slurm"],
)  # fmt: skip
def test_externally_started_ranks_use_the_directory_of_rank_0(variables: dict[str, str]) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = {"MASTER_PORT": str(listener.getsockname()[1])}
    more = (queue, context.Barrier(3))
    ranks = [
        context.Process(target=_broadcast, args=(k, variables | port, *more)) for k in (2, 1, 0)
    ]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=60) for _ in ranks)
    assert found == dict.fromkeys(range(3), "directory of 0")
    for process in ranks:
        process.join()
    assert rank_info.broadcast_from_rank_zero("my own") == "my own"


# --- sweeps with plugins -------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_joblib_runs_a_sweep(workdir: Path) -> None:
    sweep("launcher=joblib", *JOBS)


@pytest.mark.slow
def test_submitit_local_runs_jobs_with_two_devices(workdir: Path) -> None:
    sweep("launcher=submitit_local", "trainer=ddp_sim", *SMALL)
    logs = [path.read_text() for path in workdir.glob("s/.submitit/*/*_log.out")]
    assert len(logs) == 2 and all("finished: " in text for text in logs)


@pytest.mark.slow
@pytest.mark.skipif(not plugins.installed("hydra_ray_launcher"), reason="Ray is not installed")
def test_ray_runs_a_sweep(workdir: Path) -> None:
    sweep("launcher=ray", *JOBS, RAY_USAGE_STATS_ENABLED="0", HOME=str(workdir))


@pytest.mark.slow
def test_slurm_runs_jobs_with_two_devices(workdir: Path) -> None:
    """The cluster is simulated by the commands of fake_slurm.py."""
    for name in ("sbatch", "srun", "sacct"):
        program = workdir / "bin" / name
        program.parent.mkdir(exist_ok=True)
        code = (Path(__file__).parent / "fake_slurm.py").read_text()
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{workdir / 'bin'}:{os.environ['PATH']}"
    sweep("launcher=slurm", "trainer=ddp_sim", *SMALL, PATH=path, CLUSTER=str(workdir / "cluster"))
    [script] = workdir.glob("s/.submitit/*/*_submission.sh")
    assert "--ntasks-per-node=2" in script.read_text()
    assert "--gpus-per-node=0" in script.read_text()
    results = sorted(path.name[-14:] for path in workdir.glob("s/.submitit/*/*_result.pkl"))
    assert results == ["0_0_result.pkl", "0_1_result.pkl", "1_0_result.pkl", "1_1_result.pkl"]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in "".join(
        path.read_text() for path in workdir.glob("s/.submitit/*/*_log.err")
    )


@pytest.mark.slow
def test_torchrun_creates_one_directory(workdir: Path) -> None:
    """The second rank starts 1.5 s later, so its own directory name would differ."""
    late = "import os, runpy, sys, time; time.sleep(1.5 * int(os.environ['RANK'])); "
    run = f"sys.argv = {[str(TRAIN), *TINY, 'trainer=ddp_sim', 'trainer.max_steps=2']}; "
    (workdir / "late.py").write_text(
        f"{late}{run}runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*command, "--nproc-per-node=2", "late.py"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    [run] = workdir.glob("outputs/train/*/*")
    assert (run / "finished.json").exists() and (run / ".hydra" / "config.yaml").exists()
    assert result.stdout.count("finished: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_terminated_sweep_leaves_no_process(launcher: str, workdir: Path) -> None:
    if not find_spec("hydra_plugins"):
        pytest.skip("no plugin is installed")
    jobs = [text for text in JOBS if not text.startswith("trainer.max_steps")]
    command = [sys.executable, str(TRAIN), "-m", f"launcher={launcher}", *jobs]
    with open("text", "w") as text:
        process = subprocess.Popen(
            [*command, "trainer.max_steps=1000000"],
            stdout=text, stderr=text, env={**os.environ, "MARK": str(workdir)},
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(workdir.glob("s/*/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    while (left := _marked(str(workdir))) and time.monotonic() < deadline + 60:
        time.sleep(0.5)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    assert "unfinished" in Path("text").read_text()


def _marked(mark: str) -> list[int]:
    """Returns the ids of the processes that have inherited $MARK."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
