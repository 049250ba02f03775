"""Epsilons that norms show: another one is recognised in later norms where it is too small to be seen by itself."""

from msgspec.structs import replace

from engine.graph import Step, compute, viewed

from .held import Held
from .judging import Judging
from .looks import other_epsilon
from .values import row_errors

# Where activations are even larger, another epsilon is below a norm's limit: it is recognised by comparison, once a norm with smaller
# activations has shown it. Rounding doesn't prefer one epsilon to another: ten times closer is not rounding.
_NEARER = 10.0


def judge_epsilon(judging: Judging, step: Step, held: Held, limit: float) -> None:
    """Compare a norm with the epsilons that other norms have shown, or learn one from it."""
    record = judging.records[step.makes]
    if record.wrong:
        eps = other_epsilon(step, viewed(step.reads[0], held.inputs[0]), held.dumped, judging.weights, limit)
        judging.epsilons |= {eps} if eps is not None else set()
        return
    for eps in sorted(judging.epsilons):
        with_eps = compute(replace(step, params={**step.params, "eps": eps}), held.inputs, judging.weights)
        error = float(row_errors(step.makes, with_eps, held.dumped, held.positions).max())
        if error * _NEARER < record.nmse:
            record.wrong = True
            record.reason = f"closer with an epsilon of {eps:.2g}, as in other norms, than with {step.params['eps']:.2g}"
