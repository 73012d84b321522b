"""Defines an operator in one place: kernel, fake kernel, saved tensors and derivatives.

From these `Operator` builds the torch.library operator "segkernels::<name>" and a
`torch.autograd.Function`, and routes each call:

- directly to the kernel in eager mode without gradients, which has the least overhead;
- to the Function when a gradient is needed, in reverse or forward mode, and under `torch.func`;
- to torch's dispatcher while compiling, exporting or tracing, under a dispatch mode, and for
  tensors that a kernel cannot read directly (subclasses, meta tensors, negated views).

The dispatcher's autograd kernel calls the same Function, so derivatives do not depend on the route.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from segkernels import _status
from segkernels.ops import _flops

library = torch.library.Library("segkernels", "DEF")

# Types of tensors that kernels read; subclasses go to the dispatcher.
_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
_SCHEMA_TYPES = {
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
    tuple[int, int]: "SymInt[2]",
    tuple[int, ...]: "SymInt[]",
    tuple[float, float]: "float[2]",
    tuple[bool, ...]: "bool[]",
}


def under_functorch() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp, ...) is active."""
    return peek_interpreter_stack() is not None


def must_call_torch() -> bool:
    """Whether torch's own functions must compute a call, because only those can be recorded.

    This is so under torch.jit.trace, which would record the result of another call as a constant,
    and in torch.onnx.export, because ours have no ONNX form.
    """
    return _get_tracing_state() is not None or (is_compiling() and torch.onnx.is_in_onnx_export())


def check_not_traced(
    function: str, remedy: str = "export the model without it, and call it on the output"
) -> None:
    """Raise NotImplementedError where `must_call_torch`: torch has no functions for this call.

    Args:
        function: name of the public function, for the message.
        remedy: what to do instead of exporting the call to ONNX.
    """
    if not must_call_torch():
        return
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(f"{function}: this call has no ONNX form; {remedy}")
    raise NotImplementedError(
        f"{function}: torch.jit.trace cannot record this call; use torch.export"
    )


def with_zero_gradients(out: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Return `out` with gradients of 0 for tensors that it does not depend on."""
    if not wants_grad(*tensors):
        return out
    for t in tensors:
        out = out + t.flatten()[:0].sum().to(out.dtype)
    return out


def surely(condition: bool) -> bool:
    """Whether a comparison of sizes is true; False where dynamic sizes leave it open.

    An `if` of such a comparison would restrict a program of torch.export to sizes with the same
    answer.
    """
    if is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition


def is_eager(t: torch.Tensor) -> bool:
    """Whether a call on `t` runs immediately, so that sizes are ints and never SymInts."""
    return not is_compiling() and _len_torch_dispatch_stack() == 0 and type(t) in _TENSOR_TYPES


def can_read_values(t: torch.Tensor) -> bool:
    """Whether `t` is on the CPU and its values may be read: not while tracing or transforming."""
    return t.is_cpu and is_eager(t) and not under_functorch() and not must_call_torch()


def describing_features(
    features: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> AbstractContextManager[None]:
    """Let errors within the block say which of the features is invalid, if they can be read.

    Args:
        features: by the names of the arguments.
        dtype: that they are converted to.
    """
    if not all(map(can_read_values, features.values())):
        return nullcontext()
    return _status.describing(lambda codes: _status.describe_features(codes, features, dtype))


def needs_dispatcher(*tensors: Any) -> bool:
    """Whether a call on these tensors must go through torch's dispatcher."""
    if is_compiling() or peek_interpreter_stack() is not None:
        return True
    if _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None:
        return True
    for t in tensors:
        if isinstance(t, torch.Tensor) and (
            type(t) not in _TENSOR_TYPES or t.is_neg() or _has_no_memory(t)
        ):
            return True
    return False


def _has_no_memory(t: torch.Tensor) -> bool:
    """Whether `t` has no memory that a kernel can read.

    This is so for meta tensors, for torch._efficientzerotensor, and for a tensor kept from a
    `torch.func` transform that has ended.
    """
    return not (t.is_cpu or t.is_cuda) or t._is_zerotensor() or not torch._C._has_storage(t)


def wants_grad(*tensors: Any) -> bool:
    """Whether a call on these tensors must record derivatives, in reverse or forward mode."""
    if forward_ad._current_level >= 0:
        return True
    if is_grad_enabled():
        for t in tensors:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return True
    return False


class Operator:
    """A differentiable operator.

    It is called with the tensors, followed by one record: a NamedTuple of all other arguments. The
    last of the tensors may be a list of tensors. Autograd does not look into lists, so where it
    says "lists expanded" below, the elements of the list are separate arguments or results.

    Args:
        name: name in torch.library, after "segkernels::".
        tensors: tensor arguments of the schema: "Tensor input, Tensor? weight, Tensor[] terms".
        record: class of the record. Its annotations give the rest of the schema. Fields with a
            default are not part of the schema, so kernels called by the dispatcher see the default.
        kernel: `(*tensors, record)`, computes the outputs: a tensor, a tuple of tensors or a list.
            An output that a call does not have is None; the dispatcher returns an empty tensor for
            it.
        fake: as `kernel`, without values: outputs with the right shape, dtype and layout.
        direct: as `kernel`, for calls without gradients; it may leave out outputs that only the
            derivatives need. Default `kernel`.
        returns: return type of the schema.
        differentiable: number of outputs that have gradients; they come first.
        save: `(*tensors, record, *outputs)`, returns the tensors (or None) to save for the
            derivatives.
        backward: `(ctx, *grads)`, returns the gradients with respect to the tensors, lists
            expanded. As in `torch.autograd.Function`, with `ctx.saved_tensors`,
            `ctx.needs_input_grad` (lists expanded) and `ctx.record`. If the operator has several
            differentiable outputs, the gradient of an unused one is None.
        jvp: `(ctx, *tangents)`, returns the tangents of the outputs for the tangents of the
            tensors (or None), lists expanded.
        transpose: `(grad, *others, record)`, returns the gradient with respect to the first tensor.
            It replaces `save`, `backward` and `jvp` for an operator that is linear in its first
            tensor and has no gradient with respect to the others.
        vmap: `(size, dims, *args)`, lists expanded: the rule for `torch.vmap`. Computes a batch of
            calls with `all_outputs` and returns outputs with the batch as their first axis. Default
            `vmap_merged`.
        flops: FLOPs for `torch.utils.flop_counter.FlopCounterMode`, from the schema's arguments
            with shapes in place of tensors, and `out_shape`.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        record: type[Any],
        *,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        direct: Callable[..., Any] | None = None,
        returns: str = "Tensor",
        differentiable: int = 1,
        save: Callable[..., Sequence[torch.Tensor | None]] | None = None,
        backward: Callable[..., Sequence[Any]] | None = None,
        jvp: Callable[..., Any] | None = None,
        transpose: Callable[..., torch.Tensor] | None = None,
        vmap: Callable[..., Any] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = name
        self._record_schema = _RecordSchema(record)
        self.kernel = kernel
        self.tensors = [argument.split()[-1] for argument in tensors.split(",")]
        self._has_list = "Tensor[]" in tensors
        self._count = len(self.tensors)
        self._direct = direct or kernel
        self._returns_list = returns == "Tensor[]"
        self._differentiable = differentiable
        self._save, self._backward, self._jvp = save, backward, jvp
        self._vmap = vmap or self.vmap_merged
        if transpose is not None:
            if save or backward or jvp or self._has_list:
                raise TypeError(
                    f"{name}: transpose must be given without save, backward, jvp and Tensor[]"
                )
            self._derive_from_transpose(transpose)
        elif differentiable and backward is None:
            raise TypeError(f"{name}: backward or transpose must be given, or differentiable=0")
        library.define(f"{name}({tensors}, {self._record_schema.schema}) -> {returns}")
        self.overload = getattr(torch.ops.segkernels, name).default
        for key in ("CPU", "CUDA"):
            library.impl(name, lambda *args: self._call_for_dispatcher(kernel, args), key)
        library.impl(name, self._autograd_kernel, "Autograd", with_keyset=True)
        torch.library.register_fake(
            f"segkernels::{name}", lambda *args: self._fake(fake, args), lib=library
        )
        if flops is not None:
            _flops.register(name, flops)
        function = self._function(self._forward)
        # Function.apply inspects signatures for functorch, which takes microseconds; the apply of
        # its base class does not.
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        self._apply_functorch = self._function(self._forward_dispatched).apply

    def __call__(self, *args: Any) -> Any:
        """Return the outputs for the tensors and the record."""
        if is_compiling():
            return self._dispatch(args)
        tensors = self._expand_list(args)[:-1] if self._has_list else args[:-1]
        if peek_interpreter_stack() is not None:
            return self._to_returns(
                self._apply_functorch(*tensors, self._record_schema.without_defaults(args[-1]))
            )
        if _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None:
            return self._dispatch(args)
        grad_enabled = is_grad_enabled()
        needs_grad = forward_ad._current_level >= 0
        for t in tensors:
            if t is None:
                continue
            if type(t) not in _TENSOR_TYPES or t.is_neg():
                return self._dispatch(args)
            if grad_enabled and t.requires_grad:
                needs_grad = True
        if needs_grad:
            return self._to_returns(self._apply(*tensors, args[-1]))
        try:
            return self._direct(*args)
        except RuntimeError:
            if not self._any_without_memory(args):
                raise
            return self._dispatch(args)

    def _any_without_memory(self, args: tuple[Any, ...]) -> bool:
        return any(t is not None and _has_no_memory(t) for t in self._expand_list(args)[:-1])

    def all_outputs(self, *args: Any) -> Any:
        """Return every output, including those that only derivatives need, as vmap rules must."""
        return self._to_returns(self._apply_functorch(*self._expand_list(args)))

    def vmap_merged(
        self,
        size: int,
        dims: Sequence[int | None],
        *args: Any,
        without_batch: Sequence[str] = (),
        common: Sequence[int] = (),
    ) -> Any:
        """Compute a batch of calls as one call: a `vmap` rule that merges vmap's axis into axis 0.

        Args:
            size: size of the axis that vmap maps over.
            dims: that axis in each tensor, lists expanded; None if a tensor has none.
            args: the tensors, lists expanded, and the record.
            without_batch: names of the tensors without a batch axis of their own. If vmap maps over
                one of them, the calls are made one by one.
            common: indices of the outputs without a batch axis, which are equal for all calls.
        """
        *tensors, record = args
        names = [*self.tensors, *self.tensors[-1:] * len(tensors)]
        unbatched = [name in without_batch for name in names[: len(tensors)]]
        if any(u and dim is not None for u, dim in zip(unbatched, dims, strict=False)):
            return self.vmap_loop(size, dims, *args)
        merged = [
            t if t is None or u else vmap_axis_first(t, dim, size).flatten(0, 1)
            for t, u, dim in zip(tensors, unbatched, dims, strict=False)
        ]
        out = self.all_outputs(*self._collect_list((*merged, record)))
        if isinstance(out, (tuple, list)):
            return tuple(
                o.expand(size, *o.shape) if i in common else split_vmap_axis(o, size)
                for i, o in enumerate(out)
            )
        return split_vmap_axis(out, size)

    def vmap_loop(self, size: int, dims: Sequence[int | None], *args: Any) -> Any:
        """Compute a batch of calls one by one: a `vmap` rule."""
        results = []
        for i in range(size):
            tensors = (
                t if d is None else t.select(d, i) for t, d in zip(args[:-1], dims, strict=False)
            )
            results.append(self.all_outputs(*self._collect_list((*tensors, args[-1]))))
        if isinstance(results[0], (tuple, list)):
            return tuple(map(torch.stack, zip(*results, strict=True)))
        return torch.stack(results)

    # The arguments have three forms: (*tensors, record) as this class is called; the same with a
    # list of tensors expanded into separate arguments, for autograd; and the tensors followed by
    # the fields of the record, for the dispatcher.

    def _expand_list(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[:-2], *args[-2], args[-1]) if self._has_list else args

    def _collect_list(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._has_list:
            return args
        first = self._count - 1
        return (*args[:first], list(args[first:-1]), args[-1])

    def _build_record(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[: self._count], self._record_schema.build(iter(args[self._count :])))

    def _call_for_dispatcher(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call `function` and replace outputs that are None, which a schema does not allow."""
        out = function(*self._build_record(args))
        if not isinstance(out, (tuple, list)):
            return out
        return type(out)(args[0].new_empty(0) if o is None else o for o in out)

    def _fake(self, fake: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # Here, because dynamo does not see that torch.onnx.export runs, and because that takes
        # programs of torch.export too.
        if torch.onnx.is_in_onnx_export():
            raise NotImplementedError(
                f"{self.name}: this operator has no ONNX form; give torch.onnx.export the model "
                "itself, for which segkernels calls torch's functions where it can"
            )
        return self._call_for_dispatcher(fake, args)

    def _to_returns(self, out: Any) -> Any:
        return list(out) if self._returns_list else out

    def _dispatch(self, args: tuple[Any, ...]) -> Any:
        check_not_traced(self.name)
        return self.overload(*args[:-1], *self._record_schema.flatten(args[-1]))

    def _autograd_kernel(self, keys: Any, *args: Any) -> Any:
        tensors = args[: self._count]
        if self._has_list:
            tensors = (*tensors[:-1], *tensors[-1])
        if under_functorch() or wants_grad(*tensors):
            return self._to_returns(
                self._apply_functorch(*self._expand_list(self._build_record(args)))
            )
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def _forward(self, *args: Any) -> Any:
        args = self._collect_list(args)
        try:
            out = self.kernel(*args)
        except RuntimeError:
            if not self._any_without_memory(args):
                raise
            out = self._dispatch(args)
        return tuple(out) if self._returns_list else out

    def _forward_dispatched(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out = self._dispatch(self._collect_list(args))
        return tuple(out) if self._returns_list else out

    def _derive_from_transpose(self, transpose: Callable[..., torch.Tensor]) -> None:
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            others = ctx.saved_tensors
            return transpose(grad, *others, ctx.record), *[None] * len(others)

        self._save = lambda *args: args[1 : self._count]
        self._backward = backward
        self._jvp = lambda ctx, tangent, *_: self(tangent, *ctx.saved_tensors, ctx.record)

    def _function(self, forward: Callable[..., Any]) -> Any:
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outs = output if isinstance(output, tuple) else (output,)
            ctx.record = inputs[-1]
            ctx.set_materialize_grads(False)
            if self._save is not None:
                saved = self._save(*self._collect_list(inputs), *outs)
                ctx.save_for_backward(*saved)
                if forward_ad._current_level >= 0:
                    ctx.save_for_forward(*saved)
            if len(outs) > 1 or not self._differentiable:
                no_grad = [out for out in outs[self._differentiable :] if out is not None]
                if forward == self._forward_dispatched:
                    no_grad += filter(_is_absent, outs[: self._differentiable])
                ctx.mark_non_differentiable(*no_grad)

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            grads = grads[: self._differentiable]
            for grad in grads:
                if grad is not None and self._backward is not None:
                    return *self._backward(ctx, *grads), None
            return (None,) * len(ctx.needs_input_grad)

        def jvp(ctx: Any, *tangents: Any) -> Any:
            if self._jvp is None:
                raise NotImplementedError(
                    f"{self.name}: forward-mode differentiation (torch.func.jvp, jacfwd, "
                    "torch.autograd.forward_ad) is not implemented; use reverse mode"
                )
            return self._jvp(ctx, *tangents[:-1])

        def vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
            size = info.batch_size
            if size == 0:  # compute a batch of one for the shapes
                tensors = (
                    t if d is None else t.new_zeros(t.movedim(d, 0).shape[1:])
                    for t, d in zip(args[:-1], dims, strict=False)
                )
                args, dims = (*tensors, args[-1]), (None,) * len(dims)
            out = self._vmap(max(size, 1), dims, *args)
            several = isinstance(out, tuple)
            outs = [o[:size] for o in (out if several else (out,))]
            return (tuple(outs), (0,) * len(outs)) if several else (outs[0], 0)

        members = {f.__name__: staticmethod(f) for f in (setup_context, backward, jvp, vmap)}
        return type(self.name, (torch.autograd.Function,), {**members, "forward": forward})


def _is_absent(out: torch.Tensor) -> bool:
    """Whether the dispatcher returned `out` for an output that the call does not have."""
    return out.dim() == 1 and out.numel() == 0


def vmap_axis_first(t: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """Move the axis `dim` that `torch.vmap` maps over to the front; if None, expand to `size`."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def split_vmap_axis(t: torch.Tensor, size: int) -> torch.Tensor:
    """Split the first axis into the axis that `torch.vmap` maps over and the batch axis."""
    return t.unflatten(0, (size, t.size(0) // size))


def _schema_type(kind: Any, name: str) -> str:
    """Return the schema's type for the annotation `kind` of the record field `name`."""
    if typing.get_origin(kind) is typing.Literal:
        return "str"
    if typing.get_origin(kind) is tuple and typing.get_origin(typing.get_args(kind)[0]):
        return f"{_schema_type(typing.get_args(kind)[0], name)}[]"
    if kind not in _SCHEMA_TYPES:
        known = ", ".join(getattr(k, "__name__", str(k)) for k in _SCHEMA_TYPES)
        raise TypeError(f"{name}: a record's field must be a record or one of {known}, got {kind}")
    return _SCHEMA_TYPES[kind]


class _RecordSchema:
    """Converts between a record and the schema's arguments; nested records are flattened."""

    def __init__(self, record: type[Any]) -> None:
        hints = typing.get_type_hints(record)
        names = [name for name in record._fields if name not in record._field_defaults]
        kinds = [hints[name] for name in names]
        self.record = record
        # For each field: its _RecordSchema if it is a record, else None.
        self.fields = tuple(_RecordSchema(k) if hasattr(k, "_fields") else None for k in kinds)
        self.schema: str = ", ".join(
            f"{_schema_type(kind, name)} {name}" if field is None else field.schema
            for name, kind, field in zip(names, kinds, self.fields, strict=True)
        )

    def flatten(self, record: Any) -> list[Any]:
        """Return the schema's arguments for `record`."""
        values: list[Any] = []
        for field, value in zip(self.fields, record, strict=False):
            values += [value] if field is None else field.flatten(value)
        return values

    def without_defaults(self, record: Any) -> Any:
        """Return `record` with the default for every field that is not in the schema."""
        return self.build(iter(self.flatten(record)))

    def build(self, values: Iterator[Any]) -> Any:
        """Return the record for the schema's arguments, with lists as tuples."""
        fields = []
        for field in self.fields:
            value = next(values) if field is None else field.build(values)
            fields.append(tuple(value) if isinstance(value, list) else value)
        return self.record(*fields)


def match_dtype_and_layout(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `out` in the dtype and layout of `like`, which has its shape; copy only if needed."""
    if under_functorch():  # its tensors have no layout
        return out.to(like.dtype)
    meta = torch.empty_like(like, device="meta")
    if out.dtype == meta.dtype and out.stride() == meta.stride():
        return out
    return torch.empty_like(like, requires_grad=False).copy_(out)


def is_contiguous(x: torch.Tensor, memory_format: torch.memory_format) -> bool:
    """Whether `x` is contiguous in `memory_format`; False under `torch.func`, without layouts."""
    return not under_functorch() and x.is_contiguous(memory_format=memory_format)


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of a new tensor: channels_last or contiguous."""
    return torch.channels_last if channels_last else torch.contiguous_format


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether results for the 4-D `x` are channels_last: `x` is, or is a view of such a tensor."""
    if x.is_contiguous():
        return False
    if is_contiguous(x, torch.channels_last):
        return True
    batch, channel, row, column = x.stride()
    return channel < column <= row <= batch and channel * x.size(1) <= column
