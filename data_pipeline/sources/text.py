"""HTML -> text, and what is done to any text before it becomes a document."""

import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

from data_pipeline.recipe import Reject

# Navigation bars and tables of contents of the generators that documentation is made with.
_SKIPPED = ('nav', '.navheader', '.navfooter', '.NAVHEADER', '.NAVFOOTER', '.toc', '.TOC', '.book-navigation')
_LISTING_NUMBER = re.compile(r'(?m)^(>?) {0,4}\d{1,4}&nbsp;')  # DocBook's DSSSL numbers the lines of a listing
_NOT_TEXT = re.compile('[\x00-\x08\x0b-\x1f\x7f\xad\u200b\ufeff\ud800-\udfff]')  # control characters, hints, halves
_UL, _A = re.compile(r'<(/?)[uU][lL]\b[^>]*>'), re.compile(r'</?[aA]\b[^>]*>')
_LINK, _TAG = re.compile(r'<[aA]\b[^>]*>.*?</[aA]\s*>', re.S), re.compile(r'<[^>]*>')
_HIGHLIGHT = re.compile(r'<span class="[a-z]{1,3}\d?">([^<]*)</span>')  # of syntax: most elements of a page of code
_DEEPER = 3  # elements; resiliparse 2.0.1 drops any <ul> less deep in the body
_GARBLED = 0.01  # of the characters of a file: it is something else than text


def html_to_text(html: bytes, main_content: bool = False, charset: str = '') -> str:
  """Readable text of a page; '' where there is none. charset: what the server said, which goes before what the page says.

  Without main_content: the whole page but its navigation, as documentation needs it. With: without what is around the
  content, by resiliparse's rules of classes, roles and link density, but for its lists: those it takes for
  boilerplate if they stand near the top of the tree or have a few links (97 % of a page of short items). See _keep_lists.
  """
  encoding = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
  text = bytes_to_str(html, encoding or detect_encoding(html, from_html_meta=True))
  if '&nbsp;' in text:  # seldom, and sooner found
    text = _LISTING_NUMBER.sub(r'\1', text)
  if main_content:
    text = _keep_lists(_HIGHLIGHT.sub(r'\1', text))
  return extract_plain_text(text, main_content=main_content, alt_texts=False, skip_elements=list(_SKIPPED))


def _keep_lists(page: str) -> str:
  """The page with each list of which less than half is links so marked up that it is kept."""
  pieces, end, depth, start = [], 0, 0, 0
  for tag in _UL.finditer(page):
    if not tag[1]:
      start, depth = start if depth else tag.start(), depth + 1
    elif depth:
      depth -= 1
      whole = page[start:tag.end()]
      if not depth and 2 * _letters(_LINK.sub('', whole)) > _letters(whole):
        pieces += [page[end:start], '<div>' * _DEEPER, _A.sub('', whole), '</div>' * _DEEPER]
        end = tag.end()
  return ''.join([*pieces, page[end:]])


def _letters(markup: str) -> int:
  return len(''.join(_TAG.sub('', markup).split()))


def decode(data: bytes) -> tuple[str, dict[str, int]]:
  """A text file: utf-8, or what its byte order mark says. Bytes that are not are replaced and counted; Reject if many."""
  encoding = 'utf-16' if data.startswith((b'\xff\xfe', b'\xfe\xff')) else 'utf-8-sig'
  text = data.decode(encoding, 'replace')
  garbled = text.count('\ufffd')
  if garbled > _GARBLED * len(text):
    raise Reject('not utf-8')
  return text, {'invalid utf-8': garbled} if garbled else {}


def clean(text: str) -> str:
  """One kind of line end and of space, no control characters, no blank space at line ends, at most one blank line."""
  text = text.replace('\r\n', '\n').replace('\r', '\n').replace('\u00a0', ' ')
  text = '\n'.join(map(str.rstrip, _NOT_TEXT.sub('', text).split('\n')))
  return re.sub(r'\n{3,}', '\n\n', text).strip('\n')
