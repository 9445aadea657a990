"""slurm: the sbatch script that trains a recipe on several GPUs and nodes, and goes on by itself after a time limit."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError

GRACE = 120  # seconds between the warning and the end; torchrun gives its processes 30 of them
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:+@=-]*")
_TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-\d+(:[0-5]?\d){0,2}")


@dataclass(frozen=True)
class Job:
    """What Slurm is asked for. UsageError says which of it can't be.

    gpus, nodes   in all        cpus   cores per GPU, for decoding
    time          as sbatch takes it: 12:00:00, 2-00:00:00, ...
    requeue       after the time limit the job goes to the queue again and trains on from its last step
    """

    name: str
    gpus: int
    nodes: int = 1
    cpus: int = 8
    time: str | None = None
    requeue: bool = False
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        for flag, count in (("gpus", self.gpus), ("nodes", self.nodes), ("cpus", self.cpus)):
            if count < 1:
                raise UsageError(f"--{flag} {count}: expected 1 or more")
        if self.gpus % self.nodes:
            near = max(self.nodes, self.gpus - self.gpus % self.nodes)
            raise UsageError(f"--gpus {self.gpus} --nodes {self.nodes}: nodes get equal shares; ask for --gpus {near}")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UsageError(f"--time {self.time}: expected hours:minutes:seconds as in 12:00:00, or days first as in 2-00:00:00")
        for flag, text in (("partition", self.partition), ("account", self.account)):
            if text is not None and not _WORD.fullmatch(text):  # these stand in comments, which nothing can quote
                raise UsageError(f"--{flag} {text}: expected a name of letters, digits and _ . , : + @ = -")

    @property
    def directives(self) -> list[str]:
        """sbatch's options."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self.name).lstrip("-") or "fastffl"
        each = self.gpus // self.nodes
        made = [f"job-name={name}", f"nodes={self.nodes}", "ntasks-per-node=1", f"gpus-per-node={each}"]
        made.append(f"cpus-per-task={each * self.cpus}")
        for key in ("time", "partition", "account"):
            made += [f"{key}={value}"] if (value := getattr(self, key)) else []
        made += [f"signal=B:TERM@{GRACE}", "requeue" if self.requeue else "no-requeue", "open-mode=append", "output=%x-%j.log"]
        return [f"#SBATCH --{text}" for text in made]


_BODY = r"""
set -u
%(path)sexport OMP_NUM_THREADS=1  # images are decoded by threads of their own
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" PYTHONUNBUFFERED=1

run=%(out)s  # the same in every life of this job, so that it goes on where it was
train=(%(train)s)
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
launch=(
    --nnodes=%(nodes)d --nproc-per-node=%(each)d --max-restarts=0
    --rdzv-backend=c10d --rdzv-endpoint="$host:$((20000 + SLURM_JOB_ID %% 20000))"
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
)
# On each node: caches of compiled kernels on its own disk, as a shared one makes ranks fail, and in a folder that is ours
node='
    cache=${TMPDIR:-/tmp}/fastffl-$UID-$SLURM_JOB_ID
    mkdir -p -m 700 "$cache" && [ -O "$cache" ] || cache=$(mktemp -d)
    export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor
    exec torchrun "$@"
'

# Slurm tells this shell %(grace)d seconds before the end; srun passes it on to torchrun, which tells the training processes
asked=0 training=
tell() { [ -z "$training" ] || kill -TERM "$training" 2>/dev/null; }
trap '[ "$asked" = 1 ] || { asked=1; tell; }' TERM  # once: torchrun breaks off its own ending when it is told again
# a node that is done does not end the others: one of them may still be saving
srun --kill-on-bad-exit=0 --wait=%(grace)d --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c "$node" node "${launch[@]}" "${train[@]}" --out "$run" &
training=$!
[ "$asked" = 0 ] || tell  # it came before there was a training
while wait "$training"; code=$?; kill -0 "$training" 2>/dev/null; do :; done  # a signal ends a wait and not the training
wait "$training"; code=$?

if [ "$code" -ne 0 ] && { [ "$asked" = 1 ] || [ "$code" -eq 143 ]; }; then
%(again)s
    exit 143
fi
exit "$code"
"""

_REQUEUE = """\
    # torchrun ends with 1 where it was told to stop; a job that someone cancelled does not run any more and stays out
    if scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
        echo "told to stop; back to the queue, to go on from $run"
        scontrol requeue "$SLURM_JOB_ID"
    fi"""
_STOP = '    echo "told to stop; the same script with --out $run goes on from there"'


def script(job: Job, train: Sequence[str], out: str | None = None, *, path: str = "", notes: Sequence[str] = ()) -> str:
    """A bash script for sbatch that runs `torchrun -m fastffl train TRAIN... --out OUT` on every node.

    train   the words after `fastffl train`, quoted here
    out     the run folder; None: runs/NAME-JOBID, which a requeued job keeps
    path    folder of torchrun and python, put first on PATH
    notes   lines of comment for its head
    """
    name = job.directives[0].partition("job-name=")[2]
    values = {
        "path": f'export PATH={shlex.quote(path)}:"$PATH"\n' if path else "",
        "out": f'runs/{name}-"$SLURM_JOB_ID"' if out is None else shlex.quote(out),
        "train": shlex.join(["-m", "fastffl", "train", *train]),
        "nodes": job.nodes,
        "each": job.gpus // job.nodes,
        "grace": GRACE,
        "again": _REQUEUE if job.requeue else _STOP,
    }
    head = ["#!/bin/bash", *job.directives]
    head += [f"# {line}" for note in notes for line in note.splitlines()]
    return "\n".join(head) + "\n" + _BODY % values
