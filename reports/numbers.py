"""How numbers and names are written for people."""

import json
from math import isfinite, isnan

from checkpoints.printable import printable


def error(value: float | None) -> str:
    """An error: "0", "1.2e-13", "∞", or "–" where it is not known."""
    if value is None or isnan(value):
        return "–"
    if not isfinite(value):
        return "∞"
    return "0" if value == 0 else f"{value:.1e}"


def of_limit(value: float) -> str:
    """An error in proportion to its limit: "–" for none, "0.12 %" below the limit, "3,100,000 ×" above."""
    if value == 0:
        return "–"
    if not isfinite(value):
        return "∞"
    if value <= 1:
        return f"{100 * value:.2f} %" if value >= 5e-5 else "<0.01 %"
    if value < 10:
        return f"{value:.1f} ×"
    return f"{float(f'{value:.2g}'):,.0f} ×" if value < 1e8 else f"{value:.0e} ×".replace("e+0", "e").replace("e+", "e")


def limit(value: float) -> str:
    """A limit: "1e-10", or "2.15e-10" where it was measured."""
    return f"{value:.0e}" if value == float(f"{value:.0e}") else f"{value:.3g}"


def values(ours: tuple[float, ...], ref: tuple[float, ...], *others: tuple[float, ...]) -> list[list[str]]:
    """Rows with the fewest digits, from 6 on, that tell the first two apart (9 tell every float32 apart)."""
    for digits in range(6, 10):
        texts = [[f"{x:.{digits}g}" for x in side] for side in (ours, ref, *others)]
        if texts[0] != texts[1]:
            break
    return texts


def token(text: str | None) -> str:
    """A token's text in quotes, control characters escaped; empty where it is not known."""
    return clean(json.dumps(text, ensure_ascii=False)) if text is not None else ""


def clean(text: str) -> str:
    """Text from a dump as it may be printed: on one line, without control characters, of a bounded length."""
    return printable(text)


def ranges(numbers: tuple[int, ...]) -> str:
    """Ascending positions as "0–4, 7, 9–30"; from the seventh stretch on, "…"."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][1] + 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    texts = [f"{low}" if low == high else f"{low}–{high}" for low, high in stretches[:6]]
    return ", ".join(texts + ["…"] * (len(stretches) > 6))


def count(number: int, noun: str) -> str:
    """ "1 record", "35 records"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
