"""fastffl slurm: the script is bash, nothing a user types gets out of its quotes, and its life with a time limit is as it says.

srun, scontrol and torchrun are stand-ins on PATH that write down what they are given; bash and the signals are real.
"""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastffl.errors import UsageError
from fastffl.slurm import Job, script

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = (
    "it's",
    'a"b',
    "$(touch broken)",
    "`touch broken`",
    "a; touch broken",
    "x\ntouch broken",
    "#SBATCH --x",
    "\\",
    "*",
    "",
    "ü ⁂",
    "-n",
)


def checked(text: str) -> str:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return text


@pytest.mark.parametrize("gpus, nodes", [(1, 1), (8, 1), (16, 2), (6, 3)])
def test_what_slurm_is_asked_for(gpus: int, nodes: int) -> None:
    job = Job("imagenet", gpus, nodes, cpus=7, time="1-02:00:00", requeue=True, partition="a100", account="lab_7")
    lines = checked(script(job, ["imagenet"])).splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    each = gpus // nodes
    assert asked[:4] == ["job-name=imagenet", f"nodes={nodes}", "ntasks-per-node=1", f"gpus-per-node={each}"]
    assert asked[4:8] == [f"cpus-per-task={7 * each}", "time=1-02:00:00", "partition=a100", "account=lab_7"]
    assert asked[8:] == ["signal=B:TERM@120", "requeue", "open-mode=append", "output=%x-%j.log"]
    assert lines[0] == "#!/bin/bash" and all(line.startswith("#") for line in lines[1 : len(asked) + 1])
    plain = script(Job("imagenet", gpus, nodes), ["imagenet"])
    assert "#SBATCH --no-requeue" in plain and "--time" not in plain and "scontrol requeue" not in plain


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gpus": 6, "nodes": 4}, "--gpus 6 --nodes 4: nodes get equal shares; ask for --gpus 4"),
        ({"gpus": 1, "nodes": 2}, "ask for --gpus 2"),
        ({"gpus": 0}, "--gpus 0: expected 1 or more"),
        ({"gpus": 1, "nodes": 0}, "--nodes 0: expected 1 or more"),
        ({"gpus": 1, "cpus": -1}, "--cpus -1: expected 1 or more"),
        ({"gpus": 1, "time": "soon"}, "--time soon: expected hours:minutes:seconds"),
        ({"gpus": 1, "time": "12:99"}, "expected hours:minutes:seconds"),
        ({"gpus": 1, "partition": "a b"}, "--partition a b: expected a name"),
        ({"gpus": 1, "account": "x\n#SBATCH --uid=0"}, "expected a name"),
        ({"gpus": 1, "partition": "--uid=0"}, "expected a name"),
    ],
)
def test_what_can_not_be_asked_for(values: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError, match=said.replace("(", r"\(")) as error:
        Job("imagenet", **values)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", ["a b", "x\ntouch broken", "../..", "-n", "#", "ü"])
def test_a_jobs_name_is_plain(name: str) -> None:
    first = script(Job(name, 1), [name]).splitlines()[1]
    assert first.removeprefix("#SBATCH --job-name=").replace("-", "").replace(".", "").isascii() and " " not in first[9:]


# ---- a script's life --------------------------------------------------------------------------------------------------------

FAKES = {
    # runs the command in its own place, as a task of its own: a signal to it reaches the task
    "srun": 'printf "%s\\n" "$@" > "$SEEN/srun"\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n',
    "scontrol": (
        'echo "$@" >> "$SEEN/scontrol"\n[ "$1" = hostnames ] || [ "$2" != hostnames ] || printf "$HOSTS"\n'
        '[ "$2" != job ] || echo "   JobState=$STATE Reason=None"\n'
    ),
    # as torchrun: told to stop it stops its processes, waits for them and ends with 1
    "torchrun": (
        'printf "%s\\0" "$@" > "$SEEN/torchrun"\nenv > "$SEEN/env"\n'
        "trap 'echo told >> \"$SEEN/told\"' TERM\n"
        'touch "$SEEN/up"\n[ -z "$CODE" ] || exit "$CODE"\nwhile [ ! -e "$SEEN/told" ]; do sleep 0.05; done\n'
        'sleep 0.5\ntouch "$SEEN/saved"\nexit 1\n'
    ),
}


class Life:
    """A script running under the stand-ins."""

    def __init__(self, folder: Path, text: str, code: str = "", state: str = "RUNNING", **more: str):
        fakes, self.seen = folder / "fakes", folder / "seen"
        for path in (fakes, self.seen, folder / "tmp"):
            path.mkdir()
        for name, body in FAKES.items():
            (fakes / name).write_text(f"#!/bin/bash\n{body}")
            (fakes / name).chmod(0o755)
        slurm = {
            "HOSTS": "node7\\nnode8\\n",
            "SLURM_JOB_ID": "31415",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "64",
        }
        env = {
            **os.environ,
            **slurm,
            "PATH": f"{fakes}:{os.environ['PATH']}",
            "SEEN": str(self.seen),
            "CODE": code,
            "STATE": state,
        }
        (folder / "job.sbatch").write_text(text)
        self.process = subprocess.Popen(
            ["bash", "job.sbatch"],
            cwd=folder,
            env={**env, "TMPDIR": str(folder / "tmp"), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def up(self) -> "Life":
        end = time.monotonic() + 30
        while not (self.seen / "up").exists():
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        return self

    def end(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=30)
        assert not err, err
        return self.process.returncode, out

    def words(self) -> list[str]:
        return (self.seen / "torchrun").read_text().split("\0")[:-1]

    def asked(self) -> list[str]:
        return (self.seen / "scontrol").read_text().splitlines()


def test_it_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    life = Life(tmp_path, script(Job("imagenet", 16, 2), ["imagenet", "--amp"]), code="0", SLURM_RESTART_COUNT="2")
    assert life.end() == (0, "")
    assert life.words()[:6] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=node7:{20000 + 31415 % 20000}",
        "--rdzv-id=31415-2",
    ]
    assert life.words()[6:] == ["-m", "fastffl", "train", "imagenet", "--amp", "--out", "runs/imagenet-31415"]
    assert life.asked() == ["show hostnames node[7-8]"]
    told = (life.seen / "srun").read_text().splitlines()
    assert told[:4] == ["--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=64", "bash"]
    env = dict(line.split("=", 1) for line in (life.seen / "env").read_text().splitlines() if "=" in line)
    cache = tmp_path / "tmp" / f"fastffl-{os.getuid()}-31415"
    assert env["TRITON_CACHE_DIR"] == str(cache / "triton") and env["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "inductor")
    assert cache.stat().st_mode & 0o777 == 0o700 and env["OMP_NUM_THREADS"] == "1" and env["NCCL_DEBUG"] == "WARN"


def test_a_folder_of_someone_elses_is_not_taken_for_the_caches(tmp_path: Path) -> None:
    """Whoever can write there could have our processes run their kernels."""
    temp = tmp_path / "shared"
    planted = temp / f"fastffl-{os.getuid()}-31415"
    temp.mkdir()
    if os.getuid() == 0:
        planted.mkdir()
        os.chown(planted, 1, 1)
    else:
        planted.symlink_to("/")
    life = Life(tmp_path, script(Job("a", 1), ["a"]), code="0", TMPDIR=str(temp))
    assert life.end() == (0, "")
    env = dict(line.split("=", 1) for line in (life.seen / "env").read_text().splitlines() if "=" in line)
    cache = Path(env["TRITON_CACHE_DIR"]).parent
    assert cache.parent == temp and cache != planted and cache.stat().st_uid == os.getuid()


def test_nothing_a_user_types_leaves_its_quotes(tmp_path: Path) -> None:
    words = ["imagenet", *(word for text in HOSTILE for word in ("--set", text))]
    text = checked(script(Job("x", 1), words, out="$(touch broken)/it's", notes=("a\ntouch broken", "#SBATCH --uid=0")))
    life = Life(tmp_path, text, code="0")
    assert life.end() == (0, "")
    assert life.words()[6:] == ["-m", "fastffl", "train", *words, "--out", "$(touch broken)/it's"]
    assert not list(tmp_path.rglob("broken"))
    assert shlex.split(text.split("train=(")[1].split("\nhost=")[0].removesuffix(")"))[:3] == ["-m", "fastffl", "train"]


@pytest.mark.parametrize("requeue", [True, False])
def test_told_to_stop_it_tells_the_training_waits_for_it_and_goes_back_to_the_queue(requeue: bool, tmp_path: Path) -> None:
    life = Life(tmp_path, script(Job("a", 1, requeue=requeue), ["a"])).up()
    for _ in range(3):  # the scheduler may say it again
        life.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert life.process.wait(30) == 143 and (life.seen / "saved").exists(), "it waited until the training had saved"
    _, out = life.end()
    assert (life.seen / "told").read_text() == "told\n", "a second signal would break off torchrun's ending"
    assert "goes on from there" in out or "to go on from runs/a-31415" in out
    assert ("requeue 31415" in life.asked()) == requeue


def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    life = Life(tmp_path, script(Job("a", 1, requeue=True), ["a"]), state="COMPLETING").up()
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == (143, "") and (life.seen / "saved").exists() and "requeue 31415" not in life.asked()


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (137, False), (143, True)])
def test_its_end_is_the_trainings(code: int, again: bool, tmp_path: Path) -> None:
    """A failure is not repeated for ever; 143 is a training that was told to stop by someone else, and saved."""
    life = Life(tmp_path, script(Job("a", 1, requeue=True), ["a"]), code=str(code))
    assert life.end()[0] == code and ("requeue 31415" in life.asked()) == again


# ---- the command line -------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path: Path) -> None:
    from tests.cli.conftest import command

    got = command(
        *("slurm", "imagenet", "--amp", "--gpus", "8", "--time", "12:00:00", "--requeue", "--data", "/d a/it's"),
        *("--epochs", "100", "--batch-size", "1024", "--model", "resnet18,resnet18", "--set", "optim.clip=5"),
    )
    assert got.code == 0 and got.err == ""
    train = "imagenet --amp --model resnet18,resnet18 --epochs 100 --batch-size 1024 --data '/d a/it'\"'\"'s' --set optim.clip=5"
    assert f"train=(-m fastffl train {train})" in checked(got.out)
    assert "# batch 1024 = 8 GPUs x 128 x accum 1, lr 0.4" in got.out
    again = command("train", *shlex.split(train), "--set", "nothing=1")
    assert again.code == 2 and "nothing" in again.err, "train takes the same words"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("slurm imagenett --gpus 8", "did you mean imagenette?"),
        ("slurm imagenet --gpus 8 --set optim.lrr=1", "did you mean optim.lr"),
        ("slurm imagenet --gpus 6 --nodes 4", "ask for --gpus 4"),
        ("slurm imagenet", "--gpus"),
        ("slurm imagenet --gpus 512", "--gpus 512: a batch of 256 in 1 part(s) has not a sample for each; raise --batch-size"),
        ("slurn imagenet", "did you mean slurm?"),
    ],
)
def test_wrong_words(words: str, said: str) -> None:
    from tests.cli.conftest import command

    got = command(*words.split())
    assert got.code == 2 and said in got.err and got.out == "" and len(got.err.splitlines()) == 1


# ---- with torch's own torchrun ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_requeued_job_trains_on_where_it_was(tmp_path: Path) -> None:
    """Two ranks under the real torchrun: told to stop in an epoch they save, in the job's next life they finish it."""
    words = ["digits", "--model", "resnet8,resnet8", "--epochs", "4", "--device", "cpu"]
    words += ["--set", "run.threads=1", "--set", "run.memory_format=contiguous"]
    text = script(Job("digits", 2, requeue=True), words, path=str(Path(sys.executable).parent))
    with socket.socket() as free:  # two runs of this test must not meet at one port
        while not 20000 <= (port := free.getsockname()[1]) < 40000:
            with suppress(OSError):
                free.bind(("127.0.0.1", random.randrange(20000, 40000)))
    job = f"{port - 20000}"
    more = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HOSTS": "127.0.0.1\\n", "SLURM_JOB_ID": job}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    life, run = Life(first, text, **more), first / "runs" / f"digits-{job}"
    end = time.monotonic() + 120
    while not ((run / "rows.jsonl").exists() and "loss" in (run / "rows.jsonl").read_text()):
        assert time.monotonic() < end and life.process.poll() is None, life.process.communicate()
        time.sleep(0.05)
    life.process.send_signal(signal.SIGTERM)
    out, err = life.process.communicate(timeout=120)
    assert life.process.returncode == 143 and "SIGTERM: saved at" in err and f"requeue {job}" in life.asked(), err
    assert f"to go on from runs/digits-{job}" in out
    (second / "runs").mkdir()
    run.rename(second / "runs" / f"digits-{job}")
    again = Life(second, text, SLURM_RESTART_COUNT="1", **more)
    out, err = again.process.communicate(timeout=240)
    assert again.process.returncode == 0 and "resumed at" in err + out and "4 epochs" in out, err
