"""Nothing on a hot path waits for the device.

Without a GPU: training steps and evaluation run on fake CUDA tensors under a mode that refuses
every operator which reads a device's values on the host or copies between the two. PyTorch's
backward cannot run on fake CUDA tensors without a driver, so that one runs on the CPU under the
same mode. What our kernels do inside is checked on a GPU alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_fast import models, ops
from mcibi_fast.nn.transient import transient_tensors

aten = torch.ops.aten
READS_THE_DEVICE = {
    aten._local_scalar_dense,  # item, tolist, float, bool, int
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


class HostSync(AssertionError):
    """An operator that makes the host wait for the device."""


class NoHostSyncs(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in READS_THE_DEVICE:
            raise HostSync(str(func))
        if packet in INDEXES:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise HostSync(f"{func} with a mask")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise HostSync(str(func))
        if packet in COPIES:
            here = args[0].device.type
            there = args[1].device if packet is aten.copy_ else kwargs.get("device")
            if there is not None and here != torch.device(there).type:
                raise HostSync(f"{func} between {here} and {there}")
        return func(*args, **kwargs)


def on_fake_cuda(model: nn.Module) -> nn.Module:
    """The model with fake CUDA tensors, as after ``to("cuda")``; call it under FakeTensorMode."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
        for name, t in transient_tensors(module).items():
            if "." not in name:
                module._hold(name, torch.empty(t.shape, dtype=t.dtype, device="cuda"))
    return model


def fake_batch(device="cuda"):
    return torch.empty(2, 3, 40, 48, device=device), torch.zeros(
        2, 40, 48, dtype=torch.int64, device=device
    )


def build(form, framework="fcn", **options):
    options = {"feats_channels": 16, "transform_channels": 8, **options}
    name = framework if "_" in framework else f"{framework}_mcibipp"
    model = models.create(name, 5, "test_resnet", form=form, **options)
    model.schedule(epoch=1, lr_factor=0.5)
    return model


BUILDERS = {
    "plain": build,
    "hard": lambda form: build(form, hard=True),
    "downsample": lambda form: build(form, downsample=True),
    "weighted_add": lambda form: build(form, fusion="weighted_add"),
    "aspp": lambda form: build(form, "deeplabv3", dilations=(1, 2)),
    "attention": lambda form: build(form, "pspnet", extra_attention=True),
    "upernet": lambda form: build(form, "upernet"),
    "upernet_after": lambda form: build(form, "upernet", memory_joins="after"),
    "isnet": lambda form: build(form, "isnet"),
    "labels": lambda form: build(form, weights_from="labels"),
    "poly": lambda form: build(form, momentum_schedule="poly"),
    "mcibi": lambda form: build(form, "pspnet_mcibi"),
    "mcibi_three": lambda form: build(form, "fcn_mcibi", representations=3),
    "mcibi_upernet": lambda form: build(form, "upernet_mcibi"),
}


@pytest.mark.parametrize("variant", BUILDERS)
@pytest.mark.parametrize("form", ["paper", pytest.param("released", marks=pytest.mark.slow)])
@pytest.mark.thinned(always={"variant": ["plain"]})
def test_training_forward_losses_and_memory_update(form, variant):
    real = BUILDERS[variant](form).train()
    with FakeTensorMode():
        model, batch = on_fake_cuda(real), fake_batch()
        with NoHostSyncs():
            out = model(*batch)
            total = sum(out.losses.values())
    assert total.device.type == "cuda" and total.requires_grad


@pytest.mark.parametrize("variant", BUILDERS)
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.thinned(always={"variant": ["plain"]})
def test_backward(form, variant, generator):
    model = BUILDERS[variant](form).train()
    images = torch.randn(2, 3, 40, 48, generator=generator)
    labels = torch.randint(0, 5, (2, 40, 48), generator=generator)
    total = sum(model(images, labels).losses.values())
    with NoHostSyncs():
        total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("variant", "folded"),
    [(v, folded) for v in BUILDERS for folded in (False, True) if not (folded and "three" in v)],
)
@pytest.mark.parametrize("form", ["paper", pytest.param("released", marks=pytest.mark.slow)])
@pytest.mark.thinned(together=2)
def test_evaluation(form, variant, folded):
    real = BUILDERS[variant](form).eval()
    real = real.fold() if folded else real
    with FakeTensorMode(), torch.no_grad():
        model, (images, labels) = on_fake_cuda(real), fake_batch()
        with NoHostSyncs():
            out = model(images, labels, stages=4)
    size = (10, 12) if "upernet" in variant else (5, 6)
    assert out.logits.shape == (2, 5, *size) and out.logits.device.type == "cuda"


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t.sum(dim=(0, 2, 3)).tolist(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.masked_select(t > 0),
        lambda t: t.long().unique(),
        lambda t: t.cpu(),
        lambda t: t + torch.ones(t.shape, device="cpu").to(t.device),
        lambda t: torch.equal(t, t),
    ],
)
def test_a_wait_does_not_pass(wait):
    real = build("released").eval()
    real.head.decoder.register_forward_hook(lambda _module, _inputs, out: (wait(out), out)[1])
    with FakeTensorMode(), torch.no_grad():
        model, (images, _) = on_fake_cuda(real), fake_batch()
        with NoHostSyncs(), pytest.raises(HostSync):
            model(images)


def test_a_wait_in_the_backward_does_not_pass(generator):
    model = build("released").train()
    images = torch.randn(2, 3, 40, 48, generator=generator)
    logits = model(images).logits
    logits.register_hook(lambda grad: grad * float(grad.abs().max()))
    with NoHostSyncs(), pytest.raises(HostSync):
        logits.sum().backward()


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: PyTorch itself says when it waits"
)


@pytest.fixture
def waiting_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("form", ["paper", "released"])
def test_on_a_gpu(form, waiting_is_an_error):
    model = build(form).cuda()
    images, labels = fake_batch()
    images.normal_()
    sum(model(images, labels).losses.values()).backward()  # libraries start up
    waiting_is_an_error()
    sum(model(images, labels).losses.values()).backward()
    model.eval()
    with torch.no_grad():
        model(images, stages=4)
    torch.cuda.set_sync_debug_mode("default")
    folded = model.fold()
    with torch.no_grad():
        folded(images, stages=4)
        waiting_is_an_error()
        folded(images, stages=4)
        with pytest.raises(RuntimeError, match="synchroniz"):
            images.sum().item()


@pytest.mark.gpu
@needs_gpu
def test_ops_can_be_captured_in_a_cuda_graph():
    memory = torch.tensor([[0.0, 1.0]] * 5, device="cuda")
    features = torch.randn(2, 16, 5, 6, device="cuda")
    labels = torch.randint(0, 5, (2, 40, 48), device="cuda")
    logits = torch.randn(2, 5, 5, 6, device="cuda")
    noise = ops.Philox(torch.tensor([0, 0], device="cuda"))

    def run():
        updated = ops.memory_update(memory, features, labels)
        return updated, ops.gaussian_aggregate(logits, memory, 16, noise=noise)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    features.add_(1)
    logits.mul_(-1)
    graph.replay()
    for got, expected in zip(captured, run(), strict=True):
        assert torch.equal(got, expected)
