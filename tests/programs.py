"""Properties of a compiled program that its text shows; memformer.training.program reads its costs."""

import re


def collectives_in_loops(text: str) -> list[str]:
    """Lines of a compiled program that move data between devices inside a loop."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf".* (?:{kinds})(?:-start)?\(.*op_name=\"[^\"]*while/body.*", text)
