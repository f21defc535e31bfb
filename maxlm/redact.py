"""Secrets out of text that is shown or kept: error lines, tracebacks, config.json, what a checkpoint says of its run.

    redact('HF_TOKEN=hf_Ab… is refused')      # 'HF_TOKEN=[redacted] is refused'
    redact('tokens=2e9, tokenizer.json')      # as it is

Found by the name that a value is given to, and by the forms that known services give to their keys. That is a net under a
mistake: a secret that has no such name and no such form passes it.
"""

import re
from typing import Any

GONE = '[redacted]'

# What is given to a name with one of these parts, or pairs of parts, is secret, whatever it looks like.
_PARTS = {'secret', 'secrets', 'password', 'passwords', 'passwd', 'pwd', 'passphrase', 'credential', 'credentials', 'apikey',
          'authorization'}
_PAIRS = {(of, key) for of in ('api', 'access', 'private', 'signing', 'account') for key in ('key', 'keys')}
# 'token' ends the name of a secret, but for those of text: hf_token and not bos_token, tokens_per_second, token_id.
_OF_TEXT = {'bos', 'eos', 'eot', 'pad', 'unk', 'cls', 'sep', 'mask', 'special', 'image', 'audio', 'added', 'per', 'first',
            'last', 'next', 'max', 'min', 'n', 'start', 'end', 'begin', 'stop'}

# name=  name =  'name': ['name'] =  --name; in `name: value` without quotes a sentence may go on
_NAME = re.compile(r'(?<![\w.-])(?:([\w.-]{1,100})\s?=>?\s?|["\']([\w.-]{1,100})["\']\]?\s?[:=]\s?|'
                   r'(--[\w.-]{1,100}) (?!--))')
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*|\'(?:[^\'\\]|\\.)*|[^\s&"\']+', re.DOTALL)
_NUMBER = re.compile(r'[-+]?[\d.,_]+(?:e[-+]?\d+)?[.,;)\]]*')
_YES_OR_NO = re.compile(r'(?:true|false|none|null)[.,;)\]`]*', re.IGNORECASE)

_FORMS = re.compile('|'.join((
  r'-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)',
  r'(?<![A-Za-z0-9])(?:'
  r'hf_[A-Za-z0-9]{20,}'  # Hugging Face
  r'|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}'
  r'|AIza[\w-]{30,}|ya29\.[\w-]{20,}'  # Google
  r'|sk-(?=[A-Za-z_-]{0,40}\d)[\w-]{20,}'  # OpenAI, Anthropic
  r'|xox[a-z]-[A-Za-z0-9-]{10,}'  # Slack
  r'|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])'  # Amazon
  r'|wandb_v\d_\w{20,}'
  r')',
  r'(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*',  # JSON web tokens
  r'(?:(?<=://)|(?<=\w:/))[^\s/@"\']*:[^\s/"\']*(?=@)',  # user:password@ in a URL, of which a path has one slash only
  r'(?<=[Bb]earer )[\w.~+/=-]{16,}',
  r'(?:(?<=wandb)|(?<=WANDB))(?P<between>[^\n]{0,40}?)(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])')), re.DOTALL)


def redact(text: str) -> str:
  """The text with '[redacted]' in the place of each secret that is found. Twice is as once."""
  text = _FORMS.sub(lambda found: (found['between'] or '') + GONE, text)
  pieces, end = [], 0
  while named := _NAME.search(text, end):
    pieces.append(text[end:named.end()])
    end = named.end()
    name = named[1] or named[2] or named[3]
    value = _VALUE.match(text, end) if is_secret(name) else None  # else it is looked at itself: x=password=y
    if value and not (_YES_OR_NO.fullmatch(value[0]) or name.lower().endswith('token') and _NUMBER.fullmatch(value[0])):
      pieces.append(value[0][0] * (value[0][0] in '"\'') + GONE)
      end = value.end()
  return ''.join(pieces) + text[end:]


def redact_json(plain: Any, name: str = '') -> Any:
  """A JSON tree with every string redacted; all strings under a key whose name says that it is secret are one. Keys stay."""
  if isinstance(plain, dict):
    return {key: redact_json(child, name if is_secret(name) else key) for key, child in plain.items()}
  if isinstance(plain, (list, tuple)):
    return [redact_json(child, name) for child in plain]
  if isinstance(plain, str):
    return GONE if plain and is_secret(name) else redact(plain)
  return plain


def is_secret(name: str) -> bool:
  """Whether what is given to this name is secret: HF_TOKEN, apiKey, db.password; not bos_token, tokens or sort_key."""
  parts = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()
  parts = [part for part in re.split(r'[^a-z0-9]+', parts) if part]
  if _PARTS & {*parts} or _PAIRS & {*zip(parts, parts[1:])}:
    return True
  return parts[-1:] == ['token'] and not _OF_TEXT & {*parts[-2:-1]}
