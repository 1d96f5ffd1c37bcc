"""Two processes that train one network: DistributedDataParallel and FSDP2, measured, scheduled, saved and resumed.

Networks are of double precision where a run of two processes is held against one of a single process: they add up the
same numbers in different orders, and AdamW makes of what is rounding, in gradients that are almost zero, updates as
large as any other. A run that goes on has to be equal to the last bit in the precision that users train in.
"""

import copy
import io
import math
import threading
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers import SINGLE, lively_policy, loss_at, network
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from rlsched import ScheduledOptimizer, attach, distributed, parameter_sample
from rlsched.checkpoint import STATE_KEY
from rlsched.control import CONTROL_NAMES

LR_STATE = 2 + CONTROL_NAMES.index("lr")  # column of the path of a run: lr, momentum, and the states of all controls
STEPS, STOP = 30, 14  # windows of 4, after the first inner step; the save is in the middle of one
BAD = (18, 19, 20)  # steps that are not finite: the last ones before a decision, and enough for a divergence
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
}


# --- Ways to spread a network over the ranks ------------------------------------------------------------------------


def alone(model):
    """One process, which the others are compared with."""
    return model


def replicated(model):
    """DistributedDataParallel: each rank has the whole network."""
    return DistributedDataParallel(model)


def sharded(model):
    """FSDP2: each rank has some rows of each parameter; of the last bias two, and one."""
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def in_columns(model):
    """FSDP2 that cuts the matrices along another dimension than the first."""
    return fully_shard(model, shard_placement_fn=lambda p: Shard(p.ndim - 1))


def in_replicas(model):
    """FSDP2 on a mesh of two dimensions: here each rank has all of the only shard."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))


def in_part(model):
    """FSDP2 of the first layer; the last one is replicated, and averages its gradients by a hook."""

    def average(p):
        dist.all_reduce(p.grad)
        p.grad /= 2

    fully_shard(model[0])
    for p in model[2].parameters():
        p.register_post_accumulate_grad_hook(average)
    return model


# --- Training, on a rank and alone ----------------------------------------------------------------------------------


def loss_of(rank, model, step):
    """The loss of this rank's half of a batch; alone, of the whole batch."""
    halves = (0, 1) if rank is None else (rank,)
    return torch.stack([loss_at(model, 100 * half + step) for half in halves]).mean()


def full(tensor):
    """The whole of a tensor that may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Training:
    """A network in training, spread in one of the ways above."""

    def __init__(self, rank, spread, make, face=ScheduledOptimizer, **options):
        self.rank, self.path = rank, []
        self.model = spread(network())
        self.inner = make(self.model.parameters())
        options = {"total_steps": STEPS, "decisions": 8, "policy": lively_policy(), "max_grad_norm": 0.5, **options}
        driver = face(self.inner, **options)
        self.optimizer, self.controller = (self.inner, driver) if face is attach else (driver, driver.controller)

    def run(self, steps, spoil=None, report=True):
        """Train, and note all controls; `spoil(step, rank, loss, parameters)` returns another loss to report."""
        for step in steps:
            self.optimizer.zero_grad()
            loss = loss_of(self.rank, self.model, step)
            loss.backward()
            if spoil is not None:
                loss = spoil(step, self.rank, loss.detach(), list(self.model.parameters()))
            self.optimizer.step(**({"loss": loss} if report else {}))
            group = self.inner.param_groups[0]
            momentum = group["betas"][0] if "betas" in group else group["momentum"]
            states = self.controller.state.control
            self.path.append(torch.tensor([group["lr"], momentum, *(states[name] for name in CONTROL_NAMES)]))
        return self

    def result(self):
        """What the training came to: the controls at each step and the weights."""
        return {"path": torch.stack(self.path), "weights": [full(p) for p in self.model.parameters()]}


def infinite_loss_on_one_rank(step, rank, loss, parameters):
    """The harm that comes of one rank's own data."""
    return torch.tensor(math.inf) if step in BAD and rank in (None, 1) else loss


def bad_gradient_on_one_rank(step, rank, loss, parameters):
    """The last row of the last matrix, which is in the shard of the last rank."""
    if step in BAD and rank in (None, 1):
        grad = parameters[2].grad
        (grad.to_local() if hasattr(grad, "to_local") else grad)[-1] = math.nan
    return loss


# --- What the ranks do ----------------------------------------------------------------------------------------------

SPREAD = {f.__name__: f for f in (replicated, sharded, in_columns, in_replicas, in_part)}
SPOILT = {f.__name__: f for f in (infinite_loss_on_one_rank, bad_gradient_on_one_rank)}
SIZES = {"whole": 2**13, "sampled": 20}  # numbers in a sample; the network has 83
SAVES = {  # optimizer, face, and options of torch's helpers
    "SGD": ("SGD", ScheduledOptimizer, {}),
    "SGD, attached, flat": ("SGD", attach, {"flatten_optimizer_state_dict": True}),
    "AdamW, attached": ("AdamW", attach, {}),
    "AdamW, flat": ("AdamW", ScheduledOptimizer, {"flatten_optimizer_state_dict": True}),
}


@contextmanager
def samples_of(size):
    """Networks are measured on samples of so many numbers."""
    parameter_sample.SIZE, before = SIZES[size], parameter_sample.SIZE
    try:
        yield
    finally:
        parameter_sample.SIZE = before


def trained(rank, spread, make, size="whole", spoil=None):
    """A whole run, which is rolled back if it diverges."""
    with samples_of(size):
        return Training(rank, spread, make, on_divergence="rollback").run(range(STEPS), spoil).result()


def by_group(rank, spread=replicated):
    """A whole run with a state for each layer; or why there is none."""

    def make(parameters):
        one, two, *others = parameters
        return torch.optim.SGD([{"params": [one, two]}, {"params": others, "lr": 0.05}], 0.1, 0.9)

    try:
        return Training(rank, spread, make, per_group=True).run(range(STEPS)).result()
    except ValueError as error:
        return {"refused": str(error)}


def loss_on_one_rank(rank):
    """Only the first rank reports a loss; no rank warns that there is none."""
    it = Training(rank, replicated, OPTIMIZERS["SGD"]).run([0], report=rank == 0)
    seen = it.controller.meter.records[0, parameter_sample.LOSS].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it.run([1], report=rank == 0)
    return seen


def validated(rank, everyone=False):
    """A run that is validated by the first rank or by all of them, and what they know of it in the end."""
    it, begin = Training(rank, alone if rank is None else replicated, OPTIMIZERS["SGD"], patience=2), 0
    for end, loss in {6: 1.0, 12: 2.0, 16: 3.0, STEPS: None}.items():
        it.run(range(begin, end))
        if loss is not None and (rank in (None, 0) or everyone):
            it.controller.observe_validation(torch.tensor(loss))
        begin = end
    return {**it.result(), "known": list(it.controller.validation), "stops": it.controller.should_stop}


def best_of_shards(rank):
    """The best weights of a sharded run, after it and in one that resumes; and what is said where ranks disagree."""
    options = {"keep_best": True, "averaging": True}
    it = Training(rank, sharded, OPTIMIZERS["SGD"], **options).run(range(6))
    it.controller.observe_validation(1.0)
    expected = [full(p) for p in it.model.parameters()]
    it.run(range(6, STOP))
    last = [full(p) for p in it.model.parameters()]
    again = Training(rank, sharded, OPTIMIZERS["SGD"], **options)
    again.optimizer.load_state_dict(copy.deepcopy(it.optimizer.state_dict()))
    seen = []
    for run in (it, again):
        with run.controller.best(run.model):
            seen.append([full(p) for p in run.model.parameters()])
    assert_same([full(p) for p in it.model.parameters()], last)
    averages = []
    for run in (it, again):
        with run.controller.averaged(run.model):
            averages.append([full(p) for p in run.model.parameters()])
    assert_same(*averages)
    assert_same(averages[0], [full(copy) for copy in it.controller.kept.average.tensors])
    it.run(range(STOP, STOP + 1))
    it.controller.observe_validation([0.5, 2.0][rank])
    try:
        it.controller.restore_best(it.model)
    except ValueError as error:
        return expected, *seen, str(error)


def served(rank):
    """A run under a policy that the first rank serves, until the server goes away in the midst of it."""
    from rlsched.agents.serving.batching import TorchEngine
    from rlsched.agents.serving.server import PolicyServer, listen

    policy, address = lively_policy(), [None]
    if rank == 0:
        listening = listen("127.0.0.1", 0, has_token=False)
        server = PolicyServer(policy, TorchEngine(policy))
        thread = threading.Thread(target=server.run, args=(listening,))
        thread.start()
        address = [f"http://127.0.0.1:{listening.getsockname()[1]}"]
    dist.broadcast_object_list(address)
    it = Training(rank, replicated, OPTIMIZERS["SGD"], policy=address[0]).run(range(STOP))
    if rank == 0:
        server.stop()
        thread.join()
        listening.close()
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is gone
        it.run(range(STOP, STEPS))
    asked = it.controller.policy
    return {**it.result(), "answered": asked.answered, "missed": asked.missed}


def flat_shards(rank):
    """What the wrapper says of FSDP1, whose parameters are flat."""
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    try:
        ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=STEPS)
    except ValueError as error:
        return [str(error)]


def complex_shards(rank):
    """What the wrapper says of complex parameters in shards."""
    model = fully_shard(torch.nn.Linear(4, 4, dtype=torch.complex64))
    try:
        ScheduledOptimizer(torch.optim.SGD(model.parameters(), 0.1), total_steps=STEPS)
    except ValueError as error:
        return [str(error)]


def unlike_replicas(rank):
    """The second rank measures what it measures a little differently, as another kind of processor might."""
    it = Training(rank, replicated, OPTIMIZERS["SGD"])
    for step in range(STEPS):
        it.run([step])
        products = it.controller.meter.records[:, parameter_sample.PRODUCTS_OF_ROWS]
        products *= 1 + 1e-3 * rank * torch.rand(products.shape[1])
    return it.result()


def resumed_replicas(rank, make, folder):
    """The first rank saves what all of them resume from."""
    it = Training(rank, replicated, make).run(range(STOP))
    if rank == 0:
        torch.save([it.model.state_dict(), it.optimizer.state_dict()], f"{folder}/checkpoint")
    dist.barrier()
    model, optimizer = torch.load(f"{folder}/checkpoint", weights_only=True)
    again = Training(rank, replicated, make)
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.path = it.path[:]
    return [training.run(range(STOP, STEPS)).result() for training in (it, again)]


def contents(state_dict):
    """All that is in a controller's state, to the last bit; its bytes also tell which objects were one in memory."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return list(map(plain, value))
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return repr(plain(torch.load(io.BytesIO(state_dict[STATE_KEY]), weights_only=True)))  # NaN is not equal to itself


def resumed_shards(rank, make, folder, face, options):
    """All ranks save and load through torch.distributed.checkpoint."""
    it = Training(rank, sharded, make, face).run(range(STOP))
    options = StateDictOptions(**options)

    def state(it):
        model, optimizer = get_state_dict(it.model, it.optimizer, options=options)
        return {"model": model, "optimizer": optimizer, **({"schedule": it.controller} if face is attach else {})}

    save(state(it), checkpoint_id=folder)
    again = Training(rank, sharded, make, face)
    loaded = state(again)
    load(loaded, checkpoint_id=folder)
    set_state_dict(
        again.model,
        again.optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    assert contents(again.controller.state_dict()) == contents(it.controller.state_dict())
    again.path = it.path[:]
    return [training.run(range(STOP, STEPS)).result() for training in (it, again)]


@samples_of("sampled")
def gathered_state(rank):
    """The state of a sharded run as one process would have it, and how that run ends."""
    it = Training(rank, sharded, OPTIMIZERS["AdamW"]).run(range(STOP))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = copy.deepcopy(get_state_dict(it.model, it.optimizer, options=options))
    return state, it.run(range(STOP, STEPS)).result()


DOUBLE, SAME_BITS = torch.float64, torch.float32  # precision of what is compared, and of what has to be equal


def jobs(folder):
    """Everything that the two ranks do: the precision, the name, and what is called with the rank."""
    for kind, make in OPTIMIZERS.items():
        for spread in (replicated, sharded):
            yield DOUBLE, (spread.__name__, kind), lambda rank, s=spread, m=make: trained(rank, s, m)
            name = (spread.__name__, kind, "not stopped")
            yield SAME_BITS, name, lambda rank, s=spread, m=make: trained(rank, s, m)
        yield SAME_BITS, ("resumed", kind), lambda rank, m=make: resumed_replicas(rank, m, folder)
    for name, (kind, face, options) in SAVES.items():
        saves = OPTIMIZERS[kind], f"{folder}/{name}", face, options
        yield SAME_BITS, ("saved", name), lambda rank, s=saves: resumed_shards(rank, *s)
    for spread in (sharded, in_columns, in_replicas, in_part):
        for size in SIZES:
            name = (spread.__name__, size)
            yield DOUBLE, name, lambda rank, s=spread, n=size: trained(rank, s, OPTIMIZERS["SGD"], n)
    for spread in (replicated, sharded):
        for kind, spoil in SPOILT.items():
            if (spread, spoil) != (replicated, bad_gradient_on_one_rank):  # replicas have the same gradients
                name = (spread.__name__, kind)
                yield DOUBLE, name, lambda rank, s=spread, f=spoil: trained(rank, s, OPTIMIZERS["AdamW"], spoil=f)
    yield DOUBLE, "loss on one rank", loss_on_one_rank
    yield DOUBLE, "by group", by_group
    yield DOUBLE, "shards by group", lambda rank: by_group(rank, sharded)
    for everyone in (False, True):
        yield DOUBLE, ("validated", everyone), lambda rank, e=everyone: validated(rank, everyone=e)
    yield SAME_BITS, "best of shards", best_of_shards
    if find_spec("starlette") is not None:
        yield SAME_BITS, "served", served
    yield DOUBLE, "unlike", unlike_replicas
    yield DOUBLE, "flat shards", flat_shards
    yield DOUBLE, "complex shards", complex_shards
    yield DOUBLE, "gathered", gathered_state


def work(rank, folder):
    """One of two ranks: does everything, and leaves what came of it, errors included, to the tests."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for dtype, name, job in jobs(folder):
        torch.set_default_dtype(dtype)
        try:
            results[name] = job(rank)
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}")
    dist.barrier()  # leaving while the other rank still listens would leave it waiting
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What came of each job on both ranks. They are started once: that takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    results = [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]

    def of(name):
        for result in (both := [result[name] for result in results]):
            assert not isinstance(result, str), result
        return both

    return of


def assert_same(one, other, **tolerance):
    """Two results are equal: to the last bit, or to a tolerance."""
    torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


def assert_close(one, other):
    """Two results in double precision differ by no more than what is measured in single precision."""
    assert_same(one, other, rtol=SINGLE, atol=SINGLE)


@pytest.fixture(autouse=True, scope="module")
def _double():
    """What the two ranks are held against is trained in double precision as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    yield
    torch.set_default_dtype(before)


# --- Tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("spread", ["replicated", "sharded"])
def test_two_ranks_are_one_process_on_the_joined_batch(ranks, spread, kind):
    """Ranks that decide by their own loss or their own shards take learning rates of their own, and their copies of the
    network part; a schedule for shards alone is not that of the network.
    """
    one, other = ranks((spread, kind))
    assert_same(one, other)
    expected = trained(None, alone, OPTIMIZERS[kind])
    assert_close(one, expected)
    assert (expected["path"].std(0) > 1e-3).all()


def test_two_ranks_decide_of_each_group_as_one_process(ranks):
    """Ranks that measured their groups by themselves would part; and shards do not tell of which group they are."""
    one, other = ranks("by group")
    assert_same(one, other)
    assert_close(one, by_group(None, alone))
    assert all("per_group=True: parameters that fully_shard" in each["refused"] for each in ranks("shards by group"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", ["sharded", "in_columns", "in_replicas", "in_part"])
def test_sample_of_shards_is_the_sample_of_the_network(ranks, spread, size):
    """What several ranks hold would count several times, and parts of shards would be taken for parts of others."""
    one, other = ranks((spread, size))
    assert_same(one, other)
    assert_close(one, trained(None, alone, OPTIMIZERS["SGD"], size))


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 2, 5), (0, 1, 3, 5)])
def test_blocks_have_every_number_of_a_sample_once(cuts, every):
    """Where ranks cut a matrix along two dimensions (FSDP2 with tensor parallelism), numbers would be counted twice."""
    whole = torch.arange(5 * 5 * 3).view(5, 5, 3)
    sample = torch.full((100,), -1)
    for rows in pairwise(cuts):
        for columns in pairwise(cuts):
            block = whole[slice(*rows), slice(*columns)]
            offsets = (rows[0], columns[0], 0)
            taken, place = distributed.block_of_every(whole.shape, offsets, block.shape, every, begin=4)
            assert (sample[place] == -1).all()
            sample[place] = block.reshape(-1)[taken]
    expected = whole.reshape(-1)[::every]
    assert sample[4 : 4 + len(expected)].equal(expected)
    assert (sample == -1).sum() == 100 - len(expected)


@pytest.mark.parametrize(
    "spread, spoil",
    [
        ("replicated", "infinite_loss_on_one_rank"),
        ("sharded", "infinite_loss_on_one_rank"),
        ("sharded", "bad_gradient_on_one_rank"),
    ],
)
def test_what_is_not_finite_on_one_rank_is_so_on_all(ranks, spread, spoil):
    """One rank would take the step and go on, the other would roll back its weights and cut its learning rate."""
    one, other = ranks((spread, spoil))
    assert_same(one, other)
    expected = trained(None, alone, OPTIMIZERS["AdamW"], spoil=SPOILT[spoil])
    assert_close(one, expected)
    assert all(w.isfinite().all() for w in one["weights"])
    assert expected["path"][21, LR_STATE] < expected["path"][20, LR_STATE] - 1


def test_loss_of_one_rank_will_do(ranks):
    """Whoever reports it on the first rank alone would wait for the others for ever, or see half of it."""
    one, other = ranks("loss on one rank")
    assert_same(one, other)
    assert_close(one, loss_of(0, network(), 0).detach().float())


@pytest.mark.parametrize("everyone", [True, False], ids=["all ranks", "one rank"])
def test_validation_of_one_rank_will_do(ranks, everyone):
    """Most scripts validate on the first rank alone, which would decide otherwise than the others, or wait for ever."""
    one, other = ranks(("validated", everyone))
    assert one["known"] == other["known"] == [3.0, 16, 1.0, 6, 2]
    assert one["stops"] and other["stops"]
    expected = validated(None)
    for what in ("path", "weights"):
        assert_same(one[what], other[what])
        assert_close(one[what], expected[what])


def test_best_weights_of_shards_are_those_of_one_step(ranks):
    """A model would be put together from shards of different moments, or the best be lost with the job."""
    for expected, best, resumed, said in ranks("best of shards"):
        assert_same(best, expected)
        assert_same(resumed, expected)
        assert "the ranks took their best weights after [15, 6] steps" in said


@pytest.mark.skipif(find_spec("starlette") is None, reason="starlette is not installed: rlsched[serve]")
def test_policy_is_asked_by_one_rank_for_all(ranks):
    """Ranks that ask a server each for themselves decide apart as soon as it answers one of them and not the other."""
    one, other = ranks("served")
    for what in ("path", "weights"):
        assert_same(one[what], other[what])
    alone, _ = ranks(("replicated", "SGD", "not stopped"))
    assert_same(one["path"][:STOP], alone["path"][:STOP])
    assert (one["answered"], one["missed"]) == (4, 4) and (other["answered"], other["missed"]) == (0, 0)


def test_shards_that_do_not_say_of_what_are_refused(ranks):
    """FSDP1's ranks would each follow a schedule for their own shard, and nobody would know."""
    for message in ranks("flat shards"):
        assert "shard the model with torch.distributed.fsdp.fully_shard" in message[0]


def test_complex_shards_are_refused(ranks):
    """Other numbers would be taken for those of the sample."""
    for message in ranks("complex shards"):
        assert "complex parameters that fully_shard has sharded are not supported" in message[0]


def test_ranks_that_measure_unlike_decide_alike(ranks):
    """Where processors are of several kinds, what replicas measure differs in its last bits, and so would schedules."""
    one, other = ranks("unlike")
    assert_same(one, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replicas_resume_bit_equal(ranks, kind):
    """A job that is preempted would train another network than one that is not."""
    expected, _ = ranks(("replicated", kind, "not stopped"))
    assert {w.dtype for w in expected["weights"]} == {SAME_BITS}
    for saved, resumed in ranks(("resumed", kind)):
        assert_same(saved, expected)
        assert_same(resumed, expected)


@pytest.mark.parametrize("way", SAVES)
def test_shards_resume_bit_equal(ranks, way):
    """torch's checkpoints of sharded models, in which the schedule has to find a place, would start it anew."""
    kind, *_ = SAVES[way]
    expected, _ = ranks(("sharded", kind, "not stopped"))
    assert {w.dtype for w in expected["weights"]} == {SAME_BITS}
    for saved, resumed in ranks(("saved", way)):
        assert_same(saved, expected)
        assert_same(resumed, expected)


@samples_of("sampled")
def test_run_of_two_ranks_goes_on_alone(ranks):
    """A run that was sharded could not go on with another number of processes."""
    ((model, optimizer), end), _ = ranks("gathered")
    it = Training(None, alone, OPTIMIZERS["AdamW"])
    set_state_dict(it.model, it.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    result = it.run(range(STOP, STEPS)).result()
    assert_close(result, {**end, "path": end["path"][-(STEPS - STOP) :]})
