"""The launch scripts without a cluster: what they print, which status they end with, what a signal does, what Slurm and
Kubernetes are given. torchrun, srun and scontrol are played by small scripts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.launch_scripts import ROOT, SHAPES, dry_run, write_config
from tests.support.machines import script

PREPARE, VERIFY = "tools/prepare_preferences.py", "tools/convert_checkpoint.py"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data, a model, and `bin` with a python and a torchrun that only say what they were given."""
    for name in SHAPES:
        write_config(tmp_path / name, name)
    (tmp_path / "data.jsonl").write_text("{}\n", encoding="utf-8")
    script(
        tmp_path / "bin" / "python",
        f'echo "$@" >>{tmp_path}/calls\n'
        'case $1 in *prepare_preferences.py) mkdir -p "$4" && echo "{}" >"$4/manifest.json" ;; esac',
    )
    torchrun(tmp_path, f"mkdir -p {tmp_path}/out/run {tmp_path}/out/hf")
    return tmp_path


def torchrun(place: Path, does: str) -> None:
    script(place / "bin" / "torchrun", f'echo torchrun "$@" >>{place}/calls\n{does}')


def save(place: Path, step: int) -> str:
    """Shell for a checkpoint of a step."""
    run = place / "out" / "run"
    return f"mkdir -p {run}; echo {step} >{run}/latest_checkpointed_iteration.txt"


def environment(place: Path, **variables: str) -> dict[str, str]:
    # The checkout's own .venv, where there is one, would come first: an image has none of these names in it.
    return {"PATH": f"{place}/bin:/usr/bin:/bin", "HOME": str(place), **variables}


def launch(place: Path, name: str = "qwen2.5_7b", data: str = "data.jsonl", **variables: str):
    command = ["/bin/bash", str(place / "checkout" / "examples" / f"{name}.sh"), data, name, "out"]
    return subprocess.run(
        command, cwd=place, env=environment(place, **variables), capture_output=True, text=True, timeout=60
    )


@pytest.fixture(autouse=True)
def _checkout(place: Path) -> None:
    """The scripts put the checkout's .venv first; here is a checkout without one."""
    (place / "checkout").mkdir()
    (place / "checkout" / "examples").symlink_to(ROOT / "examples")


def calls(place: Path) -> list[str]:
    file = place / "calls"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


@pytest.mark.parametrize("name", SHAPES)
def test_a_dry_run_needs_nothing_and_starts_nothing(name, tmp_path):
    shown = dry_run(f"{name}.sh", "no such data", "no such model", str(tmp_path / "out"), "--seed", "7")
    assert [PREPARE in " ".join(command) for command in shown.commands] == [True, False, False]
    prepare, train, verify = shown.commands
    assert prepare[2:6] == ["no such data", "--output", f"{tmp_path}/out/data", "--tokenizer"]
    assert train[0] == "torchrun"
    assert train[-2:] == ["--seed", "7"]
    for published in (
        "--amopo-pairwise simpo --amopo-beta 0.8 --amopo-gamma 2.0 --amopo-epochs 3",
        "--lr 3e-7 --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.1 --clip-grad 3.0",
    ):
        assert published in " ".join(train)
    assert "--cutoff-len 1024" in " ".join(prepare)
    assert verify[2:] == ["verify", f"{tmp_path}/out/hf", f"{tmp_path}/out/run"]
    assert "imports the model" in shown.titles[1]
    assert not (tmp_path / "out").exists()


def test_from_data_to_a_verified_export(place):
    done = launch(place)
    assert done.returncode == 0, done.stderr
    prepare, train, verify = calls(place)
    assert PREPARE in prepare
    assert train.startswith("torchrun --standalone --nproc-per-node 8 -m megatron_amopo.train --amopo-data out/data ")
    assert verify.endswith("convert_checkpoint.py verify out/hf out/run")
    again = launch(place)
    assert again.returncode == 0
    assert "finished already: out/hf" in again.stdout
    assert len(calls(place)) == 3


def failing_verification(place: Path) -> None:
    script(place / "bin" / "python", f'echo "$@" >>{place}/calls\nexit 75')


def test_an_export_that_is_not_the_last_step_is_never_finished(place):
    (place / "prepared").mkdir()
    (place / "prepared" / "manifest.json").write_text("{}", encoding="utf-8")
    python = (place / "bin" / "python").read_text(encoding="utf-8")
    failing_verification(place)
    torchrun(place, f"{save(place, 20)}; mkdir {place}/out/hf")
    assert launch(place, data="prepared").returncode == 3  # whatever the check ends with
    again = launch(place, data="prepared")
    assert again.returncode == 3
    assert "finished already" not in again.stdout
    assert [call.split()[0].split("/")[-1] for call in calls(place)] == ["torchrun"] + 2 * ["convert_checkpoint.py"]
    (place / "bin" / "python").write_text(python, encoding="utf-8")
    assert launch(place, data="prepared").returncode == 0
    assert "finished already" in launch(place, data="prepared").stdout


@pytest.mark.parametrize(
    ("variables", "on_top", "expected"),
    [
        ({}, "false", "checkout"),
        ({"CONTAINER": "image.sqsh"}, "false", "image"),
        ({"NVIDIA_PYTORCH_VERSION": "26.06"}, "false", "image"),
        ({"NVIDIA_PYTORCH_VERSION": "26.06"}, "true", "checkout"),  # made in the container
    ],
)
def test_the_host_s_environment_stays_out_of_a_container(variables, on_top, expected, place):
    environment_of = place / "checkout" / ".venv"
    for folder, says in ((environment_of / "bin", "checkout"), (place / "bin", "image")):
        script(folder / "torchrun", f"echo {says} >>{place}/calls; exit 1")
        script(folder / "python", 'mkdir -p "$4" && echo "{}" >"$4/manifest.json"')
    (environment_of / "pyvenv.cfg").write_text(f"include-system-site-packages = {on_top}\n", encoding="utf-8")
    assert launch(place, **variables).returncode == 1
    assert calls(place) == [expected]


def test_prepared_data_is_used_as_it_is(place):
    (place / "prepared").mkdir()
    (place / "prepared" / "manifest.json").write_text("{}", encoding="utf-8")
    assert launch(place, data="prepared").returncode == 0
    assert "--amopo-data prepared " in calls(place)[0]


@pytest.mark.parametrize("finished", [False, True])
def test_an_output_belongs_to_its_inputs(finished, place):
    if not finished:
        torchrun(place, "exit 1")
    first = launch(place)
    assert first.returncode == (0 if finished else 1)
    (place / "other.jsonl").write_text("{}\n", encoding="utf-8")
    before = calls(place)
    for changed, said in (
        ({"CUTOFF": "2048"}, ["< --cutoff-len 1024", "> --cutoff-len 2048"]),
        ({"data": "other.jsonl"}, [f"< DATA {place}/data.jsonl", f"> DATA {place}/other.jsonl"]),
        ({"name": "qwen2.5_14b"}, [f"> MODEL {place}/qwen2.5_14b"]),
    ):
        refused = launch(place, **changed)
        assert refused.returncode == 2
        assert "was begun with other inputs" in refused.stderr
        assert [line for line in said if line not in refused.stderr.splitlines()] == []
    assert calls(place) == before
    again = launch(place, data="./data.jsonl")
    assert again.returncode == first.returncode
    assert "using prepared data: out/data" in again.stdout


def test_the_other_nodes_wait_for_the_first_ones_data(place):
    variables = {"NODE_RANK": "1", "MASTER_ADDR": "node0", "WAIT_MINUTES": "0"}
    waited = launch(place, "qwen2.5_32b", **variables)
    assert waited.returncode == 2
    assert "out/data/manifest.json isn't there" in waited.stderr
    (place / "out" / "data").mkdir(parents=True)
    (place / "out" / "data" / "manifest.json").write_text("{}", encoding="utf-8")
    assert launch(place, "qwen2.5_32b", **variables).returncode == 0
    (train,) = calls(place)  # and they neither prepare nor verify
    assert train.startswith(
        "torchrun --nnodes 2 --node-rank 1 --master-addr node0 --master-port 29500 --nproc-per-node 8"
    )


@pytest.mark.parametrize(
    ("torchrun_does", "status", "again"),
    [
        ("exit 1", 1, None),  # refused, or crashed before anything was saved
        ("SAVE 20; exit 1", 75, 1),  # crashed after progress
        ("SAVE 10; exit 1", 1, None),  # crashed without: the checkpoint is that of the start
        ("SAVE 20; echo >RUN/requeue; exit 1", 75, 138),  # told to stop
        ("SAVE 10; echo >RUN/requeue; exit 1", 75, 138),
        ("SAVE 20; exit 0", 75, 138),  # --exit-interval: not the last step, nothing exported
        ("SAVE 20; mkdir OUT/hf; exit 0", 0, None),
        ("SAVE 20; mkdir OUT/hf; exit 1", 0, None),  # failed after all was done
    ],
)
def test_the_status_says_whether_to_start_again(torchrun_does, status, again, place):
    run = place / "out" / "run"
    run.mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("10\n", encoding="utf-8")
    (run / "requeue").write_text("", encoding="utf-8")  # of an earlier stop; says nothing of this start
    for word, meaning in (("SAVE 20", save(place, 20)), ("SAVE 10", save(place, 10)), ("RUN", str(run))):
        torchrun_does = torchrun_does.replace(word, meaning)
    torchrun(place, torchrun_does.replace("OUT", str(place / "out")))
    assert launch(place).returncode == status
    if status == 75:
        (run / "requeue").unlink(missing_ok=True)
        # The checkpoint of that step is there by now, so the second start makes no progress.
        assert launch(place, REQUEUE_STATUS="138").returncode == again


def signalled(place: Path, sent: signal.Signals, *, up: str) -> int:
    """Start the script on the first node and send it a signal when file ``up`` is there; the script's status."""
    command = ["/bin/bash", str(place / "checkout" / "examples" / "qwen2.5_7b.sh"), "data.jsonl", "qwen2.5_7b", "out"]
    process = subprocess.Popen(command, cwd=place, env=environment(place), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (place / up).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_is_a_stop(sent, place):
    script(place / "bin" / "python", f"touch {place}/up; exec sleep 60 >/dev/null")
    start = time.monotonic()
    assert signalled(place, sent, up="up") == 75
    assert time.monotonic() - start < 30
    assert (place / "out" / "run" / "requeue").exists()  # srun's status may say something else
    assert calls(place) == []


@pytest.mark.parametrize("starts", [0, 3], ids=["ranks that train", "ranks that start"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_torchrun_lives(sent, starts, place):
    """A stand-in for torchrun that a signal would kill, with a rank that saves for a while when it is told to stop; it
    listens ``starts`` seconds after the signal."""
    run = place / "out" / "run"
    (place / "rank.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"run = pathlib.Path({str(run)!r})\n"
        "def stop(*_):\n"
        "    time.sleep(1)\n"
        "    run.mkdir(parents=True)\n"
        "    (run / 'latest_checkpointed_iteration.txt').write_text('7')\n"
        "    (run / 'requeue').write_text('7')\n"
        "    sys.exit(75)\n"
        f"up = pathlib.Path({str(place / 'up')!r})\n"
        f"if {starts}:\n"
        "    up.touch()\n"
        f"    time.sleep({starts})\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "up.touch()\n"
        "while True:\n"
        "    time.sleep(0.1)\n",
        encoding="utf-8",
    )
    torchrun(place, f"{sys.executable} {place}/rank.py & wait $! || exit 1")
    assert signalled(place, sent, up="up") == 75
    assert (run / "requeue").read_text() == "7"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PRECISION": "fp16"}, "PRECISION=fp16: expected bf16 or fp8"),
        ({"PRECISION": "fp8", "FP8_RECIPE": "mxfp8"}, "FP8_RECIPE=mxfp8: expected tensorwise, blockwise or delayed"),
        ({"PRECISION": "fp8", "FP8_RECIPE": "delayed"}, "set FP8_BF16_LAYERS=0, too"),
        ({"RECOMPUTE": "some"}, "RECOMPUTE=some: expected none, mlp or full"),
    ],
)
def test_variables_that_mean_nothing_are_refused(variables, message, place):
    done = launch(place, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls(place) == []


def test_missing_inputs_are_named(place):
    assert "DATA nothing: no such file" in launch(place, data="nothing").stderr
    (place / "qwen2.5_7b" / "config.json").unlink()
    assert "MODEL qwen2.5_7b: not a Hugging Face folder" in launch(place).stderr
    without = subprocess.run(
        ["/bin/bash", str(ROOT / "examples" / "qwen2.5_7b.sh")], capture_output=True, text=True, env=environment(place)
    )
    assert without.returncode == 2
    assert "examples/qwen2.5_7b.sh DATA MODEL OUTPUT" in without.stderr


# Slurm


def sbatch(
    place: Path, srun: str, paths: tuple[str, str, str] | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """The batch script on the first node of two, with an srun that does what is given."""
    shown = "srun MASTER_ADDR=$MASTER_ADDR NODES=$NODES HF_CACHE=$HF_CACHE"
    script(place / "bin" / "srun", f'echo "{shown} $@" >>{place}/calls\n{srun}')
    script(place / "bin" / "scontrol", f'[ "$1" = show ] && printf "n1\\nn2\\n" || echo "scontrol $@" >>{place}/calls')
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    command = ["/bin/bash", "examples/slurm/train.sbatch", "examples/qwen2.5_32b.sh"]
    command += paths or [str(place / "data.jsonl"), str(place / "qwen2.5_32b"), str(place / "out")]
    return subprocess.run(
        command,
        cwd=place / "checkout",
        env=environment(place, **slurm, **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_slurm_starts_a_task_per_node_and_ends(place):
    done = sbatch(place, f"mkdir -p {place}/out/hf; touch {place}/out/verified")
    assert done.returncode == 0, done.stderr
    (srun,) = calls(place)
    assert srun.startswith("srun MASTER_ADDR=n1 NODES=2 HF_CACHE= --kill-on-bad-exit=1 --label bash -c")
    assert srun.endswith(f"task examples/qwen2.5_32b.sh {place}/data.jsonl {place}/qwen2.5_32b {place}/out")


@pytest.mark.parametrize(
    ("srun", "status", "requeued"),
    [
        ("mkdir -p RUN; echo >RUN/requeue; exit 137", 75, True),  # stopped; srun killed what was left
        ("SAVE; exit 1", 75, True),
        ("exit 2", 2, False),
        ("SAVE; mkdir HF; exit 3", 3, False),  # the export isn't the last step's weights
        ("SAVE; mkdir HF; exit 137", 3, False),  # nor is one known to be while the check hasn't ended
    ],
)
def test_slurm_queues_again_what_can_go_on(srun, status, requeued, place):
    for word, meaning in (("SAVE", save(place, 50)), ("RUN", str(place / "out" / "run")), ("HF", f"{place}/out/hf")):
        srun = srun.replace(word, meaning)
    done = sbatch(place, srun)
    assert done.returncode == status
    assert (calls(place)[-1] == "scontrol requeue 4711") == requeued


def test_slurm_does_not_take_an_earlier_start_s_word(place):
    """A job that was stopped, and whose next start ends before the scripts begin."""
    run = place / "out" / "run"
    run.mkdir(parents=True)
    (run / "requeue").write_text("", encoding="utf-8")
    assert sbatch(place, "exit 1").returncode == 1
    assert not any("requeue" in call for call in calls(place))


@pytest.mark.parametrize(("restarts", "requeued"), [("2", True), ("3", False)])
def test_slurm_does_not_start_again_for_ever(restarts, requeued, place):
    variables = {"SLURM_RESTART_COUNT": restarts, "MAX_RESTARTS": "3"}
    done = sbatch(place, f"{save(place, 50)}; exit 1", **variables)
    assert done.returncode == 75
    assert (calls(place)[-1] == "scontrol requeue 4711") == requeued
    assert ("MAX_RESTARTS=3" in done.stderr) != requeued


def test_a_container_sees_what_the_job_needs(place):
    """Relative paths, an OUTPUT that isn't there yet, imports shared between runs."""
    (place / "checkout" / "prepared").mkdir()
    (place / "checkout" / "model").symlink_to(place / "qwen2.5_32b")
    paths = ("prepared", "model/", "runs/../new")
    variables = {"CONTAINER": "image.sqsh", "HF_CACHE": "cache", "MOUNTS": "/scratch"}
    sbatch(place, "exit 1", paths=paths, **variables)
    (srun,) = calls(place)
    checkout = place / "checkout"
    mounts = [checkout, *(checkout / name for name in ("prepared", "model", "new", "cache")), "/scratch"]
    assert f"--container-image image.sqsh --container-mounts {','.join(map(str, mounts))} " in srun
    assert f"--container-workdir {checkout} " in srun
    assert srun.endswith(f"qwen2.5_32b.sh {checkout}/prepared {checkout}/model {checkout}/new")
    assert f"HF_CACHE={checkout}/cache " in srun
    assert (checkout / "new").is_dir()
    assert (checkout / "cache").is_dir()


def test_slurm_is_told_to_signal_and_requeue():
    directives = [
        line.removeprefix("#SBATCH ")
        for line in (ROOT / "examples/slurm/train.sbatch").read_text(encoding="utf-8").splitlines()
        if line.startswith("#SBATCH")
    ]
    assert {"--requeue", "--signal=B:USR1@600", "--ntasks-per-node=1", "--open-mode=append"} <= set(directives)


# Kubernetes


def test_the_kubernetes_job_has_what_the_operator_and_the_scripts_need():
    """By the fields that the API requires; the operator's schema is not part of any package."""
    job = yaml.safe_load((ROOT / "examples/kubernetes/pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert isinstance(job["spec"]["nprocPerNode"], str)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    nodes = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] == "ExitCode"
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert all(isinstance(value, str) for value in variables.values())
        assert variables["NODES"] == str(nodes)
        assert int(variables["REQUEUE_STATUS"]) >= 128  # what the operator starts again
        assert container["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["nprocPerNode"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        (command,) = container["command"]
        inside = Path(command).relative_to("/opt/megatron-amopo")
        assert os.access(ROOT / inside, os.X_OK)
        shown = dry_run(inside.name, *container["args"], **variables, PET_NODE_RANK="1", MASTER_ADDR="master")
        assert shown.world_size == 8 * nodes
        assert shown.command("torchrun")[1:7] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "master"]
