"""What names a person or their accounts, replaced: addresses of mail and machines, telephone numbers, cards, bank accounts.

One pass over the bytes finds where one may be; what is found there must have the form, and the checksum where there is one.
"""

import collections
import dataclasses
import ipaddress
import re
from collections.abc import Iterator
from typing import ClassVar

import numba
import numpy as np

from data_pipeline.filters.step import Found, Rule, Texts

KINDS = ('iban', 'card', 'email', 'phone', 'ip')  # what an earlier one has found is not of a later kind
_AT, _NUMBER, _COLON, _ACCOUNT = range(4)  # of places to look at

_EMAIL = re.compile(r"\w[\w.%+-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w@])")
_IPV4 = re.compile(r'(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)')
_IPV6 = re.compile(r'(?<![\w:.])[23][\da-fA-F]{3}:[\da-fA-F:]+(?<!(?<!:):)(?!\w)')  # global ones; not 'see 2001:db8::1:'
_CARD = re.compile(r'(?<![\d.,/+-])(?=(\d{13,19}|\d{4}([ -])\d{4}\2\d{4}\2\d{1,7}|\d{4}([ -])\d{6}\3\d{5})(?!\d|[.,/-]\d))')
_ISSUERS = re.compile(r'4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|35\d{14}|6\d{15,18}')
_INTERNATIONAL = re.compile(r'(?<![\w.+-])\+[1-9]\d{0,2}(?:[ .-]?\(\d{1,5}\)|[ .-]?\d+)+(?!\d)')
_AMERICAN = re.compile(r'(?<![\w.+-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d([.-]))[2-9]\d\d(?(1)\1|[ .-])\d{4}'
                       r'(?![\w-]|\.\d)')
_IBAN = re.compile(r'(?<![A-Za-z\d])(?=([A-Z]{2}\d\d(?: ?[A-Z\d]){11,30}))')  # as long as it can be
# Length of the account numbers of each country that has them (ISO 13616).
_LENGTHS = {code: int(length) for code, length in re.findall(r'([A-Z]{2})(\d\d)', (
  'AD24AE23AL28AT20AZ28BA20BE16BG22BH22BR29BY28CH21CR22CY28CZ24DE22DK18DO28EE20EG29ES24FI18FO18FR27GB22GE22GI23GL18GR27GT28'
  'HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19MR27MT31MU30NL18NO15PK24PL28PS29'
  'PT25QA29RO24RS22SA24SC31SD18SE24SI19SK24SM27ST25SV28TL23TN24TR26UA29VA22VG24XK20'))}


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Redact(Rule):
  """'write to ann@mail.org' becomes 'write to [email]'.

  email  with a dot in its domain.
  ip     IPv4 of 8 digits or more (shorter ones look like numbers of versions and sections) and IPv6; public ones, of no
         documentation or private network.
  phone  '+' and 8 to 15 digits, and North American numbers with '-', '.' or '(…)'. Other national forms are dates and
         quantities as often as numbers of telephones, and stay.
  card   of the lengths and first digits that issuers use, with Luhn's checksum.
  iban   of the length of its country, with its checksum.
  """

  edits: ClassVar[bool] = True
  kinds: tuple[str, ...] = KINDS

  def __post_init__(self):
    if unknown := set(self.kinds) - set(KINDS):
      raise ValueError(f'Redact: {sorted(unknown)[0]!r} is none of {", ".join(KINDS)}')

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    found, counts = collections.defaultdict(list), collections.Counter()
    for i, place, start, end in places(texts.data, texts.offsets, rows).tolist():
      at = int(texts.offsets[rows[i]])
      window = texts.data[at + start:at + end].tobytes().decode()
      for kind, first, last in _FINDERS[place](window):
        if kind in self.kinds:
          first, last = (len(window[:end].encode()) for end in (first, last))
          found[i].append((KINDS.index(kind), start + first, start + last))
    edits = {}
    for i, some in found.items():
      edits[i] = taken = []
      for kind, start, end in sorted(set(some)):
        if all(end <= other_start or start >= other_end for other_start, other_end, _ in taken):
          taken.append((start, end, f'[{KINDS[kind]}]'))
          counts[KINDS[kind]] += 1
      taken.sort()
    return Found(edits=edits, facts={'redacted': dict(sorted(counts.items()))})


@numba.njit(cache=True)
def places(data, offsets, rows):
  """int64 [places, 4]: (index in rows, what may be there, start, end), on boundaries of characters."""
  found = [(0, 0, 0, 0) for _ in range(0)]
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    n, i, address, colon, account = len(text), 0, 0, 0, 0  # the last three: the end of the last place of the kind
    while i < n:
      b, start, end = text[i], i, i + 1
      if b == 64 and i >= address:  # @
        while start and i - start < 320 and not _ends_address(text[start - 1]):
          start -= 1
        at = address = i
        while address < n and address - at < 320 and not _ends_address(text[address]):
          at = address if text[address] == 64 else at  # another one: in one place with the first
          address += 1
        first, last = _widened(text, start, address)
        found.append((r, _AT, first, last))
      elif _is_digit(b) or b == 43 or b == 40:  # + (
        digits, end = 0, i
        while end < n and (_is_digit(text[end]) or 40 <= text[end] <= 47 and text[end] != 42 or text[end] == 32):  # ()+,-./
          digits += _is_digit(text[end])
          end += 1
        if digits >= 8:
          first, last = _widened(text, start, end)
          found.append((r, _NUMBER, first, last))
      elif b == 58 and i >= colon:  # :
        while start and (_is_hex(text[start - 1]) or text[start - 1] == 58):
          start -= 1
        colons, colon = 0, start
        while colon < n and (_is_hex(text[colon]) or text[colon] == 58):
          colons += text[colon] == 58
          colon += 1
        if colons >= 2:
          first, last = _widened(text, start, colon)
          found.append((r, _COLON, first, last))
      elif i >= account and 65 <= b <= 90 and i + 15 <= n and 65 <= text[i + 1] <= 90 and _is_digit(text[i + 2]):
        account = i
        while account < n and (_is_digit(text[account]) or 65 <= text[account] <= 90 or text[account] == 32):
          account += 1
        first, last = _widened(text, start, account)
        if account - i >= 15:
          found.append((r, _ACCOUNT, first, last))
      i = end
  return np.array(found, np.int64).reshape(-1, 4) if found else np.empty((0, 4), np.int64)


@numba.njit(cache=True)
def _widened(text, start, end):
  """With a character more at either end, for what must not stand beside it."""
  start, end = max(start - 1, 0), min(end + 1, len(text))
  while text[start] & 0xc0 == 0x80:
    start -= 1
  while end < len(text) and text[end] & 0xc0 == 0x80:
    end += 1
  return start, end


@numba.njit(cache=True)
def _is_digit(b):
  return 48 <= b <= 57


@numba.njit(cache=True)
def _is_hex(b):
  return 48 <= b <= 57 or 65 <= b <= 70 or 97 <= b <= 102


@numba.njit(cache=True)
def _ends_address(b):
  return b <= 32 or b in (34, 39, 40, 41, 44, 47, 58, 59, 60, 61, 62, 91, 92, 93, 96, 123, 124, 125)  # "'(),/:;<=>[…


def _emails(window: str) -> Iterator[tuple[str, int, int]]:
  for match in _EMAIL.finditer(window):
    yield 'email', *match.span()


def _numbers(window: str) -> Iterator[tuple[str, int, int]]:
  for match in _CARD.finditer(window):
    digits = re.sub('[ -]', '', match[1])
    if _ISSUERS.fullmatch(digits) and luhn(digits):
      yield 'card', *match.span(1)
  for match in _IPV4.finditer(window):
    if sum(map(str.isdigit, match[0])) >= 8 and _is_public(match[0]):
      yield 'ip', *match.span()
  for match in _INTERNATIONAL.finditer(window):
    if 8 <= sum(map(str.isdigit, match[0])) <= 15:
      yield 'phone', *match.span()
  for match in _AMERICAN.finditer(window):
    yield 'phone', *match.span()


def _addresses(window: str) -> Iterator[tuple[str, int, int]]:
  for match in _IPV6.finditer(window):
    if _is_public(match[0]):
      yield 'ip', *match.span()


def _accounts(window: str) -> Iterator[tuple[str, int, int]]:
  for match in _IBAN.finditer(window):
    length = _LENGTHS.get(match[1][:2], 99)
    account = re.compile(f'(?: ?[A-Z\\d]){{{length}}}(?![A-Za-z\\d])').match(window, match.start())
    if account and checks(account[0]):
      yield 'iban', *account.span()


_FINDERS = {_AT: _emails, _NUMBER: _numbers, _COLON: _addresses, _ACCOUNT: _accounts}


def checks(account: str) -> bool:
  """ISO 7064, mod 97-10, as ISO 13616 uses it."""
  account = account.replace(' ', '')
  return int(''.join(str(int(character, 36)) for character in account[4:] + account[:4])) % 97 == 1


def luhn(digits: str) -> bool:
  """ISO/IEC 7812-1, annex B: every second digit from the right counts twice, its digits added."""
  return sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


def _is_public(address: str) -> bool:
  try:
    return ipaddress.ip_address(address).is_global
  except ValueError:
    return False
