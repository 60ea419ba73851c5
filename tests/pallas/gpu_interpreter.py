"""Additions to Pallas' GPU interpreter for the kernels: operands of wgmma in registers, accumulators with a value."""

import functools

__all__ = ["teach"]

try:
    from jax._src import callback
    from jax._src.pallas import primitives
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
    from jax._src.state.discharge import run_state_p
    from jax._src.state.types import AbstractRef

    Interpreter = jaxpr_interpret.JaxprInterpreter
except ImportError:
    Interpreter = None


def teach(monkeypatch):
    """Adds operands of wgmma in registers, and `pl.run_state`, to Pallas' GPU interpreter.

    Args:
      monkeypatch: of the test.
    """
    plain = Interpreter.interpret, Interpreter._interpret_run_scoped_p, Interpreter._interpret_wgmma_ref_p

    def put(self, eqn, token, value):
        token, request = gpu_callbacks.call_make_allocation_request_array(
            token=token,
            compute_unit=self.thread,
            memory_space_id=memory.get_memory_space_idx(core.MemorySpace.REGS),
            initial_ref_count=1,
        )
        return gpu_callbacks.call_allocate_buffer(
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_request_as_array=request,
            value=value,
            source_info=eqn.source_info,
        )

    def take(self, eqn, token, key, aval):
        token, value = callback.io_callback(
            functools.partial(gpu_callbacks.wgmma_accumulator_deref, source_info=eqn.source_info, wait_n=0),
            (gpu_callbacks.TOKEN_SHAPE_DTYPE, aval),
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            acc_allocation_key_as_array=key,
        )
        return drop(self, eqn, token, key), value

    def drop(self, eqn, token, key):
        return gpu_callbacks.call_deallocate_buffer(
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_key_as_array=key,
            source_info=eqn.source_info,
        )

    def rename(self, jaxpr, token, *args):
        eqns = [
            eqn.replace(primitive=primitives.run_scoped_p) if eqn.primitive is run_state_p else eqn
            for eqn in jaxpr.eqns
        ]
        return plain[0](self, jaxpr.replace(eqns=eqns), token, *args)

    def run_state(self, eqn, token, get_invals):
        if "is_initialized" not in eqn.params:
            return plain[1](self, eqn, token, get_invals)
        refs, values = [], get_invals()
        for x, value in zip(eqn.invars, values, strict=True):
            if not isinstance(x.aval, AbstractRef):
                token, value = put(self, eqn, token, value)
            refs.append(value)
        token, _ = self.interpret(eqn.params["jaxpr"], token, *refs)
        out = []
        for x, ref in zip(eqn.invars, refs, strict=True):
            value = ref
            if not isinstance(x.aval, AbstractRef):
                token, value = take(self, eqn, token, ref, x.aval)
            out.append(value)
        return token, out

    def wgmma(self, eqn, token, get_invals):
        acc, a, *rest = get_invals()
        if isinstance(eqn.invars[1].aval, AbstractRef):
            return plain[2](self, eqn, token, get_invals)
        token, key = put(self, eqn, token, a)
        token, out = plain[2](self, eqn, token, lambda: [acc, key, *rest])
        return drop(self, eqn, token, key), out

    monkeypatch.setattr(Interpreter, "interpret", rename)
    monkeypatch.setattr(Interpreter, "_interpret_run_scoped_p", run_state)
    monkeypatch.setattr(Interpreter, "_interpret_wgmma_ref_p", wgmma)
