"""What a GPU would refuse or wait for, found without one.

`Pretended` tensors say that they are on cuda:0 and compute on the CPU; operations that mix them with the host's are
refused as CUDA refuses them, and each that makes the host wait for the device is counted. The kernels, their precision
and `torch.autocast` are the CPU's, so what only those do wrong is not found here.
"""

import collections
import contextlib
import importlib
import json
import os
import sys
import traceback

import pytest
import torch
from conftest import FORKS, ROOT, TINY, run_command
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import finetune

aten = torch.ops.aten
GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
# The host may give the device an index, a tensor to copy, and numbers without dimensions; not to these
ONE_DEVICE = {aten.cat.default, aten.stack.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
            aten._unsafe_index.Tensor, aten._unsafe_index_put.default}
# How many elements there are is known on the device alone
COUNTING = {aten.nonzero.default, aten.masked_select.default, aten.repeat_interleave.Tensor, aten._unique2.default,
            aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default}


class Pretended(torch.Tensor):
    """A tensor of the device that is not there; `inner` has its numbers. To torch's own C++ it is one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=HOST)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, **_):
        return f"Pretended({self.inner})"

    def __reduce_ex__(self, protocol):  # in a checkpoint, which is loaded to the host
        return self.inner.__reduce_ex__(protocol)

    def to(self, *words, **named):
        """Of the many ways to call it, those with a device."""
        device = named.pop("device", None) or next((x for x in words if isinstance(x, (str, torch.device))), None)
        if device is None or torch.device(device).type == "cuda":
            words = [x for x in words if not isinstance(x, (str, torch.device))]
            return super().to(*words, **named) if words or named.keys() - {"non_blocking", "copy"} else self
        assert set(words) <= {device} and named.keys() <= {"non_blocking"}, "to: not pretended"
        if not named.get("non_blocking"):
            Gpu.waited("to the host")
        return self.inner.clone().requires_grad_(self.requires_grad)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of Gpu()")


class Gpu(TorchDispatchMode):
    """With it, device "cuda" is there. `waits` counts the operations at which the host waits for it, by name."""

    waits = collections.Counter()

    @classmethod
    def waited(cls, what):
        # What torch's own Python asks for itself is another thing where a device is there
        if sys._getframe(2).f_code.co_filename.startswith(ROOT) or what != "to the host":
            cls.waits[what] += 1

    def __enter__(self):
        torch.cuda._lazy_init = lambda: None  # which would look for a driver
        torch.cuda.get_device_name = lambda device=None: "a pretended GPU"
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") asks this mode to carry it over
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, Pretended)]
        on_gpu = bool(ours)
        if ours:
            self.look(function, args, tensors)
        if kwargs.get("device") is not None:  # that of the host also comes from torch itself, for which all are there
            on_gpu = on_gpu or torch.device(kwargs["device"]).type == "cuda"
            if tensors and not ours and on_gpu and not kwargs.get("non_blocking"):
                Gpu.waited("from the host")
            kwargs.update(device=HOST, pin_memory=False)
        out = function(*tree_map(bare, args), **tree_map(bare, kwargs))
        known = {id(x.inner): x for x in ours}

        def dressed(x):
            if not on_gpu or not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else Pretended(x)

        return tree_map(dressed, out)

    def look(self, function, args, tensors):
        """RuntimeError where CUDA has one; count what waits."""
        host = [x for x in tensors if not isinstance(x, Pretended)]
        name = function.overloadpacket.__name__
        if function in INDEXING:
            if not isinstance(args[0], Pretended):
                raise RuntimeError(f"{name}: indices should be on the indexed tensor's device (cpu)")
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                Gpu.waited(f"{name} by a mask")
            if any(x is not None and x.dim() and not isinstance(x, Pretended) for x in args[1]):
                Gpu.waited("from the host")
        elif function is aten.copy_.default:
            if any(x.dim() for x in host) and not (len(args) > 2 and args[2]):  # of a number, CUDA has a kernel
                Gpu.waited("copy_")
        elif host and (function in ONE_DEVICE or any(x.dim() for x in host) or host[0] is args[0] and name[-1] == "_"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found at least two, cuda:0 "
                               "and cpu")
        if function is aten._local_scalar_dense.default or function in COUNTING or function is aten.equal.default:
            Gpu.waited(name)


def bare(x):
    return x.inner if isinstance(x, Pretended) else x


# ----------------------------------------------------------------------------------------------------------------
# With forks, so that what Gpu() changes in torch is gone with them


def _work(function, words, path):
    torch.set_num_threads(1)
    with open(path, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), Gpu():
        try:
            function(*words)
        except BaseException:
            traceback.print_exc()
            raise


def pretend(tmp_path, function, *words):
    """Run function(*words) with the pretended GPU; what it printed."""
    path = tmp_path / "said"
    process = FORKS.Process(target=_work, args=(function, words, path))
    process.start()
    process.join(300)
    process.kill()
    said = path.read_text()
    assert process.exitcode == 0, said[-3000:]
    return said


def run(script, *words):
    assert importlib.import_module(script).main([*map(str, words), "--device", "cuda:0"]) == 0


def refusals():
    here, there = torch.ones(3, 4), torch.ones(3, 4, device="cuda:0")
    layer = torch.nn.Linear(4, 2).to("cuda:0")
    layer(there).square().sum().backward()
    assert {x.device for x in (there, there[torch.tensor([0])], there + torch.tensor(1.0), torch.zeros_like(there),
                               torch.tensor([1], device="cuda:0"), layer.weight, layer.weight.grad)} == {GPU}
    assert there.cpu().device == here.device and there.tolist() == here.tolist()
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there[:, 0].long()],
                  lambda: layer(here), lambda: there.numpy(), lambda: torch.stack([there[0, 0], here[0, 0]])):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()


def test_what_is_pretended_is_what_cuda_does(tmp_path):
    pretend(tmp_path, refusals)


def steps(words):
    """Pre-train; print what waited in each step."""
    waits, before = [], collections.Counter()

    def note(*_):
        waits.append(Gpu.waits - before)
        before.update(waits[-1])

    register_optimizer_step_post_hook(note)
    run("pretrain", *words)
    print(json.dumps(waits))


def test_pretraining_is_all_on_the_device_and_seldom_waits_for_it(tmp_path, world, command):
    words = [*TINY, "--val-pictures", "1", "--log-every", "9", "--data", world, "--steps", "4"]
    assert command("pretrain.py", *words, "--output", tmp_path / "cpu").returncode == 0
    said = pretend(tmp_path, steps, [*words, "--output", tmp_path / "gpu"])
    logs = []
    for device in ("cpu", "gpu"):
        with open(tmp_path / device / "log.jsonl") as file:
            logs.append([json.loads(line) for line in file])
    for ours, expected in zip(*logs, strict=True):
        clock = {k: v for k, v in ours.items() if "second" in k}
        assert ours == pytest.approx({**expected, **clock}, rel=1e-3, abs=1e-4)
    # The costs of each source's matching, and whether the gradient is finite. The second's are with the first's log.
    _, _, *others = json.loads(said.splitlines()[-1])
    assert len(others) == 2
    for waits in others:
        assert waits.pop("to the host", 0) <= 2 and waits == {"_local_scalar_dense": 1}


@pytest.fixture(scope="module")
def start(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "out"
    done = run_command("pretrain.py", *TINY, "--val-pictures", "1", "--data", world, "--output", folder, "--steps", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "last.pt"


@pytest.mark.parametrize("task", finetune.DEFAULTS)
def test_fine_tuning_and_evaluation_are_all_on_the_device(tmp_path, world, start, task):
    pretend(tmp_path, run, "finetune", "--task", task, "--mini", "--minutes", "0", "--workers", "0", "--init", start,
            "--data", world, "--output", tmp_path / "out", "--epochs", "0.02", "--val-examples", "4")


def test_own_pictures_are_all_on_the_device(tmp_path, world, start):
    folder = os.path.join(world, "coco", "val2017")
    picture = os.path.join(folder, sorted(os.listdir(folder))[0])
    for words in ([picture, "--attention", tmp_path / "looks", "--sentence", "a red circle"], [
            folder, "--find", "a red circle"]):
        pretend(tmp_path, run, "evaluate", "--checkpoint", start, "--output", tmp_path / "seen", "--image", *words)
