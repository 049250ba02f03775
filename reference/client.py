"""The parent's handle on llama.cpp: it starts the child, sends requests, and turns the child's death into one clear error."""

import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints import errors
from checkpoints.errors import ReferenceFailed
from checkpoints.printable import printable

from .builds import Build
from .child import Child, finish
from .jobs import EXACT, Description, DumpJob, DumpResult, FilePlan, Node, Tokens

if TYPE_CHECKING:
    from checkpoints.graph import RecordedGraph


class Reference:
    """llama.cpp in a child process, which starts at once (or, with `start=False`, at the first request) and ends with this object.

    A request after the child died starts a new one. One request runs at a time: another thread waits. A context manager.

    Args:
        verbose: whether llama.cpp's own log goes to this process's stderr.
        threads: the default for requests that give no number; None for all cores that the process may use.
        child: a process that was started ahead, with the same `verbose` and `build`.
        build: another llama.cpp than the installed one.
    """

    def __init__(
        self,
        *,
        verbose: bool = False,
        threads: int | None = None,
        child: Child | None = None,
        start: bool = True,
        build: Build | None = None,
    ) -> None:
        self._build = build
        self._verbose = verbose
        self._threads = threads
        self._children: list[Child] = [] if child is None else [child]
        self._lock = threading.Lock()
        self._holder: int | None = None  # the thread whose request is being answered
        self._finalizer = weakref.finalize(self, finish, self._children)
        if start:
            self._start()

    def _start(self) -> Child:
        if not self._children:
            self._children.append(Child(self._verbose, self._build))
        return self._children[0]

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return self._children[0].process.pid if self._children else None

    def _request(self, doing: str, name: str, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        """Ask, and yield the answer's items; the last one is what the method returned."""
        if self._holder == threading.get_ident():
            raise RuntimeError("a capture is being read: finish or close it before the next request")
        with self._lock:
            self._holder = threading.get_ident()
            child = self._start()
            finished = False
            try:
                child.connection.send((name, arguments, keywords))
                while True:
                    answer = child.connection.recv()
                    if answer[0] == "item":
                        yield answer[1]
                        continue
                    if answer[0] == "note":
                        print(f"parity: {printable(answer[1], None)}", file=sys.stderr)
                        continue
                    finished = True
                    break
            except GeneratorExit:
                self._drop_answer(child)
                finished = True
                raise
            except (EOFError, OSError):
                raise self._died(doing) from None
            finally:
                self._holder = None
                if not finished:  # interrupted, its result is no longer needed; or it died
                    finish(self._children)
                    _sweep_cache()
        yield _value(answer)

    def _drop_answer(self, child: Child) -> None:
        try:
            child.connection.send(("stop", (), {}))
            while child.connection.recv()[0] in ("item", "note"):
                pass
        except (EOFError, OSError):
            finish(self._children)

    def _died(self, doing: str) -> ReferenceFailed:
        child = self._children.pop()
        status = child.end(kill=False)
        last_words = child.last_words()
        child.stderr.close()
        how = "aborted" if status == -6 else ("was killed" if status == -9 else "ended")
        advice = {
            -6: "This llama.cpp cannot compute this model or request; --verbose shows its log.",
            -9: "The system may have run out of memory: use a smaller model, or --window 1.",
        }.get(status, "Run again with --verbose to see its log.")
        reason = f": {last_words}" if last_words else f" (status {status})"
        return ReferenceFailed(f"llama.cpp {how} while {doing}{reason}.", advice, code="aborted")

    def _ask(self, doing: str, name: str, *arguments: Any, **keywords: Any) -> Any:
        answer = None
        for answer in self._request(doing, name, *arguments, **keywords):  # noqa: B007 - the last one counts
            pass
        return answer

    def tokenize(self, model: Path, text: str, *, add_special: bool = True, parse_special: bool = True) -> Tokens:
        """The ids of a text as llama.cpp tokenizes it; only the vocabulary is loaded.

        Raises:
            InputError: the text is empty; ModelError: no such file, not a GGUF, no tokenizer.
        """
        return cast(Tokens, self._ask(f"tokenizing with {model}", "tokenize", Path(model), text, add_special, parse_special))

    def pieces(self, model: Path, ids: Sequence[int]) -> list[str]:
        """The text of each id, special tokens shown.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return list(self._ask(f"reading the vocabulary of {model}", "pieces", Path(model), tuple(ids)))

    def text(self, model: Path, ids: Sequence[int]) -> str:
        """The text of all ids together, special tokens shown; half a character at either end is left out.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        return str(self._ask(f"reading the vocabulary of {model}", "text", Path(model), tuple(ids)))

    def chat_texts(self, model: Path, text: str) -> dict[str, str]:
        """Template name -> the text in that chat template; "own" is the file's. See `reference.chat`."""
        return dict(self._ask(f"reading the chat template of {model}", "chat_texts", Path(model), text))

    def dump(self, job: DumpJob) -> DumpResult:
        """Compute a prompt (and what follows it) and write `job.out`.

        Raises:
            InputError, ModelError, ReferenceFailed: the request, the file, or llama.cpp.
        """
        job = replace(job, threads=job.threads or self._threads)
        by_windows = " window by window" if isinstance(job.window, int) else ""
        return cast(DumpResult, self._ask(f"computing {job.model}{by_windows}", "dump", job))

    def capture(
        self,
        model: Path,
        tokens: Sequence[int],
        points: str | None = None,
        mode: str = EXACT,
        *,
        kv_type: str = "f32",
        threads: int | None = None,
    ) -> Iterator[tuple[Node, NDArray[np.float32]]]:
        """Whole values of one forward pass over `tokens`, in the order of computation.

        Each is float32 in the layout of `checkpoints.summary.summarise`: [T, …], [H, T, S] for kq and kq_soft_max, [S, K·d] for
        k_read and v_read. `points` is a `--points` expression, None for everything.
        """
        request = self._request(
            f"computing {model}", "capture", Path(model), tuple(tokens), points, mode, kv_type, threads or self._threads
        )
        yield from _but_last(request)

    def logits(
        self,
        model: Path,
        tokens: Sequence[int],
        *,
        first: int = 0,
        portion: int = 16,
        mode: str = EXACT,
        kv_type: str = "f32",
        threads: int | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """The logits of these tokens from position `first` on, in pieces of float32 [n, V] with n ≤ `portion`, which bounds the memory."""
        request = self._request(
            f"computing {model}", "logits", Path(model), tuple(tokens), first, portion, mode, kv_type, threads or self._threads
        )
        yield from _but_last(request)

    def layers(
        self,
        model: Path,
        first: int,
        stop: int,
        hidden: NDArray[np.float32],
        points: str | None = None,
        mode: str = EXACT,
        *,
        kv_type: str = "f32",
        threads: int | None = None,
    ) -> Iterator[tuple[Node, NDArray[np.float32]]]:
        """As `capture`, for layers first … stop − 1 only, which get `hidden` [T, D] (positions 0 … T − 1) as their input.

        If `stop` is the number of layers, `output_norm` and `logits` follow: how the model continues from this state.

        Raises:
            InputError: no such layers, a hidden state of another shape, or a model that cannot be cut into windows.
        """
        request = self._request(
            f"computing layers of {model}",
            "layers",
            Path(model),
            (first, stop),
            np.ascontiguousarray(hidden, dtype=np.float32),
            points,
            mode,
            kv_type,
            threads or self._threads,
        )
        yield from _but_last(request)

    def describe(self, model: Path) -> Description:
        """What llama.cpp knows of a model: metadata, sizes, and the points of its graph in order."""
        return cast(Description, self._ask(f"loading {model}", "describe", Path(model)))

    def graph(self, model: Path, mode: str = EXACT, *, n_ctx: int = 0, threads: int | None = None) -> "RecordedGraph":
        """The graph that llama.cpp builds for a model, with sizes that hold for every length; nothing is computed for it.

        `n_ctx` is the context that a run will have: some architectures choose their RoPE factors by it.

        Raises:
            ModelError: the file is not usable; ReferenceFailed: the graph changes its structure with the length.
        """
        doing = f"recording the graph of {model}"
        try:
            return cast("RecordedGraph", self._ask(doing, "graph", Path(model), mode, n_ctx, threads or self._threads))
        except ReferenceFailed as error:
            if error.code != "aborted":
                raise
            # The passes that are recorded are not computed: some models compute although these cannot even be built.
            advice = (
                "--verbose shows llama.cpp's log. If it computes the model, `parity dump ref` and `parity diff` need no graph."
            )
            raise ReferenceFailed(error.message, advice, code=error.code) from error

    def quantize(self, model: Path, ftype: str, out: Path) -> Path:
        """Write a model with another file type ("Q4_K_M", "F16", …)."""
        with _swept(out):
            return cast(Path, self._ask(f"quantizing {model}", "quantize", Path(model), ftype, Path(out), self._threads))

    def quantised(self, model: Path, ftype: str) -> FilePlan:
        """What a model, which may have holes for weights, would be as another file type: nothing is read of it and nothing written.

        Raises:
            InputError: no such type; ReferenceFailed: llama.cpp refuses it, or the type needs an importance matrix.
        """
        return cast(FilePlan, self._ask(f"planning {model} as {ftype}", "quantised", Path(model), ftype))

    def twin(self, model: Path, out: Path | None = None, *, joined: bool = False) -> Path:
        """The F32 twin of a model, from the cache or made now; with `out`, a separate copy at that path.

        An F32 model is its own twin; with `joined`, a model in several files is not, since a program that reads it may not know of the
        others.
        """
        with _swept(out):
            return cast(Path, self._ask(f"making the F32 twin of {model}", "twin", Path(model), out, joined, self._threads))

    def wanted_tensors(self, metadata: Path) -> list[tuple[str, tuple[int, ...]]]:
        """Names and row-major shapes of the tensors that llama.cpp wants for a GGUF's metadata, optional ones too.

        Raises:
            ModelError: llama.cpp cannot build a model from them.
        """
        return list(self._ask("making a model of these metadata", "wanted_tensors", Path(metadata)))

    def load(self, model: Path) -> None:
        """Load a model unchanged.

        Raises:
            ModelError: llama.cpp refuses it.
        """
        self._ask(f"loading {model}", "load", Path(model))

    def versions(self) -> dict[str, Any]:
        """llama-cpp-python's version, llama.cpp's, its build and the backend that computes."""
        return cast(dict[str, Any], self._ask("starting", "versions"))

    def close(self) -> None:
        """End the child and wait for it. A second call does nothing."""
        finish(self._children)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _swept(out: Path | None) -> Iterator[None]:
    """Remove what a process that ended too early left beside `out`, the file that it was to make."""
    try:
        yield
    except BaseException:
        from checkpoints.whole_file import destination, sweep

        if out is not None:
            sweep(destination(out))
        raise


def _sweep_cache() -> None:
    from .twin_cache import sweep_cache

    with suppress(OSError):
        sweep_cache()


def _but_last(items: Iterator[Any]) -> Iterator[Any]:
    """All items but the last, which is the answer's own value; closing this closes `items`."""
    try:
        held = next(items)
        for item in items:
            yield held
            held = item
    finally:
        cast(Any, items).close()


def _value(answer: tuple[Any, ...]) -> Any:
    """The value of an answer; raises the error if the answer is one."""
    if answer[0] == "done":
        return answer[1]
    if answer[0] == "error":
        _, name, message, advice, code = answer
        raise getattr(errors, name, ReferenceFailed)(message, advice, code=code)
    raise RuntimeError(f"the reference's process failed:\n{answer[1]}")
