"""Scans the spans of one line of a trace file into columns, compiled: for runs of many spans.

Takes JSON as our own writer spells it, without white space; keys may come in any order, and those
that are not known are passed over. Anything else is refused, and the caller decodes that line in
the general way, so this decides speed and never a value. Must not know what columns mean beyond
where they stand.

Invariants: of a line of JSON it gives the rows that the general decoder gives (a test compares
them); equal texts get equal numbers, and are compared byte by byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from hotset.actors import names
from hotset.dashboards.otlp import COLUMNS, EMPTY_ROW
from hotset.policies.jit import COMPILED, compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

__all__ = ["COMPILED", "Scanned", "scan"]

_MOST_TEXTS = 1024
_LEAST_SPAN = 100  # bytes: its ids, times and their names take more
_AHEAD = 64  # zeros behind the text: more than any look-ahead
_NONE = -1
_QUOTE, _BACKSLASH, _COMMA, _COLON, _MINUS = 34, 92, 44, 58, 45
_OPEN, _CLOSE, _LIST, _END = 123, 125, 91, 93
_TRUE = 116
_A, _E, _K, _L, _U, _V, _Y = (ord(letter) for letter in "aekluvy")


class Scanned(NamedTuple):
    """Rows [spans, COLUMNS], ids as their bits, and the texts by their number in them."""

    rows: Ints
    texts: list[str]


def scan(body: bytes, *, own: str) -> Scanned | None:
    """Rows of `{...},{...}`, or None when it has to be decoded in the general way.

    `own` is the trace (32 hex digits) whose spans have no request.
    """
    data = np.frombuffer(body + bytes(_AHEAD), np.uint8)
    rows = np.empty((1 + len(body) // _LEAST_SPAN, len(COLUMNS)), np.int64)
    texts = np.full((2 * _MOST_TEXTS, 3), _NONE, np.int64)
    trace = np.array([int(own[:16], 16), int(own[16:], 16)], np.uint64).view(np.int64)
    count = _spans(data, len(body), rows, _EMPTY, texts, trace, _SPAN_KEYS, _KEYS)
    if count < 0:
        return None
    used = texts[texts[:, 0] >= 0]
    try:
        found = [_text(body[a:b]) for _, a, b in used[np.argsort(used[:, 0])].tolist()]
    except (UnicodeDecodeError, msgspec.DecodeError):
        return None
    return Scanned(rows[:count], found)


def _text(raw: bytes) -> str:
    if b"\\" in raw:
        return msgspec.json.decode(b'"' + raw + b'"', type=str)
    return raw.decode()


# --- compiled -----------------------------------------------------------------------------------


@compiled
def _hash(data: Bytes, begin: int, end: int) -> int:
    """FNV-1a of 64 bits."""
    found = np.uint64(0xCBF29CE484222325)
    for at in range(begin, end):
        found = (found ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
    return np.int64(found)  # type: ignore[return-value] # an int once it is compiled


@compiled
def _is_key(data: Bytes, at: int) -> bool:
    """Whether `{"key":"` stands there."""
    return bool(
        data[at] == _OPEN and data[at + 1] == _QUOTE and data[at + 2] == _K and data[at + 3] == _E
        and data[at + 4] == _Y and data[at + 5] == _QUOTE and data[at + 6] == _COLON
        and data[at + 7] == _QUOTE
    )  # fmt: skip


@compiled
def _is_value(data: Bytes, at: int) -> bool:
    """Whether `,"value":{"` stands there."""
    return bool(
        data[at] == _COMMA and data[at + 1] == _QUOTE and data[at + 2] == _V
        and data[at + 3] == _A and data[at + 4] == _L and data[at + 5] == _U
        and data[at + 6] == _E and data[at + 7] == _QUOTE and data[at + 8] == _COLON
        and data[at + 9] == _OPEN and data[at + 10] == _QUOTE
    )  # fmt: skip


@compiled
def _string(data: Bytes, at: int) -> int:
    """Where the string that begins at the quote `at` has its closing quote; -1: nowhere."""
    at += 1
    while at < len(data):
        if data[at] == _QUOTE:
            return at
        at += 2 if data[at] == _BACKSLASH else 1
    return -1


@compiled
def _skip(data: Bytes, at: int) -> int:
    """Behind the value that begins at `at`; -1 when it has no end."""
    depth = 0
    while at < len(data):
        letter = data[at]
        if letter == _QUOTE:
            at = _string(data, at)
            if at < 0:
                return -1
        elif letter in (_OPEN, _LIST):
            depth += 1
        elif letter in (_CLOSE, _END, _COMMA):
            if depth == 0:
                return at
            if letter != _COMMA:
                depth -= 1
                if depth == 0:
                    return at + 1
        at += 1
    return -1


@compiled
def _number(data: Bytes, begin: int, end: int) -> int:
    """Value of decimal digits; the caller has checked them with `_digits`."""
    value, negative = 0, data[begin] == _MINUS
    for at in range(begin + 1 if negative else begin, end):
        value = value * 10 + (int(data[at]) - 48)
    return -value if negative else value


@compiled
def _digits(data: Bytes, begin: int, end: int) -> bool:
    """Whether these are the digits of an integer of at most 18, perhaps with a sign."""
    if begin < end and data[begin] == _MINUS:
        begin += 1
    if not 0 < end - begin <= 18 and not (end - begin == 19 and data[begin] < 57):
        return False
    for at in range(begin, end):  # noqa: SIM110 - numba has no generators
        if not 48 <= data[at] <= 57:
            return False
    return True


@compiled
def _hex(data: Bytes, begin: int, end: int) -> int:
    """The 64 bits of hexadecimal digits; the caller has checked them with `_is_hex`."""
    value = np.uint64(0)
    for at in range(begin, end):
        letter = int(data[at])
        digit = letter - 48 if letter <= 57 else (letter | 32) - 87
        value = value * np.uint64(16) + np.uint64(digit)
    return np.int64(value)  # type: ignore[return-value] # an int once it is compiled


@compiled
def _is_hex(data: Bytes, begin: int, end: int, digits: int) -> bool:
    """Whether these are so many hexadecimal digits."""
    if end - begin != digits:
        return False
    for at in range(begin, end):
        letter = int(data[at])
        if not (48 <= letter <= 57 or 97 <= (letter | 32) <= 102):
            return False
    return True


@compiled
def _intern(data: Bytes, begin: int, end: int, texts: Ints) -> int:
    """Number of a text, a new one for a new text; -1 when there are too many of them.

    `texts` [2 * most, 3] is a hash table: number, begin and end of the first of each.
    """
    mask = len(texts) - 1
    slot = _hash(data, begin, end) & mask
    tried = 0
    while texts[slot, 0] >= 0:
        first = texts[slot, 1]
        if texts[slot, 2] - first == end - begin:
            same = True
            for at in range(end - begin):
                if data[first + at] != data[begin + at]:
                    same = False
                    break
            if same:
                return int(texts[slot, 0])
        slot = (slot + 1) & mask
        tried += 1
    number = 0
    for at in range(len(texts)):
        if texts[at, 0] >= 0:
            number += 1
    if 2 * number >= len(texts):
        return -1
    texts[slot, 0], texts[slot, 1], texts[slot, 2] = number, begin, end
    return number


@compiled
def _attribute(data: Bytes, at: int, row: Ints, texts: Ints, keys: Ints) -> int:  # noqa: PLR0911, PLR0912, C901 - one way out for each other spelling
    """Take `{"key":K,"value":{KIND:VALUE}}` at `at` in; behind it, or -1 when it is spelled else.

    `keys` [known, 4]: hash of a key, where its value stands in a row, what kind of value it is, and
    the hash of how that kind is spelled.
    """
    if not _is_key(data, at):
        return -1
    end = _string(data, at + 7)
    if end < 0 or not _is_value(data, end + 1):
        return -1
    found = _hash(data, at + 8, end)
    known = -1
    for number in range(len(keys)):
        if keys[number, 0] == found:
            known = number
            break
    begin = end + 12
    end = _string(data, end + 11)
    if end < 0 or data[end + 1] != _COLON:
        return -1
    spelled = _hash(data, begin, end) if known >= 0 else 0
    begin = end + 2
    quoted = data[begin] == _QUOTE
    end = _string(data, begin) if quoted else _skip(data, begin)
    after = end + 1 if quoted else end
    if end < 0 or data[after] != _CLOSE or data[after + 1] != _CLOSE:
        return -1
    if quoted:
        begin += 1
    if known < 0:
        return after + 2
    place, kind = keys[known, 1], keys[known, 2]
    if spelled != keys[known, 3]:
        return -1
    if kind == _IS_TEXT:
        row[place] = _intern(data, begin, end, texts)
        return after + 2 if quoted and row[place] >= 0 else -1
    if kind == _IS_FLAG:
        row[place] = 1 if data[begin] == _TRUE else 0
        return after + 2
    if kind == _IS_TRACE:
        if not _is_hex(data, begin, end, 32):
            return -1
        row[place] = _hex(data, begin + 16, end)
        return after + 2
    if not _digits(data, begin, end):
        return -1
    value = _number(data, begin, end)
    row[place] = row[place] + value if kind == _IS_PART else value
    return after + 2


@compiled
def _attributes(data: Bytes, at: int, row: Ints, texts: Ints, keys: Ints) -> int:
    """Take the list that begins at `at` in; behind it, or -1."""
    if data[at] != _LIST:
        return -1
    at += 1
    while data[at] != _END:
        at = _attribute(data, at, row, texts, keys)
        if at < 0:
            return -1
        if data[at] == _COMMA:
            at += 1
    return at + 1


@compiled
def _links(data: Bytes, at: int, row: Ints, span_id: int) -> int:
    """Count links and take the first one's span; behind the list, or -1."""
    if data[at] != _LIST:
        return -1
    at += 1
    while data[at] != _END:
        after = _skip(data, at)
        if data[at] != _OPEN or after < 0:
            return -1
        row[1] += 1
        while row[1] == 1 and data[at] != _CLOSE:
            end = _string(data, at + 1) if data[at + 1] == _QUOTE else -1
            if end < 0 or data[end + 1] != _COLON:
                return -1
            found = _hash(data, at + 2, end)
            at = _skip(data, end + 2)
            if at < 0 or at >= after:
                return -1
            if found == span_id:
                if data[end + 2] != _QUOTE or not _is_hex(data, end + 3, at - 1, 16):
                    return -1
                row[6] = _hex(data, end + 3, at - 1)
        at = after
        if data[at] == _COMMA:
            at += 1
    return at + 1


@compiled
def _plain(  # noqa: C901, PLR0911, PLR0913, PLR0917 - one branch a key; compiled code takes no objects
    data: Bytes, key: int, first: int, last: int, row: Ints, trace: Ints, span_keys: Ints
) -> int:
    """Take the id or time of a key in; the bit that says which was needed, or -1."""
    if key == span_keys[0]:  # spanId
        if not _is_hex(data, first, last, 16):
            return -1
        row[4] = _hex(data, first, last)
        return 1
    if key == span_keys[1]:  # parentSpanId
        if last > first:
            if not _is_hex(data, first, last, 16):
                return -1
            row[5] = _hex(data, first, last)
        return 0
    if key == span_keys[2]:  # traceId
        if not _is_hex(data, first, last, 32):
            return -1
        low = _hex(data, first + 16, last)
        if low != trace[1] or _hex(data, first, first + 16) != trace[0]:
            row[_REQUEST_AT] = low
        return 2
    if key in (span_keys[4], span_keys[5]):  # startTimeUnixNano, endTimeUnixNano
        if not _digits(data, first, last):
            return -1
        row[2 if key == span_keys[4] else 3] = _number(data, first, last)
        return 8 if key == span_keys[4] else 16
    return 0


@compiled
def _span(  # noqa: C901, PLR0913, PLR0917 - as above
    data: Bytes, at: int, row: Ints, texts: Ints, trace: Ints, span_keys: Ints, keys: Ints
) -> int:
    """Take the span that begins at `at` in; behind it, or -1 when it is spelled otherwise."""
    if data[at] != _OPEN:
        return -1
    needed = 0
    while data[at] != _CLOSE:
        end = _string(data, at + 1) if data[at + 1] == _QUOTE else -1
        if end < 0 or data[end + 1] != _COLON:
            return -1
        key = _hash(data, at + 2, end)
        value = end + 2
        quoted = data[value] == _QUOTE
        if key == span_keys[6]:  # attributes
            at = _attributes(data, value, row, texts, keys)
        elif key == span_keys[7]:  # links
            at = _links(data, value, row, span_keys[0])
        elif quoted:
            end = _string(data, value)
            at = end + 1 if end >= 0 else -1
        else:
            at = end = _skip(data, value)
        if at < 0 or (data[at] != _COMMA and data[at] != _CLOSE):
            return -1
        if key == span_keys[3]:  # name
            row[0] = _intern(data, value + 1, end, texts)
            if not quoted or row[0] < 0:
                return -1
            needed |= 4
            continue
        took = _plain(data, key, value + 1 if quoted else value, end, row, trace, span_keys)
        if took < 0:
            return -1
        needed |= took
    return at + 1 if needed == 31 else -1


@compiled
def _spans(  # noqa: PLR0913, PLR0917 - as above
    data: Bytes, size: int, rows: Ints, empty: Ints, texts: Ints, trace: Ints, span_keys: Ints,
    keys: Ints,
) -> int:  # fmt: skip
    """Take all spans in; how many there are, or -1 when one is spelled otherwise.

    Behind `size` there are zeros, so that looking a few letters ahead is safe and never fits.
    """
    at = count = 0
    while at < size:
        if count >= len(rows):
            return -1
        for place in range(len(empty)):
            rows[count, place] = empty[place]
        at = _span(data, at, rows[count], texts, trace, span_keys, keys)
        if at < 0:
            return -1
        count += 1
        if at < size:
            if data[at] != _COMMA or at + 1 == size:
                return -1
            at += 1
    return count if at == size else -1


# --- what the compiled functions look for -------------------------------------------------------


def _fnv(text: str) -> int:
    found = 0xCBF29CE484222325
    for one in text.encode():
        found = (found ^ one) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return found - (1 << 64) if found >> 63 else found


_IS_TEXT, _IS_COUNT, _IS_PART, _IS_TRACE, _IS_FLAG = range(5)
_SPELLED = ("stringValue", "intValue", "intValue", "stringValue", "boolValue")
_REQUEST_AT = COLUMNS.index("request")
_EMPTY: Final = np.array(EMPTY_ROW, np.int64)
_SPAN_KEYS: Final = np.array(
    [
        _fnv(one)
        for one in (
            "spanId", "parentSpanId", "traceId", "name", "startTimeUnixNano", "endTimeUnixNano",
            "attributes", "links",
        )
    ],
    np.int64,
)  # fmt: skip
_KEYS: Final = np.array(
    [
        (_fnv(attribute.name), COLUMNS.index(column), kind, _fnv(_SPELLED[kind]))
        for attribute, column, kind in (
            (names.CODE, "code", _IS_TEXT),
            (names.LAYER, "layer", _IS_COUNT),
            (names.INDEX, "index", _IS_COUNT),
            (names.SOURCE, "source", _IS_TEXT),
            (names.REASON, "reason", _IS_TEXT),
            (names.NBYTES, "nbytes", _IS_COUNT),
            (names.QUEUE, "queue_ns", _IS_COUNT),
            (names.WIRE, "wire_ns", _IS_COUNT),
            (names.VERIFY, "settle_ns", _IS_PART),
            (names.ACTIVATE, "settle_ns", _IS_PART),
            (names.TOKENS, "tokens", _IS_COUNT),
            (names.FORMAT, "format", _IS_TEXT),
            (names.USED, "used", _IS_FLAG),
            (names.TARGET, "target", _IS_TEXT),
            (names.EPOCH, "epoch", _IS_COUNT),
            (names.REQUEST, "request", _IS_TRACE),
        )
    ],
    np.int64,
)
