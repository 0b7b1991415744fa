"""The op table from Python, as the self-test has it; on the emulator an op that gives it something
to report fails."""

from functools import lru_cache

from emulator import emulator

from glmlora import _core
from glmlora.tools import optable
from glmlora.tools.optable import *  # noqa: F403


class DeviceOps(optable.DeviceOps):
    """No sentinels where the checked emulator knows the bounds: what lies there may not be read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.aligned = False  # every call's arrays are on the 16-byte grid
        emu = emulator()
        if emu and emu.checked():
            self.GUARD = 0

    def _call(self, op: str, args: tuple) -> None:
        emu = emulator()
        before = emu.reports()[0] if emu else 0
        super()._call(op, args)
        if emu:
            count, text = emu.reports()
            assert count == before, f"{op}: {count - before} reports, the last: {text}"

    def _pointer(self, array, dtype, what):
        if self.aligned and array is not None:
            return self._put(array, 0)
        return super()._pointer(array, dtype, what)


@lru_cache
def ops_of(name: str) -> optable.Ops:
    """The ops of a backend, wherever its memory is."""
    return DeviceOps(name) if _core.op_table(name)["device_memory"] else optable.Ops(name)
