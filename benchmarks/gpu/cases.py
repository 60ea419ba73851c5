"""The cases of benchmarks.gpu, and the contestants of each.

Numpy only: the process of the PyTorch peers imports this module too.
"""

from benchmarks.cases import RECURRENT, Case

__all__ = ["CUDNN", "FLA", "SDPA", "SHIPPED", "TIMED", "TOY", "contestants", "gated_case"]

PLAIN = ("pallas", "chunked")

# Names of peers, which are defined in gpu/peers.py and gpu/contestants.py.
FLA, SDPA, CUDNN = "FLA (Triton)", "torch sdpa", "cuDNN (jax.nn)"


def gated_case(length: int, heads: int, implementations: tuple[str, ...] = ("pallas",)) -> Case:
    """The gated delta rule with 16 heads of q and k."""
    return Case("delta_rule", 1, length, heads, 16, decay="head", implementations=implementations)


def _u(batch: int, heads: int, length: int = 8192, implementations: tuple[str, ...] = ("pallas",)) -> Case:
    return Case("deltaformer", batch, length, heads, heads, only_u=True, implementations=implementations)


# Most important first, for runs that are stopped by their limit. The recurrence is timed where it takes seconds, the
# chunked form at one shape per op: it takes longer to compile than everything else to run.
TIMED = (
    _u(2, 32, implementations=PLAIN),
    gated_case(8192, 64, (*PLAIN, RECURRENT)),
    gated_case(8192, 32),
    Case("softmax_attention", 1, 16384, 16, 16, implementations=PLAIN),
    Case("linear_attention", 1, 8192, 96, 96, implementations=(*PLAIN, RECURRENT)),
    Case("deltaformer", 2, 8192, 32, 32, implementations=PLAIN),
    gated_case(2048, 64),
    gated_case(32768, 64),
    gated_case(32768, 32),
    _u(1, 1),
    _u(1, 8),
    Case("softmax_attention", 1, 16384, 16, 16, segments=8),
    _u(8, 32, length=4096),
    gated_case(2048, 32),
    _u(4, 32),
)

# One case of every kind of op, to test this program; their times mean nothing.
TOY = (
    Case("deltaformer", 1, 32, 2, 2, 16, 16, only_u=True, implementations=PLAIN),
    Case("delta_rule", 1, 32, 2, 1, 16, 16, decay="head", implementations=(*PLAIN, RECURRENT)),
    Case("softmax_attention", 1, 32, 2, 2, 16, 16, segments=2, implementations=PLAIN),
)

# Configurations whose registers are reported: every op, with and without the options that change its kernels. A
# process compiles equal kernels once, so that DeltaFormer, which shares those of attention, comes after it.
SHIPPED = (
    *(
        Case(op, 1, 256, 2, 1, width, width, decay=decay, segments=segments)
        for op in ("delta_rule", "linear_attention")
        for width in (64, 128)
        for decay in ("", "head", "channel")
        for segments in (0, 2)
    ),
    *(
        Case(op, 1, 256, 2, 1, 256, width, dtype, decay=decay, segments=2)
        for op in ("delta_rule", "linear_attention")
        for decay in ("head", "channel")
        for width, dtype in ((64, "bfloat16"), (256, "bfloat16"), (256, "float16"))
        if decay == "channel" or dtype == "bfloat16"
    ),
    *(
        Case(op, 1, 256, 2, 1, width, width, "float16", decay="head", segments=2)
        for op in ("delta_rule", "linear_attention")
        for width in (64, 128)
    ),
    # Long sequences of few heads are scanned in parts of the time, those of many heads by two warpgroups per program.
    *(
        Case(op, *sizes, 1, width, width, decay="head", segments=2)
        for op in ("delta_rule", "linear_attention")
        for sizes in ((1, 4096, 8), (4, 256, 68))
        for width in (64, 128, 256)
    ),
    # A state per document.
    *(
        Case("delta_rule", 1, 256, 2, 1, width, width, decay=decay, segments=2, documents=True)
        for width in (64, 128, 256)
        for decay in ("head", "channel")
    ),
    *(
        Case("softmax_attention", 1, 256, 2, 1, width, width, segments=segments)
        for width in (64, 128)
        for segments in (2, 0)
    ),
    # Few tokens: one kernel, without a gradient of its own.
    *(
        Case(op, 64, length, 32, 16, width, width, decay=decay)
        for op in ("delta_rule", "linear_attention")
        for length in (1, 8)
        for width in (64, 128)
        for decay in ("head", "channel")
    ),
    # Several spans of a write (pallas/gpu/attention/deltaformer.py), one span, and less than two tiles.
    *(
        Case("deltaformer", 1, length, 2, 1, width, width, write=write, segments=segments)
        for length, writes in ((2048, ("softmax", "linear", "round", "relu")), (256, ("softmax", "linear")))
        for write in writes
        for width in (64, 128)
        for segments in (2, 0)
    ),
    *(Case(op, 1, 64, 2, 1) for op in ("softmax_attention", "deltaformer")),
    # Forgetting in attention.
    *(
        Case("softmax_attention", 1, 256, 2, 1, width, width, decay="head", segments=segments)
        for width in (64, 128)
        for segments in (2, 0)
    ),
    *(
        Case("deltaformer", 1, length, 2, 1, width, width, decay="head", write=write, segments=2)
        for length, widths in ((2048, (64, 128)), (256, (128,)))
        for write in ("softmax", "linear")
        for width in widths
    ),
    *(Case(op, 1, 64, 2, 1, decay="head") for op in ("softmax_attention", "deltaformer")),
    *(
        Case("deltaformer", 1, 256, 2, 1, decay="head", read=read, segments=2)
        for read in ("linear", "relu", "exp", "round")
    ),
    # Windows and encoders.
    *(
        Case("softmax_attention", 1, 256, 2, 1, segments=segments, causal=causal, window=window)
        for causal, window in ((True, 100), (False, 100), (False, None))
        for segments in (2, 0)
    ),
    Case("softmax_attention", 1, 256, 2, 1, decay="head", segments=2, window=100),
    # 256 channels.
    Case("softmax_attention", 1, 256, 2, 1, 256, 256, decay="head", segments=2, window=100),
    *(
        Case("deltaformer", 1, 2048, 2, 1, 256, 256, dtype, decay, segments=2, write=write, read=read)
        for dtype, decay, write, read in (
            ("bfloat16", "", "softmax", "softmax"),
            ("bfloat16", "head", "softmax", "softmax"),
            ("bfloat16", "head", "linear", "exp"),
            ("float16", "", "linear", "relu"),
        )
    ),
    *(
        Case("deltaformer", 1, 2048, 2, 1, decay=decay, write=write, segments=segments, window=700)
        for decay, write, segments in (("", "softmax", 0), ("head", "linear", 2))
    ),
    *(
        Case("softmax_attention", 1, 256, 2, 1, width, width, "float16", decay=decay, segments=2)
        for width in (64, 128)
        for decay in ("", "head")
    ),
    Case("deltaformer", 1, 2048, 2, 1, dtype="float16", segments=2),
    Case("deltaformer", 1, 2048, 2, 1, dtype="float16", decay="head", write="linear", read="exp", segments=2),
    # Few tokens over a cache: one kernel for both ops.
    *(
        Case("softmax_attention", batch, length, 32, 8, width, width, slots=4096)
        for batch, length, width in ((64, 1, 64), (64, 1, 128), (1, 1, 128), (64, 8, 128), (64, 1, 256))
    ),
    *(
        Case("softmax_attention", 64, 8, 32, 8, width, width, decay="head", window=1024, slots=4096)
        for width in (128, 256)
    ),
    Case("softmax_attention", 64, 1, 32, 8, dtype="float16", slots=4096),
    *(
        Case("deltaformer", 64, length, 16, 8, write=write, decay=decay, slots=4096)
        for length in (1, 8)
        for write, decay in (("softmax", ""), ("linear", ""), ("linear", "head"))
    ),
    Case("deltaformer", 64, 1, 16, 8, write="round", read="linear", decay="head", slots=4096),
)


def contestants(case: Case, gradient: bool) -> list[tuple[str, str]]:
    """Contestants of a case and pass: pairs of the process ("jax" or "torch") and the name of an implementation."""
    # The recurrence's backward pass would keep the state of every token.
    ours = [name for name in case.implementations if not (gradient and name == RECURRENT)]
    theirs = [FLA]
    if case.op == "softmax_attention":
        ours.append(CUDNN)
        theirs += [SDPA] * (not case.segments)
    return [("jax", name) for name in ours] + [("torch", name) for name in theirs]
