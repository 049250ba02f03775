"""The requests that the child answers, one method each. The last model stays loaded, since requests for one model come in a row."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import points
from checkpoints.errors import InputError, ModelError
from checkpoints.gguf_file import Contents, contents
from checkpoints.gguf_parts import files_of
from checkpoints.room import free_memory

from . import dump, twin
from .chat import chat_texts, own_template
from .dataflow import of_passes
from .jobs import EXACT, NATIVE, Description, DumpJob, DumpResult, FilePlan, Tokens
from .library import Library
from .model import Model
from .naming import Planned
from .passes import plans_of
from .refusals import check, check_tokens
from .rows import arrange, row_shape, survey
from .session import Session
from .sweep import dump_windows, window_size
from .twin import Twins
from .wanted import wanted_tensors
from .windows import Window, open_window

if TYPE_CHECKING:
    from checkpoints.graph import RecordedGraph

Item = Callable[[Any], None]


class Service:
    """The requests of `client.Reference`, one method each; `item` sends a part of the answer at once."""

    def __init__(self, verbose_fd: int | None) -> None:
        self._library = Library(verbose_fd)
        self._twins = Twins(self._library)
        self._windows: dict[tuple[str, tuple[int, int], int], bool] = {}  # proven windows -> whether they need an output matrix
        self._models: dict[bool, tuple[tuple[Any, ...], Model]] = {}

    def _model(self, path: Path, *, vocab_only: bool = False) -> Model:
        """The model, loaded now or earlier; one with weights and one without are kept."""
        states = [part.stat() for part in files_of(path)]
        identity = (str(path.resolve()), *((at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for at in states))
        held = self._models.get(vocab_only)
        if held is not None and held[0] == identity:
            return held[1]
        if held is not None:
            del self._models[vocab_only]
            held[1].close()
        model = Model(self._library, path, vocab_only=vocab_only)
        self._models[vocab_only] = (identity, model)
        return model

    def _vocabulary(self, contents: Contents) -> Model:
        return self._model(contents.path, vocab_only=True)

    def _computable_for(self, path: Path, tokens: tuple[int, ...], mode: str, threads: int | None) -> Model:
        """The model that computes these tokens. Raises InputError for tokens that are not in its vocabulary."""
        contents = twin.checked(self._library, path)
        check_tokens(self._vocabulary(contents), tokens)
        return self._computable(contents, mode, threads)

    def _computable(self, contents: Contents, mode: str, threads: int | None) -> Model:
        if mode != EXACT:
            return self._model(contents.path)
        path = self._twins.of(contents, threads=threads)
        try:
            return self._model(path)
        except ModelError as error:  # it names a file in the cache, which the user has never seen
            reason = error.message.replace(str(path), str(contents.path))
            raise ModelError(reason, error.advice, code=error.code) from error

    def tokenize(self, path: Path, text: str, add_special: bool, parse_special: bool, *, item: Item) -> Tokens:
        """See `client.Reference.tokenize`."""
        if not text:
            raise InputError("the prompt is empty.", "Give --prompt or --tokens.", code="prompt")
        file = contents(path)
        model = self._vocabulary(file)
        ids = model.tokenize(text, add_special=add_special, parse_special=parse_special)
        bos, eos, add_bos, add_eos = model.special()
        return Tokens(
            ids=ids,
            pieces=model.pieces(ids),
            n_vocab=model.n_vocab,
            bos=bos,
            eos=eos,
            add_bos=add_bos,
            add_eos=add_eos,
            n_ctx_train=file.integer(f"{file.architecture}.context_length"),
            architecture=file.architecture,
        )

    def pieces(self, path: Path, ids: tuple[int, ...], *, item: Item) -> tuple[str, ...]:
        """See `client.Reference.pieces`."""
        return self._vocabulary(contents(path)).pieces(ids)

    def text(self, path: Path, ids: tuple[int, ...], *, item: Item) -> str:
        """See `client.Reference.text`."""
        return self._vocabulary(contents(path)).text(ids)

    def chat_texts(self, path: Path, text: str, *, item: Item) -> dict[str, str]:
        """See `client.Reference.chat_texts`."""
        return chat_texts(self._library, own_template(self._vocabulary(contents(path)).metadata()), text)

    def dump(self, job: DumpJob, *, item: Item) -> DumpResult:
        """See `client.Reference.dump`."""
        started = time.perf_counter()
        file = twin.checked(self._library, job.model)
        if job.plain and (size := window_size(self._library, file, job, free_memory())) is not None:
            return dump_windows(self._library, self._vocabulary(file), file, job, size, started)
        check(job, self._vocabulary(file))  # before minutes are spent on a twin
        info = dump.describe(file, self._library)
        model = self._computable(file, job.mode, job.threads)
        return dump.dump_whole(self._library, model, job, info, started)

    def capture(
        self,
        path: Path,
        tokens: tuple[int, ...],
        expression: str | None,
        mode: str,
        kv_type: str,
        threads: int | None,
        *,
        item: Item,
    ) -> None:
        """See `client.Reference.capture`: items are (Node, float32 array)."""
        model = self._computable_for(path, tokens, mode, threads)
        with Session(model, n_ctx=len(tokens), n_batch=len(tokens), kv_type=kv_type, threads=threads) as session:
            self._deliver(session, tokens, expression, model.n_layers, 0, item)

    def logits(
        self,
        path: Path,
        tokens: tuple[int, ...],
        first: int,
        portion: int,
        mode: str,
        kv_type: str,
        threads: int | None,
        *,
        item: Item,
    ) -> None:
        """See `client.Reference.logits`: items are float32 arrays [n, V]."""
        model = self._computable_for(path, tokens, mode, threads)
        batch = min(portion, len(tokens))
        with Session(model, n_ctx=len(tokens), n_batch=batch, kv_type=kv_type, threads=threads) as session:
            plans = plans_of(session, tokens[:portion])
            for start in range(0, len(tokens), portion):
                part = tokens[start : start + portion]

                def deliver(planned: Planned, value: NDArray[np.float32], start: int = start, count: int = len(part)) -> None:
                    rows = arrange(planned, value, count, start + count)
                    if start + count > first:
                        item(rows[max(first - start, 0) :])

                session.decode(part, start, plans.wanted([points.LOGITS], count=len(part)), deliver)

    def layers(
        self,
        path: Path,
        span: tuple[int, int],
        hidden: NDArray[np.float32],
        expression: str | None,
        mode: str,
        kv_type: str,
        threads: int | None,
        *,
        item: Item,
    ) -> None:
        """See `client.Reference.layers`: items are (Node, float32 array)."""
        contents = twin.checked(self._library, path)
        width = contents.integer(f"{contents.architecture}.embedding_length")
        if hidden.ndim != 2 or not len(hidden) or hidden.shape[1] != width:
            raise InputError(
                f"a hidden state of shape {hidden.shape} is not [T, {width}].", "Give one row per position.", code="hidden"
            )
        count = len(hidden)
        window = self._proven(contents, span, count)
        with (
            open_window(self._library, contents, window, exact=mode == EXACT, threads=threads) as model,
            Session(model, n_ctx=count, n_batch=count, kv_type=kv_type, threads=threads) as session,
        ):
            self._deliver(session, hidden, expression, contents.layers, window.first, item, last=window.stop == contents.layers)

    def _proven(self, contents: Contents, span: tuple[int, int], count: int) -> Window:
        """The window of these layers, after proving once that it computes what the whole model does there."""
        first, stop = span
        if not 0 <= first < stop <= contents.layers:
            raise InputError(
                f"there are no layers {first}…{stop - 1}.", f"The model has layers 0…{contents.layers - 1}.", code="layers"
            )
        known = (contents.fingerprint, span, count)
        if known not in self._windows:
            from .window_proof import prove

            proof = prove(self._library, contents, [span], (0,) * count, hidden=True)
            self._windows[known] = proof.untied
        return Window(first, stop, None, self._windows[known])

    def _deliver(
        self,
        session: Session,
        inputs: tuple[int, ...] | NDArray[np.float32],
        expression: str | None,
        n_layers: int,
        offset: int,
        item: Item,
        *,
        last: bool = True,
    ) -> None:
        """Run one forward pass and send its values to the parent as they come; without `last` the model's output is left out."""
        count = len(inputs)
        known = list(survey(session, inputs, offset=offset).known)
        if not last:
            known = [entry for entry in known if points.parse(entry.point).layer is not None]
        names = [entry.point for entry in known]
        wanted = set(names if expression is None else points.select(expression, names, n_layers))

        def deliver(planned: Planned, value: NDArray[np.float32]) -> None:
            item((planned.node, arrange(planned, value, count, count)))

        session.decode(inputs, 0, [entry for entry in known if entry.point in wanted], deliver)

    def describe(self, path: Path, *, item: Item) -> Description:
        """See `client.Reference.describe`."""
        contents = twin.checked(self._library, path)
        model = self._model(path)
        tokens = tuple(range(min(3, model.n_vocab)))
        with Session(model, n_ctx=2 * len(tokens), n_batch=len(tokens)) as session:
            plans = plans_of(session, tokens, tokens if model.encoder_decoder else ())
        known = [*(plans.encoder.known if plans.encoder is not None else ()), *plans.prompt.known]
        return Description(
            info=dump.describe(contents, self._library),
            metadata=model.metadata(),
            n_layers=model.n_layers,
            n_embd=model.n_embd,
            n_vocab=model.n_vocab,
            n_ctx_train=model.n_ctx_train,
            n_params=model.n_params,
            points=tuple((entry.point, row_shape(entry, len(tokens))) for entry in known),
            nodes=tuple(entry.node for entry in known),
            dataflow=of_passes(plans),
            rope=model.rope,
        )

    def graph(self, path: Path, mode: str, n_ctx: int, threads: int | None, *, item: Item) -> "RecordedGraph":
        """See `client.Reference.graph`."""
        from .graph import record

        contents = twin.checked(self._library, path)
        # A model that is computed in windows is never loaded as a twin; the file itself is only mapped into memory.
        windows = window_size(self._library, contents, DumpJob(path, path, (), mode=mode), free_memory()) is not None
        model = self._computable(contents, NATIVE if windows else mode, threads)
        return record(model, [tensor.name for tensor in contents.tensors], fingerprint=contents.fingerprint, n_ctx=n_ctx)

    def quantize(self, path: Path, ftype: str, out: Path, threads: int | None, *, item: Item) -> Path:
        """See `client.Reference.quantize`."""
        return twin.quantize(self._library, path, ftype, out, threads=threads)

    def quantised(self, path: Path, ftype: str, *, item: Item) -> FilePlan:
        """See `client.Reference.quantised`."""
        from .quantiser import plan

        return plan(self._library, path, ftype)

    def twin(self, path: Path, out: Path | None, joined: bool, threads: int | None, *, item: Item) -> Path:
        """See `client.Reference.twin`."""
        if out is not None:
            return twin.quantize(self._library, path, "F32", out, threads=threads)
        return self._twins.of(twin.checked(self._library, path), joined=joined, threads=threads)

    @property
    def notes(self) -> list[str]:
        """What the user should know about the answers so far; the caller empties the list."""
        return self._twins.notes

    def wanted_tensors(self, path: Path, *, item: Item) -> list[tuple[str, tuple[int, ...]]]:
        """See `client.Reference.wanted_tensors`."""
        return wanted_tensors(self._library, path)

    def load(self, path: Path, *, item: Item) -> None:
        """See `client.Reference.load`."""
        self._model(path)

    def versions(self, *, item: Item) -> dict[str, Any]:
        """See `client.Reference.versions`."""
        return self._library.versions()
