"""Lowerings that do to their process what a broken kernel would: XLA's convolution, handed on by a custom call.

They are in a module of their own, since another process has to import them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import threading
from typing import Any, ClassVar

import jax
import numpy as np
from jax import lax

from jaxlayout import ConvDimensionNumbers, Lowering

NOT_HERE = "JAXLAYOUT_TEST_NOT_HERE"
"""The variable that says in which process none of them may run: it has its id."""

DIES_HERE = "JAXLAYOUT_TEST_DIES_HERE"
"""Likewise, where `Composed` dies."""

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


class Planted(Lowering):
    may_crash = True

    def dimension_numbers(self, conv):
        yield ConvDimensionNumbers.channels_last(conv.rank)

    def apply(self, conv, dims, lhs, prepared):
        if os.environ.get(NOT_HERE) == str(os.getpid()):
            os._exit(97)
        out = lax.conv_general_dilated(lhs, prepared, dimension_numbers=dims.to_lax(), **conv.params)
        name = _target(type(self), out.shape, lhs.shape)
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(out.shape, out.dtype), custom_call_api_version=1)(out, lhs)

    @classmethod
    def run(cls, out: np.ndarray, result: np.ndarray, lhs: np.ndarray) -> None:
        """The kernel: float32 arrays where XLA has them."""
        out[...] = result


@functools.cache
def _target(cls: type[Planted], out: tuple[int, ...], lhs: tuple[int, ...]) -> str:
    def kernel(to: int, operands: Any) -> None:
        arrays = [
            np.ctypeslib.as_array((ctypes.c_float * math.prod(shape)).from_address(at)).reshape(shape)
            for at, shape in ((to, out), (operands[0], out), (operands[1], lhs))
        ]
        cls.run(*arrays)

    name, function = f"{cls.name}{out}{lhs}", _KERNEL(kernel)
    _alive.append(function)
    jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(ctypes.cast(function, ctypes.c_void_p).value), platform="cpu", api_version=0
    )
    return name


_alive: list[Any] = []


def die(*_: Any) -> None:
    print("terminate called after throwing an instance of 'planted'", file=sys.stderr, flush=True)
    os.abort()


class Sound(Planted):
    name = "sound"


class Talks(Planted):
    """On all ways to what might be a pipe, and listens."""

    name = "talks"

    @classmethod
    def run(cls, out, result, lhs):
        print('{"measurement": null}', flush=True)
        os.write(1, b'{"measurement": null}\n')
        sys.__stdout__.write('{"measurement": null}\n')
        out[...] = result + len(os.read(0, 1))


class Aborts(Planted):
    name = "aborts"
    run = classmethod(die)


class Composed(Planted):
    """Dies in one process only: right by itself, and not in a program."""

    name = "composed"

    @classmethod
    def run(cls, out, result, lhs):
        if os.environ.get(DIES_HERE) == str(os.getpid()):
            die()
        out[...] = result


class Traced(Planted):
    """While it is traced."""

    name = "traced"
    apply = die


class Segfaults(Planted):
    name = "segfaults"

    @classmethod
    def run(cls, out, result, lhs):
        ctypes.string_at(0)


class Hangs(Planted):
    name = "hangs"

    @classmethod
    def run(cls, out, result, lhs):
        LIBC.pause()


class Forks(Planted):
    """Its child stays, with all that is open."""

    name = "forks"

    @classmethod
    def run(cls, out, result, lhs):
        out[...] = result
        fork()


class ForksAndDies(Planted):
    name = "forks_and_dies"

    @classmethod
    def run(cls, out, result, lhs):
        fork()
        die()


def fork() -> None:
    if (child := LIBC.fork()) == 0:
        while True:
            LIBC.pause()
    os.write(2, f"left {child}\n".encode())  # whole, as others say so at the same time


class Eats(Planted):
    """More memory than there is for it."""

    name = "eats"

    @classmethod
    def run(cls, out, result, lhs):
        out[...] = result
        for _ in range(64):
            if not (block := LIBC.malloc(2**26)):
                die()
            ctypes.memset(block, 1, 2**26)


class Varies(Planted):
    name = "varies"

    @classmethod
    def run(cls, out, result, lhs):
        out[...] = result * (1 + 1e-7 * np.random.default_rng().random(out.shape))


class Crowded(Planted):
    """Goes wrong when it is run while it is running."""

    name = "crowded"
    running: ClassVar[list[int]] = []
    met: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def run(cls, out, result, lhs):
        cls.running.append(1)
        if len(cls.running) > 1:
            cls.met.set()
        alone = not cls.met.wait(0.05)
        cls.running.pop()
        out[...] = result if alone else result + np.random.default_rng().random()


class Overreads(Planted):
    """Its operand, by one element."""

    name = "overreads"

    @classmethod
    def run(cls, out, result, lhs):
        beyond = ctypes.c_float.from_address(lhs.ctypes.data + lhs.nbytes).value
        out[...] = result + 1e-9 * beyond


class Skips(Planted):
    """The last element of its result, which keeps what the memory had."""

    name = "skips"

    @classmethod
    def run(cls, out, result, lhs):
        out.reshape(-1)[:-1] = result.reshape(-1)[:-1]


class Wrong(Planted):
    name = "wrong"

    @classmethod
    def run(cls, out, result, lhs):
        out[...] = 1.01 * result


class Raises(Planted):
    name = "raises"

    def apply(self, conv, dims, lhs, prepared):
        raise ValueError("not today")


class Quits(Planted):
    name = "quits"

    def apply(self, conv, dims, lhs, prepared):
        sys.exit(3)


class Needs(Planted):
    """Cannot be made without an argument, and its module does not register one."""

    name = "needs"

    def __init__(self, argument: int):
        self.argument = argument
