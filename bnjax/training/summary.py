"""How a run ended: summary.json, and the table that train.py prints."""

from datetime import timedelta
from typing import Any

from bnjax.training.evaluation import Evaluation
from bnjax.training.state import TrainState, count_parameters, state_sha256


def summarize(
    state: TrainState,
    evaluation: Evaluation,
    records: list[dict[str, Any]],
    *,
    seconds: float,
    compile_seconds: float,
    dropped: int,
    seed: int,
) -> dict[str, Any]:
    """Return what summary.json holds, beside the preset.

    Args:
        state: after the last step.
        evaluation: of that state.
        records: all of metrics.jsonl.
        seconds: spent in steps.
        compile_seconds: spent compiling them, since the run was last resumed.
        dropped: steps among them that were dropped.
        seed: of the run.
    """
    steps = int(state.step)
    tests = [record for record in records if record["split"] == "test"]
    best = max(tests, key=lambda test: (test["accuracy"], test["step"]))
    return {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_correct": evaluation.correct,
        "test_examples": evaluation.examples,
        "best_test_accuracy": best["accuracy"],
        "best_step": best["step"],
        "steps": steps,
        "dropped_steps": dropped,
        "steps_per_second": steps / seconds,
        "train_seconds": seconds,
        "compile_seconds": compile_seconds,
        "parameters": count_parameters(state.params),
        "state_sha256": state_sha256(state),
        "seed": seed,
    }


def final_table(summary: dict[str, Any]) -> str:
    """Return the rest of a summary for a person to read.

    Example:
        >>> print(
        ...     final_table(
        ...         {
        ...             "best_test_accuracy": 0.98,
        ...             "best_step": 1500,
        ...             "steps": 2000,
        ...             "steps_per_second": 5000.0,
        ...             "train_seconds": 0.4,
        ...             "compile_seconds": 2.0,
        ...             "parameters": 28010,
        ...             "state_sha256": "0123456789abcdef",
        ...         }
        ...     )
        ... )
        best        98.00 % at step 1,500
        steps       2,000 in 0:00:00, 5,000 steps/s, and 2.0 s to compile
        parameters  28,010
        state       0123456789ab
    """
    best, seconds = summary["best_test_accuracy"], round(summary["train_seconds"])
    rows = {
        "best": f"{100 * best:.2f} % at step {summary['best_step']:,}",
        "steps": (
            f"{summary['steps']:,} in {timedelta(seconds=seconds)}, "
            f"{summary['steps_per_second']:,.0f} steps/s, and "
            f"{summary['compile_seconds']:.1f} s to compile"
        ),
        "parameters": f"{summary['parameters']:,}",
        "state": summary["state_sha256"][:12],
    }
    return "\n".join(f"{name:12}{text}" for name, text in rows.items())
