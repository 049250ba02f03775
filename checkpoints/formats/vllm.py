"""What vLLM's `extract_hidden_states` writes: a safetensors file a request, with `hidden_states` [T, L, D] and `token_ids` [T].

Of L layers' residual streams: the ids that were asked for (`eagle_aux_hidden_state_layer_ids`), in their order. Id j is the output of
layer j − 1, and 0 the embedding; the file does not repeat them, so that a mapping has to name them.
"""

import re
from pathlib import Path

import numpy as np

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import Mapping
from ..points import in_vocabulary
from ..printable import first_names
from ..record import Dump, Header, Rows
from .arrays import check_size, rows_of, safetensors

_STATES, _IDS = "hidden_states", "token_ids"
_HEAD = 1 << 10
_NAMES = re.compile(rb'\{.*"(?:hidden_states|token_ids)"\s*:.*"(?:hidden_states|token_ids)"\s*:', re.DOTALL)


def detect(path: Path) -> bool:
    """A safetensors file with both tensors."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with path.open("rb") as file:
        return _NAMES.search(file.read(_HEAD)) is not None


def read(path: Path, mapping: Mapping) -> Dump:
    """The residual stream after each layer that was asked for, under the names `hidden_states.0`, … or what the mapping says of these.

    Raises:
        DumpError: it cannot be read, or its tensors do not match.
    """
    check_size(path)
    try:
        arrays = dict(safetensors(path, integers=True))
        states, ids = arrays[_STATES], np.asarray(arrays[_IDS]).reshape(-1)
        if states.ndim != 3 or ids.dtype.kind not in "iu" or len(ids) not in (0, len(states)) or (ids < 0).any():
            raise ValueError(f"{list(states.shape)} states and {len(ids)} token ids do not belong together")  # noqa: TRY301
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DumpError(f"cannot read {path}: {reason}.", "Let vLLM write the request again.", code="array") from error
    points: dict[str, Rows] = {}
    for number in range(states.shape[1]):
        name, entry = mapping.entry(f"{_STATES}.{number}")
        rows = rows_of(name, mapped(mapping, entry, states[:, number]))
        if rows is not None:
            points[name] = rows
    if not points:
        raise DumpError(f"{path} holds no state of any token.", "Let vLLM write the request again.", code="no-records")
    unnamed = [name for name in points if not in_vocabulary(name)]
    note = f"vLLM does not say which layers {first_names(unnamed)} are: name them with --map (layer id j is"
    notes = (f"{note} the output of layer j - 1, 0 the embedding)",) if unnamed else ()
    return Dump(str(path), Header("vllm", tokens=tuple(ids.tolist())) if len(ids) else None, points, notes=notes)
