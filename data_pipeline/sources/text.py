"""HTML -> text, and what is done to any text before it becomes a document."""

import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

# Navigation bars and tables of contents of the generators that documentation is made with.
_SKIPPED = ('nav', '.navheader', '.navfooter', '.NAVHEADER', '.NAVFOOTER', '.toc', '.TOC', '.book-navigation')
_LISTING_NUMBER = re.compile(r'(?m)^(>?) {0,4}\d{1,4}&nbsp;')  # DocBook's DSSSL numbers the lines of a listing
_NOT_TEXT = re.compile('[\x00-\x08\x0b-\x1f\x7f\xad\u200b\ufeff\ud800-\udfff]')  # control characters, hints, halves


def html_to_text(html: bytes) -> str:
  """Readable text of a page of documentation; '' where there is none.

  The whole page but its navigation: resiliparse's main_content heuristic takes lists of links or short items for
  boilerplate, and in documentation those are content (it drops 97 % of abs-guide's gotchas.html).
  """
  text = bytes_to_str(html, detect_encoding(html, from_html_meta=True))
  text = _LISTING_NUMBER.sub(r'\1', text)
  return extract_plain_text(text, alt_texts=False, skip_elements=list(_SKIPPED))


def clean(text: str) -> str:
  """One kind of line end and of space, no control characters, no blank space at line ends, at most one blank line."""
  text = text.replace('\r\n', '\n').replace('\r', '\n').replace('\u00a0', ' ')
  text = '\n'.join(line.rstrip() for line in _NOT_TEXT.sub('', text).split('\n'))
  return re.sub(r'\n{3,}', '\n\n', text).strip('\n')
