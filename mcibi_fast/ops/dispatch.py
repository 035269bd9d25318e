"""How an op finds the kernel it runs.

Every op is a dispatcher operator ``torch.ops.mcibi_fast.<name>`` with a fake kernel, so
``torch.compile`` and ``torch.export`` see one opaque node. Which backend computes it is decided
each time the node *runs*: the first kernel of the op's list that has no reason against it and is
not slower there than a later one. A call that needs nothing of PyTorch's dispatcher (eager, no
transform or mode) runs its kernel directly: for small inputs the dispatcher costs more than the
kernel.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from mcibi_fast import _build
from mcibi_fast._schemas import SCHEMAS
from mcibi_fast.ops.modes import AUTOCAST, direct, eager, follows, in_autocast

BACKENDS = ("reference", "cpu", "cuda", "triton", "sdpa", "pytorch")
# The backends that a plain CPU tensor cannot use; Triton's interpreter can, slowly, for tests.
_FOR_GPUS = ("cuda",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "triton")
_FOR_CPUS = ("cpu", "pytorch")  # and those that a CUDA tensor cannot use

library = torch.library.Library("mcibi_fast", "DEF")
_ops: dict[str, Op] = {}
_own: ContextVar[str | None] = ContextVar("backend", default=None)
_entered: list[tuple[object, str]] = []  # blocks of all threads


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op.

    Args:
        backend: its name, one of ``BACKENDS``.
        run: computes the op from the dispatcher arguments.
        why_not: given the same arguments, why it cannot run, or None where it can.
        composite: made of differentiable PyTorch operators, so that eager autograd can go
            through it; the others need the op's autograd Function.
        slower: given the same arguments, why a later kernel of the op is faster, or None. It
            matters only where no backend is forced.
        first: computes only the first result of a composite kernel, if that is faster.
    """

    backend: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    composite: bool = False
    slower: Callable[..., str | None] | None = None
    first: Callable[..., Any] | None = None


class Op:
    """A dispatcher operator and the kernels behind it.

    Args:
        name: of the operator, with a schema in ``_schemas.SCHEMAS``.
        kernels: in the order of preference. One of ``compiled`` is given the operator's name.
        fake: shapes and dtypes of the results, for tracing.
        public: the function for users, which has the operator's name; None for an operator that
            is not public (a backward).
        prepare: given all arguments of the public function, checks them and gives the operator's.
    """

    def __init__(
        self,
        name: str,
        kernels: Sequence[Kernel | Callable[[str], Kernel]],
        fake: Callable[..., Any],
        public: Callable[..., Any] | None = None,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name = name
        self.kernels = tuple(k if isinstance(k, Kernel) else k(name) for k in kernels)
        self._on_cpu = tuple(k for k in self.kernels if k.backend not in _FOR_GPUS)
        self._on_cuda = tuple(k for k in self.kernels if k.backend not in _FOR_CPUS)
        self.public, self._prepare = public, prepare
        library.define(name + SCHEMAS[name])
        for key in ("CPU", "CUDA"):
            library.impl(name, lambda *args: self.select(*args).run(*args), key)
            library.impl(name, self._without_autocast(f"Autocast{key}"), f"Autocast{key}")
        torch.library.register_fake(f"mcibi_fast::{name}", fake, lib=library)
        self.call = getattr(torch.ops.mcibi_fast, name).default
        self._with_gradient: Callable[..., Any] | None = None
        self._wants_gradient: Callable[..., bool] = lambda *_args: False
        _ops[name] = self

    def __call__(self, *args: Any) -> Any:
        return self.run_directly(args) if direct(args) else self.call(*args)

    def first(self, *args: Any) -> Any:
        """The first of several results."""
        return self.run_directly(args, only_first=True) if direct(args) else self.call(*args)[0]

    def run_directly(self, args: tuple[Any, ...], only_first: bool = False) -> Any:
        """What the dispatcher would run, for arguments that are ``direct``."""
        if in_autocast():
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
                return self.run_directly(args, only_first)
        kernel = self._select_directly(args)
        enabled = torch.is_grad_enabled()
        follow = enabled and self._wants_gradient(*args)
        if kernel.composite:
            run = kernel.first if only_first and kernel.first is not None else kernel.run
            only_first = only_first and run is kernel.run
            torch._C._set_grad_enabled(follow)  # torch.no_grad() takes 2 us more
            try:
                results = run(*args)
            finally:
                torch._C._set_grad_enabled(enabled)
        elif follow:
            assert self._with_gradient is not None
            results = self._with_gradient(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = kernel.run(*args)
        return results[0] if only_first else results

    def prepare(self, *inputs: Any, **options: Any) -> tuple[Any, ...]:
        """The operator's arguments for a call of the public function, whose defaults it uses."""
        assert self.public is not None and self._prepare is not None
        call = inspect.signature(self.public).bind(*inputs, **options)
        call.apply_defaults()
        return self._prepare(**call.arguments)

    def _without_autocast(self, key: str) -> Callable[..., Any]:
        """The operator with autocast off inside: its inputs are in the dtype it should use."""
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.call(*args)

        return run

    def below_autograd(self, *args: Any) -> Any:
        """Runs the operator inside an autograd Function, which provides the gradient."""
        if direct(args):
            return self.run_below_autograd(args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.call(*args)

    def run_below_autograd(self, args: tuple[Any, ...]) -> Any:
        """The same for arguments that are known to be ``direct``."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._select_directly(args).run(*args)

    def differentiable(
        self,
        with_gradient: Callable[..., Any],
        wants_gradient: Callable[..., bool],
        transformed: Callable[..., Any],
    ) -> None:
        """Gives the operator its derivatives.

        Args:
            with_gradient: computes the operator so that autograd can follow, as
                ``autograd.Function.apply`` does.
            wants_gradient: given the arguments, whether an input that has a gradient needs it.
            transformed: computes the operator in differentiable operators of PyTorch, for forward
                mode and the transforms of ``torch.func``, which the kernels do not support: the
                reference, with no size, layout or branch that depends on values.
        """

        def autograd(*args: Any) -> Any:
            if follows(*args):
                return transformed(*args)
            if not torch.is_grad_enabled() or not wants_gradient(*args):
                return self.below_autograd(*args)
            if eager(args) and not args[0].is_meta and (kernel := self.select(*args)).composite:
                return kernel.run(*args)
            return with_gradient(*args)

        library.impl(self.name, autograd, "Autograd")
        self._with_gradient, self._wants_gradient = with_gradient, wants_gradient

    def refuse_gradient(self) -> None:
        """For a backward operator: differentiating it is an error, not a silent zero."""
        self.differentiable(
            lambda *args: _Refusal.apply(self, *args),
            lambda *args: any(isinstance(a, Tensor) and a.requires_grad for a in args),
            lambda *_args: refuse(self.name),
        )

    def without_gradient(self, transformed: Callable[..., Any]) -> None:
        """Leaves the operator without a gradient in autograd.

        In forward mode and under ``torch.func``, where a missing gradient would be read as zero,
        ``transformed`` computes the operator.
        """
        self.differentiable(self.below_autograd, lambda *_args: False, transformed)

    def select(self, *args: Any) -> Kernel:
        """The kernel that runs these dispatcher arguments.

        Raises:
            BackendError: no kernel can, or the forced one cannot; the message gives the reasons.
        """
        name = forced()
        kernels = self.kernels
        if name != "auto":
            kernels = tuple(k for k in kernels if k.backend == name) or kernels
        slower = None
        for kernel in kernels:
            if kernel.why_not(*args) is None:
                if name == kernel.backend or not kernel.slower or kernel.slower(*args) is None:
                    return kernel
                slower = slower or kernel
        if slower is not None:
            return slower
        reasons = "; ".join(f"{k.backend}: {k.why_not(*args)}" for k in kernels)
        raise BackendError(f"{self.name}: no backend can run this call ({reasons})")

    def _select_directly(self, args: tuple[Any, ...]) -> Kernel:
        """What ``select`` returns for arguments that are ``direct``, in less time."""
        if forced() == "auto":
            missing = _build.load_extensions()
            for kernel in self._on_cpu if args[0].is_cpu else self._on_cuda:
                if missing[kernel.backend] is not None:
                    continue
                runs = kernel.backend == "cpu" or kernel.why_not(*args) is None
                if runs and (kernel.slower is None or kernel.slower(*args) is None):
                    return kernel
        return self.select(*args)


class _Refusal(torch.autograd.Function):
    """Runs a backward operator and raises when it is to be differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, op: Op, *args: Any) -> Any:
        ctx.name = op.name
        return op.below_autograd(*args)

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        refuse(ctx.name)


def no_gradient_of(ctx: Any, result: Tensor) -> None:
    """For the second result of an autograd Function, which is not to be differentiated.

    The Function's backward is then given None for it, and for the first result where nothing needs
    a gradient. PyTorch would otherwise allocate zeros of its size in each backward pass.
    """
    ctx.mark_non_differentiable(result)
    ctx.set_materialize_grads(False)


def refuse(name: str) -> NoReturn:
    """Raises, where a gradient is to be differentiated once more."""
    raise RuntimeError(
        f"{name} cannot be differentiated twice; "
        'with mcibi_fast.backend("reference") it can, in plain PyTorch'
    )


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend for every op that has it.

    It applies in the thread of the block, and in threads that have no such block, such as
    autograd's threads, which run the backward pass on a GPU.

    Ops without a backend of that name keep their own choice (``explain`` says which). An op that
    has it and cannot run the call with it raises ``BackendError``.

    Args:
        name: "reference", "cpu", "cuda", "triton", "sdpa", "pytorch" (plain operators of PyTorch,
            for small inputs), or "auto" for the usual choice.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend: {name!r} is none of {', '.join((*BACKENDS, 'auto'))}")
    mark, token = (object(), name), _own.set(name)
    _entered.append(mark)
    try:
        yield
    finally:
        _entered.remove(mark)
        _own.reset(token)


def forced() -> str:
    """The backend that is forced here, or "auto"."""
    own = _own.get()
    if own is not None:
        return own
    return _entered[-1][1] if _entered else "auto"


def explain(op: str | Callable[..., Any], *inputs: Any, **options: Any) -> str:
    """Says which backend would run a call, and why each of the others would not.

    Args:
        op: the public function of ``mcibi_fast.ops`` or its name, or a module of ``mcibi_fast.nn``
            that chooses how it computes (it has a method ``explain``).
        inputs, options: what the call would be given.

    Returns:
        One line an op backend, the chosen one first. For a module, first the choice and its reason.

    Raises:
        ValueError: no public op has that name, or the inputs are not valid for it.
    """
    if not isinstance(op, str) and hasattr(op, "explain"):
        return op.explain(*inputs, **options)
    name = op if isinstance(op, str) else getattr(op, "__name__", type(op).__name__)
    found = _ops.get(name)
    if found is None or found.public is None:
        public = sorted(n for n, o in _ops.items() if o.public is not None)
        raise ValueError(f"explain: no op {name!r}; the ops are {', '.join(public)}")
    args, name_forced = found.prepare(*inputs, **options), forced()
    try:
        chosen: Kernel | None = found.select(*args)
    except BackendError:
        chosen = None
    lines = [f"{name}: {chosen.backend if chosen else 'no backend can run this call'}"]
    for kernel in found.kernels:
        if kernel is chosen:
            verdict = "runs" + (" (forced)" if name_forced == kernel.backend else "")
        elif (reason := kernel.why_not(*args)) is not None:
            verdict = f"no: {reason}"
        elif (
            name_forced == "auto" and kernel.slower and (reason := kernel.slower(*args)) is not None
        ):
            verdict = f"could run, but {reason}"
        elif chosen is not None and name_forced == chosen.backend:
            verdict = f"could run, but {name_forced} is forced"
        else:
            verdict = "could run, but comes later in the order of preference"
        lines.append(f"  {kernel.backend:<10}{verdict}")
    missing = [b for b in BACKENDS if all(b != k.backend for k in found.kernels)]
    lines += [f"  {b:<10}no: {name} has no kernel of this kind" for b in missing]
    return "\n".join(lines)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Each operator of this package written in PyTorch's operators, for ``run_decompositions``.

    An exported program calls this package's operators, and the machine that runs it chooses their
    backend. A runtime without these operators, such as ONNX's, needs them written in PyTorch's::

        program = torch.export.export(model, (images,))
        program = program.run_decompositions(mcibi_fast.ops.decompositions())
        torch.onnx.export(program).save("model.onnx")

    They are then computed by the plain formulas: upsampled logits and attention scores are formed
    in full, and wrong labels are ignored, not reported.

    Returns:
        The operators, as ``torch.ops.mcibi_fast.<op>.default``, and a function for each.
    """
    return {
        op.call: kernel.run
        for op in _ops.values()
        for kernel in op.kernels
        if kernel.backend == "reference"
    }


def always(*_args: Any) -> str | None:
    """``why_not`` of a kernel that runs everywhere."""
    return None


def recompute_gradients(
    run: Callable[..., Any], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """The backward of a composite kernel, where a traced graph asks for it as an operator.

    Runs the kernel once more under autograd, which is shut out where operators are computed: its
    dispatch keys are let in again for the recomputation.
    """
    shut_out = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        shut_out = shut_out.remove(getattr(torch._C.DispatchKey, key))
    let_in = torch._C._dispatch_tls_local_include_set()
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(let_in, shut_out):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(run(*leaves), leaves, grad)
