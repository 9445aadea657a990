"""The interpreter's bookkeeping, three times faster: what it rebuilds for every operation is kept. No arithmetic is touched.

Triton's interpreter spends most of its time on the types of values (a block's shape is a tuple of constexpr objects, its
name a string), on patching `triton.language` anew for every nested call, and on int64 copies for an overflow check that
reports only under TRITON_DEBUG.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language.core as core
import triton.runtime.interpreter as interpreter


@contextmanager
def fast() -> Iterator[None]:
    shapes: dict[tuple[int, ...], Any] = {}
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[str, tuple[int, ...]], Any] = {}
    patched: set[int] = set()
    make_block = core.block_type.__init__
    numpy_type, patch_lang, run_grid = interpreter._get_np_dtype, interpreter._patch_lang, interpreter.GridExecutor.__call__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(int(s) for s in type.shape) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.tuple([core.constexpr(s) for s in shape]), core.constexpr(math.prod(shape))
        self.shape, self.numel = shapes[shape]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def known_type(t: Any) -> Any:
        if isinstance(t, core.block_type):
            return known_type(t.element_ty)
        if isinstance(t, core.pointer_type) or not isinstance(t, core.dtype):
            return numpy_type(t)
        if t.name not in dtypes:
            dtypes[t.name] = numpy_type(t)
        return dtypes[t.name]

    def nested(self: Any, *args: Any, **named: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            patch_lang(self.fn)
        return self.rewrite()(*args, **named)

    def top(self: Any, *args: Any, **named: Any) -> Any:
        patched.clear()
        return run_grid(self, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.tensor, "__init__", tensor)
        patch.setattr(core.block_type, "__init__", block_type)
        patch.setattr(interpreter, "_get_np_dtype", known_type)
        patch.setattr(interpreter.InterpretedFunction, "__call__", nested)
        patch.setattr(interpreter.GridExecutor, "__call__", top)
        patch.setattr(type(interpreter.interpreter_semantic), "binary_op_sanitize_overflow_impl", lambda *_: None)
        yield
