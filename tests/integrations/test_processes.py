"""Two processes that train one network: Lightning, Transformers, Accelerate, and a plain loop that is attached to."""

import os
import warnings
from datetime import timedelta

import pytest
import torch
from helpers import SINGLE, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from rlsched import attach

pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import test_accelerate
import test_lightning
import test_transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from lightning.pytorch.callbacks import ModelCheckpoint

FACES = {"attached": False, "wrapper": True}
RESUMED = {"Lightning", "Transformers"}  # which save and load on all ranks together


# --- What the ranks do: half of each batch of the plain loop --------------------------------------------------------


def lightning(rank, wrapped, folder=None, resume=False):
    """Lightning's own DDP; its sampler would shuffle."""
    dataset = test_lightning.data().dataset
    sampler = DistributedSampler(dataset, shuffle=False)
    module, callback = test_lightning.both(wrapped)
    callbacks, options = [callback], {"loader": DataLoader(dataset, batch_size=8, sampler=sampler)}
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}"))
        options |= {"enable_checkpointing": True, "ckpt_path": f"{folder}/step=10.ckpt" if resume else None}
    test_lightning.fit(module, *callbacks, strategy="ddp", devices=2, use_distributed_sampler=False, **options)
    return module.net, module.lrs


def transformers(rank, wrapped, folder=None, resume=False):
    """The Trainer, which finds out by itself that there are two processes."""

    class MeanOfBatches(test_transformers.Trainer):
        """Takes the loss of each process for a mean; else it would double it, for a model that makes sums of it."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    options = {"trainer_class": MeanOfBatches, "ddp_backend": "gloo"}
    options |= {"per_device_train_batch_size": test_transformers.BATCH // 2}
    options |= {"logging_strategy": "steps", "logging_steps": 1, "ddp_find_unused_parameters": False}
    if folder is not None:
        options |= {"folder": folder, "save_strategy": "steps", "save_steps": 7}
        options["resume"] = f"{folder}/checkpoint-7" if resume else None
    net, _, trainer = test_transformers.run(wrapped, **options)
    return net, test_transformers.learning_rates(trainer)


def accelerate(rank, wrapped):
    """Accelerate, which divides the batches."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    net, loader, optimizer, schedule = test_accelerate.prepared(accelerator, attached=not wrapped)
    return net.module, test_accelerate.train(accelerator, net, loader, optimizer, schedule)


def plain(rank, wrapped):
    """A loop with DistributedDataParallel and hooks; test_distributed.py has the wrapper."""
    net, lrs = DistributedDataParallel(network()), []
    optimizer = test_accelerate.adamw(net.parameters())
    attach(optimizer, total_steps=test_accelerate.STEPS, **test_accelerate.OPTIONS)
    for _ in range(test_accelerate.EPOCHS):
        for x, y in test_accelerate.data():
            loss = nn.functional.cross_entropy(net(x.chunk(2)[rank]), y.chunk(2)[rank])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
            lrs.append(optimizer.param_groups[0]["lr"])
    return net.module, lrs


FRAMEWORKS = {
    "Lightning": (lightning, test_lightning.loop),
    "Transformers": (transformers, test_transformers.loop),
    "Accelerate": (accelerate, test_accelerate.loop),
    "plain loop": (plain, test_accelerate.loop),
}
PRECISIONS = [torch.float32, torch.float64]  # what users train in, and what can be held against a loop
RUNS = [(name, face) for name in FRAMEWORKS for face in FACES if (name, face) != ("plain loop", "wrapper")]


def work(rank, folder):
    """One of two ranks, as a launcher starts it: does everything, and leaves what came of it to the tests."""
    torch.set_num_threads(1)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in launcher.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for by the Trainer, and not used
    store = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=120)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **store)
    warnings.filterwarnings("error", message="rlsched")
    os.chdir(folder)
    results = {}
    for name, face in RUNS:
        train, _ = FRAMEWORKS[name]

        def run(dtype, *args, train=train, wrapped=FACES[face]):
            test_accelerate.forget()
            torch.set_default_dtype(dtype)
            net, lrs = train(rank, wrapped, *args)
            return lrs, net.state_dict()

        for dtype in PRECISIONS:
            results[name, face, dtype] = run(dtype)
        if name in RESUMED:
            checkpoints = f"{folder}/{name}, {face}"
            results[name, face, "saved"] = run(torch.float32, checkpoints)
            results[name, face, "resumed"] = run(torch.float32, checkpoints, True)
    torch.save(results, f"{folder}/{rank}")
    torch.distributed.barrier()  # leaving while the other rank still listens would leave it waiting
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What came of each run on both ranks. They are started once: that takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def assert_same(one, other):
    """Learning rates and weights of two runs are equal, to the last bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name, face", RUNS)
def test_two_processes_are_one_on_the_joined_batch(ranks, double, name, face):
    """Ranks that report and decide each for itself would part; a schedule that is stepped once for every process, as
    Accelerate steps a scheduler, would end half-way.
    """
    for dtype in PRECISIONS:
        one, other = (results[name, face, dtype] for results in ranks)
        assert_same(one, other)
    _, loop = FRAMEWORKS[name]
    net, expected, *_ = loop()
    lrs, weights = one  # in double precision
    assert lrs == pytest.approx(expected, rel=SINGLE)
    test_transformers.assert_same_in_single_precision(weights, net.state_dict())


@pytest.mark.parametrize("name, face", [run for run in RUNS if run[0] in RESUMED])
def test_two_processes_resume_bit_equal(ranks, name, face):
    """Only the first rank writes the checkpoint; the other would go on with a schedule that begins anew."""
    for results in ranks:
        expected = results[name, face, torch.float32]
        assert_same(results[name, face, "saved"], expected)
        lrs, weights = results[name, face, "resumed"]
        assert_same((lrs, weights), (expected[0][-len(lrs) :], expected[1]))
