"""llama.cpp's library: its low-level functions, its log, its version. Used in the child process only."""

import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints.printable import printable

from .bindings import bindings
from .ggml import Ggml

_LOG_LINES = 200  # lines that are kept for the sentence that says why a model was refused
_METADATA = re.compile(r"llama_cpp_python-(.+)\.(?:dist|egg)-info")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class Library:
    """llama.cpp itself, with its log kept instead of printed; a `verbose_fd` receives it too."""

    def __init__(self, verbose_fd: int | None = None) -> None:
        self.api: Any = bindings()
        self.lines: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES)
        self._whole: list[str] | None = None
        self._verbose_fd = verbose_fd
        self._log = self.api.llama_log_callback(self._note)  # llama.cpp keeps only the pointer
        self.api.llama_log_set(self._log, None)
        self.api.llama_backend_init()
        self.ggml = Ggml()

    def _note(self, level: int, text: bytes, _data: int | None) -> None:
        self.lines.append((level, text.decode(errors="replace").rstrip("\n")))
        if self._whole is not None:
            self._whole.append(text.decode(errors="replace"))
        if self._verbose_fd is not None:  # the log contains a model's metadata
            lines = text.decode(errors="replace").split("\n")
            os.write(self._verbose_fd, "\n".join(printable(line.expandtabs(), None) for line in lines).encode(errors="replace"))

    @contextmanager
    def whole_log(self) -> Iterator[list[str]]:
        """Everything that is logged meanwhile, in pieces as llama.cpp hands them over."""
        texts: list[str] = []
        self._whole = texts
        try:
            yield texts
        finally:
            self._whole = None

    def reason(self) -> str:
        """The first error that llama.cpp logged since `lines` was cleared, without the names of its functions."""
        errors = [line for level, line in self.lines if level == _ERROR and line.strip(" .")]
        if not errors:
            return "it gave no reason"
        text = errors[0]
        for prefix in ("error loading model: ", "failed to quantize: "):
            text = text.rpartition(prefix)[2]
        return text.rpartition("error loading model architecture: ")[2].strip()

    def versions(self) -> dict[str, Any]:
        """llama-cpp-python's version, llama.cpp's, and what the CPU code was built with."""
        system = self.api.llama_print_system_info().decode(errors="replace").strip(" |")
        named = getattr(self.api, "llama_version", None)
        return {
            "llama_cpp_python": self._version(),
            "llama_cpp": named().decode() if named is not None else "",
            "system": system,
            "backend": system.partition(" :")[0],
            "devices": list(self.devices()),
        }

    def _version(self) -> str:
        """The version of the bindings, which may lie in another environment; "" if it is not known."""
        place = Path(self.api.__file__).parent.parent
        # `importlib.metadata` says the same, once it has imported what reads electronic mail.
        described = (_METADATA.fullmatch(path.name) for path in place.glob("llama_cpp_python-*-info"))
        return next((match[1] for match in described if match), "")

    def devices(self) -> tuple[str, ...]:
        """The names (`ggml_backend_dev_name`) of all devices that this ggml can compute on: "CPU", "BLAS", "CUDA0"."""
        import ctypes

        ggml = self.api._lib  # llama.cpp's library exports ggml's functions, too
        try:
            ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
            ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
            ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
            ggml.ggml_backend_dev_name.restype = ctypes.c_char_p
            ggml.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
        except AttributeError:  # a version without a list of devices
            return ()
        names = (ggml.ggml_backend_dev_name(ggml.ggml_backend_dev_get(i)) for i in range(ggml.ggml_backend_dev_count()))
        return tuple(name.decode() for name in names)
