"""The table of rules, each with its usual cause and what to do. Every entry has a fixture in tests/lint_faults.py."""

from checkpoints.answers.lint import ERROR, SUSPICION, WARNING

from . import against_model, agreement, bits, copies, generated, layout, numbers, replays
from .rule import Rule

RULES: tuple[Rule, ...] = (
    Rule(
        "graph-replay", SUSPICION, replays.graph_replay,
        "values were copied while a CUDA graph was captured, and its replays run no code of the host",
        "record in the captured stream with `parity emit c` or `parity emit python`, whose copies become part of the graph",
    ),
    Rule(
        "same-vector", SUSPICION, copies.same_vector,
        "a pointer kept instead of a copy, and two buffers that are swapped in each layer",
        "copy when the value is computed (`parity emit c` shows how)",
        of_weights=True,
    ),
    Rule(
        "captured-late", SUSPICION, against_model.late_capture,
        "all captures were read at the end of the pass, when the buffer held the last layer's output",
        "copy when the value is computed (`parity emit c` shows how)",
    ),
    Rule(
        "stale-position", SUSPICION, copies.stale_position,
        "the buffer was read before the new position was computed, or the capture ran only once",
        "capture in the stream that computes the value, in every pass",
        of_weights=True,
    ),
    Rule(
        "idle-layer", SUSPICION, copies.idle_layer,
        "the layer's output is zero, was never added, or both captures read one buffer",
        "dump ffn_inp and ffn_out of that layer as well",
        of_weights=True,
    ),
    Rule(
        "impossible-size", ERROR, numbers.impossible_size,
        "a device pointer or freed memory read on the host",
        "copy the values to the host and wait for the copy before they are printed",
    ),
    Rule(
        "addresses", ERROR, bits.addresses,
        "an array of pointers was printed: the pointer to a buffer of pointers, or a struct, read as floats",
        "follow the pointer: copy what it points to to the host, and print that",
    ),
    Rule(
        "non-finite", WARNING, numbers.non_finite,
        "an overflow, a division by zero, or memory that was never written",
        "find the first point with such values: the later ones follow from it",
    ),
    Rule(
        "exact-zeros", WARNING, numbers.exact_zeros,
        "a buffer that was partly written, or read during writing",
        "wait for the kernel before the copy, and check the number of elements it writes",
        of_weights=True,
    ),
    Rule(
        "garbage-logits", WARNING, numbers.garbage_logits,
        "rows of the output matrix that were never multiplied, or memory past the vocabulary's end",
        "compare the kernel's number of rows with the vocabulary",
    ),
    Rule(
        "flat-row", SUSPICION, numbers.flat_row,
        "a buffer that was only initialised",
        "check that the capture comes after the kernel and reads its output",
        of_weights=True,
    ),
    Rule(
        "denormals", SUSPICION, numbers.denormals,
        "integers or other bytes read as floats",
        "check the type and the offset of the printed buffer",
    ),
    Rule(
        "wrong-dtype", SUSPICION, bits.wrong_type,
        "the printing code assumes a wrong type for the buffer",
        "convert to float32 by the buffer's true type before printing",
    ),
    Rule(
        "value-count", WARNING, layout.value_count,
        "a truncated slice, or a buffer shorter than it should be",
        "print the same number of leading values at every point",
    ),
    Rule(
        "shape", SUSPICION, layout.shape,
        "a tensor other than the name says, or a hard-coded shape",
        "`parity model M` lists the points with their shapes",
    ),
    Rule(
        "missing-positions", WARNING, layout.positions,
        "a capture that is skipped in some passes",
        "capture every point in every pass, or choose the positions for all points alike",
    ),
    Rule(
        "doubled", ERROR, layout.doubled,
        "token_idx does not count positions, but the tokens of a pass or the generated ones; or several prompts follow each other",
        "print the token's position in the sequence, counted from 0, and number passes in step",
    ),
    Rule(
        "out-of-order", WARNING, layout.order,
        "lines of several threads, or positions counted from another start",
        "print the token's position in the sequence, counted from 0",
    ),
    Rule(
        "cut-short", WARNING, layout.truncated,
        "the engine was stopped or crashed before it closed the dump",
        "complete records are used; dump again for the rest",
    ),
    Rule(
        "statistics", ERROR, agreement.statistics,
        "statistics and values were taken at different times, or of different numbers of elements",
        "take both from one host copy (`parity emit c` does)",
    ),
    Rule(
        "attention-rows", WARNING, agreement.attention_rows,
        "scores that were never written, a softmax over a padded row, or weights before the softmax",
        "dump kq of that layer as well",
        of_weights=True,
    ),
    Rule(
        "embedding-row", WARNING, against_model.embedding_row,
        "the engine was given other tokens than the header says, or looks rows up with another stride",
        "compare the ids with `parity tokens`",
    ),
    Rule(
        "hparams", WARNING, against_model.hyperparameters,
        "the engine used a default instead of the file's number, or --model is wrong",
        "`parity model M` lists the file's numbers",
    ),
    Rule(
        "not-argmax", WARNING, against_model.choice,
        "sampling with a temperature, or a choice made from another row",
        "generate greedily for a comparison",
    ),
    Rule(
        "repetition", WARNING, generated.repetition,
        "the engine sees the same input in every step: a position or a cache that does not advance",
        "compare one decode step with llama.cpp (`parity run --generate`)",
    ),
)  # fmt: skip
