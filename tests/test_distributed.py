"""What the processes of a run do together: nccl beside gloo, a rank that fails, gradients in DDP's buckets, graphs inside DDP.

No test has a GPU. like_nccl lets gloo stand in for nccl: tensors of the model take the default group, which a rank can't leave alone.
"""

import json
import os
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, Forked, forked, read_stream, run_train
from test_hellaswag import make_tasks
from test_nodes import on_own_host

import checkpoint
import train
from common import distributed
from common.distributed import DistContext, Launch, PeerLost
from common.shards import find_shards
from dataloader import TokenStream
from training import trainer


class Event:
    """A torch.cuda.Event. ready: whether the GPU has done its work."""

    ready = True

    def record(self):
        pass

    def query(self) -> bool:
        return self.ready


def like_nccl():
    """Makes this process treat its default group as nccl's: to leave it would hang, and no object may go through it."""

    def join_groups(launch, device, store, timeout_minutes):
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group("gloo", store=store, rank=launch.rank, world_size=launch.size, timeout=distributed.WATCHDOG * timeout)
        return dist.new_group(backend="gloo", timeout=timeout)

    def in_gloo(operation):
        def checked(*args, group=None, **how):
            assert group is not None, f"{operation.__name__} goes through nccl"
            return operation(*args, group=group, **how)

        return checked

    def destroy():
        assert finished, "this rank would wait for the others"
        plain_destroy()

    def update(self, step, *args, **how):
        result = plain_update(self, step, *args, **how)
        finished[:] = [True] * (step + 1 == self.config.max_steps)
        return result

    finished, plain_destroy, plain_update = [], dist.destroy_process_group, train.Trainer.update
    distributed.join_groups, distributed.leaving_waits, torch.cuda.Event = join_groups, dist.is_initialized, Event
    dist.destroy_process_group, train.Trainer.update = destroy, update
    for name in ("all_gather_object", "broadcast_object_list"):
        setattr(dist, name, in_gloo(getattr(dist, name)))


def argv(shards, tmp_path, *more) -> list:
    return [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", *more]


# ---- nccl and gloo ----


@pytest.mark.slow
def test_run_on_nccl_equals_one_process(shards, tmp_path):
    """With HellaSwag, samples and checkpoints."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(5)))
    flags = ["--hellaswag-every", 20, "--hellaswag-file", tasks, "--sample-every", 20, "--sample-tokens", 3, "--checkpoint-every", 10]
    run = forked(tmp_path, "train", *argv(shards, tmp_path, *flags), processes=2, first=like_nccl)
    assert run.returncode == 0 and "step 20: HellaSwag" in run.stdout and run.stdout.count("step 20: sample") == 4, run.stderr
    assert run_train(shards, tmp_path / "plain", *flags) == 0
    ours, plain = read_stream(tmp_path / "run", "train"), read_stream(tmp_path / "plain", "train")
    assert ours.keys() == plain.keys() and max(abs(float(ours[step]) - float(plain[step])) for step in plain) <= 1e-5


def on_own_host_like_nccl(folder):
    on_own_host(folder)
    like_nccl()


@pytest.mark.slow
def test_checkpoint_is_sent_outside_nccl(shards, tmp_path):
    first = partial(on_own_host_like_nccl, tmp_path)
    flags = [*TINY, "--data-dir", shards, "--out-dir", "run", "--checkpoint-every", 10]
    assert forked(tmp_path, "train", *flags, processes=2, first=first).returncode == 0
    [path.unlink() for path in checkpoint.files_of(tmp_path / "0" / "run", 20)]
    run = forked(tmp_path, "train", "--resume", "--out-dir", "run", processes=2, first=first)
    assert run.returncode == 0 and checkpoint.newest_step(tmp_path / "0" / "run") == 20, run.stderr


def test_nccl_waits_longer_than_gloo(monkeypatch):
    """So gloo's error comes before nccl's watchdog, which aborts the process. A rank may wait twice: for the others and for its GPU."""
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: calls.append((backend, how)))
    monkeypatch.setattr(dist, "new_group", lambda **how: calls.append((how["backend"], how)) or "gloo group")
    device = torch.device("cuda", 1)
    assert distributed.join_groups(Launch(1, 2, 1, 2, True), device, "store", 10) == "gloo group"
    (nccl, how), (gloo, beside) = calls
    assert (nccl, gloo, how["device_id"], how["rank"], how["world_size"]) == ("nccl", "gloo", device, 1, 2)
    assert beside["timeout"] == timedelta(minutes=10) and how["timeout"] > 2 * beside["timeout"]


def test_ranks_meet_before_they_wait_for_gpus(monkeypatch):
    """A rank that died before it queued its work shows at once, in gloo."""
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda values, group="nccl": calls.append(group))
    monkeypatch.setattr(DistContext, "wait_for_gpu", lambda self: calls.append("gpu"))
    assert DistContext(torch.device("cpu"), 1, 2, group="gloo").rows(torch.ones(2)) == [[0, 0], [1, 1]]
    assert calls == ["nccl", "gloo", "gpu"]


def test_waiting_gpu_ends_at_the_timeout(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    world = DistContext(torch.device("cpu"), 1, 2, timeout=0.05)
    world.wait_for_gpu()
    monkeypatch.setattr(Event, "ready", False)
    with pytest.raises(PeerLost, match="rank 1 lost touch with another rank, which died or hangs: .* raise --timeout-minutes"):
        world.wait_for_gpu()


# ---- a rank that fails ----


def fail_like_nccl(how: str):
    """Rank 1 fails in step 5. An ordinary exit would wait, as nccl's does."""
    like_nccl()
    threading.Thread(target=time.sleep, args=(60,)).start()
    plain, rank = train.Trainer.update, os.environ["RANK"]

    def update(self, step, *args, **rest):
        if step == 5 and rank == "1":
            raise ValueError("shard x is damaged") if how == "mistake" else TypeError("a bug")
        return plain(self, step, *args, **rest)

    train.Trainer.update = update


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("mistake", 2), ("bug", 1)])
def test_failing_rank_prints_and_leaves_at_once(shards, tmp_path, how, status):
    """It waits for nobody, and the others see that it is gone long before the timeout of an hour."""
    run = Forked(tmp_path, "train", *argv(shards, tmp_path, "--timeout-minutes", 60), processes=2, first=partial(fail_like_nccl, how))
    for process in run.processes:
        process.join(40)
    assert [process.exitcode for process in run.processes] == [1, status]
    out, err = (path.read_text() for path in (run.outputs[0][1], run.outputs[1][1]))
    assert out.splitlines()[-1].startswith("error: rank 0 lost touch with another rank") and "Traceback" not in out
    assert err.count("error: shard x is damaged") == 1 if how == "mistake" else err.endswith("TypeError: a bug\n")


@pytest.mark.slow
def test_save_in_background_ends_before_the_process(tmp_path):
    """Also if the process ends without the others."""
    pid = os.fork()
    if pid == 0:
        distributed.leaving_waits = lambda: True

        def save():
            time.sleep(0.3)
            (tmp_path / "saved").touch()

        threading.Thread(target=save, name=distributed.SAVING).start()
        with distributed.exit_without_others():
            raise SystemExit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 and (tmp_path / "saved").exists()


def test_lost_peer_ends_in_one_line(capsys):
    with pytest.raises(SystemExit, match="^1$"), distributed.exit_without_others():
        raise PeerLost("rank 1 lost touch")
    assert capsys.readouterr().err == "error: rank 1 lost touch\n"


# ---- gradients in DDP's buckets ----


def check_buckets():
    """Fails if gradients are ever outside of DDP's buckets, or if both take memory."""
    plain = trainer.Trainer.loss

    def loss(self, model, positions):
        params = list(self.model.parameters())
        assert self.in_buckets and all(p.grad is not None for p in params)
        storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in params}
        assert sum(storages.values()) == sum(p.nbytes for p in params) and len(storages) < len(params)
        return plain(self, model, positions)

    trainer.Trainer.loss = loss


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_gradients_stay_in_buckets(shards, tmp_path, optimizer):
    """From the first pass on. DDP makes new buckets before the second step."""
    flags = ["--micro-batch-size", 2, "--optimizer", optimizer, "--max-steps", 4, "--val-every", 0]
    run = forked(tmp_path, "train", *argv(shards, tmp_path, *flags), processes=2, first=check_buckets)
    assert run.returncode == 0, run.stderr
    assert run_train(shards, tmp_path / "plain", *flags) == 0
    ours, plain = read_stream(tmp_path / "run", "train"), read_stream(tmp_path / "plain", "train")
    assert [float(x) for x in ours.values()] == pytest.approx([float(x) for x in plain.values()], abs=1e-5)


# ---- compiling ----


def count_graphs(folder):
    """Makes torch.compile trace without compiling, and notes a line for each graph with gradients."""
    compile, rank = torch.compile, os.environ.get("RANK", "alone")

    def backend(graph, inputs):
        if torch.is_grad_enabled():
            with open(folder / f"graphs of {rank}", "a") as file:
                file.write(" ".join(str(node.target) for node in graph.graph.nodes if node.op != "placeholder") + "\n")
        return graph

    torch.compile = lambda f, **how: compile(f, backend=backend, **how)


@pytest.mark.slow
def test_block_is_one_graph_inside_ddp(shards, tmp_path):
    """Its weights are larger than DDP's first bucket of 1 MB."""
    flags = ["--n-embd", 192, "--compile", "--no-self-check", "--max-steps", 2, "--val-every", 0]
    for processes in (0, 2):
        first = partial(count_graphs, tmp_path)
        run = forked(tmp_path, "train", *argv(shards, tmp_path, *flags), processes=processes, first=first)
        assert run.returncode == 0, run.stderr
        [path.unlink() for path in (tmp_path / "run").iterdir()]
    alone, ours = ((tmp_path / f"graphs of {rank}").read_text().splitlines() for rank in ("alone", "0"))
    assert len(alone) > 1 and ours == alone


# ---- the next batch ----


@pytest.fixture
def tiny(shards):
    config = train.flags.parse_config([*TINY, "--data-dir", str(shards), "--max-steps", "3"])
    return trainer.Trainer(config, DistContext(torch.device("cpu")), train.variants.build(config.model), find_shards(shards), False)


def test_next_batch_is_read_before_the_sync(tiny, monkeypatch):
    events, read, sync = [], TokenStream.batch, DistContext.rows
    monkeypatch.setattr(TokenStream, "batch", lambda self, positions: events.append(positions.start) or read(self, positions))
    monkeypatch.setattr(DistContext, "rows", lambda self, row: events.append("sync") or sync(self, row))
    for step in range(3):
        tiny.update(step)
    assert events == [0, 4, 8, "sync", 12, 16, "sync", 20, "sync"]


def test_unreadable_batch_fails_its_own_step(tiny, monkeypatch):
    read = TokenStream.batch

    def batch(self, positions):
        if positions.start == 8:
            raise ValueError("shard x is damaged")
        return read(self, positions)

    monkeypatch.setattr(TokenStream, "batch", batch)
    tiny.update(0)
    with pytest.raises(ValueError, match="shard x is damaged"):
        tiny.update(1)
